"""What a plan says stays whole."""

from types import ModuleType
from typing import Any

import pytest

from flyweight.search.whole import left_whole
from flyweight.spaces import Capabilities, Settings, Space

ANSWER = "its outputs are the answer"
MEETS = "its outputs meet attention, a MultiheadAttention, which is not looked into"


def whole(networks: ModuleType, capabilities: Any, name: str, **settings: Any) -> dict[str, str]:
    space = Space(networks.traced(name), capabilities, Settings(**{"min_keep": 0.1} | settings))
    return left_whole(space, "pruned", networks.make(name)[0])


def test_pytorchs_own_attention_and_what_it_reaches(
    networks: ModuleType, capabilities: Capabilities
) -> None:
    assert whole(networks, capabilities, "library") == {
        "attention": "a MultiheadAttention is not looked into, and stays in float",
        "embed": MEETS,
        "down": MEETS,  # is added to what the attention gives, which is what embed gives
        "head": ANSWER,
    }


def test_a_group_without_a_narrower_width_is_told(
    networks: ModuleType, capabilities: Capabilities
) -> None:
    found = whole(networks, capabilities, "plain", min_keep=1.0)
    assert {n for n, reason in found.items() if "none may go" in reason} == {"c1", "c2", "l1"}
    assert "of its " in found["c1"]


@pytest.mark.parametrize(
    "name", ["plain", "separable", "preactivation", "sequence", "gate", "fixed", "two", "fused"]
)
def test_what_is_told_is_what_has_no_choice(
    networks: ModuleType, capabilities: Capabilities, name: str
) -> None:
    found = whole(networks, capabilities, name)
    network = networks.traced(name)
    space = Space(network, capabilities, Settings(min_keep=0.1))
    free = {n for group, w in space.widths.items() if len(w) > 1
            for n in network.groups[group].members}  # fmt: skip
    assert found.keys() & network.layers.keys() == network.layers.keys() - free


MIXES = "it mixes positions, of each channel by itself"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mixer", {"tokens.0": MIXES, "tokens.2": MIXES, "positions": MIXES, "head": ANSWER}),
        ("heard", {"states": "a GRU keeps its states, and stays in float", "head": ANSWER}),
        ("parallel", {"head": ANSWER}),  # of what goes around, parts go with each branch
    ],
)
def test_what_has_a_reason_of_its_own(
    networks: ModuleType, capabilities: Capabilities, name: str, told: dict[str, str]
) -> None:
    assert whole(networks, capabilities, name, multiple_of=1) == told

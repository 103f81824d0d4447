"""What a plan says stays whole."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.search.whole import left_whole
from flyweight.spaces import Capabilities, Settings, Space
from flyweight.spaces.tracing import trace

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


class Standardized(nn.Conv2d):
    """Qiao et al. 2019: a convolution with a forward of its own, which is traced into."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=1)


class Padded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, 2)


def test_a_layer_that_is_none_for_flyweight_is_told(capabilities: Capabilities) -> None:
    model = nn.Sequential(Padded(3, 8, 3), nn.ReLU(), Standardized(8, 8, 3), nn.Conv2d(8, 8, 1))
    network = trace(model, torch.zeros(1, 3, 8, 8))
    assert list(network.layers) == ["3"]
    found = left_whole(Space(network, capabilities, Settings(min_keep=0.1)), "pruned", model)
    reason = "conv2d reads it outside of a torch.nn layer; it stays in float"
    assert found == {"0.weight": reason, "2.weight": reason, "3": ANSWER}


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

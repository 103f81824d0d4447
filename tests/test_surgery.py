"""Surgery on attention, grouped convolutions and residual blocks: exact, and as predicted."""

import copy
import random
from types import ModuleType
from typing import Any

import pytest
import torch

from flyweight.compressors.prune import call, remove

EXACT = [
    "fused",
    "separate",
    "interleaved",
    "summed",
    "shuffle",
    "inverted",
    "gated",
    "library",
    "grouped",
]
MIXED = {("fused", "patch"), ("separate", "out")}  # layer norms mix these channels


@pytest.mark.parametrize("name", EXACT)
def test_units_nobody_listens_to_may_go(name: str, networks: ModuleType) -> None:
    network, rng = networks.traced(name), random.Random(0)
    assert network.groups
    for group in network.groups.values():
        if (name, group.name) in MIXED:
            continue
        model: Any
        model, example = networks.make(name)
        width = group.width // group.multiple_of // 2 * group.multiple_of
        kept = networks.some(group, width, rng)
        stays = {group.unit[i] for i in kept.tolist()}
        deaf = copy.deepcopy(model)
        for slot in group.slots:
            if slot.axis == 1 and slot.tensor.endswith("weight"):
                gone = torch.tensor([u >= 0 and u not in stays for u in slot.units])
                deaf.get_parameter(slot.tensor).data[:, gone] = 0
        student = remove(deaf, network, example, {group.name: kept})
        with torch.no_grad():
            torch.testing.assert_close(call(student, example), call(deaf, example))


def test_heads_are_whole_units(networks: ModuleType) -> None:
    group = networks.traced("fused").groups["qkv"]
    assert (group.width, group.multiple_of, group.first(8)) == (32, 8, list(range(8)))


@pytest.mark.parametrize("name", ["fused", "inverted", "gated"])
def test_a_dropped_block_is_gone(name: str, networks: ModuleType) -> None:
    model, example = networks.make(name)
    network = networks.traced(name)
    for block in network.blocks:
        student = remove(model, network, example, {}, [block])
        left = {n for n, m in student.named_modules() if hasattr(m, "weight")}
        assert set(network.without([block]).layers) <= left
        assert not left & set(network.blocks[block].layers)
        call(student, example)

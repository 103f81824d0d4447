"""Signatures: every kernel and every hand-over once, and nothing else."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from flyweight.kernels import signature
from flyweight.kernels.signature import SESSION, nominal_ms
from flyweight.spaces import (
    Capabilities,
    Policy,
    Prune,
    Quantize,
    Settings,
    Space,
    blueprint,
    trace,
)

NAMES = ["plain", "separable", "concat", "grouped", "gated", "inverted"]


@pytest.mark.parametrize("name", NAMES)
def test_a_piece_of_work_for_each_kernel_and_one_for_each_value_handed_over(
    name: str, traced: Callable[[str], Any], capabilities: Capabilities
) -> None:
    plan = blueprint(traced(name), Policy(), capabilities)
    found = signature(plan)
    assert found[SESSION] == 1
    handed = sum(n for s, n in found.items() if s.kind == "handover")
    assert handed == len(plan.kernels)
    assert found.total() == 1 + 2 * len(plan.kernels)
    assert nominal_ms(found) > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_signature_depends_on_widths_and_precisions_and_not_on_how_a_student_is_trained(
    name: str, traced: Callable[[str], Any], capabilities: Capabilities
) -> None:
    network, rng = traced(name), random.Random(0)
    space = Space(network, capabilities, Settings(multiple_of=1))
    for _ in range(10):
        values = space.values(space.sample(rng))
        policy = space.policy(values)
        trained = space.policy({**values, "alpha": 0.3, "learning_rate": 0.05, "qat": True})
        found = signature(blueprint(network, policy, capabilities))
        assert signature(blueprint(network, trained, capabilities)) == found
    layer = next(iter(network.layers))
    other = blueprint(network, Policy(quantize=Quantize({layer: "int8"})), capabilities)
    assert signature(other) != signature(blueprint(network, Policy(), capabilities))


def test_fewer_channels_are_less_nominal_work(
    traced: Callable[[str], Any], capabilities: Capabilities
) -> None:
    network = traced("plain")
    full = blueprint(network, Policy(), capabilities)
    half = blueprint(network, Policy(Prune({"c1": 8, "c2": 12, "l1": 16})), capabilities)
    assert nominal_ms(signature(half)) < nominal_ms(signature(full))
    (sizes,) = [s.sizes for s in signature(half) if s.kind == "conv fp32" and s.sizes[0] == 3]
    assert sizes == (3, 8, 64)  # channels read and made, and 8 x 8 positions


def test_a_dilated_window_is_another_form_of_the_same_size(capabilities: Capabilities) -> None:
    plain, dilated = (
        signature(blueprint(trace(model.eval(), torch.rand(1, 3, 8, 8)), Policy(), capabilities))
        for step in (1, 2)
        for model in [nn.Sequential(nn.Conv2d(3, 8, 3, padding=step, dilation=step), nn.ReLU())]
    )
    (one,), (other,) = plain - dilated, dilated - plain
    assert (one.form, other.form) == ("3x3 1x1 relu", "3x3 1x1 d2x2 relu")
    assert replace(one, form="") == replace(other, form="")


def test_the_bytes_of_the_weights(traced: Callable[[str], Any], capabilities: Capabilities) -> None:
    network = traced("plain")
    weights = 3 * 16 * 9 + 16 * 24 * 9 + 96 * 32 + 32 * 5
    assert blueprint(network, Policy(), capabilities).weight_bytes == 4 * weights
    int8 = Policy(quantize=Quantize({"l1": "int8"}))
    assert blueprint(network, int8, capabilities).weight_bytes == 4 * weights - 3 * 96 * 32

"""The frozen twin computes in integers what a slow version in 64-bit integers computes."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from flyweight.compressors.freeze import FrozenAdd, FrozenLayer, freeze
from flyweight.compressors.quantize import ActivationQuantizer, QuantizedLayer

scales = st.floats(2.0**-13, 0.5, width=32)
zeros = st.integers(0, 255)


def quantizer(scale: float, zero: int) -> ActivationQuantizer:
    made = ActivationQuantizer()
    made.scale.fill_(scale)
    made.zero.fill_(zero)
    return made


def frozen_linear(
    weight: Tensor, bias: Tensor, source: ActivationQuantizer, rounder: ActivationQuantizer
) -> FrozenLayer:
    """A layer with the integers ``weight`` and ``bias``, in steps of 0.01."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(0.01 * weight)
    made = QuantizedLayer(layer, 8, "minmax")
    made.scale.fill_(0.01)
    made.bias_step.copy_(made.scale * source.scale)
    with torch.no_grad():
        layer.bias.copy_(bias * made.bias_step)
    frozen = FrozenLayer(made, source, rounder)
    assert frozen.bias is not None
    frozen.bias.copy_(bias)  # what no float holds too
    return frozen


@settings(deadline=None)
@given(st.data(), scales, scales, zeros)
def test_a_layer_rounds_the_exact_sum_once(
    data: st.DataObject, source_scale: float, scale: float, zero: int
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    inputs = data.draw(st.sampled_from([1, 7, 600]))
    weight = rng.integers(-127, 128, (5, inputs))
    bias = rng.integers(-(2**20), 2**20, 5)
    source, rounder = quantizer(source_scale, zero), quantizer(scale, 0)
    layer = frozen_linear(torch.tensor(weight), torch.tensor(bias), source, rounder)
    integers = rng.integers(0, 256, (9, inputs))
    x = torch.tensor(integers - zero, dtype=torch.float32) * source.scale
    sums = ((integers - zero) @ weight.T + bias).astype(np.float32)
    step = source.scale.numpy() * np.float32(0.01) / rounder.scale.numpy()
    expected = np.rint(sums * step) * rounder.scale.numpy()
    np.testing.assert_array_equal(layer(x).numpy(), expected)


def test_sums_that_a_float_does_not_hold_are_exact_too() -> None:
    # Of 2,000 products of 255 and 127 and one more: 64,770,000 and 1 are one float.
    weight = torch.full((1, 2_001), 127)
    weight[0, -1] = 1
    source, rounder = quantizer(1.0, 0), quantizer(0.01, 0)
    layer = frozen_linear(weight, torch.tensor([-64_770_000]), source, rounder)
    x = torch.full((1, 2_001), 255.0)
    x[0, -1] = 1.0
    assert layer.wide is torch.float64
    assert layer(x).item() == pytest.approx(0.01)


@settings(deadline=None)
@given(scales, scales, scales, zeros, zeros, zeros)
def test_a_sum_is_two_fused_multiply_adds(
    a: float, b: float, c: float, first: int, second: int, third: int
) -> None:
    module = FrozenAdd(quantizer(a, first), quantizer(b, second), quantizer(c, third))
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, 256, 50) for _ in range(2))

    def f32(value: Fraction) -> Fraction:
        return Fraction(float(np.float32(float(value))))

    ratios = [Fraction(float(np.float32(s) / np.float32(c))) for s in (a, b)]
    fixed = f32(third - f32(f32(ratios[0] * first) + f32(ratios[1] * second)))
    steps = [
        round(f32(ratios[0] * int(i) + f32(ratios[1] * int(j) + fixed))) - third
        for i, j in zip(x, y, strict=True)
    ]
    values = [
        torch.tensor(v - zero, dtype=torch.float32) * np.float32(scale)
        for v, zero, scale in ((x, first, a), (y, second, b))
    ]
    expected = np.array(steps, np.float32) * np.float32(c)
    np.testing.assert_array_equal(module(*values).numpy(), expected)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.relu(y + self.b(y))


def test_a_sum_with_a_float_reader_stays_a_sum_of_floats() -> None:
    def modules(code: str) -> list[str]:
        graph = fx.symbolic_trace(Residual())
        for node in list(graph.graph.nodes):
            name = f"quantizer_{node.name}"
            if node.name in code.split():
                graph.add_submodule(name, quantizer(0.1, 3))
                with graph.graph.inserting_after(node):
                    made = graph.graph.call_module(name, (node,))
                node.replace_all_uses_with(
                    made, delete_user_cb=lambda user, made=made: user is not made
                )
        graph.recompile()
        return [type(m).__name__ for m in freeze(graph).children()]

    assert "FrozenAdd" in modules("a b relu")
    assert "FrozenAdd" in modules("a b add")
    assert "FrozenAdd" not in modules("a b")
    assert "FrozenAdd" not in modules("a relu")

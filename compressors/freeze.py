"""The frozen twin of a student: integer weights and biases, the arithmetic of the runtime.

In PyTorch it computes what ONNX Runtime computes on x86, to the last bit where a value comes of
integers and becomes integers: layers, sums and averages (its MlasRequantizeOutput and
MlasQLinearAdd). That matters because a rounding flip grows: one in a million values off by one step
after the first layer of MobileNetV2 was every second at its last. What is computed in floats comes
near, and so does a layer that is used in several places whose outputs have different scales.
Under ``torch.onnx.export`` it writes QuantizeLinear and DequantizeLinear, which ONNX Runtime,
OpenVINO and TensorRT fuse.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..spaces.operations import CLAMPS, KINDS, TRANSPARENT, callee
from .quantize import ActivationQuantizer, Average, Averages, QuantizedLayer, apply_layer

EXACT = 2**24  # integers up to it are floats of 32 bits
DIGIT = 16  # weights whose sums may be beyond it are multiplied digit by digit


def onnx_op(
    name: str, inputs: tuple[Tensor, ...], dtype: Any, like: Tensor, **attrs: Any
) -> Tensor:
    """The ONNX operation ``name``; its output has ``dtype`` and the shape of ``like``."""
    return torch.onnx.ops.symbolic(name, inputs, attrs=attrs, dtype=dtype, shape=like.shape)


class Rounding(nn.Module):
    """Rounds to the nearest integer, to the even one of two, and takes the zero point off. A
    module, so that it can be disturbed."""

    def forward(self, steps: Tensor, zero: Tensor | float) -> Tensor:
        return torch.round(steps) - zero


class FrozenQuantizer(nn.Module):
    """Quantize and dequantize with a constant scale and zero point."""

    scale: Tensor
    zero: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.scale.detach().clone())
        self.register_buffer("zero", quantizer.zero.to(torch.uint8))
        self.rounding = Rounding()

    def forward(self, x: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            q = onnx_op("QuantizeLinear", (x, self.scale, self.zero), torch.uint8, x)
            return onnx_op("DequantizeLinear", (q, self.scale, self.zero), x.dtype, x)
        # Not times 1 / scale: that rounds once more.
        steps: Tensor = self.rounding(x / self.scale, 0.0)
        zero = self.zero.to(x.dtype)
        return steps.clamp_(-zero, 255 - zero).mul_(self.scale)


class FrozenLayer(nn.Module):
    """A layer with int8 weights and an int32 bias in units of (input scale x weight scale).

    What it makes is rounded at once where the runtime does, in the kernel. The float bias stays on
    a linear layer with more than two axes: there the runtime's kernel wants it (FACTS:
    MatMulIntegerToFloat).
    """

    weight: Tensor  # int8
    weight_scale: Tensor  # [out_channels]
    weight_zero: Tensor  # [out_channels] int8
    bias: Tensor | None  # int32, or float for a linear layer on sequences
    bias_scale: Tensor
    bias_zero: Tensor
    input_scale: Tensor
    output_scale: Tensor | None

    def __init__(
        self,
        quantized: QuantizedLayer,
        source: ActivationQuantizer,
        rounder: ActivationQuantizer | None,
    ) -> None:
        """source: what rounds its input. rounder: what rounds what it makes, and nothing else."""
        super().__init__()
        layer = quantized.layer
        # Strides and padding, without the weights.
        self.shell = copy.deepcopy(layer, {id(layer.weight): None, id(layer.bias): None})
        scale = quantized.scale.detach().clone()
        column = scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
        integers = torch.round(layer.weight.detach() / column)
        integers = integers.clamp(-quantized.limit, quantized.limit)
        self.register_buffer("weight", integers.to(torch.int8))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero", torch.zeros(len(scale), dtype=torch.int8))
        self.register_buffer("bias_scale", quantized.bias_step.detach().clone())
        self.register_buffer("bias_zero", torch.zeros(len(scale), dtype=torch.int32))
        bias = None if layer.bias is None else layer.bias.detach().clone()
        if bias is not None and self.bias_scale.any():
            bias = quantized.bias_integers().clamp(-(2**31), 2**31 - 1).to(torch.int32)
        self.register_buffer("bias", bias)
        output_scale = None
        if rounder is not None and (bias is None or bias.dtype == torch.int32):
            output_scale = rounder.scale.detach().clone()
        self.register_buffer("input_scale", source.scale.detach().clone())
        self.register_buffer("output_scale", output_scale)
        self.zero = int(source.zero)
        self.rounding = Rounding()

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        if torch.onnx.is_in_onnx_export():
            parts = (self.weight, self.weight_scale, self.weight_zero)
            weight = onnx_op("DequantizeLinear", parts, x.dtype, self.weight, axis=0)
            if bias is not None and bias.dtype == torch.int32:
                parts = (bias, self.bias_scale, self.bias_zero)
                bias = onnx_op("DequantizeLinear", parts, x.dtype, bias, axis=0)
            return apply_layer(self.shell, x, weight, bias)
        sums = self._sums(torch.round(x / self.input_scale)).float()
        step = self.input_scale * self.weight_scale
        if self.output_scale is not None:
            steps = sums.mul_(self._by_channel(step / self.output_scale, sums))
            rounded: Tensor = self.rounding(steps, 0.0)
            return rounded.mul_(self.output_scale)
        sums *= self._by_channel(step, sums)
        return sums if bias is None or bias.dtype == torch.int32 else sums + bias

    def _sums(self, integers: Tensor) -> Tensor:
        """The exact sums of the products of ``integers``, inputs less their zero point, and of the
        bias where it is one of integers; of a type that holds them."""
        largest = self._largest(self.weight)
        if largest <= EXACT:
            sums = apply_layer(self.shell, integers.float(), self.weight.float(), None)
        else:
            sums = self._sums_by_digit(integers)
        if self.bias is not None and self.bias.dtype == torch.int32:
            if largest + self.bias.abs().max() > EXACT:
                sums = sums.double()
            sums += self._by_channel(self.bias.to(sums.dtype), sums)
        return sums

    def _sums_by_digit(self, integers: Tensor) -> Tensor:
        """The products' exact sums, float64, in which convolutions themselves take ages."""
        high = torch.floor((self.weight.float() + DIGIT / 2) / DIGIT)
        digits = (self.weight - DIGIT * high, high)
        exact = all(self._largest(digit) <= EXACT for digit in digits)
        dtype = torch.float32 if exact else torch.float64
        low, high = (
            apply_layer(self.shell, integers.to(dtype), digit.to(dtype), None).double()
            for digit in digits
        )
        return high.mul_(DIGIT).add_(low)

    def _by_channel(self, values: Tensor, outputs: Tensor) -> Tensor:
        """``values`` [out_channels] as what goes with ``outputs``."""
        if isinstance(self.shell, nn.Linear):
            return values
        return values.reshape(-1, *[1] * (outputs.ndim - 2))

    def _largest(self, weight: Tensor) -> float:
        """The largest sum of inputs times ``weight`` there can be on the way to the whole one."""
        rows = weight.float().flatten(1)
        above, below = rows.clamp_min(0).sum(1), rows.clamp_max(0).sum(1).neg()
        most = 255 - self.zero  # that an input can be above its zero point
        ends = (most * above + self.zero * below, self.zero * above + most * below)
        return max(end.max().item() for end in ends)


class FrozenAdd(nn.Module):
    """The sum of two rounded values, rounded at once, as the runtime's kernel does it: fused
    multiply-adds of the integers, each of which rounds once."""

    scales: Tensor  # [3], of both and of the sum
    zeros: Tensor  # [3] float32

    def __init__(self, *quantizers: ActivationQuantizer) -> None:
        super().__init__()
        self.register_buffer("scales", torch.stack([q.scale.detach() for q in quantizers]))
        self.register_buffer("zeros", torch.stack([q.zero.float() for q in quantizers]))
        self.rounding = Rounding()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            return a + b
        (ratio_a, ratio_b), (zero_a, zero_b, zero) = self.scales[:2] / self.scales[2], self.zeros
        total = zero - _fused(ratio_a, zero_a, ratio_b * zero_b)
        total = _fused(ratio_b, torch.round(b / self.scales[1]) + zero_b, total)
        total = _fused(ratio_a, torch.round(a / self.scales[0]) + zero_a, total)
        rounded: Tensor = self.rounding(total, zero)
        return rounded.mul_(self.scales[2])


class FrozenAverage(nn.Module):
    """The average of a rounded value, rounded at once: the exact sum times one number, as the
    runtime's kernel (MlasQLinearGlobalAveragePool) makes it."""

    scales: Tensor  # [2], of the value and of the average

    def __init__(self, average: Average, *quantizers: ActivationQuantizer) -> None:
        super().__init__()
        self.register_buffer("scales", torch.stack([q.scale.detach() for q in quantizers]))
        self.average = average
        self.rounding = Rounding()

    def forward(self, x: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            kept = x.mean(tuple(range(2, x.ndim)), keepdim=True)
            kept = onnx_op("GlobalAveragePool", (x,), x.dtype, kept)
            return kept.flatten(1) if self.average.flat else kept
        count = math.prod(x.shape[2:])
        sums = self.average(torch.round(x / self.scales[0]).double()).mul_(count).round_().float()
        rounded: Tensor = self.rounding(sums * (self.scales[0] / (self.scales[1] * count)), 0.0)
        return rounded.mul_(self.scales[1])


def _fused(ratio: Tensor, integers: Tensor, added: Tensor) -> Tensor:
    """ratio * integers + added, float32, rounded once: float64 holds the product."""
    return (ratio.double() * integers.double() + added.double()).float()


def freeze(student: fx.GraphModule) -> fx.GraphModule:
    """The frozen twin of a student with quantizers; ``student`` stays as it is."""
    instead: dict[int, Any] = {}  # of copies
    calls: dict[str, list[fx.Node]] = {}
    for node in student.graph.nodes:
        if callee(student, node) in (QuantizedLayer, Averages):
            calls.setdefault(str(node.target), []).append(node)
    for name, nodes in calls.items():
        layer: Any = student.get_submodule(name)
        value = nodes[0].all_input_nodes[0]
        while callee(student, value) is not ActivationQuantizer:  # behind what only moves values
            value = value.all_input_nodes[0]
        source: Any = student.get_submodule(str(value.target))
        quantized = layer.layer() if isinstance(layer, Averages) else layer
        instead[id(layer)] = FrozenLayer(quantized, source, _rounder(student, nodes))
    whole = _whole(student)
    for module in student.modules():
        if isinstance(module, ActivationQuantizer):
            instead[id(module)] = FrozenQuantizer(module)
    frozen = copy.deepcopy(student, instead)
    for node in frozen.graph.nodes:
        if node.name in whole:
            name = f"whole_{node.name}"
            while hasattr(frozen, name):
                name += "_"
            frozen.add_submodule(name, whole[node.name])
            values = tuple(arg for arg in node.args if isinstance(arg, fx.Node))
            node.op, node.target, node.args, node.kwargs = "call_module", name, values, {}
    frozen.recompile()
    return frozen.eval().requires_grad_(False)


def _whole(student: fx.GraphModule) -> dict[str, FrozenAdd | FrozenAverage]:
    """By the name of its node: every sum and every average that the runtime does in integers."""
    found: dict[str, FrozenAdd | FrozenAverage] = {}
    for node in student.graph.nodes:
        called = callee(student, node)
        add = KINDS.get(called) == "add" and len(node.args) == 2 and not node.kwargs
        if not add and called is not Average:
            continue
        quantizers = [*(_quantizer(student, v) for v in node.args), _rounder(student, [node])]
        if None in quantizers:
            continue
        if add:
            found[node.name] = FrozenAdd(*quantizers)
        else:
            average: Any = student.get_submodule(str(node.target))
            found[node.name] = FrozenAverage(average, *quantizers)
    return found


def _quantizer(graph: fx.GraphModule, value: Any) -> Any:
    """The ActivationQuantizer that makes ``value``, an argument of a node; None if none does."""
    while isinstance(value, fx.Node) and callee(graph, value) in TRANSPARENT:
        value = value.all_input_nodes[0]
    if isinstance(value, fx.Node) and callee(graph, value) is ActivationQuantizer:
        return graph.get_submodule(str(value.target))
    return None


def _rounder(graph: fx.GraphModule, nodes: list[fx.Node]) -> ActivationQuantizer | None:
    """What rounds all that ``nodes`` make, on the way to whoever reads it: there or behind what
    the range of a quantizer expresses."""
    found, reads = set(), [user for node in nodes for user in node.users]
    for user in reads:  # grows
        called = callee(graph, user)
        if called in CLAMPS or called in TRANSPARENT:
            reads += user.users
        else:
            found.add(str(user.target) if called is ActivationQuantizer else "")
    if len(found) != 1 or found == {""}:
        return None
    quantizer: Any = graph.get_submodule(found.pop())
    return quantizer  # type: ignore[no-any-return]

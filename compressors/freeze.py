"""The frozen twin of a student: integer weights and biases, the arithmetic of the runtime.

In PyTorch it computes what ONNX Runtime computes on x86, to the last bit as long as everything is
in integers: sums of products that floats hold exactly, and one rounding where the kernel rounds
(MlasRequantizeOutput and MlasQLinearAdd). That matters because a rounding flip grows: one in a
million values off by one step after the first layer of MobileNetV2 was every second at its last.
Under ``torch.onnx.export`` it writes QuantizeLinear and DequantizeLinear, which ONNX Runtime,
OpenVINO and TensorRT fuse.
"""

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..spaces.operations import CLAMPS, KINDS, TRANSPARENT, callee
from .quantize import ActivationQuantizer, QuantizedLayer, apply_layer

EXACT = 2**24  # integers below it are floats of 32 bits, and so are their sums


def onnx_op(
    name: str, inputs: tuple[Tensor, ...], dtype: Any, like: Tensor, **attrs: Any
) -> Tensor:
    """The ONNX operation ``name``; its output has ``dtype`` and the shape of ``like``."""
    return torch.onnx.ops.symbolic(name, inputs, attrs=attrs, dtype=dtype, shape=like.shape)


class Rounding(nn.Module):
    """Rounds to the nearest integer, to the even one of two. A module, so that it can be watched
    and disturbed."""

    def forward(self, steps: Tensor) -> Tensor:
        return torch.round(steps)


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
        steps: Tensor = self.rounding(x / self.scale)
        return steps.clamp_(-float(self.zero), 255 - float(self.zero)).mul_(self.scale)


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
        # The largest sum there can be, of inputs as far from their zero as they can be.
        farthest = max(int(source.zero), 255 - int(source.zero))
        largest = farthest * integers.abs().flatten(1).sum(1).max()
        self.wide = torch.float32 if largest < EXACT else torch.float64
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
        steps = torch.round(x / self.input_scale).to(self.wide)  # integers, as x was rounded
        sums = apply_layer(self.shell, steps, self.weight.to(self.wide), None)
        column = (-1,) if isinstance(self.shell, nn.Linear) else (-1, *[1] * (sums.ndim - 2))
        if bias is not None and bias.dtype == torch.int32:
            sums += bias.to(self.wide).reshape(column)
        sums, step = sums.float(), self.input_scale * self.weight_scale
        if self.output_scale is not None:
            rounded: Tensor = self.rounding(sums.mul_((step / self.output_scale).reshape(column)))
            return rounded.mul_(self.output_scale)
        sums *= step.reshape(column)
        return sums if bias is None or bias.dtype == torch.int32 else sums + bias


class FrozenAdd(nn.Module):
    """The sum of two rounded values, rounded at once: as the runtime's kernel does it, with two
    fused multiply-adds of the integers."""

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
        ratios = self.scales[:2] / self.scales[2]
        first, second = (ratios * self.zeros[:2]).unbind()
        total: Tensor = self.zeros[2] - (first + second)
        for i, x in ((1, b), (0, a)):
            integers = torch.round(x / self.scales[i]) + self.zeros[i]
            # A product of such is exact in float64, so only the sum is rounded, once.
            total = (integers.double() * ratios[i].double() + total.double()).float()
        rounded: Tensor = self.rounding(total)
        return (rounded - self.zeros[2]) * self.scales[2]


def freeze(student: fx.GraphModule) -> fx.GraphModule:
    """The frozen twin of a student with quantizers; ``student`` stays as it is."""
    instead: dict[int, Any] = {}  # of copies
    calls: dict[str, list[fx.Node]] = {}
    for node in student.graph.nodes:
        if callee(student, node) is QuantizedLayer:
            calls.setdefault(str(node.target), []).append(node)
    for name, nodes in calls.items():
        layer: Any = student.get_submodule(name)
        value = nodes[0].all_input_nodes[0]
        while callee(student, value) is not ActivationQuantizer:  # behind what only moves values
            value = value.all_input_nodes[0]
        source: Any = student.get_submodule(str(value.target))
        instead[id(layer)] = FrozenLayer(layer, source, _rounder(student, nodes))
    sums = _sums(student)
    for module in student.modules():
        if isinstance(module, ActivationQuantizer):
            instead[id(module)] = FrozenQuantizer(module)
    frozen = copy.deepcopy(student, instead)
    for node in frozen.graph.nodes:
        if node.name in sums:
            node.op, node.target = "call_module", f"sum_{node.name}"
            frozen.add_submodule(node.target, sums[node.name])
    frozen.recompile()
    return frozen.eval().requires_grad_(False)


def _sums(student: fx.GraphModule) -> dict[str, FrozenAdd]:
    """By the name of its node: every sum that the runtime does in integers."""
    found = {}
    for node in student.graph.nodes:
        rounder = _rounder(student, [node]) if KINDS.get(callee(student, node)) == "add" else None
        if rounder is None or node.kwargs:
            continue
        called = [callee(student, value) for value in node.all_input_nodes]
        if called == [ActivationQuantizer, ActivationQuantizer]:
            inputs: list[Any] = [student.get_submodule(str(v.target)) for v in node.args]
            found[node.name] = FrozenAdd(*inputs, rounder)
    return found


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

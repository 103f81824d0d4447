"""The frozen twin of a student: integer weights and biases, the arithmetic of the runtime.

In PyTorch it computes what the runtime computes; under ``torch.onnx.export`` it writes
QuantizeLinear and DequantizeLinear, which ONNX Runtime, OpenVINO and TensorRT fuse.
"""

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from .quantize import ActivationQuantizer, QuantizedLayer, apply_layer


def onnx_op(
    name: str, inputs: tuple[Tensor, ...], dtype: Any, like: Tensor, **attrs: Any
) -> Tensor:
    """The ONNX operation ``name``; its output has ``dtype`` and the shape of ``like``."""
    return torch.onnx.ops.symbolic(name, inputs, attrs=attrs, dtype=dtype, shape=like.shape)


class FrozenQuantizer(nn.Module):
    """Quantize and dequantize with a constant scale and zero point."""

    scale: Tensor
    zero: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.scale.detach().clone())
        self.register_buffer("zero", quantizer.zero.to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            q = onnx_op("QuantizeLinear", (x, self.scale, self.zero), torch.uint8, x)
            return onnx_op("DequantizeLinear", (q, self.scale, self.zero), x.dtype, x)
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero.int(), 0, 255)


class FrozenLayer(nn.Module):
    """A layer with int8 weights and an int32 bias in units of (input scale x weight scale).

    The float bias stays on a linear layer with more than two axes: there the runtime's kernel
    wants it (FACTS: MatMulIntegerToFloat).
    """

    weight: Tensor  # int8
    weight_scale: Tensor  # [out_channels]
    weight_zero: Tensor  # [out_channels] int8
    bias: Tensor | None  # int32, or float for a linear layer on sequences
    bias_scale: Tensor
    bias_zero: Tensor

    def __init__(self, quantized: QuantizedLayer) -> None:
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

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        if torch.onnx.is_in_onnx_export():
            parts = (self.weight, self.weight_scale, self.weight_zero)
            weight = onnx_op("DequantizeLinear", parts, x.dtype, self.weight, axis=0)
            if bias is not None and bias.dtype == torch.int32:
                parts = (bias, self.bias_scale, self.bias_zero)
                bias = onnx_op("DequantizeLinear", parts, x.dtype, bias, axis=0)
        else:
            shape = (-1, *[1] * (self.weight.ndim - 1))
            weight = self.weight.to(x.dtype) * self.weight_scale.reshape(shape)
            if bias is not None and bias.dtype == torch.int32:
                bias = bias.to(x.dtype) * self.bias_scale
        return apply_layer(self.shell, x, weight, bias)


def freeze(student: fx.GraphModule) -> fx.GraphModule:
    """The frozen twin of a student with quantizers; ``student`` stays as it is."""
    instead: dict[int, Any] = {}  # of copies
    for module in student.modules():
        if isinstance(module, QuantizedLayer):
            instead[id(module)] = FrozenLayer(module)
        elif isinstance(module, ActivationQuantizer):
            instead[id(module)] = FrozenQuantizer(module)
    return copy.deepcopy(student, instead).eval().requires_grad_(False)

"""What each operation of a traced module is in ONNX: ``OPERATIONS``, by module type or function."""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .freeze import FrozenLayer, FrozenQuantizer
from .onnx_file import NotCovered, Operation, Writer


def _settings(node: fx.Node, module: Any, *names: str) -> list[Any]:
    """The settings called ``names``: of a module its attributes, of a function its arguments."""
    if isinstance(module, nn.Module):
        return [getattr(module, name) for name in names]
    given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    if unknown := set(given) - set(names):
        raise NotCovered(unknown)
    return [given.get(name) for name in names]


def _spatial(value: Any, rank: int) -> list[int]:
    if isinstance(value, str):
        raise NotCovered
    return list(value) if isinstance(value, tuple | list) else [value] * rank


def _layer(w: Writer, node: fx.Node, module: Any) -> None:
    """A convolution or linear layer, frozen or not."""
    x = w.value(node)
    shell = module.shell if isinstance(module, FrozenLayer) else module
    weight = _parameter(w, node, module, "weight")
    inputs = [_apart(w, node) if shell is module else x, weight]
    if module.bias is not None:
        inputs.append(_parameter(w, node, module, "bias"))
    out = w.names[node]
    if isinstance(shell, nn.Linear):
        if len(w.shape(node)) != 2:
            raise NotCovered  # a MatMul, whose weight runtimes want transposed
        w.node("Gemm", inputs, out, transB=1)
        return
    rank = len(shell.kernel_size)
    if shell.padding_mode != "zeros" or len(w.shape(node)) != rank + 2:
        raise NotCovered
    w.node(
        "Conv", inputs, out, kernel_shape=list(shell.kernel_size), strides=list(shell.stride),
        pads=_spatial(shell.padding, rank) * 2, dilations=list(shell.dilation), group=shell.groups,
    )  # fmt: skip


def _parameter(w: Writer, node: fx.Node, module: Any, name: str) -> str:
    """Weight or bias; one in integers is dequantized by a scale for each output channel."""
    layer, tensor = str(node.target), getattr(module, name)
    value = w.constant(f"{layer}.{name}", tensor)
    if tensor.is_floating_point():
        return value
    names = (f"{name}_scale", f"{name}_zero")
    parts = [w.constant(f"{layer}.{part}", getattr(module, part)) for part in names]
    # One for each use of the layer: of two Gemms with one between them ONNX Runtime leaves one in
    # float. The integers are stored once.
    return w.node("DequantizeLinear", [value, *parts], f"{w.names[node]}:{name}", axis=0)


def _quantizer(w: Writer, node: fx.Node, module: FrozenQuantizer) -> None:
    name, out = str(node.target), w.names[node]
    parts = [w.constant(f"{name}.{part}", getattr(module, part)) for part in ("scale", "zero")]
    rounded = w.node("QuantizeLinear", [w.value(node), *parts], f"{out}:integers")
    w.node("DequantizeLinear", [rounded, *parts], out)
    w.quantized[out] = module


def _apart(w: Writer, node: fx.Node) -> str:
    """The input of a float layer; a quantized one is dequantized by a scale for each channel.

    They are all the same, so the values are. But between two scalar scales ONNX Runtime takes a
    float convolution or Gemm for a forgotten one and quantizes its weights, to 8 bits and a single
    scale (its WeightBiasQuantization), which is not what the policy says nor what was trained.
    """
    x = w.value(node)
    module = w.quantized.get(x)
    if module is None:
        return x
    channels = w.shape(node)[1]
    parts = [
        w.constant(f"{x}:{part}", getattr(module, part).expand(channels))
        for part in ("scale", "zero")
    ]
    return w.node("DequantizeLinear", [f"{x}:integers", *parts], f"{w.names[node]}:input", axis=1)


def _norm(w: Writer, node: fx.Node, module: Any) -> None:
    name = str(node.target)
    parts = ("weight", "bias", "running_mean", "running_var")
    if any(getattr(module, part) is None for part in parts):
        raise NotCovered
    inputs = [w.constant(f"{name}.{part}", getattr(module, part)) for part in parts]
    w.node("BatchNormalization", [w.value(node), *inputs], w.names[node], epsilon=module.eps)


def _identity(w: Writer, node: fx.Node, _: Any) -> None:
    if w.names[node] == "output":
        w.node("Identity", [w.value(node)], "output")
    else:
        w.names[node] = w.value(node)


def _unary(kind: str) -> Operation:
    def write_unary(w: Writer, node: fx.Node, _: Any) -> None:
        w.node(kind, [w.value(node)], w.names[node])

    return write_unary


def _relu6(w: Writer, node: fx.Node, _: Any) -> None:
    bounds = [w.constant(f"relu6.{v}", torch.tensor(float(v))) for v in (0, 6)]
    w.node("Clip", [w.value(node), *bounds], w.names[node])


def _binary(kind: str) -> Operation:
    def write_binary(w: Writer, node: fx.Node, _: Any) -> None:
        if len(node.args) != 2 or node.kwargs:  # add has an alpha
            raise NotCovered
        inputs = [
            w.constant(f"{w.names[node]}.{i}", torch.tensor(float(argument)))
            if isinstance(argument, int | float)
            else w.value(node, i)
            for i, argument in enumerate(node.args)
        ]
        w.node(kind, inputs, w.names[node])

    return write_binary


def _concat(w: Writer, node: fx.Node, result: Tensor) -> None:
    parts: Any = node.args[0]
    axis = _settings(node, None, "dim")[0] or 0
    if axis % result.ndim == 0:
        raise NotCovered  # of batches
    w.node("Concat", [w.names[part] for part in parts], w.names[node], axis=axis)


def _pool(kind: str) -> Operation:
    average = kind == "AveragePool"

    def write_pool(w: Writer, node: fx.Node, module: Any) -> None:
        rank = len(w.shape(node)) - 2
        names: tuple[str, ...] = ("kernel_size", "stride", "padding")
        if average:
            names = (*names, "ceil_mode", "count_include_pad")
            size, step, padding, ceil, own = _settings(node, module, *names)
            own = {"count_include_pad": int(own is not False)}
            rest = getattr(module, "divisor_override", None)
        else:
            names = (*names, "dilation", "ceil_mode", "return_indices")
            size, step, padding, dilation, ceil, rest = _settings(node, module, *names)
            own = {"dilations": _spatial(dilation or 1, rank)}
        if ceil or rest:  # ceil_mode: the two disagree about windows that begin in the padding
            raise NotCovered
        w.node(
            kind, [w.value(node)], w.names[node], kernel_shape=_spatial(size, rank),
            strides=_spatial(step or size, rank), pads=_spatial(padding or 0, rank) * 2, **own,
        )  # fmt: skip

    return write_pool


def _global_pool(w: Writer, node: fx.Node, module: Any) -> None:
    size = _settings(node, module, "output_size")[0]
    if set(_spatial(size, 1)) != {1}:
        raise NotCovered
    w.node("GlobalAveragePool", [w.value(node)], w.names[node])


def _mean(w: Writer, node: fx.Node, _: Any) -> None:
    axes, keep = _settings(node, None, "dim", "keepdim")
    axes = [axis % len(w.shape(node)) for axis in _spatial(axes, 1) if axis is not None]
    if not axes or 0 in axes:
        raise NotCovered
    name = w.constant(f"{w.names[node]}.axes", torch.tensor(axes))
    w.node("ReduceMean", [w.value(node), name], w.names[node], keepdims=int(bool(keep)))


def _flatten(w: Writer, node: fx.Node, module: Any) -> None:
    start, end = _settings(node, module, "start_dim", "end_dim")
    if start != 1 or end not in (None, -1, len(w.shape(node)) - 1):
        raise NotCovered
    w.node("Flatten", [w.value(node)], w.names[node], axis=1)


OPERATIONS: dict[Any, Operation] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, FrozenLayer), _layer),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _norm),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d), _identity),
    **dict.fromkeys((F.dropout, "contiguous", "clone"), _identity),
    **dict.fromkeys(
        (nn.ReLU, torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"), _unary("Relu")
    ),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid"), _unary("Sigmoid")),
    **dict.fromkeys((nn.Hardswish, F.hardswish), _unary("HardSwish")),
    **dict.fromkeys((nn.ReLU6, F.relu6), _relu6),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _binary("Add")),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), _binary("Mul")),
    **dict.fromkeys((torch.cat, torch.concat), _concat),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, F.max_pool1d, F.max_pool2d), _pool("MaxPool")),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d), _pool("AveragePool")),
    **dict.fromkeys(
        (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d),
        _global_pool,
    ),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys((nn.Flatten, torch.flatten, "flatten"), _flatten),
    FrozenQuantizer: _quantizer,
}  # fmt: skip

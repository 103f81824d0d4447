"""What each operation of a traced module is in ONNX: ``OPERATIONS``, by module type or function."""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .freeze import FrozenAdd
from .onnx_attention import ATTENTION
from .onnx_composed import COMPOSED
from .onnx_file import NotCovered, Operation, Writer
from .onnx_layers import LAYERS
from .onnx_pools import POOLS
from .onnx_recurrent import RECURRENT
from .onnx_shapes import SHAPES


def _identity(w: Writer, node: fx.Node, _: Any) -> None:
    w.alias(node, w.value(node))


def _cast(w: Writer, node: fx.Node, result: Tensor) -> None:
    """float(), to() and their like: what they give says it all."""
    w.alias(node, w.value(node, dtype=result.dtype))


def _unary(kind: str, **attributes: Any) -> Operation:
    """One of one: the settings of the module or function that have an ONNX name, by that name."""
    names = {name: value for name, value in attributes.items() if isinstance(value, tuple)}
    fixed = {name: value for name, value in attributes.items() if name not in names}

    def write_unary(w: Writer, node: fx.Node, result: Tensor) -> None:
        settings = w.settings(node, **dict(names.values()), inplace=False)
        found = dict(zip(names, settings, strict=False))
        w.node(kind, [w.value(node, dtype=result.dtype)], w.names[node], **fixed, **found)

    return write_unary


def _clip(low: Any, high: Any) -> Operation:
    """Clip between ``low`` and ``high``, each a number or the setting (name, default) it is in."""

    def write_clip(w: Writer, node: fx.Node, result: Tensor) -> None:
        names: dict[str, Any] = dict(b for b in (low, high) if isinstance(b, tuple))
        given = dict(zip(names, w.settings(node, **names, inplace=False), strict=False))
        bounds = [given[b[0]] if isinstance(b, tuple) else b for b in (low, high)]
        if any(isinstance(b, fx.Node) and w.env[b].ndim for b in bounds):
            raise NotCovered  # a bound for each element
        inputs = ["" if b is None else w.read(b, result.dtype) for b in bounds]
        w.node("Clip", [w.value(node, dtype=result.dtype), *inputs], w.names[node])

    return write_clip


def _silu(w: Writer, node: fx.Node, _: Any) -> None:
    x, out = w.value(node), w.names[node]
    w.node("Mul", [x, w.node("Sigmoid", [x], f"{out}:gate")], out)


def _rsqrt(w: Writer, node: fx.Node, result: Tensor) -> None:
    out = w.names[node]
    w.node("Reciprocal", [w.node("Sqrt", [w.value(node, dtype=result.dtype)], f"{out}:root")], out)


def _binary(kind: str) -> Operation:
    """One of two, each a tensor or a number, in the type that the result has."""

    def write_binary(w: Writer, node: fx.Node, result: Tensor) -> None:
        if len(node.args) != 2 or node.kwargs:  # add has an alpha, div rounds
            raise NotCovered
        names = [w.value(node, place, result.dtype) for place in (0, 1)]
        w.node(kind, names, w.names[node])

    return write_binary


def _comparison(kind: str, negated: bool = False) -> Operation:
    """One of two that answers with booleans, in the type that PyTorch compares them in."""

    def write_comparison(w: Writer, node: fx.Node, _: Any) -> None:
        if len(node.args) != 2 or node.kwargs:
            raise NotCovered
        compared: list[Any] = [w.env[a] if isinstance(a, fx.Node) else a for a in node.args]
        dtype = torch.result_type(*compared)
        names, out = [w.value(node, place, dtype) for place in (0, 1)], w.names[node]
        if negated:
            w.node("Not", [w.node(kind, names, f"{out}:{kind}")], out)
        else:
            w.node(kind, names, out)

    return write_comparison


def _logical(kind: str) -> Operation:
    def write_logical(w: Writer, node: fx.Node, result: Tensor) -> None:
        if result.dtype != torch.bool or node.kwargs:
            raise NotCovered  # bit by bit
        names = [w.value(node, place, torch.bool) for place in range(len(node.args))]
        w.node(kind, names, w.names[node])

    return write_logical


def _where(w: Writer, node: fx.Node, result: Tensor) -> None:
    yes, no = w.settings(node, input=None, other=None)
    names = [w.read(part, result.dtype) for part in (yes, no)]
    w.node("Where", [w.value(node), *names], w.names[node])


def _fill(w: Writer, node: fx.Node, result: Tensor) -> None:
    mask, value = w.settings(node, mask=None, value=None)
    inputs = [w.read(mask), w.read(value, result.dtype), w.value(node)]
    w.node("Where", inputs, w.names[node])


OPERATIONS: dict[Any, Operation] = {
    **LAYERS,
    **POOLS,
    **SHAPES,
    **ATTENTION,
    **RECURRENT,
    **COMPOSED,
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d), _identity),
    **dict.fromkeys((nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout), _identity),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout), _identity),
    **dict.fromkeys((F.feature_alpha_dropout, "contiguous", "clone", "detach"), _identity),
    **dict.fromkeys(("float", "long", "int", "bool", "to", "type", "type_as"), _cast),
    **dict.fromkeys(
        (nn.ReLU, torch.relu, F.relu, "relu"), _unary("Relu")
    ),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid"), _unary("Sigmoid")),
    **dict.fromkeys((nn.Tanh, torch.tanh, F.tanh, "tanh"), _unary("Tanh")),
    **dict.fromkeys((nn.GELU, F.gelu), _unary("Gelu", approximate=("approximate", "none"))),
    **dict.fromkeys(
        (nn.LeakyReLU, F.leaky_relu), _unary("LeakyRelu", alpha=("negative_slope", 0.01))
    ),
    **dict.fromkeys((nn.ELU, F.elu), _unary("Elu", alpha=("alpha", 1.0))),
    **dict.fromkeys((nn.CELU, F.celu), _unary("Celu", alpha=("alpha", 1.0))),
    **dict.fromkeys((nn.Hardsigmoid, F.hardsigmoid), _unary("HardSigmoid", alpha=1 / 6, beta=0.5)),
    **dict.fromkeys((nn.Hardswish, F.hardswish), _unary("HardSwish")),
    **dict.fromkeys((nn.SiLU, F.silu), _silu),
    **dict.fromkeys((nn.ReLU6, F.relu6), _clip(0.0, 6.0)),
    **dict.fromkeys((nn.Hardtanh, F.hardtanh), _clip(("min_val", -1.0), ("max_val", 1.0))),
    **dict.fromkeys(
        (torch.clamp, "clamp", torch.clip, "clip"), _clip(("min", None), ("max", None))
    ),
    **dict.fromkeys((torch.clamp_min, "clamp_min"), _clip(("min", None), None)),
    **dict.fromkeys((torch.clamp_max, "clamp_max"), _clip(None, ("max", None))),
    **dict.fromkeys((torch.exp, "exp"), _unary("Exp")),
    **dict.fromkeys((torch.log, "log"), _unary("Log")),
    **dict.fromkeys((torch.sqrt, "sqrt"), _unary("Sqrt")),
    **dict.fromkeys((torch.rsqrt, "rsqrt"), _rsqrt),
    **dict.fromkeys((torch.abs, "abs"), _unary("Abs")),
    **dict.fromkeys((operator.neg, torch.neg, "neg"), _unary("Neg")),
    **dict.fromkeys((operator.add, torch.add, "add", FrozenAdd), _binary("Add")),
    **dict.fromkeys((operator.sub, torch.sub, "sub", torch.subtract, "subtract"), _binary("Sub")),
    **dict.fromkeys((operator.mul, torch.mul, "mul", torch.multiply, "multiply"), _binary("Mul")),
    **dict.fromkeys((operator.truediv, torch.div, "div", torch.divide, "divide"), _binary("Div")),
    **dict.fromkeys((operator.pow, torch.pow, "pow"), _binary("Pow")),
    **dict.fromkeys((torch.maximum, "maximum"), _binary("Max")),
    **dict.fromkeys((torch.minimum, "minimum"), _binary("Min")),
    **dict.fromkeys((operator.eq, torch.eq, "eq"), _comparison("Equal")),
    **dict.fromkeys((operator.ne, torch.ne, "ne"), _comparison("Equal", negated=True)),
    **dict.fromkeys((operator.gt, torch.gt, "gt"), _comparison("Greater")),
    **dict.fromkeys((operator.ge, torch.ge, "ge"), _comparison("GreaterOrEqual")),
    **dict.fromkeys((operator.lt, torch.lt, "lt"), _comparison("Less")),
    **dict.fromkeys((operator.le, torch.le, "le"), _comparison("LessOrEqual")),
    **dict.fromkeys((operator.and_, torch.logical_and, "logical_and"), _logical("And")),
    **dict.fromkeys((operator.or_, torch.logical_or, "logical_or"), _logical("Or")),
    **dict.fromkeys((operator.invert, torch.logical_not, "logical_not"), _logical("Not")),
    **dict.fromkeys(("masked_fill", torch.masked_fill), _fill),
    torch.where: _where,
}  # fmt: skip

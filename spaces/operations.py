"""What each node of a traced graph is."""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from .network import Op, Part, Window

LAYERS: dict[Any, str] = {
    nn.Conv1d: "conv", nn.Conv2d: "conv", nn.Conv3d: "conv", nn.Linear: "linear",
}  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Activations that a runtime fuses into the layer before them and a quantizer's range expresses.
CLAMPS: dict[Any, str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", torch.relu: "relu",
    F.relu: "relu", F.relu6: "relu6", "relu": "relu",
}  # fmt: skip
MEANS = (torch.mean, "mean")
WINDOWS = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
)  # fmt: skip
SETTINGS: dict[Any, tuple[str, ...]] = {  # in the order of their arguments
    **dict.fromkeys(MEANS, ("dim", "keepdim")),
    **dict.fromkeys(WINDOWS, ("kernel_size", "stride", "padding", "ceil_mode",
                              "count_include_pad", "divisor_override")),
}  # fmt: skip
KINDS: dict[Any, str] = {
    operator.add: "add", torch.add: "add", "add": "add",
    torch.cat: "concat", torch.concat: "concat", torch.concatenate: "concat",
    nn.AdaptiveAvgPool1d: "pool", nn.AdaptiveAvgPool2d: "pool", nn.AdaptiveAvgPool3d: "pool",
    F.adaptive_avg_pool1d: "pool", F.adaptive_avg_pool2d: "pool", F.adaptive_avg_pool3d: "pool",
    nn.MaxPool1d: "maxpool", nn.MaxPool2d: "maxpool",
    F.max_pool1d: "maxpool", F.max_pool2d: "maxpool",
    torch.max_pool1d: "maxpool", torch.max_pool2d: "maxpool",
    **dict.fromkeys(WINDOWS, "pool"),
    **dict.fromkeys(MEANS, "pool"),
    nn.Flatten: "reshape", torch.flatten: "reshape", "flatten": "reshape",
    "reshape": "reshape", torch.reshape: "reshape", "view": "reshape",
    "squeeze": "reshape", torch.squeeze: "reshape",  # sizes may be among their arguments
}  # fmt: skip
# What changes nothing in a deployed network; its value is that of its input.
TRANSPARENT = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, "contiguous", "clone",
)  # fmt: skip

PADS = (
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
    nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
)  # fmt: skip
ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.floordiv)
SHAPE = "flyweight_shape"  # where a node carries the shape of its value
Channels = tuple[tuple[Part, ...], int]  # what a value's channels consist of, and their axis


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of the value of ``node``; () where it is not one tensor."""
    shape: tuple[int, ...] = node.meta.get(SHAPE, ())
    return shape


def number_of(setting: Any) -> Any:
    """``setting``, a number, several or None; worked out where it hangs on sizes of one request;
    NotImplemented where it hangs on anything else."""
    if isinstance(setting, tuple | list):
        parts = tuple(number_of(part) for part in setting)
        return NotImplemented if NotImplemented in parts else parts
    if not isinstance(setting, fx.Node):
        return setting
    arguments: Any = (*setting.args, None, None)
    read, place = arguments[:2]
    if setting.target in ARITHMETIC and not setting.kwargs:
        terms = number_of(setting.args)
        return NotImplemented if terms is NotImplemented else setting.target(*terms)
    if setting.target is operator.getitem and isinstance(read, fx.Node):  # of x.shape or x.size()
        whole = (read.target, read.args[1:]) in ((getattr, ("shape",)), ("size", ()))
        read = read.args[0] if whole else None
    elif setting.target != "size":
        return NotImplemented
    shape = shape_of(read) if isinstance(read, fx.Node) else ()
    ends = (place.start, place.stop, place.step) if isinstance(place, slice) else (place,)
    if not shape or place is None or not all(isinstance(n, int | None) for n in ends):
        return NotImplemented
    # The first axis is how many requests there are, and 1 may be that.
    sizes = [NotImplemented, *(NotImplemented if n == 1 else n for n in shape[1:])]
    return number_of(sizes[place])


def callee(graph: nn.Module, node: fx.Node) -> Any:
    """What ``node`` calls: the type of a module, a function, or the name of a method."""
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target)))
    return node.target


def operations(graph: fx.GraphModule, channels: Mapping[str, Channels]) -> list[Op]:
    """The operations of ``graph`` in execution order. ``channels``: of values with any that can
    be pruned."""
    ops: dict[str, Op] = {}
    same: dict[str, str] = {}  # the output of a transparent operation -> the value it is
    for node in graph.graph.nodes:
        called = callee(graph, node)
        if node.op != "placeholder" and (called in TRANSPARENT or _pads_layers(graph, node)):
            source = node.all_input_nodes[0].name
            same[node.name] = same.get(source, source)
            continue
        inputs = tuple(same.get(n.name, n.name) for n in _inputs(node))
        tensors = [ops[i] for i in inputs if ops[i].shape]
        kind, averaged = _kind(graph, node, called, tensors), None
        if kind == "pool":
            before = tensors[0].shape if tensors else ()
            averaged = window(graph, node, before, shape_of(node))
            kind = _average(averaged, before)
        parts, axis = channels.get(node.name) or _fixed(kind, shape_of(node))
        ops[node.name] = Op(
            name=node.name,
            kind=kind,
            detail=CLAMPS.get(called) or str(getattr(called, "__name__", called)),
            inputs=inputs,
            module=str(node.target) if node.op == "call_module" else "",
            shape=shape_of(node),
            parts=parts,
            axis=axis,
            window=averaged,
        )
    return list(ops.values())


def zero_padding(graph: nn.Module, node: fx.Node, rank: int) -> list[int] | None:
    """How many zeros ``node`` adds around a value of ``rank`` axes, as F.pad takes them: before and
    after the last axis, then the one before it. None if it does anything else, or not to spatial
    axes alone."""
    called = callee(graph, node)
    if called in PADS:
        module: Any = graph.get_submodule(str(node.target))
        given: dict[str, Any] = {"pad": module.padding, "value": getattr(module, "value", 0)}
    elif called is F.pad:
        given = {**dict(zip(("pad", "mode", "value"), node.args[1:], strict=False)), **node.kwargs}
    else:
        return None
    amounts = given["pad"]
    if given.get("mode", "constant") != "constant" or given.get("value"):
        return None
    if not all(isinstance(n, int) and n >= 0 for n in amounts):
        return None
    return list(amounts) if len(amounts) <= 2 * (rank - 2) else None


def window(
    graph: nn.Module,
    node: fx.Node,
    before: tuple[int, ...],
    after: tuple[int, ...],
    known: Callable[[Any], Any] = number_of,
) -> Window | None:
    """The window of which ``node``, a pool of a value of shape ``before`` to one of shape
    ``after``, gives each channel the averages; None where windows differ, or it is no such pool.
    known: works out a setting that hangs on sizes."""
    rank, called = len(before), callee(graph, node)
    if rank < 3 or after[:2] != before[:2]:
        return None
    names = SETTINGS.get(called, ())
    given: dict[str, Any] = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        given = {name: getattr(module, name, None) for name in names}
    given = {name: known(setting) for name, setting in given.items()}
    if NotImplemented in given.values():
        return None
    sizes, zeros = before[2:], (0,) * (rank - 2)
    if called in MEANS:
        axes = [d % rank for d in _each(given.get("dim"), 1) if isinstance(d, int)]
        # A mean that three axes keep is that of the features at a step, as a norm takes it off.
        kept = rank == len(after) == 3 or given.get("dtype") is not None
        whole = sorted(axes) == list(range(2, rank)) and not kept
        return Window(sizes, sizes, zeros, math.prod(sizes)) if whole else None
    if len(after) != rank:
        return None
    if called not in WINDOWS:  # adaptive
        if any(n % m for n, m in zip(sizes, after[2:], strict=True)):
            return None
        steps = tuple(n // m for n, m in zip(sizes, after[2:], strict=True))
        return Window(steps, steps, zeros, math.prod(steps))
    size, padding = (_each(given.get(n, 0), rank - 2) for n in ("kernel_size", "padding"))
    stride = _each(given["stride"], rank - 2) if given.get("stride") else size
    if not all(isinstance(n, int) for n in (*size, *padding, *stride)):
        return None
    if not len(size) == len(padding) == len(stride) == rank - 2:
        return None  # of images without channels
    if any(padding) and not given.get("count_include_pad", True):
        return None
    # In ceil_mode the last window may reach beyond the padding.
    sides = zip(sizes, size, padding, stride, strict=True)
    if after[2:] != tuple((n + 2 * p - k) // s + 1 for n, k, p, s in sides):
        return None
    return Window(size, stride, padding, given.get("divisor_override") or math.prod(size))


def _each(setting: Any, axes: int) -> tuple[Any, ...]:
    return tuple(setting) if isinstance(setting, list | tuple) else (setting,) * axes


def _pads_layers(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` pads for convolutions alone, which can pad as much themselves: a runtime
    makes it part of them, and zeros are exact on every scale."""
    layers = [callee(graph, user) for user in node.users]
    if not all(LAYERS.get(called) == "conv" for called in layers):
        return False
    modules: list[Any] = [graph.get_submodule(str(user.target)) for user in node.users]
    if any(isinstance(m.padding, str) or m.padding_mode != "zeros" for m in modules):
        return False
    return zero_padding(graph, node, len(shape_of(node))) is not None


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The values that ``node`` reads; a concatenation may read one twice."""
    joined = node.args[0] if node.args else None
    if KINDS.get(node.target) == "concat" and isinstance(joined, list | tuple):
        return [n for n in joined if isinstance(n, fx.Node)]
    return node.all_input_nodes


def _kind(graph: fx.GraphModule, node: fx.Node, called: Any, inputs: list[Op]) -> str:
    if node.op in ("placeholder", "output"):
        return {"placeholder": "input", "output": "output"}[node.op]
    if node.op == "get_attr":
        return "other"
    if called in LAYERS:
        return LAYERS[called]
    if called in NORMS:
        norm: Any = graph.get_submodule(str(node.target))
        # Without running statistics it depends on the request and cannot be folded.
        return "other" if norm.running_var is None else "norm"
    if called in CLAMPS:
        return "act"
    kind = KINDS.get(called, "other")
    plain = len(inputs) == 2 and inputs[0].shape == inputs[1].shape and not node.kwargs
    if kind == "add" and not plain:
        return "other"  # a constant, a broadcast or a factor: no residual add
    if kind == "concat" and not _along_channels(node, inputs):
        return "other"
    return kind


def _average(averaged: Window | None, before: tuple[int, ...]) -> str:
    """What averages of a value of shape ``before`` are."""
    if averaged is None:
        return "average"
    return "pool" if averaged.covers(before) else "avgpool"


def _fixed(kind: str, shape: tuple[int, ...]) -> Channels:
    if len(shape) < 2:
        return (), 0
    axis = len(shape) - 1 if kind == "linear" else 1
    return ((None, shape[axis]),), axis


def _along_channels(node: fx.Node, inputs: list[Op]) -> bool:
    """Whether a concatenation is along the axis that carries channels."""
    rank = len(shape_of(node))
    dim = node.kwargs.get("dim", (*node.args, 0)[1])
    if not isinstance(dim, int) or rank < 2 or dim % rank == 0:
        return False
    return not any(op.axis != dim % rank and _pruned(op) for op in inputs)


def _pruned(op: Op) -> bool:
    return any(group is not None for group, _ in op.parts)

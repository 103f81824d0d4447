"""What each node of a traced graph is, and what its channels consist of."""

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from .network import Op, Part

LAYERS: dict[Any, str] = {
    nn.Conv1d: "conv", nn.Conv2d: "conv", nn.Conv3d: "conv", nn.Linear: "linear",
}  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Activations that a runtime fuses into the layer before them and a quantizer's range expresses.
CLAMPS: dict[Any, str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", torch.relu: "relu", torch.relu_: "relu",
    F.relu: "relu", F.relu_: "relu", F.relu6: "relu6", "relu": "relu", "relu_": "relu",
}  # fmt: skip
KINDS: dict[Any, str] = {
    operator.add: "add", operator.iadd: "add", torch.add: "add", "add": "add", "add_": "add",
    torch.cat: "concat", torch.concat: "concat", torch.concatenate: "concat",
    nn.AdaptiveAvgPool1d: "pool", nn.AdaptiveAvgPool2d: "pool", nn.AvgPool2d: "pool",
    nn.AvgPool1d: "pool", nn.MaxPool1d: "maxpool", nn.MaxPool2d: "maxpool",
    F.adaptive_avg_pool1d: "pool", F.adaptive_avg_pool2d: "pool", F.avg_pool2d: "pool",
    F.avg_pool1d: "pool", F.max_pool1d: "maxpool", F.max_pool2d: "maxpool",
    torch.max_pool1d: "maxpool", torch.max_pool2d: "maxpool",
    torch.mean: "pool", "mean": "pool",
    nn.Flatten: "reshape", torch.flatten: "reshape", "flatten": "reshape", "view": "reshape",
    "reshape": "reshape", torch.reshape: "reshape",
}  # fmt: skip
# What changes nothing in a deployed network; its value is that of its input.
TRANSPARENT = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, "contiguous", "clone",
)  # fmt: skip
# Modules with weights that nevertheless answer with the channels they are given.
KEEPS_CHANNELS = (
    *NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm, nn.PReLU,
)  # fmt: skip

SHAPE = "flyweight_shape"  # where a node carries the shape of its value
Channels = tuple[tuple[Part, ...], int]  # what a value's channels consist of, and their axis


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of the value of ``node``; () where it is not one tensor."""
    shape: tuple[int, ...] = node.meta.get(SHAPE, ())
    return shape


def callee(graph: fx.GraphModule, node: fx.Node) -> Any:
    """What ``node`` calls: the type of a module, a function, or the name of a method."""
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target)))
    return node.target


def operations(graph: fx.GraphModule, out_group: dict[str, str]) -> list[Op]:
    """The operations of ``graph`` in execution order. ``out_group``: the group of each layer."""
    ops: dict[str, Op] = {}
    same: dict[str, str] = {}  # the output of a transparent operation -> the value it is
    for node in graph.graph.nodes:
        called = callee(graph, node)
        if node.op != "placeholder" and called in TRANSPARENT:
            source = node.all_input_nodes[0].name
            same[node.name] = same.get(source, source)
            continue
        inputs = tuple(same.get(n.name, n.name) for n in _inputs(node))
        tensors = [ops[i] for i in inputs if ops[i].shape]
        kind = _kind(graph, node, called, tensors)
        parts, axis = _channels(graph, node, kind, tensors, out_group)
        ops[node.name] = Op(
            name=node.name,
            kind=kind,
            detail=CLAMPS.get(called) or str(getattr(called, "__name__", called)),
            inputs=inputs,
            module=str(node.target) if node.op == "call_module" else "",
            shape=shape_of(node),
            parts=parts,
            axis=axis,
        )
    return list(ops.values())


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
    if kind == "concat" and _joined(node, inputs) is None:
        return "other"
    return kind


def _channels(
    graph: fx.GraphModule, node: fx.Node, kind: str, inputs: list[Op], out_group: dict[str, str]
) -> Channels:
    shape = shape_of(node)
    if len(shape) < 2:
        return (), 0
    if kind in ("conv", "linear"):
        axis = 1 if kind == "conv" else len(shape) - 1
        return ((out_group.get(str(node.target)), shape[axis]),), axis
    fixed = ((None, shape[1]),), 1
    if not inputs or (kind == "other" and _has_weights(graph, node)):
        return fixed
    if kind == "concat":
        return _joined(node, inputs) or fixed
    first = next((op for op in inputs if _pruned(op)), inputs[0])
    total = sum(n for _, n in first.parts)
    if not total:
        return fixed
    if kind == "reshape" and shape[first.axis : first.axis + 1] != (total,):
        # Flattened: each channel becomes as many features as it has positions.
        spread, rest = divmod(shape[1], total)
        return fixed if rest else (tuple((g, n * spread) for g, n in first.parts), 1)
    axes = (first.axis, *range(1, len(shape))) if kind == "other" else (first.axis,)
    found = next((a for a in axes if shape[a : a + 1] == (total,)), None)
    return fixed if found is None else (first.parts, found)


def _joined(node: fx.Node, inputs: list[Op]) -> Channels | None:
    """The channels of a concatenation along channels, None if it is along another axis."""
    rank = len(shape_of(node))
    dim = node.kwargs.get("dim", (*node.args, 0)[1])
    if not isinstance(dim, int) or rank < 2:
        return None
    dim %= rank
    if dim == 0 or any(op.axis != dim and _pruned(op) for op in inputs):
        return None
    parts: tuple[Part, ...] = ()
    for op in inputs:
        parts += op.parts if op.axis == dim else ((None, op.shape[dim]),)
    return parts, dim


def _pruned(op: Op) -> bool:
    return any(group is not None for group, _ in op.parts)


def _has_weights(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    module = graph.get_submodule(str(node.target))
    return not isinstance(module, KEEPS_CHANNELS) and any(True for _ in module.parameters())

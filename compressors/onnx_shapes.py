"""What is in ONNX whatever moves values, joins and parts them, and changes none.

A new shape is that of one request, with a placeholder where it is another for two.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .onnx_file import NotCovered, Operation, Writer, source_of
from .onnx_layers import passed

Shape = Sequence[int]
FIELDS = ("values", "indices")  # of what max and min along an axis give


def _reshape(w: Writer, node: fx.Node, result: Tensor) -> None:
    """reshape, flatten, squeeze and their like: the shape of what they give says it all."""
    _reshaped(w, node, result, passed(w, node), w.shape(node), w.doubled[source_of(node)])


def _reshaped(w: Writer, node: fx.Node, result: Tensor, x: str, one: Shape, two: Shape) -> None:
    """``x``, of shape ``one`` for one request and ``two`` for two, in the shape of ``result``."""
    shape, doubled = tuple(result.shape), w.doubled[node]
    if (shape, doubled) == (tuple(one), tuple(two)):
        w.alias(node, x)
        return
    if len(shape) != len(doubled):
        raise NotCovered
    before = [*zip(one, two, strict=True), *[None] * len(shape)]
    target = [
        n if n == m else 0 if before[axis] == (n, m) else -1  # 0: as it was, -1: what is left
        for axis, (n, m) in enumerate(zip(shape, doubled, strict=True))
    ]
    if target.count(-1) > 1:
        raise NotCovered
    w.node("Reshape", [x, w.numbers(target)], w.names[node])


def _item(w: Writer, node: fx.Node, result: Any) -> None:
    """One of several tensors, or a part of one: what is cut off, then the shape it gets."""
    source: Any = node.args[0]
    index = w.known(node.args[1])
    if source in w.parts:
        if isinstance(result, Tensor):
            w.alias(node, w.parts[source][index])
        else:
            w.parts[node] = w.parts[source][index]
        return
    one, two, cuts = list(w.shape(node)), list(w.doubled[source]), []
    if (listed := _listed(w, index)) is not None:
        axis, places = listed
        if one[axis] != two[axis]:
            raise NotCovered
        w.node("Gather", [passed(w, node), w.numbers(places)], w.names[node], axis=axis)
        return
    for axis, place in enumerate(_by_axis(index, len(one))):
        start, stop, step = place.indices(one[axis])
        length = len(range(start, stop, step))
        if place != slice(None) and one[axis] != two[axis]:
            raise NotCovered  # of requests
        if length != one[axis]:
            cuts.append((start, stop, axis, step))
            one[axis] = two[axis] = length
    x = passed(w, node)
    if cuts:
        columns = [w.numbers(list(column)) for column in zip(*cuts, strict=True)]
        x = w.node("Slice", [x, *columns], f"{node.name}:cut")
    _reshaped(w, node, result, x, one, two)


def _listed(w: Writer, index: Any) -> tuple[int, list[int]] | None:
    """The axis and its places where an index is nothing but a list of places of one axis."""
    parts = index if isinstance(index, tuple) else (index,)
    axis = len(parts) - 1
    if any(part != slice(None) for part in parts[:axis]):
        return None
    last = parts[axis]
    if isinstance(last, fx.Node):
        value = w.env[last]
        if last not in w.fixed or value.dtype != torch.int64 or value.ndim != 1:
            return None
        return axis, value.tolist()
    numbers = isinstance(last, list) and all(type(place) is int for place in last)
    return (axis, list(last)) if numbers else None


def _by_axis(index: Any, rank: int) -> list[slice]:
    """What an index takes of each axis; new axes are left out, a number takes one place."""
    places = [p for p in (index if isinstance(index, tuple) else (index,)) if p is not None]
    dots = next((i for i, p in enumerate(places) if p is Ellipsis), len(places))
    rest = [slice(None)] * (rank - sum(p is not Ellipsis for p in places))
    places = [*places[:dots], *rest, *places[dots + 1 :]]
    if any(isinstance(p, bool) or not isinstance(p, int | slice) for p in places):
        raise NotCovered  # a tensor
    return [p if isinstance(p, slice) else slice(p, p + 1 or None) for p in places]


def _split(sizes: str) -> Operation:
    def write_split(w: Writer, node: fx.Node, result: Any) -> None:
        axis = _axis(w, node, w.settings(node, **{sizes: None}, dim=0)[1])
        parts = w.parts[node] = [f"{node.name}:{i}" for i in range(len(result))]
        inputs = [w.value(node), w.numbers([part.shape[axis] for part in result])]
        w.several("Split", inputs, parts, axis=axis)

    return write_split


def _unbind(w: Writer, node: fx.Node, result: Any) -> None:
    axis = _axis(w, node, w.settings(node, dim=0)[0])
    w.parts[node] = [
        w.node("Gather", [w.value(node), w.numbers(i)], f"{node.name}:{i}", axis=axis)
        for i in range(len(result))
    ]


def _axis(w: Writer, node: fx.Node, dim: int) -> int:
    """``dim``, which must not be the axis of the requests."""
    axis = dim % len(w.shape(node))
    if w.varies(node.args[0], axis):
        raise NotCovered
    return axis


def _permute(w: Writer, node: fx.Node, _: Any) -> None:
    order: Any = w.known(node.args[1:])
    _transpose(w, node, order[0] if order and isinstance(order[0], tuple | list) else order)


def _swap(w: Writer, node: fx.Node, result: Tensor) -> None:
    order = list(range(result.ndim))
    first, second = w.settings(node, dim0=0, dim1=1)  # t() has none
    order[first], order[second] = order[second], order[first]
    _transpose(w, node, order)


def _attribute(w: Writer, node: fx.Node, result: Tensor) -> None:
    source, name = source_of(node), node.args[1]
    if source in w.parts and name in FIELDS:
        w.alias(node, w.parts[source][FIELDS.index(str(name))])
        return
    order = list(range(result.ndim))
    if name not in ("T", "mT"):
        raise NotCovered
    _transpose(w, node, [*order[:-2], *order[:-3:-1]] if name == "mT" else order[::-1])


def _transpose(w: Writer, node: fx.Node, order: Shape) -> None:
    if len(order) != len(w.shape(node)):
        raise NotCovered
    w.node("Transpose", [passed(w, node)], w.names[node], perm=[i % len(order) for i in order])


def _expand(w: Writer, node: fx.Node, result: Tensor) -> None:
    shape, doubled, out = tuple(result.shape), w.doubled[node], w.names[node]
    missing = [1] * (len(shape) - len(w.env[source_of(node)].shape))
    one, two = [*missing, *w.shape(node)], [*missing, *w.doubled[source_of(node)]]
    target = []
    for before, size in zip(
        zip(one, two, strict=True), zip(shape, doubled, strict=True), strict=True
    ):
        if size == (1, 2) != before == (1, 1):  # as many as there are requests
            target.append(w.node("Shape", [w.inputs[0].name], f"{out}:batch", start=0, end=1))
        elif before == size or size[0] == size[1]:
            target.append(w.numbers([1 if before == size else size[0]]))
        else:
            raise NotCovered
    w.node("Expand", [w.value(node), w.node("Concat", target, f"{out}:shape", axis=0)], out)


def _repeat(w: Writer, node: fx.Node, result: Tensor) -> None:
    old = w.shape(node)
    if all(n in (1, m) for n, m in zip(old[::-1], result.shape[::-1], strict=False)):
        _expand(w, node, result)  # copies of one
        return
    if len(old) != result.ndim or result.shape[0] != old[0]:
        raise NotCovered
    times = [m // n for n, m in zip(old, result.shape, strict=True)]
    w.node("Tile", [w.value(node), w.numbers(times)], w.names[node])


def _concat(w: Writer, node: fx.Node, result: Tensor) -> None:
    axis = w.settings(node, dim=0)[0] % result.ndim
    if result.shape[axis] != w.doubled[node][axis]:
        raise NotCovered  # of requests
    w.node("Concat", _names(w, node, result), w.names[node], axis=axis)


def _names(w: Writer, node: fx.Node, result: Tensor) -> list[str]:
    """The tensors that ``node`` joins: a list of them, or all that another node gives."""
    joined: Any = node.args[0]
    if isinstance(joined, fx.Node):
        if joined not in w.parts:
            raise NotCovered
        return w.parts[joined]
    return [w.read(part, result.dtype) for part in joined]


def _stack(w: Writer, node: fx.Node, result: Tensor) -> None:
    axis, out = w.settings(node, dim=0)[0] % result.ndim, w.names[node]
    rows = [
        w.node("Unsqueeze", [name, w.numbers([axis])], f"{out}:{i}")
        for i, name in enumerate(_names(w, node, result))
    ]
    w.node("Concat", rows, out, axis=axis)


SHAPES: dict[Any, Operation] = {
    **dict.fromkeys(("reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys((torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze), _reshape),
    **dict.fromkeys((nn.Flatten, nn.Unflatten, torch.unflatten, "reshape_as"), _reshape),
    **dict.fromkeys((torch.permute, "permute"), _permute),
    **dict.fromkeys((torch.transpose, "transpose", torch.swapaxes, "swapaxes", "t"), _swap),
    **dict.fromkeys(("expand", "expand_as", torch.broadcast_to, "broadcast_to"), _expand),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _concat),
    **dict.fromkeys((torch.chunk, "chunk"), _split("chunks")),
    **dict.fromkeys((torch.split, "split"), _split("split_size")),
    **dict.fromkeys((torch.unbind, "unbind"), _unbind),
    torch.stack: _stack,
    **dict.fromkeys(("repeat", torch.tile, "tile"), _repeat),
    operator.getitem: _item,
    getattr: _attribute,
}  # fmt: skip

"""Parts of one size that are cut out one by one, ``x[:, :c]`` and ``x[:, c:]``, as the chunks that
they are: of these it is known that they lose the same."""

import operator
from typing import Any

import torch
from torch import fx

from .operations import shape_of

_ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.floordiv)


def cut_at_once(graph: fx.GraphModule) -> None:
    """Where slices of one axis, not that of requests, are all of it in parts of one size, or of
    channels one half, they become parts of one ``torch.chunk``."""
    # What is read of channels alone may be cut so that nobody reads the rest; of steps in time it
    # would be copied for nothing. Whatever makes or scales channels has as many weights.
    widths = {len(p) for p in graph.parameters() if p.ndim}
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    for node in order:
        cuts: dict[int, dict[fx.Node, range]] = {}
        for user in node.users:
            if found := _cut(user, node):
                axis, part = found
                cuts.setdefault(axis, {})[user] = part
        for axis, parts in cuts.items():
            size, width = shape_of(node)[axis], max(map(len, parts.values()))
            known = {*parts.values()}
            if not 0 < width < size:
                continue
            whole = {range(start, start + width) for start in range(0, size, width)}
            half = size == 2 * width and size in widths and known < whole
            if known != whole and not half:
                continue
            with graph.graph.inserting_before(min(parts, key=order.__getitem__)):
                chunks = graph.graph.call_function(torch.chunk, (node, len(whole), axis))
            for user, part in parts.items():
                user.args = (chunks, part.start // width)


def _cut(user: fx.Node, node: fx.Node) -> tuple[int, range] | None:
    """Along which axis of ``node`` ``user`` takes which places, if it takes all of any other."""
    if user.target is not operator.getitem or user.args[0] is not node or not shape_of(node):
        return None
    index = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
    rank, found = len(shape_of(node)), []
    axis = 0
    for part in index:
        if part is Ellipsis:
            axis = rank - (len(index) - index.index(Ellipsis) - 1)
            continue
        if not isinstance(part, slice):
            return None
        ends = [_number(end) for end in (part.start, part.stop, part.step)]
        if ends != [None] * 3:
            if NotImplemented in ends:
                return None
            found.append((axis, range(*slice(*ends).indices(shape_of(node)[axis]))))
        axis += 1
    return found[0] if len(found) == 1 and found[0][0] > 0 and found[0][1].step == 1 else None


def _number(end: Any) -> Any:
    """``end`` of a slice, a number or None; worked out where it hangs on sizes of one request;
    NotImplemented where it hangs on anything else."""
    if not isinstance(end, fx.Node):
        return end
    read = end.args[0] if end.args else None
    if end.target in _ARITHMETIC and not end.kwargs:
        parts = [_number(part) for part in end.args]
        return NotImplemented if NotImplemented in parts else end.target(*parts)
    if end.target is operator.getitem and isinstance(read, fx.Node):  # x.shape[1]
        place = end.args[1]
        if read.target is not getattr or read.args[1] != "shape":
            return NotImplemented
        read = read.args[0]
    elif end.target == "size" and len(end.args) == 2:  # x.size(1)
        place = end.args[1]
    else:
        return NotImplemented
    shape = shape_of(read) if isinstance(read, fx.Node) else ()
    if not isinstance(place, int) or not shape or place % len(shape) == 0:
        return NotImplemented
    return NotImplemented if shape[place] == 1 else shape[place]  # 1 may be how many requests

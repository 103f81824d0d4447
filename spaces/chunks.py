"""Parts of one size that are cut out one by one, ``x[:, :c]`` and ``x[:, c:]``, as the chunks that
they are: of these it is known that they lose the same."""

import operator

import torch
from torch import fx

from .operations import number_of, shape_of


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
        ends = [number_of(end) for end in (part.start, part.stop, part.step)]
        if ends != [None] * 3:
            if NotImplemented in ends:
                return None
            found.append((axis, range(*slice(*ends).indices(shape_of(node)[axis]))))
        axis += 1
    return found[0] if len(found) == 1 and found[0][0] > 0 and found[0][1].step == 1 else None

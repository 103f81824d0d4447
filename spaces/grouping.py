"""Which channels can be pruned, and which of them together: units of one shape make a group."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from .labels import Labels
from .network import LAYER_KINDS, Block, Group, Op, Part, Slot, reachable
from .operations import Channels
from .ties import FIXED, varies

Place = tuple[str, str]  # ("makes" or "reads", layer)


class Found:
    """The groups of a traced graph, and where in each value their channels are."""

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> None:
        with torch.no_grad():
            self.labels = Labels(graph)
            self.labels.run(*inputs)
            self.roots = self.labels.ties.settle()
            try:
                run_quietly(fx.Interpreter(graph), doubled(inputs))
                self.takes_two = True  # requests in one batch
            except Exception:
                self.takes_two = False
        self.makes, self.reads = map(self._rooted, (self.labels.makes, self.labels.reads))
        self.slots = self._rooted(self._axes())
        self.unit_of: dict[str, dict[int, int]] = {}  # group -> root -> unit
        self.groups: dict[str, Group] = {}
        for units in self._alike():
            if (group := self._group(units)) is not None:
                self.groups[group.name] = group
        order = {name: i for i, name in enumerate(self.labels.makes)}
        self.groups = {n: self.groups[n] for n in sorted(self.groups, key=order.__getitem__)}

    def _alike(self) -> Iterable[list[int]]:
        """Units (as roots, in order of their first channel) that sit at the same places in the
        same numbers: any of them may go instead of another."""
        found: dict[int, list[tuple[Place, int]]] = {}
        for side, layers in (("makes", self.makes), ("reads", self.reads)):
            for name, roots in layers.items():
                for root, count in Counter(roots).items():  # in order of the first
                    found.setdefault(root, []).append(((side, name), count))
        found.pop(FIXED, None)
        alike: dict[tuple[tuple[Place, int], ...], list[int]] = {}
        for root, places in found.items():
            alike.setdefault(tuple(places), []).append(root)
        return alike.values()

    def _group(self, units: list[int]) -> Group | None:
        number = {root: unit for unit, root in enumerate(units)}
        makes, reads = _where(self.makes, number), _where(self.reads, number)
        # One of which all outputs are in it names a group: of a layer whose outputs meet those of
        # several side by side (a residual add behind a concatenation) each has a part.
        members = [name for name, where in makes.items() if -1 not in where]
        if len(units) < 2 or not members:
            return None
        places = [[u for u in where if u >= 0] for where in (*makes.values(), *reads.values())]
        channels = min(places, key=len)
        name = members[0]
        self.unit_of[name] = number
        size = len(channels) // len(units)
        slots = (
            Slot(tensor, axis, where)
            for (tensor, axis), where in _where(self.slots, number).items()
        )
        return Group(
            name, len(channels), tuple(members), size, tuple(channels) if size > 1 else (),
            tuple(slots),
        )  # fmt: skip

    def _rooted(self, places: Mapping[Any, Tensor]) -> dict[Any, list[int]]:
        return {place: self.roots[labels].tolist() for place, labels in places.items()}

    def _axes(self) -> dict[tuple[str, int], Tensor]:
        """The labels along every axis of a tensor of the model that has channels."""
        axes = dict(self.labels.slots)
        for name, labels in self.labels.attributes.items():
            for axis in range(labels.ndim):
                if varies(labels, axis, self.roots):
                    axes[name, axis] = _line(labels, axis)
        return axes

    def channels(self, groups: Iterable[str]) -> dict[str, Channels]:
        """Per value that has channels of ``groups`` the parts along their axis."""
        group_of = torch.full((self.labels.ties.count,), -1)
        names = list(groups)
        for i, name in enumerate(names):
            group_of[list(self.unit_of[name])] = i
        out: dict[str, Channels] = {}
        for node, labels in self.labels.of.items():
            if not isinstance(labels, Tensor):
                continue
            for axis in range(labels.ndim):
                if not varies(labels, axis, self.roots):
                    continue
                owners = group_of[self.roots[_line(labels, axis)]].tolist()
                if any(owner >= 0 for owner in owners):
                    out[node.name] = tuple(_runs(owners, names)), axis
        return out


def run_quietly(runner: fx.Interpreter, inputs: Iterable[Any]) -> None:
    """Runs a graph; what fails is told by its error alone."""
    runner.extra_traceback = False  # torch would add the whole node to the message
    with torch.no_grad():
        runner.run(*inputs)


def doubled(inputs: Sequence[Any]) -> list[Any]:
    """Two requests in one batch."""
    return repeated(inputs, 2)


def repeated(inputs: Sequence[Any], times: int) -> list[Any]:
    """As many requests in one batch."""
    return [torch.cat([x] * times) if isinstance(x, Tensor) and x.ndim else x for x in inputs]


def _where(
    places: Mapping[Any, list[int]], number: Mapping[int, int]
) -> dict[Any, tuple[int, ...]]:
    """Per place that has any unit of ``number`` the unit at each position, -1 for another's."""
    return {
        place: tuple(number.get(root, -1) for root in roots)
        for place, roots in places.items()
        if not number.keys().isdisjoint(roots)
    }


def _line(labels: Tensor, axis: int) -> Tensor:
    """Labels along ``axis``, [size], at the first place of every other."""
    return labels.movedim(axis, 0).reshape(labels.shape[axis], -1)[:, 0]


def _runs(owners: list[int], names: list[str]) -> Iterable[Part]:
    start = 0
    for end in range(1, len(owners) + 1):
        if end == len(owners) or owners[end] != owners[start]:
            yield (names[owners[start]] if owners[start] >= 0 else None), end - start
            start = end


def trial_widths(groups: Mapping[str, Group]) -> dict[str, int]:
    """A narrower width for each group that has one; neighbours get different ones."""
    out = {}
    for i, (name, group) in enumerate(groups.items()):
        step = group.multiple_of
        width = max(step, (group.width // 2 // step - i % 3) * step)
        if width < group.width:
            out[name] = width
    return out


def find_blocks(ops: Sequence[Op], groups: Mapping[str, Group]) -> dict[str, Block]:
    """Residual branches: one input of an add, computed from nothing but the other.

    Without the branch the add is that other input. Of branches that begin with the same layer the
    inner one is meant.
    """
    by_name = {op.name: op for op in ops}
    members = {member for group in groups.values() for member in group.members}
    makers = [op for op in ops if op.kind in LAYER_KINDS or op.module in members]
    found: dict[str, Block] = {}
    for op in ops:
        if op.kind != "add":
            continue
        for skip, branch in (op.inputs, op.inputs[::-1]):
            gone = _dropped(ops, by_name, makers, op, skip, branch)
            layers = tuple(module for module, kind in gone.items() if kind in LAYER_KINDS)
            if layers and layers[0] not in found:
                inside = (g.name for g in groups.values() if gone.keys() >= set(g.members))
                found[layers[0]] = Block(layers[0], op.name, skip, layers, tuple(inside))
    return found


def _dropped(
    ops: Sequence[Op],
    by_name: Mapping[str, Op],
    makers: Sequence[Op],
    add: Op,
    skip: str,
    branch: str,
) -> dict[str, str]:
    """The modules of ``makers`` that go if ``add`` becomes ``skip``, and their kinds; none if
    ``branch`` is none of ``skip`` alone, or runs one that also runs elsewhere."""
    stack, seen = [branch], {skip}
    while stack:
        op = by_name[stack.pop()]
        if op.kind == "input":
            return {}
        seen.add(op.name)
        stack += [v for v in op.inputs if v not in seen and by_name[v].shape]
    without = [
        replace(op, inputs=tuple(skip if v == add.name else v for v in op.inputs))
        for op in ops
        if op is not add
    ]
    alive = reachable(without)
    gone = {op.module: op.kind for op in makers if op.name not in alive}
    stay = {op.module for op in makers if op.name in alive}
    return {} if stay & gone.keys() else gone

"""Labels of channels, and which of them stay or go together."""

import torch
from torch import Tensor

FIXED = 0  # the label of what cannot go


def core(labels: Tensor) -> Tensor:
    """``labels`` with every axis along which they were expanded cut to length 1."""
    for axis in range(labels.ndim):
        if labels.shape[axis] > 1 and labels.stride(axis) == 0:
            labels = labels.narrow(axis, 0, 1)
    return labels


def compact(labels: Tensor) -> Tensor:
    """The same labels, expanded along every axis along which they do not differ."""
    shape, labels = labels.shape, core(labels)
    for axis in range(labels.ndim):
        first = labels.narrow(axis, 0, min(1, labels.shape[axis]))
        if labels.shape[axis] > 1 and bool((labels == first).all()):
            labels = first
    return labels.expand(shape)


def varies(labels: Tensor, axis: int, roots: Tensor) -> bool:
    """Whether anything differs along ``axis`` once tied labels count as one."""
    labels = core(labels)
    if labels.shape[axis] <= 1:
        return False
    found = roots[labels]
    return bool((found != found.narrow(axis, 0, 1)).any())


def _units(labels: Tensor, axis: int, roots: Tensor) -> int:
    """How many units there are along ``axis``."""
    line = core(labels).movedim(axis, 0)
    return len(roots[line.reshape(len(line), -1)[:, 0]].unique())  # type: ignore[no-untyped-call]


class Ties:
    """Labels, ties between them, and conditions that are looked at when all ties are known.

    ``settle`` gives the root of every label: labels with one root are one unit.
    """

    def __init__(self) -> None:
        self.count = 1
        self._pairs: list[Tensor] = []
        self._grids: list[Tensor] = []
        self._stills: list[tuple[Tensor, int]] = []
        self._joins: list[tuple[Tensor, Tensor, tuple[int, ...]]] = []
        self._alikes: list[tuple[Tensor, list[Tensor], int]] = []

    def fresh(self, size: int) -> Tensor:
        """New labels, [size]."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """The labels at the same place of ``a`` and ``b``, which broadcast, are one unit."""
        # PyTorch gives these functions no types.
        a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
        a, b = torch.broadcast_tensors(core(a), core(b))  # type: ignore[no-untyped-call]
        pairs = torch.stack((a.reshape(-1), b.reshape(-1)))
        self._pairs.append(pairs.unique(dim=1))  # type: ignore[no-untyped-call]

    def fix(self, labels: Tensor) -> None:
        """What carries ``labels`` cannot go."""
        self.tie(labels, torch.tensor(FIXED))

    def grid(self, labels: Tensor) -> None:
        """What remains of a tensor is a tensor again: units may differ along one axis only."""
        if sum(n > 1 for n in core(labels).shape) > 1:
            self._grids.append(labels)

    def still(self, labels: Tensor, axis: int) -> None:
        """Units must not differ along ``axis``, or they cannot go."""
        self._stills.append((labels, axis % labels.ndim))

    def join(self, lead: Tensor, other: Tensor, axes: tuple[int, ...]) -> None:
        """``other`` is broadcast to ``lead`` along ``axes``, where it is wanted once for all.

        It is of the unit of ``lead`` if that is one along ``axes``; if there are several it must
        stay for all of them.
        """
        self._joins.append((lead, other, axes))

    def alike(self, whole: Tensor, parts: list[Tensor], axis: int) -> None:
        """``whole`` is cut into ``parts`` along ``axis``, as many for each: they lose the same."""
        self._alikes.append((whole, parts, axis % whole.ndim))

    def settle(self) -> Tensor:
        """The root of every label, [count]: the smallest label of its unit."""
        while self._tie_more(self._roots()):
            pass
        while self._fix_more(self._roots()):
            pass
        return self._roots()

    def _roots(self) -> Tensor:
        root = torch.arange(self.count)
        a, b = torch.cat([torch.zeros((2, 1), dtype=torch.int64), *self._pairs], 1)
        while True:
            ends = torch.stack((root[a], root[b]))
            low = ends.amin(0).expand(2, -1)
            new = root.scatter_reduce(0, ends.reshape(-1), low.reshape(-1), "amin")
            new = new[new]
            if torch.equal(new, root):
                return root
            root = new

    def _tie_more(self, roots: Tensor) -> bool:
        waiting = []
        for lead, other, axes in self._joins:
            if any(varies(lead, axis, roots) for axis in axes):
                waiting.append((lead, other, axes))
            else:
                self.tie(lead, other)
        if len(waiting) < len(self._joins):
            self._joins = waiting
            return True
        for labels in self._grids:  # one at a time: it may settle the others
            differ = [axis for axis in range(labels.ndim) if varies(labels, axis, roots)]
            if len(differ) > 1:
                # Heads of which each goes as a whole, or channels that go from every group: what
                # leaves more units.
                fewest = min(reversed(differ), key=lambda axis: _units(labels, axis, roots))
                self.tie(labels, labels.narrow(fewest, 0, 1))
                return True
        for whole, parts, axis in self._alikes:
            if any(p.shape != parts[0].shape for p in parts) or not varies(whole, axis, roots):
                continue
            if any(not torch.equal(roots[p], roots[parts[0]]) for p in parts):
                for part in parts:
                    self.tie(part, parts[0])
                return True
        return False

    def _fix_more(self, roots: Tensor) -> bool:
        broken = [labels for labels, axis in self._stills if varies(labels, axis, roots)]
        broken += [other for _, other, _ in self._joins]
        for whole, parts, axis in self._alikes:
            same = all(p.shape == parts[0].shape for p in parts)
            same = same and all(torch.equal(roots[p], roots[parts[0]]) for p in parts)
            if not same and varies(whole, axis, roots):
                broken.append(whole)
        broken = [labels for labels in broken if bool((roots[core(labels)] != FIXED).any())]
        for labels in broken:
            self.fix(labels)
        return bool(broken)

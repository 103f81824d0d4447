"""The pieces of work of many policies of one network at once, without a blueprint of each.

A piece of work depends on few things: on what its kernel and those around it are, and on the widths
of what it reads and makes. So it is worked out once for each such surrounding that occurs, of the
kernels themselves, and looked up from then on.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spaces.blueprint import Decisions, Kernel, Rows, Run, kernel_of
from ..spaces.capabilities import Capabilities
from ..spaces.network import Network
from .pieces import MOST, Ints, Pieces
from .signature import SESSION, Signature, pieces_of

LARGE = 2**14  # widths that can occur together; where there are more, they are numbered as they do


class Known:
    """The work that was looked up before, of one network, and of it without some blocks.

    ``full`` when it is better to begin anew. table: the number of the work at each place, 0 where
    it is not known yet; place 0 is that of no work.
    """

    def __init__(self, numbered: Pieces) -> None:
        self.pieces = numbered
        self.table = np.zeros(1, np.int64)
        self.kernels: dict[Any, Kernel] = {}
        self._used = 1  # places
        self._begins: dict[Any, tuple[int, int]] = {}
        self._seen: dict[Any, dict[bytes, int]] = {}

    @property
    def full(self) -> bool:
        return self.pieces.full or sum(map(len, self._seen.values())) > MOST

    def begin(self, surrounding: Any, size: int) -> int:
        """The first of ``size`` places for what stands in a ``surrounding``, one for each number
        of its widths."""
        begin, room = self._begins.get(surrounding, (0, 0))
        if size > room:
            old, begin, size = begin, self._used, max(size, 2 * room)
            self._begins[surrounding] = begin, size
            self._used += size
            missing = self._used - len(self.table)
            if missing > 0:
                self.table = np.append(self.table, np.zeros(missing + len(self.table), np.int64))
            self.table[begin : begin + room] = self.table[old : old + room]
        return begin

    def number(self, groups: tuple[str, ...], indices: Ints) -> Ints:
        """A number for each row of ``indices`` [policies, groups], the same for the same row."""
        seen = self._seen.setdefault(groups, {})
        return np.array([seen.setdefault(row.tobytes(), len(seen)) for row in indices])


@dataclass(eq=False)
class _Placed:
    """A run of operations, the policies in which it is a kernel, and those in which in int8; what
    makes its inputs and what reads its output in some policy. groups: whose widths it has."""

    run: Run
    rows: Rows
    int8: Rows
    groups: tuple[str, ...]
    makers: list["_Placed"] = field(default_factory=list)
    readers: list["_Placed"] = field(default_factory=list)

    def __post_init__(self) -> None:
        head = self.run[0]
        self._keys = [(head.name, head.inputs, len(self.run), p) for p in ("fp32", "int8")]

    def key(self, policy: Rows) -> Any:
        """What is made of it in one policy, its widths aside."""
        return self._keys[self.int8 & policy > 0]


class Batch:
    """``count`` policies of ``network``.

    choices: the widths that each group can have. widths: for each group the index into its choices,
    [policies]. int8: for each layer whether it is in int8, [policies].
    """

    def __init__(
        self,
        network: Network,
        capabilities: Capabilities,
        choices: Mapping[str, Sequence[int]],
        widths: Mapping[str, Ints],
        int8: Mapping[str, NDArray[np.bool_]],
        count: int,
    ) -> None:
        self._network, self._choices, self._widths = network, choices, widths
        self._count = count
        masks = {name: _rows(wanted) for name, wanted in int8.items()}
        decided = Decisions(network, capabilities, masks, (1 << count) - 1)
        self._quantized = decided.quantized
        self._kernels: dict[str, list[_Placed]] = {}  # by the first operation
        makers: dict[str, list[_Placed]] = {}
        for run, rows in decided.runs:
            one = _Placed(run, rows, decided.in_int8(run, rows), self._groups_of(run))
            self._kernels.setdefault(run[0].name, []).append(one)
            makers.setdefault(run[-1].name, []).append(one)
        for one in chain.from_iterable(self._kernels.values()):
            one.makers = [m for value in one.run[0].inputs for m in makers.get(value, ())]
            for maker in one.makers:
                maker.readers.append(one)

    def numbers(self, known: Known) -> Ints:
        """[policies, kernels + 1]: the number of the work of each, 0 for none, and of a call."""
        places = np.zeros((len(self._kernels), self._count), np.int64)
        for row, alternatives in zip(places, self._kernels.values(), strict=True):
            for one in alternatives:
                self._put_places(one, known, row)
        unknown = np.nonzero((known.table[places] == 0) & (places > 0))
        new, first = np.unique(places[unknown], return_index=True)
        kernels = list(self._kernels.values())
        for place, k, i in zip(new, *(at[first].tolist() for at in unknown), strict=True):
            known.table[place] = known.pieces.number(*self._work_out(kernels[k], i, known))
        call = np.full(self._count, known.pieces.number(SESSION))
        return np.stack([*known.table[places], call], 1)

    def _put_places(self, one: _Placed, known: Known, out: Ints) -> None:
        """Puts the place of its work in the table into ``out`` [policies], where it is a kernel."""
        quantized = self._quantized.get(one.run[-1].name, 0)
        groups = self._groups(one)
        combined, size = self._combined(groups, known)
        around = (m for near in (*one.makers, *one.readers) for m in (near.rows, near.int8))
        parts = _divided(one.rows, (one.int8, quantized, *around))
        begins = []
        for rows in parts:
            first = rows & -rows
            surrounding = (
                groups, quantized & first > 0, one.key(first),
                tuple([m.key(first) for m in one.makers if m.rows & first]),
                tuple([r.key(first) for r in one.readers if r.rows & first]),
            )  # fmt: skip
            begins.append(known.begin(surrounding, size))
        part, at = _indices(parts, self._count)
        out[at] = np.array(begins)[part] + combined[at]

    def _work_out(
        self, alternatives: Sequence[_Placed], i: int, known: Known
    ) -> tuple[Signature, Signature]:
        """The two pieces of that of ``alternatives`` which is a kernel in the i-th policy, by the
        kernels that are in it."""
        policy = 1 << i

        def kernels(placed: Iterable[_Placed]) -> list[Kernel]:
            return [self._kernel(one, i, known) for one in placed if one.rows & policy]

        one = next(one for one in alternatives if one.rows & policy)
        quantized = self._quantized.get(one.run[-1].name, 0) & policy > 0
        own = self._kernel(one, i, known)
        return pieces_of(own, kernels(one.makers), kernels(one.readers), quantized)

    def _kernel(self, one: _Placed, i: int, known: Known) -> Kernel:
        """What ``one`` is in the i-th policy."""
        widths = {g: self._choices[g][self._widths[g].item(i)] for g in one.groups}
        key = one.key(1 << i), tuple(widths.values())
        if key not in known.kernels:
            *_, precision = key[0]
            known.kernels[key] = kernel_of(self._network, one.run, widths, precision)
        return known.kernels[key]

    def _groups_of(self, run: Run) -> tuple[str, ...]:
        """The groups of what it reads and makes."""
        values = (*run[0].inputs, run[-1].name)
        parts = (part for value in values for part in self._network.op[value].parts)
        return tuple(dict.fromkeys(g for g, _ in parts if g is not None and g in self._widths))

    def _groups(self, one: _Placed) -> tuple[str, ...]:
        """The groups whose widths decide the pieces of ``one``: those of what it reads and makes,
        and of what grouped convolutions around it do, as some widths make them depthwise."""
        found = dict.fromkeys(one.groups)
        for near in (*one.makers, *one.readers):
            layer = self._network.layers.get(near.run[0].module)
            if layer and layer.groups > 1:
                found |= dict.fromkeys(near.groups)
        return tuple(found)

    def _combined(self, groups: tuple[str, ...], known: Known) -> tuple[Ints, int]:
        """[policies]: one number for the widths of all ``groups``; and what it is below."""
        size = math.prod(len(self._choices[group]) for group in groups)
        if size > LARGE:
            out = known.number(groups, np.stack([self._widths[g] for g in groups], 1))
            return out, int(out.max()) + 1
        out = np.zeros(self._count, np.int64)
        for group in groups:
            out = out * len(self._choices[group]) + self._widths[group]
        return out, size


def _rows(wanted: NDArray[np.bool_]) -> Rows:
    return int.from_bytes(np.packbits(wanted, bitorder="little").tobytes(), "little")


def _indices(parts: Sequence[Rows], count: int) -> tuple[Ints, Ints]:
    """Of all that ``parts`` hold: which part does, and its index."""
    packed = b"".join(rows.to_bytes(-(-count // 8), "little") for rows in parts)
    bits = np.frombuffer(packed, np.uint8).reshape(len(parts), -1)
    part, at = np.nonzero(np.unpackbits(bits, 1, bitorder="little"))
    return part, at


def _divided(rows: Rows, masks: Iterable[Rows]) -> list[Rows]:
    """``rows`` in parts of which each mask holds all or nothing."""
    parts = [rows]
    for mask in masks:
        parts = [p for part in parts for p in (part & mask, part & ~mask) if p]
    return parts

"""The pieces of work of many policies of one network at once, without a blueprint of each.

A piece of work depends on few things: on what its kernel and those around it are, and on the widths
of what it reads and makes. So it is worked out once for each such surrounding that occurs, of the
kernels themselves, and looked up from then on.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    """The pieces that were looked up before, of one network, and of it without some blocks.

    ``full`` when it is better to begin anew.
    """

    def __init__(self, numbered: Pieces) -> None:
        self.pieces = numbered
        self._tables: dict[Any, Ints] = {}
        self._seen: dict[Any, dict[bytes, int]] = {}

    @property
    def full(self) -> bool:
        return self.pieces.full or sum(map(len, self._seen.values())) > MOST

    def table(self, surrounding: Any, size: int) -> Ints:
        """[widths, 2]: two pieces for each number of widths, 0 where they are not known yet."""
        table = self._tables.get(surrounding)
        if table is None or len(table) < size:
            old = np.zeros((0, 2), np.int64) if table is None else table
            table = np.append(old, np.zeros((max(size, len(old)), 2), np.int64), 0)
            self._tables[surrounding] = table
        return table

    def number(self, groups: tuple[str, ...], indices: Ints) -> Ints:
        """A number for each row of ``indices`` [policies, groups], the same for the same row."""
        seen = self._seen.setdefault(groups, {})
        return np.array([seen.setdefault(row.tobytes(), len(seen)) for row in indices])


@dataclass(frozen=True)
class _Placed:
    """A run of operations, the policies in which it is a kernel, and those in which in int8."""

    run: Run
    rows: Rows
    int8: Rows

    def precision(self, policy: Rows) -> str:
        return "int8" if self.int8 & policy else "fp32"

    def key(self, policy: Rows) -> Any:
        """What is made of it in one policy, its widths aside."""
        return self.run[0].name, self.run[0].inputs, len(self.run), self.precision(policy)


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
        self._placed = [_Placed(r, rows, decided.in_int8(r, rows)) for r, rows in decided.runs]
        self._makers: dict[str, list[_Placed]] = {}
        self._readers: dict[str, list[_Placed]] = {}
        for one in self._placed:
            self._makers.setdefault(one.run[-1].name, []).append(one)
            for value in one.run[0].inputs:
                self._readers.setdefault(value, []).append(one)

    def numbers(self, known: Known) -> Ints:
        """[policies, pieces]: the numbers of the pieces of each, 0 for none."""
        heads = list(dict.fromkeys(one.run[0].name for one in self._placed))
        out = np.zeros((len(heads) + 1, 2, self._count), np.int64)
        out[-1, 0] = known.pieces.number(SESSION)
        for one in self._placed:
            self._look_up(one, known, out[heads.index(one.run[0].name)])
        return out.reshape(-1, self._count).T

    def _look_up(self, one: _Placed, known: Known, out: Ints) -> None:
        """Puts the two pieces of ``one`` into ``out`` [2, policies], where it is a kernel."""
        makers = [m for value in one.run[0].inputs for m in self._makers.get(value, ())]
        readers = self._readers.get(one.run[-1].name, [])
        quantized = self._quantized.get(one.run[-1].name, 0)
        groups = self._groups(one, (*makers, *readers))
        combined = self._combined(groups, known)
        size = int(combined.max()) + 1
        around = (mask for near in (*makers, *readers) for mask in (near.rows, near.int8))
        for rows in _divided(one.rows, (one.int8, quantized, *around)):
            first = rows & -rows
            made = [m for m in makers if m.rows & first]
            read = [r for r in readers if r.rows & first]
            surrounding = (
                groups, quantized & first > 0, one.key(first),
                tuple(m.key(first) for m in made), tuple(r.key(first) for r in read),
            )  # fmt: skip
            at = _indices(rows, self._count)
            widths = combined[at]
            table = known.table(surrounding, size)
            found = table[widths]
            if not found[:, 0].all():
                unknown = np.flatnonzero(found[:, 0] == 0)
                some = dict(zip(widths[unknown].tolist(), at[unknown].tolist(), strict=True))
                for number, i in some.items():
                    work = self._work_out(i, one, made, read, quantized)
                    table[number] = [known.pieces.number(piece) for piece in work]
                found = table[widths]
            out[:, at] = found.T

    def _work_out(
        self,
        i: int,
        one: _Placed,
        makers: Sequence[_Placed],
        readers: Sequence[_Placed],
        quantized: Rows,
    ) -> tuple[Signature, Signature]:
        """The two pieces of ``one`` in the i-th policy, by the kernels that are in it."""
        policy = 1 << i
        widths = {g: self._choices[g][int(index[i])] for g, index in self._widths.items()}

        def kernel(placed: _Placed) -> Kernel:
            return kernel_of(self._network, placed.run, widths, placed.precision(policy))

        return pieces_of(
            kernel(one), map(kernel, makers), map(kernel, readers), quantized & policy > 0
        )

    def _groups(self, one: _Placed, near: Iterable[_Placed]) -> tuple[str, ...]:
        """The groups whose widths decide the pieces of ``one``: those of what it reads and makes,
        and of what grouped convolutions around it do, as some widths make them depthwise."""
        values = [*one.run[0].inputs, one.run[-1].name]
        for other in near:
            layer = self._network.layers.get(other.run[0].module)
            if layer and layer.groups > 1:
                values += [other.run[0].inputs[0], other.run[-1].name]
        parts = (part for value in values for part in self._network.op[value].parts)
        return tuple(dict.fromkeys(g for g, _ in parts if g is not None and g in self._widths))

    def _combined(self, groups: tuple[str, ...], known: Known) -> Ints:
        """[policies]: one number for the widths of all ``groups``."""
        if math.prod(len(self._choices[group]) for group in groups) > LARGE:
            return known.number(groups, np.stack([self._widths[g] for g in groups], 1))
        out = np.zeros(self._count, np.int64)
        for group in groups:
            out = out * len(self._choices[group]) + self._widths[group]
        return out


def _rows(wanted: NDArray[np.bool_]) -> Rows:
    return int.from_bytes(np.packbits(wanted, bitorder="little").tobytes(), "little")


def _indices(rows: Rows, count: int) -> Ints:
    packed = np.frombuffer(rows.to_bytes(-(-count // 8), "little"), np.uint8)
    return np.nonzero(np.unpackbits(packed, bitorder="little"))[0]


def _divided(rows: Rows, masks: Iterable[Rows]) -> list[Rows]:
    """``rows`` in parts of which each mask holds all or nothing."""
    parts = [rows]
    for mask in masks:
        parts = [p for part in parts for p in (part & mask, part & ~mask) if p]
    return parts

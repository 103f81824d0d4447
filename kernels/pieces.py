"""What an additive process says of sums of pieces, thousands at a time.

All it takes is linear in the pieces but for the variance before anything was observed, to which
every two pieces of one form contribute. What is linear is worked out once a piece, and added.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]

from .additive import PARTS, PLACE, AdditiveProcess, Array, Counts, places
from .signature import Signature

Ints = NDArray[np.int64]

ROWS_BYTES = 256 * 2**20  # of rows that are kept
MOST = 2**17  # numbers, after which it is better to begin anew: about 100 MB with their signatures
COLUMNS = 120  # of rows that are added at a time: those of all pieces of a network fit the cache
COARSE = 2  # of the first of the PARTS forms have values in common
ALL = tuple(range(len(PARTS)))
BY_PLACE = (PARTS.index(PLACE),)
BUT_PLACE = tuple(p for p in ALL if p not in BY_PLACE)


class Process(Protocol):
    """What learns from sums of pieces."""

    def predict(self, sums: Sequence[Counts]) -> tuple[Array, Array]:
        """The time of each sum in ms, and the standard deviation of what would be measured."""


class Pieces:
    """Pieces of work, as they come together: a number, from 1, for one or for two of them;
    ``full`` when there are too many."""

    def __init__(self, process: Process) -> None:
        self._plain = process
        self._pieces: dict[Signature, int] = {}  # from 1
        self._numbers: dict[tuple[int, int], int] = {}  # 0 is no piece

    def __iter__(self) -> Iterator[tuple[Signature, ...]]:
        """The pieces of each number."""
        pieces = list(self._pieces)
        return (tuple(pieces[p - 1] for p in both if p) for both in self._numbers)

    @property
    def full(self) -> bool:
        return len(self._numbers) > MOST

    def number(self, piece: Signature, other: Signature | None = None) -> int:
        """The number of ``piece``, or of both, from now on."""
        both = self._piece(piece), 0 if other is None else self._piece(other)
        return self._numbers.setdefault(both, len(self._numbers) + 1)

    def _piece(self, piece: Signature) -> int:
        return self._pieces.setdefault(piece, len(self._pieces) + 1)

    def numbers(self, sums: Sequence[Counts]) -> Ints:
        """[sums, pieces]: the numbers of the pieces of each, padded with 0."""
        rows = [
            [number for s, count in counts.items() for number in [self.number(s)] * count]
            for counts in sums
        ]
        out = np.zeros((len(rows), max(map(len, rows), default=0)), np.int64)
        for at, row in zip(out, rows, strict=True):
            at[: len(row)] = row
        return out

    def predict(self, numbers: Ints) -> tuple[Array, Array]:
        """The time of each sum of the pieces with the ``numbers`` [sums, any] in ms, and the
        standard deviation of what would be measured."""
        pieces = [(), *self]
        return self._plain.predict([Counter(s for n in row for s in pieces[n]) for row in numbers])


class AdditivePieces(Pieces):
    """The same of an additive process, fast.

    Most pieces differ from another one in their place only. So a piece has two rows of the process:
    one of the part that depends on its place, and one of the others.
    """

    def __init__(self, process: AdditiveProcess) -> None:
        super().__init__(process)
        self._process = process
        self._both = np.zeros((1, 2), np.int64)  # the pieces of each number; 0 is none
        # Of each piece.
        self._nominal = np.zeros(1)
        self._places = np.zeros((5, 1))
        self._values = np.zeros((len(PARTS), 1), np.int64)  # that each part takes
        self._features = np.zeros((1, 2), np.int64)  # which rows it has; 0 is none
        self._value_index: list[dict[Hashable, int]] = [{} for _ in PARTS]
        self._feature_index: dict[Hashable, int] = {}
        self._sources: list[tuple[Signature, tuple[int, ...]]] = []  # of each feature but 0
        n = len(process.white)
        self._blocks = [slice(at, min(at + COLUMNS, n)) for at in range(0, n, COLUMNS)]
        self._room = max(3, ROWS_BYTES // (8 * n))
        # Takes no memory until it is written to.
        self._rows = [np.zeros((self._room, c.stop - c.start)) for c in self._blocks]
        self._used = 0
        self._row = np.full(1, -1)  # of each feature, -1 if it is not there

    def predict(self, numbers: Ints) -> tuple[Array, Array]:
        self._take_in()
        mean, variance = np.zeros(len(numbers)), self._before(numbers)
        # Of so many sums all rows can be there at once.
        step = max(1, self._room // max(1, 4 * numbers.shape[1]))
        if len(self._sources) <= self._room:
            step = max(1, len(numbers))
        for at in range(0, len(numbers), step):
            some = slice(at, at + step)
            # What comes together in many sums is added once.
            distinct, which = _distinct(numbers[some], len(self._both))
            weights = self._weights(self._both[distinct])
            sums = _ones(which, len(distinct))
            for columns, rows in zip(self._blocks, self._rows, strict=True):
                added = sums @ (weights @ rows)
                mean[some] += added @ self._process.white[columns]
                variance[some] -= np.einsum("ij,ij->i", added, added)
        variance = np.maximum(variance, 0) + (self._process.noise * mean) ** 2
        return self._process.pace * mean, self._process.pace * np.sqrt(variance)

    def _take_in(self) -> None:
        """Adds what is new to the arrays."""
        if len(self._both) > len(self._numbers):
            return
        both = list(islice(self._numbers, len(self._both) - 1, None))
        self._both = np.append(self._both, both, 0)
        new = list(islice(self._pieces, len(self._nominal) - 1, None))
        nominal = [s.nominal_ms for s in new]
        values = [
            [index.setdefault(part.key(s), len(index)) for s in new]
            for part, index in zip(PARTS, self._value_index, strict=True)
        ]
        features = [[self._feature(s, parts) for parts in _split(s)] for s in new]
        self._nominal = np.append(self._nominal, nominal)
        self._places = np.append(self._places, places(new).T, 1)
        self._values = np.append(self._values, np.reshape(values, (len(PARTS), -1)), 1)
        self._features = np.append(self._features, np.reshape(features, (-1, 2)), 0)
        missing = len(self._sources) + 1 - len(self._row)
        self._row = np.append(self._row, np.full(missing, -1))

    def _feature(self, piece: Signature, parts: tuple[int, ...]) -> int:
        if not parts:
            return 0
        key = parts, PARTS[parts[-1]].key(piece)  # the last tells most apart
        if key not in self._feature_index:
            self._feature_index[key] = len(self._feature_index) + 1
            self._sources.append((piece, parts))
        return self._feature_index[key]

    def _weights(self, pieces: Ints) -> sparse.csr_array:
        """[sums, rows]: how much of each row is in the sum of some ``pieces`` [sums, any]. Sees to
        it that the rows are there."""
        features = self._features[pieces].reshape(len(pieces), -1)
        used = features > 0
        self._see_to_rows(features[used])
        nominal = np.repeat(self._nominal[pieces], 2, 1)
        ends = np.append(0, np.cumsum(used.sum(1)))
        return sparse.csr_array(
            (nominal[used], self._row[features[used]], ends), shape=(len(pieces), self._room)
        )

    def _see_to_rows(self, features: Ints) -> None:
        new = np.unique(features[self._row[features] < 0])
        if self._used + len(new) > self._room:
            self._used = 0
            self._row[:] = -1
            new = np.unique(features)
        if not len(new):
            return
        found = self._process.rows([self._sources[feature - 1] for feature in new])
        self._row[new] = np.arange(self._used, self._used + len(new))
        for columns, rows in zip(self._blocks, self._rows, strict=True):
            rows[self._used : self._used + len(new)] = found[:, columns]
        self._used += len(new)

    def _before(self, numbers: Ints) -> Array:
        """The variance of each sum before anything was observed."""
        n, deviations = len(numbers), self._process.deviations**2
        pieces = self._both[numbers].reshape(n, 2 * numbers.shape[1])
        pieces = pieces[:, pieces.any(0)]
        out = np.zeros(n)
        row = np.arange(n)[:, None]
        for p in range(COARSE):
            count = len(self._value_index[p]) or 1
            at = row * count + self._values[p][pieces]
            sums = np.bincount(at.ravel(), self._nominal[pieces].ravel(), n * count)
            out += deviations[p] * (sums.reshape(n, count) ** 2).sum(1)
        # The other parts: every two pieces of one form. Sorted by form, they are d places apart.
        form = self._values[COARSE]
        bits = len(form).bit_length()
        order = np.sort((form << bits | np.arange(len(form)))[pieces], 1) & (1 << bits) - 1
        forms = (row * len(form) + form[order]).ravel()
        nominal = self._nominal[order]
        out += deviations[COARSE:].sum() * (nominal**2).sum(1)
        order, nominal = order.ravel(), nominal.ravel()
        row = np.repeat(row, pieces.shape[1])
        for d in range(1, pieces.shape[1]):
            at = np.flatnonzero(forms[d:] == forms[:-d])
            if not len(at):
                break
            alike = self._alike(order[at + d], order[at])
            alike *= 2 * nominal[at + d] * nominal[at]
            out += np.bincount(row[at], alike, n)
        return out

    def _alike(self, a: Ints, b: Ints) -> Array:
        """The covariance of pieces with others of their forms, each at a nominal time of 1, as far
        as it comes from parts that are not ``COARSE``."""
        deviations = self._process.deviations**2
        squares = np.zeros(len(a))
        for axis in self._places:  # one by one: half the time of rows of five
            squares += (axis[a] - axis[b]) ** 2
        alike = np.full(len(a), deviations[COARSE])
        for p in range(COARSE + 1, len(PARTS)):
            if PARTS[p].octaves is None:
                alike += deviations[p] * (self._values[p][a] == self._values[p][b])
            else:
                alike += deviations[p] * PARTS[p].alike(squares)
        return alike


def _split(piece: Signature) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The parts of each row of ``piece``; one is enough where all of a form have one place."""
    return (BUT_PLACE, BY_PLACE) if piece.place else (ALL, ())


def _distinct(numbers: Ints, count: int) -> tuple[Ints, Ints]:
    """Those of 0 to ``count`` that there are, and which of these each is. (Sorting, as np.unique
    does, takes twenty times as long.)"""
    there = np.zeros(count, bool)
    there[numbers] = True
    return np.flatnonzero(there), (np.cumsum(there) - 1)[numbers]


def _ones(which: Ints, count: int) -> sparse.csr_array:
    """[sums, count]: how often each is in a sum. which: [sums, any]."""
    ends = np.arange(len(which) + 1) * which.shape[1]
    return sparse.csr_array((np.ones(which.size), which.ravel(), ends), (len(which), count))

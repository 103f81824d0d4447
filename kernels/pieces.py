"""What an additive process says of sums of pieces, thousands at a time.

All it takes is linear in the pieces but for the variance before anything was observed, to which
every two pieces of one form contribute. What is linear is worked out once a piece, and added.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]

from .additive import PARTS, PLACE, AdditiveProcess, Array, Counts, places
from .signature import Signature

Ints = NDArray[np.int64]

ROWS_BYTES = 256 * 2**20  # of rows that are kept
MOST = 2**17  # pieces, after which it is better to begin anew: about 100 MB with their signatures
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
    """Pieces of work with a number each, from 1; ``full`` when there are too many."""

    def __init__(self, process: Process) -> None:
        self._plain = process
        self._numbers: dict[Signature, int] = {}

    def __iter__(self) -> Iterator[Signature]:
        return iter(self._numbers)

    @property
    def full(self) -> bool:
        return len(self._numbers) > MOST

    def number(self, piece: Signature) -> int:
        """The number of ``piece``, from now on."""
        return self._numbers.setdefault(piece, len(self._numbers) + 1)

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
        """The time of each sum of the pieces ``numbers`` [sums, pieces] in ms, and the standard
        deviation of what would be measured."""
        pieces = list(self._numbers)
        return self._plain.predict([Counter(pieces[n - 1] for n in row if n) for row in numbers])


class AdditivePieces(Pieces):
    """The same of an additive process, fast.

    Most pieces differ from another one in their place only. So a piece has two rows of the process:
    one of the part that depends on its place, and one of the others.
    """

    def __init__(self, process: AdditiveProcess) -> None:
        super().__init__(process)
        self._process = process
        self._new: list[Signature] = []  # those that are not in the arrays yet
        # Of each piece; number 0 is none.
        self._nominal = np.zeros(1)
        self._places = np.zeros((1, 5))
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

    def number(self, piece: Signature) -> int:
        if piece not in self._numbers:
            self._new.append(piece)
        return super().number(piece)

    def predict(self, numbers: Ints) -> tuple[Array, Array]:
        self._take_in()
        mean, variance = np.zeros(len(numbers)), self._before(numbers)
        # Of so many sums all rows can be there at once.
        step = max(1, self._room // max(1, 2 * numbers.shape[1]))
        if len(self._sources) <= self._room:
            step = max(1, len(numbers))
        for at in range(0, len(numbers), step):
            some = slice(at, at + step)
            weights = self._weights(numbers[some])
            for columns, rows in zip(self._blocks, self._rows, strict=True):
                added = weights @ rows
                mean[some] += added @ self._process.white[columns]
                variance[some] -= np.einsum("ij,ij->i", added, added)
        variance = np.maximum(variance, 0) + (self._process.noise * mean) ** 2
        return self._process.pace * mean, self._process.pace * np.sqrt(variance)

    def _take_in(self) -> None:
        """Adds what is new to the arrays."""
        new, self._new = self._new, []
        if not new:
            return
        nominal = [s.nominal_ms for s in new]
        values = [
            [index.setdefault(part.key(s), len(index)) for s in new]
            for part, index in zip(PARTS, self._value_index, strict=True)
        ]
        features = [[self._feature(s, parts) for parts in _split(s)] for s in new]
        self._nominal = np.append(self._nominal, nominal)
        self._places = np.append(self._places, places(new), 0)
        self._values = np.append(self._values, values, 1)
        self._features = np.append(self._features, features, 0)
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

    def _weights(self, numbers: Ints) -> sparse.csr_array:
        """[sums, rows]: how much of each row is in a sum. Sees to it that the rows are there."""
        features = self._features[numbers].reshape(len(numbers), -1)
        used = features > 0
        self._see_to_rows(features[used])
        nominal = np.repeat(self._nominal[numbers], 2, 1)
        ends = np.append(0, np.cumsum(used.sum(1)))
        weights = sparse.csr_array(
            (nominal[used], self._row[features[used]], ends), shape=(len(numbers), self._room)
        )
        weights.sum_duplicates()  # of 73 rows of a residual network's policy 17 are
        return weights

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
        out = np.zeros(n)
        row = np.arange(n)[:, None]
        for p in range(COARSE):
            count = len(self._value_index[p]) or 1
            at = row * count + self._values[p][numbers]
            sums = np.bincount(at.ravel(), self._nominal[numbers].ravel(), n * count)
            out += deviations[p] * (sums.reshape(n, count) ** 2).sum(1)
        # The other parts: every two pieces of one form. Sorted by form, they are d places apart.
        form = self._values[COARSE]
        bits = len(form).bit_length()
        order = np.sort((form << bits | np.arange(len(form)))[numbers], 1).ravel() & (1 << bits) - 1
        forms = row * len(form) + form[order].reshape(numbers.shape)
        nominal = self._nominal[order]
        own = (nominal**2).reshape(numbers.shape).sum(1)
        out += deviations[COARSE:].sum() * own
        forms = forms.ravel()
        for d in range(1, numbers.shape[1]):
            at = np.flatnonzero(forms[d:] == forms[:-d])
            if not len(at):
                break
            a, b = order[at + d], order[at]
            apart = self._places[a] - self._places[b]
            squares = np.einsum("ij,ij->i", apart, apart)
            alike = np.full(len(at), deviations[COARSE])
            for p in range(COARSE + 1, len(PARTS)):
                if PARTS[p].octaves is None:
                    alike += deviations[p] * (self._values[p][a] == self._values[p][b])
                else:
                    alike += deviations[p] * PARTS[p].alike(squares)
            alike *= 2 * nominal[at + d] * nominal[at]
            out += np.bincount(at // numbers.shape[1], alike, n)
        return out


def _split(piece: Signature) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The parts of each row of ``piece``; one is enough where all of a form have one place."""
    return (BUT_PLACE, BY_PLACE) if piece.place else (ALL, ())

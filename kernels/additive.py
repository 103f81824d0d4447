"""A Gaussian process whose every observation is a sum: of the times of pieces of work.

Nobody can time a kernel where it stands in a network; what can be timed is a whole network, the sum
of its kernels' times. Sums are all that a Gaussian process needs (Rasmussen & Williams 2006, 9.8:
linear functionals of a process are jointly Gaussian with it), so the time of each piece is learned
from networks that share pieces, together with how sure it is.

The time of a piece is its nominal time x a factor. A factor is itself a sum of independent parts:
one that all pieces share, one for each kind, form and place of a signature, parts that change
smoothly with the sizes within a form, and one for each size alone (an additive kernel, Duvenaud et
al. 2011). So covariances of sums are sums over parts, each computed on the few values that it
tells apart.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse  # type: ignore[import-untyped]
from scipy.linalg import cho_solve, cholesky, solve_triangular  # type: ignore[import-untyped]
from scipy.spatial.distance import cdist  # type: ignore[import-untyped]

from .signature import Signature, nominal_ms

Array = NDArray[np.float64]
Counts = Mapping[Signature, int]

BLOCK = 16  # channels are worked on in blocks of up to so many; what is over costs a whole one
FIT_ON = 400  # observations at most that the deviations are fitted on
LEAST, MOST = np.log(1e-3), np.log(10.0)  # of the standard deviation of a part


@dataclass(frozen=True)
class Part:
    """One part of a factor. key: what tells its values apart. octaves: over how many octaves of the
    sizes a value changes (None: values are independent). start: its standard deviation, before
    that is fitted."""

    key: Callable[[Signature], Hashable]
    start: float
    octaves: float | None = None


def _form(s: Signature) -> Hashable:
    return s.kind, s.form


def _sizes(s: Signature) -> Hashable:
    return s.kind, s.form, s.sizes


PARTS = (
    Part(lambda _: None, 1.0),
    Part(lambda s: s.kind, 0.7),
    Part(_form, 0.7),
    Part(lambda s: (s.kind, s.form, s.place), 0.3),
    Part(_sizes, 0.3, octaves=2.0),
    Part(_sizes, 0.2, octaves=0.7),
    Part(_sizes, 0.05),
)
NOISE = 0.01  # relative to a sum, before it is fitted


class _Table:
    """The values that a part takes in the sums of one set of observations."""

    def __init__(self, part: Part, sums: Sequence[Counts]) -> None:
        self.part = part
        index: dict[Hashable, int] = {}
        self.examples: list[Signature] = []
        rows, columns, weights = [], [], []
        for row, counts in enumerate(sums):
            for s, count in counts.items():
                key = part.key(s)
                if key not in index:
                    index[key] = len(index)
                    self.examples.append(s)
                rows.append(row)
                columns.append(index[key])
                weights.append(count * s.nominal_ms)
        self.index = index
        shape = (len(sums), len(index))
        self.weights = sparse.csr_array((weights, (rows, columns)), shape=shape)

    @cached_property
    def forms(self) -> dict[Hashable, NDArray[np.int64]]:
        """The columns of each form."""
        out: dict[Hashable, list[int]] = {}
        for column, s in enumerate(self.examples):
            out.setdefault(_form(s), []).append(column)
        return {form: np.array(columns) for form, columns in out.items()}

    @cached_property
    def places(self) -> Array:
        """[columns, 5]: where each value lies: sizes in octaves, what is over of their blocks."""
        out = np.zeros((len(self.examples), 5))
        for row, s in enumerate(self.examples):
            out[row, : len(s.sizes)] = np.log2(s.sizes)
            over = [size % BLOCK / BLOCK for size in s.sizes[:2]]
            out[row, 3 : 3 + len(over)] = over
        return out

    def columns(self, columns: NDArray[np.int64]) -> Array:
        """Of every sum the weights of ``columns``, dense."""
        dense: Array = self.weights[:, columns].toarray()
        return dense

    def covariance(self, other: "_Table") -> Array:
        """Between every sum of this table and of ``other``, for a standard deviation of 1."""
        out = np.zeros((self.weights.shape[0], other.weights.shape[0]))
        if self.part.octaves is None:
            common = [key for key in self.index if key in other.index]
            mine = [self.index[key] for key in common]
            theirs = [other.index[key] for key in common]
            out += self.weights[:, mine] @ other.weights[:, theirs].T
            return out
        for form, columns in self.forms.items():
            if form in other.forms:
                others = other.forms[form]
                alike = _alike(self.places[columns], other.places[others], self.part.octaves)
                out += self.columns(columns) @ alike @ other.columns(others).T
        return out

    def variance(self) -> Array:
        """Of every sum, for a standard deviation of 1."""
        out = np.zeros(self.weights.shape[0])
        if self.part.octaves is None:
            out += self.weights.power(2).sum(axis=1)
            return out
        for columns in self.forms.values():
            alike = _alike(self.places[columns], self.places[columns], self.part.octaves)
            dense = self.columns(columns)
            out += ((dense @ alike) * dense).sum(1)
        return out


def _alike(a: Array, b: Array, octaves: float) -> Array:
    """Gaussian correlation of values at ``a`` and ``b``. A whole block more or less, which is 1 in
    ``places``, counts as two octaves."""
    scale = octaves * np.array([1, 1, 1, 0.5, 0.5])
    correlation: Array = np.exp(-0.5 * cdist(a / scale, b / scale, "sqeuclidean"))
    return correlation


class AdditiveProcess:
    """Learns from sums and the times they took.

    Times are divided by those observed, so that every observation counts by its relative error.
    """

    def __init__(self, sums: Sequence[Counts], ms: Sequence[float]) -> None:
        self.ms = checked(sums, ms)
        # How fast the device is beside the nominal one: parts are deviations around that.
        self._pace = float(np.median(self.ms / [nominal_ms(counts) for counts in sums]))
        self._units = self.ms / self._pace
        self._tables = [_Table(part, sums) for part in PARTS]
        over = np.outer(self._units, self._units)
        parts = np.stack([t.covariance(t) / over for t in self._tables])
        some = np.linspace(0, len(ms) - 1, min(len(ms), FIT_ON)).astype(int)
        start = np.array([*(part.start for part in PARTS), NOISE])
        self.deviations, self.noise = fitted(parts[:, some][:, :, some], start)
        self._root = root_of(parts, self.deviations, self.noise)
        self._solved: Array = cho_solve((self._root, True), np.ones(len(ms)))

    def predict(self, sums: Sequence[Counts]) -> tuple[Array, Array]:
        """The time of each sum in ms, and the standard deviation of what would be measured."""
        cross = np.zeros((len(sums), len(self.ms)))
        variance = np.zeros(len(sums))
        for deviation, known, part in zip(self.deviations, self._tables, PARTS, strict=True):
            table = _Table(part, sums)
            cross += deviation**2 * table.covariance(known)
            variance += deviation**2 * table.variance()
        cross /= self._units
        mean = cross @ self._solved
        rest = solve_triangular(self._root, cross.T, lower=True)
        variance = np.maximum(variance - (rest**2).sum(0), 0) + (self.noise * mean) ** 2
        return self._pace * mean, self._pace * np.sqrt(variance)

    def left_out(self, groups: Sequence[Hashable]) -> tuple[Array, Array]:
        """Each observation as those of other groups predict it, with the same deviations: time in
        ms and standard deviation (Rasmussen & Williams 2006, 5.4.2, for blocks)."""
        inverse = cho_solve((self._root, True), np.eye(len(self.ms)))
        mean, variance = np.empty(len(self.ms)), np.empty(len(self.ms))
        for group in dict.fromkeys(groups):
            at = np.array([i for i, g in enumerate(groups) if g == group])
            block = np.linalg.inv(inverse[np.ix_(at, at)])
            mean[at], variance[at] = 1 - block @ self._solved[at], np.diag(block)
        return mean * self.ms, np.sqrt(variance) * self.ms


def checked(sums: Sequence[Counts], ms: Sequence[float]) -> Array:
    """The times. Raises ValueError unless there is one above 0 for each sum."""
    if len(sums) != len(ms) or not sums:
        raise ValueError(f"one time for each sum is needed, but got {len(sums)} and {len(ms)}")
    times = np.asarray(ms, float)
    if not (np.isfinite(times) & (times > 0)).all():
        raise ValueError("times must be above 0")
    return times


def root_of(parts: Array, deviations: Array, noise: float, known: Array | float = 0.0) -> Array:
    """The Cholesky root of the covariance of observations, which are all 1 (the time over itself)
    and have independent ``noise``. known: covariance besides that of the parts."""
    total = np.tensordot(deviations**2, parts, 1) + known
    total[np.diag_indices_from(total)] += noise**2
    root: Array = cholesky(total, lower=True)
    return root


def fitted(
    parts: Array,
    start: Array,
    trust: Array | float = 0.0,
    mean: Array | float = 0.0,
    known: Array | float = 0.0,
) -> tuple[Array, float]:
    """Standard deviations of the parts and the noise, by maximum marginal likelihood.

    parts: [parts, observations, observations], the covariance of each for a deviation of 1. start:
    [parts + 1], the deviations and the noise to begin with. trust: how surely they are expected to
    be about that: 1 is a factor of e, as a standard deviation, 4 of half as much. mean, known: what
    is expected of the observations, and how that covaries, besides the parts.
    """
    n = parts.shape[1]
    target = np.ones(n) - mean
    begin = np.log(start)

    def loss(logs: Array) -> tuple[float, Array]:
        deviations, noise = np.exp(logs[:-1]), float(np.exp(logs[-1]))
        root = root_of(parts, deviations, noise, known)
        solved = cho_solve((root, True), target)
        value = 0.5 * target @ solved + np.log(np.diag(root)).sum()
        outer = cho_solve((root, True), np.eye(n)) - np.outer(solved, solved)
        slopes = np.array(
            [*(deviations**2 * np.tensordot(parts, outer, 2)), noise**2 * np.trace(outer)]
        )
        off = trust * (logs - begin)
        return value + 0.5 * off @ (logs - begin), slopes + off

    found = optimize.minimize(
        loss, begin, jac=True, method="L-BFGS-B",
        bounds=[(LEAST, MOST)] * len(start), options={"maxiter": 60},
    ).x  # fmt: skip
    return np.exp(found[:-1]), float(np.exp(found[-1]))

"""A Gaussian process whose every observation is a sum: of the times of pieces of work.

Nobody can time a kernel where it stands in a network; what can be timed is a whole network, the sum
of its kernels' times. Sums are all that a Gaussian process needs (Rasmussen & Williams 2006, 9.8:
linear functionals of a process are jointly Gaussian with it), so the time of each piece is learned
from networks that share pieces, together with how sure it is.

The time of a piece is its nominal time x a factor. A factor is itself a sum of independent parts:
one that all pieces share, one for each kind, form and place of a signature, one for channels in
multiples of 4 and others, parts that change smoothly with the sizes within a form, and one for each
size alone (an additive kernel, Duvenaud et al. 2011). So covariances of sums are sums over parts,
each computed on the few values that it tells apart.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse  # type: ignore[import-untyped]
from scipy.linalg import cho_solve, cholesky, solve_triangular  # type: ignore[import-untyped]
from scipy.spatial.distance import cdist  # type: ignore[import-untyped]

from .signature import Signature, nominal_ms

Array = NDArray[np.float64]
Counts = Mapping[Signature, int]

BLOCK = 16  # channels are worked on in blocks of up to so many; the last is filled up
LANES = 4  # of channels in other multiples ONNX Runtime makes no blocks
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

    def alike(self, squares: Array) -> Array:
        """Gaussian correlation of values at ``places`` that are so far apart, squared."""
        assert self.octaves is not None
        correlation: Array = np.exp(squares * (-0.5 / self.octaves**2))
        return correlation


def _form(s: Signature) -> Hashable:
    return s.kind, s.form


def _lanes(s: Signature) -> Hashable:
    return s.kind, s.form, tuple(size % LANES == 0 for size in s.sizes[:2])


def _sizes(s: Signature) -> Hashable:
    return s.kind, s.form, s.sizes


PLACE = Part(lambda s: (s.kind, s.form, s.place), 0.3)
PARTS = (
    Part(lambda _: None, 1.0),
    Part(lambda s: s.kind, 0.7),
    Part(_form, 0.7),
    PLACE,
    Part(_lanes, 0.2),
    Part(_sizes, 0.3, octaves=2.0),
    Part(_sizes, 0.2, octaves=0.7),
    Part(_sizes, 0.05),
)
NOISE = 0.01  # relative to a sum, before it is fitted


def places(pieces: Sequence[Signature]) -> Array:
    """[pieces, 5]: where each lies: its sizes in octaves, and what of their last blocks is filled
    up, so that a whole block more or less counts as two octaves."""
    out = np.zeros((len(pieces), 5))
    for row, s in zip(out, pieces, strict=True):
        row[: len(s.sizes)] = np.log2(s.sizes)
        filled = [2 * (-size % BLOCK) / BLOCK for size in s.sizes[:2]]
        row[3 : 3 + len(filled)] = filled
    return out


class _Table:
    """The values that a part takes in the sums of one set of observations."""

    def __init__(self, part: Part, sums: Sequence[Counts]) -> None:
        self.part = part
        self.index: dict[Hashable, int] = {}
        examples: list[Signature] = []
        rows, columns, weights = [], [], []
        for row, counts in enumerate(sums):
            for s, count in counts.items():
                key = part.key(s)
                if key not in self.index:
                    self.index[key] = len(self.index)
                    examples.append(s)
                rows.append(row)
                columns.append(self.index[key])
                weights.append(count * s.nominal_ms)
        shape = (len(sums), len(self.index))
        self.weights = sparse.csc_array((weights, (rows, columns)), shape=shape)
        self._places = places(examples)
        self._forms = _by_form(examples)  # columns

    def covariance(self) -> Array:
        """Between every two sums, for a standard deviation of 1."""
        if self.part.octaves is None:
            out: Array = (self.weights @ self.weights.T).toarray()
            return out
        out = np.zeros((self.weights.shape[0],) * 2)
        for columns in self._forms.values():
            dense = self.weights[:, columns].toarray()
            out += dense @ self._alike(self._places[columns], columns) @ dense.T
        return out

    def variances(self) -> Array:
        """Of every sum: the diagonal of ``covariance``, without the rest of it."""
        out: Array = self.weights.power(2).sum(1)
        if self.part.octaves is None:
            return out
        # And every two values of one form: sorted by sum and form, they are d places apart.
        forms = np.zeros(len(self._places), np.int64)
        for number, columns in enumerate(self._forms.values()):
            forms[columns] = number
        found = self.weights.tocoo()
        group = found.row * len(self._forms) + forms[found.col]
        order = np.argsort(group)
        group, row, weight = group[order], found.row[order], found.data[order]
        at = self._places[found.col[order]]
        for d in range(1, len(group)):
            pair = np.flatnonzero(group[d:] == group[:-d])
            if not len(pair):
                break
            apart = at[pair + d] - at[pair]
            alike = self.part.alike(np.einsum("ij,ij->i", apart, apart))
            out += np.bincount(row[pair], 2 * weight[pair + d] * weight[pair] * alike, len(out))
        return out

    def rows(self, pieces: Sequence[Signature]) -> Array:
        """[pieces, sums]: the same between every piece, at a nominal time of 1, and every sum."""
        out = np.zeros((len(pieces), self.weights.shape[0]))
        if self.part.octaves is None:
            found = {i: self.index.get(self.part.key(s)) for i, s in enumerate(pieces)}
            known = {i: column for i, column in found.items() if column is not None}
            out[list(known)] = self.weights[:, list(known.values())].toarray().T
            return out
        for form, at in _by_form(pieces).items():
            if form in self._forms:
                columns = self._forms[form]
                alike = self._alike(places([pieces[i] for i in at]), columns)
                out[at] = (self.weights[:, columns].tocsr() @ alike.T).T
        return out

    def _alike(self, a: Array, columns: NDArray[np.int64]) -> Array:
        return self.part.alike(cdist(a, self._places[columns], "sqeuclidean"))


def _by_form(pieces: Sequence[Signature]) -> dict[Hashable, NDArray[np.int64]]:
    """The indices of the pieces of each form."""
    out: dict[Hashable, list[int]] = {}
    for i, s in enumerate(pieces):
        out.setdefault(_form(s), []).append(i)
    return {form: np.array(at) for form, at in out.items()}


class AdditiveProcess:
    """Learns from sums and the times they took; ``Pieces`` predict from it.

    Times are divided by those observed, so that every observation counts by its relative error.
    beside: for each what it was observed with: what is alike there has an error in common, that of
    the time whose multiples all are.
    """

    def __init__(
        self,
        sums: Sequence[Counts],
        ms: Sequence[float],
        beside: Sequence[Hashable] | None = None,
    ) -> None:
        self.ms = checked(sums, ms)
        # How fast the device is beside the nominal one: parts are deviations around that.
        self.pace = float(np.median(self.ms / [nominal_ms(counts) for counts in sums]))
        self._units = self.ms / self.pace
        self._tables = [_Table(part, sums) for part in PARTS]
        over = np.outer(self._units, self._units)
        common = [] if beside is None or len({*beside}) < 2 else [_apart(beside)]
        parts = np.stack([*(t.covariance() / over for t in self._tables), *common])
        some = np.linspace(0, len(ms) - 1, min(len(ms), FIT_ON)).astype(int)
        start = np.array([*(part.start for part in PARTS), *[NOISE for _ in common], NOISE])
        found, own = fitted(parts[:, some][:, :, some], start)
        self._root = root_of(parts, found, own)
        self.deviations = found[: len(PARTS)]
        self.common = float(found[-1]) if common else 0.0  # of the error in common
        self.noise = math.hypot(own, self.common)
        # The observations, which are all 1, whitened as ``rows`` are.
        self.white: Array = solve_triangular(self._root, np.ones(len(ms)), lower=True)

    def rows(self, pieces: Sequence[tuple[Signature, Sequence[int]]]) -> Array:
        """[pieces, observations]: the covariance of every piece, at a nominal time of 1, with the
        observations, as far as it comes from those of the ``PARTS`` that are named by their index;
        whitened: the inner product of two rows is what observing takes from their covariance, and
        that with ``white`` the mean (Rasmussen & Williams 2006, algorithm 2.1)."""
        out = np.zeros((len(pieces), len(self.ms)))
        for p, (table, deviation) in enumerate(zip(self._tables, self.deviations, strict=True)):
            at = [i for i, (_, parts) in enumerate(pieces) if p in parts]
            out[at] += deviation**2 * table.rows([pieces[i][0] for i in at])
        out /= self._units
        white: Array = solve_triangular(self._root, out.T, lower=True).T
        return white

    def predict(self, sums: Sequence[Counts]) -> tuple[Array, Array]:
        """The time of each sum in ms, and the standard deviation of what would be measured.
        (``AdditivePieces`` do the same for many sums of few pieces.)"""
        distinct = list(dict.fromkeys(s for counts in sums for s in counts))
        rows = self.rows([(s, range(len(PARTS))) for s in distinct])
        weights = np.array([[counts.get(s, 0) * s.nominal_ms for s in distinct] for counts in sums])
        added = weights @ rows
        mean = added @ self.white
        variance = sum(
            deviation**2 * _Table(part, sums).variances()
            for part, deviation in zip(PARTS, self.deviations, strict=True)
        )
        variance = np.maximum(variance - (added**2).sum(1), 0) + (self.noise * mean) ** 2
        return self.pace * mean, self.pace * np.sqrt(variance)

    def left_out(self, groups: Sequence[Hashable]) -> tuple[Array, Array]:
        """Each observation as those of other groups predict it, with the same deviations: time in
        ms and standard deviation (Rasmussen & Williams 2006, 5.4.2, for blocks)."""
        mean, deviation = left_out(self._root, np.ones(len(self.ms)), groups)
        return mean * self.ms, deviation * self.ms


def _apart(labels: Sequence[Hashable]) -> Array:
    """[labels, labels]: the covariance of errors, of deviation 1, of which there is one for each
    label, as far as they differ: what they have in common would explain observations of 1 as well
    as all the pieces do."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    each = np.array([numbers[label] for label in labels])
    same = np.equal.outer(each, each).astype(float)
    same -= same.mean(0)
    out: Array = same - same.mean(1, keepdims=True)
    return out


def left_out(root: Array, target: Array, groups: Sequence[Hashable]) -> tuple[Array, Array]:
    """Observations of 1 as those of other groups predict them, and the standard deviation.

    root: of their covariance. target: what of them the prior mean does not say.
    """
    inverse = cho_solve((root, True), np.eye(len(root)))
    solved = inverse @ target
    mean, variance = np.empty(len(root)), np.empty(len(root))
    for group in dict.fromkeys(groups):
        at = np.array([i for i, g in enumerate(groups) if g == group])
        block = np.linalg.inv(inverse[np.ix_(at, at)])
        mean[at], variance[at] = 1 - block @ solved[at], np.diag(block)
    return mean, np.sqrt(variance)


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

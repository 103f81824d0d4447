"""A device that is like another: learned from few networks where the other is known well.

What the other device takes is known of every piece of work (``additive``). On this one, the pieces
of a kind and of a form take so many times as long, and every kernel so much more or less to call:
a linear regression on what the kinds and forms of a network take on the other device, and on the
number of its kernels. There may be more of these factors than networks; so each has a prior, and is
near the same for all as long as nothing shows otherwise (Rasmussen & Williams 2006, 2.1).
"""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from scipy.linalg import cho_solve, solve_triangular  # type: ignore[import-untyped]

from .additive import AdditiveProcess, Array, Counts, checked, fitted, left_out, root_of
from .signature import Signature

# Standard deviations before they are fitted: of the factor of everything, of every kind and of
# every form, and of what a call takes, over what a kernel takes on average.
START = np.array([0.3, 0.2, 0.1, 0.15])
# How surely (``fitted``), and that the noise is the other device's: more surely, or what few
# networks do not explain would be taken for noise.
TRUST = np.array([1.0, 1.0, 1.0, 1.0, 4.0])
_NO_KERNEL = ("session", "handover")
_CALL = 3  # the group of what a call takes


class TransferredProcess:
    """Learns from sums and the times they took, and from ``like``, which knows another device.

    Times are divided by those observed, as there.
    """

    noise: float

    def __init__(
        self,
        sums: Sequence[Counts],
        ms: Sequence[float],
        like: "AdditiveProcess | TransferredProcess",
    ) -> None:
        self.ms = checked(sums, ms)
        self._like = like
        self._times: dict[Signature, float] = {}
        self._columns: dict[tuple[int, Hashable], int] = {}
        mean, variance = self._there(sums)
        self._pace = float(np.median(self.ms / mean))
        units = self.ms / self._pace
        kernels = sum(n for counts in sums for s, n in counts.items() if s.kind not in _NO_KERNEL)
        self._call_ms = float(mean.sum()) / max(kernels, 1)
        self._known = self._features(sums) / units[:, None]
        groups = self._groups()
        each = (self._known[:, groups == g] for g in range(len(START)))
        parts = np.stack([columns @ columns.T for columns in each])
        expected, uncertain = mean / units, np.diag(variance / units**2)
        start = np.array([*START, like.noise])
        self.deviations, self.noise = fitted(parts, start, TRUST, expected, uncertain)
        self._root = root_of(parts, self.deviations, self.noise, uncertain)
        self._target = 1 - expected
        self._solved: Array = cho_solve((self._root, True), self._target)

    def predict(self, sums: Sequence[Counts]) -> tuple[Array, Array]:
        """The time of each sum in ms, and the standard deviation of what would be measured."""
        mean, variance = self._there(sums)
        features = self._features(sums)
        scaled = features * self.deviations[self._groups()]
        known = self._known.shape[1]  # the other columns, of forms never timed here, are behind
        cross = scaled[:, :known] * self.deviations[self._groups()[:known]] @ self._known.T
        mean += cross @ self._solved
        rest = solve_triangular(self._root, cross.T, lower=True)
        variance += np.maximum((scaled**2).sum(1) - (rest**2).sum(0), 0) + (self.noise * mean) ** 2
        return self._pace * mean, self._pace * np.sqrt(variance)

    def left_out(self, groups: Sequence[Hashable]) -> tuple[Array, Array]:
        """As ``AdditiveProcess.left_out``."""
        mean, deviation = left_out(self._root, self._target, groups)
        return mean * self.ms, deviation * self.ms

    def _there(self, sums: Sequence[Counts]) -> tuple[Array, Array]:
        """What each sum takes on the other device, and the variance of that without noise."""
        mean, deviation = self._like.predict(sums)
        return mean, np.maximum(deviation**2 - (self._like.noise * mean) ** 2, 0)

    def _features(self, sums: Sequence[Counts]) -> Array:
        """[sums, columns]: how much of each sum is each value of each group."""
        new = list({s: None for counts in sums for s in counts if s not in self._times})
        if new:
            times, _ = self._like.predict([{s: 1} for s in new])
            self._times.update(zip(new, times.tolist(), strict=True))
        entries = []
        for row, counts in enumerate(sums):
            for s, n in counts.items():
                for key, share in self._shares(s):
                    column = self._columns.setdefault(key, len(self._columns))
                    entries.append((row, column, n * share))
        out = np.zeros((len(sums), len(self._columns)))
        for row, column, share in entries:
            out[row, column] += share
        return out

    def _shares(self, s: Signature) -> Iterator[tuple[tuple[int, Hashable], float]]:
        """How much of a piece is which value of which group of ``START``."""
        for group, value in enumerate((None, s.kind, (s.kind, s.form))):
            yield (group, value), self._times[s]
        if s.kind not in _NO_KERNEL:
            yield (_CALL, None), self._call_ms

    def _groups(self) -> Array:
        """[columns]: the group of each."""
        return np.array([group for group, _ in self._columns])

"""A device that is like another: learned from few sums where many are known of the other.

The factors of pieces (``additive``) on the second device are those on the first plus a difference,
itself a process of the same parts, every deviation of it ``apart`` times as large (autoregressive
co-kriging, Kennedy & O'Hagan 2000; as all parts are scaled alike it is also the intrinsic model of
coregionalization, with one correlation). So what holds on both devices is taken from the first, and
differences are looked for where factors differ anyhow: first in the speed of all, then in kinds and
forms of work, last in single sizes.
"""

from collections.abc import Sequence

import numpy as np
from scipy.linalg import solve_triangular  # type: ignore[import-untyped]

from .additive import (
    FIT_ON,
    PARTS,
    AdditiveProcess,
    Counts,
    Table,
    checked,
    cholesky_root,
    fitted,
)

APART = 0.3  # before it is fitted
TRUST = 1.0  # in that, and in the other device's noise: one deviation is a factor of e


class TransferredProcess(AdditiveProcess):
    """Learns from sums and the times they took, and from the process of another device."""

    def __init__(self, sums: Sequence[Counts], ms: Sequence[float], like: AdditiveProcess) -> None:
        self.sums, self.ms = [*like.sums, *sums], checked(sums, ms)
        self.pace = like.pace * float(np.median(self.ms / like.predict(sums)[0]))
        own = self.ms / self.pace
        self._tables = [Table(part, self.sums) for part in PARTS]
        n = len(own)
        both = sum(
            d**2 * t.covariance() for d, t in zip(like.deviations, self._tables, strict=True)
        )
        cross = both[:-n, -n:] / np.outer(like._units, own)
        total = both[-n:, -n:] / np.outer(own, own)
        # What the other device says of these sums, if they took as long there.
        below = solve_triangular(like._root, cross, lower=True)
        mean, rest = below.T @ like.white, total - below.T @ below
        some = np.linspace(0, len(own) - 1, min(len(own), FIT_ON)).astype(int)
        at = np.ix_(some, some)
        (self.apart,), self.noise = fitted(
            total[at][None], np.log([APART, like.noise]), TRUST, mean[some], rest[at]
        )
        # Both together, scaled as the second: of what the first shows, 1 / scale^2 is shared.
        scale = np.sqrt(1 + self.apart**2)
        self.deviations = scale * like.deviations
        self._units = np.concatenate([scale**2 * like._units, own])
        corner = cholesky_root(total[None], np.array([self.apart]), self.noise, rest)
        self._root = np.block([[like._root, np.zeros_like(cross)], [below.T, corner]])
        self.white = solve_triangular(self._root, np.ones(len(self.sums)), lower=True)

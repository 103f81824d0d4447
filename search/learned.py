"""What single choices harm once a network is trained: the sensitivity table for the prior, the
results of trials for the evidence."""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import optimize  # type: ignore[import-untyped]

from .solver import Point

Floats = NDArray[np.float64]

# Standard deviations of what is believed before any result. Of the logarithm of a choice's harm
# once the network is trained, over what the table says of it untrained:
DOUBT = 0.7
STRAIGHT = 0.5  # of the power of a rung, which is 1 if training helps all policies alike
SETTING = 0.3  # of the logarithm of what a setting does to the loss
SCALE = 3.0  # of the logarithm of a rung's scale
NOISE = 0.15  # of the logarithm of a loss around all that
NEWEST = 256  # results of a rung that count: the time to learn stays flat
LEAST = 1e-6  # KL in nats: policies that harm nothing have a logarithm too


@dataclass
class LearnedHarms:
    """The axes of one student: the harms of their choices, doubted less with each result.

    A loss (KL to the teacher) at a rung r is taken for

        log loss = a_r + p_r log(base + sum_j m_j h_j) + w_r . s

    with h_j what the table says of the choice on axis j, m_j what training makes of it, the same at
    every rung (log-normal), and s the settings that are no axes (distillation and so on). The most
    probable values are found by least squares, the doubt that remains is taken for Gaussian around
    them (Laplace's approximation).

    harms: of each axis, of each of its choices, KL in nats. base: of the student as it is.
    """

    harms: Sequence[Floats]
    base: float
    _told: dict[str, deque[tuple[Floats, Floats, float]]] = field(default_factory=dict, init=False)
    _found: Floats | None = field(default=None, init=False)

    def tell(self, rung: str, point: Point, settings: Floats, loss: float) -> None:
        """The result of a trained policy: its choices, its settings [s], its loss."""
        chosen = np.array([h[i] for h, i in zip(self.harms, point, strict=True)])
        known = self._told.setdefault(rung, deque(maxlen=NEWEST))
        known.append((chosen, settings, np.log(max(loss, LEAST))))

    def rungs(self) -> set[str]:
        """Those of which there are results."""
        return {*self._told}

    def draw(self, rng: random.Random, rung: str | None = None) -> "Drawn":
        """The harms as they might be, given the results: at random, as probable as they are; and
        what they would come to at ``rung``, without one untrained."""
        axes, told = len(self.harms), sorted(self._told)
        at = self._drawn(rng, told)
        factors = np.exp(at[:axes])
        harms = [h * factor for h, factor in zip(self.harms, factors, strict=True)]
        scale, power = 0.0, 1.0
        if rung in told:
            begin = axes + (len(at) - axes) // len(told) * told.index(rung)
            scale, power = at[begin], at[begin + 1]
        elif rung is not None:
            scale, power = rng.gauss(0, SCALE), rng.gauss(1, STRAIGHT)
        return Drawn(harms, max(self.base, LEAST), scale, power)

    def _drawn(self, rng: random.Random, told: Sequence[str]) -> Floats:
        """The parameters of the model of the rungs ``told``, drawn; of none, log m [axes]."""
        if not told:
            return DOUBT * np.array([rng.gauss(0, 1) for _ in self.harms])
        rungs = [tuple(map(np.array, zip(*self._told[r], strict=True))) for r in told]
        model = HarmModel(self.base, rungs)
        start = self._found
        if start is None or len(start) != model.size:
            start = model.prior()
        self._found = optimize.least_squares(model.misfit, start, model.slopes, method="lm").x
        slopes = model.slopes(self._found)
        doubt = np.linalg.cholesky(slopes.T @ slopes).T  # its square is the precision
        drawn = np.array([rng.gauss(0, 1) for _ in range(model.size)])
        found: Floats = self._found + np.linalg.solve(doubt, drawn)
        return found


@dataclass(frozen=True)
class Drawn:
    """Harms of each axis, of each of its choices, and a loss as ``LearnedHarms`` has it."""

    harms: Sequence[Floats]
    base: float
    scale: float
    power: float

    def log_loss(self, harm: float) -> float:
        """Of a policy whose choices harm so much in sum, its settings being the middle ones."""
        return self.scale + self.power * float(np.log(self.base + harm))


class HarmModel:
    """The misfit of all parameters, in standard deviations: log m [axes], then of each rung a, p
    and w. rungs: of each the harms chosen [n, axes], the settings [n, s], the log losses [n].
    doubt: the prior's standard deviation of log m."""

    def __init__(
        self, base: float, rungs: Sequence[tuple[Floats, ...]], doubt: float = DOUBT
    ) -> None:
        self._base, self._rungs = max(base, LEAST), rungs
        self._axes, self._each = rungs[0][0].shape[1], 2 + rungs[0][1].shape[1]
        self.size = self._axes + self._each * len(rungs)
        of_rung = [SCALE, STRAIGHT, *[SETTING] * (self._each - 2)]
        self._deviations = np.array([doubt] * self._axes + of_rung * len(rungs))

    def prior(self) -> Floats:
        out = np.zeros(self.size)
        out[self._axes + 1 :: self._each] = 1.0
        return out

    def misfit(self, at: Floats) -> Floats:
        parts = [(at - self.prior()) / self._deviations]
        for k, (chosen, settings, losses) in enumerate(self._rungs):
            parts.append((self.predict(at, k, chosen, settings) - losses) / NOISE)
        return np.concatenate(parts)

    def predict(self, at: Floats, rung: int, chosen: Floats, settings: Floats) -> Floats:
        """The log loss at the ``rung``-th rung, of one policy or of many."""
        begin = self._axes + rung * self._each
        weights = at[begin + 2 : begin + self._each]
        total = np.log(self._base + chosen @ np.exp(at[: self._axes]))
        found: Floats = at[begin] + at[begin + 1] * total + settings @ weights
        return found

    def slopes(self, at: Floats) -> Floats:
        parts = [np.diag(1 / self._deviations)]
        for k, (chosen, settings, _) in enumerate(self._rungs):
            shares = chosen * np.exp(at[: self._axes])
            total = self._base + shares.sum(1)
            part = np.zeros((len(chosen), self.size))
            begin = self._axes + k * self._each
            part[:, : self._axes] = at[begin + 1] * shares / total[:, None]
            part[:, begin] = 1.0
            part[:, begin + 1] = np.log(total)
            part[:, begin + 2 : begin + self._each] = settings
            parts.append(part / NOISE)
        return np.concatenate(parts)

"""The warm start: policies of the least predicted harm, for a sweep of limits."""

import math
import random
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spaces import Parameter, Policy, Space
from .batch import BatchPredictor
from .limits import Limits
from .sensitivity import Sensitivity
from .solver import Point, Solver

KEEPS = (1.0, 0.5, 0.25)  # shares of channels kept by the recipes that the solver starts from
# Of the way, in octaves, from the limit to the fastest policy: what lies beyond has lost too much.
DEPTH = 0.75
# How far the harm of a choice, once the network is trained, may be off that of the table: the
# standard deviation of its logarithm.
DOUBT = 0.7


class WarmStart:
    """Solves for policies of each student, from the latency limit (or the teacher's latency) down.

    settings: those with which the table was judged. The upper end of a predicted interval counts,
    as everywhere where a limit is kept.
    """

    def __init__(
        self,
        space: Space,
        table: Sensitivity,
        predictor: BatchPredictor,
        limits: Limits,
        teacher_ms: float,
    ) -> None:
        self.settings = dict(table.settings)
        slowest = limits.latency_ms or teacher_ms
        self._students = [
            _Student(name, space, table, predictor, slowest) for name in table.students
        ]
        self._space = space

    def sweep(self, count: int, seconds: float = math.inf) -> list[Policy]:
        """``count`` policies of each student, fewer if ``seconds`` are over: at the limit first,
        then far apart, then between."""
        each = seconds / len(self._students)
        found = [student.sweep(count, each) for student in self._students]
        ordered = [values for some in zip(*found, strict=False) for values in some]
        rest = [values for some in found for values in some]
        policies = [self._space.policy({**self.settings, **v}) for v in (*ordered, *rest)]
        return list(dict.fromkeys(policies))

    def draw(self, rng: random.Random) -> dict[str, Any] | None:
        """The values of the axes of one more, for a limit at random and as the table might have
        been: Thompson sampling (Thompson 1933) with what the table says for the prior."""
        return rng.choice(self._students).draw(rng)


class _Student:
    """The same for one student: its axes, and the points that were solved for."""

    def __init__(
        self,
        name: str,
        space: Space,
        table: Sensitivity,
        predictor: BatchPredictor,
        slowest_ms: float,
    ) -> None:
        self._space, self._predictor = space, predictor
        self._places = [j for j, axis in enumerate(space.axes) if _judged(axis, name)]
        axes = [space.axes[j] for j in self._places]
        self._rest = np.array(space.point(space.policy({"student": name})))
        self._harms = [np.array(table.of(axis)) for axis in axes]
        self._ordered = [axis.name.startswith("width/") for axis in axes]
        precisions = space.settings.precisions
        self._whole = [self._point(space.uniform(1.0, p, name)) for p in precisions]
        self._recipes = [
            self._point(space.uniform(keep, p, name)) for keep in KEEPS for p in precisions
        ]
        smallest = np.array([self._point(space.smallest(p, name)) for p in precisions])
        self._slowest = slowest_ms
        self._fastest = float(min(*self._latency(smallest), slowest_ms))
        self._solved: list[tuple[float, Point]] = []

    def sweep(self, count: int, seconds: float) -> list[dict[str, Any]]:
        ends, starts = time.monotonic() + seconds, self._recipes
        for step in range(count if self._places else 0):  # without axes there is nothing to solve
            if time.monotonic() > ends:
                break
            limit = self._limit(step / max(1, count - 1))
            found = self._solver(self._harms).solve(limit, starts)
            if found is not None:
                self._solved.append((limit, found))
                starts = [found, *self._whole]
        solved = [self._values(point) for _, point in self._solved]
        return [solved[i] for i in coarse_first(len(solved))]

    def draw(self, rng: random.Random) -> dict[str, Any] | None:
        if not self._places:
            return None
        limit = self._limit(rng.random())
        near = sorted(self._solved, key=lambda known: abs(math.log(known[0] / limit)))
        starts = [point for _, point in near[:1]] or self._recipes
        doubted = [h * math.exp(rng.gauss(0, DOUBT)) for h in self._harms]
        found = self._solver(doubted).solve(limit, starts)
        return None if found is None else self._values(found)

    def _limit(self, way: float) -> float:
        """The latency so far of the way from the slowest that is wanted, in octaves."""
        return float(self._slowest * (self._fastest / self._slowest) ** (DEPTH * way))

    def _solver(self, harms: list[NDArray[np.float64]]) -> Solver:
        return Solver(harms, self._latency, self._ordered)

    def _latency(self, points: NDArray[np.int64]) -> NDArray[np.float64]:
        rows = np.repeat(self._rest[None], len(points), 0)
        rows[:, self._places] = points
        return self._predictor.predict(rows)[:, 2]

    def _point(self, policy: Policy) -> Point:
        return np.array(self._space.point(policy))[self._places]

    def _values(self, point: Point) -> dict[str, Any]:
        whole = self._rest.copy()
        whole[self._places] = point
        return self._space.values_at(whole)


def coarse_first(count: int) -> list[int]:
    """0 to ``count`` - 1: the ends, then the middle, then the quarters, and so on."""
    out, gaps = [*range(count)][:1] + [*range(1, count)][-1:], [(0, count - 1)]
    for low, high in gaps:
        middle = (low + high) // 2
        if low < middle < high:
            out.append(middle)
            gaps += (low, middle), (middle, high)
    return out


def _judged(axis: Parameter, student: str) -> bool:
    """Whether the table says what the choices of ``axis`` harm ``student``."""
    return axis.name != "student" and axis.student in ("", student)

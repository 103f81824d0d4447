"""The warm start: policies of the least predicted harm, for a sweep of limits; and those that
follow, solved for with what the results have taught."""

import math
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..compressors import RUNGS
from ..spaces import Parameter, Policy, Space
from .batch import BatchPredictor
from .learned import LearnedHarms
from .limits import Limits
from .sensitivity import Sensitivity
from .sizes import Sizes
from .solver import SECONDS, Point, Solver

KEEPS = (1.0, 0.5, 0.25)  # shares of channels kept by the recipes that the solver starts from
# Of the way, in octaves, from the limit to the fastest policy: what lies beyond may have lost too
# much. So it is until trials finished.
DEPTH = 0.75
# Octaves that are looked at beyond the fastest finished policy that keeps the limits.
BEYOND = 0.25
# Octaves that are looked at in any case: what lies at the very limit may be all that finished.
NEAR = BEYOND / 2


class WarmStart:
    """Solves for policies of each student, from the latency limit down; without one, from the
    latency of the student at full width in its fastest precision. Where sizes are limited all are
    within, as far as ``sizes`` knows them.

    settings: those with which the table was judged. The upper end of a predicted interval counts,
    as everywhere where a limit is kept.
    """

    def __init__(
        self,
        space: Space,
        table: Sensitivity,
        predictor: BatchPredictor,
        limits: Limits,
        sizes: Sizes | None = None,
    ) -> None:
        self.settings = dict(table.settings)
        self._students = {
            name: _Student(name, space, table, predictor, limits.latency_ms, sizes)
            for name in table.students
        }
        self._space = space
        self._fast = limits.max_drop is not None  # then the fastest that keeps it is the best
        self._late_s: float | None = None  # that the sweep took, if it was cut
        self._finished: list[tuple[float, bool]] = []  # latency, and whether the limits are kept

    def fastest_ms(self) -> tuple[float, float, float] | None:
        """The predicted latency of the fastest policy that is found: lower end, middle and upper
        end. None where none is within the limits of sizes, or where a student is not known: it may
        be faster."""
        if set(self._students) != set(self._space.networks):
            return None
        ends = [student.fastest_ms for student in self._students.values()]
        low, middle, high = min(ends, key=lambda found: float(found[0])).tolist()
        return (low, middle, high) if math.isfinite(low) else None

    def note(self) -> str | None:
        """What the clock decided, so that a search with the same seed may find other policies."""
        told, cut = [], sum(student.cut for student in self._students.values())
        if self._late_s is not None:
            told.append(f"the sweep of the warm start was cut after {self._late_s:.0f} s")
        if cut:
            told.append(f"{cut} solutions of the solver are the best of {SECONDS:.0f} s")
        return f"The clock decided: {'; '.join(told)}" if told else None

    def sweep(self, count: int, seconds: float = math.inf) -> list[Policy]:
        """``count`` policies of each student, fewer if ``seconds`` are over: at the limit first,
        then far apart, then between."""
        began, each = time.monotonic(), seconds / len(self._students)
        found = [student.sweep(count, each) for student in self._students.values()]
        if any(student.late for student in self._students.values()):
            self._late_s = time.monotonic() - began
        ordered = [values for some in zip(*found, strict=False) for values in some]
        rest = [values for some in found for values in some]
        policies = [self._space.policy({**self.settings, **v}) for v in (*ordered, *rest)]
        return list(dict.fromkeys(policies))

    def draw(
        self, rng: random.Random, settings: Mapping[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """The values of the axes of one more, for a limit at random and with harms as they might
        be, given the table and the results: Thompson sampling (Thompson 1933). Of several students
        the one that so loses least within the limit, at the highest rung that all have reached:
        of another's the scale of one is a guess. Where there is none, as the harms have it.
        settings: what else the policy says; its sparsity decides how well it packs."""
        students = [*self._students.values()]
        limit = rng.choice(students).limit(rng, self._finished, self._fast)
        rungs = set.intersection(*(student.learned.rungs() for student in students))
        rung = max(rungs, key=RUNGS.index, default=None)
        sparsity = (self._space.defaults | dict(settings or {}))["sparsity"]
        found = [
            drawn for student in students if (drawn := student.draw(limit, rung, rng, sparsity))
        ]
        return min(found, key=lambda drawn: drawn[0])[1] if found else None

    def tell(self, policy: Policy, rung: str, loss: float, kept: bool) -> None:
        """A result, from which the next draws learn if the policy was trained: what choices harm
        untrained the table knows. kept: whether it keeps the limits."""
        student = self._students.get(policy.student)
        if student and rung != RUNGS[0] and self._space.contains(policy):
            student.tell(policy, rung, loss)
            if rung == RUNGS[-1]:
                self._finished.append((student.latency_ms(policy), kept))


class _Student:
    """The same for one student: its axes, and the points that were solved for."""

    def __init__(
        self,
        name: str,
        space: Space,
        table: Sensitivity,
        predictor: BatchPredictor,
        slowest_ms: float | None,
        sizes: Sizes | None,
    ) -> None:
        self._name, self._space, self._predictor, self._sizes = name, space, predictor, sizes
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
        self._slowest = slowest_ms or float(min(self._latency(np.array(self._whole))))
        self._sparsity = space.defaults["sparsity"]
        self.late = False  # whether the time for the sweep was over before all was solved for
        self.cut = 0  # knapsacks for which the time was over
        if sizes is not None:
            self._begin_within()
        # The smallest is not the fastest where narrow layers are slower in int8 than in float.
        smallest = [self._point(space.smallest(p, name)) for p in precisions]
        solver = self._solver(self._harms, self._sparsity)
        fastest = solver.fastest([*smallest, *self._recipes])
        self.fastest_ms = np.full(3, np.inf) if fastest is None else self._ends(fastest[None])[0]
        self._fastest = min(self._slowest, float(self.fastest_ms[2]))
        self._solved: list[tuple[float, Point]] = []
        self.learned = LearnedHarms(self._harms, table.students[name])

    def _begin_within(self) -> None:
        """Where sizes are limited, no more latency than they leave is wanted: that of the point of
        least harm, and the least zeros with which there is one."""
        others = set(self._space.settings.sparsity) - {self._sparsity}
        for sparsity in (self._sparsity, *sorted(others)):
            found = self._solver(self._harms, sparsity).solve(self._slowest, self._recipes)
            if found is not None:
                self._sparsity = sparsity
                self._slowest = float(self._latency(found[None])[0])
                self._recipes.append(found)
                return

    def sweep(self, count: int, seconds: float) -> list[dict[str, Any]]:
        ends, starts = time.monotonic() + seconds, self._recipes
        for step in range(count if self._places else 0):  # without axes there is nothing to solve
            if time.monotonic() > ends:
                self.late = True
                break
            limit = self._limit(DEPTH * step / max(1, count - 1))
            solver = self._solver(self._harms, self._sparsity)
            found = solver.solve(limit, starts)
            self.cut += solver.cut
            if found is not None:
                self._solved.append((limit, found))
                starts = [found, *self._whole]
        zeros = {"sparsity": self._sparsity}
        solved = [self._values(point) | zeros for _, point in self._solved]
        return [solved[i] for i in coarse_first(len(solved))]

    def draw(
        self, limit: float, rung: str | None, rng: random.Random, sparsity: float
    ) -> tuple[float, dict[str, Any]] | None:
        """What a point that is solved for would lose, as a logarithm, and its values."""
        if not self._places:
            return None
        drawn = self.learned.draw(rng, rung)
        near = sorted(self._solved, key=lambda known: abs(math.log(known[0] / limit)))
        starts = [point for _, point in near[:1]] or self._recipes
        solver = self._solver(drawn.harms, sparsity)
        found = solver.solve(limit, starts)
        self.cut += solver.cut
        return None if found is None else (drawn.log_loss(solver.harm(found)), self._values(found))

    def tell(self, policy: Policy, rung: str, loss: float) -> None:
        self.learned.tell(rung, self._point(policy), settings_of(self._space, policy), loss)

    def latency_ms(self, policy: Policy) -> float:
        return float(self._latency(self._point(policy)[None])[0])

    def limit(
        self, rng: random.Random, finished: Sequence[tuple[float, bool]], fast: bool
    ) -> float:
        """A latency at random, as far as is worth a look: a little farther than what was seen to
        keep the limits; not as far as what broke them, where nothing else is known. fast: every
        second is near that end, unless that is what broke them."""
        way = DEPTH
        octaves = math.log2(self._slowest / self._fastest)
        if octaves and finished:
            kept, broke = ([math.log2(self._slowest / ms) for ms, k in finished if k == which]
                           for which in (True, False))  # fmt: skip
            far = max(kept) + BEYOND if kept else min(broke)
            way = min(max(far, NEAR) / octaves, 1.0)
        fast = fast and (not finished or any(k for _, k in finished)) and rng.random() < 0.5
        near = max(way - BEYOND / octaves, 0.0) if octaves and fast else 0.0
        return self._limit(near + (way - near) * rng.random())

    def _limit(self, way: float) -> float:
        """The latency so far of the way from the slowest that is wanted, in octaves."""
        return float(self._slowest * (self._fastest / self._slowest) ** way)

    def _solver(self, harms: Sequence[NDArray[np.float64]], sparsity: float) -> Solver:
        sizes = self._sizes
        if sizes is None:
            return Solver(harms, self._latency, self._ordered)
        return Solver(
            harms, self._latency, self._ordered,
            lambda points: sizes.shares(self._rows(points), self._name, sparsity),
        )  # fmt: skip

    def _latency(self, points: NDArray[np.int64]) -> NDArray[np.float64]:
        return self._ends(points)[:, 2]

    def _ends(self, points: NDArray[np.int64]) -> NDArray[np.float64]:
        """[points, 3]: lower end, middle and upper end of the latency in ms."""
        return self._predictor.predict(self._rows(points))

    def _rows(self, points: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same with all axes of the space."""
        rows = np.repeat(self._rest[None], len(points), 0)
        rows[:, self._places] = points
        return rows

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


def settings_of(space: Space, policy: Policy) -> NDArray[np.float64]:
    """The settings of ``policy`` that are no axes: of a range where it is from -1 to 1, and the
    square of that; of a choice, for each but the first whether it is that."""
    values, axes = space.values(policy), {axis.name for axis in space.axes}
    out: list[float] = []
    for p in space.parameters:
        value = values.get(p.name)
        if p.name in axes or len(p.choices) == 1:
            continue
        if p.choices:
            out += [float(value == choice) for choice in p.choices[1:]]
        else:
            low, high, at = (
                math.log(v) if p.log else v for v in (p.low, p.high, value or p.default)
            )
            place = 2 * (at - low) / (high - low) - 1
            out += [place, place**2]
    return np.array(out)

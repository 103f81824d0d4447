"""The warm start: policies of the least predicted harm, for a sweep of limits."""

import numpy as np
from numpy.typing import NDArray

from ..spaces import Parameter, Policy, Space
from .batch import BatchPredictor
from .limits import Limits
from .sensitivity import Sensitivity
from .solver import Point, Solver

KEEPS = (1.0, 0.5, 0.25)  # shares of channels kept by the recipes that the solver starts from
# Of the way, in octaves, from the limit to the fastest policy: what lies beyond has lost too much.
DEPTH = 0.5


def warm_start(
    space: Space,
    table: Sensitivity,
    predictor: BatchPredictor,
    limits: Limits,
    teacher_ms: float,
    count: int,
) -> list[Policy]:
    """``count`` policies of each student, from the latency limit (or the teacher's latency) down.

    The upper end of a predicted interval counts, as everywhere where a limit is kept.
    """
    found = [
        _of_student(student, space, table, predictor, limits, teacher_ms, count)
        for student in table.students
    ]
    ordered = [policy for some in zip(*found, strict=False) for policy in some]
    rest = [policy for some in found for policy in some]
    return list(dict.fromkeys([*ordered, *rest]))


def _of_student(
    student: str,
    space: Space,
    table: Sensitivity,
    predictor: BatchPredictor,
    limits: Limits,
    teacher_ms: float,
    count: int,
) -> list[Policy]:
    places = [j for j, axis in enumerate(space.axes) if _judged(axis, student)]
    axes = [space.axes[j] for j in places]
    rest = np.array(space.point(space.policy({"student": student})))

    def latency(points: NDArray[np.int64]) -> NDArray[np.float64]:
        rows = np.repeat(rest[None], len(points), 0)
        rows[:, places] = points
        return predictor.predict(rows)[:, 2]

    def point(policy: Policy) -> Point:
        return np.array(space.point(policy))[places]

    def policy(point: Point) -> Policy:
        whole = rest.copy()
        whole[places] = point
        return space.policy({**table.settings, **space.values_at(whole)})

    solver = Solver(
        [np.array(table.of(axis)) for axis in axes],
        latency,
        [axis.name.startswith("width/") for axis in axes],
    )
    precisions = space.settings.precisions
    recipes = [point(space.uniform(keep, p, student)) for keep in KEEPS for p in precisions]
    starts = recipes
    fastest = min(latency(np.array([point(space.smallest(p, student)) for p in precisions])))
    slowest = limits.latency_ms or teacher_ms
    out: list[Policy] = []
    for step in range(count):
        limit = slowest * (fastest / slowest) ** (DEPTH * step / max(1, count - 1))
        found = solver.solve(limit, starts)
        if found is not None:
            out.append(policy(found))
            starts = [found, *recipes[: len(precisions)]]
    return out


def _judged(axis: Parameter, student: str) -> bool:
    """Whether the table says what the choices of ``axis`` harm ``student``."""
    return axis.name != "student" and axis.student in ("", student)

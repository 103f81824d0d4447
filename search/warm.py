"""The warm start: policies of the least predicted harm, for a sweep of limits."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spaces import Policy, Space
from .batch import BatchPredictor
from .limits import Limits
from .sensitivity import Sensitivity, axes_of
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
    axes = [axis for axis in axes_of(space) if axis.student in ("", student)]
    places = [predictor.axes.index(axis) for axis in axes]
    rest = np.array([axis.choices.index(axis.default) for axis in predictor.axes])
    if (names := [axis.name for axis in predictor.axes]).count("student"):
        at = names.index("student")
        rest[at] = predictor.axes[at].choices.index(student)

    def latency(points: NDArray[np.int64]) -> NDArray[np.float64]:
        rows = np.repeat(rest[None], len(points), 0)
        rows[:, places] = points
        return predictor.predict(rows)[:, 2]

    def point(policy: Policy) -> Point:
        values = space.values(policy)
        return np.array([a.choices.index(values.get(a.name, a.default)) for a in axes])

    def policy(point: Point) -> Policy:
        values: Mapping[str, Any] = {
            a.name: a.choices[i] for a, i in zip(axes, point.tolist(), strict=True)
        }
        return space.policy({**table.settings, **values, "student": student})

    solver = Solver(
        [np.array(table.of(axis)) for axis in axes],
        latency,
        [axis.name.startswith("width/") for axis in axes],
    )
    precisions = space.settings.precisions
    starts = [point(space.uniform(keep, p, student)) for keep in KEEPS for p in precisions]
    fastest = min(latency(np.array([point(space.smallest(p, student)) for p in precisions])))
    slowest = limits.latency_ms or teacher_ms
    out: list[Policy] = []
    for step in range(count):
        limit = slowest * (fastest / slowest) ** (DEPTH * step / max(1, count - 1))
        found = solver.solve(limit, starts)
        if found is not None:
            out.append(policy(found))
            starts = [found, *starts[:2]]
    return out

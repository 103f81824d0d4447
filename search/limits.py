"""The limits of a search, and what it means to keep them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# What the smallest policies of one precision take may still be more than the least: runtimes like
# some widths more than smaller ones, and a small layer takes fewer bytes in float.
NOT_LEAST = 1.15
COSTS = ("latency_ms", "size_bytes", "compressed_bytes")  # what is known before any training


@dataclass(frozen=True)
class Limits:
    """latency_ms: what a speed-up of the teacher comes to, or as given. None: no such limit."""

    teacher_metric: float
    latency_ms: float | None = None
    max_drop: float | None = None
    size_bytes: int | None = None
    compressed_bytes: int | None = None

    def cost(self, latency_ms: float, size_bytes: float, compressed_bytes: float) -> float:
        """How far latency and sizes are over their limits, as a share; <= 0 is within."""
        found = dict(zip(COSTS, (latency_ms, size_bytes, compressed_bytes), strict=True))
        return max((found[n] / most - 1 for n, most in self.costs().items()), default=-1.0)

    def out_of_reach(self, cases: Iterable[Mapping[str, float]]) -> dict[str, float]:
        """The limits of ``COSTS`` that none of ``cases`` (the smallest policies) comes near, with
        the least that any has. Without cases nothing is known to be."""
        if not (known := list(cases)):
            return {}
        least = {name: min(case[name] for case in known) for name in self.costs()}
        return {
            name: least[name]
            for name, most in self.costs().items()
            if least[name] > most * NOT_LEAST
        }

    def costs(self) -> dict[str, float]:
        """The limits of ``COSTS`` that there are."""
        return {n: most for n in COSTS if (most := getattr(self, n)) is not None}

    def drop(self, metric: float) -> float:
        """Points of the metric lost against the teacher."""
        return self.teacher_metric - metric

    def excess(
        self, metric: float, latency_ms: float, size_bytes: float, compressed_bytes: float
    ) -> float:
        """The largest breach of any limit; <= 0 is feasible. A ``point`` of the metric over its
        limit weighs as much as 100% of latency: people give up speed before they give up quality.
        """
        cost = self.cost(latency_ms, size_bytes, compressed_bytes)
        if self.max_drop is None:
            return cost
        # Figures are rounded to what a metric can tell apart: 0.5 lost is not over a limit of 0.5.
        over = (self.drop(metric) - self.max_drop) / point(self.teacher_metric)
        return max(cost, round(over, 9))


def point(teacher_metric: float) -> float:
    """What weighs as a point of a metric, whatever its unit: a hundredth of what the teacher has.
    Of a metric in per cent that is about 1, of one of 0 to 1 about 0.01."""
    return abs(teacher_metric) / 100 or 1.0


def limits_of(header: Mapping[str, Any]) -> Limits:
    """The limits of the session that ``header`` opened, for the teacher as the record has it."""
    teacher = header["teacher"]
    return limits(header["objective"], teacher["metric"], teacher["latency_ms"])


def limits(
    objective: Mapping[str, Any], teacher_metric: float, teacher_latency_ms: float
) -> Limits:
    """The limits that the ``objective`` of a spec sets for this teacher."""
    latency = objective.get("latency_ms")
    if objective.get("speedup") is not None:
        latency = teacher_latency_ms / objective["speedup"]
    rest = (objective.get(name) for name in ("max_drop", "size_bytes", "compressed_bytes"))
    return Limits(teacher_metric, latency, *rest)

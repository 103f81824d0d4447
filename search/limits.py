"""The limits of a search, and what it means to keep them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """latency_ms: what a speed-up of the teacher comes to, or as given. None: no such limit."""

    teacher_metric: float
    latency_ms: float | None = None
    max_drop: float | None = None
    size_bytes: int | None = None

    def cost(self, latency_ms: float, size_bytes: float) -> float:
        """How far latency and size are over their limits, as a share; <= 0 is within."""
        shares = [-1.0]
        if self.latency_ms is not None:
            shares.append(latency_ms / self.latency_ms - 1)
        if self.size_bytes is not None:
            shares.append(size_bytes / self.size_bytes - 1)
        return max(shares)

    def drop(self, metric: float) -> float:
        """Points of the metric lost against the teacher."""
        return self.teacher_metric - metric

    def excess(self, metric: float, latency_ms: float, size_bytes: float) -> float:
        """The largest breach of any limit; <= 0 is feasible. A point of the metric over its limit
        weighs as much as 100% of latency: people give up speed before they give up quality."""
        cost = self.cost(latency_ms, size_bytes)
        if self.max_drop is None:
            return cost
        # Figures are rounded to what a metric can tell apart: 0.5 lost is not over a limit of 0.5.
        return max(cost, round(self.drop(metric) - self.max_drop, 9))


def limits(
    objective: Mapping[str, Any], teacher_metric: float, teacher_latency_ms: float
) -> Limits:
    """The limits that the ``objective`` of a spec sets for this teacher."""
    latency = objective.get("latency_ms")
    if objective.get("speedup") is not None:
        latency = teacher_latency_ms / objective["speedup"]
    return Limits(teacher_metric, latency, objective.get("max_drop"), objective.get("size_bytes"))

"""What a search has come to, from its record: what the display, the report and `deploy` tell."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..spaces.parameter import RUNGS
from .choose import is_measured
from .limits import COSTS, limits
from .record import Entry
from .words import lost, milliseconds, size, speed


@dataclass(frozen=True)
class Figures:
    """One policy at one rung. latency_ms: predicted unless ``measured``; metric: on selection
    validation at the full rung; teacher_latency_ms: what the speed-up refers to."""

    digest: str
    rung: str
    metric: float
    latency_ms: float
    size_bytes: float
    compressed_bytes: float
    teacher_latency_ms: float
    measured: bool = False

    @property
    def speedup(self) -> float:
        return self.teacher_latency_ms / self.latency_ms


@dataclass
class Summary:
    """What a search has come to, from the entries of its record alone.

    objective: the limits as in search.yaml. ended: reason by trial. results: by rung and digest.
    """

    teacher: Mapping[str, Any] = field(default_factory=dict)
    objective: Mapping[str, Any] = field(default_factory=dict)
    running: set[int] = field(default_factory=set)
    ended: dict[int, str] = field(default_factory=dict)
    rejected: int = 0
    results: dict[str, dict[str, Figures]] = field(default_factory=lambda: {r: {} for r in RUNGS})

    def add(self, entry: Entry) -> None:
        """Takes the next entry. Raises KeyError, TypeError or ValueError for what is none."""
        kind = entry["kind"]
        if kind == "search":
            self.teacher = dict(entry.get("teacher") or self.teacher)
            self.objective = dict(entry.get("objective") or self.objective)
            self.running.clear()  # a search that is resumed: what ran was cut off
            self.ended = {t: reason for t, reason in self.ended.items() if reason != "interrupted"}
        elif kind in ("begin", "again"):
            self.running.add(int(entry["trial"]))
            self.ended.pop(int(entry["trial"]), None)
        elif kind == "result":
            self._result(entry)
        elif kind == "end":
            self.running.discard(int(entry["trial"]))
            self.ended[int(entry["trial"])] = str(entry["reason"])
        elif kind == "rejected":
            self.rejected += int(entry.get("count", 1))
        elif kind == "priced" and (known := self.results[RUNGS[-1]].get(entry["digest"])):
            ms = entry["latency_ms"]
            self.results[RUNGS[-1]][known.digest] = replace(
                known,
                latency_ms=float(ms[1]) if ms else math.nan,
                teacher_latency_ms=float(self.teacher.get("latency_ms", math.nan)),
                measured=False,
            )
        elif kind == "measured" and (known := self.results[RUNGS[-1]].get(entry["digest"])):
            self.results[RUNGS[-1]][known.digest] = replace(
                known,
                latency_ms=float(entry["latency_ms"]),
                teacher_latency_ms=float(entry["teacher_latency_ms"]),
                measured=True,
            )

    def _result(self, entry: Entry) -> None:
        self.running.add(int(entry["trial"]))
        self.ended.pop(int(entry["trial"]), None)
        latency, metric = entry.get("latency_ms"), entry.get("metric")
        self.results[entry["rung"]][entry["digest"]] = Figures(
            entry["digest"],
            entry["rung"],
            math.nan if metric is None else float(metric),
            math.nan if latency is None else float(latency[1]),
            float(entry.get("size_bytes") or math.nan),
            float(entry.get("compressed_bytes") or math.nan),
            float(self.teacher.get("latency_ms", math.nan)),
        )

    def excess(self, figures: Figures) -> float:
        """The largest breach of any limit, see ``Limits.excess``; <= 0 is feasible."""
        bounds = limits(self.objective, self.teacher["metric"], figures.teacher_latency_ms)
        return bounds.excess(figures.metric, *(getattr(figures, name) for name in COSTS))

    def drop(self, figures: Figures) -> float:
        """Points of the metric lost against the teacher."""
        return float(self.teacher["metric"]) - figures.metric

    def best(self) -> Figures | None:
        """The best artifact; the nearest miss where nothing is feasible. As DESIGN says: with
        ``max_drop`` the fastest, else the highest metric. What has not finished the full rung is
        none: on a display it would jump whenever the first trial reaches the next rung."""
        known = [f for f in self.results[RUNGS[-1]].values() if is_sound(f)]
        feasible = [f for f in known if self.excess(f) <= 0]
        if feasible and self.objective.get("max_drop") is not None:
            return max(feasible, key=lambda f: f.speedup)
        if feasible:
            return max(feasible, key=lambda f: f.metric)
        return min(known, key=self.excess, default=None)

    def misses(self, figures: Figures) -> list[str]:
        """Which limits it breaks and by how much, in words."""
        limit, drop, out = self.objective, self.drop(figures), []
        if limit.get("speedup") is not None and figures.speedup < limit["speedup"]:
            out.append(f"{speed(figures.speedup)}, the limit is {limit['speedup']:g}")
        if limit.get("latency_ms") is not None and figures.latency_ms > limit["latency_ms"]:
            out.append(
                f"{milliseconds(figures.latency_ms)} ms, the limit is {limit['latency_ms']:g} ms"
            )
        if limit.get("max_drop") is not None and self._lost_too_much(figures):
            out.append(f"{lost(drop)}, the limit is {limit['max_drop']:g}")
        if limit.get("size_bytes") is not None and figures.size_bytes > limit["size_bytes"]:
            out.append(f"{size(figures.size_bytes)}, the limit is {size(limit['size_bytes'])}")
        most = limit.get("compressed_bytes")
        if most is not None and figures.compressed_bytes > most:
            out.append(f"{size(figures.compressed_bytes)} compressed, the limit is {size(most)}")
        return out

    def _lost_too_much(self, figures: Figures) -> bool:
        bounds = limits({"max_drop": self.objective["max_drop"]}, self.teacher["metric"], math.nan)
        return bounds.excess(figures.metric, 0.0, 0.0, 0.0) > 0

    def rungs(self) -> str:
        return ", ".join(f"{rung} {len(self.results[rung])}" for rung in RUNGS)

    def state(self) -> str:
        reasons = Counter(self.ended.values())
        over = reasons["over_limit"] + self.rejected
        return f"{len(self.running)} running, {reasons['failed']} failed, {over} over the limit"

    def best_line(self) -> str:
        best = self.best()
        if best is None:
            return "none yet: no trial has finished the full rung"
        misses = self.misses(best)
        kind = "over the limits" if misses else "within the limits"
        where = "measured" if best.measured else "predicted"
        return f"{speed(best.speedup)}, {lost(self.drop(best))} ({where}, {kind})"


def front_figures(model: Mapping[str, Any], teacher: Mapping[str, Any]) -> Figures:
    """The figures of a model of the front of ``result.json``."""
    return Figures(
        model["digest"], RUNGS[-1], float(model["metric"]), float(model["latency_ms"]),
        float(model["size_bytes"]), float(model.get("compressed_bytes") or math.nan),
        float(teacher["latency_ms"]), measured=is_measured(model),
    )  # fmt: skip


def is_sound(figures: Figures) -> bool:
    """Whether its figures can be compared."""
    return math.isfinite(figures.metric) and figures.latency_ms > 0

"""What each entry of the record becomes in MLflow: pure, without MLflow."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..spaces.parameter import RUNGS

_STATUS = {"failed": "FAILED", "interrupted": "KILLED"}


def status_of(reason: str) -> str:
    """The status of a run whose trial ended for ``reason``."""
    return _STATUS.get(reason, "FINISHED")


@dataclass
class Update:
    """What one entry adds to a run. ``trial``: None for the search itself. ``time``: in seconds.
    ``step``: of the metrics, the index of their rung."""

    trial: int | None
    time: float
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    rung: int = -1
    policy: dict[str, Any] | None = None
    status: str | None = None
    started: float | None = None  # seconds; of a trial whose first entry this is
    not_finite: tuple[str, ...] = ()


def read(entry: dict[str, Any]) -> Update:
    """What ``entry`` adds. Which run a ``measured`` entry belongs to, only its digest tells.

    Raises KeyError, TypeError, ValueError or ArithmeticError for what is no entry of the record.
    """
    return _READ[entry["kind"]](entry)


def _finite(values: dict[str, Any], suffix: str = "") -> tuple[dict[str, float], tuple[str, ...]]:
    """The metrics that are numbers, and the names of those that are NaN or infinite."""
    numbers = {name: float(value) for name, value in values.items() if value is not None}
    odd = tuple(f"{name}{suffix}" for name, v in numbers.items() if not math.isfinite(v))
    return {name: v for name, v in numbers.items() if math.isfinite(v)}, odd


def _search(entry: dict[str, Any]) -> Update:
    target = dict(entry["target"])
    tags = {"flyweight.fingerprint": str(target.pop("fingerprint"))}
    tags["flyweight.version"] = str(entry["flyweight"])
    tags["flyweight.data_digest"] = str(entry.get("data_digest"))
    tags |= {f"flyweight.versions.{name}": str(v) for name, v in entry["versions"].items()}
    metrics, odd = _finite({f"teacher_{k}": v for k, v in entry["teacher"].items()})
    params = {"task": str(entry["task"]), "seed": str(entry["seed"])}
    facts = {f"target.{name}": str(value) for name, value in target.items()}
    params |= facts
    tags |= {f"flyweight.{name}": v for name, v in facts.items()}  # a later session may change them
    return Update(
        None, float(entry["time"]), metrics=metrics, params=params, tags=tags, not_finite=odd
    )


def _result(entry: dict[str, Any]) -> Update:
    rung = RUNGS.index(entry["rung"])
    low, middle, high = entry.get("latency_ms") or (None, None, None)
    latencies = {"latency_low_ms": low, "latency_ms": middle, "latency_high_ms": high}
    names = ("loss", "metric", "size_bytes", "compressed_bytes", "macs", "seconds")
    others = {name: entry.get(name) for name in names}
    metrics, odd = _finite(others | latencies, f"@{entry['rung']}")
    return Update(
        int(entry["trial"]),
        float(entry["time"]),
        metrics=metrics,
        step=rung,
        params=_summary(entry["policy"]),
        tags={"flyweight.digest": str(entry["digest"])},
        rung=rung,
        policy=dict(entry["policy"]),
        started=float(entry["time"]) - float(entry.get("seconds") or 0),
        not_finite=odd,
    )


def _summary(policy: dict[str, Any]) -> dict[str, str]:
    """The policy in a few words, to sort and group by; all of it is an artifact."""
    prune, quantize = policy.get("prune", {}), policy.get("quantize", {})
    int8 = sum(p == "int8" for p in quantize.get("precision", {}).values())
    found = {
        "student": policy.get("distill", {}).get("student", "pruned"),
        "pruned_groups": len(prune.get("width", {})),
        "dropped_blocks": len(prune.get("drop", ())),
        "criterion": prune.get("criterion", "none"),
        "int8_layers": int8,
        "calibration": quantize.get("calibration", "none"),
        "qat": quantize.get("qat", False),
    }
    return {name: str(value).lower() for name, value in found.items()}


def _again(entry: dict[str, Any]) -> Update:
    # What its end said counts no more. MLflow takes one request for each tag that is removed.
    tags = {"flyweight.digest": str(entry["digest"]), "flyweight.reason": "", "flyweight.error": ""}
    return Update(int(entry["trial"]), float(entry["time"]), tags=tags, status="RUNNING")


def _end(entry: dict[str, Any]) -> Update:
    tags = {"flyweight.digest": str(entry["digest"]), "flyweight.reason": str(entry["reason"])}
    if entry.get("error"):
        tags["flyweight.error"] = str(entry["error"])
    status = status_of(str(entry["reason"]))
    return Update(int(entry["trial"]), float(entry["time"]), tags=tags, status=status)


def _measured(entry: dict[str, Any]) -> Update:
    values = {
        "measured_latency_ms": entry["latency_ms"],
        "latency_spread": entry["latency_spread"],
        "speedup": entry["teacher_latency_ms"] / entry["latency_ms"],
    }
    metrics, odd = _finite(values)
    return Update(
        None,
        float(entry["time"]),
        metrics=metrics,
        step=RUNGS.index("full"),
        tags={"flyweight.digest": str(entry["digest"])},
        not_finite=odd,
    )


_READ: dict[str, Callable[[dict[str, Any]], Update]] = {
    "search": _search,
    "again": _again,
    "result": _result,
    "end": _end,
    "measured": _measured,
}

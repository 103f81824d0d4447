"""The end of a search: which artifacts are finalists, the front, the best, result.json."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..kernels import Timing
from ..spaces.parameter import RUNGS
from .limits import COSTS, Limits, limits, limits_of
from .meter import Device
from .pareto import front, spread_order
from .record import Entry

FINALISTS = 12


def finalists(results: Sequence[Entry], bounds: Limits) -> list[Entry]:
    """The full-rung results worth measuring: non-dominated in metric and expected latency, or in
    loss and expected latency, at most 12; those within every limit first, then spread along
    latency. What is too large does not compete with what is not: its size is known, and neither
    metric nor latency makes up for it. Where nothing is small enough, the one that breaks a limit
    least is among them."""
    unique = list({_artifact(e): e for e in results if e["rung"] == RUNGS[-1]}.values())
    unique = [e for e in unique if fits(e, bounds)] or unique
    points = [(-e["metric"], e["latency_ms"][1]) for e in unique]
    chosen = _ahead(unique, [latency for _, latency in points])
    over = [_excess(e | {"latency_ms": e["latency_ms"][1]}, bounds) for e in unique]
    nearest = _nearest(unique, chosen, bounds, over)
    if len(chosen) > FINALISTS:
        feasible = [i for i in chosen if over[i] <= 0]
        others = [i for i in chosen if over[i] > 0]
        ordered = spread_order(points, feasible) + spread_order(points, others)
        chosen = ordered[:FINALISTS]
    chosen = list(dict.fromkeys([*nearest, *chosen]))[:FINALISTS]
    return [unique[i] for i in chosen]


def fits(entry: Mapping[str, Any], bounds: Limits) -> bool:
    """Whether its sizes are within their limits."""
    return bounds.cost(0.0, entry["size_bytes"], entry["compressed_bytes"]) <= 0


def _nearest(
    entries: Sequence[Mapping[str, Any]],
    chosen: Sequence[int],
    bounds: Limits,
    excess: Sequence[float],
) -> list[int]:
    """Where nothing is small enough, the index of the entry that breaks a limit least: another that
    is better and faster may be larger. One of ``chosen`` if it is as near."""
    if not entries or any(fits(e, bounds) for e in entries):
        return []
    return [min(range(len(entries)), key=lambda i: (excess[i], i not in chosen))]


def _artifact(entry: Entry) -> tuple[Any, ...]:
    """By which two artifacts are known to be one. What was not trained is the same by whatever
    settings it was not trained: there its figures tell."""
    if not entry.get("settled"):
        return (entry["digest"],)
    return entry["loss"], entry["metric"], entry["size_bytes"], *entry["latency_ms"]


def _ahead(entries: Sequence[Mapping[str, Any]], latencies: Sequence[float]) -> list[int]:
    """Indices of those that no other dominates in latency and metric, or in latency and loss.

    On a few thousand validation items the best of many metrics is a lucky one. The loss, KL to the
    teacher, is seen with less noise: on the reference task it ordered finished artifacts by what
    they lose on the test set far better than the metric did (docs/benchmarks.md).
    """
    found = set()
    for figure, sign in (("metric", -1.0), ("loss", 1.0)):
        found |= {
            *front([(sign * e[figure], ms) for e, ms in zip(entries, latencies, strict=True)])
        }
    return sorted(found, key=lambda i: latencies[i])


def full_results(header: Entry, entries: Sequence[Entry]) -> tuple[list[Entry], Limits]:
    """The full-rung results among ``entries`` of a record, and the limits that its newest session,
    which ``header`` opened, judges them by."""
    return at_full(entries), limits_of(header)


def at_full(entries: Sequence[Entry]) -> list[Entry]:
    """The full-rung results among ``entries`` of a record, one a policy, with the latencies that
    the newest session gives them: a search may go on for another target."""
    found: dict[str, Entry] = {}
    for entry in entries:
        digest = entry.get("digest", "")
        if entry["kind"] == "result" and entry["rung"] == RUNGS[-1]:
            found[digest] = entry
        elif entry["kind"] == "priced" and digest in found:
            found[digest] = found[digest] | {"latency_ms": entry["latency_ms"]}
    return [entry for entry in found.values() if entry.get("latency_ms")]


def measured_entry(
    digest: str, timings: Mapping[str, Timing], device: Device, metric_test: float | None
) -> Entry:
    """What the record keeps of a finalist that was measured on ``device``."""
    return {
        "kind": "measured",
        "digest": digest,
        "latency_ms": timings[digest].median_ms,
        "latency_spread": timings[digest].spread,
        "teacher_latency_ms": timings["teacher"].median_ms,
        "metric_test": metric_test,
        "fingerprint": device.fingerprint,
        **({"node": device.node} if device.node else {}),
        "time": time.time(),
    }


def final_front(
    header: Entry,
    entries: Sequence[Entry],
    tests: Mapping[str, float | None],
    timings: Mapping[str, Timing] | None,
) -> list[dict[str, Any]]:
    """The finalists that no other dominates once measured, in metric or in loss, by ascending
    latency; where none is small enough, also the one that breaks a limit least. timings: None where
    they could not be measured: what was predicted stands for their latency then, and their spread
    is None.

    header: of the session in which they were predicted. What was predicted is given for the machine
    as fast as it was when they were measured.
    """
    teacher = header["teacher"]
    teacher_ms = teacher["latency_ms"] if timings is None else timings["teacher"].median_ms
    pace = teacher_ms / teacher["latency_ms"]
    rows = []
    for e in entries:
        timing = None if timings is None else timings[e["digest"]]
        rows.append(
            {
                "digest": e["digest"],
                "metric": e["metric"],
                "loss": e["loss"],
                "drop_error": e.get("drop_error"),
                "metric_test": tests.get(e["digest"]),
                "latency_ms": timing.median_ms if timing else e["latency_ms"][1],
                "latency_spread": timing.spread if timing else None,
                "predicted_latency_ms": [pace * ms for ms in e["latency_ms"]],
                "size_bytes": e["size_bytes"],
                "compressed_bytes": e["compressed_bytes"],
                "artifact": e["artifact"],
            }
        )
    bounds = limits(header["objective"], teacher["metric"], teacher_ms)
    chosen = _ahead(rows, [row["latency_ms"] for row in rows])
    chosen += _nearest(rows, chosen, bounds, [_excess(row, bounds) for row in rows])
    return sorted((rows[i] for i in dict.fromkeys(chosen)), key=lambda row: row["latency_ms"])


def _excess(row: Mapping[str, Any], bounds: Limits) -> float:
    return bounds.excess(row["metric"], *(row[name] for name in COSTS))


def choose(rows: Sequence[Mapping[str, Any]], bounds: Limits) -> tuple[str | None, str | None]:
    """(best, nearest miss): digests. Best: with max_drop the fastest feasible, else the feasible
    with the highest metric. When nothing is feasible, the one that breaks a limit least."""
    feasible = [row for row in rows if _excess(row, bounds) <= 0]
    if feasible:
        if bounds.max_drop is not None:
            return min(feasible, key=lambda row: row["latency_ms"])["digest"], None
        return max(feasible, key=lambda row: row["metric"])["digest"], None
    if not rows:
        return None, None
    return None, min(rows, key=lambda row: _excess(row, bounds))["digest"]


def result(
    header: Entry, counts: Mapping[str, int], rows: list[dict[str, Any]], teacher: dict[str, Any],
    wall_s: float, mlflow_run_id: str | None,
) -> dict[str, Any]:  # fmt: skip
    """result.json, as DESIGN names its keys. wall_s: of all sessions, as ``counts`` are."""
    bounds = limits(header["objective"], teacher["metric"], teacher["latency_ms"])
    best, nearest_miss = choose(rows, bounds)
    return {
        "flyweight": header["flyweight"],
        "task": header["task"],
        "seed": header["seed"],
        "wall_s": wall_s,
        "objective": header["objective"],
        "trials": {rung: counts.get(rung, 0) for rung in RUNGS},
        "target": header["target"],
        "predicted_by": header["predicted_by"],
        "teacher": teacher,
        "front": rows,
        "best": best,
        "nearest_miss": nearest_miss,
        "mlflow_run_id": mlflow_run_id,
    }


def remeasured(
    earlier: Mapping[str, Any], rows: list[dict[str, Any]], teacher_ms: float, fingerprint: str
) -> dict[str, Any]:
    """The content ``earlier`` of result.json with the front ``rows`` that was measured on the
    device ``fingerprint``, where the teacher takes ``teacher_ms``."""
    teacher = earlier["teacher"] | {"latency_ms": teacher_ms}
    bounds = limits(earlier["objective"], teacher["metric"], teacher_ms)
    best, nearest_miss = choose(rows, bounds)
    return {
        **earlier,
        "target": earlier["target"] | {"fingerprint": fingerprint},
        "teacher": teacher,
        "front": rows,
        "best": best,
        "nearest_miss": nearest_miss,
    }

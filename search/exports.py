"""A run as rows of plain values, numbers unrounded: for CSV files and data frames."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

from ..spaces.parameter import RUNGS
from .reading import Run, Traits, traits

Rows = Sequence[Mapping[str, Any]]


def front_rows(run: Run) -> Rows:
    """The front, a row an artifact, by ascending latency."""
    out = []
    for row in run.front:
        f, t = row.figures, traits(row.policy, run.search)
        low, mean, high = row.predicted_ms or (None, None, None)
        out.append({
            "digest": f.digest, "mark": row.mark, "speedup": f.speedup, "latency_ms": f.latency_ms,
            "measured": f.measured, "latency_spread": row.spread, "predicted_low_ms": low,
            "predicted_ms": mean, "predicted_high_ms": high, "metric": f.metric,
            "metric_test": row.metric_test, "drop": row.drop, "drop_test": row.drop_test,
            "loss": row.loss, "size_bytes": f.size_bytes, "compressed_bytes": f.compressed_bytes,
            **_summary(t), "misses": "; ".join(row.misses),
        })  # fmt: skip
    return out


def trial_rows(run: Run) -> Rows:
    """Each trial, in order: how far it came, what each rung found and took, why it ended."""
    out: dict[int, dict[str, Any]] = {}
    measured = {e["digest"]: e["latency_ms"] for e in run.entries if e["kind"] == "measured"}
    for entry in run.entries:
        if entry["kind"] not in ("begin", "again", "result", "end"):
            continue
        row = out.setdefault(int(entry["trial"]), dict.fromkeys(_TRIAL))
        row |= {"trial": entry["trial"], "digest": entry["digest"]}
        if entry["kind"] == "end":
            row |= {"ended": entry["reason"], "error": entry.get("error")}
        else:
            row["ended"] = row["error"] = None  # one that goes on
        if policy := entry.get("policy"):
            row |= _summary(traits(policy, run.search))
            row |= {key: policy.get("distill", {}).get(key) for key in _DISTILL}
        if latency := entry.get("latency_ms"):
            names = "predicted_low_ms", "predicted_ms", "predicted_high_ms"
            row |= dict(zip(names, latency, strict=True))
        if entry["kind"] == "result":
            rung = entry["rung"]
            row |= {key: entry.get(key) for key in ("size_bytes", "compressed_bytes", "macs")}
            row |= {f"{key}_{rung}": entry.get(key) for key in _RUNG} | {"rung": rung}
            row[f"seconds_{rung}"] = entry.get("rung_seconds") or entry.get("seconds")
            row["latency_ms"] = measured.get(entry["digest"])
    return [out[trial] for trial in sorted(out)]


def _summary(found: Traits) -> dict[str, str]:
    return dict(zip(_SUMMARY, astuple(found), strict=True))


_SUMMARY = (
    "mean_kept_width", "sparsity", "dropped_blocks", "int8_layers", "criterion", "calibration",
    "qat",
)  # fmt: skip
_RUNG = ("metric", "loss", "seconds")
_DISTILL = ("student", "loss", "temperature", "alpha", "learning_rate")
_TRIAL = (
    "trial", "digest", "rung", "ended", "error", "latency_ms", "predicted_low_ms", "predicted_ms",
    "predicted_high_ms", *(f"{key}_{rung}" for key in _RUNG for rung in RUNGS),
    "size_bytes", "compressed_bytes", "macs", *_SUMMARY, *_DISTILL,
)  # fmt: skip


def as_csv(rows: Rows) -> str:
    """With the names of the first row as header; nothing for no rows."""
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return out.getvalue()

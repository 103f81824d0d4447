"""What a run directory says of its search, also while it runs: what the report is made of."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..spaces import BadInput
from ..spaces.parameter import RUNGS
from . import record
from .choose import how_to_end
from .correlation import Agreement, agreements
from .explained import Explained, explained
from .fragile import Harms, read_harms
from .limits import limits
from .results import at_full, choose, finalists
from .run_files import EXPLANATION, RECORD, RESULT, SPEC
from .summary import Figures, Summary, front_figures

Policy = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One artifact. predicted_ms: lower, mean, upper. spread: share of the latency. misses: the
    limits that it breaks, in words. loss: KL to the teacher on search validation, in nats. settled:
    it was trained no further, see ``Candidate``. diverged: how, if training did."""

    figures: Figures
    drop: float
    metric_test: float | None = None
    drop_test: float | None = None
    spread: float | None = None
    predicted_ms: Sequence[float] | None = None
    policy: Policy | None = None
    mark: str = ""  # best or nearest miss
    misses: Sequence[str] = ()
    loss: float | None = None
    settled: bool = False
    diverged: str | None = None


@dataclass(frozen=True)
class Run:
    """What a run directory says. entries: the record. result: None while the search runs. front and
    others: artifacts, by ascending latency. failures: reasons with the trials that failed for them.
    agreements: of each rung with the next. found, why: what ``flyweight explain`` says, as numbers
    and in words, None without a device profile. harms: the sensitivity table, None if there is
    none. strategy: "" where no spec.yaml tells."""

    folder: Path
    search: Mapping[str, Any]
    entries: Sequence[record.Entry]
    summary: Summary
    front: Sequence[Row]
    others: Sequence[Row]
    failures: Sequence[tuple[str, list[int]]]
    agreements: Sequence[Agreement]
    result: Mapping[str, Any] | None
    found: Mapping[str, Any] | None
    why: Explained | None
    harms: Harms | None
    strategy: str

    @property
    def chosen(self) -> Row | None:
        """The best, else the nearest miss."""
        return next((row for row in self.front if row.mark), None)

    @property
    def lacking(self) -> str:
        """What there would have to be for a front, in words; "" if there is one."""
        if self.front:
            return ""
        if any(self.summary.results.values()):
            return "No trial has finished the full rung"
        return "No trial has finished its first rung"

    @property
    def of_notebook(self) -> bool:
        """Whether its task was an object of a Python process ("<notebook>:Net"): no file has it."""
        return str(self.search["task"]).startswith("<")


def read_run(folder: Path) -> Run:
    """The run in ``folder``. Raises BadInput naming the file that is missing or damaged."""
    path = folder / RECORD
    with _blaming(path):
        entries = list(record.read(path))
        if not any(entry["kind"] == "search" for entry in entries):
            raise BadInput(
                f"{path} has no search entry: the search is preparing, or was cut off before its "
                f"first trial, so there is nothing to report; {how_to_end(folder)}"
            )
        summary = Summary()
        for entry in entries:
            summary.add(entry)
        search = next(entry for entry in reversed(entries) if entry["kind"] == "search")
        full = [entry for entry in at_full(entries) if entry.get("metric") is not None]
        rows = {entry["digest"]: _row(entry, summary) for entry in full}
        failures, agreeing = _failures(entries), agreements(entries)
    found, why = _explanation(folder / EXPLANATION)
    result = _result(folder / RESULT, entries)
    if result is None:
        with _blaming(path):
            front = _front_so_far(full, rows, summary)
    else:
        with _blaming(folder / RESULT):
            summary.teacher, summary.objective = result["teacher"], result.get("objective") or {}
            front = [_measured(model, result, rows, summary) for model in result["front"]]
    taken = {row.figures.digest for row in front}
    others = [row for digest, row in rows.items() if digest not in taken]
    others.sort(key=lambda row: row.figures.latency_ms)
    return Run(
        folder, search, entries, summary, front, others, failures, agreeing, result, found, why,
        read_harms(folder), _strategy(folder / SPEC),
    )  # fmt: skip


def _explanation(path: Path) -> tuple[Mapping[str, Any] | None, Explained | None]:
    if not path.exists() or not path.stat().st_size:  # it is empty where `explain > FILE` failed
        return None, None
    with _blaming(path):
        found = json.loads(path.read_text("utf-8"))
        return found, explained(found)


def _result(path: Path, entries: Sequence[record.Entry]) -> Mapping[str, Any] | None:
    """What the search came to; None while it runs, also if it is one that was resumed."""
    if not path.exists():
        return None
    with _blaming(path):
        result = json.loads(path.read_text("utf-8"))
        ends = "done", "measured"  # an earlier flyweight wrote no "done"
        kinds = [entry["kind"] for entry in entries if entry["kind"] in ("search", *ends)]
        sessions = kinds.count("search")
        runs_again = sessions > 1 and kinds[-1] == "search" and ("done" in kinds or result["front"])
        return None if runs_again else dict(result)


def _strategy(path: Path) -> str:
    """What search.strategy was; the report can do without."""
    try:
        return str(yaml.safe_load(path.read_text("utf-8"))["search"]["strategy"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return ""


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise BadInput(f"no file {path}: is {path.parent} the directory of a run?") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BadInput(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _row(entry: record.Entry, summary: Summary) -> Row:
    figures = summary.results[RUNGS[-1]][entry["digest"]]
    low, mean, high = (float(ms) for ms in entry["latency_ms"])
    drop = summary.drop(figures)
    return Row(
        figures, drop, predicted_ms=(low, mean, high), policy=entry.get("policy"),
        misses=summary.misses(figures), loss=entry.get("loss"),
        settled=bool(entry.get("settled")), diverged=entry.get("diverged"),
    )  # fmt: skip


def _front_so_far(
    entries: Sequence[record.Entry], rows: Mapping[str, Row], summary: Summary
) -> list[Row]:
    """Those that would be measured if the search ended now, and what would be chosen of them, by
    predicted latency."""
    teacher = summary.teacher
    bounds = limits(summary.objective, teacher["metric"], teacher["latency_ms"])
    inside = finalists(entries, bounds)
    expected = [entry | {"latency_ms": entry["latency_ms"][1]} for entry in inside]
    best, nearest = choose(expected, bounds)
    marks = {nearest: "nearest miss", best: "best"}
    front = [replace(rows[e["digest"]], mark=marks.get(e["digest"], "")) for e in inside]
    return sorted(front, key=lambda row: row.figures.latency_ms)


def _measured(
    model: Mapping[str, Any], result: Mapping[str, Any], known: Mapping[str, Row], summary: Summary
) -> Row:
    figures = front_figures(model, result["teacher"])
    row = known.get(figures.digest)
    test, teacher_test = model.get("metric_test"), result["teacher"].get("metric_test")
    marks = {result.get("nearest_miss"): "nearest miss", result.get("best"): "best"}
    return Row(
        figures,
        summary.drop(figures),
        test,
        None if test is None or teacher_test is None else teacher_test - test,
        model.get("latency_spread"),
        [float(ms) for ms in model["predicted_latency_ms"]],
        row.policy if row else None,
        marks.get(figures.digest, ""),
        summary.misses(figures),
        loss=model.get("loss"),
        settled=row is not None and row.settled,
        diverged=row.diverged if row else None,
    )


def _failures(entries: Sequence[record.Entry]) -> list[tuple[str, list[int]]]:
    """Reasons and the trials that failed for each, commonest first."""
    reasons: dict[str, list[int]] = {}
    for entry in entries:
        if entry["kind"] == "end" and entry["reason"] == "failed":
            lines = str(entry.get("error") or "no reason given").strip().splitlines()
            reasons.setdefault(lines[0][:500], []).append(int(entry["trial"]))
    return sorted(reasons.items(), key=lambda item: -len(item[1]))


@dataclass(frozen=True)
class Traits:
    """A policy in a few words. kept: mean width, a share where the widths at first are known.
    zeros: share of single weights. dropped: names of blocks."""

    kept: str = ""
    zeros: str = ""
    dropped: str = ""
    int8: str = ""
    criterion: str = ""
    calibration: str = ""
    qat: str = ""


def traits(policy: Policy | None, search: Mapping[str, Any]) -> Traits:
    """``search``: the record's search entry; its ``groups`` (widths at first, by name), ``blocks``
    (what groups go with each) and ``layers`` (how many) make shares of the numbers."""
    if policy is None:
        return Traits("?", "", "", "?", "?", "?", "?")
    prune, quantize = policy.get("prune") or {}, policy.get("quantize") or {}
    width, full = prune.get("width") or {}, search.get("groups") or {}
    drop, blocks = prune.get("drop") or (), search.get("blocks") or {}
    width = {**width, **{group: 0 for name in drop for group in blocks.get(name, ())}}
    kept = "all"
    if width and full and set(width) <= set(full):
        kept = f"{sum(width.get(g, n) / n for g, n in full.items()) / len(full):.0%}"
    elif width:
        kept = f"{sum(width.values()) / len(width):.0f} channels in {len(width)} groups"
    int8 = sum(p == "int8" for p in (quantize.get("precision") or {}).values())
    layers = f" of {search['layers']}" if search.get("layers") else ""
    return Traits(
        kept,
        f"{prune['sparsity']:.0%}" if prune.get("sparsity") else "",
        ", ".join(drop),
        f"{int8}{layers}",
        prune.get("criterion", ""),
        quantize.get("calibration", "") if int8 else "",
        ("yes" if quantize.get("qat") else "no") if int8 else "",
    )

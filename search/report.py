"""The report of a search: one HTML file that needs nothing else, and the front as CSV."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.axes import Axes

from ..spaces import BadInput
from . import pareto, progress, record
from .correlation import Agreement, agreements
from .drawing import BEST, FRONT, INK, LIMIT, svg
from .explained import EXPLANATION, Explained, Sheet, bars_svg, explained
from .fragile import Harms, groups_sheet, layers_sheet, read_harms
from .limits import limits
from .mlflow_entries import RUNGS
from .progress import Figures, Summary

_REASONS = 40  # of failure that are listed
_COLUMNS = (
    "digest", "mark", "speedup", "latency_ms", "measured", "latency_spread", "predicted_low_ms",
    "predicted_ms", "predicted_high_ms", "metric", "metric_test", "drop", "drop_test",
    "size_bytes", "compressed_bytes", "mean_kept_width", "sparsity", "dropped_blocks",
    "int8_layers", "criterion", "calibration", "qat", "misses", "loss",
)  # fmt: skip

Policy = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One artifact. predicted_ms: lower, mean, upper. spread: share of the latency. misses: the
    limits that it breaks, in words. loss: KL to the teacher on search validation, in nats."""

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


@dataclass(frozen=True)
class Run:
    """What a run directory says. result: None while the search runs. failures: reasons with the
    trials that failed for them. front and others: artifacts, by ascending latency. agreements: of
    each rung with the next. why: what ``flyweight explain`` says, None without a device profile;
    bars: its figure. harms: the sensitivity table, None if there is none."""

    search: Mapping[str, Any]
    summary: Summary
    front: Sequence[Row]
    others: Sequence[Row]
    failures: Sequence[tuple[str, list[int]]]
    agreements: Sequence[Agreement]
    result: Mapping[str, Any] | None
    why: Explained | None
    bars: str
    harms: Harms | None

    @property
    def chosen(self) -> Row | None:
        """The best, else the nearest miss."""
        return next((row for row in self.front if row.mark), None)


def write_report(run_dir: Path) -> Path:
    """Writes RUN_DIR/report.html and front.csv from record.jsonl and, once it is there,
    result.json. Returns the page's path. Raises BadInput for a record or result that is missing or
    damaged, OSError where it cannot write."""
    run = read_run(run_dir)
    page = run_dir / "report.html"
    _replace(run_dir / "front.csv", front_csv(run))
    _replace(page, render(run))
    return page


def read_run(run_dir: Path) -> Run:
    """The run in ``run_dir``. Raises BadInput naming the file that is missing or damaged."""
    path = run_dir / "record.jsonl"
    with _blaming(path):
        entries = list(record.read(path))
        if not any(entry["kind"] == "search" for entry in entries):
            raise BadInput(f"{path} does not say what was searched: it has no search entry")
        summary = Summary()
        for entry in entries:
            summary.add(entry)
        search = next(entry for entry in reversed(entries) if entry["kind"] == "search")
        predicted = [_row(entry, summary) for entry in _at_full(entries)]
        failures, agreeing = _failures(entries), agreements(entries)
    path, why, bars = run_dir / EXPLANATION, None, ""
    if path.exists() and path.stat().st_size:  # it is empty where `explain > FILE` failed
        with _blaming(path):
            found = json.loads(path.read_text("utf-8"))
            why, bars = explained(found), bars_svg(found)
    harms = read_harms(run_dir)
    path = run_dir / "result.json"
    if not path.exists():
        front, others = _front_so_far(predicted, summary)
        return Run(search, summary, front, others, failures, agreeing, None, why, bars, harms)
    with _blaming(path):
        result = json.loads(path.read_text("utf-8"))
        summary.teacher, summary.objective = result["teacher"], result.get("objective") or {}
        known = {row.figures.digest: row for row in predicted}
        front = [_measured(model, result, known, summary) for model in result["front"]]
        taken = {row.figures.digest for row in front}
        others = [row for digest, row in known.items() if digest not in taken]
        return Run(search, summary, front, others, failures, agreeing, result, why, bars, harms)


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise BadInput(f"no file {path}: is {path.parent} the directory of a run?") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BadInput(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _at_full(entries: Sequence[record.Entry]) -> list[record.Entry]:
    results = [e for e in entries if e["kind"] == "result" and e["rung"] == RUNGS[-1]]
    newest = {entry["digest"]: entry for entry in results}
    return [e for e in newest.values() if e.get("metric") is not None and e.get("latency_ms")]


def _row(entry: record.Entry, summary: Summary) -> Row:
    figures = summary.results[RUNGS[-1]][entry["digest"]]
    low, mean, high = (float(ms) for ms in entry["latency_ms"])
    drop = summary.drop(figures)
    return Row(
        figures, drop, predicted_ms=(low, mean, high), policy=entry.get("policy"),
        misses=summary.misses(figures), loss=entry.get("loss"),
    )  # fmt: skip


def _front_so_far(rows: Sequence[Row], summary: Summary) -> tuple[list[Row], list[Row]]:
    """Those that no other dominates, by predicted latency until it is measured."""
    inside = pareto.front([(-r.figures.metric, r.figures.latency_ms) for r in rows])
    best = summary.best()
    front = []
    for row in (rows[i] for i in inside):
        chosen = best is not None and row.figures.digest == best.digest
        mark = "nearest miss" if row.misses else "best"
        front.append(replace(row, mark=mark if chosen else ""))
    return front, [row for i, row in enumerate(rows) if i not in inside]


def _measured(
    model: Mapping[str, Any], result: Mapping[str, Any], known: Mapping[str, Row], summary: Summary
) -> Row:
    figures = progress.front_figures(model, result["teacher"])
    test, teacher_test = model.get("metric_test"), result["teacher"].get("metric_test")
    marks = {result.get("nearest_miss"): "nearest miss", result.get("best"): "best"}
    return Row(
        figures,
        summary.drop(figures),
        test,
        None if test is None or teacher_test is None else teacher_test - test,
        model.get("latency_spread"),
        [float(ms) for ms in model["predicted_latency_ms"]],
        known[figures.digest].policy if figures.digest in known else None,
        marks.get(figures.digest, ""),
        summary.misses(figures),
        loss=model.get("loss"),
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


def front_csv(run: Run) -> str:
    """The front, a row an artifact, numbers unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in run.front:
        f, t = row.figures, traits(row.policy, run.search)
        low, mean, high = row.predicted_ms or (None, None, None)
        writer.writerow([
            f.digest, row.mark, f.speedup, f.latency_ms, f.measured, row.spread, low, mean, high,
            f.metric, row.metric_test, row.drop, row.drop_test, f.size_bytes, f.compressed_bytes,
            t.kept, t.zeros, t.dropped, t.int8, t.criterion, t.calibration, t.qat,
            "; ".join(row.misses), row.loss,
        ])  # fmt: skip
    return out.getvalue()


def render(run: Run) -> str:
    """The page."""
    templates = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=templates,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": progress.size, "lost": progress.lost, "speed": progress.speed}
    drawn, hidden = front_svg(run)
    return environment.get_template(
        "report.html"
    ).render(
        run=run,
        summary=run.summary,
        search=run.search,
        target=(run.result or run.search).get("target") or {},  # it may be measured elsewhere
        teacher=run.summary.teacher,
        began=datetime.fromtimestamp(run.search["time"], UTC).strftime("%Y-%m-%d %H:%M UTC"),
        wall=progress.clock_time(run.result["wall_s"]) if run.result else None,
        ends=Counter(run.summary.ended.values()).most_common(),
        failures=run.failures[:_REASONS],
        unlisted=sum(len(trials) for _, trials in run.failures[_REASONS:]),
        traits=lambda row: traits(row.policy, run.search),
        rungs=RUNGS,
        svg=Markup(drawn),  # made by us from numbers alone
        bars=Markup(run.bars),  # and from names, escaped where they are drawn
        predicted_by=run.search.get("predicted_by"),
        fragile=_fragile(run),
        explanation=EXPLANATION,
        hidden=hidden,
    )


def _fragile(run: Run) -> list[Sheet]:
    """What single choices harm, beside what the chosen policy chose."""
    if run.harms is None:
        return []
    policy = run.chosen.policy if run.chosen else None
    sheets = groups_sheet(run.harms, policy), layers_sheet(run.harms, policy)
    return [sheet for sheet in sheets if sheet.rows]


def front_svg(run: Run) -> tuple[str, int]:
    """The metric against latency as inline SVG, and how many artifacts lie outside of it: one
    failed student far below must not squeeze the front into a line."""
    teacher, best = run.summary.teacher, run.chosen
    bounds = limits(run.summary.objective, teacher["metric"], teacher["latency_ms"])
    least = None if bounds.max_drop is None else teacher["metric"] - bounds.max_drop
    heights = [teacher["metric"], *(row.figures.metric for row in run.front)]
    heights += [] if least is None else [least]
    margin = 0.15 * max(max(heights) - min(heights), 0.1)
    bottom, top = min(heights) - 2 * margin, max(heights) + margin
    rows = [*run.front, *run.others]
    shown = [row for row in run.others if row.figures.metric >= bottom]
    widest = max([teacher["latency_ms"], *(r.figures.latency_ms for r in [*run.front, *shown])])

    def draw(axes: Axes) -> None:
        axes.set(xlabel="latency, ms")
        # Not along the axis: on a phone, where letters are drawn larger, it would meet the ticks.
        axes.set_title("metric on selection validation", loc="left", fontsize=10)
        axes.set(xlim=(0, 1.08 * widest), ylim=(bottom, top))
        if least is not None:
            axes.axhline(least, color=LIMIT, linestyle="--", linewidth=1.5)
        if bounds.latency_ms is not None:
            axes.axvline(bounds.latency_ms, color=LIMIT, linestyle="--", linewidth=1.5)
        _points(axes, shown, marker="o", s=22, facecolors="none", edgecolors=INK, alpha=0.5)
        ordered = sorted(run.front, key=lambda row: row.figures.latency_ms)
        # The front also holds what is ahead in loss: the line joins what is in the metric.
        ahead = pareto.front([(-r.figures.metric, r.figures.latency_ms) for r in ordered])
        line = [(ordered[i].figures.latency_ms, ordered[i].figures.metric) for i in ahead]
        axes.plot(*zip(*line, strict=True), color=FRONT, linewidth=1.2)
        inside = [row for row in ordered if not row.misses]
        outside = [row for row in ordered if row.misses]
        _points(axes, inside, marker="o", s=42, color=FRONT, zorder=3)
        _points(axes, outside, marker="x", s=42, color=FRONT, zorder=3)
        axes.scatter(
            [teacher["latency_ms"]], [teacher["metric"]], marker="D", s=60, color=INK, zorder=4
        )
        if best is not None:
            _points(axes, [best], marker="*", s=240, color=BEST, zorder=5)

    label = "Metric against latency; the tables say the same"
    return svg(draw, (6.4, 4.0), label), len(rows) - len(run.front) - len(shown)


def _points(axes: Axes, rows: Sequence[Row], **how: Any) -> None:
    axes.scatter([r.figures.latency_ms for r in rows], [r.figures.metric for r in rows], **how)


def _replace(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, "utf-8")
    os.replace(part, path)

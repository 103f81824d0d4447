"""The figures of a report: the front, how it grew, what trials cost, how well latency was
predicted. Each has a table or a sentence beside it that says the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from matplotlib.axes import Axes

from ..spaces.parameter import RUNGS
from . import pareto
from .drawing import Colours, Draw, Size
from .limits import limits
from .reading import Row, Run
from .record import Entry, at_work
from .results import choose, finalists

WIDE: Size = (6.4, 4.0)
BARS = 60  # of trials, or of so many trials each that there are no more
# How other runs look: a colour of the page, the marker of matplotlib, the line, the legend's path.
LOOKS = (
    ("second", "s", "--", "M5 4h10v8H5z"),
    ("third", "^", ":", "M10 3l6 10H4z"),
    ("second", "v", ":", "M10 13l6-10H4z"),
    ("third", "P", "--", "M8 3h4v3h4v4h-4v3H8v-3H4V6h4z"),
)


def front_figure(run: Run, beside: Sequence[Run]) -> tuple[Draw, int]:
    """The metric against the speed-up, and how many artifacts lie outside of the figure: one failed
    student far below must not squeeze the front into a line."""
    teacher, best = run.summary.teacher, run.chosen
    bounds = limits(run.summary.objective, teacher["metric"], teacher["latency_ms"])
    least = None if bounds.max_drop is None else teacher["metric"] - bounds.max_drop
    known = [*run.front, *(row for other in beside for row in other.front)]
    heights = [teacher["metric"], *(row.figures.metric for row in known)]
    heights += [] if least is None else [least]
    margin = 0.15 * max(max(heights) - min(heights), 0.1)
    bottom, top = min(heights) - 2 * margin, max(heights) + margin
    shown = [row for row in run.others if row.figures.metric >= bottom]
    # A dot a pixel: thousands that lie on each other would only make the page large.
    dots = {_pixel(row, top - bottom): row for row in shown}

    def draw(axes: Axes, colours: Colours) -> None:
        axes.set(xlabel="times faster than the teacher", ylim=(bottom, top))
        # Not along the axis: on a phone, where letters are drawn larger, it would meet the ticks.
        axes.set_title("metric on selection validation", loc="left", fontsize=10)
        if least is not None:
            axes.axhline(least, color=colours.limit, linestyle="--", linewidth=1.5)
        if bounds.latency_ms is not None:
            at = teacher["latency_ms"] / bounds.latency_ms
            axes.axvline(at, color=colours.limit, linestyle="--", linewidth=1.5)
        faint: Any = {"marker": "o", "s": 22, "facecolors": "none", "alpha": 0.5}
        _points(axes, list(dots.values()), edgecolors=colours.ink, **faint)
        for other, (colour, marker, line, _) in zip(beside, LOOKS, strict=False):
            how: Any = {"color": getattr(colours, colour), "linewidth": 1.2, "linestyle": line}
            axes.plot(*_line(other.front), marker=marker, markersize=6, **how)
        axes.plot(*_line(run.front), color=colours.front, linewidth=1.2)
        inside = [row for row in run.front if not row.misses]
        outside = [row for row in run.front if row.misses]
        _points(axes, inside, marker="o", s=42, color=colours.front, zorder=3)
        _points(axes, outside, marker="x", s=42, color=colours.front, zorder=3)
        axes.scatter([1.0], [teacher["metric"]], marker="D", s=60, color=colours.ink, zorder=4)
        if best is not None:
            _points(axes, [best], marker="*", s=240, color=colours.best, zorder=5)

    return draw, len(run.others) - len(shown)


def _pixel(row: Row, height: float) -> tuple[int, int]:
    return round(80 * row.figures.speedup), round(400 * row.figures.metric / height)


def _points(axes: Axes, rows: Sequence[Row], **how: Any) -> None:
    axes.scatter([r.figures.speedup for r in rows], [r.figures.metric for r in rows], **how)


def _line(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Through what is ahead in the metric: the front also holds what is ahead in loss."""
    points = [(-row.figures.metric, row.figures.latency_ms) for row in rows]
    ahead = [rows[i].figures for i in pareto.front(points)]
    return [f.speedup for f in ahead], [f.metric for f in ahead]


# The later the darker: marker, line, opacity, the legend's path.
GROWN = (
    ("v", ":", 0.45, "M10 13l6-10H4z"),
    ("^", "-.", 0.6, "M10 3l6 10H4z"),
    ("s", "--", 0.8, "M5 4h10v8H5z"),
    ("o", "-", 1.0, "M5.5 8a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0"),
)


@dataclass(frozen=True)
class Moment:
    """What a search had after ``seconds`` at work: artifacts, the front of them, (speed-up, points
    lost) of what would have been chosen, and whether that was within the limits. points: (speed-up,
    metric) of what is ahead in the metric."""

    seconds: float
    artifacts: int
    front: int
    chosen: tuple[float, float] | None
    feasible: bool
    points: Sequence[tuple[float, float]]


def growth(run: Run) -> list[Moment]:
    """After each quarter of the time, by predicted latency."""
    teacher = run.search["teacher"]
    bounds = limits(run.summary.objective, teacher["metric"], teacher["latency_ms"])
    timed = [
        (seconds, entry)
        for seconds, entry in zip(at_work(run.entries), run.entries, strict=True)
        if entry["kind"] == "result"
    ]
    end = max((seconds for seconds, _ in timed), default=0.0)
    out = []
    for share in (0.25, 0.5, 0.75, 1.0):  # GROWN draws them
        known = [e for seconds, e in timed if seconds <= share * end and e["rung"] == RUNGS[-1]]
        known = [e for e in known if e.get("metric") is not None and e.get("latency_ms")]
        ahead = [e | {"latency_ms": e["latency_ms"][1]} for e in finalists(known, bounds)]
        best, nearest = choose(ahead, bounds)
        chosen = next((e for e in ahead if e["digest"] == (best or nearest)), None)
        line = pareto.front([(-e["metric"], e["latency_ms"]) for e in ahead])
        out.append(
            Moment(
                share * end, len({e["digest"] for e in known}), len(ahead),
                None if chosen is None else _seen(chosen, teacher), best is not None,
                [(teacher["latency_ms"] / e["latency_ms"], e["metric"])
                 for e in (ahead[i] for i in line)],
            )
        )  # fmt: skip
    return out


def _seen(entry: Entry, teacher: Mapping[str, Any]) -> tuple[float, float]:
    return teacher["latency_ms"] / entry["latency_ms"], teacher["metric"] - entry["metric"]


def growth_figure(moments: Sequence[Moment]) -> Draw:
    """The fronts at those moments, as many as GROWN has looks at most."""

    def draw(axes: Axes, colours: Colours) -> None:
        axes.set(xlabel="times faster than the teacher, predicted")
        axes.set_title("metric on selection validation", loc="left", fontsize=10)
        for moment, (marker, line, alpha, _) in zip(moments, GROWN[-len(moments) :], strict=True):
            how: Any = {"color": colours.front, "alpha": alpha, "markersize": 6}
            axes.plot(*zip(*moment.points, strict=True), marker=marker, linestyle=line, **how)

    return draw


@dataclass(frozen=True)
class Cost:
    """What a rung took of the workers' time, in seconds."""

    rung: str
    results: int
    total: float
    median: float
    longest: float


def costs(run: Run) -> list[Cost]:
    """For each rung that has results."""
    out = []
    for rung in RUNGS:
        spent = [seconds for _, where, seconds in _spent(run.entries) if where == rung]
        if spent:
            out.append(Cost(rung, len(spent), sum(spent), median(spent), max(spent)))
    return out


def _spent(entries: Sequence[Entry]) -> list[tuple[int, str, float]]:
    """(trial, rung, seconds) of each result."""
    results = (entry for entry in entries if entry["kind"] == "result")
    return [(int(e["trial"]), e["rung"], float(_seconds(e))) for e in results]


def _seconds(entry: Entry) -> float:
    """With what there is besides training, where that is known."""
    return entry.get("rung_seconds") or entry.get("seconds") or 0.0


def cost_figure(run: Run) -> tuple[Draw, int]:
    """Seconds per trial, by rung, and how many trials share a bar."""
    spent = _spent(run.entries)
    trials = sorted({trial for trial, _, _ in spent})
    each = -(-len(trials) // BARS) or 1
    bars = [trials[at : at + each] for at in range(0, len(trials), each)]
    heights = {rung: [0.0] * len(bars) for rung in RUNGS}
    where = {trial: at for at, members in enumerate(bars) for trial in members}
    for trial, rung, seconds in spent:
        heights[rung][where[trial]] += seconds / len(bars[where[trial]])

    def draw(axes: Axes, colours: Colours) -> None:
        axes.set(xlabel="trial", xlim=(trials[0] - 0.5, trials[-1] + 0.5))
        axes.set_title("seconds per trial", loc="left", fontsize=10)
        starts = [members[0] - 0.5 for members in bars]
        widths = [after - at for at, after in pairwise([*starts, trials[-1] + 0.5])]
        below = [0.0] * len(bars)
        looks: Any = zip(RUNGS, (colours.ink, colours.front, colours.best), strict=True)
        for rung, colour in looks:
            axes.bar(starts, heights[rung], widths, below, align="edge", color=colour, alpha=0.85)
            below = [a + b for a, b in zip(below, heights[rung], strict=True)]

    return draw, each


@dataclass(frozen=True)
class Exactness:
    """Measured latencies against predicted ones: the least and the greatest difference as a share
    of the prediction, and how many of ``count`` lay in their intervals."""

    count: int
    within: int
    least: float
    greatest: float


def exactness(run: Run) -> Exactness | None:
    """None where nothing was measured."""
    shares = [_shares(row) for row in _compared(run)]
    if not shares:
        return None
    errors = [error for _, error, _ in shares]
    within = sum(low <= error <= high for low, error, high in shares)
    return Exactness(len(shares), within, min(errors), max(errors))


def _compared(run: Run) -> list[Row]:
    return [row for row in run.front if row.figures.measured and row.predicted_ms]


def _shares(row: Row) -> tuple[float, float, float]:
    """The interval's ends and what was measured, from what was predicted, as shares of it."""
    assert row.predicted_ms is not None
    low, middle, high = row.predicted_ms
    return low / middle - 1, row.figures.latency_ms / middle - 1, high / middle - 1


def exactness_figure(run: Run) -> tuple[Draw, Size]:
    """A line an artifact: its interval, and where the measurement lay."""
    rows = _compared(run)

    def draw(axes: Axes, colours: Colours) -> None:
        axes.axvline(0.0, color=colours.ink, linewidth=0.8, alpha=0.6)
        for at, row in enumerate(rows):
            low, error, high = (100 * share for share in _shares(row))
            axes.plot((low, high), (at, at), color=colours.front, linewidth=5, alpha=0.35)
            axes.plot([error], [at], "o", color=colours.best, markersize=6)
        axes.set_yticks(range(len(rows)), [row.figures.digest[:6] for row in rows])
        axes.set(xlabel="measured, % above the prediction", ylim=(len(rows) - 0.5, -0.5))

    return draw, (6.4, 0.3 * len(rows) + 0.8)

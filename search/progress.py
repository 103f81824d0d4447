"""The live display of a running search and its closing table. ``Summary`` knows, the rest draws."""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .choose import is_measured
from .limits import COSTS, limits
from .mlflow_entries import RUNGS
from .record import Entry

PACE = 3  # trials that must have ended until their pace says how long the others will take
LINE_S = 5.0  # between two summary lines where the output is not a terminal


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
        elif kind == "begin":
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
        known = [f for f in self.results[RUNGS[-1]].values() if _sound(f)]
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
        if limit.get("max_drop") is not None and round(drop - limit["max_drop"], 9) > 0:
            out.append(f"{lost(drop)}, the limit is {limit['max_drop']:g}")
        if limit.get("size_bytes") is not None and figures.size_bytes > limit["size_bytes"]:
            out.append(f"{size(figures.size_bytes)}, the limit is {size(limit['size_bytes'])}")
        most = limit.get("compressed_bytes")
        if most is not None and figures.compressed_bytes > most:
            out.append(f"{size(figures.compressed_bytes)} compressed, the limit is {size(most)}")
        return out

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


class Progress:
    """Shows a search while it runs; a context manager. Entries that come before ``with`` (those of
    a search that is resumed) are counted and not shown.

    console: None for standard output. trials, budget_s: what ends the search. clock: in seconds,
    monotonic. teacher, objective: as in the record's search entry, which replaces them.
    ``entry`` and ``note`` are called from the search's thread.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        trials: int | None = None,
        budget_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        teacher: Mapping[str, Any] | None = None,
        objective: Mapping[str, Any] | None = None,
    ) -> None:
        self.summary = Summary(dict(teacher or {}), dict(objective or {}))
        self._console = console or Console()
        self._trials, self._budget_s, self._clock = trials, budget_s, clock
        self.spent_s = 0.0  # of the budget, before the display begins
        self._last = "starting"
        self._began = self._said = clock()
        self._ended_before = 0
        self._in = False
        self._lock = threading.Lock()  # rich draws from a thread of its own
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._began = self._said = self._clock()
        self._ended_before = len(self.summary.ended)
        self._in = True
        if self._live:
            # An error of the search must not leave the cursor hidden: Live restores it on exit.
            self._stack.enter_context(Live(console=self._console, get_renderable=self.panel))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._in = False
        self._stack.close()

    @property
    def _live(self) -> bool:
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def entry(self, entry: Entry) -> None:
        """Takes an entry of the record and shows what changed."""
        with self._lock:
            self.summary.add(entry)
            event = _event(entry, self.summary)
            self._last = event or self._last
        if self._live or not self._in:
            return
        if event and (entry["kind"] == "measured" or entry.get("rung") == RUNGS[-1]):
            self._say(event)
        elif self._clock() - self._said >= LINE_S:
            self._say(self.line())

    def note(self, text: str) -> None:
        """Shows a remark, such as that finalists are being measured."""
        with self._lock:
            self._last = one_line(text)
        if not (self._live and self._in):
            self._say(self._last)

    def line(self) -> str:
        """The state in one line."""
        s = self.summary
        parts = [f"{clock_time(self._clock() - self._began)}  {s.rungs()}", s.state()]
        parts.append(f"best {s.best_line()}")
        if (left := self.left()) is not None:
            parts.append(left[1])
        return "; ".join(parts)

    def left(self) -> tuple[float, str] | None:
        """The share that is done and the rest in words; None when nothing is to end the search.
        Budget and trials are two ends: the nearer one counts."""
        elapsed, ended = self._clock() - self._began, len(self.summary.ended)
        ends: list[tuple[float, float]] = []  # share done, seconds left
        if self._budget_s is not None:
            spent = self.spent_s + elapsed
            ends.append((spent / self._budget_s, self._budget_s - spent))
        if self._trials is not None:
            here = ended - self._ended_before
            rest = (self._trials - ended) * elapsed / here if here >= PACE else math.inf
            ends.append((ended / self._trials, rest))
        if not ends:
            return None
        seconds = min(rest for _, rest in ends)
        words = f"{(self._trials or 0) - ended} trials to come"  # their pace is not known yet
        if seconds < math.inf:
            words = "finishing" if seconds <= 0 else f"{clock_time(seconds)} left"
        return min(1.0, max(share for share, _ in ends)), words

    def panel(self) -> Panel:
        """The display on a terminal."""
        with self._lock:
            rows = [
                ("results", self.summary.rungs()),
                ("trials", self.summary.state()),
                ("best", self.summary.best_line()),
                ("last", self._last),
            ]
            left = self.left()
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True, min_width=7)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        for name, text in rows:
            grid.add_row(
                name, Text(text, overflow="ellipsis")
            )  # Text: what a user's code says is no markup
        if left:
            bar = Table.grid(padding=(0, 2))
            bar.add_column(no_wrap=True, min_width=len(left[1]))  # it is the bar that shrinks
            bar.add_row(Text(left[1]), ProgressBar(1.0, left[0], width=30))
            grid.add_row("time", bar)
        title = f"flyweight, {clock_time(self._clock() - self._began)}"
        return Panel(grid, title=title, title_align="left", expand=False)

    def _say(self, text: str) -> None:
        self._said = self._clock()
        self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def closing_table(result: Mapping[str, Any]) -> Table:
    """The teacher and the front of a ``result.json``. Compressed sizes where those are limited."""
    teacher = result["teacher"]
    packed = (result.get("objective") or {}).get("compressed_bytes") is not None
    bytes_ = "compressed_bytes" if packed else "size_bytes"
    table = Table(
        title="Teacher and front", title_justify="left", title_style="bold",
        show_edge=False, pad_edge=False, collapse_padding=True,  # 80 columns hold all of it
    )  # fmt: skip
    table.add_column("model", no_wrap=True)
    sizes = "compressed" if packed else "size"
    for name in ("speed-up", "lost", "on test", "ms", "predicted", sizes):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    summary = Summary(teacher, result.get("objective") or {})
    table.add_row(
        "teacher", "1.00", "", "", milliseconds(teacher["latency_ms"]), "", size(teacher[bytes_])
    )
    for model in result["front"]:
        best = model["digest"] == result.get("best")
        nearest = model["digest"] == result.get("nearest_miss")
        outside = summary.misses(front_figures(model, teacher))
        table.add_row(
            model["digest"][:10],
            f"{teacher['latency_ms'] / model['latency_ms']:.2f}",
            f"{teacher['metric'] - model['metric']:.2f}",
            _difference(teacher.get("metric_test"), model.get("metric_test")),
            milliseconds(model["latency_ms"]) if is_measured(model) else "",
            milliseconds(model["predicted_latency_ms"][1]),
            size(model[bytes_]),
            "best" if best else "nearest miss" if nearest else "outside" if outside else "",
            style="bold" if best else None,
        )
    return table


def closing_sentence(result: Mapping[str, Any]) -> str:
    """What the best is, or why there is none."""
    models = {model["digest"]: model for model in result["front"]}
    teacher = result["teacher"]
    chosen = models.get(result.get("best") or result.get("nearest_miss") or "")
    if chosen is None:
        return "There is no artifact: no trial finished the full rung."
    summary = Summary(teacher, result.get("objective") or {})
    figures = front_figures(chosen, teacher)
    text = f"{speed(figures.speedup)} {'than' if figures.speedup >= 1 else 'as'} the teacher"
    text = f"{text}, {lost(summary.drop(figures))}"
    test = _difference(teacher.get("metric_test"), chosen.get("metric_test"))
    text += f" ({lost(float(test))} on test)" if test else ""
    ratio = teacher["size_bytes"] / figures.size_bytes
    text += f", {ratio:.1f} times smaller" if ratio >= 1 else f", {1 / ratio:.1f} times larger"
    if summary.objective.get("compressed_bytes") is not None:
        ratio = teacher["compressed_bytes"] / figures.compressed_bytes
        text += f" ({ratio:.1f} times when compressed)"
    if not figures.measured:
        text += "; latency is predicted, not measured"
    if result.get("best"):
        return f"Best: {figures.digest[:10]}, {text}."
    why = "; ".join(summary.misses(figures)) or "its figures cannot be judged"
    return f"Nothing keeps to the limits. Nearest: {figures.digest[:10]}, {text}. Missed: {why}."


def front_figures(model: Mapping[str, Any], teacher: Mapping[str, Any]) -> Figures:
    """The figures of a model of the front of ``result.json``."""
    return Figures(
        model["digest"], RUNGS[-1], float(model["metric"]), float(model["latency_ms"]),
        float(model["size_bytes"]), float(model.get("compressed_bytes") or math.nan),
        float(teacher["latency_ms"]), measured=is_measured(model),
    )  # fmt: skip


def speed(ratio: float) -> str:
    return f"{ratio:.2f} times {'faster' if ratio >= 1 else 'as fast'}"


def milliseconds(ms: float) -> str:
    """Three digits that mean something, of 800 ms as of 0.0123: times repeat within 1%."""
    return f"{ms:.{max(0, 2 - math.floor(math.log10(ms)))}f}" if ms > 0 else f"{ms:g}"


def lost(drop: float) -> str:
    drop = round(drop, 2)
    return f"{-drop:.2f} points gained" if drop < 0 else f"{abs(drop):.2f} points lost"


def size(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def clock_time(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def one_line(text: str) -> str:
    """Text of a user's code on one line, without what could steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _difference(a: float | None, b: float | None) -> str:
    return "" if a is None or b is None else f"{a - b:.2f}"


def _sound(figures: Figures) -> bool:
    return math.isfinite(figures.metric) and figures.latency_ms > 0


def _event(entry: Entry, summary: Summary) -> str | None:
    """What an entry says to someone who looks on."""
    kind = entry["kind"]
    if kind == "result" or kind == "measured":
        figures = summary.results[entry.get("rung", RUNGS[-1])].get(entry["digest"])
        if figures is None:
            return None
        who = f"trial {entry['trial']}, {entry['rung']}" if kind == "result" else "measured"
        text = f"{who}: {figures.digest[:10]}, {speed(figures.speedup)}"
        text = f"{text}, {lost(summary.drop(figures))}" if _sound(figures) else text
        return f"{text} ({one_line(entry['note'])})" if entry.get("note") else text
    if kind == "died":
        return f"trial {entry['trial']} goes on elsewhere: {one_line(entry['error'])}"
    if kind == "end" and entry["reason"] in ("failed", "over_limit"):
        why = one_line(str(entry.get("error") or "")) or entry["reason"].replace("_", " ")
        return f"trial {entry['trial']} {entry['reason'].replace('_', ' ')}: {why}"
    return None

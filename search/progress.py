"""The live display of a running search and its closing table."""

import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..spaces.parameter import RUNGS
from .choose import is_measured
from .counting import LINE_S, Ticker, has_bars
from .record import Entry
from .summary import Summary, front_figures, is_sound
from .words import clock_time, lost, milliseconds, one_line, points, size, speed

REPEATS = 0.01  # within which a measured time repeats: what is that near is equally fast
PACE = 3  # trials that must have ended until their pace says how long the others will take


class Progress:
    """Shows a search while it runs; a context manager. Entries that come before ``with`` (those of
    a search that is resumed) are counted and not shown.

    console: None for standard output. trials, budget_s: what ends the search. clock: in seconds,
    monotonic. teacher, objective: as in the record's search entry, which replaces them.
    ``entry`` is called from the search's thread.
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
        self._console = console or Console(emoji=False)
        self._trials, self._budget_s, self._clock = trials, budget_s, clock
        self.spent_s = 0.0  # of the budget, before the display begins
        self.ending = False  # Ctrl-C came
        self._heard = False  # of a result: until then workers begin, which takes them seconds
        self._last = "starting"
        self._began = self._said = clock()
        self._ended_before = 0
        self._in = False
        self._lock = threading.Lock()  # rich draws from a thread of its own, as the ticker tells
        self._ticker = Ticker(self._tick)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._began = self._said = self._clock()
        self._ended_before = len(self.summary.ended)
        self._in = True
        if self._live:
            # An error of the search must not leave the cursor hidden: Live restores it on exit.
            self._stack.enter_context(Live(console=self._console, get_renderable=self.panel))
        else:
            self._stack.enter_context(self._ticker)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._in = False
        self._stack.close()

    def interrupt(self) -> None:
        """Ctrl-C came: the display says so from now on. Of a signal's handler: it takes no lock."""
        self.ending = True

    @property
    def _live(self) -> bool:
        return has_bars(self._console)

    def entry(self, entry: Entry) -> None:
        """Takes an entry of the record and shows what changed."""
        with self._lock:
            self.summary.add(entry)
            self._heard = self._heard or (self._in and entry["kind"] == "result")
            event = _event(entry, self.summary)
            self._last = event or self._last
        if self._live or not self._in:
            return
        if event and (entry["kind"] == "measured" or entry.get("rung") == RUNGS[-1]):
            self._say(event)
        elif self._clock() - self._said >= LINE_S:
            self._say(self.line())

    def line(self) -> str:
        """The state in one line."""
        s = self.summary
        parts = [f"{clock_time(self._clock() - self._began)}  {s.rungs()}", self._state()]
        parts.append(f"best {s.best_line()}")
        if (left := self.left()) is not None:
            parts.append(left[1])
        return "; ".join(parts)

    def _state(self) -> str:
        state = self.summary.state()
        return state if self._heard else state.replace("running", "starting", 1)

    def left(self) -> tuple[float, str] | None:
        """The share that is done and the rest in words; None when nothing is to end the search.
        Budget and trials are two ends: the nearer one counts. Once the last trial has begun, those
        that stopped may go on, as many and as far as nobody knows beforehand."""
        elapsed, ended = self._clock() - self._began, len(self.summary.ended)
        ends: list[tuple[float, float]] = []  # share done, seconds left
        last = False
        if self._budget_s is not None:
            spent = self.spent_s + elapsed
            ends.append((spent / self._budget_s, self._budget_s - spent))
        if self._trials is not None:
            last = len(self.summary.running | self.summary.ended.keys()) >= self._trials
            here = ended - self._ended_before
            paced = here >= PACE and not last
            rest = (self._trials - ended) * elapsed / here if paced else math.inf
            ends.append((ended / self._trials, rest))
        if not ends:
            return None
        seconds = min(rest for _, rest in ends)
        to_come = (self._trials or 0) - ended  # their pace is not known yet
        words = "the last trials run" if last else f"{to_come} trials to come"
        if seconds <= 0:
            words = "finishing"
        elif seconds < math.inf:
            left = f"{clock_time(seconds)} left"
            words = f"{words}, about {left}" if last else left
        if self.ending:
            words = "interrupted, ending with the best so far"
        return min(1.0, max(share for share, _ in ends)), words

    def panel(self) -> Panel:
        """The display on a terminal."""
        with self._lock:
            rows = [
                ("results", self.summary.rungs()),
                ("trials", self._state()),
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

    def _tick(self) -> None:
        with self._lock:
            text = self.line()
        self._say(text)

    def _say(self, text: str) -> None:
        self._said = self._clock()
        self._ticker.said()
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
            points(teacher["metric"] - model["metric"]),
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
    if test:
        most = summary.objective.get("max_drop")
        over = result.get("best") and most is not None and round(float(test) - most, 9) > 0
        beyond = ", over max_drop" if over else ""
        text += f" ({lost(float(test))} on test{beyond})"
    ratio = teacher["size_bytes"] / figures.size_bytes
    text += f", {ratio:.1f} times smaller" if ratio >= 1 else f", {1 / ratio:.1f} times larger"
    if summary.objective.get("compressed_bytes") is not None:
        ratio = teacher["compressed_bytes"] / figures.compressed_bytes
        text += f" ({ratio:.1f} times when compressed)"
    if not figures.measured:
        text += "; latency is predicted, not measured"
    if result.get("best"):
        return f"Best: {figures.digest[:10]}, {text}.{_sureness(chosen, result)}"
    why = "; ".join(summary.misses(figures)) or "its figures cannot be judged"
    return f"Nothing keeps to the limits. Nearest: {figures.digest[:10]}, {text}. Missed: {why}."


def _sureness(best: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Where ``best`` keeps max_drop by less than the error of its drop, what keeps it by more."""
    most = (result.get("objective") or {}).get("max_drop")
    teacher, error = result["teacher"], best.get("drop_error")
    if most is None or error is None:
        return ""

    def is_sure(model: Mapping[str, Any]) -> bool:
        doubt = model.get("drop_error")
        return doubt is not None and teacher["metric"] - model["metric"] + doubt <= most

    if is_sure(best):
        return ""
    summary = Summary(teacher, result["objective"])
    known = [front_figures(model, teacher) for model in result["front"] if is_sure(model)]
    sure = [figures for figures in known if not summary.misses(figures)]
    text = " It keeps max_drop by less than the standard error of what it lost, "
    text += f"{points(error)} points"
    if not sure:
        return f"{text}, as does all that keeps it."
    fastest = max(figures.speedup for figures in sure)
    equals = [figures for figures in sure if figures.speedup >= (1 - REPEATS) * fastest]
    surest = max(equals, key=lambda figures: figures.metric)
    return f"{text}; {surest.digest[:10]} keeps it by more, {speed(surest.speedup)}."


def _difference(a: float | None, b: float | None) -> str:
    return "" if a is None or b is None else points(a - b)


def _event(entry: Entry, summary: Summary) -> str | None:
    """What an entry says to someone who looks on."""
    kind = entry["kind"]
    if kind == "result" or kind == "measured":
        figures = summary.results[entry.get("rung", RUNGS[-1])].get(entry["digest"])
        if figures is None:
            return None
        who = f"trial {entry['trial']}, {entry['rung']}" if kind == "result" else "measured"
        text = f"{who}: {figures.digest[:10]}, {speed(figures.speedup)}"
        text = f"{text}, {lost(summary.drop(figures))}" if is_sound(figures) else text
        return f"{text} ({one_line(entry['note'])})" if entry.get("note") else text
    if kind == "died":
        return f"trial {entry['trial']} goes on elsewhere: {one_line(entry['error'])}"
    if kind == "end" and entry["reason"] in ("failed", "over_limit"):
        why = one_line(str(entry.get("error") or "")) or entry["reason"].replace("_", " ")
        return f"trial {entry['trial']} {entry['reason'].replace('_', ' ')}: {why}"
    return None

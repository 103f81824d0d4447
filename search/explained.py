"""An explanation in words, tables and a figure, for a terminal and for the report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from .drawing import Colours, svg
from .words import speed

SURE = 2.0  # standard deviations from 0 at which a change is taken to be one
BARS = 20  # kernels that are drawn: those that take most
AT_MOST = "< stands before the most that a kernel may take, where no more is known of it alone"
ROW = 0.4  # inches, of a kernel in the figure

Found = Mapping[str, Any]  # what ``explain.explanation`` gives


@dataclass(frozen=True)
class Sheet:
    """A table. words: how many columns, from the left, hold words."""

    title: str
    columns: Sequence[str]
    words: int
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Explained:
    """headline: what is predicted, a sentence. int8: layers that are slower in it, one a line."""

    digest: str
    headline: str
    kernels: Sheet
    kinds: Sheet
    groups: Sheet
    int8: Sequence[str]


def explained(found: Found) -> Explained:
    """Raises KeyError, TypeError or ValueError for what is no explanation."""
    low, middle, high = found["predicted_latency_ms"]
    teacher_ms = found["teacher_predicted_latency_ms"][1]
    places = places_of(middle)
    return Explained(
        digest=found["digest"],
        headline=(
            f"{middle:.{places}f} ms predicted ({low:.{places}f} to {high:.{places}f}) against "
            f"{teacher_ms:.{places}f} ms of the teacher: {speed(teacher_ms / middle)}"
        ),
        kernels=_kernels(found, middle, teacher_ms, places),
        kinds=_kinds(found, middle, places),
        groups=_groups(found, places),
        int8=_int8(found, places),
    )


def print_explanation(found: Found, console: Console | None = None) -> None:
    """The explanation on a terminal."""
    console, why = console or Console(emoji=False), explained(found)
    print_sheet(why.kernels, console)
    print_sheet(why.kinds, console)
    console.print(f"{why.headline}.", highlight=False, soft_wrap=True)
    if why.groups.rows:
        print_sheet(why.groups, console)
    for line in why.int8:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"± is {SURE:g} standard deviations; {AT_MOST}.", highlight=False, soft_wrap=True)


def print_sheet(sheet: Sheet, console: Console) -> None:
    """The table on a terminal."""
    # No more room between columns than needed: a terminal has 80 characters.
    table = Table(title=sheet.title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title_justify = "left"
    for at, name in enumerate(sheet.columns):
        justify: JustifyMethod = "left" if at < sheet.words else "right"
        table.add_column(name, justify=justify, no_wrap=at != 1)
    for row in sheet.rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: names are no markup
    console.print(table)


def _kernels(found: Found, middle: float, teacher_ms: float, places: int) -> Sheet:
    rows = [
        [_name(row), _work(row), _width(row), *_times(row, middle, places)]
        for row in found["kernels"]
    ]
    total = ["all", "", "", f"{teacher_ms:.{places}f}", f"{middle:.{places}f}", ""]
    columns = ("kernel", "work", "width", "teacher, ms", "policy, ms", "share")
    return Sheet(f"Policy {found['digest'][:10]}, kernel by kernel", columns, 3, [*rows, total])


def _kinds(found: Found, middle: float, places: int) -> Sheet:
    rows = [[_work(row), *_times(row, middle, places)] for row in found["kinds"]]
    return Sheet("By kind of work", ("work", "teacher, ms", "policy, ms", "share"), 1, rows)


def _times(row: Mapping[str, Any], middle: float, places: int) -> list[str]:
    """The teacher's time, the policy's, and its share of the whole; "" where there is none."""
    ms, deviation = row["ms"], row["deviation_ms"]
    return [
        time_of(row["teacher_ms"], row["teacher_deviation_ms"], places),
        time_of(ms, deviation, places),
        f"{ms / middle:.1%}" if ms and is_sure(ms, deviation) else "",
    ]


def time_of(ms: float | None, deviation_ms: float | None, places: int) -> str:
    """A time with how sure it is, or what it is at most; "" where there is none."""
    if not ms or deviation_ms is None:
        return ""
    if not is_sure(ms, deviation_ms):
        return f"<{max(0.0, ms + SURE * deviation_ms):.{places}f}"
    return _sure(f"{ms:.{places}f}", deviation_ms, places)


def is_sure(ms: float, deviation_ms: float) -> bool:
    """Whether a time is known to be one: it is above 0 by more than it is doubted."""
    return ms > SURE * deviation_ms


def _sure(text: str, deviation_ms: float, places: int) -> str:
    return f"{text} ±{SURE * deviation_ms:.{places}f}"


def _groups(found: Found, places: int) -> Sheet:
    def cell(case: Mapping[str, Any] | None) -> str:
        return "" if case is None else f"{case['width']}: {_signed(case, places)}"

    rows = [
        [row["name"], _width(row), cell(row["narrower"]), cell(row["wider"])]
        for row in found["groups"]
    ]
    columns = ("group", "width", "narrower, ms", "wider, ms")
    return Sheet("What the next legal width of a group would change", columns, 1, rows)


def _int8(found: Found, places: int) -> list[str]:
    lines = []
    for layer in found["layers"]:
        if words := slower_in_int8(layer):
            (here,) = [case for case in layer["widths"] if case["width"] == layer["width"]]
            lines.append(
                f"{layer['name']}: int8 is slower {words}; it is {layer['precision']} at "
                f"{layer['width']}, where int8 takes {_signed(here, places)} ms"
            )
    return lines or ["No layer is surely slower in int8 than in fp32 at any of its widths."]


def slower_in_int8(layer: Mapping[str, Any]) -> str:
    """At which widths an entry of ``layers`` is surely slower in int8 than in fp32, in words; ""
    where it is at none."""
    known = [case for case in layer["widths"] if case["change_ms"] is not None]
    slow = [case["width"] for case in known if case["change_ms"] > SURE * case["deviation_ms"]]
    rest = [case["width"] for case in known if case["width"] not in slow]
    if not slow:
        return ""
    if layer["group"] is None:
        return f"at its {slow[0]} channels"
    if not rest:
        return "at every width"
    if max(slow) < min(rest):
        return f"at {max(slow)} channels and below"
    if min(slow) > max(rest):
        return f"at {min(slow)} channels and above"
    return f"at {', '.join(map(str, slow))} channels"


def bars_svg(found: Found) -> str:
    """Time per kernel of teacher and policy, the largest one by one, the others together."""
    rows, places = found["kernels"], places_of(found["predicted_latency_ms"][1])

    def most(row: Mapping[str, Any]) -> float:
        return max(row["ms"] or 0.0, row["teacher_ms"] or 0.0)

    # One kernel more instead of "1 other".
    least = sorted(map(most, rows), reverse=True)[BARS] if len(rows) > BARS + 1 else -math.inf
    others = [row for row in rows if most(row) <= least]

    def bar(
        axes: Axes, at: float, row: Mapping[str, Any], whose: str, ink: str, **how: Any
    ) -> None:
        ms = row[f"{whose}ms"]
        if ms is None:
            return
        error = SURE * row[f"{whose}deviation_ms"]
        # A time below 0 is one that is not known apart from its neighbours'.
        axes.barh(at, max(ms, 0.0), 0.2, **how)
        ends = max(0.0, ms - error), max(0.0, ms + error)
        axes.plot(ends, (at, at), color=ink, linewidth=0.8, alpha=0.6)

    def draw(axes: Axes, colours: Colours) -> None:
        drawn = [row for row in rows if most(row) > least]
        for at, row in enumerate(drawn):
            colour = colours.best if row["precision"] == "int8" else colours.front
            # Above the bars and not beside them, where a long name would leave no room.
            axes.text(0, at + 0.22, f" {_label(row)}", va="center", parse_math=False)
            bar(axes, at + 0.56, row, "teacher_", colours.ink, color=colours.ink, alpha=0.4)
            bar(axes, at + 0.78, row, "", colours.ink, color=colour)
        if others:  # no bar: together they might dwarf the rest
            now, was = (sum(row[key] or 0.0 for row in others) for key in ("ms", "teacher_ms"))
            text = f" {len(others)} others: {now:.{places}f} ms, teacher {was:.{places}f} ms"
            axes.text(0, len(drawn) + 0.22, text, va="center")
        axes.set(xlabel="ms", xlim=(0, None), ylim=(len(drawn) + bool(others) / 2, 0), yticks=[])
        axes.locator_params(axis="x", nbins=5)  # letters are drawn larger on a phone

    height = ROW * (len(rows) - len(others) + bool(others) / 2) + 0.6
    label = "Time per kernel of teacher and policy; the table says the same"
    return svg(draw, (6.4, height), label)


def _label(row: Mapping[str, Any]) -> str:
    return " ".join(part for part in (_name(row), _width(row), row["precision"] or "") if part)


def _name(row: Mapping[str, Any]) -> str:
    return row["name"] or "(each call)"


def _work(row: Mapping[str, Any]) -> str:
    return f"{row['kind']} {row['precision'] or 'gone'}" if row["precision"] != "" else row["kind"]


def _width(row: Mapping[str, Any]) -> str:
    """Channels of how many."""
    if row["full_width"] is None or row["width"] is None:
        return ""
    return f"{row['width']}/{row['full_width']}"


def _signed(case: Mapping[str, Any], places: int) -> str:
    """A change in ms, with how sure it is."""
    if case["change_ms"] is None:
        return "not possible"
    return _sure(f"{case['change_ms']:+.{places}f}", case["deviation_ms"], places)


def places_of(ms: float) -> int:
    """Places behind the point of times that add up to ``ms``: what is less than a fifth of a
    per cent of it does not matter."""
    return max(0, math.ceil(-math.log10(0.002 * ms))) if ms > 0 else 4

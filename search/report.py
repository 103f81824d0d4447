"""The report of a search: one HTML file that needs nothing else, tables as CSV, a figure as PNG."""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import jinja2
from markupsafe import Markup

from ..spaces.parameter import RUNGS
from . import beside, figures, words
from .drawing import png, svg
from .explained import AT_MOST, Sheet, bars_svg
from .exports import as_csv, front_rows, trial_rows
from .fragile import groups_sheet, how_judged, layers_sheet
from .reading import Run, read_run, traits
from .run_files import EXPLANATION, PAGE
from .storage import write_whole
from .strip import strip

FILES = (PAGE, "front.csv", "front.png", "trials.csv")
_REASONS = 40  # of failure that are listed
_OTHERS = 100  # artifacts off the front that are listed; trials.csv has all


def write_report(run_dir: Path, others: Sequence[Path] = ()) -> Path:
    """Writes RUN_DIR/report.html, front.csv, trials.csv and front.png from record.jsonl and, once
    it is there, result.json. others: runs to compare with. Returns the page's path. Raises BadInput
    for a record or result that is missing or damaged and for a run that cannot be compared, OSError
    where it cannot write."""
    return write_report_of(read_run(run_dir), others)


def write_report_of(run: Run, others: Sequence[Path] = ()) -> Path:
    """The same for a run that was read."""
    compared = beside.read_beside(run, others)
    page = run.folder / PAGE
    write_whole(run.folder / "front.csv", as_csv(front_rows(run)).encode())
    write_whole(run.folder / "trials.csv", as_csv(trial_rows(run)).encode())
    write_whole(run.folder / "front.png", png(figures.front_figure(run, compared)[0], figures.WIDE))
    write_whole(page, render(run, compared).encode())
    return page


def render(run: Run, compared: Sequence[Run] = ()) -> str:
    """The page."""
    templates = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=templates,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": words.size, "lost": words.lost, "points": words.points, "speed": words.speed,
        "metric": words.metric_value, "ms": words.milliseconds, "clock": words.clock_time,
    }  # fmt: skip
    drawing, hidden = figures.front_figure(run, compared)
    first = next(entry for entry in run.entries if entry["kind"] == "search")
    return environment.get_template(
        "report.html"
    ).render(
        run=run,
        summary=run.summary,
        search=run.search,
        target=(run.result or run.search).get("target") or {},  # it may be measured elsewhere
        teacher=run.summary.teacher,
        # The first session: what it took is that of all.
        began=datetime.fromtimestamp(first["time"], UTC).strftime("%Y-%m-%d %H:%M UTC"),
        wall=words.clock_time(run.result["wall_s"]) if run.result else None,
        ends=Counter(run.summary.ended.values()).most_common(),
        failures=run.failures[:_REASONS],
        unlisted=sum(len(trials) for _, trials in run.failures[_REASONS:]),
        traits=lambda row: traits(row.policy, run.search),
        rungs=RUNGS,
        # What is drawn is made by us from numbers, and from names that are escaped where drawn.
        svg=Markup(svg(drawing, figures.WIDE, "Metric against speed-up; the tables say the same")),
        bars=Markup(bars_svg(run.found)) if run.found else "",
        hidden=hidden,
        others=run.others[:_OTHERS],
        beside=beside.table(run, compared),
        predicted_by=run.search.get("predicted_by"),
        strip=strip(run),
        fragile=_fragile(run),
        judged=how_judged(run.folder),
        explanation=EXPLANATION,
        at_most=AT_MOST,
        **_growth(run),
        **_costs(run),
        **_exactness(run),
    )


def _growth(run: Run) -> dict[str, object]:
    moments = [moment for moment in figures.growth(run) if moment.artifacts]
    label = "The front after each quarter of the time; the table says the same"
    drawn = svg(figures.growth_figure(moments), figures.WIDE, label) if moments else ""
    looks = figures.GROWN[-len(moments) :] if moments else ()
    return {"moments": list(zip(moments, looks, strict=True)), "grown": Markup(drawn)}


def _costs(run: Run) -> dict[str, object]:
    costs = figures.costs(run)
    if not costs:
        return {"costs": [], "cost_svg": "", "each": 1}
    drawing, each = figures.cost_figure(run)
    drawn = svg(drawing, (6.4, 2.6), "Seconds per trial; the table says the same in sum")
    return {"costs": costs, "cost_svg": Markup(drawn), "each": each}


def _exactness(run: Run) -> dict[str, object]:
    found = figures.exactness(run)
    if found is None:
        return {"exactness": None, "exactness_svg": ""}
    label = "Measured against predicted latency; the table of the front says the same"
    return {"exactness": found, "exactness_svg": Markup(svg(*figures.exactness_figure(run), label))}


def _fragile(run: Run) -> list[Sheet]:
    """What single choices harm, beside what the chosen policy chose."""
    if run.harms is None:
        return []
    policy = run.chosen.policy if run.chosen else None
    sheets = groups_sheet(run.harms, policy), layers_sheet(run.harms, policy)
    return [sheet for sheet in sheets if sheet.rows]

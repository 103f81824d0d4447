"""MLflow's own page, in a real browser: what one who reviews a search looks for is there.

``FLYWEIGHT_PICTURES=docs/pictures pytest tests/test_mlflow_page.py`` takes the picture of the docs.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flyweight.search.report import FILES, write_report
from flyweight.search.tracking import MlflowTracker, Undelivered

pytestmark = pytest.mark.slow
COLUMNS = ("metric", "latency_ms", "measured_latency_ms", "size_bytes", "int8_layers",
           "flyweight.reason")  # fmt: skip
# The page draws only what is in sight: as high as its list of columns, and as all charts of a run.
WINDOW, CHARTS = {"width": 1340, "height": 900}, {"width": 1340, "height": 2000}
PATIENCE_MS = 120_000  # two busy cores
PICTURE = {"width": 1340, "height": 620}
CALM = """
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""  # else a chat covers a third of the page


@dataclass
class Shown:
    """A search in a real MLflow. pieces: what its record is made of, see tests/test_report.py."""

    url: str
    page: Any
    pieces: ModuleType
    runs: dict[str, str]  # ids, by name

    def open(self, path: str, *words: str, window: dict[str, int] = WINDOW) -> None:
        """The page at ``path``, once it shows all of ``words``."""
        self.page.set_viewport_size(window)
        self.page.goto("about:blank")  # a change behind the # loads nothing anew
        self.page.goto(f"{self.url}/#/{path}")
        self.see(*words)

    def see(self, *words: str) -> None:
        """Waits until the page shows all of ``words``: it loads and draws piece by piece."""
        from playwright.sync_api import TimeoutError as Unseen

        shows = "word => document.body.innerText.replace(/\\s+/g, ' ').includes(word)"
        for word in words:
            try:
                self.page.wait_for_function(shows, arg=word)
            except Unseen:
                raise AssertionError(f"no {word!r} in: {self.page.inner_text('body')}") from None


@pytest.fixture(scope="module")
def shown(
    browser: Any, load: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shown]:
    from mlflow import MlflowClient

    folder, pieces = tmp_path_factory.mktemp("mlflow"), load("tests/test_report.py")
    uri = f"sqlite:///{folder}/mlflow.db"
    measured = [
        {"kind": "measured", "digest": pieces.digest(trial), "latency_ms": ms,
         "latency_spread": 0.012, "teacher_latency_ms": 0.8, "time": pieces.START + 300}
        for trial, (_, _, _, ms, _) in pieces.FULL.items() if ms
    ]  # fmt: skip
    entries = [*pieces.entries(), *measured]
    run = pieces.run_directory(folder / "run", entries, pieces.result())
    write_report(run)
    tracker = MlflowTracker(uri, "fashion-mnist", str(folder / "artifacts"), "fashion-1")
    for entry in entries:
        if entry["kind"] != "begin":
            tracker.record(entry)
    assert tracker.finish("FINISHED", [run / file for file in FILES], 120) == Undelivered()
    serving = load("tests/test_serve.py")
    serving.register(uri, folder / "artifact", serving.tiny(), "1" * 64)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("fashion-mnist")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    server = load("tests/test_tracking.py").Server(folder)
    page = browser.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.add_init_script(CALM)
    try:
        server.start()
        yield Shown(
            f"http://127.0.0.1:{server.port}", page, pieces,
            {run.info.run_name: run.info.run_id for run in runs}
            | {"experiment": experiment.experiment_id},
        )  # fmt: skip
    finally:
        page.close()
        server.kill()


def test_trials_sort_and_have_columns_for_what_is_compared(shown: Shown) -> None:
    # Not by a click on "Model training", which loads the trials anew: a list of columns that is
    # opened before they are there shows no metrics.
    order = "workflowType=machine_learning&orderByKey=metrics.%60measured_latency_ms%60"
    place = f"experiments/{shown.runs['experiment']}/runs?{order}&orderByAsc=true"
    shown.open(place, "trial 2", "16 matching runs")
    page = shown.page
    page.get_by_role("button", name="Columns").click()
    columns = page.get_by_role("dialog")  # its "tree" has no columns: those are beside it
    for name in ("Dataset", "Source", "Models", *COLUMNS):
        columns.get_by_text(name, exact=True).click()
    page.keyboard.press("Escape")
    columns.wait_for(state="hidden")
    shown.see(*COLUMNS, "0.312", "92.84", "0.318", "610000", "finished", "stopped", "failed")
    names = re.findall(r"^(trial \d+)$", page.inner_text("body"), re.MULTILINE)
    assert names[:3] == ["trial 2", "trial 1", "trial 3"]  # by measured latency
    if where := os.environ.get("FLYWEIGHT_PICTURES"):
        page.set_viewport_size(PICTURE)
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)
        page.screenshot(path=Path(where) / "mlflow.png")


def test_trials_that_failed_are_found_with_their_reason(shown: Shown) -> None:
    where = "searchFilter=tags.%60flyweight.reason%60%20%3D%20%27failed%27"
    # Three, and the search that they are of.
    shown.open(f"experiments/{shown.runs['experiment']}/runs?{where}", " 4 matching runs")
    place = f"experiments/{shown.runs['experiment']}/runs/{shown.runs['trial 12']}"
    shown.open(place, "flyweight.error", "parity: 97.1% of predictions agree", "Failed")


def test_the_search_has_its_report_its_target_and_its_trials(shown: Shown) -> None:
    place = f"experiments/{shown.runs['experiment']}/runs/{shown.runs['fashion-1']}"
    shown.open(
        place, "flyweight.fingerprint", "teacher_metric", "teacher_latency_ms", "target.runtime",
        "onnxruntime", "avx2 7f", "flyweight.versions.torch", "Child runs", "trial 14",
    )  # fmt: skip
    files = ("front.csv", "front.png", "trials.csv")
    shown.open(f"{place}/artifacts/report.html", "report.html", *files)
    report = shown.page.frame_locator("iframe")
    report.get_by_text("2.56 times faster, 0.26 points lost").wait_for()


def test_a_trial_shows_each_rung_both_latencies_and_its_policy(shown: Shown) -> None:
    place = f"experiments/{shown.runs['experiment']}/runs/{shown.runs['trial 1']}"
    shown.open(
        place, "flyweight.rung", "metric 92.84", "latency_ms 0.318", "measured_latency_ms 0.312",
        "int8_layers 4", "criterion taylor", "qat true", "flyweight.reason : finished",
    )  # fmt: skip
    shown.open(f"{place}/model-metrics", "measured_latency_ms", window=CHARTS)
    drawn = "[...document.querySelectorAll('.js-plotly-plot')].flatMap(p => p.data.map(d => d.y))"
    rungs = "61,88.1,92.84"  # the metric at each
    has_them = f"{drawn}.some(y => String(y) == '{rungs}')"
    shown.page.wait_for_function(has_them)


def test_a_registered_model_shows_what_it_takes_and_gives(shown: Shown) -> None:
    shown.open("models/net/versions/1", "Schema")
    shown.page.get_by_text(re.compile(r"Inputs \(1\)")).click()
    shown.page.get_by_text(re.compile(r"Outputs \(1\)")).click()
    shown.see("input", "output", "float32", "flyweight.digest", "flyweight.metric", "champion")

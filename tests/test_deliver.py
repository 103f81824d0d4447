"""What MLflow lacks of a search is told afterwards, from the record."""

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from flyweight.search.cli import main


@pytest.fixture
def pieces(load: Callable[[str], ModuleType]) -> ModuleType:
    """Entries of a record."""
    return load("tests/test_tracking.py")


@pytest.fixture
def run(tmp_path: Path, pieces: ModuleType, mlflow_database: Path) -> Path:
    """The run directory of a search whose MLflow was away at the end."""
    uri = f"sqlite:///{shutil.copy(mlflow_database, tmp_path)}"
    spec = {
        "task": "nowhere.py:Net", "objective": {"speedup": 2.0},
        "tracking": {"uri": uri, "experiment": "late"},
    }  # fmt: skip
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    (folder / "result.json").write_text(json.dumps({"front": [], "mlflow_run_id": None}))
    (folder / "front.csv").write_text("digest\n")
    begin = {"kind": "begin", "trial": 0, "digest": "0", "time": 1.0}
    header = pieces.search_entry(search_id="late-1")
    entries = [header, begin, *(e for e in pieces.RECORD[1:] if e.get("trial") != 3)]
    write(folder, entries)
    return folder


def write(folder: Path, entries: list[dict[str, Any]]) -> None:
    (folder / "record.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))


def deliver(*words: Any) -> Result:
    return CliRunner().invoke(
        main, ["deliver", *map(str, words)], env={"MLFLOW_TRACKING_URI": None}
    )


def runs(run: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("late")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def test_everything_arrives_once(run: Path) -> None:
    for _ in range(2):
        done = deliver(run)
        assert done.exit_code == 0, done.output
        found = {r.data.tags.get("flyweight.trial", "search"): r for r in runs(run)}
        assert sorted(found) == ["late-1/0", "late-1/1", "late-1/2", "search"]
        assert len(runs(run)) == len(found)
    parent = found["search"]
    assert parent.info.status == "FINISHED"
    assert found["late-1/0"].data.metrics["measured_latency_ms"] == 0.8
    assert found["late-1/2"].info.status == "FAILED"
    stored = {place.name for place in Path(parent.info.artifact_uri[5:]).iterdir()}
    assert stored == {"result.json", "spec.yaml", "front.csv"}
    assert json.loads((run / "result.json").read_text())["mlflow_run_id"] == parent.info.run_id
    assert parent.info.run_id in done.output


def test_a_search_that_was_cut_off_is_killed(run: Path, pieces: ModuleType) -> None:
    write(run, [pieces.search_entry(search_id="late-1"), pieces.result(0)])
    assert deliver(run).exit_code == 0
    assert {r.info.status for r in runs(run)} == {"KILLED"}


def test_a_trial_that_goes_on_has_not_ended(run: Path, pieces: ModuleType) -> None:
    header = pieces.search_entry(search_id="late-1")
    stopped = [header, pieces.result(1), pieces.end(1, "stopped")]
    on = [*stopped, pieces.again(1, 1016.0)]
    for entries, status in (
        (stopped, "FINISHED"),
        (on, "KILLED"),
        ([*on, pieces.end(1, time=1017.0)], "FINISHED"),
    ):
        write(run, entries)
        assert deliver(run).exit_code == 0
        assert {r.info.status for r in runs(run)} == {status}


def test_what_cannot_be_delivered_is_told(run: Path) -> None:
    with (run / "record.jsonl").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "being written by another process" in deliver(run).output
    secret = deliver(run, "--tracking-uri", "postgresql://ann:***@host/db")
    assert (secret.exit_code, "--tracking-uri" in secret.output) == (2, True)
    refused = deliver(run, "--tracking-uri", "no-such-scheme://host")
    assert (refused.exit_code, "MLflow lacks" in refused.output) == (1, True)
    assert "the record keeps them" in refused.output
    write(run, [])
    assert "its record is empty" in deliver(run).output
    (run / "record.jsonl").unlink()
    assert "no record.jsonl" in deliver(run).output
    values = yaml.safe_load((run / "spec.yaml").read_text()) | {"tracking": None}
    (run / "spec.yaml").write_text(yaml.safe_dump(values))
    assert "tracking: null" in deliver(run).output

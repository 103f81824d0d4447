"""The trial as a worker runs it, here without Ray: what it leaves behind and takes up again."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from flyweight.compressors import (
    RUNGS,
    ClassificationTask,
    Prepared,
    Schedule,
    compress,
    prepare,
)
from flyweight.kernels import make_runtime
from flyweight.search.spec import Resources
from flyweight.search.storage import Storage
from flyweight.search.store import checkpoint_folder
from flyweight.search.trial import not_a_number
from flyweight.search.workers import KEPT, CompressionTrial, Job
from flyweight.spaces import Distill, Policy, Prune

SEED = 3


@pytest.fixture(scope="module")
def prepared(networks: ModuleType) -> Prepared:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(96, 12), torch.arange(96) % 4)
    task = ClassificationTask(networks.make("mlp")[0], data, data)
    return prepare(task, make_runtime("onnxruntime", 1), Schedule(2, 0.5, 32))


POLICY = Policy(Prune({"a": 8}), distill=Distill(learning_rate=0.01))


class Worker:
    """A process that ran no trial before. steps: of what it was asked."""

    def __init__(self, prepared: Prepared, run_dir: Path, inputs: str = "inputs") -> None:
        self.trial = object.__new__(CompressionTrial)  # its __init__ is Tune's
        spec: Any = SimpleNamespace(search=SimpleNamespace(seed=SEED))
        self.trial.job = Job(spec, Storage(run_dir), {}, inputs, {})
        self.trial.prepared = prepared

    def begin(self, rung: str) -> None:
        assert self.trial.reset_config({"policy": POLICY.canonical(), "rung": rung})

    def step(self) -> dict[str, Any]:
        outcome = json.loads(self.trial.step()["outcome"])
        outcome.pop("seconds", None)
        outcome.pop("rung_seconds", None)
        return outcome  # type: ignore[no-any-return]


@pytest.fixture
def climbed(prepared: Prepared, tmp_path: Path) -> list[dict[str, Any]]:
    """The outcomes of a trial that nothing happened to, whose checkpoints are in tmp_path."""
    worker = Worker(prepared, tmp_path)
    worker.begin(RUNGS[0])
    outcomes = [worker.step() for _ in RUNGS]
    assert [o["rung"] for o in outcomes] == list(RUNGS)
    return outcomes


def files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / checkpoint_folder(POLICY.digest)).iterdir())


def test_a_trial_goes_on_elsewhere_as_if_nothing_had_happened(
    prepared: Prepared, tmp_path: Path, climbed: list[dict[str, Any]], monkeypatch: Any
) -> None:
    assert [p.name.partition("-")[0] for p in files(tmp_path)] == list(KEPT) == ["short"]
    asked: list[str] = []

    def counted(prepared: Prepared, policy: Policy, rung: str, *rest: Any) -> Any:
        asked.append(rung)
        return compress(prepared, policy, rung, *rest)

    monkeypatch.setattr("flyweight.search.workers.compress", counted)
    other = Worker(prepared, tmp_path)
    other.begin("full")
    assert other.step() == climbed[2]
    assert asked == ["full"]  # short is not done again
    other.begin("short")  # the same worker takes another trial up
    assert [other.step(), other.step()] == climbed[1:]
    assert asked == ["full", "recalibrate", "short", "full"]


def test_what_is_worked_out_again_is_part_of_the_time_of_its_rung(
    prepared: Prepared, tmp_path: Path, monkeypatch: Any
) -> None:
    now = [0.0]

    def takes_a_second(*arguments: Any) -> Any:
        now[0] += 1
        return compress(*arguments)

    monkeypatch.setattr("flyweight.search.workers.compress", takes_a_second)
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("flyweight.search.workers.time", clock)
    worker = Worker(prepared, tmp_path)
    worker.begin("full")  # its checkpoint is lost
    assert json.loads(worker.trial.step()["outcome"])["rung_seconds"] == 2.0


def test_the_answers_of_the_teacher_stay_in_the_object_store(
    prepared: Prepared, tmp_path: Path, monkeypatch: Any
) -> None:
    """No worker has a copy of its own, and none writes into what all share."""
    array = prepared.epoch(0).answers.numpy().copy()
    before = array.copy()
    array.flags.writeable = False  # as Ray gives it
    monkeypatch.setattr(
        "flyweight.search.workers.prepare_task",
        lambda _, answers, *__: replace(prepared, answers=answers),
    )
    worker = Worker(prepared, tmp_path)
    spec: Any = SimpleNamespace(search=SimpleNamespace(seed=SEED), resources=Resources())
    job = replace(worker.trial.job, answers={0: array}, spec=spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        worker.trial.setup({"policy": POLICY.canonical(), "rung": RUNGS[0]}, job)
    assert worker.trial.prepared
    assert worker.trial.prepared.answers[0].data_ptr() == array.ctypes.data
    assert [worker.step()["rung"] for _ in RUNGS] == list(RUNGS)
    assert (array == before).all()


@pytest.mark.parametrize("how", ["damaged", "missing", "of other inputs"])
def test_without_a_checkpoint_it_begins_anew_and_says_so(
    how: str, prepared: Prepared, tmp_path: Path, climbed: list[dict[str, Any]]
) -> None:
    (place,) = files(tmp_path)
    if how == "damaged":
        place.write_bytes(place.read_bytes()[:-1])
    if how == "missing":
        place.unlink()
    other = Worker(prepared, tmp_path, "others" if how == "of other inputs" else "inputs")
    other.begin("full")
    outcome = other.step()
    note = outcome.pop("note")
    assert ("damaged" if how == "damaged" else "no checkpoint") in note
    assert outcome == climbed[2]


def test_a_checkpoint_that_cannot_be_written_fails_no_trial(
    prepared: Prepared, tmp_path: Path, climbed: list[dict[str, Any]]
) -> None:
    run_dir = tmp_path / "another"
    run_dir.mkdir()
    (run_dir / "checkpoints").write_text("a file where the folder should be")
    worker = Worker(prepared, run_dir)
    worker.begin(RUNGS[0])
    assert [worker.step() for _ in RUNGS] == climbed


def test_what_the_code_of_a_task_raises_fails_the_trial_alone(
    prepared: Prepared, tmp_path: Path, climbed: list[dict[str, Any]], monkeypatch: Any
) -> None:
    """Its worker lives on: nothing is prepared anew, and no traceback is printed."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes do\nnot match")

    worker = Worker(prepared, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(prepared.task, "loss", broken)
        worker.begin("short")
        (error,) = [worker.step()["error"]]
    assert error.startswith("short: RuntimeError: shapes do not match (test_workers.py, line ")
    worker.begin("short")
    assert worker.step() == climbed[1]


def test_what_has_no_figures_leaves_no_artifact(
    prepared: Prepared, tmp_path: Path, monkeypatch: Any
) -> None:
    run_dir = tmp_path / "another"
    worker = Worker(prepared, run_dir)
    monkeypatch.setattr(prepared.task, "metric", lambda *_: float("nan"))
    worker.begin("full")
    outcome = worker.step()
    assert not_a_number(outcome) == "full: the metric is nan"
    assert outcome["artifact"] is None
    assert not (run_dir / "artifacts").exists()


class Away(Storage):
    """A storage that is away when artifacts are written the first ``times`` times."""

    def __init__(self, place: Path, times: int) -> None:
        super().__init__(place)
        self.times = times

    def under(self, name: str) -> Storage:
        if name.startswith("artifacts") and self.times:
            self.times -= 1
            raise OSError("it is away")
        return super().under(name)


def test_a_storage_that_is_away_for_a_moment_costs_no_rung(
    prepared: Prepared, tmp_path: Path, climbed: list[dict[str, Any]], monkeypatch: Any
) -> None:
    monkeypatch.setattr("flyweight.search.workers.PAUSES_S", (0.0, 0.0))
    worker = Worker(prepared, tmp_path)
    worker.trial.job = replace(worker.trial.job, storage=Away(tmp_path, 2))
    worker.begin("full")
    assert worker.step() == climbed[2]
    worker.trial.job = replace(worker.trial.job, storage=Away(tmp_path, 3))
    worker.begin("full")
    assert worker.step()["unstored"] == "full: the artifact cannot be stored: it is away"


def test_an_artifact_that_cannot_be_stored_is_no_fault_of_its_policy(
    prepared: Prepared, tmp_path: Path, climbed: list[dict[str, Any]], monkeypatch: Any
) -> None:
    monkeypatch.setattr("flyweight.search.workers.PAUSES_S", ())
    run_dir = tmp_path / "another"
    run_dir.mkdir()
    (run_dir / "artifacts").write_text("a file where the folder should be")
    worker = Worker(prepared, run_dir)
    worker.begin(RUNGS[0])
    assert [worker.step(), worker.step()] == climbed[:2]
    outcome = worker.step()
    assert outcome.keys() == {"rung", "unstored"}
    assert str(run_dir) in outcome["unstored"]
    (run_dir / "artifacts").unlink()
    worker.begin(RUNGS[2])  # the controller sends it again
    assert worker.step() == climbed[2]

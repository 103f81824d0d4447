"""What a search that goes on may change, and what it may not."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from flyweight.search import driver, pricing
from flyweight.search.finder import Price
from flyweight.search.limits import Limits, limits_of
from flyweight.search.meter import Device
from flyweight.search.opening import (
    check_same,
    is_done,
    known_sizes,
    lasting,
    opening_entry,
    priced_alike,
)
from flyweight.search.pricing import predicted
from flyweight.search.progress import Progress
from flyweight.search.ready import ready
from flyweight.search.record import MemoryRecord
from flyweight.search.spec import Resources, Search, load_spec
from flyweight.search.storage import Storage
from flyweight.search.store import checkpoint_folder
from flyweight.spaces import BadInput, Policy, Prune

TASK = """
import torch
from torch import nn
from torch.nn import functional as F

class Net:
    train = val = [(x, x[:1]) for x in torch.randn(40, 6, generator=torch.Generator())]
    def __init__(self, weights=0):
        self.weights = weights
    def model(self):
        torch.manual_seed(self.weights)
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    def example_input(self):
        return torch.zeros(1, 6)
    def loss(self, output, target):
        return F.mse_loss(output, target)
    def metric(self, output, target):
        return 97.0
"""


def opened(folder: Path, record: MemoryRecord, text: str = "") -> dict[str, Any]:
    """The entry that opens a session of the search in ``folder``, with ``text`` in its spec."""
    (folder / "task.py").write_text(TASK)
    path = folder / "search.yaml"
    path.write_text(f"task: task.py:Net\nobjective: {{max_drop: 1}}\n{text}\n")
    found = ready(load_spec(path))
    check_same(record, **lasting(found))
    entry = opening_entry(found, record, Device.of(found.prepared.runtime), 1.0, [])
    record.append(entry)
    return entry


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("search: {seed: 3}", "seed", "with, 0, .* but is 3;"),
        (
            "rungs: {short: 0.3, full_epochs: 4}", "rungs",
            r"with, \{'short': 0.1, 'full_epochs': 2.0\}, .* is \{'short': 0.3, 'full_epochs': 4.0",
        ),
        ("task_args: {weights: 1}", "teacher_digest", "with, [0-9a-f]{16}, .* is [0-9a-f]{16};"),
    ],
)  # fmt: skip
def test_what_results_depend_on_stays(tmp_path: Path, text: str, name: str, values: str) -> None:
    record = MemoryRecord()
    opened(tmp_path, record)
    with pytest.raises(BadInput, match=f"--resume: {name} must be .*{values}.* another --out"):
        opened(tmp_path, record, text)


def test_what_decides_how_long_and_for_what_may_change(tmp_path: Path) -> None:
    record = MemoryRecord()
    first = opened(tmp_path, record)
    second = opened(tmp_path, record, "search: {trials: 99, time_budget: 1h, concurrency: 4}")
    assert second["search_id"] == first["search_id"]


def test_a_record_of_an_earlier_flyweight_is_asked_for_what_it_has(tmp_path: Path) -> None:
    record = MemoryRecord()
    first = opened(tmp_path, record)
    del first["rungs"], first["teacher_digest"]
    opened(tmp_path, MemoryRecord([first]), "rungs: {short: 0.3}")
    with pytest.raises(BadInput, match="--resume: seed must be"):
        opened(tmp_path, MemoryRecord([first]), "search: {seed: 3}")


def test_limits_stay_those_of_the_teacher_that_the_record_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = MemoryRecord()
    opened(tmp_path, record)
    monkeypatch.setitem(globals(), "TASK", TASK.replace("97.0", "96.875"))
    assert limits_of(opened(tmp_path, record)).teacher_metric == 97.0


def test_the_teacher_of_a_run_stays(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "search.yaml").write_text("task: task.py:Net\nobjective: {max_drop: 1}\n")
    found, run = ready(load_spec(tmp_path / "search.yaml")), tmp_path / "run"
    found.write(run)
    teacher = run / "teacher" / "model.onnx"
    assert teacher.read_bytes() == found.teacher
    teacher.write_bytes(b"of then")
    found.write(run)
    assert teacher.read_bytes() == b"of then"


def test_what_is_priced_as_before_is_told_from_what_is_not(tmp_path: Path) -> None:
    record = MemoryRecord()
    assert priced_alike({}, record)  # there is nothing to price
    first = opened(tmp_path, record)
    record.append(first | {"predicted_by": "profile", "profile": "one"})
    known = opened(tmp_path, MemoryRecord([first])) | {"predicted_by": "profile", "profile": "one"}
    assert priced_alike(known, record)
    assert not priced_alike(known | {"profile": "other"}, record)
    assert not priced_alike(known | {"target": {}}, record)
    assert not priced_alike(known | {"objective": {"max_drop": 2}}, record)


def test_sizes_that_are_known_are_not_worked_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a resume whose device profile alone is another: the models would have to be built."""
    first = opened(tmp_path, MemoryRecord()) | {"predicted_by": "profile", "profile": "one"}
    one, other = Policy(prune=Prune({"a": 8})), Policy()
    price = {"latency_ms": [1.0, 2.0, 3.0], "size_bytes": 700, "compressed_bytes": 500}
    record = MemoryRecord([
        first,
        {"kind": "rejected", "digest": other.digest, "reason": "it is impossible"},
        {"kind": "begin", "trial": 0, "digest": one.digest} | price,
        {"kind": "result", "digest": one.digest} | price | {"size_bytes": 1},
    ])  # fmt: skip
    assert known_sizes(first | {"profile": "other"}, record) == {one.digest: (700, 500)}
    assert not known_sizes(first | {"objective": {"size_bytes": 9}}, record)
    record.append(first | {"objective": {"size_bytes": 9}})
    assert not known_sizes(first, record)  # those of another session may be in between

    built: list[Policy] = []
    monkeypatch.setattr(pricing, "untrained", lambda _, policy: built.append(policy) or b"model")
    prepared: Any = SimpleNamespace(plan=lambda policy: policy)
    predictor: Any = SimpleNamespace(predict=lambda _: torch.tensor([[4.0, 5.0, 6.0]]))
    limits = Limits(90.0, size_bytes=800)
    priced = predicted(prepared, predictor, limits, {one.digest: (700, 500)})
    assert priced(one) == Price((4.0, 5.0, 6.0), 700, 500)
    assert priced(other).size_bytes == len(b"model")
    assert built == [other]


@pytest.mark.parametrize(
    ("reason", "done"),
    [("finished", True), ("stopped", True), ("interrupted", False), ("deadline", False)],
)
def test_a_trial_that_more_time_lets_go_on_is_not_done(reason: str, done: bool) -> None:
    begin, end = {"kind": "begin", "trial": 0}, {"kind": "end", "trial": 0, "reason": reason}
    assert is_done(MemoryRecord([begin, end]), 1, None) == done
    again = {"kind": "again", "trial": 0}
    assert not is_done(MemoryRecord([begin, end, again]), 1, None)  # it went on, and was killed
    assert is_done(MemoryRecord([begin, end, again, end]), 1, None) == done


def test_a_search_that_time_ended_goes_on_with_who_waits() -> None:
    end = {"kind": "end", "trial": 0, "reason": "stopped", "ahead": True, "time": 9.0}
    begin = {"kind": "begin", "trial": 0, "time": 1.0}
    entries = [{"kind": "search", "time": 0.0}, begin, end]
    timed = {"kind": "done", "wall_s": 60.0, "spent_s": 60.0}
    assert is_done(MemoryRecord([*entries, timed]), 1, 60.0)
    assert not is_done(MemoryRecord([*entries, timed]), 1, 90.0)
    assert is_done(MemoryRecord([*entries, timed | {"spent_s": None}]), 1, 90.0)
    assert is_done(MemoryRecord([*entries[:2], end | {"ahead": None}, timed]), 1, 90.0)


def test_a_search_whose_time_was_spent_is_done() -> None:
    entries = [
        {"kind": "search", "time": 0.0}, {"kind": "begin", "trial": 0, "time": 1.0},
        {"kind": "end", "trial": 0, "reason": "deadline", "time": 60.0},
    ]  # fmt: skip
    assert is_done(MemoryRecord(entries), 9, 60.0)
    assert not is_done(MemoryRecord(entries), 9, 90.0)
    assert not is_done(MemoryRecord(entries[:1]), 9, 0.0)  # one policy is always tried
    full = {"kind": "done", "wall_s": 61.0, "spent_s": 90.0}  # nothing fitted into the last 30 s
    assert is_done(MemoryRecord([*entries, full]), 9, 90.0)
    assert not is_done(MemoryRecord([*entries, full]), 9, 120.0)
    assert not is_done(MemoryRecord([*entries, full | {"spent_s": None}]), 9, 90.0)


def test_a_trial_that_more_time_lets_go_on_keeps_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = ("finished", "stopped", "failed", "deadline")
    storage = Storage(tmp_path)
    for reason in reasons:  # the policies are called by how their trials end
        storage.write(f"{checkpoint_folder(reason)}/short.safetensors", b"")
    controller: Any = SimpleNamespace(trials={}, elapsed=lambda: 0.0, fatal=None)
    search: Any = object.__new__(driver._Search)
    search.storage, search.janitor, search.waiting = storage, ThreadPoolExecutor(1), {}
    search.controller = controller

    def run_trials(*_: Any, **__: Any) -> None:
        for number, reason in enumerate(reasons):
            controller.trials[number] = SimpleNamespace(ended=reason, results={"short": {}})
            search._tidy({"kind": "end", "trial": number, "reason": reason, "digest": reason})

    monkeypatch.setattr(driver, "run_trials", run_trials)
    monkeypatch.setattr(driver, "trainable", lambda job: job)
    monkeypatch.setattr(driver, "facts_of", lambda *_: {})
    search.spec = SimpleNamespace(search=Search(), resources=Resources())
    search.ready = SimpleNamespace(made=None)
    search.progress, search._inputs = Progress(Console(quiet=True)), str
    header = {"target": {"fingerprint": "f"}, "bfloat16": []}
    search._trials(controller, header, {})
    assert [place.name for place in (tmp_path / checkpoint_folder()).iterdir()] == ["deadline"]


def test_who_trains_in_bfloat16_stays_as_it_was_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """On devices of one kind: what was tried on CPUs says little of GPUs."""
    monkeypatch.setattr(driver, "trained_in_bfloat16", lambda *_: ["tried anew"])
    search: Any = object.__new__(driver._Search)
    search.record, search.ready = MemoryRecord(), SimpleNamespace(prepared=None)

    def decided(gpus: float) -> list[str]:
        space = SimpleNamespace(distill=SimpleNamespace(students=["pruned"]))
        search.spec = SimpleNamespace(resources=Resources(gpus=gpus), space=space)
        return list(search._bfloat16())

    search.record.append({"kind": "search"})  # of an earlier version
    assert decided(0) == ["tried anew"]
    search.record.append({"kind": "search", "gpus": False, "bfloat16": ["pruned"]})
    search.record.append({"kind": "search", "gpus": False, "bfloat16": []})
    assert decided(0) == ["pruned"]
    assert decided(0.5) == ["tried anew"]

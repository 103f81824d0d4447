"""What a search refuses before Ray, which takes seconds, is started."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flyweight.search import driver
from flyweight.search.finder import Price
from flyweight.search.limits import Limits
from flyweight.search.meter import Device
from flyweight.search.opening import lasting
from flyweight.search.reach import check_limits
from flyweight.search.ready import ready
from flyweight.search.run_files import RECORD, SPEC
from flyweight.search.spec import load_spec
from flyweight.spaces import BadInput, Impossible, Policy

TASK = """
import torch
from torch import nn
from flyweight.compressors import ClassificationTask

class Patterns(ClassificationTask):
    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.train = self.val = [(torch.randn(6), i % 3) for i in range(60)]

    def model(self):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))

class Others(Patterns):
    pass
"""


class Started(Exception):
    """Ray was."""


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def connected(*_: Any) -> Any:
        raise Started
        yield

    monkeypatch.setattr(driver, "connected", connected)


def search(folder: Path, address: str | None = None, **changes: Any) -> None:
    values = {"task": "task.py:Patterns", "objective": {"speedup": 1.01}, "tracking": None}
    folder.mkdir(exist_ok=True)
    (folder / "task.py").write_text(TASK)
    (folder / "search.yaml").write_text(json.dumps(values | changes))
    resume = (folder / "run" / RECORD).exists()
    driver.search(load_spec(folder / "search.yaml"), folder / "run", resume=resume, address=address)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"speedup": 10000}, "the fastest policy of this space takes"),
        ({"latency_ms": 1e-9}, "the fastest policy of this space takes"),
        ({"size_bytes": 10}, "the smallest policy of this space has"),
    ],
)
def test_a_limit_that_nothing_reaches(tmp_path: Path, objective: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        search(tmp_path, objective=objective)
    assert not (tmp_path / "run").exists()


def test_of_smallest_policies_those_that_are_impossible_do_not_count(tmp_path: Path) -> None:
    with pytest.raises(Started):
        search(tmp_path)
    found = ready(load_spec(tmp_path / "search.yaml"))
    tried: list[Policy] = []

    def price(policy: Policy) -> Price:
        tried.append(policy)
        if policy in impossible:
            raise Impossible("no kernel")
        return Price((1.0, 1.0, 1.0), 50, 50)

    impossible = found.smallest()
    check_limits(found, Limits(90.0, size_bytes=10), price)  # nothing is known
    assert tried == impossible
    del impossible[1:]
    assert impossible != tried
    check_limits(found, Limits(90.0, size_bytes=100), price)
    with pytest.raises(BadInput, match="the smallest policy of this space has 50"):
        check_limits(found, Limits(90.0, size_bytes=10), price)


@pytest.mark.parametrize(
    ("fastest_ms", "refused"),
    [
        ((100.0, 101.0, 102.0), True),
        ((0.0, 101.0, 102.0), False),
        ((1.0, 101.0, 102.0), False),  # 1% over the limit: the solver may have missed a faster one
    ],
)
def test_a_limit_that_only_the_solver_knows_to_be_out_of_reach(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fastest_ms: tuple[float, float, float],
    refused: bool,
) -> None:
    def begun(*_: Any) -> Any:
        raise Started

    def place_of(found: Any, *_: Any) -> Any:
        device = Device.of(found.prepared.runtime)
        return SimpleNamespace(alone=lambda: 1.0, device=device, there=False)

    monkeypatch.setattr(driver, "place_of", place_of)
    monkeypatch.setattr(driver, "connected", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(driver, "check_cluster", lambda *_: None)
    whole, warm = driver._Search, SimpleNamespace(fastest_ms=lambda: fastest_ms)
    monkeypatch.setattr(whole, "_predictor", lambda *_: object())
    monkeypatch.setattr(whole, "_warm_start", lambda *_: warm)
    monkeypatch.setattr(whole, "_answers", begun)
    words = r"the fastest policy of this space is predicted to take 101\S* ms, a speed-up of 0\.01"
    with pytest.raises(BadInput, match=words) if refused else pytest.raises(Started):
        search(tmp_path)
    if refused:  # as long as nothing was found, going on says the same
        with pytest.raises(BadInput, match=words):
            search(tmp_path)


@pytest.mark.parametrize(("keep", "helps"), [(0.5, True), (0.01, False)])
def test_a_smaller_min_keep_is_advised_where_it_would_help(
    tmp_path: Path, keep: float, helps: bool
) -> None:
    with pytest.raises(BadInput) as told:
        search(tmp_path, objective={"size_bytes": 10}, space={"prune": {"min_keep": keep}})
    assert str(told.value).endswith(
        "Ask for less, or let space.prune.min_keep be smaller" if helps else "Ask for less"
    )


def test_on_a_cluster_only_what_this_machine_can_tell(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the smallest policy of this space has"):
        search(tmp_path, "auto", objective={"size_bytes": 10, "speedup": 1.01})
    with pytest.raises(Started):
        search(tmp_path, "auto", objective={"speedup": 10000})


def test_limits_that_a_resume_changes_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {"speedup": 1.01, "max_drop": 0.5}
    with pytest.raises(Started):
        search(tmp_path, objective=first)
    ours = load_spec(tmp_path / "search.yaml")
    found = ready(ours)
    header = {
        "kind": "search", **lasting(found), "objective": ours.objective.model_dump(), "time": 0.0,
    }  # fmt: skip
    (tmp_path / "run" / RECORD).write_text(json.dumps(header) + "\n")
    capsys.readouterr()
    with pytest.raises(Started):
        search(tmp_path, objective=first)
    assert "judged anew" not in capsys.readouterr().out
    with pytest.raises(Started):
        search(tmp_path, objective={"speedup": 1.01, "max_drop": 1, "size_bytes": 10**6})
    (note,) = (line for line in capsys.readouterr().out.splitlines() if "judged anew" in line)
    assert note == (
        "Note: max_drop was 0.5 and is 1.0 now; size_bytes was no limit and is 1000000 now: what "
        "is known is judged anew"
    )


def test_a_drop_of_less_than_an_item_is_told_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Started):
        search(tmp_path, objective={"speedup": 1.01, "max_drop": 0.05})
    assert "Note: max_drop 0.05 is less than one item" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"task": "task.py:Others"}, "task_class"), ({"task_args": {"seed": 5}}, "data_digest")],
)
def test_a_resume_with_another_task_leaves_the_run_as_it_is(
    tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Started):
        search(tmp_path)
    ours = load_spec(tmp_path / "search.yaml")
    found = ready(ours)
    header = {
        "kind": "search", "task_class": "task.py:Patterns", "data_digest": found.data_digest,
        "capabilities": Device.of(found.prepared.runtime).capabilities,
        "objective": ours.objective.model_dump(), "time": 0.0,
    }  # fmt: skip
    (run / RECORD).write_text(json.dumps(header) + "\n")
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert run / SPEC in kept
    with pytest.raises(BadInput, match=f"--resume: {name} must be .* begin a new search"):
        search(tmp_path, **changes)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == kept
    with pytest.raises(Started):
        search(tmp_path)


DEADLY = """
import os

import flyweight.kernels.onnxruntime as real

load = real.OnnxRuntime.load

def deadly(self, model):
    if len(model) < 8000 and b"QuantizeLinear" not in model:  # no probe: a small policy
        open(os.environ["DIED"], "a").close()
        os._exit(77)
    return load(self, model)

real.OnnxRuntime.load = deadly
"""


@pytest.mark.parametrize(
    "script",
    [
        "from flyweight.search import reach, ready, spec; "
        "reach.check_without_ray(ready.ready(spec.load_spec(path)), True)",
        "from flyweight.search import plan; plan.make_plan(path)",
    ],
)
def test_a_policy_that_the_runtime_dies_of_ends_neither_search_nor_plan(
    tmp_path: Path, script: str
) -> None:
    (tmp_path / "task.py").write_text(TASK.replace("64", "1024"))
    (tmp_path / "search.yaml").write_text(
        "task: task.py:Patterns\nobjective: {speedup: 1.01}\ntracking: null\n"
        "space: {quantize: {precisions: [fp32]}}\n"
    )
    (tmp_path / "sitecustomize.py").write_text(DEADLY)  # in whatever process
    script = f"from pathlib import Path; path = Path({str(tmp_path)!r}); {script}"
    died = tmp_path / "died"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "DIED": str(died)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert died.exists()

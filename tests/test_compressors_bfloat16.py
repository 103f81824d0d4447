"""Training that multiplies in bfloat16, and who trains so. Where the processor has none it is
emulated: slow, but the same."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from flyweight.compressors import (
    ClassificationTask,
    Prepared,
    Schedule,
    bfloat16,
    compress,
    prepare,
)
from flyweight.compressors.bfloat16 import CHANGED, Step, in_bfloat16
from flyweight.compressors.data import Items
from flyweight.compressors.distill import CPU
from flyweight.compressors.mixed import mixed
from flyweight.compressors.outputs import CLASSES, OutputKind
from flyweight.kernels import make_runtime
from flyweight.spaces import Distill, Policy, Prune


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    return nn.Sequential(*layers).eval()


def holds(model: nn.Module, inputs: Tensor, kind: OutputKind = CLASSES) -> bool:
    items = Items(inputs, torch.zeros(len(inputs), dtype=torch.long))
    most = CHANGED["quantities" if kind.axis is None else "classes"]
    return Step(model, items, kind).holds(most)


@pytest.mark.parametrize("drops", [False, True])
def test_a_network_of_classes_trains_so(drops: bool) -> None:
    model = nn.Sequential(nn.Dropout(0.5), network()).eval() if drops else network()
    assert holds(model, torch.randn(32, 1, 8, 8))


class Last(nn.Module):
    """The last state of a recurrent network, and classes of it."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layers = kind(6, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_networks_do_too(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    assert holds(Last(kind).eval(), torch.randn(16, 9, 6))


@pytest.mark.parametrize(("away", "expected"), [(0.0, True), (30.0, False), (1000.0, False)])
def test_quantities_beyond_its_three_digits_do_not(away: float, expected: bool) -> None:
    """At a mean of 30 standard deviations training in bfloat16 harmed what float32 improved."""
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    nn.init.constant_(model.bias, away * model(torch.randn(64, 8)).std().item())
    inputs = torch.randn(64, 8)
    kind = OutputKind(axis=None, variance=model(inputs).detach().var())
    assert holds(model, inputs, kind) is expected


class Copies(nn.Module):
    """Code that autocast does not know: it raises where types differ."""

    def __init__(self, inputs: int = 8) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x.flatten(1)[:, :4], self.layer(x.flatten(1)), 0.5)


def test_code_that_mixes_types_stays_in_float() -> None:
    assert not holds(Copies(), torch.randn(16, 8))


def test_nothing_is_left_of_the_trial() -> None:
    """Neither gradients, nor what the model draws."""
    model = nn.Sequential(network(), nn.RReLU()).requires_grad_(False).eval()
    before, drawn = [p.clone() for p in model.parameters()], torch.get_rng_state()
    assert holds(model, torch.ones(8, 1, 8, 8))
    assert torch.equal(torch.get_rng_state(), drawn)
    for now, then in zip(model.parameters(), before, strict=True):
        assert torch.equal(now, then)
        assert now.grad is None
        assert not now.requires_grad


def test_attention_and_probabilities_stay_in_float() -> None:
    x = torch.randn(2, 4, 6, 8, requires_grad=True)
    with mixed(CPU):
        half = F.linear(x, torch.randn(8, 8))
        out = F.scaled_dot_product_attention(half, half, value=half)
        chances = [
            half.softmax(-1), torch.softmax(half, -1), half.sigmoid(), F.log_softmax(half, -1),
            nn.Softmax(-1)(half), nn.Softmin(-1)(half), torch.special.expit(half),
        ]  # fmt: skip
    assert (half.dtype, out.dtype) == (torch.bfloat16, torch.float32)
    assert {each.dtype for each in chances} == {torch.float32}
    with mixed(CPU, enabled=False):
        assert F.linear(x, torch.randn(8, 8)).dtype == torch.float32


class Task(ClassificationTask):
    """Of its students one mixes types, and one is recurrent. ``chances``: the teacher's answers are
    probabilities."""

    def __init__(self, chances: bool = False) -> None:
        torch.manual_seed(0)
        images = torch.randn(256, 1, 8, 8)
        model = nn.Sequential(*network(), nn.Softmax(1)) if chances else network()
        data = TensorDataset(images, network()(images).argmax(1))
        super().__init__(model.eval(), data, data, data)
        self.chances = chances

    def loss(self, output: Tensor, target: Any) -> Tensor:
        return F.nll_loss(output.log(), target) if self.chances else super().loss(output, target)

    def students(self) -> dict[str, nn.Module]:
        wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
        recurrent = nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (8, 8)), nn.Flatten(1, 2))
        return {"copies": Copies(64), "wide": wide, "lstm": nn.Sequential(recurrent, Rows())}


class Rows(Last):
    def __init__(self) -> None:
        super().__init__(nn.LSTM)
        self.layers = nn.LSTM(8, 16, batch_first=True)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 is faster for everybody."""
    monkeypatch.setattr(bfloat16, "is_native", lambda _: True)
    monkeypatch.setattr(Step, "is_faster", lambda _: True)


def prepared(task: Task) -> Prepared:
    return prepare(task, make_runtime("onnxruntime", 1), Schedule())


@pytest.mark.usefixtures("native")
def test_each_student_is_judged_by_what_it_starts_from() -> None:
    found, names = prepared(Task()), ["pruned", "copies", "wide", "lstm"]
    assert in_bfloat16(found, names, gpus=False) == ["pruned", "wide", "lstm"]
    # There autocast takes float16 for what recurs.
    assert in_bfloat16(found, names, gpus=True) == ["pruned", "wide"]


@pytest.mark.usefixtures("native")
def test_probabilities_are_trained_in_float() -> None:
    assert in_bfloat16(prepared(Task(chances=True)), ["pruned"], gpus=True) == []


def test_a_cpu_that_emulates_it_trains_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "is_native", lambda _: False)
    assert in_bfloat16(prepared(Task()), ["pruned"], gpus=False) == []
    assert in_bfloat16(prepared(Task()), ["pruned"], gpus=True) == ["pruned"]  # of a cluster's head


def test_students_that_are_named_train_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flyweight.compressors.prepared.is_native", lambda _: True)
    task, schedule = Task(), Schedule(full_epochs=2.0, short=0.5)
    policy = Policy(Prune({"0": 4}), distill=Distill(learning_rate=0.01))
    made = []
    for names in ((), ("wide",), ("pruned",)):
        found = prepare(task, make_runtime("onnxruntime", 1), schedule, bfloat16=names)
        student = compress(found, policy, "short").student
        made.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert (made[0] - made[2]).norm() < 0.05 * made[0].norm()

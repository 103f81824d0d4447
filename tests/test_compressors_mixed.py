"""Training that multiplies in bfloat16. Where the processor has none it is emulated: slow, but the
same."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from flyweight.compressors import ClassificationTask, Prepared, Schedule, prepare, prepared
from flyweight.compressors.data import Items
from flyweight.compressors.distill import CPU, kl_divergence
from flyweight.compressors.mixed import holds, mixed
from flyweight.compressors.outputs import OutputKind
from flyweight.compressors.prepared import CHANGED
from flyweight.kernels import make_runtime


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    return nn.Sequential(*layers).eval()


def held(model: nn.Module, inputs: Tensor, kind: OutputKind | None = None) -> bool:
    with torch.no_grad():
        answers = model(inputs)
    items = Items(inputs, torch.zeros(len(inputs), dtype=torch.long))
    divergence = partial(kl_divergence, kind=kind) if kind else kl_divergence
    most = CHANGED["quantities" if kind else "classes"]
    return holds(model, items, answers, divergence, most, CPU)


@pytest.mark.parametrize("drops", [False, True])
def test_a_network_of_classes_trains_so(drops: bool) -> None:
    model = nn.Sequential(nn.Dropout(0.5), network()).eval() if drops else network()
    assert held(model, torch.randn(32, 1, 8, 8))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_networks_do_too(kind: type[nn.RNNBase]) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = kind(6, 16, num_layers=2, dropout=0.5, batch_first=True)
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers(x)[0][:, -1])

    torch.manual_seed(0)
    assert held(Last().eval(), torch.randn(16, 9, 6))


@pytest.mark.parametrize(("away", "expected"), [(0.0, True), (30.0, False), (1000.0, False)])
def test_quantities_beyond_its_three_digits_do_not(away: float, expected: bool) -> None:
    """At a mean of 30 standard deviations training in bfloat16 harmed what float32 improved."""
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    nn.init.constant_(model.bias, away * model(torch.randn(64, 8)).std().item())
    inputs = torch.randn(64, 8)
    kind = OutputKind(axis=None, variance=model(inputs).detach().var())
    assert held(model, inputs, kind) is expected


class Copies(nn.Module):
    """Code that autocast does not know: it raises where types differ."""

    def __init__(self, inputs: int = 8) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x.flatten(1)[:, :4], self.layer(x.flatten(1)), 0.5)


def test_code_that_mixes_types_stays_in_float() -> None:
    assert not held(Copies(), torch.randn(16, 8))


def test_nothing_is_left_of_the_trial() -> None:
    """Neither gradients, nor what the model draws."""
    model = nn.Sequential(network(), nn.RReLU()).requires_grad_(False).eval()
    before, drawn = [p.clone() for p in model.parameters()], torch.get_rng_state()
    inputs = torch.ones(8, 1, 8, 8)
    assert held(model, inputs)
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
            half.softmax(-1),
            torch.softmax(half, -1),
            half.sigmoid(),
            F.log_softmax(half, -1),
        ]
    assert (half.dtype, out.dtype) == (torch.bfloat16, torch.float32)
    assert {each.dtype for each in chances} == {torch.float32}
    with mixed(CPU, enabled=False):
        assert F.linear(x, torch.randn(8, 8)).dtype == torch.float32


class Task(ClassificationTask):
    """Of two students one mixes types; ``chances``: the teacher's answers are probabilities."""

    def __init__(self, chances: bool = False) -> None:
        torch.manual_seed(0)
        images = torch.randn(256, 1, 8, 8)
        model = nn.Sequential(*network(), nn.Softmax(1)) if chances else network()
        labels = network()(images).argmax(1)
        data = TensorDataset(images, labels)
        super().__init__(model.eval(), data, data, data)
        self.chances = chances

    def loss(self, output: Tensor, target: Any) -> Tensor:
        return F.nll_loss(output.log(), target) if self.chances else super().loss(output, target)

    def students(self) -> dict[str, nn.Module]:
        return {"copies": Copies(64), "wide": nn.Sequential(nn.Flatten(), nn.Linear(64, 4))}


@pytest.fixture
def of_a_native_device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Prepared tasks where bfloat16 would be faster for everybody."""
    monkeypatch.setattr(prepared, "is_native", lambda _: True)
    monkeypatch.setattr(prepared, "is_faster", lambda *_: True)

    def of(task: Task) -> Prepared:
        return prepare(task, make_runtime("onnxruntime", 1), Schedule())

    return of


def test_each_student_is_judged_by_what_it_starts_from(of_a_native_device: Any) -> None:
    found = of_a_native_device(Task())
    assert [found.halves(name) for name in ("pruned", "wide", "copies")] == [True, True, False]


def test_probabilities_are_trained_in_float(of_a_native_device: Any) -> None:
    assert not of_a_native_device(Task(chances=True)).halves("pruned")


def test_a_device_that_emulates_it_trains_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "is_native", lambda _: False)
    assert not prepare(Task(), make_runtime("onnxruntime", 1), Schedule()).halves("pruned")

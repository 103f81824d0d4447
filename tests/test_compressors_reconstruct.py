"""Reconstruction and statistics: of all that data are, with what can take it, in bounded memory."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from flyweight.compressors import ClassificationTask, Schedule, prepare, reconstruct
from flyweight.compressors.compress import prune
from flyweight.compressors.data import Items, at_once
from flyweight.compressors.prune import remove
from flyweight.compressors.reconstruct import input_moments, reconstruct_
from flyweight.kernels import make_runtime
from flyweight.spaces import Policy, Prune
from flyweight.spaces.tracing import trace


def test_without_a_bias_the_weights_keep_the_mean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8, bias=False)).eval()
    items = Items(torch.randn(256, 6), torch.zeros(256))
    network, kept = trace(model, torch.rand(1, 6)), {"0": torch.arange(8)}
    solved = remove(model, network, torch.rand(1, 6), kept)
    reconstruct_(solved, model, network, kept, input_moments(model, network, items))
    with torch.no_grad():
        theirs, error = model(items.inputs), solved(items.inputs) - model(items.inputs)
    assert error.mean(0).norm() < 0.3 * theirs.mean(0).norm()  # 0.14; of covariances alone 0.93
    assert error.square().mean() < 0.5 * theirs.var(0).mean()


def test_statistics_of_a_pruned_student_are_of_all_classes() -> None:
    """Of data that are sorted by class, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.cat([torch.randn(600, 6), torch.randn(600, 6) + 4])
    data = TensorDataset(x, (torch.arange(1200) >= 600).long())
    task = ClassificationTask(model.eval(), data, data)
    ready = prepare(task, make_runtime("onnxruntime", 1), Schedule())
    how = Policy(Prune({"0": 8}, "l1", reconstruct=False))
    student: Any = prune(ready, how, ready.plan(how))
    expected = student.get_submodule("0")(x).mean(0)
    assert torch.allclose(student.get_submodule("1").running_mean, expected, atol=0.5)


def test_moments_are_taken_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, example = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)), torch.rand(1, 3, 9, 9)
    network, items = trace(model, example), Items(torch.randn(8, 3, 9, 9), torch.zeros(8))
    whole, sizes = input_moments(model, network, items), []
    rows = reconstruct.input_rows
    monkeypatch.setattr(
        reconstruct, "input_rows", lambda layer, x: (sizes.append(len(x)), rows(layer, x))[1]
    )
    monkeypatch.setattr(reconstruct, "ROOM", 2 * 4 * 27 * 81)
    found = input_moments(model, network, items)
    assert sizes == [2, 2, 2, 2, 8]
    for name in whole:
        assert torch.allclose(found[name].covariance, whole[name].covariance, atol=1e-5)


class Masked(nn.Module):
    """Words of which the first is answered by, and those are looked at that the mask shows."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.value, self.head, self.frozen = nn.Linear(4, 8), nn.Linear(8, 3), frozen

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        if self.frozen:
            words = words.detach()
        hidden = torch.relu(self.value(words)).masked_fill(mask[..., None] == 0, 0.0)
        if self.frozen:
            hidden = hidden.detach()
        return torch.softmax(self.head(hidden.sum(1)), 1)


@pytest.mark.parametrize("frozen", [False, True])
def test_words_that_a_mask_hides_do_not_count(frozen: bool) -> None:
    torch.manual_seed(0)
    model, words = Masked(frozen).eval(), torch.randn(40, 6, 4)
    mask = (torch.arange(6) < torch.randint(1, 6, (40, 1))).float()
    words = torch.where(mask[..., None] > 0, words, 100.0)
    items = Items((words, mask), torch.zeros(40))
    network = trace(model, (words[:1], mask[:1]))
    found = input_moments(model, network, items)["value"]
    rows = words[mask > 0] if not frozen else words.flatten(0, 1)  # who detaches says nothing
    assert torch.allclose(found.mean[0], rows.mean(0), atol=1e-4)
    assert torch.allclose(found.covariance[0], rows.T.cov(correction=0), rtol=1e-3, atol=1e-3)
    model.requires_grad_(False)  # as a search has it
    again = input_moments(model, network, items)["value"]
    assert torch.equal(again.covariance, found.covariance)


def test_an_item_whose_answer_is_rounded_counts_as_a_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3), nn.Hardsigmoid()).eval()
    x = 20 * torch.randn(30, 6, 4)  # most are clipped
    found = input_moments(model, trace(model, x[:1]), Items(x, torch.zeros(30)))["0"]
    clipped = (model(x).detach() % 1 == 0).all(2)
    counted = x[~clipped | clipped.all(1, keepdim=True)]
    assert torch.allclose(found.mean[0], counted.mean(0), atol=1e-4)
    rounded = input_moments(_Rounding(), trace(_Rounding(), x[:1]), Items(x, torch.zeros(30)))
    assert torch.allclose(rounded["layer"].mean[0], x.flatten(0, 1).mean(0), atol=1e-4)


class _Rounding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(self.head(self.layer(x)))


class Careless(nn.Module):
    """Changes values in place, keeps one, and has layers under inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 8]
        with torch.inference_mode():
            x = self.a(x)
        x = x + 1
        x += torch.relu_(self.b(x))
        self.kept = torch.softmax(x, 1)
        first, second = x.chunk(2, -1)
        first *= 0.5
        return self.head(torch.cat((first, second), -1)).mean(1)


def test_a_careless_forward_is_measured_as_it_runs_and_stays_as_it_is() -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 6, 8), torch.randint(0, 3, (64,)))
    model = Careless().eval()
    seen: list[Tensor] = []
    ready = prepare(
        ClassificationTask(model, data, data), make_runtime("onnxruntime", 1), Schedule()
    )
    found = ready.input_moments("pruned")["b"]
    hook = model.b.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    with torch.no_grad():
        model(ready.splits.calibration.inputs)
    hook.remove()
    assert torch.allclose(found.mean[0], seen[0].flatten(0, 1).mean(0), atol=1e-5)
    copy.deepcopy(model)  # which cannot be done to a value with a gradient


def test_as_many_items_run_at_once_as_their_largest_value_leaves_room_for() -> None:
    network = trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)), torch.rand(1, 3, 16, 16))
    each = 8 * 16 * 16 * 4
    assert [at_once(network, 64, n * each) for n in (1, 10, 100)] == [2, 10, 64]

"""Answers to a whole data set: by batch on threads of their own where nothing is kept meanwhile."""

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.compressors import answering
from flyweight.compressors.answering import answers_of, torch_threads
from flyweight.compressors.data import MOST, Items, tensors
from flyweight.compressors.parity import run_module
from flyweight.spaces.tracing import trace

LAST: dict[str, Tensor] = {}


def test_threads_are_torch_s_for_a_while() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


class Net(nn.Module):
    """Keeps what it computes, and uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.kept = nn.Linear(16, 4), torch.zeros(1)

    def forward(self, image: Tensor, scale: Tensor) -> Tensor:
        self.kept = F.relu(self.norm(self.a(image)))
        return self.b(self.kept.mean((2, 3))) * scale


def through(x: Tensor) -> Tensor:
    """What it is given, if nobody calls it meanwhile; another in a trace that looks into it."""
    LAST["x"] = x
    time.sleep(0.002)
    return LAST["x"] * (1 if type(x) is Tensor else 2)


torch.fx.wrap("through")


class Shares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(through(self.a(x)))


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        self.a.register_forward_hook(lambda _module, _given, made: through(made))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def answered(model: nn.Module, inputs: Any, threads: int) -> Tensor:
    items = of(inputs)
    example = items.first(1).inputs
    with torch_threads(threads):
        return answers_of(model, trace(model, example), example, items)


def of(inputs: Any) -> Items:
    return Items(inputs, torch.zeros(len(tensors(inputs)[0])))


def test_batches_on_threads_of_their_own_are_answered_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, count = Net().eval(), 5 * MOST + 3
    inputs = {"image": torch.rand(count, 3, 12, 12), "scale": torch.rand(count, 1)}
    seen, call = set(), answering.call

    def watched(graph: nn.Module, some: Any) -> Tensor:
        seen.add((threading.current_thread().name.split("_")[0], torch.get_num_threads()))
        return call(graph, some)

    monkeypatch.setattr(answering, "call", watched)
    found = answered(model, inputs, 3)
    assert ("flyweight-teacher", 1) in seen
    assert torch.equal(found, run_module(model, of(inputs)))
    assert torch.get_num_threads() == 1
    assert not found.requires_grad


@pytest.mark.parametrize("kind", [Shares, Hooked])
def test_what_may_keep_something_meanwhile_runs_alone(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.rand(6 * MOST, 6)
    found = answered(model, x, 4)
    assert torch.equal(found, run_module(model, of(x)))


def test_so_many_batches_run_at_a_time_as_memory_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = []
    by_batch = answering._by_batch
    monkeypatch.setattr(
        answering, "_by_batch", lambda *given: (taken.append(given[-1]), by_batch(*given))[1]
    )
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).eval(), torch.rand(6 * MOST, 6)
    for room in (1, 3, 9):  # batches of the widest value
        monkeypatch.setattr(answering, "ROOM", room * MOST * 8 * 4)
        assert torch.equal(answered(model, x, 4), run_module(model, of(x)))
    assert taken == [3, 4]

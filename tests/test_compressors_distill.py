"""Distillation: the loss, the schedule, what is seen in which order, divergence."""

import copy
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.compressors.data import Items
from flyweight.compressors.distill import Epoch, _rate, _steps, distill, kl_divergence
from flyweight.spaces import Distill, Impossible


@given(st.integers(0, 1000), st.sampled_from([1.0, 2.5, 8.0]))
def test_kl_divergence_against_scipy(seed: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(0, 3, (2, 5, 4))
    p, q = softmax(teacher / temperature, -1), softmax(student / temperature, -1)
    expected = rel_entr(p, q).sum(-1).mean() * temperature**2
    found = kl_divergence(torch.tensor(student), torch.tensor(teacher), temperature)
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_kl_divergence_of_sequences_is_the_mean_over_positions() -> None:
    student, teacher = torch.randn(2, 3, 7, 4)
    flat = kl_divergence(student.reshape(21, 4), teacher.reshape(21, 4))
    assert torch.allclose(kl_divergence(student, teacher), flat)
    assert kl_divergence(teacher, teacher).item() == pytest.approx(0, abs=1e-6)


@given(st.integers(1, 500))
def test_the_learning_rate_rises_then_falls(total: int) -> None:
    rates = [_rate(step, total) for step in range(total)]
    top = int(np.argmax(rates))
    assert rates[top] == pytest.approx(1)
    assert (np.diff(rates[: top + 1]) > 0).all()
    assert (np.diff(rates[top + 1 :]) < 0).all()
    assert min(rates) > 0
    assert total < 20 or 0.1 < (top + 1) / total < 0.2


def epochs_of(count: int) -> Any:
    items = Items(torch.arange(count).float()[:, None], torch.arange(count))
    return lambda _: Epoch(items, items.inputs)


def seen(first: float, count: float, items: int = 64, batch: int = 8, seed: int = 0) -> list[int]:
    steps = _steps(epochs_of(items), first, count, batch, seed)
    return [int(i) for _, part, answers in steps for i in part.targets if len(answers) == len(part)]


def test_training_in_pieces_sees_what_training_in_one_piece_sees() -> None:
    whole = seen(0, 2)
    assert seen(0, 0.25) + seen(0.25, 1.25) + seen(1.5, 0.5) == whole
    assert sorted(whole[:64]) == sorted(whole[64:]) == list(range(64))
    assert whole[:64] != whole[64:]
    assert seen(0, 1, seed=1) != whole[:64]


def test_the_pieces_of_a_cycle_have_its_learning_rates() -> None:
    def rates(first: float, count: float, cycle: tuple[float, float] | None = None) -> list[float]:
        return [rate for rate, *_ in _steps(epochs_of(64), first, count, 8, 0, cycle)]

    whole = rates(0.5, 2)
    assert rates(0.5, 1.5, (0.5, 2)) + rates(2, 0.5, (0.5, 2)) == whole
    assert rates(0.5, 1.5) + rates(2, 0.5) != whole


def test_fewer_items_than_a_batch_are_one_batch() -> None:
    assert sorted(seen(0, 2, items=5)) == sorted(2 * list(range(5)))
    assert len(seen(0, 0.01, items=64)) == 8  # at least one step


def test_an_incomplete_batch_is_left_out() -> None:
    assert len(set(seen(0, 1, items=17))) == 16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.n(self.a(x))))  # type: ignore[no-any-return]


def setting(seed: int = 0) -> tuple[Net, Net, Any]:
    torch.manual_seed(seed)
    teacher, student = Net().eval(), Net()
    inputs = torch.randn(256, 6)
    with torch.no_grad():
        answers = 3 * teacher(inputs)
    return teacher, student, lambda _: Epoch(Items(inputs, answers.argmax(1)), answers)


def train(
    student: Net, epochs: Any, settings: Distill, loss: Any = F.cross_entropy, **how: Any
) -> int:
    how = {"peak": settings.learning_rate, "batch": 32, "seed": 0, "count": 8} | how
    return distill(student, epochs, how.pop("count"), settings, loss, **how)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_student_comes_to_agree_with_the_teacher(alpha: float) -> None:
    teacher, student, epochs = setting()
    before = copy.deepcopy(teacher.state_dict())
    items = epochs(0).items
    settings = Distill(alpha=alpha, temperature=2.0, learning_rate=0.1)

    def agreement() -> float:
        with torch.no_grad():
            return (student.eval()(items.inputs).argmax(1) == items.targets).double().mean().item()

    first = agreement()
    samples = train(student, epochs, settings)
    assert samples == 8 * 256
    assert agreement() > max(0.9, first)
    assert not student.training
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


def test_alpha_one_never_asks_the_loss() -> None:
    def loss(*_: Tensor) -> Tensor:
        raise AssertionError("asked")

    _, student, epochs = setting()
    train(student, epochs, Distill(alpha=1.0), loss)


def test_the_same_seed_gives_the_same_weights() -> None:
    runs = []
    for seed in (0, 0, 1):
        _, student, epochs = setting()
        train(student, epochs, Distill(), seed=seed, count=1)
        runs.append(student.state_dict())
    assert all(torch.equal(v, runs[1][k]) for k, v in runs[0].items())
    assert not all(torch.equal(v, runs[2][k]) for k, v in runs[0].items())


def test_a_loss_below_zero_is_trained_to_the_end() -> None:
    _, student, epochs = setting()
    asked = []

    def likeness(output: Tensor, target: Tensor) -> Tensor:
        asked.append(len(output))
        return -output.softmax(1).gather(1, target[:, None]).mean()

    assert train(student, epochs, Distill(alpha=0.0, learning_rate=0.05), likeness) == 8 * 256
    assert sum(asked) < 1.2 * 8 * 256  # twice a step only where it is worse than at first


@pytest.mark.parametrize("rate", [1e3, 1e12, 1e30])
def test_divergence_names_the_learning_rate(rate: float) -> None:
    _, student, epochs = setting()
    settings = Distill(learning_rate=rate, alpha=0.5)
    with pytest.raises(Impossible, match=r"diverged after \d+ samples") as caught:
        train(student, epochs, settings)
    assert f"learning rate {rate:g}" in str(caught.value)
    assert int(str(caught.value).split()[3]) <= 1024  # of 2048: it does not wait for the end


@pytest.mark.parametrize("rate", [1e-6, 0.01, 0.2])
def test_a_student_that_begins_as_the_teacher_does_not_diverge(rate: float) -> None:
    teacher, _, epochs = setting()
    student = copy.deepcopy(teacher)
    train(
        student,
        lambda n: Epoch(epochs(n).items, epochs(n).answers / 3),
        Distill(learning_rate=rate),
    )


def test_mixed_precision_learns_as_well_and_leaves_float_weights() -> None:
    # On a GPU it is bfloat16, too; here the CPU's, so that the path is the one that runs there.
    _, student, epochs = setting()
    items = epochs(0).items
    dtypes = []
    student.b.register_forward_hook(lambda *found: dtypes.append(found[2].dtype))
    train(student, epochs, Distill(temperature=2.0, learning_rate=0.1), halves=True)
    assert dtypes[0] == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in student.parameters())
    with torch.no_grad():
        assert (student(items.inputs).argmax(1) == items.targets).double().mean() > 0.9


def test_a_batch_goes_to_the_device_with_all_its_parts() -> None:
    items = Items({"a": torch.ones(2), "b": (torch.ones(2), torch.ones(2))}, torch.ones(2))
    moved = items.to(torch.device("meta"))
    parts = [moved.inputs["a"], *moved.inputs["b"], moved.targets]
    assert all(t.device.type == "meta" for t in parts)
    assert items.to(torch.device("cpu")).targets is items.targets


@pytest.mark.parametrize("name", ["separable", "plain", "mlp"])
@pytest.mark.parametrize("rate", [100.0, 1e8])
def test_absurd_learning_rates_are_reported_not_scored(
    networks: ModuleType, name: str, rate: float
) -> None:
    model, example = networks.make(name)
    inputs = torch.randn(512, *example.shape[1:], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        answers = 5 * model(inputs)
    items = Items(inputs, answers.argmax(1))
    settings = Distill(learning_rate=rate)
    with pytest.raises(Impossible, match=r"diverged after \d+ samples") as caught:
        train(model, lambda _: Epoch(items, answers), settings)
    assert f"learning rate {rate:g}" in str(caught.value)
    assert int(str(caught.value).split()[3]) <= 4 * 512  # of 8 epochs: it does not wait for the end

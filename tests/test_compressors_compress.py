"""``compress``: from a task and a policy to a candidate and its artifact."""

import copy
import dataclasses
import itertools
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from executed import float_layers, int8_layers
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from flyweight.compressors import (
    RUNGS,
    Candidate,
    ClassificationTask,
    Prepared,
    Schedule,
    compress,
    prepare,
)
from flyweight.compressors.compress import NEAR, drop_error
from flyweight.compressors.data import Items
from flyweight.compressors.distill import Epoch
from flyweight.compressors.parity import run_session
from flyweight.kernels import make_runtime
from flyweight.spaces import Distill, Impossible, Policy, Prune, Quantize


class Noisy(ClassificationTask):
    """With random variants of the training data."""

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)


def images(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 5
    patterns = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(count, 3, 8, 8, generator=generator)
    return TensorDataset(patterns[labels] + noise, labels)


@pytest.fixture(scope="module")
def prepared(networks: ModuleType) -> Prepared:
    model, _ = networks.make("plain")
    model.train()
    data = images(256, 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(40):
        pick = torch.arange(64) + 64 * (step % 4)
        loss = nn.functional.cross_entropy(model(data.tensors[0][pick]), data.tensors[1][pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    task = Noisy(model, data, images(200, 1), images(60, 2))
    return prepare(
        task, make_runtime("onnxruntime", 1), Schedule(full_epochs=2, short=0.25, batch=32)
    )


def policy(prepared: Prepared, **how: Any) -> Policy:
    """Half of every group, all in int8, distilled."""
    groups, layers = prepared.network.groups, prepared.network.layers
    parts = {
        "prune": Prune({name: group.width // 2 for name, group in groups.items()}, "taylor"),
        "quantize": Quantize(dict.fromkeys(layers, "int8"), "mse", qat=True),
        "distill": Distill(learning_rate=0.02),
    }
    return Policy(**(parts | how))


def state(prepared: Prepared) -> dict[str, Tensor]:
    return copy.deepcopy(prepared.teacher.state_dict())


def test_nothing_done_is_the_teacher(prepared: Prepared) -> None:
    found = compress(prepared, Policy(), "recalibrate")
    search = prepared.splits.search
    assert found.metric == prepared.task.metric(prepared.search_answers, search.targets)
    assert found.metric > 80
    assert found.loss == pytest.approx(0, abs=1e-6)
    assert (found.samples, found.plan.quantized) == (0, {})
    assert float_layers(found.model) == 4


def test_a_candidate_has_the_widths_and_kernels_of_its_policy(prepared: Prepared) -> None:
    found = compress(prepared, policy(prepared), "recalibrate")
    student: Any = found.student
    assert (student.c1.out_channels, student.c2.in_channels, student.c2.out_channels) == (8, 8, 12)
    assert (student.l1.in_features, student.l1.out_features) == (48, 16)
    assert (int8_layers(found.model), float_layers(found.model)) == (4, 0)
    assert all(p.is_contiguous() for p in student.parameters())  # as checkpoints want them


def test_the_rungs_climb_and_leave_everything_behind_as_it_was(prepared: Prepared) -> None:
    teacher, how = state(prepared), policy(prepared)
    climbed, before = [], None
    for rung in RUNGS:
        kept = None if before is None else copy.deepcopy(before.student.state_dict())
        found = compress(prepared, how, rung, before, seed=3)
        if before is not None:
            assert all(torch.equal(kept[k], v) for k, v in before.student.state_dict().items())
        climbed.append(before := found)
    assert all(torch.equal(teacher[k], v) for k, v in prepared.teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in prepared.teacher.parameters())
    # 256 items are 8 batches of 32: a quarter of 2 epochs, then the rest
    assert [c.samples for c in climbed] == [0, 128, 128 + 128 + 256]
    assert climbed[0].seconds < climbed[1].seconds < climbed[2].seconds
    assert climbed[2].loss < climbed[0].loss
    assert [c.parity is None for c in climbed] == [True, True, False]
    direct = compress(prepared, how, "full", seed=3)
    assert direct.model == climbed[2].model
    assert (direct.metric, direct.loss) == (climbed[2].metric, climbed[2].loss)
    assert compress(prepared, how, "short", climbed[0], seed=4).model != climbed[1].model


def test_what_is_near_its_teacher_is_trained_no_further(prepared: Prepared) -> None:
    how = policy(prepared, prune=Prune())  # int8 alone: next to nothing to repair
    untrained = compress(prepared, how, "recalibrate")
    assert untrained.loss < NEAR
    full = compress(prepared, how, "full", compress(prepared, how, "short", untrained))
    assert (untrained.settled, full.settled, full.samples) == (True, True, 0)
    assert (full.model, full.loss) == (untrained.model, untrained.loss)
    # Who learns from the labels alone has not asked to be near.
    alone = policy(prepared, prune=Prune(), distill=Distill(alpha=0.0, learning_rate=0.02))
    assert not compress(prepared, alone, "recalibrate").settled


def test_near_is_told_of_classes_alone(prepared: Prepared) -> None:
    class Distances(Noisy):
        def loss(self, output: Tensor, target: Tensor) -> Tensor:
            return (output - nn.functional.one_hot(target, 5)).square().mean()

    task = Distances(*(getattr(prepared.task, name) for name in ("_model", "train", "val")))
    found = compress(
        dataclasses.replace(prepared, task=task), policy(prepared, prune=Prune()), "recalibrate"
    )
    assert found.loss < NEAR
    assert not found.settled


def test_training_that_leads_away_from_the_teacher_is_given_up(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[compress.__module__], "NEAR", 0.0)
    # int8 alone: next to nothing to repair
    how = policy(prepared, prune=Prune(), distill=Distill(learning_rate=0.2))
    untrained = compress(prepared, how, "recalibrate")
    short = compress(prepared, how, "short", untrained)
    full = compress(prepared, how, "full", short)
    assert (untrained.settled, short.settled, full.settled) == (False, True, True)
    assert short.loss == full.loss == untrained.loss
    assert short.model == full.model == untrained.model
    assert (short.samples, full.samples) == (128, 128)  # what was tried is paid, and no more
    assert short.metric == untrained.metric
    assert full.parity is not None


def test_what_is_lost_by_little_at_the_short_rung_may_come_back(prepared: Prepared) -> None:
    how = policy(prepared)
    untrained, trained = (compress(prepared, how, rung) for rung in ("recalibrate", "short"))
    nearer = dataclasses.replace(untrained, loss=trained.loss / 1.5)
    assert compress(prepared, how, "short", nearer).model == trained.model
    near = dataclasses.replace(untrained, loss=trained.loss / 2.5)
    assert compress(prepared, how, "short", near).settled


def test_what_learns_from_labels_alone_need_not_be_near_the_teacher(prepared: Prepared) -> None:
    how = policy(prepared, distill=Distill(alpha=0.0, learning_rate=0.02))
    short = compress(prepared, how, "short")
    near = dataclasses.replace(short, loss=short.loss / 10)
    assert not compress(prepared, how, "full", near).settled


def test_the_full_rung_keeps_what_it_came_from_where_it_ends_farther_away(
    prepared: Prepared,
) -> None:
    how = policy(prepared)
    short = compress(prepared, how, "short")
    full = compress(prepared, how, "full", dataclasses.replace(short, loss=1e-6))
    assert full.settled
    assert (full.model, full.loss) == (short.model, short.loss)
    assert full.samples > short.samples
    assert not compress(prepared, how, "full", short).settled


def test_the_numbers_are_those_of_the_artifact(prepared: Prepared) -> None:
    found = compress(prepared, policy(prepared), "full")
    selection = prepared.splits.selection
    answers = run_session(prepared.runtime.load(found.model), selection)
    assert found.metric == prepared.task.metric(answers, selection.targets)
    assert found.parity is not None
    assert found.parity.agreement >= 0.98
    assert found.parity.inputs == 100


def test_without_distillation_nothing_is_trained(prepared: Prepared) -> None:
    found = compress(prepared, policy(prepared, distill=None), "full")
    assert found.samples == 0


def test_a_rung_is_held_to_the_one_before_it(prepared: Prepared) -> None:
    first = compress(prepared, Policy(), "recalibrate")
    for rung, how in (("full", Policy()), ("recalibrate", Policy()), ("short", policy(prepared))):
        with pytest.raises(ValueError, match="goes on from the rung before it"):
            compress(prepared, how, rung, first)
    with pytest.raises(ValueError, match="rung must be one of"):
        compress(prepared, Policy(), "long")


def test_training_that_diverges_leaves_the_student_untrained(prepared: Prepared) -> None:
    how = policy(prepared, distill=Distill(learning_rate=1e6))
    untrained = compress(prepared, how, "recalibrate")
    short = compress(prepared, how, "short", untrained)
    assert (short.model, short.loss, short.settled) == (untrained.model, untrained.loss, True)
    assert short.diverged is not None
    assert "learning rate 1e+06" in short.diverged
    assert 0 < short.samples <= 128  # what was tried is paid
    full = compress(prepared, how, "full", short)
    assert (full.model, full.samples) == (untrained.model, short.samples)
    assert full.diverged == short.diverged
    assert full.parity is not None


@pytest.mark.parametrize("stage", ["full", "qat"])
def test_the_full_rung_keeps_what_it_came_from_where_it_diverges(
    prepared: Prepared, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = policy(prepared)
    short = compress(prepared, how, "short")
    # In float it sees the rest of the first epoch and half of the second, then with quantizers the
    # other half: a teacher that answers NaN the first or the third time that it is asked.
    asked, whole = itertools.count(), Prepared.epoch
    factors = {{"full": 0, "qat": 2}[stage]: math.nan}

    def epoch(self: Prepared, number: int) -> Epoch:
        found = whole(self, number)
        return dataclasses.replace(found, answers=found.answers * factors.get(next(asked), 1.0))

    monkeypatch.setattr(Prepared, "epoch", epoch)
    full = compress(prepared, how, "full", short)
    assert (full.settled, full.model, full.loss) == (True, short.model, short.loss)
    assert full.diverged is not None
    assert short.diverged is None
    assert full.samples == short.samples + {"full": 0, "qat": 256}[stage]


def test_divergence_fails_what_learns_from_labels_alone(prepared: Prepared) -> None:
    how = policy(prepared, distill=Distill(learning_rate=1e6, alpha=0.0))
    with pytest.raises(Impossible, match=r"learning rate 1e\+06"):
        compress(prepared, how, "short")


def test_an_answer_that_overflows_fails_the_candidate(prepared: Prepared) -> None:
    how = policy(prepared)
    student = compress(prepared, how, "short")
    with torch.no_grad():
        for parameter in student.student.parameters():
            parameter.mul_(1e30)
    with pytest.raises(Impossible, match="the values to calibrate are not finite"):
        compress(prepared, how, "full", student)


def test_the_error_of_a_drop_is_that_of_paired_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    task, count, found = ClassificationTask(nn.Identity(), [], []), 2000, []
    for rate in (0.01, 0.03, 0.1) * 20:
        targets = torch.randint(0, 3, (count,), generator=generator)
        reference = torch.nn.functional.one_hot(targets, 3).float()
        wrong = torch.rand(count, generator=generator) < rate
        answers = torch.where(wrong[:, None], reference.roll(1, 1), reference)
        exact = 100 * (wrong.double().var() / count).sqrt().item()
        error = drop_error(task, answers, reference, Items(reference, targets))
        assert error is not None
        found.append(error / exact)
    assert sum(found) / len(found) == pytest.approx(1, abs=0.1)


class Ranking(ClassificationTask):
    """A metric that one class alone does not have."""

    def metric(self, output: Any, target: Any) -> float:
        if len(target.unique()) < 2:
            raise ValueError("only one class")
        return super().metric(output, target)


def test_a_drop_has_no_error_where_parts_have_no_metric() -> None:
    answers, targets = torch.eye(3)[torch.arange(40) % 3], torch.arange(40) // 20
    alike = Items(answers, targets)
    plain = ClassificationTask(nn.Identity(), [], [])
    assert drop_error(plain, answers, answers, alike) == 0
    assert drop_error(plain, answers[:1], answers[:1], alike.first(1)) is None
    few = Items(answers, torch.zeros(40))
    assert drop_error(Ranking(nn.Identity(), [], []), answers, answers, few) is None


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 16), nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, b: Tensor, a: Tensor) -> Tensor:
        return self.head(torch.relu(self.left(b) + self.right(a)))  # type: ignore[no-any-return]


class Records:
    """Items as dicts (``keys``) or as tuples, without a batch axis."""

    def __init__(self, count: int, keys: bool) -> None:
        self.b, self.a = torch.randn(count, 6), torch.randn(count, 4)
        self.keys = keys

    def __len__(self) -> int:
        return len(self.b)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        b, a = self.b[index], self.a[index]
        return ({"a": a, "b": b} if self.keys else (b, a)), index % 3


@pytest.mark.parametrize("keys", [True, False])
def test_inputs_as_dicts_and_tuples_without_augment(keys: bool) -> None:
    torch.manual_seed(0)
    task = ClassificationTask(Pair(), Records(64, keys), Records(40, keys))
    found = prepare(task, make_runtime("onnxruntime", 1), Schedule(1, 0.5, 16))
    assert found.variants == 1
    how = Policy(
        Prune({name: 8 for name in found.network.groups}),
        Quantize({"head": "int8"}),
        Distill(learning_rate=0.01),
    )
    candidate = compress(found, how, "full")
    assert candidate.samples == 64
    assert candidate.parity is not None
    assert (int8_layers(candidate.model), float_layers(candidate.model)) == (1, 2)


@pytest.mark.parametrize("size", [2, 33])
def test_tiny_training_sets(size: int, networks: ModuleType) -> None:
    # 33 is a batch and one item, which has no variance of its own
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(size, 12), torch.arange(size) % 4)
    task = ClassificationTask(networks.make("mlp")[0], data, data)
    found = prepare(task, make_runtime("onnxruntime", 1), Schedule(2, 0.5, 32))
    how = Policy(Prune({"a": 8}), Quantize({"a": "int8", "b": "int8"}), Distill(learning_rate=1e-3))
    assert compress(found, how, "full").samples > 0


@pytest.mark.parametrize("calibration", ["mse", "fitted"])
def test_a_network_of_which_a_convolution_gives_the_answer(
    calibration: str, networks: ModuleType
) -> None:
    """A class for each place: its scores are rounded, as ONNX Runtime's kernel makes them."""
    torch.manual_seed(0)
    inputs = torch.randn(96, 3, 8, 8)
    data = TensorDataset(inputs, (inputs[:, 0] > 0).long() + 2 * (inputs[:, 1] > 0))
    task = ClassificationTask(networks.make("pixels")[0], data, data)
    found = prepare(task, make_runtime("onnxruntime", 1), Schedule(2, 0.5, 16))
    quantize = Quantize(dict.fromkeys(found.network.layers, "int8"), calibration, qat=True)
    prune = Prune({"c1": 8, "c2": 16}, "taylor", reconstruct=True)
    how = Policy(prune, quantize, Distill(learning_rate=0.02))
    untrained = compress(found, dataclasses.replace(how, distill=None), "recalibrate")
    trained = compress(found, how, "full")
    for candidate in (untrained, trained):
        assert (int8_layers(candidate.model), float_layers(candidate.model)) == (3, 0)
    assert trained.parity is not None
    assert trained.parity.agreement >= 0.995
    assert trained.loss < untrained.loss


def strided(x: Tensor) -> Tensor:
    """The same values as ``x`` [A, B], in a memory that does not hold them in a row."""
    spread = torch.zeros(x.shape[1], 2 * x.shape[0])
    spread[:, ::2] = x.T
    return spread[:, ::2].T


def test_memory_that_is_not_contiguous_changes_nothing(networks: ModuleType) -> None:
    torch.manual_seed(0)
    inputs, classes = torch.randn(64, 12), torch.arange(64) % 4

    def made(like: Callable[[Tensor], Tensor]) -> Candidate:
        model, data = networks.make("mlp")[0], TensorDataset(like(inputs), classes)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data = like(parameter.data)
        assert model.a.weight.is_contiguous() == (like is torch.clone)
        task = ClassificationTask(model, data, data)
        found = prepare(task, make_runtime("onnxruntime", 1), Schedule(1, 0.5, 16))
        quantize = Quantize({"a": "int8", "b": "int8"}, "fitted")
        prune = Prune({"a": 8}, "taylor", reconstruct=True)
        return compress(found, Policy(prune, quantize, Distill(learning_rate=0.01)), "full")

    assert made(strided).model == made(torch.clone).model

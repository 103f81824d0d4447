"""Pruning: which channels stay, the surgery, and batch-norm statistics anew."""

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from flyweight.compressors.data import Items
from flyweight.compressors.prune import (
    CRITERIA,
    LEAST_LEFT,
    call,
    importance,
    kept_channels,
    lay_out,
    recompute_statistics,
    remove,
)
from flyweight.spaces import Group, Impossible
from flyweight.spaces.tracing import trace

NAMES = [
    "plain", "mlp", "separable", "concat", "preactivation", "two", "siamese", "recurrent", "dense",
    "inception", "inplace", "signal",
]  # fmt: skip


def batch_of(example: Any, count: int) -> Any:
    torch.manual_seed(1)
    if isinstance(example, tuple):
        return tuple(torch.randn(count, *t.shape[1:]) for t in example)
    return torch.randn(count, *example.shape[1:])


def halves(network: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randperm(group.width, generator=generator)[: group.width // 2].sort().values
        for name, group in network.groups.items()
        if group.multiple_of == 1
    }


@pytest.mark.parametrize("name", NAMES)
def test_removing_dead_channels_changes_no_answer(networks: ModuleType, name: str) -> None:
    # Independent of the surgery: channels that say nothing may go, and nobody may notice.
    model, example = networks.make(name)
    network = networks.traced(name)
    kept = halves(network)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for group, indices in kept.items():
            gone = sorted(set(range(network.groups[group].width)) - set(indices.tolist()))
            for member in network.groups[group].members:
                modules[member].weight[gone] = 0
                if modules[member].bias is not None:
                    modules[member].bias[gone] = 0
        for module in modules.values():  # a norm maps 0 to 0, so that a dead channel stays dead
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.bias.zero_()
                module.running_mean.zero_()
        student = remove(model, network, example, kept)
        inputs = batch_of(example, 3)
        assert torch.allclose(call(student, inputs), call(model, inputs), atol=1e-5)
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in model.parameters())


def test_removal_keeps_the_channels_asked_for_and_the_teacher(networks: ModuleType) -> None:
    model, example = networks.make("plain")
    before = copy.deepcopy(model.state_dict())
    kept = {"c1": torch.tensor([1, 3, 4, 11]), "l1": torch.arange(0, 32, 2)}
    student: Any = remove(model, networks.traced("plain"), example, kept)
    assert torch.equal(student.c1.weight, before["c1.weight"][kept["c1"]])
    assert torch.equal(student.c2.weight, before["c2.weight"][:, kept["c1"]])
    assert torch.equal(student.l1.weight, before["l1.weight"][kept["l1"]])
    assert torch.equal(student.l2.weight, before["l2.weight"][:, kept["l1"]])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_flattened_channels_go_with_all_their_positions(networks: ModuleType) -> None:
    model, example = networks.make("plain")
    student: Any = remove(model, networks.traced("plain"), example, {"c2": torch.tensor([0, 5])})
    weight = dict(model.named_parameters())["l1.weight"].reshape(32, 24, 4)
    assert torch.equal(student.l1.weight, weight[:, [0, 5]].reshape(32, 8))


def scores_of(networks: ModuleType, name: str, criterion: str) -> dict[str, torch.Tensor]:
    model, example = networks.make(name)
    calibration = Items(batch_of(example, 8), torch.arange(8) % 3)
    network = networks.traced(name)
    return importance(model, network, criterion, calibration, F.cross_entropy)


def test_l1_is_the_mean_over_the_layers_of_a_group(networks: ModuleType) -> None:
    model: Any = networks.make("plain")[0]
    outs = model.c1.weight.abs().sum((1, 2, 3))
    ins = model.c2.weight.abs().sum((0, 2, 3))
    expected = (outs + ins) / (outs + ins).mean()
    assert torch.allclose(scores_of(networks, "plain", "l1")["c1"], expected, rtol=1e-4)


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_every_criterion_scores_every_channel_and_repeats(
    networks: ModuleType, criterion: str
) -> None:
    found = scores_of(networks, "separable", criterion)
    groups = networks.traced("separable").groups
    assert {name: len(v) for name, v in found.items()} == {n: g.width for n, g in groups.items()}
    assert all(torch.isfinite(v).all() for v in found.values())
    torch.manual_seed(7)  # whatever ran before
    again = scores_of(networks, "separable", criterion)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("criterion", list(CRITERIA))
@pytest.mark.parametrize("name", ["separable", "plain", "sequence"])
def test_groups_compare(networks: ModuleType, name: str, criterion: str) -> None:
    # 1 is an average channel of its group, whatever the criterion's unit and the weights' scale.
    for scores in scores_of(networks, name, criterion).values():
        assert scores.mean().item() == pytest.approx(1, rel=1e-5)
        assert (scores >= 0).all()


def rescaled(networks: ModuleType) -> tuple[Any, Any]:
    """The same function twice: with relu, c1 may be twice as loud if c2 listens half as much."""
    model: Any = networks.make("plain")[0]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        factors = torch.linspace(0.5, 2, 16)
        twin.c1.weight.mul_(factors[:, None, None, None])
        twin.c1.bias.mul_(factors)
        twin.c2.weight.div_(factors[None, :, None, None])
    return model, twin


@pytest.mark.parametrize(("criterion", "same"), [("taylor", True), ("l1", False)])
def test_what_the_loss_decides_does_not_depend_on_the_scale_of_weights(
    networks: ModuleType, criterion: str, same: bool
) -> None:
    model, twin = rescaled(networks)
    example = networks.make("plain")[1]
    items = Items(batch_of(example, 24), torch.arange(24) % 5)
    assert torch.allclose(model(items.inputs), twin(items.inputs), atol=1e-5)
    network = networks.traced("plain")
    one, other = (
        importance(m, network, criterion, items, F.cross_entropy)["c1"] for m in (model, twin)
    )
    assert torch.allclose(one, other, rtol=1e-3) == same


def test_a_group_that_nothing_distinguishes_scores_1(networks: ModuleType) -> None:
    model: Any
    model, example = networks.make("plain")
    with torch.no_grad():
        model.l2.weight.zero_()  # nothing reaches the answer
    items = Items(batch_of(example, 8), torch.arange(8) % 5)
    found = importance(model, networks.traced("plain"), "taylor", items, F.cross_entropy)
    assert torch.equal(found["c1"], torch.ones(16))


def test_taylor_leaves_out_what_the_answer_does_not_depend_on(networks: ModuleType) -> None:
    model: Any
    model, example = networks.make("plain")
    with torch.no_grad():
        model.c2.weight[:, 3] = 0  # nobody listens to channel 3, however loud it is
        model.c1.weight[3] *= 100
    calibration = Items(batch_of(example, 8), torch.arange(8) % 5)
    network = networks.traced("plain")
    taylor = importance(model, network, "taylor", calibration, F.cross_entropy)["c1"]
    l1 = importance(model, network, "l1", calibration, F.cross_entropy)["c1"]
    assert taylor.argmin() == 3
    assert l1.argmax() == 3


def test_taylor_takes_a_backbone_that_has_no_gradients() -> None:
    class Frozen(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = self[0](x).relu()
            return self[2](self[1](x).relu())

    torch.manual_seed(0)
    model = Frozen(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)).eval()
    found = importance(
        model, trace(model, torch.rand(1, 6)), "taylor",
        Items(torch.randn(8, 6), torch.arange(8) % 3), F.cross_entropy,
    )  # fmt: skip
    assert {name: len(scores) for name, scores in found.items()} == {"0": 8, "1": 8}
    assert found["1"].std() > 0


def test_an_unknown_criterion_is_refused(networks: ModuleType) -> None:
    with pytest.raises(Impossible, match="no criterion 'taylr'; did you mean 'taylor'"):
        scores_of(networks, "mlp", "taylr")
    with pytest.raises(Impossible, match=f"known: {', '.join(sorted(CRITERIA))}"):
        scores_of(networks, "mlp", "zzz")


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30, unique=True), st.data())
def test_the_most_important_channels_are_kept(values: list[float], data: Any) -> None:
    width = data.draw(st.integers(1, len(values)))
    scores = torch.tensor(values, dtype=torch.float64)
    kept = kept_channels({"g": scores}, {"g": width}, {"g": Group("g", len(values), ("g",))})
    if width == len(values):
        assert kept == {}
        return
    assert kept["g"].tolist() == sorted(kept["g"].tolist())
    assert sorted(scores[kept["g"]].tolist()) == sorted(values)[-width:]


def test_units_are_kept_whole_by_the_sum_of_their_channels() -> None:
    scores = torch.tensor([5.0, 0, 3, 3, 1, 1])
    heads = Group("g", 6, ("g",), 2, (0, 0, 1, 1, 2, 2))
    assert kept_channels({"g": scores}, {"g": 2}, {"g": heads})["g"].tolist() == [2, 3]
    assert kept_channels({"g": scores}, {"g": 4}, {"g": heads})["g"].tolist() == [0, 1, 2, 3]
    strided = Group("g", 6, ("g",), 3, (0, 1, 0, 1, 0, 1))
    assert kept_channels({"g": scores}, {"g": 3}, {"g": strided})["g"].tolist() == [0, 2, 4]


def test_the_importance_of_a_head_is_that_of_its_channels(networks: ModuleType) -> None:
    model: Any = networks.make("fused")[0]
    found = scores_of(networks, "fused", "l1")["qkv"].reshape(4, 8)
    made = model.qkv.weight.abs().sum(1).reshape(3, 4, 8).sum((0, 2))
    read = model.proj.weight.abs().sum(0).reshape(4, 8).sum(1)
    assert torch.allclose(found[:, 0], (made + read) / (made + read).mean(), rtol=1e-4)
    assert torch.equal(found, found[:, :1].expand(4, 8))


def test_half_a_head_cannot_go(networks: ModuleType) -> None:
    model, example = networks.make("fused")
    with pytest.raises(ValueError, match="group 'qkv' loses whole units of 8 channels"):
        remove(model, networks.traced("fused"), example, {"qkv": torch.arange(12)})


def test_statistics_are_those_of_the_data() -> None:
    model: Any = nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6), nn.ReLU())
    items = Items(torch.randn(96, 12) * 3 + 1, torch.zeros(96))
    recompute_statistics(model, items, batch=32)
    with torch.no_grad():
        values = copy.deepcopy(model[0]).double()(items.inputs.double()).reshape(3, 32, 6)
    assert torch.allclose(model[1].running_mean.double(), values.mean((0, 1)), atol=1e-5)
    assert torch.allclose(model[1].running_var.double(), values.var(1).mean(0), rtol=1e-4)
    assert model[1].momentum == 0.1
    assert not model[1].training


def test_a_channel_of_which_nothing_is_left_is_not_blown_up() -> None:
    """What feeds it is gone, or silent on the data at hand."""
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[1].running_var[:] = torch.tensor([4.0, 4.0, 4.0, 0.0])
    with torch.no_grad():
        model[0].weight *= torch.tensor([[0.0], [1e-3], [1.0], [1.0]])
    items = Items(torch.randn(64, 3), torch.zeros(64))
    for seen, least in ((0, 0.0), (1, 4.0 * LEAST_LEFT)):
        statistics = copy.deepcopy(model)
        statistics[1].num_batches_tracked.fill_(seen)
        recompute_statistics(statistics, items)
        anew = model[0](items.inputs).var(0)
        anew[:2] = anew[:2].clamp(min=least)
        assert statistics[1].running_var.tolist() == pytest.approx(anew.tolist(), rel=1e-4)


def test_statistics_leave_out_a_last_batch_of_one() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    recompute_statistics(model, Items(torch.randn(33, 3), torch.zeros(33)), batch=32)
    assert torch.isfinite(model[1].running_var).all()


def test_layout_changes_no_answer(networks: ModuleType) -> None:
    model, example = networks.make("separable")
    with torch.no_grad():
        before = model(example)
        lay_out(model, torch.channels_last)
        assert torch.allclose(model(example), before, atol=1e-6)
    lay_out(model, torch.contiguous_format)
    assert all(p.is_contiguous() for p in model.parameters())

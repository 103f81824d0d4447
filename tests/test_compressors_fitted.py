"""Equalization and correction: the same in float, nearer to it in int8."""

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from executed import float_layers, int8_layers
from torch import Tensor, fx, nn
from torch.nn import functional as F

from flyweight.compressors import correct
from flyweight.compressors.correct import (
    correct_,
    fit_,
    rounded_in_turn,
    sampled_rows,
    second_moments,
)
from flyweight.compressors.data import Items
from flyweight.compressors.equalize import equalize, tied_channels
from flyweight.compressors.export import to_onnx
from flyweight.compressors.freeze import freeze
from flyweight.compressors.parity import compare, run_module, run_session
from flyweight.compressors.prune import remove
from flyweight.compressors.quantize import (
    QuantizedLayer,
    calibrate,
    fold_norms,
    insert_quantizers,
    settle,
)
from flyweight.compressors.reconstruct import LARGEST, input_rows
from flyweight.kernels import make_runtime
from flyweight.spaces import Blueprint, Capabilities, Policy, Quantize, blueprint
from flyweight.spaces.tracing import trace, trace_graph

NAMES = ["plain", "mlp", "separable", "concat", "preactivation", "grouped", "gate", "two"]


def uneven(model: nn.Module) -> nn.Module:
    """Channels of very different loudness, as trained networks have."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                loud = torch.exp(1.5 * torch.randn(len(module.weight), generator=generator))
                module.weight.mul_(loud.reshape(-1, *[1] * (module.weight.ndim - 1)))
    return model


def draw(example: Any, count: int, seed: int = 0) -> Items:
    generator = torch.Generator().manual_seed(seed)
    parts = example if isinstance(example, tuple) else (example,)
    made = tuple(torch.randn(count, *p.shape[1:], generator=generator) for p in parts)
    return Items(made if isinstance(example, tuple) else made[0], torch.zeros(count))


def prepared(networks: ModuleType, name: str, capabilities: Capabilities) -> Any:
    model, example = networks.make(name)
    network = networks.traced(name)
    plan = blueprint(
        network, Policy(quantize=Quantize(dict.fromkeys(network.layers, "int8"))), capabilities
    )
    return fold_norms(trace_graph(uneven(model), example), network), network, plan, example


def rounded(folded: fx.GraphModule, network: Any, plan: Blueprint, items: Items, fit: bool) -> Any:
    graph = insert_quantizers(folded, plan, "minmax")
    calibrate(graph, items, "minmax")
    if fit:
        correct_(graph, items)
    settle(graph, network, plan)
    return graph


def noise(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).var() / exact.var()).item()


@pytest.mark.parametrize("name", NAMES)
def test_equalization_changes_nothing_in_float(
    networks: ModuleType, capabilities: Capabilities, name: str
) -> None:
    folded, network, plan, example = prepared(networks, name, capabilities)
    before = copy.deepcopy(folded.state_dict())
    items = draw(example, 32)
    made = equalize(folded, network, plan, items)
    exact = run_module(folded, items)
    assert torch.allclose(run_module(made, items), exact, atol=1e-4 * exact.abs().max().item())
    assert all(torch.equal(v, folded.state_dict()[k]) for k, v in before.items())
    if tied_channels(network):
        assert any(not torch.equal(v, made.state_dict()[k]) for k, v in before.items())


def test_equalization_takes_a_pruned_student(
    networks: ModuleType, capabilities: Capabilities
) -> None:
    model, example = networks.make("separable")
    network = networks.traced("separable")
    kept = {name: torch.arange(group.width // 2) for name, group in network.groups.items()}
    pruned = remove(uneven(model), network, example, kept)
    folded = fold_norms(trace_graph(pruned, example), network)
    plan = blueprint(
        network, Policy(quantize=Quantize(dict.fromkeys(network.layers, "int8"))), capabilities
    )
    items = draw(example, 16)
    made = equalize(folded, network, plan, items)
    assert torch.allclose(run_module(made, items), run_module(folded, items), atol=1e-3)


def test_channels_are_tied_where_nothing_but_scaling_lies_between(networks: ModuleType) -> None:
    tied = {tuple(c.makers): c for c in tied_channels(networks.traced("separable"))}
    assert set(tied) == {("stem.0", "project.0"), ("expand.0",), ("depth.0",)}
    assert tied["stem.0", "project.0"].readers == ["expand.0", "head"]
    assert tied["expand.0",].clipped
    joined = {m for c in tied_channels(networks.traced("concat")) for m in c.makers}
    assert joined == {"join"}  # what is concatenated stays


def test_who_reads_a_size_ties_no_channels() -> None:
    class Sized(nn.Module):
        def __init__(self, viewed: bool) -> None:
            super().__init__()
            self.c1, self.c2 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)
            self.head, self.viewed = nn.Linear(6, 2), viewed

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.c1(x))
            count = x.shape[0]
            x = F.adaptive_avg_pool2d(self.c2(x), 1)
            return self.head(x.view(count, x.size(1) * 1) if self.viewed else x.flatten(1))

    for viewed in (True, False):
        found = tied_channels(trace(Sized(viewed), torch.rand(1, 3, 4, 4)))
        assert [(c.makers, c.readers) for c in found] == [(["c1"], ["c2"]), (["c2"], ["head"])]


@pytest.mark.parametrize("name", ["plain", "separable", "concat"])
def test_fitted_students_are_nearer_to_float_on_items_never_seen(
    networks: ModuleType, capabilities: Capabilities, name: str
) -> None:
    folded, network, plan, example = prepared(networks, name, capabilities)
    seen, fresh = draw(example, 64), draw(example, 200, seed=1)
    exact = run_module(folded, fresh)
    plain = noise(run_module(rounded(folded, network, plan, seen, False), fresh), exact)
    alike = equalize(folded, network, plan, seen)
    fitted = noise(run_module(rounded(alike, network, plan, seen, True), fresh), exact)
    assert fitted < 0.8 * plain


@pytest.mark.parametrize("name", ["plain", "separable", "concat", "grouped"])
def test_what_is_fitted_runs_in_int8_as_it_was_fitted(networks: ModuleType, name: str) -> None:
    runtime = make_runtime("onnxruntime", 1)
    folded, network, plan, example = prepared(networks, name, runtime.capabilities)
    items = draw(example, 200)
    graph = rounded(equalize(folded, network, plan, items), network, plan, items, True)
    artifact = to_onnx(freeze(graph), example)
    found = compare(run_module(graph, items), run_session(runtime.load(artifact), items))
    assert found.mean_steps < 0.2
    if name != "grouped":
        assert (int8_layers(artifact), float_layers(artifact)) == (len(network.layers), 0)


def test_the_mean_error_of_the_last_layer_is_gone(
    networks: ModuleType, capabilities: Capabilities
) -> None:
    folded, network, plan, example = prepared(networks, "plain", capabilities)
    items = draw(example, 64)
    exact = run_module(folded, items)
    off = [
        (run_module(rounded(folded, network, plan, items, fit), items) - exact).mean(0).abs().max()
        for fit in (False, True)
    ]
    assert off[1] < 0.02 * off[0]


@pytest.mark.parametrize("layer", [
    nn.Linear(5, 4), nn.Conv1d(5, 4, 3, stride=2, padding=1), nn.Conv2d(5, 4, (3, 2), padding=1),
    nn.Conv2d(4, 8, 1, stride=2, groups=2), nn.Conv2d(6, 6, 3, groups=6, padding=2, dilation=2),
])  # fmt: skip
def test_rows_are_what_meets_the_weights(layer: Any) -> None:
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    sizes = {nn.Linear: (), nn.Conv1d: (9,), nn.Conv2d: (8, 7)}[type(layer)]
    x = torch.randn(20, channels, *sizes)
    with torch.no_grad():
        expected = layer(x).transpose(0, 1).flatten(1).sort(1).values
        rows = sampled_rows(layer, x)  # [G, R, F]
        assert rows is not None
        weight = layer.weight.reshape(len(rows), -1, rows.shape[2])  # [G, O, F]
        found = (weight @ rows.mT).flatten(0, 1) + layer.bias[:, None]
    assert torch.allclose(found.sort(1).values, expected, atol=1e-4)


def test_rows_are_never_those_of_all_images_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def noted(layer: Any, x: Tensor) -> Tensor:
        sizes.append(len(x))
        return input_rows(layer, x)

    monkeypatch.setattr(correct, "input_rows", noted)
    rows = sampled_rows(nn.Conv2d(2, 4, 3, padding=1), torch.randn(32, 2, 32, 32))
    assert sizes == [1] * 16
    assert rows is not None
    assert rows.shape == (1, 4096, 18)


def test_images_smaller_than_the_stride_have_rows() -> None:
    rows = sampled_rows(nn.Conv2d(2, 4, 1, stride=2), torch.randn(8, 2, 3, 1))
    assert rows is not None
    assert rows.shape == (1, 16, 2)


def test_of_a_layer_with_too_many_inputs_only_the_bias_is_fitted() -> None:
    layer = QuantizedLayer(nn.Linear(LARGEST + 1, 2), 8, "minmax")
    before, x = layer.layer.weight.clone(), torch.rand(4, LARGEST + 1)
    with torch.no_grad():
        fit_(layer, x, layer.layer(x) + 1)
        assert torch.equal(layer.layer.weight, before)
    assert layer.layer.bias.mean() > 0.5


def test_rounding_in_turn_beats_rounding_to_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator)
    rows = torch.randn(1, 4000, 12, generator=generator) @ mix
    h = second_moments(rows)
    weight = torch.randn(1, 16, 12, generator=generator, dtype=torch.float64)
    step = weight.abs().amax(2, keepdim=True) / 7
    found = rounded_in_turn(weight, h, step, 7)
    nearest = (weight / step).round().clamp(-7, 7) * step

    def error(w: Tensor) -> float:
        return ((w - weight) @ h @ (w - weight).mT).diagonal(dim1=1, dim2=2).sum().item()

    assert torch.allclose(found / step, (found / step).round(), atol=1e-9)
    assert (found / step).abs().max() <= 7 + 1e-9
    assert error(found) < 0.5 * error(nearest)


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_the_nearest() -> None:
    weight = torch.randn(1, 4, 6, dtype=torch.float64)
    step = torch.full((1, 4, 1), 0.1, dtype=torch.float64)
    h = torch.eye(6, dtype=torch.float64)[None]
    found = rounded_in_turn(weight, h, step, 1000)
    assert torch.allclose(found, (weight / step).round() * step)


@pytest.mark.parametrize("name", ["plain", "separable"])
def test_one_item_and_constant_values_are_enough(
    networks: ModuleType, capabilities: Capabilities, name: str
) -> None:
    folded, network, plan, example = prepared(networks, name, capabilities)
    one = Items(torch.zeros_like(example), torch.zeros(1))  # every value is constant
    graph = rounded(equalize(folded, network, plan, one), network, plan, one, True)
    exact = run_module(folded, one)
    assert torch.allclose(run_module(graph, one), exact, atol=0.05 * exact.abs().max().item())
    for layer in (m for m in graph.modules() if isinstance(m, QuantizedLayer)):
        assert torch.isfinite(layer.layer.weight).all()
        assert torch.isfinite(layer.layer.bias).all()


class Quiet(nn.Module):
    """Behind a ReLU6 a channel that speaks only where an input is large, then a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 3)
        with torch.no_grad():
            self.c.weight[0], self.c.bias[0] = 4.0, -8.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu6(self.c(x)).mean((2, 3)))


class Rows(nn.Module):
    """A mean over channels, of which there are as many as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.c(x)).mean(1).flatten(1))


def equalized(
    model: nn.Module, int8: list[str], items: Items, capabilities: Capabilities
) -> tuple[fx.GraphModule, fx.GraphModule]:
    example = items.inputs[:1]
    with torch.no_grad():
        model.c.weight *= torch.linspace(0.1, 3, 8)[:, None, None, None]  # type: ignore[operator]
    network = trace(model.eval(), example)
    plan = blueprint(network, Policy(quantize=Quantize(dict.fromkeys(int8, "int8"))), capabilities)
    folded = fold_norms(trace_graph(model, example), network)
    return folded, equalize(folded, network, plan, items)


@pytest.mark.parametrize("int8", [["head"], ["c", "head"]])
def test_what_was_silent_or_is_clipped_in_float_stays_what_it_is(
    capabilities: Capabilities, int8: list[str]
) -> None:
    torch.manual_seed(0)
    small = Items(0.2 * torch.rand(32, 3, 8, 8), torch.zeros(32))
    before, after = equalized(Quiet(), int8, small, capabilities)
    assert not torch.equal(before.c.weight, after.c.weight)  # type: ignore[union-attr]
    large = Items(torch.rand(32, 3, 8, 8), torch.zeros(32))
    assert noise(run_module(after, large), run_module(before, large)) < 1e-3


def test_values_somewhat_larger_than_any_seen_are_not_clipped(capabilities: Capabilities) -> None:
    class Depthwise(Quiet):
        """Its channels are made as loud as a ReLU6 allows: a depthwise layer loses nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.d = nn.Conv2d(8, 8, 3, groups=8)
            with torch.no_grad():
                nn.init.zeros_(self.c.bias)  # type: ignore[arg-type]
                self.c.weight.abs_()[7] = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.d(F.relu6(self.c(x))).mean((2, 3)))

    torch.manual_seed(0)
    seen = torch.rand(32, 3, 8, 8)
    items = Items(seen, torch.zeros(32))
    before, after = equalized(Depthwise(), ["c", "d"], items, capabilities)
    louder = Items(1.4 * seen, torch.zeros(32))
    assert not torch.equal(before.c.weight, after.c.weight)  # type: ignore[union-attr]
    torch.testing.assert_close(run_module(after, louder), run_module(before, louder))


def test_a_mean_over_channels_is_not_equalized(capabilities: Capabilities) -> None:
    torch.manual_seed(0)
    items = Items(torch.randn(32, 3, 8, 8), torch.zeros(32))
    before, after = equalized(Rows(), ["c", "head"], items, capabilities)
    torch.testing.assert_close(run_module(after, items), run_module(before, items))


def test_weights_that_are_zero_stay_zero() -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(1, 6, 20).double(), torch.randn(1, 100, 20)
    rows = rows + rows.mean(2, keepdim=True) * 4  # correlated: errors are passed on
    weight[torch.rand(weight.shape) < 0.7] = 0
    found = rounded_in_turn(weight, second_moments(rows), torch.full((1, 6, 1), 0.02).double(), 127)
    assert bool((found[weight == 0] == 0).all())
    assert bool((found[weight != 0] != 0).any())

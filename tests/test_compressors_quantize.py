"""Quantization in PyTorch: ranges, fake quantization, folding, training."""

import copy
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from flyweight.compressors.data import Items
from flyweight.compressors.observe import (
    ACTIVATION_RANGES,
    BINS,
    PERCENTILE,
    Observer,
    weight_scale,
)
from flyweight.compressors.quantize import (
    ActivationQuantizer,
    QuantizedLayer,
    calibrate,
    fold_norms,
    insert_quantizers,
    quantizer_name,
    settle,
)
from flyweight.spaces import Capabilities, Impossible, Policy, Quantize, blueprint
from flyweight.spaces.tracing import trace, trace_graph

FLOATS = st.floats(-100, 100, width=32)


@given(FLOATS, FLOATS, hnp.arrays(np.float32, 20, elements=FLOATS))
def test_activations_round_as_in_float64(a: float, b: float, values: Any) -> None:
    quantizer = ActivationQuantizer()
    quantizer.set_range(min(a, b), max(a, b))
    found = quantizer(torch.from_numpy(values)).double().numpy()
    scale, zero = float(quantizer.scale), int(quantizer.zero)
    steps = values.astype(np.float64) / scale + zero
    exact = (np.clip(np.rint(steps), 0, 255) - zero) * scale
    tie = np.abs(steps - np.floor(steps) - 0.5) < 1e-3  # float32 may round it either way
    assert np.allclose(found[~tie], exact[~tie], rtol=1e-5, atol=scale * 1e-3)
    assert (np.abs(found - exact) <= 1.001 * scale).all()


@given(FLOATS, FLOATS)
def test_a_range_contains_zero_exactly(a: float, b: float) -> None:
    quantizer = ActivationQuantizer()
    quantizer.set_range(min(a, b), max(a, b))
    assert quantizer(torch.zeros(1)).item() == 0
    assert 0 <= quantizer.zero <= 255
    assert quantizer.scale > 0


def seen(*batches: Tensor) -> Observer:
    observer = Observer()
    for batch in batches:
        observer.see(batch)
    return observer


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5])
@pytest.mark.parametrize("calibration", list(ACTIVATION_RANGES))
def test_a_constant_activation_is_kept(value: float, calibration: str) -> None:
    quantizer = ActivationQuantizer()
    quantizer.set_range(*ACTIVATION_RANGES[calibration](seen(torch.full((4, 4), value))))
    assert quantizer(torch.full((2,), value)).tolist() == pytest.approx([value] * 2)


@pytest.mark.parametrize("growth", [1.0, 1.3, 40.0])
def test_the_histogram_counts_every_value_whatever_comes_later(growth: float) -> None:
    x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    x *= growth ** torch.arange(3)[:, None]
    observer = seen(torch.zeros(7), *x)
    expected, _ = np.histogram(torch.cat([torch.zeros(7), x.flatten()]), observer.edges.numpy())
    assert observer.counts.sum() == x.numel() + 7
    assert np.abs(observer.counts.cumsum(0).numpy() - expected.cumsum()).max() <= 2  # edges
    assert (observer.low, observer.high) == (x.min(), x.max())
    assert observer.reach < 3.1 * x.abs().max()  # the bins are used


def test_percentile_against_numpy() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 2 + 1
    low, high = ACTIVATION_RANGES["percentile"](seen(x))
    width = x.abs().max().item() / BINS
    assert low == pytest.approx(np.percentile(x, 100 - PERCENTILE), abs=2 * width)
    assert high == pytest.approx(np.percentile(x, PERCENTILE), abs=2 * width)


def squared_error(x: Tensor, low: float, high: float) -> float:
    quantizer = ActivationQuantizer()
    quantizer.set_range(low, high)
    return ((quantizer(x) - x).double() ** 2).sum().item()


@pytest.mark.parametrize("sign", [1, -1])
def test_least_squares_against_trying_every_range(sign: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = sign * torch.relu(torch.randn(20_000, generator=generator)) ** 3  # a long tail
    low, high = ACTIVATION_RANGES["mse"](seen(x))
    tried = [
        squared_error(x, *(r * b for b in (min(x.min().item(), 0), max(x.max().item(), 0))))
        for r in np.linspace(0.3, 1, 200)
    ]
    assert squared_error(x, low, high) <= 1.02 * min(tried)
    assert squared_error(x, low, high) < squared_error(x, x.min().item(), x.max().item())


@given(hnp.arrays(np.float32, (3, 12), elements=st.floats(-5, 5, width=32)), st.integers(4, 8))
def test_least_squares_weights_are_no_worse_than_minmax(weight: Any, bits: int) -> None:
    limit = 2 ** (bits - 1) - 1

    def error(calibration: str) -> np.ndarray[Any, Any]:
        scale = weight_scale(torch.from_numpy(weight), limit, calibration).numpy()[:, None]
        rounded = np.clip(np.rint(weight / scale), -limit, limit) * scale
        return ((rounded - weight) ** 2).sum(1)

    assert (error("mse") <= error("minmax") * (1 + 1e-4) + 1e-9).all()


@pytest.mark.parametrize(
    "name", ["mlp", "separable", "preactivation", "concat", "recurrent", "dense", "inception"]
)
def test_folding_keeps_answers_and_names(networks: ModuleType, name: str) -> None:
    model, example = networks.make(name)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    graph = trace_graph(model, example)
    before = copy.deepcopy(graph.state_dict())
    folded = fold_norms(graph, networks.traced(name))
    x = torch.randn(4, *example.shape[1:])
    assert torch.allclose(folded(x), graph(x), atol=1e-4, rtol=1e-4)
    assert [n.name for n in folded.graph.nodes] == [n.name for n in graph.graph.nodes]
    assert all(torch.equal(v, graph.state_dict()[k]) for k, v in before.items())


def quantized(networks: ModuleType, name: str, capabilities: Capabilities, how: str) -> Any:
    """A calibrated student with everything in int8, its blueprint and its items."""
    model, example = networks.make(name)
    network = networks.traced(name)
    policy = Policy(quantize=Quantize(dict.fromkeys(network.layers, "int8"), how))
    plan = blueprint(network, policy, capabilities)
    items = Items(torch.randn(64, *example.shape[1:]), torch.arange(64) % 3)
    folded = fold_norms(trace_graph(model, example), network)
    graph = insert_quantizers(folded, plan, how)
    calibrate(graph, items, how)
    settle(graph, network, plan)
    return graph, folded, plan, items


@pytest.mark.parametrize("how", list(ACTIVATION_RANGES))
@pytest.mark.parametrize("name", ["plain", "mlp", "separable", "concat"])
def test_a_quantized_student_is_near_its_float_self(
    networks: ModuleType, capabilities: Capabilities, name: str, how: str
) -> None:
    graph, folded, _, items = quantized(networks, name, capabilities, how)
    with torch.no_grad():
        exact, found = folded(items.inputs), graph(items.inputs)
    signal, noise = exact.var().item(), (found - exact).var().item()
    assert noise < signal / 100  # 20 dB


def test_weights_keep_to_the_bits_that_the_target_bears(
    networks: ModuleType, capabilities: Capabilities
) -> None:
    graph, *_ = quantized(networks, "plain", capabilities, "mse")
    layers = [m for m in graph.modules() if isinstance(m, QuantizedLayer)]
    assert len(layers) == 4
    for layer in layers:
        scale = layer.scale.reshape(-1, *[1] * (layer.layer.weight.ndim - 1))
        integers = layer.rounded_weight() / scale
        assert integers.abs().max() <= 63 + 1e-3
        assert torch.allclose(integers, integers.round(), atol=1e-3)


def test_training_reaches_weights_and_biases(
    networks: ModuleType, capabilities: Capabilities
) -> None:
    graph, _, _, items = quantized(networks, "plain", capabilities, "minmax")
    nn.functional.cross_entropy(graph(items.inputs), items.targets).backward()
    for layer in (m for m in graph.modules() if isinstance(m, QuantizedLayer)):
        assert layer.layer.weight.grad.abs().sum() > 0
        assert layer.layer.bias.grad.abs().sum() > 0


def test_biases_fit_however_small_the_weights_are(
    networks: ModuleType, capabilities: Capabilities
) -> None:
    model: Any
    model, example = networks.make("plain")
    with torch.no_grad():
        model.c2.weight[0] = 0
        model.c2.weight[1] *= 1e-12
        model.c2.bias[:2] = 5.0
    network = networks.traced("plain")
    policy = Policy(quantize=Quantize({"c2": "int8"}))
    plan = blueprint(network, policy, capabilities)
    graph = insert_quantizers(trace_graph(model, example), plan, "minmax")
    calibrate(graph, Items(torch.randn(8, 3, 8, 8), torch.zeros(8)), "minmax")
    settle(graph, network, plan)
    layer: Any = graph.get_submodule("c2")
    assert layer.bias_integers().abs().max() <= 2**31 - 1
    assert layer.rounded_bias()[:2].tolist() == pytest.approx([5.0, 5.0], rel=1e-5)


def test_values_that_are_only_moved_share_a_scale(
    networks: ModuleType, capabilities: Capabilities
) -> None:
    graph, _, plan, _ = quantized(networks, "plain", capabilities, "minmax")
    shared = {scale for value, scale in plan.quantized.items() if value != scale}
    assert shared  # max pooling and flattening
    calls = [str(n.target) for n in graph.graph.nodes]
    assert all(calls.count(quantizer_name(scale)) > 1 for scale in shared)


def test_a_calibration_set_of_one_item_is_enough(
    networks: ModuleType, capabilities: Capabilities
) -> None:
    graph, folded, _, items = quantized(networks, "plain", capabilities, "percentile")
    calibrate(graph, items.take(torch.tensor([0])), "percentile")
    x = items.inputs[:1]
    assert torch.allclose(graph(x), folded(x), atol=0.1)


def test_what_cannot_be_calibrated_is_refused_by_name(
    networks: ModuleType, capabilities: Capabilities
) -> None:
    graph, _, _, items = quantized(networks, "plain", capabilities, "minmax")
    inputs = items.inputs.clone()
    inputs[7, 0, 0, 0] = float("nan")
    for how in ACTIVATION_RANGES:
        with pytest.raises(Impossible, match=r"quantizer_.*not finite"):
            calibrate(graph, Items(inputs, items.targets), how)
    with pytest.raises(Impossible, match="known: minmax, percentile, mse"):
        calibrate(graph, items, "entropy")


@pytest.mark.parametrize(("how", "counting"), [("minmax", False), ("fitted", False), ("mse", True)])
def test_values_are_counted_only_where_a_range_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, how: str, counting: bool
) -> None:
    made = []
    monkeypatch.setattr(
        "flyweight.compressors.quantize.Observer",
        lambda counting: made.append(counting) or Observer(counting),
    )
    graph: Any = nn.Sequential(ActivationQuantizer())
    calibrate(graph, Items(torch.rand(8, 4), torch.zeros(8)), how)
    assert made == [counting]


def test_int8_refuses_padding_that_no_kernel_has(capabilities: Capabilities) -> None:
    from flyweight.spaces.tracing import trace

    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.Conv2d(8, 3, 1))
    example = torch.rand(1, 3, 8, 8)
    plan = blueprint(trace(model, example), Policy(quantize=Quantize({"0": "int8"})), capabilities)
    with pytest.raises(Impossible, match=r"layer '0'.*reflect"):
        insert_quantizers(trace_graph(model, example), plan, "minmax")


def test_an_average_takes_the_name_of_nothing_of_the_model(capabilities: Capabilities) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.average_pool = nn.Conv2d(3, 8, 3), nn.AvgPool2d(2)
            self.b, self.pool = nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1)
            self.head = nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pool(self.b(self.average_pool(self.a(x)).relu()))).flatten(1)

    torch.manual_seed(0)
    model, example = Named().eval(), torch.randn(1, 3, 10, 10)
    network = trace(model, example)
    policy = Policy(quantize=Quantize(dict.fromkeys(network.layers, "int8")))
    plan = blueprint(network, policy, capabilities)
    graph = insert_quantizers(trace_graph(model, example), plan, "minmax")
    items = Items(torch.randn(64, 3, 10, 10), torch.zeros(64))
    calibrate(graph, items, "minmax")
    assert isinstance(graph.get_submodule("average_pool"), nn.AvgPool2d)
    answers = model(items.inputs)
    assert (graph(items.inputs) - answers).abs().mean() < 0.02 * answers.abs().max()

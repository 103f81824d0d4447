"""Clipping: ranges by what the network answers."""

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from flyweight.compressors.clip import SHARES, clip_
from flyweight.compressors.data import Items
from flyweight.compressors.quantize import (
    ActivationQuantizer,
    QuantizedLayer,
    calibrate,
    fold_norms,
    insert_quantizers,
)
from flyweight.spaces import Capabilities, Policy, Quantize, blueprint
from flyweight.spaces.tracing import trace, trace_graph

NAMES = ["plain", "separable", "concat", "siamese", "sequence", "inverted", "two"]


def calibrated(
    model: nn.Module, example: Any, capabilities: Capabilities, items: Items
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """In float, and with quantizers whose ranges hold every value of ``items``."""
    network = trace(model, example)
    policy = Policy(quantize=Quantize(dict.fromkeys(network.layers, "int8")))
    folded = fold_norms(trace_graph(model, example), network)
    graph = insert_quantizers(folded, blueprint(network, policy, capabilities), "minmax")
    calibrate(graph, items, "minmax")
    return folded, graph


def drawn(example: Any, count: int = 16) -> Items:
    generator = torch.Generator().manual_seed(0)
    parts = example if isinstance(example, tuple) else (example,)
    # Long tails: something to clip.
    made = tuple(torch.randn(count, *p.shape[1:], generator=generator) ** 3 for p in parts)
    return Items(made if isinstance(example, tuple) else made[0], torch.zeros(count))


def quantizers(graph: fx.GraphModule) -> dict[str, ActivationQuantizer]:
    return {n: m for n, m in graph.named_modules() if isinstance(m, ActivationQuantizer)}


def alone(graph: fx.GraphModule, name: str, share: float, items: Items) -> Tensor:
    """The answers when the quantizer ``name`` alone rounds, to ``share`` of its range."""
    made = copy.deepcopy(graph)
    for other, module in [*made.named_modules()]:
        if isinstance(module, QuantizedLayer):
            made.set_submodule(other, module.layer)
        elif isinstance(module, ActivationQuantizer) and other != name:
            made.set_submodule(other, nn.Identity())
    if name:
        quantizer: Any = made.get_submodule(name)
        low, high = quantizer.bounds()
        quantizer.set_range(share * low, share * high)
    inputs = items.inputs if isinstance(items.inputs, tuple) else (items.inputs,)
    return made(*inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_range_is_the_best_that_a_slow_search_finds(
    networks: ModuleType, capabilities: Capabilities, name: str
) -> None:
    model, example = networks.make(name)
    items = drawn(example)
    _, graph = calibrated(model, example, capabilities, items)
    made = copy.deepcopy(graph)
    clip_(made, items)
    exact = alone(graph, "", 1.0, items)
    for where, quantizer in quantizers(graph).items():
        errors = {
            share: (alone(graph, where, share, items) - exact).square().mean().item()
            for share in (1.0, *SHARES)
        }
        found: Any = made.get_submodule(where)
        share = (found.scale / quantizer.scale).item()
        nearest = min(errors, key=lambda one: abs(one - share))
        assert share == pytest.approx(nearest, rel=1e-3)
        assert errors[nearest] <= errors[1.0]
        # Trying ends early where a range is hopeless: few best ones lie beyond.
        assert errors[nearest] <= 1.2 * min(errors.values())


class Tail(nn.Module):
    """Answers with the mean of all values, or with the large ones alone."""

    def __init__(self, large: bool) -> None:
        super().__init__()
        self.first, self.second, self.large = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), large
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight.fill_(1.0)
                assert layer.bias is not None
                layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x)))
        return (torch.relu(x - 5) if self.large else torch.sigmoid(x)).mean((2, 3))


@pytest.mark.parametrize("large", [True, False])
def test_large_values_are_clipped_only_where_the_answer_does_not_hang_on_them(
    capabilities: Capabilities, large: bool
) -> None:
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, 0] = 10.0
    items = Items(x, torch.zeros(8))
    _, graph = calibrated(Tail(large).eval(), x[:1], capabilities, items)
    before = {name: q.scale.item() for name, q in quantizers(graph).items()}
    clip_(graph, items)
    shares = [q.scale.item() / before[name] for name, q in quantizers(graph).items()]
    assert (min(shares) > 0.99) if large else (max(shares) < 0.75)


def test_constant_values_and_one_item_are_enough(capabilities: Capabilities) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten())
    items = Items(torch.zeros(1, 1, 4, 4), torch.zeros(1))
    _, graph = calibrated(model.eval(), items.inputs, capabilities, items)
    clip_(graph, items)
    assert torch.isfinite(graph(items.inputs)).all()

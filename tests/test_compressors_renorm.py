"""Norms behind quantized layers: they come and go without a trace, and train with the batch."""

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from flyweight.compressors.data import Items
from flyweight.compressors.freeze import FrozenLayer, freeze
from flyweight.compressors.quantize import (
    calibrate,
    fold_norms,
    insert_quantizers,
    settle,
)
from flyweight.compressors.renorm import fold_again, restore_norms
from flyweight.spaces import Capabilities, Policy, Quantize, blueprint
from flyweight.spaces.tracing import trace_graph

NAMES = ["plain", "mlp", "separable", "preactivation", "concat", "recurrent"]


def student(networks: ModuleType, name: str, capabilities: Capabilities) -> Any:
    """In float and quantized, with norms that have seen something; its blueprint and items."""
    model, example = networks.make(name)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(-1, 1)
    network = networks.traced(name)
    layers = list(network.layers)[:-1]  # the last one stays in float
    plan = blueprint(
        network, Policy(quantize=Quantize(dict.fromkeys(layers, "int8"))), capabilities
    )
    items = Items(torch.randn(64, *example.shape[1:]), torch.arange(64) % 3)
    graph = trace_graph(model, example)
    quantized = insert_quantizers(fold_norms(graph, network), plan, "minmax")
    calibrate(quantized, items, "minmax")
    settle(quantized, network, plan)
    return graph, quantized, plan, items


@pytest.mark.parametrize("name", NAMES)
def test_norms_come_and_go_without_a_trace(
    networks: ModuleType, capabilities: Capabilities, name: str
) -> None:
    graph, quantized, plan, items = student(networks, name, capabilities)
    before, integers = quantized(items.inputs), weights(quantized)
    norms = restore_norms(quantized, graph, plan.network, items)
    step = (before.max() - before.min()) / 255
    assert (quantized(items.inputs) - before).abs().mean() < step / 10
    fold_again(quantized, norms)
    settle(quantized, plan.network, plan)
    assert (quantized(items.inputs) - before).abs().mean() < step / 10
    for layer, kept in weights(quantized).items():
        assert (kept != integers[layer]).double().mean() < 1e-3  # a tie may fall to either side


def weights(quantized: Any) -> dict[str, torch.Tensor]:
    frozen = freeze(quantized)
    return {n: m.weight for n, m in frozen.named_modules() if isinstance(m, FrozenLayer)}


def test_a_restored_norm_follows_the_batch_and_what_it_learned_is_deployed(
    networks: ModuleType, capabilities: Capabilities
) -> None:
    graph, quantized, plan, items = student(networks, "separable", capabilities)
    norms = restore_norms(quantized, graph, plan.network, items)
    assert norms
    name = next(iter(norms))
    norm = quantized.get_submodule(norms[name])
    norm.weight.data[0] *= -3.0
    norm.running_mean += 0.5
    wanted = copy.deepcopy(quantized)(items.inputs)
    integers = weights(quantized)[name]
    fold_again(quantized, norms)
    assert isinstance(quantized.get_submodule(norms[name]), nn.Identity)
    assert torch.equal(weights(quantized)[name][1:], integers[1:])
    assert torch.equal(weights(quantized)[name][0], -integers[0])
    assert torch.allclose(quantized(items.inputs), wanted, atol=1e-3, rtol=1e-3)

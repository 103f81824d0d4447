"""Single weights: which become 0, and that they stay so, from training to the artifact."""

import zlib
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn
from torch.utils.data import TensorDataset

from flyweight.compressors import (
    ClassificationTask,
    Prepared,
    Schedule,
    compress,
    prepare,
    untrained,
)
from flyweight.compressors.prune import lay_out
from flyweight.compressors.sparsify import masks, sparsify_
from flyweight.kernels import make_runtime
from flyweight.spaces import Distill, Policy, Prune, Quantize


@given(st.floats(0, 0.95))
def test_the_smallest_weights_of_every_layer_go(networks: ModuleType, share: float) -> None:
    for name in ("separable", "sequence"):
        model, _ = networks.make(name)
        before = {n: p.clone() for n, p in model.named_parameters()}
        sparsify_(lay_out(model, torch.channels_last), networks.traced(name), share)
        layers = [f"{layer}.weight" for layer in networks.traced(name).layers]
        for parameter, now in model.named_parameters():
            was = before[parameter]
            if parameter not in layers:
                assert torch.equal(was, now)
                continue
            gone = now == 0
            assert int(gone.sum()) == int(share * now.numel())
            assert torch.equal(now[~gone], was[~gone])
            if gone.any():
                assert was[gone].abs().max() <= was[~gone].abs().min()


def test_masks_are_where_weights_are(networks: ModuleType) -> None:
    model: Any = networks.make("mlp")[0]
    assert masks(model) == {}
    sparsify_(model, networks.traced("mlp"), 0.5)
    found = masks(model)
    assert len(found) == 3
    assert all(torch.equal(mask, weight != 0) for weight, mask in found.items())


@pytest.fixture(scope="module")
def prepared(networks: ModuleType) -> Prepared:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(128, 3, 8, 8), torch.arange(128) % 6)
    task = ClassificationTask(networks.make("separable")[0], data, data)
    return prepare(task, make_runtime("onnxruntime", 1), Schedule(2, 0.25, 32))


def zeros(model: bytes, names: list[str]) -> dict[str, float]:
    """The share of zeros in the weights of layers, as the file holds them."""
    out = {}
    for tensor in onnx.load_from_string(model).graph.initializer:
        value = numpy_helper.to_array(tensor)
        layer = next((n for n in names if tensor.name.startswith(n)), None)
        if layer is not None and value.ndim > 1:
            out[layer] = float((value == 0).mean())
    return out


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_zeros_stay_zeros_up_to_the_artifact(prepared: Prepared, precision: str) -> None:
    layers = list(prepared.network.layers)
    policy = Policy(
        Prune({"stem.0": 8}, reconstruct=True, sparsity=0.6),
        Quantize(dict.fromkeys(layers, precision), "mse", qat=True),
        Distill(learning_rate=0.05),
    )
    candidate, first = None, None
    for rung in ("recalibrate", "short", "full"):
        candidate = compress(prepared, policy, rung, candidate)
        student: Any = candidate.student
        gone = {n: student.get_parameter(f"{n}.weight") == 0 for n in layers}
        first = first or gone
        assert all(torch.equal(first[n], gone[n]) for n in layers)
        for name, share in zeros(candidate.model, layers).items():
            count = student.get_parameter(f"{name}.weight").numel()
            assert share >= int(0.6 * count) / count
        assert len(zeros(candidate.model, layers)) == len(layers)
    assert candidate is not None
    assert candidate.samples == 256


def test_zeros_are_for_compression(prepared: Prepared) -> None:
    def sizes(sparsity: float) -> list[int]:
        policy = Policy(Prune(sparsity=sparsity))
        files = [compress(prepared, policy, "recalibrate").model, untrained(prepared, policy)]
        return [len(zlib.compress(file)) for file in files]

    plain, sparse = sizes(0.0), sizes(0.9)
    assert max(sparse) < 0.6 * min(plain)
    assert sparse[0] == pytest.approx(sparse[1], rel=0.1)  # known before anything is trained


def test_only_weights_of_layers_are_held() -> None:
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place, self.fc = nn.Parameter(torch.zeros(4, 6)), nn.Linear(6, 3)

    model = Placed()
    with torch.no_grad():
        model.fc.weight[0, 0] = 0
    assert list(masks(model)) == [model.fc.weight]

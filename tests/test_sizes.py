"""Sizes of many policies at once against what surgery leaves, and against files."""

import random
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from flyweight.compressors import ClassificationTask, Prepared, Schedule, prepare, untrained
from flyweight.compressors.prepared import Start
from flyweight.compressors.prune import shaped
from flyweight.kernels import SimulatedRuntime, make_runtime
from flyweight.search.limits import Limits
from flyweight.search.sizes import Sizes, _Contents
from flyweight.search.store import compressed_bytes
from flyweight.spaces import Capabilities, Settings, Space, blueprint

BOTH = ("fp32", "int8")
TARGET = Capabilities({"conv": BOTH, "linear": BOTH})
WIDE = Settings(min_keep=0.01, multiple_of=1, depth=True)
NAMES = [
    "plain", "mlp", "separable", "concat", "sequence", "grouped", "gate", "fused", "separate",
    "shuffle", "inverted", "gated", "siamese", "recurrent", "dense",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32))
def test_weights_are_those_that_surgery_leaves(name: str, seed: int, networks: ModuleType) -> None:
    model, example = networks.make(name)
    network, rng = networks.traced(name), random.Random(seed)
    runtime, start = SimulatedRuntime(capabilities=TARGET), Start(model, network)
    prepared = Prepared(None, example, {"pruned": start}, None, runtime, Schedule())  # type: ignore[arg-type]
    space = Space(network, TARGET, WIDE)
    policies = [space.sample(rng) for _ in range(4)]
    points = np.array([space.point(policy) for policy in policies])
    counted = _Contents(prepared, space, "pruned").of(points)
    for policy, found in zip(policies, counted, strict=True):
        plan = blueprint(network, policy, TARGET)
        left = shaped(model, network, example, policy.prune)
        tensors = {n: t for n, t in left.state_dict().items() if n in model.state_dict()}
        int8 = {f"{n}.weight" for n, p in plan.precision.items() if p == "int8"}
        assert found[0] == sum(t.nbytes for n, t in tensors.items() if n not in int8)
        assert found[1] == sum(t.numel() for n, t in tensors.items() if n in int8)
        assert found[3] == sum(t.numel() for t in tensors.values() if t.ndim == 1)
        assert [*found[4:6]] == [len(plan.precision), len(int8)]
        layers = [tensors[f"{n}.weight"].numel() * (1 if p == "int8" else 4)
                  for n, p in plan.precision.items()]  # fmt: skip
        assert plan.weight_bytes == sum(layers)


@pytest.fixture(scope="module")
def prepared(networks: ModuleType) -> Prepared:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 3, 8, 8), torch.arange(64) % 3)
    task = ClassificationTask(networks.make("inverted")[0], data, data)
    return prepare(task, make_runtime("onnxruntime", 1), Schedule())


@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_files_are_as_large_as_was_worked_out(prepared: Prepared, sparsity: float) -> None:
    settings_ = Settings(min_keep=0.25, multiple_of=4, depth=True, sparsity=(sparsity,))
    space = Space(prepared.network, prepared.runtime.capabilities, settings_)
    rng = random.Random(1)
    policies = [space.sample(rng) for _ in range(12)]
    points = np.array([space.point(policy) for policy in policies])
    files = [untrained(prepared, policy) for policy in policies]
    sizes = np.array([[len(file), compressed_bytes(file)] for file in files])
    limits = Limits(90.0, size_bytes=1000, compressed_bytes=500)
    found = Sizes(prepared, space, limits).shares(points, "pruned", sparsity)
    assert found.shape == (12, 2)
    errors = found * [1000, 500] / sizes - 1  # of files that are hardly more than their graphs
    assert np.abs(errors).mean() < 0.1
    assert errors.min() > -0.05
    one = Sizes(prepared, space, Limits(90.0, compressed_bytes=500))
    assert one.shares(points, "pruned", sparsity)[:, 0] == pytest.approx(found[:, 1])

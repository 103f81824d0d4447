"""Any legal policy of any network becomes an artifact that holds; an illegal one is refused."""

import functools
import importlib.util
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flyweight.compressors import ClassificationTask, Prepared, Schedule, compress, prepare
from flyweight.compressors.parity import run_session
from flyweight.kernels import make_runtime
from flyweight.spaces import Impossible, Network, Policy, Settings, Space
from flyweight.spaces.tracing import arguments

WIDE = Settings(
    min_keep=0.01,
    multiple_of=1,
    criteria=("l1", "taylor", "random"),
    reconstruct=(True, False),
    calibrations=("minmax", "percentile", "mse", "fitted"),
    depth=True,
)
# Those with operations that only torch.onnx exports, in seconds each.
SLOW = ("library",)


def _networks() -> ModuleType:
    name = "flyweight_tests_networks"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "networks.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


NAMES = sorted(_networks().MAKERS.keys() - {"pixels"})  # of classes


def _drawn(part: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` values like ``part`` [1, ...]: words, a mask or numbers."""
    shape = (count, *part.shape[1:])
    if not part.is_floating_point():
        return torch.randint(0, int(part.max()) + 1, shape, generator=generator)
    if set(part.unique().tolist()) == {0.0, 1.0}:
        mask = torch.randint(0, 2, shape, generator=generator).float()
        mask[:, 0] = 1  # of nothing at all there is no answer
        return mask
    # A mean for each channel: noise alone averages out, and an untrained network would give nearly
    # the same answer to every item, on the edge of another class.
    means = torch.randn(count, part.shape[1], *[1] * (part.ndim - 2), generator=generator)
    return torch.randn(shape, generator=generator) + means


class Random:
    """Random inputs like an example, a tensor or a tuple of them, each with a class."""

    def __init__(self, example: Any, count: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(count)
        parts = example if isinstance(example, tuple) else (example,)
        self.parts = [_drawn(part, count, generator) for part in parts]
        self.classes = classes

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, index: int) -> tuple[Any, int]:
        values = tuple(part[index] for part in self.parts)
        return (values if len(values) > 1 else values[0]), index % self.classes


@functools.cache
def ready(name: str) -> tuple[Prepared, Space]:
    """The network ``name`` with norms that do something, and all that may be done to it."""
    model, example = _networks().make(name)
    args, kwargs = arguments(example)
    classes = model(*args, **kwargs).shape[-1]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
    data = (Random(example, count, classes) for count in (96, 401))
    runtime = make_runtime("onnxruntime", 1)
    found = prepare(ClassificationTask(model, *data), runtime, Schedule(1, 0.5, 16))
    return found, Space(found.network, runtime.capabilities, WIDE)


def sizes(network: Network, policy: Policy) -> dict[tuple[str, int], int]:
    """For each axis of a tensor that has channels of groups its size under ``policy``."""
    out: dict[tuple[str, int], int] = {}
    for group in network.groups.values():
        kept = policy.prune.width.get(group.name, group.width)
        for slot in group.slots:
            own = sum(unit >= 0 for unit in slot.units)
            gone = own - own * kept // group.width
            place = (slot.tensor, slot.axis)
            out[place] = out.get(place, len(slot.units)) - gone
    return out


def keeps_its_promises(name: str, seed: int) -> None:
    prepared, space = ready(name)
    sampled = space.sample(random.Random(seed))
    policy = Policy(sampled.prune, sampled.quantize)  # as it is, without training
    found = compress(prepared, policy, "full", seed=seed)

    held = {**dict(found.student.named_parameters()), **dict(found.student.named_buffers())}
    for (tensor, axis), size in sizes(prepared.network, policy).items():
        if tensor in held:  # a norm is none of the student where it was folded
            assert held[tensor].shape[axis] == size, (tensor, axis)
    assert found.parity is not None  # compress refuses what does not agree
    items = prepared.splits.search.take(torch.arange(3))
    args = items.inputs if isinstance(items.inputs, tuple) else (items.inputs,)
    answers = found.student(*args)
    assert answers.shape == prepared.teacher(*args).shape
    in_runtime = run_session(prepared.runtime.load(found.model), items)  # three, not one
    assert in_runtime.shape == answers.shape
    if not policy.quantize.acts:
        torch.testing.assert_close(in_runtime, answers, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(SLOW)))
@settings(max_examples=3)
@given(seed=st.integers(0, 2**32))
def test_a_legal_policy_becomes_an_artifact(name: str, seed: int) -> None:
    keeps_its_promises(name, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32))
def test_many_legal_policies_become_artifacts(name: str, seed: int) -> None:
    keeps_its_promises(name, seed)


def broken(prepared: Prepared, policy: Policy, rng: random.Random) -> tuple[dict[str, Any], str]:
    """``policy`` with one rule broken, as what its JSON holds, and what the refusal must say."""
    network, values = prepared.network, policy.to_dict()
    group, layer = rng.choice(list(network.groups.values())), rng.choice(list(network.layers))
    prune = values.setdefault("prune", {"width": {}})
    quantize = values.setdefault("quantize", {"precision": {}})
    prune["width"].setdefault(group.name, group.width)
    quantize["precision"].setdefault(layer, "int8")
    breaks = {
        rf"width <= {group.width} must hold for group '{group.name}', but got {group.width + 1}": (
            lambda: prune["width"].update({group.name: group.width + 1})
        ),
        r"no group 'nobody' in this network": lambda: prune["width"].update(nobody=1),
        r"no layer 'nobody' in this network": lambda: quantize["precision"].update(nobody="int8"),
        rf"runs layer '{layer}' in fp32 or int8, but got 'int3'": (
            lambda: quantize["precision"].update({layer: "int3"})
        ),
        r"no residual block 'nobody'": lambda: prune.update(drop=["nobody"]),
        r"no criterion 'whim'; ": lambda: prune.update(criterion="whim", width={group.name: 1}),
        r"no calibration 'whim'; ": lambda: quantize.update(calibration="whim"),
    }
    if group.multiple_of > 1:
        del breaks[r"no criterion 'whim'; "]  # a width of 1 breaks another rule
        rule = rf"must be a multiple of {group.multiple_of} .*, but got {group.multiple_of + 1}"
        breaks[rule] = lambda: prune["width"].update({group.name: group.multiple_of + 1})
    rule = rng.choice(sorted(breaks))
    breaks[rule]()
    return values, rule


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12)
@given(seed=st.integers(0, 2**32))
def test_an_illegal_policy_is_refused_with_the_rule_it_breaks(name: str, seed: int) -> None:
    prepared, space = ready(name)
    rng = random.Random(seed)
    legal = space.sample(rng)
    whole = replace(legal.prune, drop=())  # what is wrong in a block that is gone is no error
    values, rule = broken(prepared, Policy(whole, legal.quantize), rng)
    policy = Policy.from_dict(values)
    assert not space.contains(policy)
    with pytest.raises(Impossible, match=rule.replace("int8, but", "int8.*, but")):
        compress(prepared, policy, "recalibrate")

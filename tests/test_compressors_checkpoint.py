"""Checkpoints: a candidate that went through a file goes on as one that did not, to the bit."""

import json
import random
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from flyweight.compressors import (
    RUNGS,
    Candidate,
    ClassificationTask,
    Parity,
    Prepared,
    Schedule,
    compress,
    load_candidate,
    prepare,
    save_candidate,
)
from flyweight.compressors.checkpoint import STUDENT
from flyweight.compressors.prepared import Start
from flyweight.compressors.prune import call, lay_out, remove
from flyweight.kernels import SimulatedRuntime, make_runtime
from flyweight.spaces import Distill, FlyweightError, Network, Policy, Prune, Quantize, blueprint

EVERY = [
    "plain", "mlp", "pixels", "separable", "concat", "quiet", "two", "sequence", "preactivation",
    "grouped", "groupnorm", "gate", "fixed", "fused", "separate", "interleaved", "summed", "edges",
    "library", "shuffle", "inverted", "gated", "siamese", "recurrent", "dense", "inception",
    "inplace", "signal", "text", "convnext", "mixer", "shuffled", "crossstage", "heard", "parallel",
    "parts",
]  # fmt: skip


def test_every_network_is_here(networks: ModuleType) -> None:
    assert sorted(EVERY) == sorted(networks.MAKERS)


@pytest.mark.parametrize("name", EVERY)
def test_a_student_is_rebuilt_whichever_channels_it_kept(
    name: str, networks: ModuleType, traced: Callable[[str], Network], capabilities: Any
) -> None:
    model, example = networks.make(name)
    network, rng = traced(name), random.Random(0)
    policy = Policy(half(network, drop=[*network.blocks][:1]))
    kept = {n: networks.some(network.groups[n], w, rng) for n, w in policy.prune.width.items()}
    # With values that neither the model nor its first channels have.
    student = remove(model, network, example, kept, policy.prune.drop)
    for value in [*student.parameters(), *student.buffers()]:
        value.data = (value.data * 0.9).to(value.dtype)
    lay_out(lay_out(student, torch.channels_last), torch.contiguous_format)
    plan = blueprint(network, policy, capabilities)
    parity = Parity(0.5, 1.0, 2.0, 3)
    candidate = Candidate(policy, "full", plan, student, b"model", 1 / 3, 90.0, 7, 2.5, parity)
    runtime: Any = SimulatedRuntime(capabilities=capabilities)
    prepared = Prepared(None, example, {"pruned": Start(model, network)}, None, runtime, Schedule())  # type: ignore[arg-type]  # neither data nor a task is looked at
    found = load_candidate(prepared, save_candidate(candidate))
    assert found.student.code == student.code
    with torch.no_grad():
        assert torch.equal(call(found.student, example), call(student, example))
    ours, theirs = dict(found.student.named_parameters()), dict(student.named_parameters())
    assert [(n, p.stride()) for n, p in ours.items()] == [
        (n, p.stride()) for n, p in theirs.items()
    ]
    assert all(p.requires_grad for p in ours.values())
    same = ("policy", "rung", "plan", "model", "loss", "metric", "samples", "seconds", "parity")
    assert all(getattr(found, field) == getattr(candidate, field) for field in same)


def half(network: Network, drop: Sequence[str] = (), **how: Any) -> Prune:
    """Half of every group that is left without the blocks ``drop``."""
    groups = network.without(drop).groups.values()
    width = {g.name: max(1, g.width // g.multiple_of // 2) * g.multiple_of for g in groups}
    return Prune(width, drop=tuple(drop), **how)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(192, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x.flatten(1))))
        return self.b(self.drop(x))  # type: ignore[no-any-return]


class Taught(ClassificationTask):
    """With another student, and random variants of the training data where they are numbers."""

    def students(self) -> dict[str, nn.Module]:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return {"small": Small()} if self.image else {}

    image = True


def task_of(networks: ModuleType, name: str) -> Taught:
    torch.manual_seed(0)
    model, example = networks.make(name)
    labels = torch.arange(96) % 3
    inputs: tuple[Tensor, ...]
    if name == "separate":
        inputs = (torch.randint(0, 16, (96, 6)) + 16 * labels[:, None], torch.ones(96, 6))
    else:
        shape = example.shape[1:]
        inputs = (torch.randn(3, *shape)[labels] + 0.5 * torch.randn(96, *shape),)

    optimizer = torch.optim.Adam(model.train().parameters(), 0.01)
    for _ in range(20):  # so that no later training ends worse than it began
        loss = nn.functional.cross_entropy(model(*inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    class Data(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            *x, y = super().__getitem__(index)
            return (x[0] if len(x) == 1 else tuple(x)), y

    data = Data(*inputs, labels)
    task = Taught(model.eval(), data, data)
    task.image = name == "inverted"
    return task


@pytest.fixture(scope="module")
def prepared(networks: ModuleType) -> Callable[[str], Prepared]:
    runtime, known = make_runtime("onnxruntime", 1), {}

    def of(name: str) -> Prepared:
        if name not in known:
            known[name] = prepare(task_of(networks, name), runtime, Schedule(2, 0.5, 32))
        return known[name]

    return of


def int8(prepared: Prepared) -> Quantize:
    return Quantize(dict.fromkeys(prepared.network.layers, "int8"), "mse", qat=True)


CASES: dict[str, tuple[str, Callable[[Prepared], dict[str, Any]]]] = {
    "pruned": ("inverted", lambda p: {"prune": half(p.network, criterion="taylor")}),
    "reconstructed, int8": (
        "inverted",
        lambda p: {"prune": half(p.network, reconstruct=True), "quantize": int8(p)},
    ),
    "zeros": ("inverted", lambda p: {"prune": half(p.network, sparsity=0.5), "quantize": int8(p)}),
    "without a block": (
        "inverted",
        lambda p: {"prune": half(p.network, drop=[*p.network.blocks][:1])},
    ),
    "another student": (
        "inverted",
        lambda _: {
            "prune": Prune({"a": 8}, reconstruct=True),
            "quantize": Quantize({"a": "int8"}),
            "distill": Distill("small", alpha=0.0, learning_rate=0.05),
        },
    ),
    "vision transformer": ("fused", lambda p: {"prune": half(p.network), "quantize": int8(p)}),
    "text transformer": ("separate", lambda p: {"prune": half(p.network, reconstruct=True)}),
    "untouched": ("inverted", lambda _: {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_next_rung_is_the_same_to_the_bit(
    case: str, prepared: Callable[[str], Prepared]
) -> None:
    name, how = CASES[case]
    task = prepared(name)
    policy = Policy(**{"distill": Distill(alpha=0.0, learning_rate=0.002), **how(task)})
    straight: Candidate | None = None
    detour: Candidate | None = None
    for rung in RUNGS:
        straight = compress(task, policy, rung, straight, seed=5)
        went_on = compress(task, policy, rung, detour, seed=5)
        assert went_on.model == straight.model
        ours, theirs = went_on.student.state_dict(), straight.student.state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        figures = ("loss", "metric", "samples", "parity", "rung", "policy", "plan")
        assert all(getattr(went_on, f) == getattr(straight, f) for f in figures)
        detour = load_candidate(task, save_candidate(went_on))
        assert detour.seconds == went_on.seconds
    assert straight is not None
    assert straight.samples > 0


def test_what_is_no_checkpoint_of_this_task_is_refused(
    prepared: Callable[[str], Prepared],
) -> None:
    task = prepared("inverted")
    content = save_candidate(compress(task, Policy(half(task.network)), "recalibrate"))
    for damaged in (b"", b"x", content[:100], content[:-1], b"\xff" * 8 + content[8:]):
        with pytest.raises(FlyweightError, match="no checkpoint"):
            load_candidate(task, damaged)
    with pytest.raises(FlyweightError):
        load_candidate(prepared("fused"), content)
    tensors = safetensors.torch.load(content)
    with pytest.raises(FlyweightError, match="no checkpoint"):
        load_candidate(task, safetensors.torch.save(tensors))  # without its header
    odd = {**tensors, STUDENT + "head.weight": torch.zeros(1)}
    header = {"candidate": candidate_header(content)}
    with pytest.raises(FlyweightError, match="not this student's: student"):
        load_candidate(task, safetensors.torch.save(odd, header))
    assert load_candidate(task, safetensors.torch.save(tensors, header)).rung == "recalibrate"
    newer = {"candidate": candidate_header(content).replace('"version": 3', '"version": 4')}
    with pytest.raises(FlyweightError, match="its version is 4, not 3"):
        load_candidate(task, safetensors.torch.save(tensors, newer))


def candidate_header(content: bytes) -> str:
    size = int.from_bytes(content[:8], "little")
    return str(json.loads(content[8 : 8 + size])["__metadata__"]["candidate"])


def test_nothing_that_is_saved_is_changed(prepared: Callable[[str], Prepared]) -> None:
    task = prepared("inverted")
    candidate = compress(task, Policy(half(task.network)), "recalibrate")
    before = {k: v.clone() for k, v in candidate.student.state_dict().items()}
    loaded = load_candidate(task, save_candidate(candidate))
    with torch.no_grad():
        for parameter in loaded.student.parameters():
            parameter.zero_()
    assert all(torch.equal(before[k], v) for k, v in candidate.student.state_dict().items())

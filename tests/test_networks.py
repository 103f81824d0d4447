"""Networks people have: layers that run again, tied weights, changes in place, odd layouts."""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from executed import float_layers, int8_layers, optimized_kernels
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from flyweight.compressors import ClassificationTask, Prepared, Schedule, compress, prepare
from flyweight.compressors.data import Items
from flyweight.compressors.parity import run_module
from flyweight.compressors.prune import remove
from flyweight.compressors.quantize import fold_norms
from flyweight.compressors.reconstruct import input_moments, reconstruct_
from flyweight.kernels import make_runtime
from flyweight.spaces import (
    BadInput,
    Capabilities,
    Impossible,
    Network,
    Policy,
    Prune,
    Quantize,
    blueprint,
)
from flyweight.spaces.tracing import trace, trace_graph

Traced = Callable[[str], Network]


class Pairs:
    """Random pairs of images, or single inputs, each with a class."""

    def __init__(self, count: int, *shapes: tuple[int, ...], classes: int = 3) -> None:
        generator = torch.Generator().manual_seed(count)
        self.parts = [torch.randn(count, *shape, generator=generator) for shape in shapes]
        self.classes = classes

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, index: int) -> tuple[Any, int]:
        values = tuple(part[index] for part in self.parts)
        return (values if len(values) > 1 else values[0]), index % self.classes


def prepared(model: nn.Module, *shapes: tuple[int, ...], classes: int = 3) -> Prepared:
    task = ClassificationTask(
        model.eval(), Pairs(96, *shapes, classes=classes), Pairs(200, *shapes, classes=classes)
    )
    return prepare(task, make_runtime("onnxruntime", 1), Schedule(1, 0.5, 16))


def halves(prepared: Prepared, **how: Any) -> Policy:
    """Half of every group, everything in int8, nothing trained."""
    widths = {name: group.width // 2 for name, group in prepared.network.groups.items()}
    return Policy(
        Prune(widths, **how), Quantize(dict.fromkeys(prepared.network.layers, "int8"), "mse")
    )


# -- layers that run more than once --------------------------------------------------------------


def test_a_layer_that_runs_again_is_one_layer_with_several_operations(traced: Traced) -> None:
    network = traced("recurrent")
    layer = network.layers["step"]
    assert [op.name for op in network.uses["step"]] == ["step", "step_1", "step_2"]
    assert (layer.op, layer.out_group) == ("step", "stem")
    assert layer.macs == 3 * 16 * 16 * 9 * 64
    assert layer.parameters == 16 * 16 * 9
    siamese = traced("siamese")
    assert siamese.op["cat"].parts == (("c2", 48),)  # 24 from each use
    plan = blueprint(siamese, Policy(Prune({"c1": 8, "c2": 8})), Capabilities({"conv": ("fp32",)}))
    assert [k.name for k in plan.kernels if k.kind == "conv"] == ["c1", "c2", "c1", "c2"]
    assert plan.macs == 2 * (27 * 8 * 64 + 9 * 8 * 8 * 16) + 16 * 4


class Twisted(nn.Module):
    """One layer that reads the same two branches in two orders."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.both, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        y = self.both(torch.cat([a, b], 1)) + self.both(torch.cat([b, a], 1))
        return self.head(F.relu(y).mean((2, 3)))


class Ends(nn.Module):
    """One layer that reads the request and what a layer made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.b(x) + self.b(self.a(x))).mean((2, 3)))


@pytest.mark.parametrize("model", [Twisted(), Ends()])
def test_channels_that_a_shared_layer_reads_elsewhere_are_pruned_with_them_or_not_at_all(
    model: Any,
) -> None:
    example = torch.rand(1, 3, 6, 6)
    network = trace(model, example)
    for name, group in network.groups.items():
        student = copy.deepcopy(model)
        with torch.no_grad():
            for member in group.members:  # a dead channel may go, and nobody may notice
                student.get_submodule(member).weight[0] = 0
                student.get_submodule(member).bias[0] = 0
        pruned = remove(student, network, example, {name: torch.arange(1, group.width)})
        x = torch.randn(4, 3, 6, 6)
        torch.testing.assert_close(pruned(x), student(x))
    assert "a" not in network.groups or "b" not in network.groups


def test_the_inputs_of_a_shared_int8_layer_share_one_scale(traced: Traced) -> None:
    network = traced("recurrent")
    target = Capabilities(dict.fromkeys(("conv", "linear"), ("fp32", "int8")))
    plan = blueprint(network, Policy(quantize=Quantize({"step": "int8"})), target)
    read = {plan.quantized[op.inputs[0]] for op in network.uses["step"]}
    assert read == {"relu"}
    mixed = blueprint(network, Policy(quantize=Quantize({"join": "int8", "stem": "int8"})), target)
    assert len({mixed.quantized[v] for v in mixed.quantized}) == len(mixed.quantized)


class Mixed(nn.Module):
    """Values with and without a sign side by side in a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.join, self.head = nn.Conv2d(16, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.a(x)), self.b(x)], 1)
        return self.head(F.relu(self.join(x)).mean((2, 3)))


class MixedUses(nn.Module):
    """One layer that reads a value with a sign and, later, one without."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(F.relu(self.a(x))))
        return self.head(F.relu(self.b(x)).mean((2, 3)))


@pytest.mark.parametrize("model", [Mixed(), MixedUses()])
def test_an_activation_on_a_scale_with_a_sign_leaves_its_layer_in_int8(model: nn.Module) -> None:
    # ONNX Runtime drops a Relu before a quantizer only where 0 is the least integer.
    ready = prepared(model, (3, 8, 8))
    everything = Policy(quantize=Quantize(dict.fromkeys(ready.network.layers, "int8")))
    found = compress(ready, everything, "full")
    assert (int8_layers(found.model), float_layers(found.model)) == (4, 0)
    assert "relu" not in found.plan.quantized or found.plan.quantized["relu"] != "relu"


class Higher(nn.Module):
    """Values of at most 6 beside larger ones: side by side, or read by one layer."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        nn.init.constant_(self.b.bias, 10.0)
        self.join, self.head = nn.Conv2d(8 if shared else 16, 8, 3), nn.Linear(8, 3)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        x, y = F.relu6(self.a(x)), F.relu(self.b(x))
        joined = self.join(x) + self.join(y) if self.shared else self.join(torch.cat([x, y], 1))
        return self.head(F.relu(joined).mean((2, 3)))


@pytest.mark.parametrize(("shared", "layers"), [(False, 4), (True, 5)])
def test_a_relu6_on_a_scale_beyond_6_leaves_its_layer_in_int8(shared: bool, layers: int) -> None:
    # ONNX Runtime drops a Clip before a quantizer only where no integer lies beyond it.
    ready = prepared(Higher(shared), (3, 8, 8))
    everything = Policy(quantize=Quantize(dict.fromkeys(ready.network.layers, "int8")))
    found = compress(ready, everything, "full")
    assert (int8_layers(found.model), float_layers(found.model)) == (layers, 0)
    assert ("relu6", "fp32") in {(k.name, k.precision) for k in found.plan.kernels}


class Summed(nn.Module):
    """An activation behind a sum, beside values beyond its ends."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 8, 1) for _ in range(3))
        self.act, self.join, self.head = act, nn.Conv2d(16, 8, 3), nn.Linear(8, 3)
        with torch.no_grad():
            self.c.weight.mul_(20)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.act(self.a(x) + self.b(x)), self.c(x)], 1)
        return self.head(F.relu(self.join(x)).mean((2, 3)))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6()])
def test_a_sum_whose_activation_is_on_such_a_scale_is_in_float(act: nn.Module) -> None:
    ready = prepared(Summed(act), (3, 8, 8))
    everything = Policy(quantize=Quantize(dict.fromkeys(ready.network.layers, "int8")))
    found = compress(ready, everything, "full")
    kinds = {k.kind: k.precision for k in found.plan.kernels}
    assert (kinds["add"], kinds["act"]) == ("fp32", "fp32")
    assert optimized_kernels(found.model)["QLinearAdd"] == 0


def test_norms_of_a_shared_layer_are_folded_only_if_they_are_one(
    networks: ModuleType, traced: Traced
) -> None:
    assert traced("siamese").folded == {"c1": "n1"}
    assert traced("recurrent").folded == {}
    model, example = networks.make("recurrent")
    both = Capabilities({"conv": ("fp32", "int8")})
    for precision, own in (("fp32", 0), ("int8", 3)):
        policy = Policy(quantize=Quantize({"step": precision}))
        plan = blueprint(traced("recurrent"), policy, both)
        assert [k.kind for k in plan.kernels].count("norm") == own
    assert (
        optimized_kernels(compress(prepared(model, (3, 8, 8)), Policy(), "recalibrate").model)
        .keys()
        .isdisjoint({"BatchNormalization"})
    )  # in float the runtime folds each by itself
    folded = fold_norms(trace_graph(model, example), traced("recurrent"))
    assert [type(folded.get_submodule(f"norms.{i}")) for i in range(3)] == [nn.BatchNorm2d] * 3


class Partly(nn.Module):
    """A layer that a norm follows only once, a norm behind two layers, one behind an add."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.n, self.both, self.late = (nn.BatchNorm1d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.n(self.a(x)))
        x = self.both(self.b(x)) + self.both(self.c(x))
        return self.late(x + self.late(self.d(x)))


class OverSteps(nn.Module):
    """A norm over the steps of a sequence, as many as the layer before it has outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:  # [N, 6, 4]
        return self.b(self.n(self.a(x))).mean(1)


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [(Partly(), (4,), {"b": "both", "c": "both"}), (OverSteps(), (6, 4), {})],
)
def test_which_norms_are_folded(
    model: nn.Module, shape: tuple[int, ...], expected: dict[str, str]
) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    network = trace(model, torch.rand(1, *shape))
    assert network.folded == expected
    x = torch.randn(5, *shape)
    graph = trace_graph(model.eval(), x[:1])
    torch.testing.assert_close(fold_norms(graph, network)(x), model(x))


@pytest.mark.parametrize(
    ("name", "shapes", "layers"),
    [
        ("siamese", ((3, 8, 8), (3, 8, 8)), 5),
        ("recurrent", ((3, 8, 8),), 6),
        ("dense", ((3, 8, 8),), 6),
        ("inception", ((3, 8, 8),), 10),
        ("inplace", ((3, 8, 8),), 4),
        ("signal", ((4, 32),), 4),
    ],
)
def test_from_policy_to_artifact(
    networks: ModuleType, name: str, shapes: tuple[tuple[int, ...], ...], layers: int
) -> None:
    model, _ = networks.make(name)
    ready = prepared(model, *shapes)
    found = compress(ready, halves(ready, criterion="taylor", reconstruct=True), "full")
    assert found.parity is not None  # compress refuses what does not agree
    assert (int8_layers(found.model), float_layers(found.model)) == (layers, 0)
    full = compress(ready, Policy(), "full")
    assert full.parity is not None
    assert full.parity.agreement == 1


def test_the_weights_of_a_shared_layer_are_stored_once(networks: ModuleType) -> None:
    model, _ = networks.make("recurrent")
    ready = prepared(model, (3, 8, 8))
    graph = onnx.load_from_string(compress(ready, halves(ready), "recalibrate").model).graph
    names = [i.name for i in graph.initializer]
    assert names.count("step.weight") == 1
    made = [n.output[0] for n in graph.node]
    assert len(made) == len(set(made))
    readers = [n.op_type for n in graph.node if "step.weight" in n.input]
    assert readers == ["DequantizeLinear"] * 3


def test_moments_of_a_shared_layer_are_those_of_all_its_inputs(networks: ModuleType) -> None:
    model: Any
    model, _ = networks.make("siamese")
    left, right = torch.randn(12, 3, 8, 8), torch.randn(12, 3, 8, 8) * 2 + 1
    items = Items((left, right), torch.zeros(12))
    found = input_moments(model, networks.traced("siamese"), items)["c1"]
    rows = F.unfold(torch.cat([left, right]), 3, padding=1).transpose(1, 2).reshape(-1, 27)
    torch.testing.assert_close(found.mean[0], rows.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        found.covariance[0], torch.cov(rows.T, correction=0), atol=1e-3, rtol=1e-3
    )


def test_reconstruction_of_a_shared_layer_helps_all_its_uses(networks: ModuleType) -> None:
    model, example = networks.make("siamese")
    network = networks.traced("siamese")
    items = Items((torch.randn(64, 3, 8, 8), torch.randn(64, 3, 8, 8) + 1), torch.zeros(64))
    kept = {"c1": torch.arange(12)}
    plain = remove(model, network, example, kept)
    solved = copy.deepcopy(plain)
    reconstruct_(solved, model, network, kept, input_moments(model, network, items))

    def branches(student: Any) -> list[torch.Tensor]:
        """What the branch gives in each of its uses."""
        seen: list[torch.Tensor] = []
        handle = student.c2.register_forward_hook(
            lambda *call: seen.append(F.relu(call[2]).mean((2, 3)))
        )
        with torch.no_grad():
            student(*items.inputs)
        handle.remove()
        return seen

    def error(student: Any) -> list[float]:
        pairs = zip(branches(student), branches(model), strict=True)
        return [(ours - theirs).square().mean().item() for ours, theirs in pairs]

    assert all(ours < theirs / 2 for ours, theirs in zip(error(solved), error(plain), strict=True))


# -- tied weights --------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x)))))


def test_tied_weights_become_copies_that_are_pruned_and_quantized_apart() -> None:
    model = Tied()
    ready = prepared(model, (12,))
    teacher: Any = ready.teacher
    assert model.a.weight is model.b.weight  # the user's model stays as it is
    assert teacher.a.weight is not teacher.b.weight
    assert torch.equal(teacher.a.weight, teacher.b.weight)
    items = ready.splits.search
    assert torch.equal(run_module(teacher, items), run_module(model, items))
    assert ready.network.parameters == sum(p.numel() for p in model.parameters()) + 144
    policy = Policy(Prune({"a": 8}), Quantize({"b": "int8", "head": "int8"}))
    found = compress(ready, policy, "full")
    student: Any = found.student
    assert (student.a.out_features, student.b.in_features, student.b.out_features) == (8, 8, 12)
    assert (int8_layers(found.model), float_layers(found.model)) == (2, 1)


def test_a_module_with_two_names_is_one_layer_that_runs_twice() -> None:
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(12, 12), nn.Linear(12, 3)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.b(F.relu(self.a(x)))))

    ready = prepared(Alias(), (12,))
    assert [op.name for op in ready.network.uses["a"]] == ["a", "a_1"]
    assert set(ready.network.layers) == {"a", "head"}
    found = compress(ready, Policy(quantize=Quantize({"a": "int8", "head": "int8"})), "full")
    assert int8_layers(found.model) == 3


# -- values changed in place ---------------------------------------------------------------------


def test_changes_in_place_reach_whoever_reads_afterwards() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x -= 0.5  # the request itself
            y = self.a(x)
            self.act(y)
            y.add_(1).mul_(y)
            z = y.view(-1, 2, 3).transpose(1, 2)
            torch.relu_(z)
            return self.b(z.flatten(1)) + x.sum()

    model, x = Chain().eval(), torch.randn(4, 6)
    graph = trace_graph(model, before := x[:1].clone())
    assert torch.equal(before, x[:1])  # the example is not changed
    assert torch.equal(graph(x.clone()), model(x.clone()))
    given = x.clone()
    graph(given)
    assert torch.equal(given, x)  # the graph changes nothing
    assert model.act.inplace  # nor did tracing
    names = [n.target for n in graph.graph.nodes if n.op == "call_method"]
    assert {"add", "mul", "reshape"} <= set(names)


def test_a_view_may_be_changed_when_nobody_reads_the_rest() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            left = self.a(x)[:, :3]
            left.relu_()
            return self.b(left)

    model, x = Last().eval(), torch.randn(4, 6)
    assert torch.equal(trace_graph(model, x[:1])(x), model(x))


# -- inputs and layouts --------------------------------------------------------------------------


class Viewing(nn.Module):
    """``view`` behind a convolution, which channels_last does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3), nn.Linear(128, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c2(F.relu(self.c1(x))))
        return self.head(x.view(x.size(0), -1))


@pytest.mark.slow  # exported by torch.onnx
def test_a_view_of_convolutions_is_handled() -> None:
    ready = prepared(Viewing(), (3, 8, 8))
    assert set(ready.network.groups) == {"c1", "c2"}
    found = compress(ready, halves(ready), "full")
    assert found.parity is not None
    assert int8_layers(found.model) == 3


@pytest.mark.parametrize("strided", ["transposed", "channels_last", "sliced"])
def test_requests_and_items_may_lie_in_memory_as_they_like(
    networks: ModuleType, strided: str
) -> None:
    x = torch.randn(64, 3, 8, 8)
    laid = {
        "transposed": x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": torch.stack([x, x], 4)[..., 0],
    }[strided]
    assert not laid[0].is_contiguous()

    class Data(TensorDataset):
        pass

    def task(inputs: Tensor) -> Any:
        data = Data(inputs, torch.arange(64) % 5)
        out: Any = ClassificationTask(networks.make("plain")[0], data, data)
        out.example_input = lambda: inputs[:1]
        return out

    runtime, schedule = make_runtime("onnxruntime", 1), Schedule(1, 0.5, 16)
    found = [prepare(task(inputs), runtime, schedule) for inputs in (x, laid)]
    results = [compress(ready, halves(ready), "full") for ready in found]
    assert results[0].model == results[1].model
    assert results[0].metric == results[1].metric


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, pair: Any) -> Tensor:
        return self.head(pair[0] + pair[1])


@pytest.mark.parametrize(
    "example",
    [
        ((torch.rand(1, 4), torch.rand(1, 4)),),
        {"pair": {0: torch.rand(1, 4), 1: torch.rand(1, 4)}},
        {"pair": [torch.rand(1, 4), torch.rand(1, 4)]},
    ],
)
def test_nested_requests_are_refused_by_name(example: Any) -> None:
    with pytest.raises(BadInput, match="a tuple or dict of tensors, but its 'pair' is of type"):
        trace(Nested(), example)


# -- norms with almost no variance ---------------------------------------------------------------


def tiny(networks: ModuleType, variance: float, eps: float = 1e-5) -> Any:
    """A network with a channel that weight decay has killed, and the norm that saw it die."""
    model: Any = networks.make("separable")[0]
    conv, norm = model.stem[0], model.stem[1]
    with torch.no_grad():
        conv.weight[0] *= 1e-9
        norm.running_mean[0] = conv.bias[0]
        norm.running_var[0] = variance
        norm.eps = eps
    return model


@pytest.mark.parametrize("variance", [0.0, 1e-18, 1e-12])
def test_a_norm_with_tiny_variance_is_folded_and_quantized(
    networks: ModuleType, variance: float
) -> None:
    model = tiny(networks, variance)
    ready = prepared(model, (3, 8, 8))
    for policy in (Policy(), Policy(quantize=halves(ready).quantize), halves(ready)):
        found = compress(ready, policy, "full")
        assert found.parity is not None
    whole = compress(ready, Policy(quantize=halves(ready).quantize), "full")
    answers = ready.search_answers
    assert whole.loss < 0.05 * answers.log_softmax(1).var().item()


@pytest.mark.parametrize(("variance", "eps"), [(0.0, 0.0), (-1.0, 1e-5)])
def test_a_norm_that_divides_by_nothing_is_refused_by_name(
    networks: ModuleType, variance: float, eps: float
) -> None:
    with pytest.raises(BadInput, match=r"norm 'stem\.1' divides by .* but is (0|-0\.99999)"):
        prepared(tiny(networks, variance, eps), (3, 8, 8))


class Repeats(nn.Module):
    """Two residual steps through the same layer, and one through a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.own, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + F.relu(self.same(x))
        x = x + F.relu(self.same(x))
        x = x + F.relu(self.own(x))
        return self.head(x.mean((2, 3)))


def test_a_block_whose_layer_runs_elsewhere_stays() -> None:
    network = trace(Repeats(), torch.rand(1, 3, 6, 6))
    assert list(network.blocks) == ["own"]
    assert network.without(["own"]).layers.keys() == {"stem", "same", "head"}


class Finer(nn.Module):
    """A residual step of twice the size inside. shared: its transposed layer runs again."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared, self.stem = shared, nn.Conv2d(3, 8, 1)
        self.narrow, self.up = nn.Conv2d(8, 12, 1), nn.ConvTranspose2d(12, 16, 2, 2)
        self.down, self.last = nn.Conv2d(16, 8, 2, 2), nn.Conv2d(16, 8, 2, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        finer = F.relu(self.up(F.relu(self.narrow(x))))
        x = x + self.down(finer)
        if self.shared:
            x = self.last(F.relu(self.up(F.pad(x, (0, 0, 0, 0, 0, 4)))))
        return self.head(x.mean((2, 3)))


def test_what_transposed_convolutions_make_goes_with_their_block() -> None:
    network = trace(Finer(False), torch.rand(1, 3, 6, 6))
    assert network.blocks["narrow"].layers == ("narrow", "down")
    assert network.blocks["narrow"].groups == ("narrow", "up")
    assert network.without(["narrow"]).groups.keys() == {"stem"}
    assert not trace(Finer(True), torch.rand(1, 3, 6, 6)).blocks
    ready = prepared(Finer(False), (3, 6, 6))
    with pytest.raises(Impossible, match="block 'narrow' is dropped, and 'up' with it"):
        ready.plan(Policy(Prune({"up": 8}, drop=("narrow",))))
    compress(ready, Policy(Prune({"stem": 4}, drop=("narrow",))), "recalibrate")


class Sewn(nn.Module):
    """A part that is written as a function on modules, as minGPT's feed-forward is."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a": nn.Linear(8, 32), "b": nn.Linear(32, 8)})
        parts = self.parts
        self.feed = lambda x, scale=1.0: parts["b"](F.gelu(parts["a"](x))) * scale
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.feed(x))


def test_functions_that_a_module_keeps_are_traced_with_its_own_modules() -> None:
    model = Sewn().eval()
    ready = prepared(model, (8,))
    assert set(ready.network.layers) == {"parts.a", "parts.b", "head"}
    assert "parts.a" in ready.network.groups
    x = torch.randn(4, 8)
    torch.testing.assert_close(ready.starts["pruned"].model(x), model(x))
    compress(ready, halves(ready), "recalibrate")

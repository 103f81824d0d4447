"""From a quantized student to the runtime: frozen twin, artifact, parity."""

import copy
import math
import platform
import random
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from executed import float_layers, int8_layers, optimized_graph, optimized_kernels
from torch import Tensor, fx, nn
from torch.nn import functional as F

from flyweight.compressors.data import Items
from flyweight.compressors.export import _torch_onnx, to_onnx
from flyweight.compressors.freeze import FrozenLayer, FrozenQuantizer, freeze
from flyweight.compressors.parity import (
    MEAN_STEPS,
    _run_noisy,
    check_parity,
    compare,
    feed,
    first_departure,
    run_module,
    run_session,
)
from flyweight.compressors.prune import remove
from flyweight.compressors.quantize import (
    calibrate,
    fold_norms,
    insert_quantizers,
    settle,
)
from flyweight.kernels import Runtime, make_runtime
from flyweight.spaces import Impossible, Policy, Quantize, blueprint
from flyweight.spaces.tracing import trace, trace_graph


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def runtime(request: Any) -> Runtime:
    return make_runtime(request.param, 1)


def items_of(example: Any, count: int) -> Items:
    torch.manual_seed(2)

    def draw(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: draw(v) for k, v in value.items()}
        if isinstance(value, tuple):
            return tuple(draw(v) for v in value)
        return torch.randn(count, *value.shape[1:])

    return Items(draw(example), torch.zeros(count))


def student(
    model: nn.Module, example: Any, int8: list[str], runtime: Runtime, count: int = 64
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The quantized student (``int8``: its layers in int8) and its frozen twin."""
    network = trace(model, example)
    policy = Policy(quantize=Quantize(dict.fromkeys(int8, "int8")))
    plan = blueprint(network, policy, runtime.capabilities)
    graph = fold_norms(trace_graph(model, example), network)
    if int8:
        graph = insert_quantizers(graph, plan, "minmax")
        calibrate(graph, items_of(example, count), "minmax")
        settle(graph, network, plan)
    return graph, freeze(graph)


def shaken(model: nn.Module) -> nn.Module:
    """Norms that do something."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model


WRITTEN = [
    "plain",
    "mlp",
    "pixels",
    "separable",
    "concat",
    "quiet",
    "preactivation",
    "grouped",
    "gate",
    "two",
    "sequence",
    "groupnorm",
    "fixed",
    "siamese",
    "recurrent",
    "dense",
    "inception",
    "inplace",
    "signal",
]


@pytest.mark.parametrize("name", WRITTEN)
def test_the_artifact_computes_what_the_model_computes(
    networks: ModuleType, runtime: Runtime, name: str
) -> None:
    model, example = networks.make(name)
    graph, frozen = student(shaken(model), example, [], runtime)
    artifact = to_onnx(frozen, example)
    onnx.checker.check_model(onnx.load_from_string(artifact), full_check=True)
    assert b"flyweight" in artifact[:100]  # written here, not by torch.onnx
    items = items_of(example, 107)
    found = compare(run_module(graph, items), run_session(runtime.load(artifact), items))
    assert found.agreement == 1
    assert found.max_steps < 0.1
    assert to_onnx(frozen, example) == artifact


# Something of theirs is computed in floats, an average, or by several scales.
NEARLY = ("grouped", "gate", "sequence", "groupnorm", "recurrent", "dense")


@pytest.mark.parametrize("name", WRITTEN)
def test_int8_in_the_runtime_equals_the_student(
    networks: ModuleType, runtime: Runtime, name: str
) -> None:
    model, example = networks.make(name)
    layers = list(networks.traced(name).layers)
    graph, frozen = student(shaken(model), example, layers, runtime)
    artifact = to_onnx(frozen, example)
    items = items_of(example, 500)
    theirs = run_session(runtime.load(artifact), items)
    for answers in (run_module(graph, items), run_module(frozen, items)):
        found = compare(answers, theirs)
        assert found.agreement >= 0.995
        assert found.mean_steps < 0.2
    if (runtime.name, platform.machine()) == ("onnxruntime", "x86_64") and name not in NEARLY:
        assert torch.equal(run_module(frozen, items), theirs)
    if name != "grouped":
        count = sum(len(own) for own in networks.traced(name).uses.values())
        # one layer used thrice, each time with a norm: OpenVINO makes a float convolution of both
        lost = 3 if (runtime.name, name) == ("openvino", "recurrent") else 0
        assert int8_layers(artifact, runtime) == count - lost
        assert float_layers(artifact, runtime) == lost


@pytest.mark.parametrize(
    "largest",
    [
        lambda x: x.amax((2, 3)),
        lambda x: F.adaptive_max_pool2d(x, 1),
        lambda x: x.amax((2, 3), keepdim=True),
        lambda x: x.flatten(2).max(2)[0],
        lambda x: x.flatten(2).transpose(1, 2).amax(1),
        lambda x: (-x).flatten(2).transpose(1, 2).min(1)[0],
        lambda x: x.amax((2, 3)).unsqueeze(2).unsqueeze(3),
        lambda x: torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1),
    ],
)
def test_int8_reads_the_largest_and_the_least_values(
    largest: Callable[[Tensor], Tensor], runtime: Runtime
) -> None:
    """OpenVINO 2026.4 answers wrong where it reads what a ReduceMax gave."""

    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 16, 3, padding=1)
            read = math.prod(largest(torch.zeros(1, 16, 6, 5)).shape)
            self.conv = nn.Conv2d(read if read == 16 else 2, 12, 1)
            self.fc, self.head = nn.Linear(16, 12), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = largest(F.relu(self.first(x)))
            if x.dim() == 4:
                return self.head(F.relu(self.conv(x)).mean((2, 3)))
            return self.head(F.relu(self.fc(x.flatten(1))))

    torch.manual_seed(0)
    model, example = Largest().eval(), torch.randn(1, 3, 6, 5)
    layers = list(trace(model, example).layers)
    graph, frozen = student(model, example, layers, runtime)
    artifact = to_onnx(frozen, example)
    items = items_of(example, 300)
    found = compare(run_module(graph, items), run_session(runtime.load(artifact), items))
    assert found.agreement >= 0.99
    assert found.mean_steps < 0.2
    assert (int8_layers(artifact, runtime), float_layers(artifact, runtime)) == (len(layers), 0)


@pytest.mark.parametrize(
    ("ends", "example"),
    [
        ([nn.Conv2d(8, 5, 1)], (1, 3, 8, 8)),
        ([nn.Conv2d(8, 5, 3), nn.BatchNorm2d(5), nn.ReLU()], (1, 3, 8, 8)),
        ([nn.Conv2d(8, 5, 1), nn.ReLU6()], (1, 3, 8, 8)),
        ([nn.Conv2d(8, 5, 1), nn.Dropout()], (1, 3, 8, 8)),
        ([nn.Conv2d(8, 5, 1), nn.Sigmoid()], (1, 3, 8, 8)),
        ([nn.Conv2d(8, 8, 3), nn.MaxPool2d(2), nn.Flatten(2)], (1, 3, 8, 8)),
        ([nn.Flatten(), nn.Linear(128, 5), nn.ReLU()], (1, 3, 4, 4)),
    ],
)
def test_a_layer_that_gives_the_answer_runs_in_int8(
    ends: list[nn.Module], example: tuple[int, ...], runtime: Runtime
) -> None:
    """As of a U-Net. ONNX Runtime's kernel makes integers: the answer is rounded too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *ends).eval()
    inputs = torch.randn(example)
    graph, frozen = student(shaken(model), inputs, list(trace(model, inputs).layers), runtime)
    artifact = to_onnx(frozen, inputs)
    assert (int8_layers(artifact, runtime), float_layers(artifact, runtime)) == (2, 0)
    items = items_of(inputs, 300)
    theirs = run_session(runtime.load(artifact), items)
    found = compare(run_module(graph, items), theirs)
    assert found.mean_steps < 0.05
    if (runtime.name, platform.machine()) == ("onnxruntime", "x86_64"):
        torch.testing.assert_close(run_module(frozen, items), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "mlp", "pixels", "separable", "concat", "preactivation"])
def test_mixed_precision_runs_as_the_policy_says(
    networks: ModuleType, runtime: Runtime, name: str
) -> None:
    model, example = networks.make(name)
    layers = list(networks.traced(name).layers)
    rng = random.Random(name)
    for _ in range(4):
        int8 = [layer for layer in layers if rng.random() < 0.5]
        graph, frozen = student(shaken(copy.deepcopy(model)), example, int8, runtime)
        artifact = to_onnx(frozen, example)
        assert (int8_layers(artifact, runtime), float_layers(artifact, runtime)) == (
            len(int8), len(layers) - len(int8),
        ), int8  # fmt: skip
        items = items_of(example, 300)
        found = compare(run_module(graph, items), run_session(runtime.load(artifact), items))
        assert found.agreement >= 0.99, int8


def test_a_float_layer_between_int8_layers_keeps_its_weights(
    networks: ModuleType, runtime: Runtime
) -> None:
    # ONNX Runtime would round them to 8 bits and one scale: it takes such a layer for forgotten.
    model, example = networks.make("separable")
    with torch.no_grad():
        model.depth[0].weight[0] *= 300  # with one scale the other channels would vanish
    graph, frozen = student(model, example, ["expand.0", "project.0"], runtime)
    items = items_of(example, 100)
    answers = run_session(runtime.load(to_onnx(frozen, example)), items)
    assert compare(run_module(graph, items), answers).mean_steps < 0.05


class Turned(nn.Module):
    """What a convolution makes is moved before anybody computes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gru = nn.Conv1d(4, 16, 3), nn.GRU(16, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 4, T]
        return self.head(self.gru(torch.relu(self.conv(x)).transpose(1, 2))[0].mean(1))


def test_what_is_moved_is_never_dequantized_along_the_last_axis() -> None:
    # There ONNX Runtime does it number by number.
    torch.manual_seed(0)
    model, example = Turned().eval(), torch.randn(1, 4, 20)
    _, frozen = student(model, example, ["conv"], make_runtime("onnxruntime", 1))
    graph = optimized_graph(to_onnx(frozen, example))
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    converted = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    many = [n for n in converted if sizes[n.input[1]]]
    assert many  # of one scale for each place
    (moved,) = (n for n in graph.node if n.op_type == "QLinearConv")
    assert moved.domain == "com.microsoft"  # channels last
    assert {a.i for n in many for a in n.attribute if a.name == "axis"} <= {0, 1}  # of three


def test_the_resnet_runs_in_int8_as_a_whole(resnet: ModuleType, runtime: Runtime) -> None:
    torch.manual_seed(0)
    model = shaken(resnet.ResNet((8, 16, 16)).eval())
    example = torch.rand(1, 1, 28, 28)
    layers = list(trace(model, example).layers)
    graph, frozen = student(model, example, layers, runtime)
    artifact = to_onnx(frozen, example)
    assert (int8_layers(artifact, runtime), float_layers(artifact, runtime)) == (16, 0)
    if runtime.name == "onnxruntime":
        assert optimized_kernels(artifact)["QLinearAdd"] >= 5
    items = items_of(example, 200)
    check_parity(
        frozen, artifact, run_session(runtime.load(artifact), items), items, "int8", runtime
    )
    assert compare(run_module(graph, items), run_module(frozen, items)).mean_steps < 0.2


@pytest.mark.parametrize("name", ["plain", "separable"])
def test_torch_onnx_says_the_same(networks: ModuleType, runtime: Runtime, name: str) -> None:
    # The other way to an artifact, an independent answer to what each operation means.
    model, example = networks.make(name)
    _, frozen = student(shaken(model), example, list(networks.traced(name).layers), runtime)
    items = items_of(example, 50)
    ours = run_session(runtime.load(to_onnx(frozen, example)), items)
    theirs = run_session(runtime.load(_torch_onnx(frozen, (example,), {}, ["input"])), items)
    assert compare(theirs, ours).mean_steps < 0.05


def test_torch_onnx_too_writes_an_average_that_runs_in_int8() -> None:
    torch.manual_seed(0)
    runtime = make_runtime("onnxruntime", 1)
    for end in (nn.Flatten(), nn.Identity()):
        head = nn.Conv2d(8, 3, 1) if isinstance(end, nn.Identity) else nn.Linear(8, 3)
        pool = nn.AdaptiveAvgPool2d(1)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), pool, end, head).eval()
        example = torch.randn(1, 3, 7, 7)
        _, frozen = student(model, example, ["0", "4"], runtime)
        artifact = _torch_onnx(frozen, (example,), {}, ["input"])
        assert optimized_kernels(artifact)["QLinearGlobalAveragePool"] == 1
        items = items_of(example, 50)
        answers = run_session(runtime.load(artifact), items)
        assert compare(run_module(frozen, items), answers).mean_steps < 0.05


class Unwritten(nn.Module):
    """An operation that is not written here."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.logcumsumexp(x, 1))


@pytest.mark.slow
def test_what_is_not_written_here_is_exported_by_torch(runtime: Runtime) -> None:
    model, example = Unwritten().eval(), torch.rand(1, 4)
    artifact = to_onnx(model, example)
    assert b"flyweight" not in artifact[:100]
    items = items_of(example, 7)
    answers = run_session(runtime.load(artifact), items)
    assert compare(run_module(model, items), answers).max_steps < 0.1


class Functional(nn.Module):
    """Operations as functions and methods, with their settings in every place."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 8, 3, stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False)
        self.p = nn.AvgPool2d(2, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        f = nn.functional
        x = f.max_pool2d(self.c(x), (2, 1), stride=1, padding=(1, 0)).relu()
        x = torch.add(x, f.relu6(x))
        x += x
        x = self.p(torch.cat((x, x), 1))
        return torch.flatten(x, start_dim=1)


class Named(nn.Module):
    """A value whose name is that of an input, and an answer that is a transparent operation."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(4, 4)
        self.output = nn.Linear(4, 3)
        self.end = nn.Identity()

    def forward(self, b: Tensor, a: Tensor) -> Tensor:
        return self.end(self.output(torch.relu(self.input(b)) + a))


@pytest.mark.parametrize("example", [
    torch.rand(1, 3, 12, 12), (torch.rand(1, 4), torch.rand(1, 4)),
    {"a": torch.rand(1, 4), "b": torch.rand(1, 4)},
])  # fmt: skip
def test_inputs_settings_and_names(example: Any, runtime: Runtime) -> None:
    model = (Functional() if isinstance(example, Tensor) else Named()).eval()
    artifact = to_onnx(model, example)
    assert b"flyweight" in artifact[:100]
    graph = onnx.load_from_string(artifact).graph
    expected = set(feed(example))
    assert {i.name for i in graph.input} == expected
    assert isinstance(example, dict) or expected <= {"input", "input_0", "input_1"}
    assert [o.name for o in graph.output] == ["output"]
    session = runtime.load(artifact)
    for count in (1, 7):  # the batch is free
        items = items_of(example, count)
        assert torch.allclose(run_session(session, items), run_module(model, items), atol=1e-5)


def test_a_module_that_no_exporter_takes_is_impossible() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svd(x).S

    with pytest.raises(Impossible, match=r"torch\.onnx cannot export"):
        to_onnx(Odd(), torch.rand(1, 4, 4))


@pytest.mark.parametrize(
    ("layer", "value", "int8"),
    [("c1", "relu", True), ("l1", "relu_2", True), ("c2", "c2", False)],
)
def test_an_artifact_that_departs_is_refused_and_the_place_named(
    networks: ModuleType, runtime: Runtime, layer: str, value: str, int8: bool
) -> None:
    model, example = networks.make("plain")
    layers = list(networks.traced("plain").layers) if int8 else []
    _, frozen = student(model, example, layers, runtime)
    artifact = to_onnx(frozen, example)  # and then the twin moves away from it
    module: Any = frozen.get_submodule(layer)
    assert isinstance(module, FrozenLayer) == int8
    module.weight[3] = -module.weight[3]
    module.weight[0] = module.weight[1]
    items = items_of(example, 100)
    answers = run_session(runtime.load(artifact), items)
    assert first_departure(frozen, artifact, items, runtime) == f"value {value!r}"
    wrong = answers.roll(1, 1)  # so that the check fails whatever the weights are worth
    with pytest.raises(Impossible, match=f"parity: .*departs first at value '{value}'"):
        check_parity(frozen, artifact, wrong, items, "int8" if int8 else "fp32", runtime)


def test_parity_allows_what_float32_cannot_tell(runtime: Runtime) -> None:
    torch.manual_seed(0)
    model, example = nn.Sequential(nn.Linear(8, 3, bias=False)).eval(), torch.rand(1, 8)
    _, frozen = student(model, example, ["0"], runtime)
    artifact = to_onnx(frozen, example)
    scale = next(m for m in frozen.modules() if isinstance(m, FrozenQuantizer)).scale
    between = torch.randint(-2, 2, (60, *example.shape[1:])) + 0.5  # two integers, each as good
    items, above = (Items(between * scale * (1 + e), torch.zeros(60)) for e in (0, 1e-6))
    own = run_module(frozen, items)
    answers = torch.cat((run_module(frozen, above)[:30], own[30:]))
    assert compare(own, answers).mean_steps > MEAN_STEPS
    check_parity(frozen, artifact, answers, items, "int8", runtime)
    with pytest.raises(Impossible, match="parity"):
        check_parity(frozen, artifact, answers.roll(1, 1), items, "int8", runtime)
    assert not any(module._forward_pre_hooks for module in frozen.modules())


def test_parity_knows_that_noise_is_one_draw_of_many(runtime: Runtime) -> None:
    torch.manual_seed(0)
    model, example = nn.Sequential(nn.Linear(8, 3, bias=False)).eval(), torch.rand(1, 8)
    _, frozen = student(model, example, ["0"], runtime)
    artifact = to_onnx(frozen, example)
    scale = next(m for m in frozen.modules() if isinstance(m, FrozenQuantizer)).scale
    between = torch.randint(-2, 2, (60, 8)) + 0.5
    items = Items(between * scale, torch.zeros(60))
    nudge = torch.where(between.abs() < 1, 1e-6, -1e-6)  # each is rounded the other way
    own = run_module(frozen, items)
    other = run_module(frozen, Items(items.inputs * (1 + nudge), items.targets))
    noise = compare(own, _run_noisy(frozen, items))
    for moved, allowed in ((45, True), (60, False)):
        answers = torch.cat((other[:moved], own[moved:]))
        found = compare(own, answers)
        assert found.mean_steps > noise.mean_steps > MEAN_STEPS
        assert found.agreement >= noise.agreement or not allowed
        with nullcontext() if allowed else pytest.raises(Impossible, match="parity"):
            check_parity(frozen, artifact, answers, items, "int8", runtime)


def test_a_runtime_that_errs_only_at_the_end_is_located_there(
    networks: ModuleType, runtime: Runtime
) -> None:
    model, example = networks.make("plain")
    _, frozen = student(model, example, ["c1", "c2"], runtime)
    items = items_of(example, 100)
    artifact = to_onnx(frozen, example)
    frozen.get_submodule("l2").weight.mul_(-1)  # type: ignore[union-attr,operator]
    assert first_departure(frozen, artifact, items, runtime) == "the output"
    answers = run_session(runtime.load(artifact), items)
    with pytest.raises(Impossible, match="the output"):
        check_parity(frozen, artifact, answers, items, "int8", runtime)


def test_comparing_counts_steps_of_the_range() -> None:
    student = torch.tensor([[0.0, 255.0], [10.0, 5.0]])
    found = compare(student, torch.tensor([[0.0, 253.0], [10.0, 11.0]]))
    assert (found.agreement, found.mean_steps, found.max_steps) == (0.5, 2.0, 6.0)
    assert compare(torch.arange(4.0)[:, None], torch.arange(4.0)[:, None]).agreement == 1


def test_freezing_leaves_the_student_as_it_is(networks: ModuleType, runtime: Runtime) -> None:
    model, example = networks.make("plain")
    graph, frozen = student(model, example, ["c1", "l1"], runtime)
    before = copy.deepcopy(graph.state_dict())
    freeze(graph).get_submodule("c1").weight.zero_()  # type: ignore[union-attr,operator]
    assert all(torch.equal(before[k], v) for k, v in graph.state_dict().items())
    weights = [m.weight for m in frozen.modules() if isinstance(m, FrozenLayer)]
    assert [w.dtype for w in weights] == [torch.int8] * 2


def test_a_pruned_student_exports(networks: ModuleType, runtime: Runtime) -> None:
    model, example = networks.make("separable")
    network = networks.traced("separable")
    kept = {name: torch.arange(8) for name in network.groups}
    pruned = trace_graph(remove(shaken(model), network, example, kept), example)
    items = items_of(example, 20)
    answers = run_session(runtime.load(to_onnx(pruned, example)), items)
    assert compare(run_module(pruned, items), answers).max_steps < 0.1


@pytest.mark.slow  # exported by torch.onnx
def test_torch_onnx_tells_users_nothing_of_its_passes(caplog: pytest.LogCaptureFixture) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.EmbeddingBag(9, 8, padding_idx=0), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.words(x))  # type: ignore[no-any-return]

    assert to_onnx(Bag().eval(), torch.randint(0, 9, (1, 6)))
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == []

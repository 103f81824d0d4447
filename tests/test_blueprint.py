"""The blueprint against models that were really pruned, and its quantizers against the rules."""

import dataclasses
import math
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils.flop_counter import FlopCounterMode

from flyweight.compressors.prune import remove
from flyweight.spaces import (
    Blueprint,
    Capabilities,
    Impossible,
    Network,
    Policy,
    Prune,
    Quantize,
    Settings,
    Space,
    blueprint,
)
from flyweight.spaces.tracing import trace

Traced = Callable[[str], Network]
BOTH = ("fp32", "int8")
TARGET = Capabilities({"conv": BOTH, "linear": BOTH}, weight_bits=7)
NAMES = [
    "plain", "mlp", "pixels", "separable", "concat", "quiet", "two", "sequence", "preactivation",
    "grouped", "groupnorm", "gate", "fixed", "siamese", "recurrent", "dense", "inception",
    "inplace", "signal",
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(resnet: ModuleType) -> Network:
    """The traced network of the reference task."""
    return trace(resnet.ResNet(), torch.rand(1, 1, 28, 28))


def int8(network: Network, *layers: str, target: Capabilities = TARGET) -> Blueprint:
    """The blueprint with ``layers`` in int8 (all, if none is named)."""
    precision = dict.fromkeys(layers or network.layers, "int8")
    return blueprint(network, Policy(quantize=Quantize(precision)), target)


def precisions(plan: Blueprint) -> dict[str, str]:
    return {kernel.name: kernel.precision for kernel in plan.kernels}


# -- widths, against the pruned model ------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32))
def test_shapes_and_cost_are_those_of_the_pruned_model(
    name: str, seed: int, networks: ModuleType
) -> None:
    model, example = networks.make(name)
    args = example if isinstance(example, tuple) else (example,)
    network, rng = networks.traced(name), random.Random(seed)
    space = Space(network, TARGET, Settings(min_keep=0.01, multiple_of=1))
    plan = blueprint(network, space.sample(rng), TARGET)
    kept = {name: networks.some(network.groups[name], w, rng) for name, w in plan.widths.items()}
    pruned = remove(model, network, example, kept)

    for kernel in plan.kernels:
        if kernel.name not in network.layers:
            continue
        module: Any = pruned.get_submodule(kernel.name)
        conv = kernel.kind == "conv"
        axis = 1 if conv else -1
        assert kernel.in_shapes[0][axis] == (module.in_channels if conv else module.in_features)
        assert kernel.out_shape[axis] == (module.out_channels if conv else module.out_features)
        assert kernel.groups == (module.groups if conv else 1)
    ShapeProp(pruned).propagate(*args)
    shapes = {n.name: n.meta["tensor_meta"].shape for n in pruned.graph.nodes}
    for kernel in plan.kernels:
        assert kernel.out_shape == shapes[kernel.output], kernel
        assert kernel.in_shapes == tuple(shapes[i] for i in kernel.inputs), kernel
    if name != "fixed":  # its transposed convolution is no layer
        with FlopCounterMode(display=False) as counter:
            pruned(*args)
        assert counter.get_total_flops() == 2 * plan.macs  # it counts a multiply-add twice


def test_the_cost_of_a_residual_network_is_as_counted_by_hand(teacher: Network) -> None:
    # 3 x 3 convolutions: positions x 9 x inputs x outputs, stage by stage.
    full = 196 * 9 * (1 * 32 + 4 * 32 * 32)
    full += 49 * (9 * (32 * 64 + 3 * 64 * 64) + 32 * 64)
    full += 16 * (9 * (64 * 128 + 3 * 128 * 128) + 64 * 128)
    full += 128 * 10
    assert blueprint(teacher, Policy(), TARGET).macs == full
    assert sum(layer.macs for layer in teacher.layers.values()) == full
    half = 196 * 9 * (1 * 16 + 4 * 16 * 16)
    half += 49 * (9 * (16 * 32 + 3 * 32 * 32) + 16 * 32)
    half += 16 * (9 * (32 * 64 + 3 * 64 * 64) + 32 * 64)
    half += 64 * 10
    halved = Policy(Prune({n: g.width // 2 for n, g in teacher.groups.items()}))
    assert blueprint(teacher, halved, TARGET).macs == half


def test_every_group_has_a_width_and_every_layer_a_precision(teacher: Network) -> None:
    plan = blueprint(teacher, Policy(Prune({"stem.0": 8})), TARGET)
    assert plan.widths == {n: g.width for n, g in teacher.groups.items()} | {"stem.0": 8}
    assert plan.precision == dict.fromkeys(teacher.layers, "fp32")
    assert plan.quantized == {}
    assert plan.weight_bits == 7


# -- kernels -------------------------------------------------------------------------------------


def test_norms_and_activations_are_part_of_the_kernel_before_them(teacher: Network) -> None:
    kernels = {k.name: k for k in blueprint(teacher, Policy(), TARGET).kernels}
    assert len(kernels) == 16 + 6 + 2  # layers, adds, pool and flatten
    stem = kernels["stem.0"]
    assert (stem.kind, stem.output, stem.act, stem.kernel, stem.stride) == (
        "conv", "stem_2", "relu", (3, 3), (2, 2),
    )  # fmt: skip
    assert (kernels["body.0.c2"].output, kernels["body.0.c2"].act) == ("body_0_n2", "")
    assert (kernels["add"].inputs, kernels["add"].output, kernels["add"].act) == (
        ("body_0_n2", "stem_2"), "relu_1", "relu",
    )  # fmt: skip


def test_a_norm_behind_an_add_is_a_kernel_of_its_own(traced: Traced) -> None:
    plan = blueprint(traced("preactivation"), Policy(), TARGET)
    assert [(k.name, k.output, k.act) for k in plan.kernels] == [
        ("stem", "stem", ""), ("c1", "c1", ""), ("add", "add", ""), ("norm", "norm", ""),
        ("relu", "relu", ""), ("c2", "c2", ""), ("mean", "mean", ""), ("head", "head", ""),
    ]  # fmt: skip


def test_a_value_that_somebody_else_reads_is_not_fused_away() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(torch.relu(x) + x)

    plan = int8(trace(Both(), torch.rand(1, 3, 4, 4)))
    assert [k.output for k in plan.kernels] == ["a", "relu", "add", "b"]
    assert plan.quantized == {v: v for v in ("x", "a", "add", "b")}
    assert precisions(plan) == {"a": "int8", "relu": "fp32", "add": "fp32", "b": "int8"}


def test_a_depthwise_kernel_has_as_many_groups_as_channels(traced: Traced) -> None:
    plan = blueprint(traced("separable"), Policy(Prune({"expand.0": 24})), TARGET)
    kernels = {k.name: k for k in plan.kernels}
    assert kernels["depth.0"].groups == 24
    assert kernels["depth.0"].act == "relu6"
    assert kernels["project.0"].groups == 1


def test_sizes_and_constants_are_no_kernels() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.shift = nn.Conv2d(3, 8, 1), nn.Parameter(torch.zeros(1, 32))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return x.view(x.size(0), -1) + self.shift

    plan = blueprint(trace(Sized(), torch.rand(1, 3, 2, 2)), Policy(), TARGET)
    assert [k.name for k in plan.kernels] == ["a", "view", "add"]


@pytest.mark.parametrize("name", NAMES)
def test_kernels_read_what_earlier_kernels_make(name: str, traced: Traced) -> None:
    network = traced(name)
    plan = int8(network)
    known = set(network.inputs) | {op.name for op in network.ops if not op.inputs}
    for kernel in plan.kernels:
        assert known.issuperset(kernel.inputs)
        known.add(kernel.output)
    assert plan.kernels[-1].output == network.output


# -- quantizers ----------------------------------------------------------------------------------


def test_quantizers_of_a_residual_network_all_in_int8(teacher: Network) -> None:
    plan = int8(teacher)
    read = {"x", "stem_2", "pool"} | {"relu"} | {f"relu_{i}" for i in range(1, 12)}
    second = {f"body_{i}_n2" for i in range(6)}  # made for the adds
    short = {"body_2_short_1", "body_4_short_1"}
    # Not the answer (head). What only moves values leaves them on their scale.
    assert plan.quantized == {v: v for v in read | second | short} | {"flatten": "pool"}
    assert set(precisions(plan).values()) == {"int8"}
    without = dataclasses.replace(TARGET, int8_ops=frozenset({"add"}))
    plan = int8(teacher, target=without)
    read = read - {"pool", "relu_11"} | {"flatten"}
    assert plan.quantized == {v: v for v in read | second | short}
    floats = {name for name, precision in precisions(plan).items() if precision == "fp32"}
    assert floats == {"add_5", "pool", "flatten"}


def test_quantizers_of_a_residual_network_in_mixed_precision(teacher: Network) -> None:
    plan = int8(teacher, "body.0.c2", "body.1.c1", "body.1.c2", "body.2.c1")
    assert plan.quantized == {
        v: v for v in ("relu", "body_0_n2", "relu_1", "relu_2", "body_1_n2", "relu_3", "relu_4")
    }
    kernels = precisions(plan)
    assert kernels["add"] == "fp32"  # stem_2 is not quantized
    assert kernels["add_1"] == "int8"  # body_1_n2 and relu_1 are, and body.2.c1 reads the sum
    assert kernels["body.2.short.0"] == "fp32"  # reads relu_3 dequantized
    assert sum(p == "int8" for p in kernels.values()) == 5


@pytest.mark.parametrize(
    ("layer", "values"),
    [
        ("stem.0", {"x", "stem_2"}),
        ("body.2.short.0", {"relu_3", "body_2_short_1"}),
        ("head", {"flatten"}),
    ],
)
def test_quantizers_of_one_int8_layer(teacher: Network, layer: str, values: set[str]) -> None:
    plan = int8(teacher, layer)
    assert plan.quantized == {v: v for v in values}
    assert [n for n, p in precisions(plan).items() if p == "int8"] == [layer]


def test_only_what_an_int8_kernel_makes_is_read_rounded_by_all(teacher: Network) -> None:
    plan = int8(teacher, "body.0.c2", "body.1.c1", "body.1.c2", "body.2.c1")
    assert plan.rounded == {
        "relu": ("body_0_c2",),
        "body_0_n2": ("add",),  # a float sum, of what a convolution in int8 makes
        "relu_1": ("body_1_c1", "add_1"),  # made by that sum; add_1 is in int8
        "relu_2": ("body_1_c2",),
        "body_1_n2": ("add_1",),
        "relu_3": ("body_2_c1", "body_2_short_0"),  # add_1 makes it: the shortcut has no other
        "relu_4": teacher.consumers["relu_4"],
    }
    alone = int8(teacher, "body.0.c1")
    assert alone.rounded["stem_2"] == ("body_0_c1",)
    assert teacher.consumers["stem_2"] == ("body_0_c1", "add")


def test_a_concatenation_shares_one_scale(traced: Traced) -> None:
    plan = int8(traced("concat"))
    assert plan.quantized == {
        "x": "x", "relu": "relu", "relu_1": "relu", "relu_2": "relu", "cat": "relu",
        "relu_3": "relu_3", "adaptive_avg_pool2d": "adaptive_avg_pool2d",
        "flatten": "adaptive_avg_pool2d",
    }  # fmt: skip
    assert precisions(plan)["cat"] == "int8"


def test_a_concatenation_with_a_part_in_float_is_float(traced: Traced) -> None:
    network = traced("concat")
    plan = int8(network, *(layer for layer in network.layers if layer != "left"))
    assert plan.quantized["cat"] == "cat"
    assert "relu_1" not in plan.quantized
    assert plan.quantized["relu"] == "relu"
    assert plan.quantized["relu_2"] == "relu_2"
    assert precisions(plan)["cat"] == "fp32"


def test_a_concatenation_of_parts_that_are_not_quantized_is_float(traced: Traced) -> None:
    plan = int8(traced("parts"))  # a split gives several tensors at once, none of them a value here
    assert {"cat", "cat_1"} <= plan.quantized.keys()
    assert precisions(plan)["cat"] == precisions(plan)["cat_1"] == "fp32"


def test_what_only_moves_values_passes_the_scale_on(traced: Traced) -> None:
    network = traced("plain")
    plan = int8(network)
    assert plan.quantized == {
        "x": "x", "relu": "relu", "relu_1": "relu_1", "max_pool2d": "relu_1",
        "flatten": "relu_1", "relu_2": "relu_2",
    }  # fmt: skip
    assert precisions(plan)["max_pool2d"] == precisions(plan)["flatten"] == "int8"
    alone = int8(network, "l1")
    assert alone.quantized == {"flatten": "flatten", "relu_2": "relu_2"}
    assert precisions(alone)["max_pool2d"] == precisions(alone)["flatten"] == "fp32"


def test_sizes_that_a_view_reads_are_no_values() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 4), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.b(nn.functional.max_pool2d(torch.relu(self.a(x)), 2)))
            return self.head(x.view(x.size(0), -1))

    plan = int8(trace(Viewed(), torch.rand(1, 3, 8, 8)))
    assert [(k.name, k.act) for k in plan.kernels] == [
        ("a", "relu"), ("max_pool2d", ""), ("b", "relu"), ("view", ""), ("head", ""),
    ]  # fmt: skip
    assert set(precisions(plan).values()) == {"int8"}
    assert plan.quantized["view"] == "relu_1"


@pytest.mark.parametrize("asked", ["conv", "norm", "add"])
def test_who_asks_for_a_size_does_not_part_a_kernel(asked: str) -> None:
    class Asked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.other, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            conv = self.conv(x)
            norm = self.norm(conv)
            x = torch.relu(norm)
            add = self.other(x) + x
            n, channels, height, _ = {"conv": conv, "norm": norm, "add": add}[asked].shape
            return self.head(torch.relu(add).reshape(n, channels, height * 4).mean(2))

    network = trace(Asked(), torch.rand(1, 3, 4, 4))
    assert network.folded == {"conv": "norm"}
    assert [(k.name, k.act) for k in int8(network).kernels] == [
        ("conv", "relu"), ("other", ""), ("add", "relu"), ("reshape", ""), ("mean", ""),
        ("head", ""),
    ]  # fmt: skip
    assert len(network.sizes) == 5


def test_zeros_around_the_input_of_a_convolution_are_part_of_its_kernel() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, 2), nn.Conv2d(8, 8, 3)
            self.pad, self.one = nn.ZeroPad2d((0, 1, 0, 1)), nn.ConstantPad2d(1, 1.0)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            x = torch.relu(self.b(self.pad(x)) + self.b(self.pad(x)))
            return self.c(self.one(x))

    plan = int8(trace(Padded(), torch.rand(1, 3, 8, 8)))
    assert [kernel.name for kernel in plan.kernels] == ["a", "b", "b", "add", "one", "c"]
    assert plan.kernels[1].inputs == ("relu",)
    assert plan.kernels[1].out_shape == (1, 8, 4, 4)
    assert "pad" not in plan.quantized
    # One that is not zero is not exact on every scale, nor does a layer add it.
    assert plan.quantized["one"] == "one"


def test_a_linear_layer_ends_in_int8_only_with_an_activation(traced: Traced) -> None:
    assert int8(traced("mlp"), "a").quantized == {"x": "x", "relu": "relu"}
    assert int8(traced("mlp"), "c").quantized == {"relu_1": "relu_1"}
    assert int8(traced("sequence"), "up").quantized == {"norm": "norm"}
    ends_open = Capabilities(TARGET.precisions, act_output_quantized=frozenset())
    assert int8(traced("mlp"), "a", target=ends_open).quantized == {"x": "x"}


class Chain(nn.Module):
    """Two sums, with a ReLU between them where ``clipped``."""

    def __init__(self, clipped: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 8, 1) for _ in range(3))
        self.d, self.clipped = nn.Conv2d(8, 2, 1), clipped

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        return self.d((torch.relu(y) if self.clipped else y) + self.c(x))  # type: ignore[no-any-return]


def test_a_chain_of_clipped_adds_runs_in_int8_as_a_whole() -> None:
    network = trace(Chain(clipped=True), torch.rand(1, 3, 4, 4))
    plan = int8(network)
    assert plan.quantized == {v: v for v in ("x", "a", "b", "c", "relu", "add_1", "d")}
    assert precisions(plan) == dict.fromkeys(("a", "b", "c", "d", "add", "add_1"), "int8")
    mixed = int8(network, "a", "b", "d")  # c is in float, so the second sum is
    assert mixed.quantized == {v: v for v in ("x", "a", "b", "add_1", "d")}
    assert precisions(mixed)["add"] == precisions(mixed)["add_1"] == "fp32"


def test_sums_of_sums_stay_in_float_and_are_rounded_for_layers_alone() -> None:
    network = trace(Chain(clipped=False), torch.rand(1, 3, 4, 4))
    plan = int8(network)
    assert network.sums_of_sums == {"add", "add_1"}
    assert plan.quantized == {v: v for v in ("x", "a", "b", "c", "add_1", "d")}
    assert precisions(plan) == dict.fromkeys("abcd", "int8") | {"add": "fp32", "add_1": "fp32"}
    assert plan.rounded["add_1"] == ("d",)
    assert plan.rounded["a"] == ("add",)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32))
def test_rules_that_hold_for_every_network(name: str, seed: int, networks: ModuleType) -> None:
    network = networks.traced(name)
    policy = Space(network, TARGET, Settings()).sample(random.Random(seed))
    plan = blueprint(network, policy, TARGET)
    order = [op.name for op in network.ops]
    made = {kernel.output: kernel.precision for kernel in plan.kernels}
    assert network.output not in plan.quantized or made[network.output] == "int8"
    assert list(plan.quantized) == [v for v in order if v in plan.quantized]
    for value, scale in plan.quantized.items():
        assert plan.quantized[scale] == scale  # the first to be made names the scale
        assert order.index(scale) <= order.index(value)
    for kernel in plan.kernels:
        if kernel.precision == "int8":
            assert all(v in plan.quantized for v in kernel.inputs)
            if kernel.kind != "linear":
                assert kernel.output in plan.quantized
        if kernel.name in plan.precision:
            assert kernel.precision == plan.precision[kernel.name]
    if not policy.quantize.acts:
        assert plan.quantized == {}


def test_the_answer_is_quantized_only_where_its_kernel_has_no_other() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.ReLU())
    network = trace(model, torch.rand(1, 3, 4, 4))
    assert int8(network).quantized == {v: v for v in ("input_1", "_1", "_3")}
    assert int8(network).kernels[-1].output == "_3"
    open_ended = Capabilities(TARGET.precisions, output_quantized=frozenset())
    assert int8(network, target=open_ended).quantized == {"input_1": "input_1", "_1": "_1"}
    linear = trace(
        nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 2)), torch.rand(1, 3, 4, 4)
    )
    assert "_2" not in int8(linear).quantized


def test_capabilities_decide_where_int8_kernels_end(teacher: Network) -> None:
    no_adds = Capabilities(TARGET.precisions, int8_ops=frozenset())
    assert precisions(int8(teacher, target=no_adds))["add"] == "fp32"
    open_ended = Capabilities(TARGET.precisions, output_quantized=frozenset())
    assert int8(teacher, "stem.0", target=open_ended).quantized == {"x": "x"}


# -- what is not possible ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (Policy(Prune({"stem.1": 8})), r"no group 'stem.1' .*; did you mean 'stem.0'\?"),
        (Policy(Prune({"body.0.c2": 8})), "no group 'body.0.c2'"),  # a member, but no name
        (Policy(Prune({"head": 8})), "no group 'head'"),
        (Policy(Prune({"stem.0": 33})), "1 <= width <= 32 must hold for group 'stem.0', .* 33"),
        (Policy(quantize=Quantize({"body": "int8"})), "no layer 'body' in this network"),
        (Policy(quantize=Quantize({"head": "int4"})), "'head' in fp32 or int8, but got 'int4'"),
    ],
)
def test_what_is_not_possible_is_refused_with_the_rule(
    teacher: Network, policy: Policy, says: str
) -> None:
    with pytest.raises(Impossible, match=says):
        blueprint(teacher, policy, TARGET)


def test_a_precision_that_the_target_lacks_is_refused(teacher: Network) -> None:
    target = Capabilities({"conv": BOTH})
    with pytest.raises(Impossible, match="'head' in fp32, but got 'int8'"):
        int8(teacher, "head", target=target)


def test_a_width_that_a_norm_in_groups_forbids_is_refused(traced: Traced) -> None:
    with pytest.raises(Impossible, match=r"'c1' must be a multiple of 6 .*, but got 8"):
        blueprint(traced("groupnorm"), Policy(Prune({"c1": 8})), TARGET)
    space = Space(traced("groupnorm"), TARGET, Settings())
    assert space.widths["c1"] == (12, 24)  # none of lcm(6, 8) is smaller; lanes are wasted
    finer = Space(traced("groupnorm"), TARGET, Settings(multiple_of=6))
    assert finer.widths["c1"] == (6, 12, 18, 24)
    assert all(w % math.lcm(6) == 0 for w in finer.widths["c1"])


def test_capabilities_are_told_in_the_same_words_in_every_process() -> None:
    """The order of a set is another in each."""
    told = repr(Capabilities({"conv": BOTH}, int8_ops=frozenset("hgfedcba")))
    assert told == (
        "Capabilities(precisions={'conv': ('fp32', 'int8')}, weight_bits=8, width_multiple=8, "
        "output_quantized=frozenset({'conv'}), "
        "int8_ops=frozenset({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}), "
        "act_output_quantized=frozenset({'linear'}))"
    )
    assert "int8_ops=frozenset()" in repr(Capabilities({}, int8_ops=frozenset()))

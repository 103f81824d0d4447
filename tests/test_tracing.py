"""Tracing: operations, layers and groups of real modules, and clear refusals of the others."""

import copy
import math
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.compressors.prune import remove
from flyweight.spaces import BadInput, Network, Untraceable
from flyweight.spaces.tracing import trace, trace_graph

Traced = Callable[[str], Network]


def members(network: Network) -> dict[str, tuple[str, ...]]:
    return {name: group.members for name, group in network.groups.items()}


def kinds(network: Network) -> dict[str, str]:
    return {op.name: op.kind for op in network.ops}


# -- groups --------------------------------------------------------------------------------------


def test_groups_of_a_residual_network(resnet: ModuleType) -> None:
    network = trace(resnet.ResNet(), torch.rand(1, 1, 28, 28))
    assert members(network) == {
        "stem.0": ("stem.0", "body.0.c2", "body.1.c2"),
        "body.0.c1": ("body.0.c1",),
        "body.1.c1": ("body.1.c1",),
        "body.2.c1": ("body.2.c1",),
        "body.2.c2": ("body.2.c2", "body.2.short.0", "body.3.c2"),
        "body.3.c1": ("body.3.c1",),
        "body.4.c1": ("body.4.c1",),
        "body.4.c2": ("body.4.c2", "body.4.short.0", "body.5.c2"),
        "body.5.c1": ("body.5.c1",),
    }
    assert list(network.groups) == list(members(network))
    assert [g.width for g in network.groups.values()] == [32] * 3 + [64] * 3 + [128] * 3
    assert len(network.layers) == 16
    assert network.layers["body.4.short.0"].out_group == "body.4.c2"
    assert network.layers["head"].out_group is None
    assert network.inputs == ("x",)
    assert network.output == "head"
    assert network.parameters == sum(p.numel() for p in resnet.ResNet().parameters())


GROUPS = {
    "plain": {"c1": ("c1",), "c2": ("c2",), "l1": ("l1",)},
    "mlp": {"a": ("a",), "b": ("b",)},
    "separable": {"stem.0": ("stem.0", "project.0"), "expand.0": ("expand.0", "depth.0")},
    "concat": {"stem": ("stem",), "left": ("left",), "right": ("right",), "join": ("join",)},
    "quiet": {"a": ("a", "b")},
    "two": {"a": ("a",), "b": ("b",)},
    "sequence": {"up": ("up",)},  # down is added to the input, whose channels are fixed
    "preactivation": {"stem": ("stem", "c1"), "c2": ("c2",)},
    "grouped": {"c1": ("c1",), "c2": ("c2",), "grouped": ("grouped",), "c3": ("c3",)},
    "groupnorm": {"c1": ("c1",)},
    "gate": {"c1": ("c1", "up"), "down": ("down",), "c2": ("c2",)},
    "fixed": {
        "number": ("number",), "free": ("free",), "last": ("last",), "other": ("other",),
    },
    "siamese": {"c1": ("c1",), "c2": ("c2",)},
    "recurrent": {"stem": ("stem", "step"), "join": ("join",)},
    "dense": {
        "stem": ("stem",), "layers.0": ("layers.0",), "layers.1": ("layers.1",),
        "layers.2": ("layers.2",), "last": ("last",),
    },
    "inception": {
        name: (name,)
        for name in (
            "stem.0", "blocks.0.0.0", "blocks.0.1.0.0", "blocks.0.1.1.0", "blocks.0.2.1.0",
            "blocks.1.0.0", "blocks.1.1.0.0", "blocks.1.1.1.0", "blocks.1.2.1.0",
        )
    },
    "inplace": {"a": ("a", "b"), "c": ("c",)},
    "signal": {"stem": ("stem", "c2"), "c1": ("c1",)},
    "text": {f"convs.{i}": (f"convs.{i}",) for i in range(3)},
    "convnext": {"stem.0": ("stem.0", "depth", "down"), "up": ("up",)},
    "parallel": {f"branches.{i}": (f"branches.{i}",) for i in range(3)},
    "heard": {"c1": ("c1",), "c2": ("c2",), "l1": ("l1",)},
    "parts": {"c1": ("c1",), "c2": ("c2",), "c4": ("c4",)},  # of c3 unequal parts are read
    "mixer": {"stem": ("stem", "channels.2"), "channels.0": ("channels.0",)},
    "shuffled": {"stem": ("stem", "branches.0", "branches.1"), "join": ("join",)},
    "crossstage": {
        "stem": ("stem", "blocks.0.2", "blocks.1.2"), "blocks.0.0": ("blocks.0.0",),
        "blocks.1.0": ("blocks.1.0",), "join": ("join",),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_groups(name: str, traced: Traced) -> None:
    assert members(traced(name)) == GROUPS[name]


@pytest.mark.parametrize("name", GROUPS)
def test_the_channels_of_the_answer_are_in_no_group(name: str, traced: Traced) -> None:
    network = traced(name)
    assert all(group is None for group, _ in network.op[network.output].parts)
    assert network.layers["head" if "head" in network.layers else network.output].out_group is None


def test_halves_of_channels_lose_the_same(traced: Traced) -> None:
    for name in ("crossstage", "shuffled"):
        slots = {slot.tensor: slot.units for slot in traced(name).groups["stem"].slots}
        made = slots["stem.weight"]
        assert made[:16] == made[16:]
        assert len({*made}) == {"crossstage": 16, "shuffled": 8}[name]


def test_a_norm_in_groups_asks_for_multiples(traced: Traced) -> None:
    group = traced("groupnorm").groups["c1"]
    assert (group.width, group.multiple_of) == (24, 6)
    assert group.first(12) == [0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21]  # two of each four


@pytest.mark.parametrize("name", sorted(GROUPS.keys() - {"groupnorm", "convnext"}))  # mix channels
def test_removing_channels_that_are_zero_changes_nothing(
    name: str, networks: ModuleType, traced: Traced
) -> None:
    model, example = networks.make(name)
    network, rng = traced(name), random.Random(0)
    for module in model.modules():
        if isinstance(getattr(module, "bias", None), Tensor):
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    kept = {}
    for group in network.groups.values():
        width = group.width // group.multiple_of // 2 * group.multiple_of
        kept[group.name] = networks.some(group, width, rng)
        units = {group.unit[i] for i in kept[group.name].tolist()}
        for slot in group.slots:
            layer = slot.tensor.removesuffix(".weight")
            outputs = int(layer in group.members and layer not in network.layers)  # transposed
            if layer in {*network.layers, *group.members} and slot.axis == outputs:
                gone = [i for i, unit in enumerate(slot.units) if unit >= 0 and unit not in units]
                with torch.no_grad():
                    model.get_parameter(slot.tensor).movedim(slot.axis, 0)[gone] = 0
    pruned = remove(model, network, example, kept)
    args = example if isinstance(example, tuple) else (example,)
    assert sum(p.numel() for p in pruned.parameters()) < network.parameters
    torch.testing.assert_close(pruned(*args), model(*args))


class Heads(nn.Module):
    """Attention whose heads are cut in one of the ways that people write."""

    def __init__(self, cut: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.cut, self.heads = cut, 4
        self.embed, self.qkv, self.out = nn.Linear(8, 32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.cut(self, x)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.out(y)).mean(1))


@pytest.mark.parametrize(
    "cut",
    [
        lambda m, x: [
            t.reshape(len_of(x), x.shape[1], m.heads, -1).transpose(1, 2)
            for t in m.qkv(x).chunk(3, dim=-1)
        ],
        lambda m, x: (t.unflatten(2, (4, 8)).transpose(1, 2) for t in m.qkv(x).split([32] * 3, 2)),
        lambda m, x: (p(x).unflatten(-1, (m.heads, -1)).transpose(1, 2) for p in (m.q, m.k, m.v)),
        lambda m, x: (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (m.q, m.k, m.v)),
    ],
    ids=["chunks", "split", "heads", "widths"],
)  # fmt: skip
def test_heads_are_found_however_they_are_cut(cut: Any) -> None:
    network = trace(Heads(cut).eval(), torch.rand(1, 5, 8))
    assert {g.multiple_of for g in network.groups.values()} == {1, 8}


def len_of(x: Tensor) -> Any:
    return x.size(0)


def test_channels_may_be_unflattened_by_a_module() -> None:
    body = nn.Sequential(
        nn.Linear(8, 128), nn.ReLU(), nn.Unflatten(1, (32, 2, -1)), nn.Conv2d(32, 4, 1)
    )
    network = trace(body.eval(), torch.rand(1, 8))
    assert members(network) == {"0": ("0",)}
    pruned = remove(
        body, network, torch.rand(1, 8), {"0": torch.tensor(network.groups["0"].first(16))}
    )
    assert pruned.get_submodule("3").weight.shape == (4, 16, 1, 1)
    assert body[2].unflattened_size == (32, 2, -1)


class Decoder(nn.Module):
    """An autoencoder: what its transposed convolutions make, one of them depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv2d(1, 12, 3, 2, 1)
        self.up = nn.ConvTranspose2d(12, 16, 3, 2, 1, output_padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.wide = nn.ConvTranspose2d(16, 16, 2, 2, groups=16, bias=False)
        self.grouped = nn.ConvTranspose2d(16, 8, 1, groups=2)
        self.last = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.up(F.relu(self.encode(x)))))
        return self.last(self.grouped(self.wide(x)[:, :, ::2, ::2]))


def test_what_transposed_convolutions_make_can_go() -> None:
    model, example = Decoder().eval(), torch.rand(2, 1, 8, 8)
    assert members(trace(model, example[:1])) == {"encode": ("encode",)}  # groups of channels stay
    model.grouped = nn.ConvTranspose2d(16, 8, 1)
    network = trace(model, example[:1])
    assert members(network) == {
        "encode": ("encode",), "up": ("up", "wide"), "grouped": ("grouped",),
    }  # fmt: skip
    assert network.layers.keys() == {"encode", "last"}
    kept = {"encode": [0, 3, 4], "up": [1, 2, 8, 15, 9], "grouped": [2, 7]}
    with torch.no_grad():
        for name, channels in kept.items():
            layer = model.get_submodule("norm" if name == "up" else name)
            gone = [i for i in range(len(layer.bias)) if i not in channels]
            if name != "up":
                layer.weight.movedim(int(name != "encode"), 0)[gone] = 0
            else:
                layer.weight[gone] = 0
            layer.bias[gone] = 0
    pruned = remove(model, network, example[:1], kept)
    assert pruned.up.weight.shape == (3, 5, 3, 3)
    assert (pruned.wide.in_channels, pruned.wide.out_channels, pruned.wide.groups) == (5, 5, 5)
    torch.testing.assert_close(pruned(example), model(example))


def test_a_network_may_be_all_of_transposed_convolutions() -> None:
    layers = [nn.ConvTranspose1d(6, 12, 3), nn.ReLU(), nn.ConvTranspose1d(12, 2, 3)]
    network = trace(nn.Sequential(*layers), torch.rand(1, 6, 4))
    assert (members(network), network.layers) == ({"0": ("0",)}, {})


@pytest.mark.parametrize(("amounts", "groups"), [((0, 0, 1, 2), 1), ((1, -1, 0, 0), 0)])
def test_channels_stay_where_padding_moves_them(amounts: tuple[int, ...], groups: int) -> None:
    class Padded(Small):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.pad(self.a(x), amounts).mean(1))

    assert len(trace(Padded(), torch.rand(1, 5, 4)).groups) == groups


class Shuffled(nn.Module):
    """Pixels of a larger image, added to those of one before a norm over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 2, 2)
        self.up, self.head = nn.Conv2d(12, 32, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.pixel_shuffle(self.up(F.relu(self.down(x))), 2) + x
        return self.head((x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1).sqrt())


def test_channels_behind_a_pixel_shuffle_are_those_that_they_are_added_to() -> None:
    groups = trace(Shuffled().eval(), torch.rand(1, 3, 8, 8)).groups
    assert {n: (g.members, g.width) for n, g in groups.items()} == {
        "stem": (("stem", "up"), 8), "down": (("down",), 12),
    }  # fmt: skip


class Cells(nn.Module):
    """A recurrent network whose steps are written out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(4, 12)
        self.long, self.short = nn.LSTMCell(12, 8), nn.GRUCell(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(x.shape[0], 8)
        for t in range(x.shape[1]):
            h, c = self.long(F.relu(self.a(x[:, t])), (h, c))
            h = self.short(F.relu(self.b(x[:, t])), h)
        return self.head(h)


def test_what_recurrent_cells_read_can_go() -> None:
    model, example = Cells().eval(), torch.rand(2, 3, 4)
    network = trace(model, example[:1])
    assert members(network) == {"a": ("a",), "b": ("b",)}
    kept = {"a": [1, 5, 7], "b": [0, 2]}
    for name, channels in kept.items():
        gone = [i for i in range(12) if i not in channels]
        with torch.no_grad():
            model.get_submodule(name).weight[gone] = model.get_submodule(name).bias[gone] = 0
    pruned = remove(model, network, example[:1], kept)
    assert (pruned.long.input_size, pruned.short.input_size) == (3, 2)
    torch.testing.assert_close(pruned(example), model(example))


class Halves(nn.Module):
    """Channels cut into parts of one size by slices, as gates of WaveNet or TabNet are written."""

    def __init__(self, cut: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.cut = cut
        self.stem, self.inner = nn.Conv1d(3, 24, 3, padding=1), nn.Conv1d(12, 24, 1)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cut(self.stem(x))
        x = self.inner(torch.tanh(a) * torch.sigmoid(b))
        return self.head(F.relu(x[:, 12:]).mean(2))  # one half alone


@pytest.mark.parametrize(
    ("cut", "groups"),
    [
        (lambda x: (x[:, :12], x[:, 12:]), ["stem", "inner"]),
        (lambda x: (x[:, : x.shape[1] // 2], x[:, x.size(1) // 2 :, :]), ["stem", "inner"]),
        (lambda x: (x[:, 12:24, ...], x[..., :12, :]), ["stem", "inner"]),
        (lambda x: (x[:, :12] + x[:, 2:14], x[:, -12:]), ["inner"]),
        (lambda x: (x[:, : 12 * x.shape[0]], x[:, 12:]), ["inner"]),  # hangs on the batch
    ],
    ids=["numbers", "sizes", "turned", "overlapping", "requests"],
)
def test_parts_of_one_size_that_are_cut_out_one_by_one_lose_the_same(
    cut: Any, groups: list[str]
) -> None:
    model, example = Halves(cut).eval(), torch.rand(1, 3, 6)
    network = trace(model, example)
    found = {name: (group.width, group.multiple_of) for name, group in network.groups.items()}
    assert found == dict.fromkeys(groups, (12, 1))
    kept = {name: [2, 3, 5] for name in groups}
    for name, channels in kept.items():
        gone = [i for i in range(24) if i % 12 not in channels]
        with torch.no_grad():
            model.get_submodule(name).weight[gone] = model.get_submodule(name).bias[gone] = 0
    torch.testing.assert_close(remove(model, network, example, kept)(example), model(example))


class Windows(nn.Module):
    """Cuts its steps in time, first in the batch or second."""

    def __init__(self, cut: Callable[[Tensor], Tensor], first: bool) -> None:
        super().__init__()
        self.cut, self.axis = cut, 0 if first else 1
        self.stem, self.head = nn.Linear(3, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(self.cut(x.transpose(0, self.axis)).transpose(0, self.axis).mean(1))


@pytest.mark.parametrize(
    ("cut", "first"),
    [
        (lambda x: torch.cat((x[:, :0], x), 1), True),
        (lambda x: x[:, :6], True),
        (lambda x: x[:, 3:], True),
        (lambda x: torch.cat((x, x), 1)[:, : x.shape[1]], False),
    ],
    ids=["none", "all", "half", "requests"],
)
def test_what_cuts_no_channels_is_cut_as_it_was(cut: Any, first: bool) -> None:
    model, example = Windows(cut, first).eval(), torch.rand(3, 6, 3)
    assert trace(model, example[:1]).groups.keys() <= {"stem"}
    graph = trace_graph(model, example[:1])
    assert torch.chunk not in [node.target for node in graph.graph.nodes]
    torch.testing.assert_close(graph(example), model(example))


# -- values and layers ---------------------------------------------------------------------------


def test_flattened_channels_keep_their_positions(traced: Traced) -> None:
    network = traced("plain")
    flat = network.op["flatten"]
    assert flat.kind == "reshape"
    assert flat.shape == (1, 96)
    assert flat.parts == (("c2", 96),)
    assert network.channels("flatten", {"c2": 8}) == 8 * 2 * 2
    assert network.shape("flatten", {"c2": 8}) == (1, 32)


@pytest.mark.parametrize(
    ("kind", "pool"),
    [
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("pool", lambda x: F.adaptive_avg_pool2d(x, (1, 1))),
        ("pool", nn.AvgPool2d((6, 4))),
        ("pool", lambda x: F.avg_pool2d(x, kernel_size=(6, 4))),
        ("pool", lambda x: F.avg_pool2d(x, (x.size(2), x.shape[-1]))),
        ("pool", lambda x: F.avg_pool2d(x, x.size()[2:])),
        ("pool", lambda x: F.avg_pool1d(x.flatten(2), x.shape[2] * x.shape[3])),
        ("pool", lambda x: x.mean((2, 3))),
        ("pool", lambda x: torch.mean(x, dim=[-1, -2], keepdim=True)),
        ("pool", lambda x: x.flatten(2).mean(2)),
        ("avgpool", nn.AdaptiveAvgPool2d((1, 2))),
        ("avgpool", nn.AvgPool2d(4)),
        ("avgpool", nn.AvgPool2d(6, padding=(0, 1))),
        ("avgpool", lambda x: F.avg_pool2d(x, (6, 4), divisor_override=5)),
        ("avgpool", lambda x: F.avg_pool1d(x.flatten(2), 3, 2)),
        ("avgpool", nn.AvgPool2d(4, 2, 1, ceil_mode=True)),  # nothing to round up
        ("average", nn.AvgPool2d(4, 3, ceil_mode=True)),
        ("average", nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        ("average", nn.AdaptiveAvgPool2d((4, 3))),
        ("average", lambda x: x.mean((1, 2))),
        ("average", lambda x: x.mean(3)),
        ("average", lambda x: x.mean((2, 3), dtype=torch.float32)),
        ("average", lambda x: x.flatten(2).mean(2, keepdim=True)),  # as a norm of features
        ("avgpool", lambda x: F.avg_pool2d(x, x.shape[3])),
        ("avgpool", lambda x: F.avg_pool2d(x, x.shape[2:], padding=x.shape[3] - 3)),
    ],
)
def test_an_average_is_one_of_all_positions_or_of_equal_windows_or_another(
    kind: str, pool: Callable[[Tensor], Tensor]
) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(3, 6, 1)  # as many channels as rows
            self.pool = pool if isinstance(pool, nn.Module) else None

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(pool(self.c(x)) if self.pool is None else self.pool(self.c(x)))

    network = trace(Pooled(), torch.rand(1, 3, 6, 4))
    kinds = [op.kind for op in network.ops]
    assert kinds.count(kind) == 1
    assert {"pool", "avgpool", "average"} & {*kinds} == {kind}


def test_a_window_of_two_axes_over_one_of_places_is_no_average_of_windows() -> None:
    class Unlike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.pool, self.b = nn.Conv1d(4, 8, 1), nn.AvgPool2d((1, 2)), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.pool(self.a(x)).flatten(1))

    assert trace(Unlike(), torch.rand(1, 4, 6)).op["pool"].kind == "average"


def test_concatenated_channels_follow_each_of_their_groups(traced: Traced) -> None:
    network = traced("concat")
    assert network.op["cat"].kind == "concat"
    assert network.op["cat"].parts == (("left", 24), ("right", 8), ("stem", 16))
    assert network.channels("cat", {"left": 8, "stem": 4}) == 8 + 8 + 4


def test_a_value_concatenated_with_itself_counts_twice() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(torch.cat((x, x), dim=-3))

    network = trace(Doubled(), torch.rand(1, 3, 4, 4))
    assert network.op["cat"].parts == (("a", 16),)
    assert network.op["cat"].inputs == ("a", "a")
    assert network.consumers["a"] == ("cat",)
    assert members(network) == {"a": ("a",)}


def test_channels_of_a_sequence_are_the_last_axis_even_if_it_is_as_long(traced: Traced) -> None:
    network = traced("sequence")
    assert network.op["up"].shape == (1, 32, 32)  # 32 steps, 32 channels
    assert network.shape("up", {"up": 8}) == (1, 32, 8)
    assert network.shape("gelu", {"up": 8}) == (1, 32, 8)
    assert network.layers["up"].macs == 32 * 16 * 32


def test_what_a_deployed_network_does_not_have_is_no_operation(traced: Traced) -> None:
    network = traced("quiet")
    assert [op.name for op in network.ops] == [
        "x", "a", "relu", "b", "add", "mean", "head", "output",
    ]  # fmt: skip
    assert network.op["add"].inputs == ("b", "relu")
    assert network.op["add"].kind == "add"
    assert network.consumers["relu"] == ("b", "add")


def test_functions_modules_and_methods_are_the_same_operations(traced: Traced) -> None:
    assert kinds(traced("plain")) == {
        "x": "input", "c1": "conv", "relu": "act", "c2": "conv", "relu_1": "act",
        "max_pool2d": "maxpool", "flatten": "reshape", "l1": "linear", "relu_2": "act",
        "l2": "linear", "output": "output",
    }  # fmt: skip
    assert kinds(traced("mlp"))["n"] == "norm"
    relu6 = [op for op in traced("separable").ops if op.kind == "act"]
    assert {op.detail for op in relu6} == {"relu6"}


def test_only_an_add_of_two_like_values_is_one() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.shift = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            constant = y + 1
            broadcast = constant + self.shift
            factor = torch.add(y, broadcast, alpha=2)
            return self.b(factor + y)

    network = trace(Adds(), torch.rand(1, 4))
    adds = [op.kind for op in network.ops if op.detail.startswith("add")]
    assert adds == ["other", "other", "other", "add"]


def test_a_function_with_weights_keeps_what_it_reads() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 2, 1)
            self.weight = nn.Parameter(torch.rand(6, 8, 3, 3))
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("variance", torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            x = F.batch_norm(self.a(x), self.mean, self.variance)
            return self.c(F.relu(self.b(F.conv2d(x, self.weight))))

    assert members(trace(Functional(), torch.rand(1, 3, 5, 5))) == {"b": ("b",)}


def test_a_norm_that_cannot_be_folded_is_none() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, track_running_stats=False), nn.Conv2d(8, 2, 1)
    )
    network = trace(model, torch.rand(1, 3, 4, 4))
    assert kinds(network)["_1"] == "other"
    assert members(network) == {"0": ("0",)}


def test_operations_that_nobody_reads_are_none() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.extra = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            self.extra(x)
            return self.b(x)

    network = trace(Auxiliary(), torch.rand(1, 4))
    assert set(network.layers) == {"a", "b"}


# -- requests ------------------------------------------------------------------------------------


def test_a_request_may_be_a_tuple_or_a_dict(networks: ModuleType) -> None:
    model, (left, right) = networks.make("two")
    for example in ((left, right), [left, right], {"left": left, "right": right},
                    {"right": right, "left": left}):  # fmt: skip
        network = trace(model, example)
        assert network.inputs == ("left", "right")
        assert [network.op[i].shape for i in network.inputs] == [(1, 6), (1, 4)]
        assert members(network) == {"a": ("a",), "b": ("b",)}


def test_an_argument_may_be_given_in_place_of_its_default(networks: ModuleType) -> None:
    model, (left, right) = networks.make("two")
    example = {"left": left, "right": right, "mask": torch.ones(1, 32)}
    network = trace(model, example)
    assert network.inputs == ("left", "right", "mask")
    graph = trace_graph(model, example)
    assert torch.equal(graph(**example), model(**example))


@pytest.mark.parametrize("name", GROUPS)
def test_the_graph_computes_what_the_model_computes(name: str, networks: ModuleType) -> None:
    model, example = networks.make(name)
    args = example if isinstance(example, tuple) else (example,)
    assert torch.equal(trace_graph(model, example)(*args), model(*args))


def test_an_argument_may_have_the_name_of_a_module() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, body: Tensor) -> Tensor:
            return self.head(self.body(body))

    assert trace(Named(), {"body": torch.rand(1, 4)}).inputs == ("body",)


@pytest.mark.parametrize("decide", [lambda x: x.shape[0] > 4, lambda x: max(1, len(x) // 64) > 1])
def test_what_hangs_on_how_many_requests_there_are_is_refused(decide: Any) -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x * 0 if decide(x) else x)

    with pytest.raises(Untraceable, match="how many requests are in a"):
        trace(Decides(), torch.rand(1, 4))


# -- the teacher stays as it is ------------------------------------------------------------------


@pytest.mark.parametrize("name", GROUPS)
def test_the_teacher_is_not_changed(name: str, networks: ModuleType) -> None:
    model, example = networks.make(name)
    model.train()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    state = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    trace(model, example)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_a_frozen_teacher_can_be_traced_without_gradients(
    networks: ModuleType, traced: Traced
) -> None:
    model, example = networks.make("separable")
    model.requires_grad_(False)
    with torch.no_grad():
        network = trace(model, example)
    assert network == traced("separable")


def test_the_example_is_not_changed(networks: ModuleType) -> None:
    model, example = networks.make("plain")
    before = example.clone()
    trace(model, example)
    assert torch.equal(example, before)
    assert not example.requires_grad


class Views(nn.Module):
    """Attention in the shapes that ``size`` gives, cut and joined, one by one or as a whole."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.embed, self.out, self.head = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 3)
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def split(self, x: Tensor) -> Tensor:
        sizes = x.size()[:-1] + (4, 8)  # noqa: RUF005  # as it is often written
        return (x.view(sizes) if self.whole else x.view(*sizes)).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        scores = self.split(self.q(x)) @ self.split(self.k(x)).transpose(-1, -2)
        y = (scores.softmax(-1) @ self.split(self.v(x))).permute(0, 2, 1, 3).contiguous()
        width = y.size(-1) * y.size(-2) if self.whole else 32
        sizes = y.size()[:-2] + (width,)  # noqa: RUF005
        y = y.reshape(sizes) if self.whole else y.view(*sizes)
        return self.head((x + self.out(y)).mean(1))


class Merged(nn.Module):
    """Attention whose heads lie in one axis with the requests, as bmm takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 32) for _ in range(3))
        self.out, self.head = nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            layer(x).reshape(b, t, 4, 8).transpose(1, 2).reshape(b * 4, t, 8)
            for layer in (self.q, self.k, self.v)
        )
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return self.head(self.out(y.view(b, 4, t, 8).transpose(1, 2).reshape(b, t, 32)).mean(1))


def test_heads_may_lie_in_one_axis_with_the_requests() -> None:
    model, example = Merged().eval(), torch.rand(3, 5, 6)
    network = trace(model, example[:1])
    assert members(network) == {"q": ("q", "k", "v"), "out": ("out",)}
    assert network.groups["q"].multiple_of == 8
    kept = list(range(8, 16))
    gone = [i for i in range(32) if i not in kept]
    with torch.no_grad():
        model.v.weight[gone] = model.v.bias[gone] = 0
    pruned = remove(model, network, example[:1], {"q": kept})
    torch.testing.assert_close(pruned(example), model(example))


@pytest.mark.parametrize("whole", [False, True])
def test_sizes_that_are_cut_and_joined_follow_what_is_pruned(
    whole: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model, example = Views(whole).eval(), torch.rand(1, 5, 6)
    network = trace(model, example)
    assert members(network) == {"embed": ("embed", "out"), "q": ("q", "k", "v")}
    kept = {name: torch.tensor(g.first(g.width // 2)) for name, g in network.groups.items()}
    assert remove(model, network, example, kept)(torch.rand(7, 5, 6)).shape == (7, 3)
    assert capfd.readouterr() == ("", "")


# -- refusals ------------------------------------------------------------------------------------


class Small(nn.Module):
    """A layer, and a forward pass that a test supplies."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 2), nn.BatchNorm1d(4)


class Branches(Small):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.sum() > 0:  # the line to be named
            x = -x
        return self.b(x)


class BranchesOnShape(Small):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            x = -x
        return self.b(self.a(x))


class Loops(Small):
    def forward(self, x: Tensor) -> Tensor:
        while x.sum() < 9:
            x = self.a(x)
        return self.b(x)


class Counts(Small):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.max())):
            x = self.a(x)
        return self.b(x)


class Outside(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.linear(self.a(x), self.a.weight.t()))


class Part(Small):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x[:, 0] = 0
        return self.b(x)


class View(Small):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x.unsqueeze(1).relu_()
        return self.b(x)


class Tuple(Small):
    def forward(self, x: Tensor) -> Any:
        return self.a(x), self.b(x)


class Dict(Small):
    def forward(self, x: Tensor) -> Any:
        return {"logits": self.b(self.a(x))}


class Many(Small):
    def forward(self, x: Tensor) -> Any:
        return torch.split(self.b(x), 1, 1)


class Squeezed(Small):
    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x)).sum(1).squeeze()


class Clash(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) + torch.zeros(3))


class Steps(Small):
    def forward(self, x: Tensor) -> Any:
        return self.b(sum(row for row in x))


class Stars(Small):
    def forward(self, *x: Tensor) -> Tensor:
        return self.b(x[0])


class Numpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(self.a(x).detach().numpy()))


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Scripted(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(scripted(self.a(x)))


class Random(Small):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x + torch.randn_like(x))


class Dropped(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x)))


class Remembers(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.mean.mul_(0.5).add_(x.mean(0), alpha=0.5)
        return self.b(x - self.mean)


class Weightless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Branches(), r"test_tracing\.py:\d+ \('if x.sum\(\) > 0:.*the line to be named"),
        (BranchesOnShape(), r"'if len\(x\) > 1:.*; what runs must not depend on"),
        (Loops(), r"test_tracing\.py:\d+ \('while x.sum\(\) < 9:'\)"),
        (Counts(), r"test_tracing\.py:\d+ \('for _ in range\(int\(x.max\(\)\)\):'\)"),
        (Outside(), "'a.weight' is read outside of its layer 'a': .* a parameter of its own"),
        (Part(), r"test_tracing\.py:\d+ \('x\[:, 0\] = 0'\).* item assignment"),
        (View(), "'relu_' changes in place a part or a view of 'a', which 'b' reads afterwards"),
        (Tuple(), "the model must return one tensor, but it returns tuple"),
        (Dict(), "the model must return one tensor, but it returns dict"),
        (Many(), "the model must return one tensor, but it returns no tensor"),
        (Squeezed(), r"without the axis of requests in a batch: .*say squeeze\(-1\)"),
        (Clash(), r"does not run on example_input\(\): 'add' fails: The size of tensor"),
        (Steps(), "Proxy object cannot be iterated"),
        (Stars(), r"forward must name its arguments, but has \*x"),
        (Numpy(), r"tanh.*; what passes through numpy can be neither traced nor deployed: compute"),
        (Scripted(), r"scripted(?s:.*); a function of torch.jit.script cannot be traced"),
        (Random(), "answers one request otherwise when it is asked again, .* on random numbers"),
        (Dropped(), r"when it is asked again, .*F\.dropout needs training=self\.training"),
        (Remembers(), "otherwise when it is asked again, .* on buffers that its forward changes"),
        (Weightless(), "no convolution and no linear layer: nothing to compress"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(model: nn.Module, says: str) -> None:
    with pytest.raises(Untraceable, match=says) as caught:
        trace(model, torch.rand(1, 4))
    assert isinstance(caught.value, BadInput)
    assert "While executing" not in str(caught.value)


def test_a_shared_activation_is_no_shared_layer() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 8), relu, nn.Linear(8, 8), relu, nn.Linear(8, 2))
    assert len(trace(model, torch.rand(1, 4)).layers) == 3


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ({"leftt": torch.rand(1, 6), "right": torch.rand(1, 4)}, "missing .*'left'|'leftt'"),
        ({"left": torch.rand(1, 6)}, "missing a required argument: 'right'"),
        ({"left": torch.rand(1, 6), "right": torch.rand(1, 4), "up": 1}, "argument 'up'"),
        (torch.rand(1, 6), "missing a required argument: 'right'"),
        (tuple(torch.rand(5, 1, 6)), "too many positional arguments"),
    ],
)
def test_a_request_that_does_not_fit_the_forward_is_refused(
    example: Any, says: str, networks: ModuleType
) -> None:
    model, _ = networks.make("two")
    with pytest.raises(BadInput, match=f"does not fit the model's forward: .*({says})"):
        trace(model, example)


def test_a_request_of_another_shape_names_the_layer_and_prints_nothing(
    networks: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    model, _ = networks.make("plain")
    with pytest.raises(Untraceable, match=r"'c1' fails: .*expected input"):
        trace(model, torch.rand(1, 4, 8, 8))
    assert capfd.readouterr() == ("", "")


def test_looking_for_groups_prints_nothing(
    networks: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    trace(*networks.make("fixed"))
    assert capfd.readouterr() == ("", "")


class Mixing(nn.Module):
    """An operation that mixes what it reads along the channels, between two layers."""

    def __init__(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.operation = operation
        self.c1, self.c2, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.c2(self.operation(self.c1(x))).mean((2, 3)))


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x * torch.sigmoid(x.mean(1, keepdim=True) + x.amax(1, keepdim=True)),
        lambda x: x - x.max(dim=1, keepdim=True).values.min(1, keepdim=True)[0],
        lambda x: (x - x.mean(1, True)) / (x.std(1, keepdim=True) + 0.1),
        lambda x: torch.max(x.max(2, keepdim=True)[0], x),
        nn.ChannelShuffle(2),
        lambda x: torch.einsum("nchw,whj->nchj", x, torch.ones(6, 6, 6)),
        lambda x: F.normalize(x, dim=-1),
        lambda x: torch.nan_to_num(torch.addcmul(x, x, x, value=0.5)).remainder(2.0),
    ],
    ids=["attention", "maximum", "norm", "larger", "shuffle", "graph", "length", "elements"],
)
def test_channels_that_an_operation_reads_on_average_can_go(operation: Any) -> None:
    network = trace(Mixing(operation).eval(), torch.rand(1, 3, 6, 6))
    assert {"c1", "c2"} <= network.groups.keys()


@pytest.mark.parametrize(
    "operation",
    [
        nn.Softmin(1),
        nn.Softmax2d(),
        lambda x: F.normalize(x),
        lambda x: x.gather(1, x.argsort(1)),
        lambda x: x.cumprod(1),
        lambda x: torch.fft.fft(x, dim=1).real,
        lambda x: F.avg_pool2d(x.transpose(1, 3), 3, 1, 1).transpose(1, 3),
    ],
    ids=["softmin", "softmax2d", "normalize", "sort", "cumprod", "fft", "pool"],
)
def test_channels_that_an_operation_mixes_stay(operation: Any) -> None:
    network = trace(Mixing(operation).eval(), torch.rand(1, 3, 6, 6))
    assert "c1" not in network.groups
    assert "c2" in network.groups


class Codes(nn.Module):
    """The nearest of 16 codes, or how near it is."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place
        self.encode, self.codes = nn.Linear(6, 8), nn.Linear(8, 16, bias=False)
        self.decode = nn.Embedding(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.codes(torch.relu(self.encode(x))).max(-1)
        return self.decode(found[1]) if self.place else found.values[:, None].expand(-1, 3)


@pytest.mark.parametrize(("place", "groups"), [(0, {"encode", "codes"}), (1, {"encode"})])
def test_channels_whose_places_are_read_stay(place: int, groups: set[str]) -> None:
    assert trace(Codes(place).eval(), torch.rand(1, 6)).groups.keys() == groups


# -- what hangs on the shape of a request --------------------------------------------------------


class Shapes(nn.Module):
    """What the code of many networks asks of shapes before it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)
        self.register_buffer("places", torch.arange(9.0)[None, :, None])

    def forward(self, x: Tensor, times: int = 2) -> Tensor:  # [N, 5, 8]
        _batch, steps, width = x.shape
        assert width == self.a.in_features, "another width"
        if x.ndim != 3 or steps > 6:
            raise ValueError("too long")
        for _ in range(times):
            x = x + self.b(self.a(x).view(*x.shape[:-1], -1).relu())
        x = x / math.sqrt(x.size(-1)) + self.places[:, : x.size(1)]
        x = x + torch.arange(x.size(1), dtype=x.dtype, device=x.device)[:, None]
        x = x + torch.ones(x.size(0), 1, x.size(-1), device=x.device)
        if len(x.shape) == 3 and x.size(1) % 2:
            x = F.pad(x, (0, 0, 0, 1))
        x = sum(part for part in x.split(2, 1)) + torch.stack(list(x.chunk(3, 1))).sum(0)
        rows = [x[:, i] for i in range(x.shape[1])]
        new = rows[0].size()[:-1] + (2, width // 2)  # noqa: RUF005  # as it is often written
        return self.head((rows[0] * rows[1]).view(*new).flatten(1))


def test_what_hangs_on_the_shape_of_a_request_is_what_it_is_for_the_example() -> None:
    torch.manual_seed(0)
    model, x = Shapes().eval(), torch.rand(1, 5, 8)
    graph, more = trace_graph(model, x), torch.rand(7, 5, 8)
    torch.testing.assert_close(graph(more), model(more))
    assert trace(model, x).groups.keys() == {"a"}


class Cast(Small):
    """Answers in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.b(F.relu(self.a(x)))


class Cached(Small):
    """Keeps what it makes of the shape of a request."""

    mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.zeros_like(x[:1])
        return self.b(F.relu(self.a(x + self.mask)))


@pytest.mark.parametrize("kind", [Cast, Cached])
def test_a_model_may_answer_in_another_type_and_keep_what_it_made(kind: type[Small]) -> None:
    model = kind().eval()
    assert trace(model, torch.rand(1, 4)).groups.keys() == {"a"}
    assert getattr(model, "mask", None) is None


class Guarded(Small):
    """A batch norm with a check of its own, as subclasses have them."""

    class Norm(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            self._check_input_dim(input)
            if not input.is_floating_point() or input.device != self.running_mean.device:
                raise TypeError("not what it takes")
            return super().forward(input)

    def __init__(self) -> None:
        super().__init__()
        self.norm = Guarded.Norm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).relu())


def test_a_layer_of_a_subclass_that_looks_at_its_input_is_traced() -> None:
    model, x = Guarded().eval(), torch.rand(6, 4)
    torch.testing.assert_close(trace_graph(model, x[:1])(x), model(x))


class Asserts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise AssertionError  # pytest would give a plain one words
        return self.layer(x)


def test_a_bare_assertion_is_told_with_the_shape_that_it_was_about() -> None:
    told = r"'\): AssertionError with an input of \[1, 8, 8\], of which the first axis is the batch"
    with pytest.raises(Untraceable, match=told):
        trace(Asserts().eval(), torch.rand(1, 8, 8))

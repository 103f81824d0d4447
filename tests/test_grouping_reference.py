"""Groups and surgery held against an independent reference: torch-pruning's dependency graph.

It follows gradient functions where ``flyweight.spaces`` sends labels through the traced graph. On
convolutional networks both must find the same channels, in the same tensors, and leave the same
network. Where they differ the last tests say which is right, by a third answer: the whole network
with the channels silenced.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flyweight.compressors.prune import remove
from flyweight.spaces import Group, Network
from flyweight.spaces.tracing import trace

Places = dict[tuple[str, int], frozenset[int]]  # (layer or norm, axis of its weight) -> channels

# -- networks drawn at random --------------------------------------------------------------------

CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d}
NORM: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}


def unit(dim: int, inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    """Convolution, norm, ReLU."""
    conv = CONV[dim](inputs, outputs, kernel, padding=kernel // 2, groups=groups)
    return nn.Sequential(conv, NORM[dim](outputs), nn.ReLU())


class Residual(nn.Module):
    """What a module computes, added to its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.inner(x))


class Dense(nn.Module):
    """What a module computes, beside its input (Huang et al. 2017, "DenseNet")."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.inner(x)), 1)


class Excite(nn.Module):
    """Squeeze and excitation (Hu et al. 2018) by linear layers, whatever the dimensions."""

    def __init__(self, dim: int, width: int, hidden: int) -> None:
        super().__init__()
        self.dim, self.down, self.up = dim, nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.up(torch.relu(self.down(x.flatten(2).mean(2)))))
        return x * (gate[:, :, None] if self.dim == 1 else gate[:, :, None, None])


class Ended(nn.Module):
    """A body of convolutions, a hidden layer on its flattened or averaged channels, an answer."""

    def __init__(self, body: nn.Module, features: int, flat: bool) -> None:
        super().__init__()
        self.body, self.flat = body, flat
        self.hidden, self.head = nn.Linear(features, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = x.flatten(1) if self.flat else x.flatten(2).mean(2)
        return self.head(torch.relu(self.hidden(x)))


BLOCKS: dict[str, Callable[[int, int, int], tuple[nn.Module, int]]] = {
    # (dimensions, channels, hidden channels) -> block, the channels that come out
    "plain": lambda d, c, h: (unit(d, c, h), h),
    "residual": lambda d, c, h: (Residual(nn.Sequential(unit(d, c, h), CONV[d](h, c, 1))), c),
    "inverted": lambda d, c, h: (
        Residual(nn.Sequential(unit(d, c, h, 1), unit(d, h, h, 3, h), CONV[d](h, c, 1))), c,
    ),
    "grouped": lambda d, c, h: (
        Residual(nn.Sequential(unit(d, c, h, 1), unit(d, h, h, 3, 2), CONV[d](h, c, 1))), c,
    ),
    # Its channels meet again in a convolution: what else may happen to them is in the last tests.
    "dense": lambda d, c, h: (
        nn.Sequential(
            Dense(unit(d, c, h)), Dense(unit(d, c + h, h)), unit(d, c + 2 * h, h, 1)
        ), h,
    ),
    "excite": lambda d, c, h: (Excite(d, c, h), c),
}  # fmt: skip


@st.composite
def drawn_networks(draw: Any) -> tuple[nn.Module, Tensor]:
    """A network of up to four blocks on sequences or images, in float64, and a batch of two."""
    dim, size = draw(st.sampled_from([(1, 7), (2, 4)]))
    widths = st.sampled_from([4, 6, 8])
    width = draw(widths)
    blocks: list[nn.Module] = [unit(dim, 3, width)]
    for kind in draw(st.lists(st.sampled_from(list(BLOCKS)), min_size=1, max_size=4)):
        block, width = BLOCKS[kind](dim, width, draw(widths))
        blocks.append(block)
    flat = draw(st.booleans())
    model = Ended(nn.Sequential(*blocks), width * size**dim if flat else width, flat)
    return lively(model), torch.rand((2, 3, *[size] * dim), dtype=torch.float64)


def lively(model: nn.Module) -> nn.Module:
    """``model`` in float64 with numbers of their own in every tensor: no two channels are alike."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.normal_(0.0, 0.5, generator=generator)
    return model.double().eval()


# -- the reference -------------------------------------------------------------------------------


class Reference:
    """A copy of a model, and torch-pruning's dependency graph of it."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model = copy.deepcopy(model)
        self.graph = tp.DependencyGraph().build_dependency(self.model, example, verbose=False)
        self._name = {module: name for name, module in self.model.named_modules()}

    def groups(self) -> dict[frozenset[str], Places]:
        """Per group the layers whose outputs go together; where its channels are."""
        found = {}
        for group in self.graph.get_all_groups():
            places: Places = {}
            for dep, channels in group:
                module = dep.target.module
                if module not in self._name:
                    continue  # a function
                makes = self.graph.is_out_channel_pruning_fn(dep.handler)
                places[self._name[module], 0 if makes else 1] = frozenset(channels)
            found[frozenset(n for n, axis in places if axis == 0 and self._is_layer(n))] = places
        return found

    def _is_layer(self, name: str) -> bool:
        return isinstance(self.model.get_submodule(name), nn.modules.conv._ConvNd | nn.Linear)

    def prune(self, gone: Mapping[str, Sequence[int]]) -> nn.Module:
        """The model without the output channels ``gone`` of layers, and all that hangs on them."""
        for name, channels in gone.items():
            layer = self.model.get_submodule(name)
            makes = self.graph.get_pruner_of_module(layer).prune_out_channels
            self.graph.get_pruning_group(layer, makes, list(channels)).prune()
        return self.model


def ours(network: Network) -> dict[frozenset[str], Places]:
    """What ``Reference.groups`` gives, of the groups of ``network``."""
    return {frozenset(group.members): _places(group) for group in network.groups.values()}


def _places(group: Group) -> Places:
    return {
        (slot.tensor.removesuffix(".weight"), slot.axis): frozenset(
            i for i, u in enumerate(slot.units) if u >= 0
        )
        for slot in group.slots
        if slot.tensor.endswith(".weight")
    }


def in_full(network: Network, reference: Reference) -> dict[frozenset[str], Places]:
    """``ours``, where the inputs of a grouped convolution are numbered as torch-pruning does:
    over all of its groups. A weight has an axis as long as one of them."""
    found = ours(network)
    for places in found.values():
        for name, axis in places:
            module: Any = reference.model.get_submodule(name)
            if axis == 1 and getattr(module, "groups", 1) > 1:
                size = module.weight.shape[1]
                places[name, 1] = frozenset(
                    i + g * size for i in places[name, 1] for g in range(module.groups)
                )
    return found


def gone(network: Network, kept: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The channels of each group that are not ``kept``."""
    return {
        name: sorted(set(range(network.groups[name].width)) - set(channels.tolist()))
        for name, channels in kept.items()
        if len(channels) < network.groups[name].width
    }


def drawn_channels(data: Any, network: Network) -> dict[str, Tensor]:
    """Some units of each group, at least one, as their channels."""
    kept = {}
    for name, group in network.groups.items():
        count = group.width // group.multiple_of
        units = data.draw(st.sets(st.integers(0, count - 1), min_size=1), label=name)
        kept[name] = torch.tensor([i for i, u in enumerate(group.unit) if u in units])
    return kept


def agree(model: nn.Module, example: Any, network: Network, kept: Mapping[str, Tensor]) -> None:
    """Both leave the same tensors, and answer the same."""
    student = remove(model, network, example, kept)
    reference = Reference(model, example).prune(gone(network, kept))
    state = student.state_dict()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(state[name], tensor), name
    args = example if isinstance(example, tuple) else (example,)
    with torch.no_grad():
        torch.testing.assert_close(student(*args), reference(*args), rtol=1e-12, atol=1e-12)


# -- where both agree ----------------------------------------------------------------------------

# Layers whose channels are the answer's, or are added to the request: torch-pruning has groups of
# them too, and leaves it to the caller to name them.
FIXED = {
    "plain": {"l2"}, "mlp": {"c"}, "separable": {"head"}, "concat": {"head"}, "quiet": {"head"},
    "two": {"head"}, "preactivation": {"head"}, "gate": {"head"}, "grouped": {"head"},
    "groupnorm": {"head"}, "gated": {"head"}, "sequence": {"head", "down"}, "resnet": {"head"},
    "mobilenet": {"8"}, "crepe": {"head"},
}  # fmt: skip


def named(name: str, networks: ModuleType, load: Callable[[str], ModuleType]) -> tuple[Any, Any]:
    """A small network of tests/networks.py, or one of the examples, in float64."""
    example: Any
    if name == "resnet":
        make = load("examples/fashion_mnist/resnet.py").ResNet
        model, example = make((8, 12, 16)), torch.rand(1, 1, 28, 28)
    elif name == "mobilenet":
        v2 = load("examples/imagenet/mobilenet_v2.py")
        block = v2.InvertedResidual
        model = nn.Sequential(
            v2.unit(3, 8, 3, 2), block(8, 6, 1, 1), block(6, 8, 2, 4), block(8, 8, 1, 4),
            block(8, 12, 1, 3), v2.unit(12, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, 5),
        )  # fmt: skip
        example = networks.image()
    elif name == "crepe":
        crepe = load("examples/pitch/crepe.py")
        model, example = crepe.Crepe((8, 6, 6, 8, 12, 16)), torch.rand(1, crepe.FRAME)
    else:
        model, example = networks.make(name)
    if isinstance(example, tuple):
        return lively(model), tuple(x.double() for x in example)
    return lively(model), example.double()


@pytest.mark.parametrize("name", FIXED)
def test_the_same_groups(name: str, networks: ModuleType, load: Any) -> None:
    model, example = named(name, networks, load)
    reference = Reference(model, example)
    theirs = {layers: p for layers, p in reference.groups().items() if not layers & FIXED[name]}
    assert in_full(trace(model, example), reference) == theirs


@pytest.mark.parametrize("name", FIXED)
@settings(max_examples=6)
@given(data=st.data())
def test_the_same_pruned_network(name: str, networks: ModuleType, load: Any, data: Any) -> None:
    model, example = named(name, networks, load)
    network = trace(model, example)
    agree(model, example, network, drawn_channels(data, network))


@settings(max_examples=20)  # 60 gave the same, for three times as long
@given(drawn_networks(), st.data())
def test_the_same_of_networks_drawn_at_random(drawn: tuple[nn.Module, Tensor], data: Any) -> None:
    model, example = drawn
    network, reference = trace(model, example[:1]), Reference(model, example)
    theirs = {layers: p for layers, p in reference.groups().items() if "head" not in layers}
    assert in_full(network, reference) == theirs
    agree(model, example, network, drawn_channels(data, network))


# -- where they differ: a third answer -----------------------------------------------------------


def silenced(model: nn.Module, example: Any, channels: Mapping[str, Sequence[int]]) -> Tensor:
    """The answer of the whole ``model`` when modules say 0 in ``channels`` of what they put out."""

    def silence(gone: Sequence[int]) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return output.index_fill(1, torch.tensor(gone), 0)

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(silence(gone))
        for name, gone in channels.items()
    ]
    with torch.no_grad():
        answer: Tensor = model(example)
    for handle in handles:
        handle.remove()
    return answer


def theirs(model: nn.Module, example: Any, layer: str, gone: Sequence[int]) -> Tensor | None:
    """The answer of torch-pruning's pruned network, or None where it cannot be cut or run."""
    reference = Reference(model, example)
    try:
        pruned = reference.prune({layer: gone})
        with torch.no_grad():
            return pruned(example)
    except RuntimeError:
        return None


def same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("plain", "l2"), ("gate", "head"), ("sequence", "down"), ("interleaved", "out"),
     ("fixed", "same")],
)  # fmt: skip
def test_channels_of_the_answer_and_of_the_request_stay(
    name: str, layer: str, networks: ModuleType, load: Any
) -> None:
    """torch-pruning has groups of them, and a network without one of them answers in another shape
    or does not run."""
    model, example = named(name, networks, load)
    assert trace(model, example).layers[layer].out_group is None
    with torch.no_grad():
        whole = model(example)
    answer = theirs(model, example, layer, [1])
    assert answer is None or answer.shape != whole.shape


def test_a_depthwise_convolution_that_widens(networks: ModuleType, load: Any) -> None:
    """One that makes two channels of each: torch-pruning leaves a network that does not run; here
    each pair goes with its channel."""
    model, example = named("inverted", networks, load)
    network = trace(model, example)
    group = network.groups["stem"]
    assert group.members == ("stem", "blocks.0.inner.6", "blocks.1.inner.6", "wide")
    assert theirs(model, example, "stem", [1]) is None
    assert theirs(model, example, "wide", [2, 3]) is None
    gone, wide = [1, 5, 14], [2, 3, 10, 11, 28, 29]
    kept = torch.tensor([i for i in range(16) if i not in gone])
    branches = {f"blocks.{i}.inner.7": gone for i in (0, 1)}  # the norms behind the projections
    answer = silenced(model, example, {"stem": gone, **branches, "wide": wide})
    with torch.no_grad():
        assert same(remove(model, network, example, {"stem": kept})(example), answer)


@pytest.mark.parametrize(
    ("layer", "gone", "right"),
    [
        ("c2", [0, 6, 12, 18], True),  # the same of each of the four groups that read them
        ("c2", [0, 7, 13, 18], False),  # one of each: weights meet the wrong channels
        ("c2", [0, 1, 2, 3], False),  # four of the first
        ("grouped", [0, 8, 16, 24], True),  # the same of each of the four groups
        ("grouped", [0, 9, 17, 24], True),  # one of each: right, and here not to be had
        ("grouped", [0, 1, 2, 3], False),  # four of the first: groups begin elsewhere
    ],
)
def test_a_grouped_convolution_loses_the_same_of_each_group(
    layer: str, gone: list[int], right: bool, networks: ModuleType, load: Any
) -> None:
    """torch-pruning's graph takes any channels; its pruners of the same name choose them. Here the
    group's units allow only what is right (and not all of it: what a grouped convolution makes
    could go one by one from each of its groups)."""
    model, example = named("grouped", networks, load)
    network = trace(model, example)
    truth = silenced(model, example, {layer: gone})
    assert same(theirs(model, example, layer, gone), truth) == right
    group = network.groups[layer]
    kept = torch.tensor([i for i in range(group.width) if i not in gone])
    assert group.multiple_of == 4
    if len({group.unit[i] for i in gone}) * group.multiple_of == len(gone):
        with torch.no_grad():
            assert same(remove(model, network, example, {layer: kept})(example), truth)
    else:
        with pytest.raises(ValueError, match="loses whole units of 4 channels"):
            remove(model, network, example, {layer: kept})


@pytest.mark.parametrize(
    ("gone", "right"),
    [([0, 4, 8, 12, 16, 20], True), ([0, 5, 9, 12, 19, 20], True), ([0, 1, 2, 3, 4, 5], False)],
)
def test_a_norm_in_groups_keeps_its_groups(
    gone: list[int], right: bool, networks: ModuleType, load: Any
) -> None:
    """What remains is normalised with what remains of its own group. torch-pruning's graph takes
    any channels and moves them to other groups; here the units forbid that (and more)."""
    model, example = named("groupnorm", networks, load)
    network = trace(model, example)
    kept = [i for i in range(24) if i not in gone]
    with torch.no_grad():
        made = model.c1(example).unflatten(1, (6, 4))
        out = torch.zeros(1, 24, 8, 8, dtype=torch.float64)
        for g in range(6):
            mine = [i for i in kept if i // 4 == g]
            if mine:
                values = made[:, g, [i % 4 for i in mine]]
                scale = (values.var(correction=0) + model.norm.eps).sqrt()
                out[:, mine] = (values - values.mean()) / scale
        out = out * model.norm.weight[:, None, None] + model.norm.bias[:, None, None]
        truth = model.head(
            torch.relu(out).mean((2, 3)) * torch.isin(torch.arange(24), torch.tensor(kept))
        )
    assert same(theirs(model, example, "c1", gone), truth) == right
    group = network.groups["c1"]
    if len({group.unit[i] for i in gone}) * group.multiple_of == len(gone):
        with torch.no_grad():
            pruned = remove(model, network, example, {"c1": torch.tensor(kept)})
            assert same(pruned(example), truth)
    else:
        with pytest.raises(ValueError, match="loses whole units of 6 channels"):
            remove(model, network, example, {"c1": torch.tensor(kept)})


def test_a_concatenation_that_is_flattened(networks: ModuleType) -> None:
    """torch-pruning takes its axis for another, ties what lies side by side and leaves a network
    that does not run."""
    model = lively(Ended(nn.Sequential(unit(2, 3, 4), Dense(unit(2, 4, 6))), 160, True))
    example = networks.image(size=4).double()
    network = trace(model, example)
    assert ours(network).keys() == {
        frozenset({n}) for n in ("body.0.0", "body.1.inner.0", "hidden")
    }
    assert frozenset({"body.0.0", "body.1.inner.0"}) in Reference(model, example).groups()
    assert theirs(model, example, "body.0.0", [1]) is None
    gone = {"body.0.0": [1, 2], "body.1.inner.0": [0, 4]}
    kept = {
        name: torch.tensor([i for i in range(network.groups[name].width) if i not in channels])
        for name, channels in gone.items()
    }
    # Behind the norms: they make something of a 0.
    truth = silenced(model, example, {"body.0.1": [1, 2], "body.1.inner.1": [0, 4]})
    with torch.no_grad():
        assert same(remove(model, network, example, kept)(example), truth)


def test_what_a_transposed_convolution_makes(networks: ModuleType, load: Any) -> None:
    model, example = named("fixed", networks, load)
    network, gone = trace(model, example), [1, 5]
    assert network.groups["other"].members == ("other",)
    kept = torch.tensor([i for i in range(16) if i not in gone])
    truth = silenced(model, example, {"other": gone})
    assert same(theirs(model, example, "other", gone), truth)
    with torch.no_grad():
        assert same(remove(model, network, example, {"other": kept})(example), truth)


def test_an_add_over_a_concatenation(networks: ModuleType) -> None:
    """The layer that is added has a part in each of two groups, and names neither."""
    body = nn.Sequential(unit(2, 3, 4), Dense(unit(2, 4, 4)), Residual(nn.Conv2d(8, 8, 1)))
    model = lively(Ended(body, 8, False))
    example = networks.image(size=4).double()
    network = trace(model, example)
    assert list(network.groups) == ["body.0.0", "body.1.inner.0", "hidden"]
    assert network.layers["body.2.inner"].out_group is None
    assert network.channels("body_2_inner", {"body.0.0": 3, "body.1.inner.0": 2}) == 5
    truth = silenced(model, example, {"body.0.1": [1], "body.2.inner": [1]})
    assert same(theirs(model, example, "body.0.0", [1]), truth)
    with torch.no_grad():
        pruned = remove(model, network, example, {"body.0.0": torch.tensor([0, 2, 3])})
        assert same(pruned(example), truth)


def test_heads_are_not_found_by_torch_pruning(networks: ModuleType, load: Any) -> None:
    """It would take one channel out of the middle of a head. Here they go as wholes: exact, as
    tests/test_surgery.py shows."""
    model, example = named("fused", networks, load)
    assert trace(model, example).groups["qkv"].multiple_of == 8
    assert theirs(model, example, "qkv", [0]) is None

"""What a model asks while it is traced, and what it writes in another way than others."""

import gc
import importlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.compressors.export import to_onnx
from flyweight.compressors.modules import with_modules
from flyweight.spaces import Untraceable
from flyweight.spaces.tracing import trace, trace_graph


class Probe(nn.Module):
    """A segmentation network in small: what it adds up depends on shapes alone."""

    def __init__(self, asks: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.asks = asks
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.asks(self, x):
            x = torch.relu(x)
        return self.b(x)


@pytest.mark.parametrize("asks", [lambda _, x: x.shape[2] > 4, lambda _, x: x.device.type == "cpu"])
def test_what_hangs_on_shapes_runs_on_shapes_alone(asks: Any) -> None:
    model, seen = Probe(asks).eval(), []
    model.a.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    kinds = [op.kind for op in trace(model, torch.rand(1, 3, 8, 8)).ops]
    assert "act" in kinds
    assert all(len(x) <= 2 for x in seen if x.device.type != "meta")


@pytest.mark.parametrize(
    "asks",
    [
        lambda _, x: {3: False, 4: True}[x.ndim],
        lambda _, x: torch.full((x.shape[1],), torch.finfo(x.dtype).min).max() < -1e38,
    ],
    ids=["key", "type"],
)
def test_what_hangs_on_shapes_may_be_used_where_only_the_thing_itself_is_taken(asks: Any) -> None:
    network = trace(Probe(asks).eval(), torch.rand(1, 3, 8, 8))
    assert "act" in [op.kind for op in network.ops]
    assert network.groups.keys() == {"a"}


def test_what_meta_tensors_cannot_tell_really_runs() -> None:
    model = Probe(lambda m, x: x[:, m.mask].shape[1] == 3).eval()
    assert "act" in [op.kind for op in trace(model, torch.rand(1, 3, 8, 8)).ops]


# -- what is written in another way --------------------------------------------------------------


def drop_path(x: Tensor, share: float, training: bool) -> Tensor:
    """As those of libraries: for training alone."""
    return x * torch.bernoulli(torch.full_like(x, 1 - share)) if training else x


torch.fx.wrap("drop_path")


class Patches(nn.Module):
    """A vision transformer in small, with shapes as einops writes them."""

    def __init__(self) -> None:
        super().__init__()
        layers = importlib.import_module("einops.layers.torch")
        self.cut = layers.Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4)
        self.embed, self.qkv, self.out = nn.Linear(48, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 16)), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        einops, x = importlib.import_module("einops"), self.embed(self.cut(x))
        token = einops.repeat(self.token, "1 1 d -> b 1 d", b=x.shape[0])
        x, pattern = torch.cat((token, x), 1), "b n (h d) -> b h n d"
        q, k, v = (einops.rearrange(p, pattern, h=4) for p in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(einops.rearrange(y, "b h n d -> b n (h d)"))
        return self.head(einops.reduce(x, "b n d -> b d", "mean"))


def test_einops_is_traced_to_what_it_does() -> None:
    pytest.importorskip("einops")
    model, example = Patches().eval(), torch.rand(3, 3, 8, 8)
    network = trace(model, example[:1])
    found = {name: (group.width, group.multiple_of) for name, group in network.groups.items()}
    assert found == {"embed": (16, 1), "qkv": (16, 4)}
    torch.testing.assert_close(trace_graph(model, example[:1])(example), model(example))


def test_no_model_is_kept_by_einops() -> None:
    pytest.importorskip("einops")
    graph = trace_graph(Patches().eval(), torch.rand(1, 3, 8, 8))
    layer = weakref.ref(graph.qkv)
    del graph
    gc.collect()
    assert layer() is None


def shifted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Attention over windows that are moved by one, as torchvision's Swin keeps it whole."""
    steps, width = x.shape[1] + x.shape[1] % 2, x.shape[2]
    x = F.pad(x, (0, 0, 0, steps - x.shape[1])).roll(-1, 1)
    places = x.new_zeros((steps,))
    places[-2:-1] = 1
    places[-1:] = 2
    places = places.view(steps // 2, 2)
    hidden = (places[:, None] != places[:, :, None]).float() * -100
    x = F.linear(x, weight, bias).view(-1, steps // 2, 2, 3, 4, width // 4)
    q, k, v = x.permute(3, 0, 1, 4, 2, 5)
    scores = q @ k.transpose(-2, -1) + hidden[None, :, None]
    return (scores.softmax(-1) @ v).transpose(2, 3).reshape(-1, steps, width).roll(1, 1)


torch.fx.wrap("shifted")


class Shifts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Linear(6, 16), nn.Linear(16, 48)
        self.out, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.out(shifted(x, self.qkv.weight, self.qkv.bias))
        return self.head((x + y[:, : x.shape[1]]).mean(1))


def test_functions_that_a_library_keeps_whole_are_looked_into() -> None:
    model, example = Shifts().eval(), torch.rand(3, 7, 6)
    plain = with_modules(model, example[:1])  # a layer of the projection
    network = trace(plain, example[:1])
    found = {group.members: group.multiple_of for group in network.groups.values()}
    assert found == {("embed", "out"): 1, ("qkv",): 4}
    torch.testing.assert_close(trace_graph(plain, example[:1])(example), model(example))


def kept_whole(x: Tensor) -> Tensor:
    return x * (2 if type(x) is Tensor else 3)


torch.fx.wrap("kept_whole")


class KeepsWhole(nn.Module):
    """Calls what answers otherwise in a trace; ``made`` is another in each."""

    made: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.made is None:
            self.made = torch.zeros_like(x[:1, :1])
        return self.b(kept_whole(F.relu(self.a(x))) + self.made)


def test_functions_that_cannot_be_looked_into_are_kept_whole() -> None:
    model, example = KeepsWhole().eval(), torch.rand(1, 6)
    trace(model, example)
    torch.testing.assert_close(trace_graph(model, example)(example), model(example))


def test_a_model_that_calls_nothing_kept_whole_is_traced_as_if_no_library_did() -> None:
    """It is not run for a comparison, which only what is looked into needs."""
    runs: list[int] = []

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            runs.append(1)
            return F.relu(self.a(x))

    trace_graph(Counts().eval(), torch.rand(1, 6))  # other tests of this file wrapped functions
    assert len(runs) == 1


def width_of(x: Tensor) -> int:
    return x.shape[1]


torch.fx.wrap("width_of")


def test_what_runs_may_hang_on_what_a_library_keeps_whole() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x) if width_of(x) == 16 else x

    model, example = Asks().eval(), torch.rand(1, 6)
    torch.testing.assert_close(trace_graph(model, example)(example), model(example))


class Writes(nn.Module):
    """Writes ``what`` to ``where`` of a tensor that is made from numbers."""

    def __init__(self, make: Any, write: Any) -> None:
        super().__init__()
        self.make, self.write = make, write
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)
        self.places = nn.Parameter(torch.zeros(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.write(self.make(x), self.places, x)
        return self.b(F.relu(self.a(x)) + y).mean(1)


def adds(y: Tensor, places: Tensor, _: Tensor) -> Tensor:
    y += places
    y *= 2
    return y


def sets(y: Tensor, places: Tensor, _: Tensor) -> Tensor:
    y[1:3] = places[1:3]
    return y


def copies(y: Tensor, places: Tensor, _: Tensor) -> Tensor:
    y[1:3].copy_(places[1:3])
    return y


def takes(y: Tensor, _: Tensor, x: Tensor) -> Tensor:
    y[:2] = x[:, :2, :1].sum(0)
    return y


def numbers(y: Tensor, places: Tensor, _: Tensor) -> Tensor:
    y[1:3] = 2
    return y + places


MAKES = [lambda x: x.new_zeros(5, 1), lambda _: torch.zeros(5, 1)]


@pytest.mark.parametrize("make", MAKES, ids=["new", "zeros"])
@pytest.mark.parametrize("write", [adds, numbers])
def test_what_is_made_from_numbers_may_be_written_as_a_whole_or_with_numbers(
    make: Any, write: Any
) -> None:
    model, example = Writes(make, write).eval(), torch.rand(2, 5, 6)
    nn.init.ones_(model.places)
    assert trace(model, example[:1]).groups.keys() == {"a"}
    graph = trace_graph(model, example[:1])
    for places in (model.places, graph.places):
        places.data.copy_(torch.arange(5.0)[:, None])  # as if they were trained
    for _ in range(2):
        torch.testing.assert_close(graph(example), model(example))


@pytest.mark.parametrize("make", MAKES, ids=["new", "zeros"])
@pytest.mark.parametrize("write", [sets, copies, takes])
def test_what_is_made_from_numbers_must_not_be_written_in_part_with_values(
    make: Any, write: Any
) -> None:
    with pytest.raises(Untraceable, match="changes in place a part or a view of"):
        trace(Writes(make, write).eval(), torch.rand(1, 5, 6))


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(input=x)
        y = drop_path(F.relu(input=self.b(input=x)), 0.5, self.training)
        return self.c(
            torch.cat(tensors=[drop_path(drop_path(y, 0.1, False), 0.2, False), x], dim=1)[:, :8]
        )


def safe(x: Tensor) -> Tensor:
    """Gives what it is given for small values alone."""
    return x if x.abs().max() < 50 else x / x.abs().max()


def pick(x: Tensor, y: Tensor, z: Tensor, gate: bool) -> Tensor:
    return x + y if gate else z


torch.fx.wrap("safe")
torch.fx.wrap("pick")


def test_what_gives_what_it_is_given_for_some_values_alone_stays() -> None:
    class Safe(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return safe(x) * 2

    graph = trace_graph(Safe().eval(), torch.rand(1, 3, 4, 4))
    assert any("safe" in node.name for node in graph.graph.nodes)
    loud = 100 * torch.rand(1, 3, 4, 4)
    assert torch.equal(graph(loud), Safe()(loud))


def test_idle_calls_may_read_what_another_gave_back() -> None:
    class Picks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y, z = x + 1, x * 3
            return pick(y, drop_path(y, 0.5, False), z, False) + y

    example = torch.rand(1, 3, 4, 4)
    assert torch.equal(trace_graph(Picks().eval(), example)(example), Picks()(example))


def test_what_does_nothing_in_eval_goes_and_arguments_by_name_are_read() -> None:
    torch.manual_seed(0)
    model, example = Skips().eval(), torch.rand(1, 3, 4, 4)
    graph = trace_graph(model, example)
    assert not any("drop_path" in node.name for node in graph.graph.nodes)
    assert torch.equal(graph(example), model(example))
    assert [op.kind for op in trace(model, example).ops].count("conv") == 3
    to_onnx(model, example)


# -- as large as a batch of requests -------------------------------------------------------------


class Expands(nn.Module):
    """Constants that are expanded to a batch of requests: a first token, places, a first state."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.a = nn.Embedding(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 4, 6]
        n, steps, width = x.shape
        x = x + self.places(torch.arange(steps).view(1, -1).expand(n, steps))
        x = torch.cat([torch.ones(1, 1, 6).expand(x.size(0), -1, -1), x], 1)
        return self.a(x + torch.full((1, 1, 1), 0.5).expand(n, 1, width))


def test_a_constant_may_be_expanded_to_as_many_as_are_in_a_batch() -> None:
    model, x = Expands().eval(), torch.rand(5, 4, 6)
    assert torch.equal(trace_graph(model, x[:1])(x), model(x))
    assert "expand" not in vars(torch.Tensor)  # only while it is traced

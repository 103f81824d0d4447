"""PyTorch's own transformer modules compute the same, and can be compressed, once spelled out."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flyweight.compressors import ClassificationTask, Schedule, compress, prepare
from flyweight.compressors.spelled_out import spelled_out
from flyweight.kernels import make_runtime
from flyweight.spaces import Policy, Prune, Quantize

STEPS, WIDTH = 5, 16


class Net(nn.Module):
    """Words, some attention, and a head on the mean."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.words = nn.Embedding(20, WIDTH)
        first = kind != "steps first"
        if kind.startswith("encoder"):
            layer = nn.TransformerEncoderLayer(
                WIDTH, 4, 32, batch_first=True, norm_first="pre" in kind, activation="gelu"
            )
            norm = nn.LayerNorm(WIDTH) if "pre" in kind else None
            self.body: Any = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
        elif kind == "layer":
            self.body = nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True)
        else:
            self.body = nn.MultiheadAttention(
                WIDTH, 4, batch_first=first, bias="plain" not in kind, add_zero_attn=kind == "zero"
            )
            nn.init.normal_(self.body.out_proj.weight)
        self.register_buffer("mask", torch.ones(9, 9).triu(1).bool())
        self.register_buffer("scores", torch.randn(STEPS, STEPS))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        if self.kind == "encoder padded":
            x = self.body(x, src_key_padding_mask=ids == 0)
        elif self.kind == "encoder masked":
            x = self.body(x, self.mask[: ids.size(1), : ids.size(1)])
        elif self.kind.startswith("encoder") or self.kind == "layer":
            x = self.body(x)
        elif self.kind == "masked":
            x = x + self.body(x, x, x, attn_mask=self.scores, need_weights=False)[0]
        elif self.kind == "steps first":
            y = x.transpose(0, 1)
            x = x + self.body(y, y, y)[0].transpose(0, 1)
        elif self.kind == "weights":
            y, weights = self.body(x, x, x)
            x = x + y * weights.sum(-1, keepdim=True) + weights.max(-1, keepdim=True)[0]
        else:
            y, _ = self.body(x, x, x)
            x = x + y
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def words(count: int) -> Tensor:
    found = torch.randint(1, 20, (count, STEPS), generator=torch.Generator().manual_seed(1))
    found[1::2, 3:] = 0  # padding
    return found


def task(model: nn.Module) -> ClassificationTask:
    items = [(ids, int(ids[0]) % 3) for ids in words(40)]
    return ClassificationTask(model, items, items)


KINDS = (
    "attention", "attention plain", "steps first", "masked", "weights", "layer", "encoder",
    "encoder pre", "encoder padded", "encoder masked",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_the_same_and_its_heads_and_layers_are_found(kind: str) -> None:
    model = Net(kind).eval()
    runtime = make_runtime("onnxruntime", 1)
    prepared = prepare(task(model), runtime, Schedule(1, 0.5, 16))
    x = words(8)
    with torch.no_grad():
        torch.testing.assert_close(prepared.teacher(x), model(x), rtol=1e-4, atol=1e-5)
    network = prepared.network
    heads = [g for g in network.groups.values() if g.multiple_of == WIDTH // 4]
    assert heads
    assert prepared.starts["pruned"].whole is None
    assert not any("MultiheadAttention" in type(m).__name__ for m in prepared.teacher.modules())
    policy = Policy(
        prune=Prune(width={heads[0].name: heads[0].width // 2}),
        quantize=Quantize(precision=dict.fromkeys(network.layers, "int8")),
    )
    assert compress(prepared, policy, "recalibrate").loss < 1


def test_what_would_not_be_the_same_stays() -> None:
    model = Net("zero").eval()
    assert spelled_out(model, words(1)) == (model, None)
    plain = nn.Sequential(nn.Linear(3, 3))
    assert spelled_out(plain, torch.rand(1, 3)) == (plain, None)


class Reads(Net):
    """Uses a weight of its attention's by itself."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.body.in_proj_weight.sum()  # type: ignore[no-any-return]


class Masks(Net):
    """Makes a mask of truths in its forward, whose type a trace does not know."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        hidden = (x[0] @ x[0].T > 9).logical_and(self.mask[:STEPS, :STEPS])
        return self.head((x + self.body(x, x, x, attn_mask=hidden)[0]).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Net("zero"), "it adds to its keys and values"),
        (Reads("attention"), "no attribute 'in_proj_weight'); its forward must call them"),
        (Masks("attention"), "an attention mask must be a buffer"),
    ],
)
def test_why_an_attention_stays_whole_is_told(model: nn.Module, why: str) -> None:
    prepared = prepare(task(model.eval()), make_runtime("onnxruntime", 1), Schedule(1, 0.5, 16))
    told = str(prepared.starts["pruned"].whole)
    assert "Nothing in PyTorch's 'body' can be pruned or quantized: " in told
    assert why in told


class Translator(nn.Module):
    """Words of one language, and those so far of the other, that look at them."""

    def __init__(self, whole: bool, first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.theirs, self.ours = nn.Embedding(20, WIDTH), nn.Embedding(20, WIDTH)
        self.whole, self.head = whole, nn.Linear(WIDTH, 3)
        if whole:
            self.body: Any = nn.Transformer(
                WIDTH, 4, 1, 1, 32, batch_first=True, norm_first=first, activation="gelu"
            )
        else:
            layer = nn.TransformerDecoderLayer(WIDTH, 4, 32, batch_first=True, norm_first=first)
            self.body = nn.TransformerDecoder(layer, 2, nn.LayerNorm(WIDTH) if first else None)
        mask = nn.Transformer.generate_square_subsequent_mask(STEPS)
        self.register_buffer("mask", mask)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x, y = self.theirs(source), self.ours(target)
        given = (x, y) if self.whole else (y, x)
        found = self.body(*given, tgt_mask=self.mask, memory_key_padding_mask=source == 0)
        return self.head(found[:, -1])


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_decoder_is_spelled_out_too(whole: bool, first: bool) -> None:
    model = Translator(whole, first).eval()
    words = torch.randint(1, 20, (16, 2, STEPS), generator=torch.Generator().manual_seed(0))
    words[:, 0, -1] = 0
    items = [({"source": a, "target": b}, i % 3) for i, (a, b) in enumerate(words)]
    prepared = prepare(
        ClassificationTask(model, items, items), make_runtime("onnxruntime", 1), Schedule()
    )
    layers = [layer for layer in prepared.network.layers if layer.startswith("body")]
    assert len(layers) == (16 if whole else 20)
    groups = prepared.network.groups
    assert all(
        layer.out_group for layer in prepared.network.layers.values() if layer.name != "head"
    )
    widths = {name: group.width // 2 for name, group in groups.items()}
    policy = Policy(Prune(widths), Quantize(dict.fromkeys(prepared.network.layers, "int8")))
    assert compress(prepared, policy, "full").parity.agreement == 1  # type: ignore[union-attr]


class Derived(nn.TransformerEncoderLayer):
    """Has a fast path of its own, for which it asks its attention."""


class Asks(nn.Module):
    """Reads what PyTorch's modules say of themselves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 3)
        self.first = Derived(WIDTH, 4, 32, batch_first=True)
        self.body = nn.Transformer(WIDTH, 4, 1, 1, 32, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        body, encoder = self.body, self.body.encoder
        assert body.batch_first
        assert body.nhead == encoder.layers[0].self_attn.num_heads
        x = self.first(self.words(ids) * body.d_model**0.5)
        for i in range(encoder.num_layers):
            x = encoder.layers[i](x)
        mask = body.generate_square_subsequent_mask(ids.shape[1])
        return self.head(body.decoder(x, encoder.norm(x), tgt_mask=mask).mean(1))  # type: ignore[no-any-return]


def test_what_a_model_asks_their_modules_is_answered() -> None:
    model = Asks().eval()
    prepared = prepare(task(model), make_runtime("onnxruntime", 1), Schedule(1, 0.5, 16))
    groups = prepared.network.groups
    halves = {name: group.width // 2 for name, group in groups.items()}
    attentions = ("first.self_attn.q", "body.encoder.layers.0.self_attn.q")
    assert halves.keys() >= {"first.self_attn.out", *attentions}
    assert compress(prepared, Policy(Prune(halves)), "full").parity.agreement == 1  # type: ignore[union-attr]

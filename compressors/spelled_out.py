"""PyTorch's transformer modules in the layers that they consist of, which can be compressed.

Theirs hold three projections in one parameter and choose their code by what they are given; nothing
can be traced into them.
"""

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..spaces.tracing import arguments

TOLERANCE = 1e-4  # share of the largest answer: other orders of the same sums
NAMED = 3  # modules, where many are told of
ADVICE = "its forward must call them on batches, and read none of their weights"


def spelled_out(model: nn.Module, example: Any) -> tuple[nn.Module, str | None]:
    """``model`` with its MultiheadAttention and Transformer modules spelled out, a copy; ``model``
    itself where there are none or where it would not compute the same, and why not, in words."""
    if not any(type(module) in SPELLED and _is_plain(module) for module in model.modules()):
        return model, None
    spelled = _spelled(copy.deepcopy(model)).eval()
    args, kwargs = arguments(copy.deepcopy(example))
    with torch.no_grad():
        try:
            expected, found = model(*args, **kwargs), spelled(*args, **kwargs)
            most = TOLERANCE * expected.abs().max().item() + TOLERANCE
            same = torch.allclose(found, expected, rtol=0, atol=most)
        except Exception as error:  # say, one request without a batch: theirs takes it, ours not
            return model, f"the model fails ({type(error).__name__}: {error}); {ADVICE}"
    return (spelled, None) if same else (model, f"the model answers otherwise; {ADVICE}")


def kept_whole(model: nn.Module, why: str | None) -> str | None:
    """Which modules of ``model`` are not spelled out, in words; None if all are. why: with them
    spelled out, what happens."""
    names: list[str] = []
    for name, module in model.named_modules():
        if type(module) in SPELLED and not any(name.startswith(f"{other}.") for other in names):
            names.append(name)
    if not names:
        return None
    some = ", ".join(map(repr, names[:NAMED])) + (" ..." if len(names) > NAMED else "")
    why = f"with layers in its place {why}" if why else "it adds to its keys and values"
    return f"Nothing in PyTorch's {some} can be pruned or quantized: {why}."


def _spelled(module: nn.Module) -> nn.Module:
    if type(module) in SPELLED and _is_plain(module):
        return SPELLED[type(module)](module)  # type: ignore[no-any-return]  # one of those below
    for name, child in module.named_children():
        new = _spelled(child)
        if new is not child:
            setattr(module, name, new)
    return module


def _is_plain(module: Any) -> bool:
    """Whether an attention adds nothing to its keys and values."""
    if not isinstance(module, nn.MultiheadAttention):
        return True
    return module.bias_k is None and module.bias_v is None and not module.add_zero_attn


class Spelled(nn.Module):
    """One that is spelled out, with the numbers that its user may read: d_model, num_layers ..."""

    def __init__(self, given: nn.Module) -> None:
        super().__init__()
        for name, value in vars(given).items():
            if isinstance(value, int | float) and not name.startswith("_"):
                setattr(self, name, value)


class Attention(Spelled):
    """nn.MultiheadAttention (Vaswani et al. 2017, sec. 3.2.2) with a layer for each projection."""

    batch_first: bool
    head_dim: int
    in_proj_bias = None  # so what derives from a layer of theirs does not take its fast path

    def __init__(self, given: nn.MultiheadAttention) -> None:
        super().__init__(given)
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights: Any = [getattr(given, name) for name in names]
        if given.in_proj_weight is not None:
            weights = given.in_proj_weight.chunk(3)
        bias = given.in_proj_bias
        biases = [None] * 3 if bias is None else bias.chunk(3)
        self.q, self.k, self.v = map(_linear, weights, biases)
        self.out = _linear(given.out_proj.weight, given.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # noqa: ARG002  # only says what the mask is
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention's."""
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._split(self.q(query)), self._split(self.k(key)), self._split(self.v(value))
        mask = _added(attn_mask)
        if key_padding_mask is not None:
            hidden = key_padding_mask.bool()[:, None, None, :]
            padding = torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, -torch.inf)
            mask = padding if mask is None else mask + padding
        x = F.scaled_dot_product_attention(q, k, v, mask)  # [N, heads, T, width of a head]
        x = self.out(x.transpose(1, 2).flatten(2))
        x = x if self.batch_first else x.transpose(0, 1)
        return x, self._weights(q, k, mask, average_attn_weights) if need_weights else None

    def _split(self, x: Tensor) -> Tensor:  # [N, T, heads * width] -> [N, heads, T, width]
        return x.reshape(x.shape[0], x.shape[1], -1, self.head_dim).transpose(1, 2)

    def _weights(self, q: Tensor, k: Tensor, mask: Tensor | None, average: bool) -> Tensor:
        scores: Tensor = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        weights: Tensor = (scores if mask is None else scores + mask).softmax(-1)
        return weights.mean(1) if average else weights


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    made.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return made


def _added(mask: Any) -> Any:
    """An attention mask [T, S] as what is added to scores; True hides."""
    if mask is None or _dtype(mask) != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask, -torch.inf)


def _dtype(mask: Any) -> torch.dtype:
    """The type of a mask, also while it is traced: of a buffer, or of a part of one."""
    if not isinstance(mask, fx.Proxy):
        return mask.dtype  # type: ignore[no-any-return]
    node = mask.node
    while node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]  # what is cut is a node
    tracer: Any = mask.tracer
    buffers = dict(tracer.root.named_buffers())  # reading one as an attribute would be traced
    if node.op != "get_attr" or str(node.target) not in buffers:
        raise TypeError("an attention mask must be a buffer")
    return buffers[str(node.target)].dtype  # type: ignore[no-any-return]


class EncoderLayer(Spelled):
    """nn.TransformerEncoderLayer without its fast path."""

    def __init__(self, given: nn.TransformerEncoderLayer) -> None:
        super().__init__(given)
        self.self_attn = Attention(given.self_attn)
        self.linear1, self.linear2 = given.linear1, given.linear2
        self.norm1, self.norm2 = given.norm1, given.norm2
        self.dropout, self.dropout1, self.dropout2 = given.dropout, given.dropout1, given.dropout2
        self.activation = given.activation

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,  # noqa: ARG002
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            found = self.self_attn(x, x, x, src_key_padding_mask, False, src_mask)
            return self.dropout1(found[0])  # type: ignore[no-any-return]

        def feed(x: Tensor) -> Tensor:
            x = self.activation(self.linear1(x))
            return self.dropout2(self.linear2(self.dropout(x)))  # type: ignore[no-any-return]

        if self.norm_first:  # Xiong et al. 2020, "On layer normalization in the transformer"
            src = src + attend(self.norm1(src))
            return src + feed(self.norm2(src))
        src = self.norm1(src + attend(src))
        return self.norm2(src + feed(src))  # type: ignore[no-any-return]


class Stack(Spelled):
    """Layers one after the other, and perhaps a norm."""

    def __init__(self, given: nn.TransformerEncoder | nn.TransformerDecoder) -> None:
        super().__init__(given)
        self.layers, self.norm = nn.ModuleList(map(_spelled, given.layers)), given.norm


class Encoder(Stack):
    """nn.TransformerEncoder without nested tensors."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,  # noqa: ARG002
    ) -> Tensor:
        for layer in self.layers:
            src = layer(src, mask, src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


class DecoderLayer(Spelled):
    """nn.TransformerDecoderLayer."""

    def __init__(self, given: nn.TransformerDecoderLayer) -> None:
        super().__init__(given)
        self.self_attn = Attention(given.self_attn)
        self.multihead_attn = Attention(given.multihead_attn)
        self.linear1, self.linear2 = given.linear1, given.linear2
        self.norm1, self.norm2, self.norm3 = given.norm1, given.norm2, given.norm3
        self.dropout, self.dropout1 = given.dropout, given.dropout1
        self.dropout2, self.dropout3 = given.dropout2, given.dropout3
        self.activation = given.activation

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,  # noqa: ARG002
        memory_is_causal: bool = False,  # noqa: ARG002
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            found = self.self_attn(x, x, x, tgt_key_padding_mask, False, tgt_mask)
            return self.dropout1(found[0])  # type: ignore[no-any-return]

        def look(x: Tensor) -> Tensor:
            found = self.multihead_attn(
                x, memory, memory, memory_key_padding_mask, False, memory_mask
            )
            return self.dropout2(found[0])  # type: ignore[no-any-return]

        def feed(x: Tensor) -> Tensor:
            x = self.activation(self.linear1(x))
            return self.dropout3(self.linear2(self.dropout(x)))  # type: ignore[no-any-return]

        x = tgt
        for step, norm in ((attend, self.norm1), (look, self.norm2), (feed, self.norm3)):
            x = x + step(norm(x)) if self.norm_first else norm(x + step(x))
        return x


class Decoder(Stack):
    """nn.TransformerDecoder."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,  # noqa: ARG002
        memory_is_causal: bool = False,  # noqa: ARG002
    ) -> Tensor:
        for layer in self.layers:
            tgt = layer(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
            )
        return tgt if self.norm is None else self.norm(tgt)


class Transformer(Spelled):
    """nn.Transformer: an encoder, and a decoder that looks at what it gives."""

    generate_square_subsequent_mask = staticmethod(nn.Transformer.generate_square_subsequent_mask)

    def __init__(self, given: nn.Transformer) -> None:
        super().__init__(given)
        self.encoder, self.decoder = _spelled(given.encoder), _spelled(given.decoder)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,  # noqa: ARG002
        tgt_is_causal: bool | None = None,  # noqa: ARG002
        memory_is_causal: bool = False,  # noqa: ARG002
    ) -> Tensor:
        memory = self.encoder(src, src_mask, src_key_padding_mask)
        return self.decoder(  # type: ignore[no-any-return]
            tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
        )


SPELLED: dict[type[nn.Module], Any] = {
    nn.MultiheadAttention: Attention,
    nn.TransformerEncoderLayer: EncoderLayer,
    nn.TransformerEncoder: Encoder,
    nn.TransformerDecoderLayer: DecoderLayer,
    nn.TransformerDecoder: Decoder,
    nn.Transformer: Transformer,
}

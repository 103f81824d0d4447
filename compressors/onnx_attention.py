"""What attention is in ONNX: products of activations, softmax, and both together."""

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .onnx_file import NotCovered, Operation, Writer, source_of
from .onnx_layers import apart

LOWEST = torch.finfo(torch.float32).min  # not -inf: a row that is all masked must not be NaN


def _matmul(w: Writer, node: fx.Node, _: Any) -> None:
    right: Any = w.settings(node, other=None)[0]
    w.node("MatMul", [apart(w, node), apart(w, node, right)], w.names[node])


def _einsum(w: Writer, node: fx.Node, _: Any) -> None:
    equation: Any = node.args[0]
    terms: Any = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
    names = [apart(w, node, term) for term in terms]
    w.node("Einsum", names, w.names[node], equation=equation.replace(" ", ""))


def _softmax(kind: str) -> Operation:
    def write_softmax(w: Writer, node: fx.Node, result: Tensor) -> None:
        dim = w.settings(node, dim=None, dtype=None, _stacklevel=3)[0]
        if dim is None or w.varies(node.args[0], dim):
            raise NotCovered
        w.node(kind, [w.value(node, dtype=result.dtype)], w.names[node], axis=dim)

    return write_softmax


def _attention(w: Writer, node: fx.Node, _: Any) -> None:
    """softmax(q k^T / sqrt(width) + mask) v (Vaswani et al. 2017, eq. 1)."""
    key, value, mask, dropout, causal, scale, grouped = w.settings(
        node, key=None, value=None, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
        enable_gqa=False,
    )  # fmt: skip
    q, k = w.env[source_of(node)], w.env[key]
    if dropout or grouped or w.varies(key, -2):
        raise NotCovered
    out = w.names[node]
    order = [*range(k.ndim - 2), k.ndim - 1, k.ndim - 2]
    turned = w.node("Transpose", [apart(w, node, key)], f"{out}:key", perm=order)
    x = w.node("MatMul", [apart(w, node), turned], f"{out}:product")
    scale = w.numbers(scale or 1 / math.sqrt(q.shape[-1]), torch.float32)
    x = w.node("Mul", [x, scale], f"{out}:scores")
    if causal:
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        hidden = w.constant(f"{out}:hidden", torch.zeros(seen.shape).masked_fill(~seen, LOWEST))
        x = w.node("Add", [x, hidden], f"{out}:causal")
    if mask is not None:
        x = w.node("Add", [x, _mask(w, mask, out)], f"{out}:masked")
    x = w.node("Softmax", [x], f"{out}:weights", axis=-1)
    w.node("MatMul", [x, apart(w, node, value)], out)


def _mask(w: Writer, mask: fx.Node, out: str) -> str:
    """What is added to the scores; of a mask of booleans LOWEST where it is false."""
    if w.env[mask].dtype != torch.bool:
        return w.read(mask, torch.float32)
    if mask in w.fixed:
        lowest = torch.zeros(w.env[mask].shape).masked_fill(~w.env[mask], LOWEST)
        return w.constant(f"{mask.name}:added", lowest)
    values = [w.numbers(v, torch.float32) for v in (0.0, LOWEST)]
    return w.node("Where", [w.read(mask), *values], f"{out}:mask")


ATTENTION: dict[Any, Operation] = {
    **dict.fromkeys((torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm"), _matmul),
    **dict.fromkeys((nn.Softmax, F.softmax, torch.softmax, "softmax"), _softmax("Softmax")),
    **dict.fromkeys(
        (nn.LogSoftmax, F.log_softmax, torch.log_softmax, "log_softmax"), _softmax("LogSoftmax")
    ),
    F.scaled_dot_product_attention: _attention,
    torch.einsum: _einsum,
}  # fmt: skip

"""What is in ONNX whatever has weights: layers, quantizers, norms, embeddings."""

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..spaces.operations import KINDS, TRANSPARENT, callee
from .freeze import FrozenLayer, FrozenQuantizer
from .onnx_file import NotCovered, Operation, Writer, source_of

MOVES = (  # values of one tensor, without changing them
    *TRANSPARENT, *(name for name, kind in KINDS.items() if kind == "reshape"), operator.getitem,
    "permute", torch.permute, "transpose", torch.transpose, "swapaxes", torch.swapaxes,
    "unsqueeze", torch.unsqueeze,
)  # fmt: skip
_IN_INTEGERS = (
    nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid", nn.LeakyReLU, F.leaky_relu,
    *(name for name, kind in KINDS.items() if kind == "pool"),
)  # fmt: skip


def spatial(value: Any, rank: int) -> list[int]:
    """A setting of a convolution or pool for each of ``rank`` axes."""
    return list(value) if isinstance(value, tuple | list) else [value] * rank


def _layer(w: Writer, node: fx.Node, _: Any) -> None:
    """A convolution or linear layer, frozen or not."""
    module, shell = w.owner(node), _shell(w, node)
    x = apart(w, node) if shell is module else w.value(node)
    if isinstance(shell, nn.Linear):
        _linear(w, node, module, x)
    else:
        _convolution(w, node, module, shell, x)


def _shell(w: Writer, node: fx.Node) -> Any:
    """The layer that ``node`` calls, without weights if it is frozen."""
    module = w.owner(node)
    return module.shell if isinstance(module, FrozenLayer) else module


def pads_itself(w: Writer, node: fx.Node) -> bool:
    """Whether ``node`` is a convolution that pads with zeros, and so can with more of them."""
    shell: Any = _shell(w, node)
    return isinstance(shell, nn.Conv1d | nn.Conv2d | nn.Conv3d) and shell.padding_mode == "zeros"


def _linear(w: Writer, node: fx.Node, module: Any, x: str) -> None:
    out = w.names[node]
    if len(w.shape(node)) == 2:
        parts = [_parameter(w, node, module, name) for name in _weights(module)]
        w.node("Gemm", [x, *parts], out, transB=1)
        return
    # On sequences a MatMul, whose weight runtimes want as [in, out]; its bias stays in float.
    weight = _parameter(w, node, module, "weight", transposed=True)
    if module.bias is None:
        w.node("MatMul", [x, weight], out)
    else:
        product = w.node("MatMul", [x, weight], f"{out}:product")
        w.node("Add", [product, _parameter(w, node, module, "bias")], out)


def _convolution(w: Writer, node: fx.Node, module: Any, shell: Any, x: str) -> None:
    rank = len(shell.kernel_size)
    if len(w.shape(node)) != rank + 2:
        raise NotCovered
    out = w.names[node]
    before, after = _paddings(shell, rank)
    if shell.padding_mode != "zeros":
        x = pad(w, x, [0, 0, *before], [0, 0, *after], shell.padding_mode, f"{out}:padded")
        before, after = [0] * rank, [0] * rank
    for i, zeros in enumerate(w.zeros.get(source_of(node), ())):  # from the last axis
        (after if i % 2 else before)[-1 - i // 2] += zeros
    shape = dict(
        kernel_shape=list(shell.kernel_size), strides=list(shell.stride), pads=before + after,
        dilations=list(shell.dilation), group=shell.groups,
    )  # fmt: skip
    parts = [_parameter(w, node, module, name) for name in _weights(module)]
    if shell.transposed:
        w.node("ConvTranspose", [x, *parts], out, output_padding=shell.output_padding, **shape)
    else:
        w.node("Conv", [x, *parts], out, **shape)


def _paddings(shell: Any, rank: int) -> tuple[list[int], list[int]]:
    """What a convolution pads before and after each axis."""
    if shell.padding == "same":  # of an odd number the larger half comes after
        total = [d * (k - 1) for d, k in zip(shell.dilation, shell.kernel_size, strict=True)]
        return [n // 2 for n in total], [n - n // 2 for n in total]
    both = [0] * rank if shell.padding == "valid" else list(shell.padding)
    return both, list(both)


def pad(
    w: Writer,
    x: str,
    before: list[int],
    after: list[int],
    mode: str,
    out: str,
    value: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> str:
    kind = {"zeros": "constant", "replicate": "edge", "circular": "wrap"}.get(mode, mode)
    inputs = [x, w.numbers(before + after)]
    if kind == "constant":
        inputs.append(w.numbers(value, dtype))
    return w.node("Pad", inputs, out, mode=kind)


def _weights(module: Any) -> list[str]:
    return ["weight"] if module.bias is None else ["weight", "bias"]


def _parameter(w: Writer, node: fx.Node, module: Any, name: str, transposed: bool = False) -> str:
    """Weight or bias; one in integers is dequantized by a scale for each output channel."""
    layer, tensor = str(node.target), getattr(module, name)
    if transposed:  # by a name of its own: the layer may run on sequences here, on vectors there
        value = w.constant(f"{layer}.{name}:transposed", tensor.T)
    else:
        value = w.constant(f"{layer}.{name}", tensor)
    if tensor.is_floating_point():
        return value
    names = (f"{name}_scale", f"{name}_zero")
    parts = [w.constant(f"{layer}.{part}", getattr(module, part)) for part in names]
    # One for each use of the layer: of two Gemms with one between them ONNX Runtime leaves one in
    # float. The integers are stored once.
    out = f"{w.names[node]}:{name}"
    return w.node("DequantizeLinear", [value, *parts], out, axis=int(transposed))


def _quantizer(w: Writer, node: fx.Node, _: Any) -> None:
    module: FrozenQuantizer = w.owner(node)
    name, out = str(node.target), w.names[node]
    parts = [w.constant(f"{name}.{part}", getattr(module, part)) for part in ("scale", "zero")]
    rounded = w.node("QuantizeLinear", [w.value(node), *parts], f"{out}:integers")
    w.node("DequantizeLinear", [rounded, *parts], out)
    w.quantized[out] = module


def apart(w: Writer, node: fx.Node, argument: Any = None, axis: int = 1) -> str:
    """The input of a float layer; a quantized one is dequantized by a scale for each channel, or
    for each place along another ``axis``.

    They are all the same, so the values are. But between two scalar scales ONNX Runtime takes a
    float convolution or Gemm for a forgotten one and quantizes its weights, to 8 bits and a single
    scale (its WeightBiasQuantization), and makes one in integers of a MatMul of two quantized
    values; neither is what the policy says nor what was trained.
    """
    argument = node.args[0] if argument is None else argument
    x = w.read(argument)
    module = w.quantized.get(x)
    if module is None:
        return x
    size = w.env[argument].shape[axis]
    parts = [
        w.constant(f"{x}:{part}:{axis}", getattr(module, part).expand(size))
        for part in ("scale", "zero")
    ]
    out = f"{w.names[node]}:{x}"
    while any(out in made.output for made in w.nodes):
        out += ":again"  # a product with itself
    return w.node("DequantizeLinear", [f"{x}:integers", *parts], out, axis=axis)


def passed(w: Writer, node: fx.Node, ends: bool = False) -> str:
    """The input of what only moves values. Where nothing quantizes its output (``ends`` says that
    something does, if it is not the next to read it) it is read apart:
    ONNX Runtime carries a scalar scale on to the next reader (its QDQPropagation).

    By a scale for each place along the first axis that is no channel: behind int8 convolutions,
    whose channels ONNX Runtime has last, it dequantizes (and quantizes again) what is moved there,
    and by scales of the last axis it does so number by number: 12 times as long at 56 x 56 x 64. A
    float convolution reads channels first: there a scale for each of them is the fastest.
    """
    ends = ends or any(isinstance(w.owner(user), FrozenQuantizer) for user in node.users)
    rank = len(w.shape(node))
    whole = ends or _gets_to_integers(w, node)
    return w.value(node) if whole else apart(w, node, axis=min(2, rank - 1))


def _gets_to_integers(w: Writer, node: fx.Node) -> bool:
    """Whether somebody computes with what ``node`` moves in integers where ONNX Runtime likes to,
    which takes scalar scales alone."""
    return any(callee(w.module, user) in _IN_INTEGERS for user in readers(w, node))


def readers(w: Writer, node: fx.Node, joined: bool = False) -> list[fx.Node]:
    """Who reads what ``node`` gives, as it is or moved. joined: also in a row with other values."""
    found = list(node.users)
    for user in found:  # grows
        called = callee(w.module, user)
        if called in MOVES or (joined and KINDS.get(called) == "concat"):
            found += [other for other in user.users if other not in found]
    return found


def _function(w: Writer, node: fx.Node, _: Any) -> None:
    """F.linear, with weights that are parameters of whoever calls it."""
    weight, bias = w.settings(node, weight=None, bias=None)
    if weight not in w.fixed:
        raise NotCovered
    out, x = w.names[node], apart(w, node)
    turned = w.constant(f"{weight.name}:transposed", w.env[weight].T)
    if bias is None:
        w.node("MatMul", [x, turned], out)
    else:
        w.node("Add", [w.node("MatMul", [x, turned], f"{out}:product"), w.read(bias)], out)


def _filter(w: Writer, node: fx.Node, _: Any) -> None:
    """F.conv1d and its like, with weights that are no layer's: a filter bank, a blur."""
    weight, bias, stride, padding, dilation, groups = w.settings(
        node, weight=None, bias=None, stride=1, padding=0, dilation=1, groups=1
    )
    rank = len(w.shape(node)) - 2
    if not isinstance(weight, fx.Node) or w.env[weight].ndim != rank + 2 or padding == "same":
        raise NotCovered
    both = [0] * rank if padding == "valid" else spatial(padding, rank)
    parts = [w.read(part) for part in (weight, bias) if part is not None]
    w.node(
        "Conv", [apart(w, node), *parts], w.names[node], strides=spatial(stride, rank),
        pads=both * 2, dilations=spatial(dilation, rank), group=groups,
    )  # fmt: skip


def _norm(w: Writer, node: fx.Node, _: Any) -> None:
    module, name = w.owner(node), str(node.target)
    statistics = [getattr(module, part) for part in ("running_mean", "running_var")]
    if any(tensor is None for tensor in statistics):
        raise NotCovered  # those of the request
    inputs = _affine(w, node, module.weight, module.bias, module.num_features)
    for part, tensor in zip(("mean", "var"), statistics, strict=True):
        inputs.append(w.constant(f"{name}.running_{part}", tensor))
    w.node("BatchNormalization", [w.value(node), *inputs], w.names[node], epsilon=module.eps)


def _affine(w: Writer, node: fx.Node, weight: Any, bias: Any, shape: Any) -> list[str]:
    """Names of ``weight`` and ``bias``, of a module or a function; of ones and zeros if None."""
    names = []
    for part, given, neutral in (("weight", weight, torch.ones), ("bias", bias, torch.zeros)):
        if isinstance(given, fx.Node):
            names.append(w.read(given))
        else:
            tensor = neutral(shape) if given is None else given
            names.append(w.constant(f"{node.name}:{part}", tensor))
    return names


def _layer_norm(w: Writer, node: fx.Node, _: Any) -> None:
    shape, weight, bias, eps = w.settings(
        node, normalized_shape=None, weight=None, bias=None, eps=1e-5
    )
    parts = _affine(w, node, weight, bias, shape)
    out, inputs = w.names[node], [w.value(node), *parts]
    w.node("LayerNormalization", inputs, out, axis=-len(shape), epsilon=eps)


def _instance_norm(w: Writer, node: fx.Node, _: Any) -> None:
    module, shape = w.owner(node), w.shape(node)
    if module.track_running_stats or len(shape) < 3:
        raise NotCovered
    parts = _affine(w, node, module.weight, module.bias, shape[1])
    out = w.names[node]
    w.node("InstanceNormalization", [w.value(node), *parts], out, epsilon=module.eps)


def _group_norm(w: Writer, node: fx.Node, _: Any) -> None:
    """An instance norm of the groups; ONNX's own group norm changed its meaning at opset 21."""
    groups, weight, bias, eps = w.settings(node, num_groups=None, weight=None, bias=None, eps=1e-5)
    (_, channels, *rest), out = w.shape(node), w.names[node]
    split = w.numbers([0, groups, channels // groups * math.prod(rest)])
    x = w.node("Reshape", [w.value(node), split], f"{out}:groups")
    neutral = [w.numbers([value] * groups, torch.float32) for value in (1.0, 0.0)]
    x = w.node("InstanceNormalization", [x, *neutral], f"{out}:normed", epsilon=eps)
    x = w.node("Reshape", [x, w.numbers([0, channels, *rest])], f"{out}:joined")
    column = (channels, *[1] * len(rest))
    own = [w.env[p] if isinstance(p, fx.Node) else p for p in (weight, bias)]
    own = [None if p is None else p.reshape(column) for p in own]
    scale, shift = _affine(w, node, own[0], own[1], column)
    w.node("Add", [w.node("Mul", [x, scale], f"{out}:scaled"), shift], out)


def _embedding(w: Writer, node: fx.Node, _: Any) -> None:
    module = w.owner(node)
    if module is None:
        table, *rest = w.settings(
            node, weight=None, padding_idx=None, max_norm=None, norm_type=2.0,
            scale_grad_by_freq=False, sparse=False,
        )  # fmt: skip
        weight, limited = w.read(table), rest[1]
    else:
        weight, limited = w.constant(f"{node.target}.weight", module.weight), module.max_norm
    if limited is not None:
        raise NotCovered  # it changes its weights as it runs
    w.node("Gather", [weight, w.value(node)], w.names[node])


BAGS = {"mean": "ReduceMean", "sum": "ReduceSum", "max": "ReduceMax"}


def _bag(w: Writer, node: fx.Node, _: Any) -> None:
    """What the words of each request have in common; torch.onnx makes a loop of it."""
    module = w.owner(node)
    plain = len(node.args) == 1 and not node.kwargs and len(w.shape(node)) == 2
    if not plain or module.padding_idx is not None or module.max_norm is not None:
        raise NotCovered  # bags by offsets, weights of words, words that do not count
    out, weight = w.names[node], w.constant(f"{node.target}.weight", module.weight)
    each = w.node("Gather", [weight, w.value(node)], f"{out}:each")
    w.node(BAGS[module.mode], [each, w.numbers([1])], out, keepdims=0)


def _prelu(w: Writer, node: fx.Node, _: Any) -> None:
    module = w.owner(node)
    slope: Tensor = module.weight.reshape(-1, *[1] * (len(w.shape(node)) - 2))
    w.node("PRelu", [w.value(node), w.constant(f"{node.name}:weight", slope)], w.names[node])


LAYERS: dict[Any, Operation] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, FrozenLayer), _layer),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _layer),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d), _instance_norm),
    **dict.fromkeys((nn.LayerNorm, F.layer_norm), _layer_norm),
    **dict.fromkeys((nn.Embedding, F.embedding), _embedding),
    nn.EmbeddingBag: _bag,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _filter),
    F.linear: _function,
    **dict.fromkeys((nn.GroupNorm, F.group_norm), _group_norm),
    nn.PReLU: _prelu,
    FrozenQuantizer: _quantizer,
}  # fmt: skip

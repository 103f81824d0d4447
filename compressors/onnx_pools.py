"""What pools, means, paddings and enlargements are in ONNX."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..spaces.operations import MEANS, PADS, window, zero_padding
from .freeze import FrozenAverage, FrozenQuantizer
from .onnx_file import NotCovered, Operation, Writer, source_of
from .onnx_layers import pad, pads_itself, passed, readers, spatial


def _pool(kind: str) -> Operation:
    average = kind == "AveragePool"

    def write_pool(w: Writer, node: fx.Node, result: Tensor) -> None:
        if average and _is_of_all(w, node, result):
            _write_average(w, node, result)
            return
        rank = result.ndim - 2
        size, step, padding, dilation, _, counts, rest = _pool_settings(w, node, average)
        size, step, padding, dilation = (
            spatial(setting, rank) for setting in (size, step or size, padding, dilation)
        )
        # With ceil_mode the last window may reach beyond the padding: what it lacks is padded,
        # which a maximum never sees and an average that leaves out padding does not count.
        lengths = zip(
            w.shape(node)[2:], result.shape[2:], size, step, padding, dilation, strict=True
        )
        after = [
            max(p, (n_out - 1) * s + d * (k - 1) + 1 - n - p) for n, n_out, k, s, p, d in lengths
        ]
        if after != padding and average:
            if counts and any(padding):
                raise NotCovered
            counts = False
        if rest or any(n >= k for n, k in zip(after, size, strict=True)):
            raise NotCovered
        own = {"count_include_pad": int(counts)} if average else {"dilations": dilation}
        # ONNX Runtime makes an average in integers where it can, and takes a scalar scale for it.
        x = w.value(node) if average else passed(w, node)
        w.node(
            kind, [x], w.names[node], kernel_shape=size, strides=step,
            pads=padding + after, **own,
        )  # fmt: skip

    return write_pool


def _pool_settings(w: Writer, node: fx.Node, average: bool) -> list[Any]:
    """size, step, padding, dilation, ceil_mode, count_include_pad, and what there is no word for"""
    if average:
        size, step, padding, ceil, counts, rest = w.settings(
            node, kernel_size=None, stride=None, padding=0, ceil_mode=False,
            count_include_pad=True, divisor_override=None,
        )  # fmt: skip
        return [size, step, padding, 1, ceil, counts, rest]
    size, step, padding, dilation, ceil, rest = w.settings(
        node, kernel_size=None, stride=None, padding=0, dilation=1, ceil_mode=False,
        return_indices=False,
    )  # fmt: skip
    return [size, step, padding, dilation, ceil, False, rest]


def _adaptive(kind: str) -> Operation:
    def write_adaptive(w: Writer, node: fx.Node, result: Tensor) -> None:
        sizes, rest = w.shape(node)[2:], w.settings(node, output_size=None, return_indices=False)[1]
        steps = [n // m for n, m in zip(sizes, result.shape[2:], strict=True)]
        if rest:
            raise NotCovered
        if any(n % m for n, m in zip(sizes, result.shape[2:], strict=True)):
            _uneven(w, node, result, kind)
            return
        if set(result.shape[2:]) == {1}:
            if kind == "MaxPool":
                extremes(w, node, "ReduceMax", list(range(2, result.ndim)), w.names[node], True)
            else:
                _write_average(w, node, result)
        else:
            w.node(kind, [w.value(node)], w.names[node], kernel_shape=steps, strides=steps)

    return write_adaptive


def _uneven(w: Writer, node: fx.Node, result: Tensor, kind: str) -> None:
    """An adaptive average over windows of different sizes: a product with what each sees."""
    if kind != "AveragePool" or result.ndim > 4:
        raise NotCovered
    x, out = w.value(node), w.names[node]
    for axis in range(result.ndim - 1, 1, -1):
        every = torch.eye(w.shape(node)[axis])
        windows = F.adaptive_avg_pool1d(every, result.shape[axis])  # [before, after]
        name = f"{out}:{axis}" if axis > 2 else out
        table = w.constant(
            f"{out}:windows{axis}", windows if axis == result.ndim - 1 else windows.T
        )
        x = w.node("MatMul", [x, table] if axis == result.ndim - 1 else [table, x], name)


def _is_of_all(w: Writer, node: fx.Node, result: Tensor) -> bool:
    """Whether it averages all positions, also where more requests do not make more of them."""
    before = tuple(w.shape(node))
    if any(w.varies(node.args[0], axis) for axis in range(2, len(before))):
        return False
    found = window(w.module, node, before, tuple(result.shape), w.known)
    return found is not None and found.covers(before)


def _write_average(w: Writer, node: fx.Node, result: Tensor) -> None:
    """The average of all positions of each channel: runtimes know it by this name in int8 and with
    channels in blocks, and not as a ReduceMean.

    Behind a transpose it stays one: there it is a float kernel in the blueprint, and ONNX Runtime
    would make one in integers of it, of scales that nobody has settled.
    """
    flat, out, x = result.ndim == 2, w.names[node], w.value(node)
    if any(x in made.output and made.op_type == "Transpose" for made in w.nodes):
        positions = w.numbers(list(range(2, len(w.shape(node)))))
        w.node("ReduceMean", [x, positions], out, keepdims=int(not flat))
        return
    made = w.node("GlobalAveragePool", [x], f"{out}:kept" if flat else out)
    if flat:
        w.node("Reshape", [made, w.numbers([0, -1])], out)


def extremes(
    w: Writer, node: fx.Node, kind: str, over: list[int], out: str, keep: bool, dtype: Any = None
) -> str:
    """The largest or the least values along the axes ``over`` of what ``node`` reads.

    OpenVINO 2026.4 answers wrong where an int8 layer reads what a ReduceMax or ReduceMin gave, also
    through a concatenation or a reshape; not beside a number that all values are within, nor where
    the largest is that of a window. A window is the fastest in int8, too: a convolution, the
    maximum and a linear layer took from 3 to 47% less time than with a ReduceMax, in both runtimes.
    """
    shape, rounded = w.shape(node), _is_rounded(w, node)
    floats = (dtype or w.env[source_of(node)].dtype) == torch.float32
    if kind == "ReduceMax" and floats and over and over == list(range(2, len(shape))):
        made = out if keep else f"{out}:kept"
        w.node("MaxPool", [passed(w, node, rounded)], made, kernel_shape=list(shape[2:]))
        return made if keep else w.node("Reshape", [made, w.numbers([0, -1])], out)
    inputs = [w.value(node, dtype=dtype), w.numbers(over)]
    if not floats or not rounded:
        return w.node(kind, inputs, out, keepdims=int(keep))
    made = w.node(kind, inputs, f"{out}:alone", keepdims=int(keep))
    beside = torch.finfo(torch.float32).min * (1 if kind == "ReduceMax" else -1)
    return w.node(kind.removeprefix("Reduce"), [made, w.numbers(beside, torch.float32)], out)


def _is_rounded(w: Writer, node: fx.Node) -> bool:
    """Whether what ``node`` gives is rounded next, as it is or in another shape or row."""
    return any(isinstance(w.owner(user), FrozenQuantizer) for user in readers(w, node, joined=True))


def _reduce(kind: str) -> Operation:
    def write_reduce(w: Writer, node: fx.Node, result: Tensor) -> None:
        if kind == "ReduceMean" and _is_of_all(w, node, result):
            _write_average(w, node, result)
            return
        dims, keep, _ = w.settings(node, dim=None, keepdim=False, dtype=None)
        if kind in ("ReduceMax", "ReduceMin"):
            extremes(w, node, kind, axes(w, node, dims), w.names[node], keep, result.dtype)
            return
        name = w.value(node, dtype=result.dtype)
        w.node(kind, [name, w.numbers(axes(w, node, dims))], w.names[node], keepdims=int(keep))

    return write_reduce


def axes(w: Writer, node: fx.Node, dims: Any) -> list[int]:
    """The axes ``dims`` of the first argument, none of them that of the requests."""
    found = [axis % len(w.shape(node)) for axis in spatial(dims, 1) if axis is not None]
    if not found or any(w.varies(node.args[0], axis) for axis in found):
        raise NotCovered
    return found


def _normalize(w: Writer, node: fx.Node, _: Any) -> None:
    p, dim, eps, rest = w.settings(node, p=2.0, dim=1, eps=1e-12, out=None)
    if p != 2 or rest is not None:
        raise NotCovered
    out, x = w.names[node], w.value(node)
    length = w.node("ReduceL2", [x, w.numbers(axes(w, node, dim))], f"{out}:length", keepdims=1)
    length = w.node("Max", [length, w.numbers(eps, torch.float32)], f"{out}:divisor")
    w.node("Div", [x, length], out)


def _cumsum(w: Writer, node: fx.Node, result: Tensor) -> None:
    (dim, _) = w.settings(node, dim=None, dtype=None)
    (axis,) = axes(w, node, dim)
    w.node("CumSum", [w.value(node, dtype=result.dtype), w.numbers(axis)], w.names[node])


def _pad(w: Writer, node: fx.Node, result: Tensor) -> None:
    zeros = zero_padding(w.module, node, result.ndim)
    if zeros is not None and all(pads_itself(w, user) for user in node.users):
        w.zeros[node] = zeros
        w.alias(node, w.value(node))
        return
    if w.owner(node) is None:
        amounts, mode, value = w.settings(node, pad=None, mode="constant", value=None)
    else:
        mode = MODES.get(type(w.owner(node)), "constant")
        amounts, value = w.settings(node, padding=None, value=0.0)
    before, after = [0] * result.ndim, [0] * result.ndim
    for i, amount in enumerate(amounts):  # from the last axis: before, after
        (after if i % 2 else before)[-1 - i // 2] = amount
    moved = [i for i, pair in enumerate(zip(before, after, strict=True)) if any(pair)]
    if min(amounts) < 0 or any(w.varies(node.args[0], axis) for axis in moved):
        raise NotCovered
    pad(w, w.value(node), before, after, mode, w.names[node], value or 0, result.dtype)


def _enlarge(w: Writer, node: fx.Node, result: Tensor) -> None:
    _, factor, mode, corners, recompute, smooth = w.settings(
        node,
        size=None,
        scale_factor=None,
        mode="nearest",
        align_corners=None,
        recompute_scale_factor=None,
        antialias=False,
    )
    sizes = list(zip(w.shape(node)[2:], result.shape[2:], strict=True))
    if smooth:
        raise NotCovered
    if mode == "nearest" and any(m % n for n, m in sizes):
        _repeated(w, node, result)
        return
    given = spatial(factor, len(sizes))
    if (
        factor is not None
        and not recompute
        and any(n * f != m for f, (n, m) in zip(given, sizes, strict=True))
    ):
        raise NotCovered  # a factor that the sizes do not say
    kind = {"nearest": "nearest", "linear": "linear", "bilinear": "linear", "bicubic": "cubic"}
    if mode not in kind:
        raise NotCovered
    x, out, rank = w.value(node), w.names[node], result.ndim
    if mode == "linear":  # runtimes know it of images
        x = w.node("Unsqueeze", [x, w.numbers([2])], f"{out}:image")
        sizes = [(1, 1), *sizes]
    # The number of places is the floor of a product in float32.
    scales = [
        m / n
        if int(n * float(np.float32(m / n))) == m
        else np.nextafter(np.float32(m / n), np.float32(np.inf)).item()
        for n, m in sizes
    ]
    how = "asymmetric" if mode == "nearest" else "align_corners" if corners else "half_pixel"
    own: dict[str, Any] = {"nearest_mode": "floor"} if mode == "nearest" else {}
    x = w.node(
        "Resize", [x, "", w.numbers([1.0, 1.0, *scales], torch.float32)],
        out if len(sizes) == rank - 2 else f"{out}:enlarged", mode=kind[mode],
        coordinate_transformation_mode=how, cubic_coeff_a=-0.75, **own,
    )  # fmt: skip
    if mode == "linear":
        w.node("Squeeze", [x, w.numbers([2])], out)


def _repeated(w: Writer, node: fx.Node, result: Tensor) -> None:
    """The nearest of places that are no whole multiples: which, PyTorch says."""
    x, out, shape = w.value(node), w.names[node], w.shape(node)
    moved = [axis for axis in range(2, result.ndim) if shape[axis] != result.shape[axis]]
    for axis in moved:
        line = [1] * result.ndim
        line[axis] = shape[axis]
        numbers = torch.arange(float(shape[axis])).reshape(line).expand(1, 1, *shape[2:])
        rest, kwargs = fx.node.map_arg((node.args[1:], node.kwargs), w.env.__getitem__)
        places = w.call(node, numbers, *rest, **kwargs).movedim(axis, -1).flatten(0, -2)[0]
        name = out if axis == moved[-1] else f"{out}:{axis}"
        x = w.node("Gather", [x, w.numbers(places.long().tolist())], name, axis=axis)


MODES: dict[Any, str] = {  # of paddings that are modules
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d), "reflect"),
    **dict.fromkeys((nn.ReplicationPad1d, nn.ReplicationPad2d), "replicate"),
    **dict.fromkeys((nn.CircularPad1d, nn.CircularPad2d), "circular"),
}
POOLS: dict[Any, Operation] = {
    **dict.fromkeys(
        (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d,
         torch.max_pool1d, torch.max_pool2d), _pool("MaxPool"),
    ),
    **dict.fromkeys(
        (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
        _pool("AveragePool"),
    ),
    **dict.fromkeys(
        (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, F.adaptive_avg_pool1d,
         F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
        _adaptive("AveragePool"),
    ),
    **dict.fromkeys(
        (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, F.adaptive_max_pool1d, F.adaptive_max_pool2d),
        _adaptive("MaxPool"),
    ),
    **dict.fromkeys(MEANS, _reduce("ReduceMean")),
    FrozenAverage: _write_average,
    **dict.fromkeys((torch.sum, "sum"), _reduce("ReduceSum")),
    **dict.fromkeys((torch.amax, "amax"), _reduce("ReduceMax")),
    **dict.fromkeys((torch.amin, "amin"), _reduce("ReduceMin")),
    **dict.fromkeys((torch.cumsum, "cumsum"), _cumsum),
    **dict.fromkeys((nn.Upsample, F.interpolate), _enlarge),
    **dict.fromkeys((nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), _enlarge),
    F.normalize: _normalize,
    **dict.fromkeys((F.pad, *PADS, *MODES), _pad),
}  # fmt: skip

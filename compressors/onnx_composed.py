"""What ONNX has no single word for, or PyTorch several: written as what it consists of."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .onnx_file import NotCovered, Operation, Writer
from .onnx_layers import passed
from .onnx_pools import axes, extremes

# One step: the kind of node, and its further inputs as numbers.
Step = tuple[str, tuple[float, ...]]


def _chain(*steps: Step) -> Operation:
    """Operations one behind the other, each of one tensor and of numbers."""

    def write_chain(w: Writer, node: fx.Node, result: Tensor) -> None:
        if len(node.args) > 1 or node.kwargs.keys() - {"inplace"}:
            raise NotCovered
        x, out = w.value(node, dtype=result.dtype), w.names[node]
        for i, (kind, given) in enumerate(steps):
            numbers = [w.numbers(value, result.dtype) for value in given]
            x = w.node(kind, [x, *numbers], out if i == len(steps) - 1 else f"{out}:{i}")

    return write_chain


def _square(w: Writer, node: fx.Node, result: Tensor) -> None:
    x = w.value(node, dtype=result.dtype)
    w.node("Mul", [x, x], w.names[node])


def _softplus(w: Writer, node: fx.Node, result: Tensor) -> None:
    beta, _ = w.settings(node, beta=1.0, threshold=20.0)
    if beta == 1:
        w.node("Softplus", [w.value(node)], w.names[node])
        return
    out, factor = w.names[node], w.numbers(float(beta), result.dtype)
    x = w.node("Softplus", [w.node("Mul", [w.value(node), factor], f"{out}:in")], f"{out}:out")
    w.node("Div", [x, factor], out)


def _glu(w: Writer, node: fx.Node, _: Any) -> None:
    out, (axis,) = w.names[node], axes(w, node, w.settings(node, dim=-1)[0])
    parts = [f"{out}:left", f"{out}:right"]
    size = w.shape(node)[axis] // 2
    w.several("Split", [w.value(node), w.numbers([size, size])], parts, axis=axis)
    w.node("Mul", [parts[0], w.node("Sigmoid", [parts[1]], f"{out}:gate")], out)


def _extreme(kind: str, index: str, pairwise: str) -> Operation:
    """max or min: of two tensors, or along an axis, which gives values and where they are."""

    def write_extreme(w: Writer, node: fx.Node, result: Any) -> None:
        if isinstance(result, Tensor):
            if len(node.args) != 2 or node.kwargs:
                raise NotCovered  # over everything
            names = [w.value(node, place, result.dtype) for place in (0, 1)]
            w.node(pairwise, names, w.names[node])
            return
        dim, keep = w.settings(node, dim=None, keepdim=False)
        out, (axis,) = w.names[node], axes(w, node, dim)
        x = w.value(node)
        w.parts[node] = [
            extremes(w, node, kind, [axis], f"{out}:values", keep),
            w.node(index, [x], f"{out}:indices", axis=axis, keepdims=int(keep)),
        ]

    return write_extreme


def _spread(root: bool) -> Operation:
    """The variance along axes, or its root."""

    def write_spread(w: Writer, node: fx.Node, result: Tensor) -> None:
        given = dict(node.kwargs)
        dims = given.pop("dim", node.args[1] if len(node.args) > 1 else None)
        less = given.pop("correction", given.pop("unbiased", node.args[2:3] or 1))
        keep = given.pop("keepdim", node.args[3] if len(node.args) > 3 else False)
        less = less[0] if isinstance(less, tuple) else less
        if given or len(node.args) > 4 or isinstance(dims, bool) or not isinstance(less, int):
            raise NotCovered
        x, out = w.value(node), w.names[node]
        over = axes(w, node, dims)
        where = w.numbers(over)
        count = 1
        for axis in over:
            count *= w.shape(node)[axis]
        mean = w.node("ReduceMean", [x, where], f"{out}:mean", keepdims=1)
        off = w.node("Sub", [x, mean], f"{out}:off")
        x = w.node("Mul", [off, off], f"{out}:squared")
        x = w.node("ReduceMean", [x, where], f"{out}:plain", keepdims=int(bool(keep)))
        last = out if not root else f"{out}:variance"
        x = w.node("Mul", [x, w.numbers(count / (count - int(less)), result.dtype)], last)
        if root:
            w.node("Sqrt", [x], out)

    return write_spread


def _length(w: Writer, node: fx.Node, _: Any) -> None:
    """The norm of vectors."""
    name = getattr(node.target, "__name__", node.target)
    order = "ord" if "vector" in str(name) else "p"
    p, dim, keep = w.settings(node, **{order: 2}, dim=None, keepdim=False)
    kinds = {1: "ReduceL1", 2: "ReduceL2", "fro": "ReduceL2"}
    if p not in kinds:
        raise NotCovered
    inputs = [w.value(node), w.numbers(axes(w, node, dim))]
    w.node(kinds[p], inputs, w.names[node], keepdims=int(keep))


def _rms_norm(w: Writer, node: fx.Node, result: Tensor) -> None:
    """Zhang and Sennrich 2019, "Root mean square layer normalization", eq. 4."""
    shape, weight, eps = w.settings(node, normalized_shape=None, weight=None, eps=None)
    out, x = w.names[node], w.value(node)
    where = w.numbers(list(range(result.ndim - len(shape), result.ndim)))
    square = w.node("Mul", [x, x], f"{out}:square")
    mean = w.node("ReduceMean", [square, where], f"{out}:mean", keepdims=1)
    least = torch.finfo(result.dtype).eps if eps is None else eps
    safe = w.node("Add", [mean, w.numbers(float(least), result.dtype)], f"{out}:safe")
    root = w.node("Sqrt", [safe], f"{out}:root")
    if weight is None:
        w.node("Div", [x, root], out)
        return
    x = w.node("Div", [x, root], f"{out}:normed")
    scale = (
        w.read(weight)
        if isinstance(weight, fx.Node)
        else w.constant(f"{node.target}.weight", weight)
    )
    w.node("Mul", [x, scale], out)


def _picked(w: Writer, node: fx.Node, result: Tensor) -> None:
    """What takes places of axes: run on the numbers of the places of each, it says which."""
    rank, shape = len(w.shape(node)), w.shape(node)
    name = str(getattr(node.target, "__name__", node.target))
    second = {"roll": "dims", "flip": "dims"}.get(name, "dim")
    place = 2 if name in ("roll", "repeat_interleave") else 1
    dim = node.kwargs.get(second, node.args[place] if len(node.args) > place else None)
    if name == "flip" and isinstance(dim, int):
        dim = node.args[1:]  # x.flip(2, 3)
    if any(
        source not in w.fixed
        for source in node.all_input_nodes[1:]
        if isinstance(w.env[source], Tensor)
    ):
        raise NotCovered  # places that a request says
    rest, kwargs = fx.node.map_arg(w.known((node.args[1:], node.kwargs)), w.env.__getitem__)
    x, out = passed(w, node), w.names[node]
    moved = list(dict.fromkeys(axes(w, node, dim)))
    for axis in moved:
        numbers = torch.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(rank)])
        index = w.call(node, numbers, *rest, **kwargs).flatten().tolist()
        places = w.numbers(index[0] if result.ndim < rank else index)
        x = w.node("Gather", [x, places], out if axis == moved[-1] else f"{out}:{axis}", axis=axis)


def _moved(w: Writer, node: fx.Node, result: Tensor) -> None:
    """A permutation of the axes: run on axes of different sizes, it says which."""
    distinct = torch.empty([2 + axis for axis in range(result.ndim)], device="meta")
    rest, kwargs = fx.node.map_arg((node.args[1:], node.kwargs), w.env.__getitem__)
    order = [size - 2 for size in w.call(node, distinct, *rest, **kwargs).shape]
    w.node("Transpose", [passed(w, node)], w.names[node], perm=order)


def _groups_to_front(w: Writer, node: fx.Node, result: Tensor) -> None:
    """Channel shuffle (Zhang et al. 2018, "ShuffleNet", sec. 3.1)."""
    (groups,) = w.settings(node, groups=None)
    channels, *rest = result.shape[1:]
    out = w.names[node]
    split = w.numbers([0, groups, channels // groups, *rest])
    x = w.node("Reshape", [passed(w, node), split], f"{out}:groups")
    order = [0, 2, 1, *range(3, 3 + len(rest))]
    x = w.node("Transpose", [x], f"{out}:turned", perm=order)
    w.node("Reshape", [x, w.numbers([0, channels, *rest])], out)


def _shuffle_pixels(w: Writer, node: fx.Node, _: Any) -> None:
    """Shi et al. 2016, "Real-time single image and video super-resolution", eq. 4."""
    (factor,) = w.settings(node, upscale_factor=None)
    w.node("DepthToSpace", [passed(w, node)], w.names[node], blocksize=factor, mode="CRD")


def _unshuffle_pixels(w: Writer, node: fx.Node, result: Tensor) -> None:
    (factor,) = w.settings(node, downscale_factor=None)
    channels, height, width = w.shape(node)[1:]
    out = w.names[node]
    split = w.numbers([0, channels, height // factor, factor, width // factor, factor])
    x = w.node("Reshape", [passed(w, node), split], f"{out}:blocks")
    x = w.node("Transpose", [x], f"{out}:turned", perm=[0, 1, 3, 5, 2, 4])
    w.node("Reshape", [x, w.numbers([0, *result.shape[1:]])], out)


def _filled(w: Writer, node: fx.Node, result: Tensor) -> None:
    """A tensor of one value, as large as the batch asks: new_zeros, zeros_like and their like."""
    if (result != result.flatten()[:1]).any():
        raise NotCovered
    batch = w.node("Shape", [w.inputs[0].name], f"{w.names[node]}:batch", start=0, end=1)
    parts = []
    for one, two in zip(result.shape, w.doubled[node], strict=True):
        if (one, two) not in ((one, one), (1, 2)):
            raise NotCovered
        parts.append(batch if one != two else w.numbers([one]))
    shape = w.node("Concat", parts, f"{w.names[node]}:shape", axis=0)
    value = w.numbers(result.flatten()[0].item(), result.dtype)
    w.node("Expand", [value, shape], w.names[node])


def _plain(kind: str) -> Operation:
    return _chain((kind, ()))


def _over(kind: str) -> Operation:
    """A reduction along axes that must be named."""

    def write_over(w: Writer, node: fx.Node, result: Tensor) -> None:
        dim, keep = w.settings(node, dim=None, keepdim=False)
        inputs = [w.value(node, dtype=result.dtype), w.numbers(axes(w, node, dim))]
        w.node(kind, inputs, w.names[node], keepdims=int(keep))

    return write_over


def _named(*names: str) -> Callable[[Operation], dict[Any, Operation]]:
    """An operation under the functions and methods of these names."""

    def of(operation: Operation) -> dict[Any, Operation]:
        functions = [getattr(torch, n) for n in names if hasattr(torch, n)]
        functions += [getattr(F, n) for n in names if hasattr(F, n)]
        return dict.fromkeys([*names, *functions], operation)

    return of


COMPOSED: dict[Any, Operation] = {
    **_named("sin")(_plain("Sin")),
    **_named("cos")(_plain("Cos")),
    **_named("atan", "arctan")(_plain("Atan")),
    **_named("erf")(_plain("Erf")),
    **_named("floor")(_plain("Floor")),
    **_named("ceil")(_plain("Ceil")),
    **_named("round")(_plain("Round")),
    **_named("sign")(_plain("Sign")),
    **_named("reciprocal")(_plain("Reciprocal")),
    **_named("square")(_square),
    **_named("log1p")(_chain(("Add", (1.0,)), ("Log", ()))),
    **_named("expm1")(_chain(("Exp", ()), ("Sub", (1.0,)))),
    **_named("softsign")(_plain("Softsign")),
    **_named("mish")(_plain("Mish")),
    **_named("selu")(_plain("Selu")),
    **_named("logsigmoid")(_chain(("Neg", ()), ("Softplus", ()), ("Neg", ()))),
    nn.Softsign: _plain("Softsign"),
    nn.Mish: _plain("Mish"),
    nn.SELU: _plain("Selu"),
    nn.LogSigmoid: _chain(("Neg", ()), ("Softplus", ()), ("Neg", ())),
    **dict.fromkeys((nn.Softplus, F.softplus), _softplus),
    **dict.fromkeys((nn.GLU, F.glu), _glu),
    **_named("max")(_extreme("ReduceMax", "ArgMax", "Max")),
    **_named("min")(_extreme("ReduceMin", "ArgMin", "Min")),
    **_named("logsumexp")(_over("ReduceLogSumExp")),
    **_named("var")(_spread(False)),
    **_named("std")(_spread(True)),
    **_named("norm")(_length),
    torch.linalg.vector_norm: _length,
    **dict.fromkeys((nn.RMSNorm, F.rms_norm), _rms_norm),
    **_named("narrow", "select", "index_select", "flip", "roll", "repeat_interleave")(_picked),
    **_named("movedim", "moveaxis", "swapdims")(_moved),
    **dict.fromkeys((nn.ChannelShuffle, F.channel_shuffle), _groups_to_front),
    **dict.fromkeys((nn.PixelShuffle, F.pixel_shuffle), _shuffle_pixels),
    **dict.fromkeys((nn.PixelUnshuffle, F.pixel_unshuffle), _unshuffle_pixels),
    **_named("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")(_filled),
    **_named("zeros", "ones", "full")(_filled),
}

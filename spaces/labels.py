"""Labels that travel through a traced graph beside its values: what a channel becomes, exactly.

Every output channel of a layer gets a label. What moves values (reshape, permute, chunk, cat)
moves labels by the very same call, so heads, halves of a fused projection and flattened channels
are found wherever they end up. Where an operation needs channels together (an add, the queries
and keys of a head, the input of a convolution at all its positions) their labels are tied. What an
operation reads that is unknown here stays whole. ``tracing`` holds the outcome to a really pruned
copy.
"""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from .label_rules import RULES
from .ties import FIXED, Ties, compact, core

MOVES = {
    "reshape", "reshape_as", "flatten", "unflatten", "permute", "transpose", "swapaxes", "swapdims",
    "movedim", "moveaxis", "t", "getattr", "expand", "expand_as", "repeat",
    "repeat_interleave", "squeeze", "unsqueeze", "cat", "concat", "concatenate", "stack", "unbind",
    "chunk", "split", "getitem", "narrow", "select", "flip", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "ChannelShuffle", "tile",
    "Flatten", "Unflatten", "PixelShuffle", "PixelUnshuffle",
}  # fmt: skip
# Operations over an axis along which what goes would change what stays, and where it stands.
OVER = {
    "unbind": (1, 0), "select": (1, 0), "narrow": (1, 0), "chunk": (2, 0), "split": (2, 0),
    "softmax": (1, -1), "log_softmax": (1, -1), "Softmax": (1, -1), "LogSoftmax": (1, -1),
    "cumsum": (1, 0), "roll": (2, None), "glu": (1, -1), "GLU": (1, -1), "normalize": (2, 1),
}  # fmt: skip
REDUCES = {"mean", "sum", "amax", "amin", "std", "var", "prod", "norm", "logsumexp"}
# Of channels, what these give means the same when some are gone, as what a layer norm computes.
AVERAGES = {"mean", "amax", "amin", "std", "var", "max", "min"}
EXTREMES = {"max", "min"}  # along an axis: values, and where they are
MEETS = {"matmul", "bmm", "scaled_dot_product_attention"}
# Element by element. Names here and below are in lower case, without underscores.
ELEMENTWISE = {
    "add", "iadd", "sub", "isub", "rsub", "mul", "imul", "div", "truediv", "itruediv", "pow",
    "ipow", "neg", "abs", "sign", "square", "sqrt", "rsqrt", "reciprocal", "exp", "expm1", "log",
    "log1p", "log2", "erf", "sin", "cos", "tanh", "sigmoid", "floor", "ceil", "round", "trunc",
    "clamp", "clip", "clampmin", "clampmax", "maximum", "minimum", "max", "min", "subtract",
    "multiply", "divide", "atan", "where", "maskedfill", "lerp", "addcmul", "addcdiv", "nantonum",
    "tan", "sinh", "cosh", "asin", "acos", "erfc", "exp2", "log10", "logit", "logaddexp", "atan2",
    "floordiv", "floordivide", "remainder", "fmod", "mod", "truedivide", "positive", "pos",
    "eq", "ne", "lt", "le", "gt", "ge", "logicalnot", "logicaland", "logicalor", "and", "or",
    "invert", "float", "half", "double", "bfloat16", "int", "long", "bool", "to", "type",
    "typeas", "contiguous", "clone", "detach", "identity", "relu", "relu6", "leakyrelu", "elu",
    "celu", "selu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh", "hardshrink",
    "softshrink", "tanhshrink", "softplus", "softsign", "logsigmoid", "threshold", "dropout",
    "dropout1d", "dropout2d", "dropout3d", "alphadropout", "featurealphadropout",
}  # fmt: skip
# Along the axes behind the channels: pools, enlargements, paddings.
SPATIAL = {
    *(f"{kind}pool{n}d" for kind in ("avg", "max", "adaptiveavg", "adaptivemax") for n in "123"),
    "lppool1d", "lppool2d", "upsample", "upsamplingnearest2d", "upsamplingbilinear2d",
    *(f"{kind}pad{n}d" for kind in ("zero", "constant", "reflection") for n in "123"),
    *(f"replicationpad{n}d" for n in "123"), "interpolate",
}  # fmt: skip
LARGEST = 1 << 22  # elements of a parameter used as a value; a larger one stays whole


class Labels(fx.Interpreter):
    """Runs a graph on one request and labels every value.

    of: per node its labels, shaped as its value (None where it is no tensor). makes, reads: per
    convolution and linear layer the labels of its output and input channels. slots: per axis of a
    tensor of the model its labels. attributes: per tensor used as a value the labels of its
    elements.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.ties = Ties()
        self.of: dict[fx.Node, Any] = {}
        self.makes: dict[str, Tensor] = {}
        self.reads: dict[str, Tensor] = {}
        self.slots: dict[tuple[str, int], Tensor] = {}
        self.attributes: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.of[n] = found = self._label(n, result)
        for labels in tensors_in(found):
            self.ties.grid(labels)
        return result

    def _label(self, n: fx.Node, result: Any) -> Any:
        inputs = [x for m in n.all_input_nodes for x in tensors_in(self.of[m])]
        if n.op == "placeholder":
            return nothing(result)
        if n.op == "get_attr":
            return self._attribute(str(n.target), result)
        if n.op == "output":
            return self.give_up(inputs, result)
        name = called(self.module, n)
        if n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            if rule := RULES.get(type(module)):
                for state in inputs[1:]:  # of a recurrent layer
                    self.ties.fix(state)
                return rule(self, str(n.target), module, inputs[0], result)
            if any(True for _ in module.parameters()):
                return self.give_up(inputs, result)
        if not isinstance(result, Tensor) and not list(tensors_in(nothing(result))):
            return None  # a size
        if not inputs:
            return self.give_up(inputs, result)
        return self._function(name, n, inputs, result)

    def _function(self, name: str, n: fx.Node, inputs: list[Tensor], result: Any) -> Any:
        if name in MOVES:
            return self._move(name, n, inputs, result)
        if name in EXTREMES and isinstance(result, tuple):
            if _places_are_read(n):
                self.ties.still(inputs[0], self._given(n, 1, "dim"))
            found = self._reduce(n, inputs[0], result[0])
            return [found, nothing(result[1])]
        if not isinstance(result, Tensor):
            return self.give_up(inputs, result)
        if name in ("glu", "GLU"):
            return self._halves(n, inputs[0])
        if name in REDUCES:
            return self._reduce(n, inputs[0], result)
        if name in MEETS:
            mixed = self._mixed_rows(n, inputs, result)
            return self._meet(inputs, result) if mixed is None else mixed
        if name == "einsum":
            return self._contract(n, inputs, result)
        plain = name.lower().replace("_", "")
        if name in OVER:
            self._stand_still(name, n, inputs[0])
        elif name == "pad" and isinstance(amounts := self._given(n, 1, "pad"), tuple | list):
            for i, amount in enumerate(amounts):  # of the last axis both ends, then the one before
                if amount:
                    self.ties.still(inputs[0], -1 - i // 2)
        elif plain in SPATIAL:
            for axis in range(2, inputs[0].ndim):
                self.ties.still(inputs[0], axis)
        elif plain not in ELEMENTWISE:  # who knows what it mixes
            return self.give_up(inputs, result)
        if len(inputs) == 1 and inputs[0].ndim == result.ndim:
            return self._resized(inputs[0], result)
        if _broadcast(inputs) == result.shape:
            return self._together(inputs, result.shape)
        return self.give_up(inputs, result)

    # -- channels of modules ---------------------------------------------------------------------

    def channels(self, labels: Tensor, axis: int) -> Tensor:
        """The labels along ``axis``, [size]: at all other places there must be the same."""
        size = labels.shape[axis]
        rows = core(labels).movedim(axis, 0)
        rows = rows.reshape(len(rows), -1)
        self.ties.tie(rows, rows[:, :1])
        return rows[:, 0].expand(size)

    def slot(self, name: str, module: nn.Module, attribute: str, axis: int, labels: Tensor) -> None:
        """``labels`` are those of ``axis`` of a tensor of ``module``."""
        if getattr(module, attribute, None) is None:
            return
        key = (f"{name}.{attribute}", axis)
        self.ties.tie(self.slots.setdefault(key, labels), labels)

    def give_up(self, inputs: Iterable[Tensor], result: Any) -> Any:
        """Nothing that is read here can go, nor anything that comes out."""
        for labels in inputs:
            self.ties.fix(labels)
        return nothing(result)

    def _attribute(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.ndim:
            return nothing(value)
        if value.numel() > LARGEST:
            return nothing(value)
        if name not in self.attributes:
            self.attributes[name] = self.ties.fresh(value.numel()).reshape(value.shape)
        return self.attributes[name]

    # -- functions -------------------------------------------------------------------------------

    def _given(self, n: fx.Node, place: int, name: str, default: Any = None) -> Any:
        """An argument of ``n``, by place or name; of a module its attribute."""
        if n.op == "call_module":
            return getattr(self.fetch_attr(str(n.target)), name, default)
        found = n.args[place] if place < len(n.args) else n.kwargs.get(name, default)
        return fx.node.map_arg(found, lambda m: self.env[m])

    def _stand_still(self, name: str, n: fx.Node, labels: Tensor) -> None:
        place, default = OVER[name]
        axes = self._given(n, place, "dims" if name == "roll" else "dim", default)
        every = range(labels.ndim) if axes is None else [axes] if isinstance(axes, int) else axes
        for axis in every:
            self.ties.still(labels, axis)

    def _move(self, name: str, n: fx.Node, inputs: list[Tensor], result: Any) -> Any:
        if not n.args:
            return self.give_up(inputs, result)
        if name == "getattr" and n.args[1] in ("values", "indices"):
            return self.of[n.all_input_nodes[0]][0 if n.args[1] == "values" else 1]
        source: Any = fx.node.map_arg(n.args[0], self.of.__getitem__)
        rest, kwargs = fx.node.map_arg((n.args[1:], n.kwargs), self.env.__getitem__)
        call: Any = n.target
        if n.op == "call_method":
            call = getattr(type(source), str(n.target))
        elif n.op == "call_module":
            call = self.fetch_attr(str(n.target))
        moved = call(source, *rest, **kwargs)
        whole = source if isinstance(source, Tensor) else None
        if whole is not None and name == "getitem":
            self._cut(whole, rest[0])
        elif whole is not None and name in ("chunk", "split"):
            self.ties.alike(whole, list(moved), self._given(n, 2, "dim", 0))
        elif whole is not None and name in OVER:
            self._stand_still(name, n, whole)
        if isinstance(moved, Tensor):
            return compact(moved)
        return [compact(labels) for labels in tensors_in(moved)]

    def _cut(self, labels: Tensor, index: Any) -> None:
        """Of an axis that is indexed nothing may go: the numbers would mean other places."""
        parts = index if isinstance(index, tuple) else (index,)
        taken = sum(part is not None and part is not Ellipsis for part in parts)
        axis = 0
        for part in parts:
            if part is Ellipsis:
                axis += labels.ndim - taken
            elif part is not None:
                width = part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1
                if not (isinstance(part, slice) and _takes_all(part, labels.shape[axis])):
                    for a in range(axis, axis + width):
                        self.ties.still(labels, a)
                axis += width

    def _halves(self, n: fx.Node, labels: Tensor) -> Tensor:
        first, second = labels.chunk(2, self._given(n, 1, "dim", -1))
        self.ties.tie(first, second)
        return first

    def _reduce(self, n: fx.Node, labels: Tensor, result: Tensor) -> Any:
        axes = self._given(n, 1, "dim")
        if axes is None or isinstance(axes, bool) or not isinstance(axes, int | tuple | list):
            return self.give_up([labels], result)
        axes = [axes] if isinstance(axes, int) else axes
        varied = [a for a, size in enumerate(core(labels).shape) if size > 1]
        if (
            called(self.module, n) in AVERAGES
            and varied
            and {a % labels.ndim for a in axes} == {*varied}
        ):
            return nothing(result)
        for axis in axes:
            self.ties.still(labels, axis)
            labels = labels.narrow(axis, 0, 1)
        return labels.reshape(result.shape)

    def _meet(self, inputs: list[Tensor], result: Tensor) -> Any:
        """A product of matrices: within one of a batch (a head) everything is needed together."""
        batch = result.shape[:-2]
        if any(x.ndim < 2 for x in inputs):
            return self.give_up(inputs, result)
        heads = []
        for labels in inputs:
            rows = core(labels).flatten(-2)
            self.ties.tie(rows, rows[..., :1])
            found = rows[..., 0].expand(labels.shape[:-2])
            if batch and found.ndim and found.shape[-1] not in (1, batch[-1]):
                # Several queries share one head of keys and values (grouped-query attention).
                found = found.repeat_interleave(batch[-1] // found.shape[-1], -1)
            heads.append(found)
        return self._together(heads, batch)[..., None, None].expand(result.shape)

    def _mixed_rows(self, n: fx.Node, inputs: list[Tensor], result: Tensor) -> Tensor | None:
        """The product of a matrix of which nothing can go (the edges of a graph, weights of
        places) and channels, each of which it mixes along the other axis: they keep their labels.
        None where it is something else."""
        if len(inputs) != 2 or inputs[1].ndim < 2:
            return None
        edges, channels = inputs[0], core(inputs[1])
        own = n.all_input_nodes[0].op == "get_attr"
        apart = all(size == 1 for size in channels.shape[:-1]) and channels.shape[-1] > 1
        if not apart or not (own or bool((core(edges) == FIXED).all())):
            return None
        self.ties.fix(edges)
        return channels.expand(result.shape)

    def _contract(self, n: fx.Node, inputs: list[Tensor], result: Tensor) -> Any:
        """torch.einsum of two values, as a product of matrices: the axes that both and the result
        have are those of a batch."""
        terms, _, out = str(n.args[0]).replace(" ", "").partition("->")
        parts = terms.split(",")
        plain = all(c.isalpha() for c in (*out, *"".join(parts)))
        if len(parts) != 2 or len(inputs) != 2 or not (plain and all(map(_apart, parts))):
            return self.give_up(inputs, result)
        for one, other in ((0, 1), (1, 0)):
            labels = core(inputs[one])
            varied = [c for c, size in zip(parts[one], labels.shape, strict=True) if size > 1]
            if len(varied) == 1 and varied[0] in out and varied[0] not in parts[other]:
                self.ties.fix(inputs[other])  # each channel is mixed along other axes, by itself
                line = [result.shape[i] if c == varied[0] else 1 for i, c in enumerate(out)]
                return labels.reshape(line).expand(result.shape)
        batch = [c for c in out if all(c in part for part in parts)]
        heads = []
        for labels, part in zip(inputs, parts, strict=True):
            axes = [part.index(c) for c in (*batch, *(c for c in part if c not in batch))]
            rows = core(labels)[..., None].permute(*axes, -1).flatten(len(batch))
            self.ties.tie(rows, rows[..., :1])
            heads.append(rows[..., 0].expand([labels.shape[part.index(c)] for c in batch]))
        shape = [result.shape[out.index(c)] for c in batch]
        found = self._together(heads, shape)
        line = [result.shape[i] if c in batch else 1 for i, c in enumerate(out)]
        return found.reshape(line).expand(result.shape)

    def _resized(self, labels: Tensor, result: Tensor) -> Tensor:
        """Pooling, padding, interpolation, activations: axes that keep their length keep labels."""
        for axis in range(result.ndim):
            if labels.shape[axis] != result.shape[axis]:
                self.ties.still(labels, axis)
                labels = labels.narrow(axis, 0, 1)
        return labels.expand(result.shape)

    def _together(self, inputs: list[Tensor], shape: Iterable[int]) -> Tensor:
        """Element by element, with broadcasting."""
        shape = tuple(shape)
        inputs = [x.reshape((1,) * (len(shape) - x.ndim) + x.shape) for x in inputs]
        lead = next((x for x in inputs if tuple(x.shape) == shape), None)
        if lead is None:  # an outer product
            self.give_up(inputs, None)
            return torch.tensor(FIXED).expand(shape)
        for other in inputs:
            axes = tuple(a for a, n in enumerate(shape) if other.shape[a] != n)
            if other is lead:
                continue
            if axes:
                self.ties.join(lead, other, axes)
            else:
                self.ties.tie(lead, other)
        # Those of one shape are tied. Behind a pixel shuffle channels have other labels at each of
        # its places, which not everybody who reads on can take.
        alike = [x for x in inputs if tuple(x.shape) == shape]
        return min(alike, key=lambda x: core(x).numel())


def _apart(letters: str) -> bool:
    """Whether no axis of an einsum's operand is named twice (a diagonal)."""
    return len({*letters}) == len(letters)


def _places_are_read(extremes: fx.Node) -> bool:
    """Whether anybody asks where ``extremes`` (values, places) lie, and not only what they are."""
    values = ((operator.getitem, 0), (getattr, "values"))
    return any((user.target, *user.args[1:]) not in values for user in extremes.users)


def _takes_all(part: slice, size: int) -> bool:
    """Whether ``part`` of an axis is all of it, also once it is shorter."""
    stop = size if part.stop is None else part.stop
    return part.start in (None, 0) and part.step in (None, 1) and stop >= size


def called(graph: nn.Module, node: fx.Node) -> str:
    """The name of what ``node`` calls: "relu" for a function, "ReLU" for a module."""
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))).__name__
    return str(getattr(node.target, "__name__", node.target)).rstrip("_")


def _broadcast(inputs: Iterable[Tensor]) -> tuple[int, ...] | None:
    """The shape to which ``inputs`` broadcast, None if they do not."""
    try:  # torch.broadcast_shapes would import sympy, a third of a second
        # PyTorch gives this function no types.
        return tuple(torch.broadcast_tensors(*inputs)[0].shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None


def tensors_in(labels: Any) -> Iterable[Tensor]:
    """The tensors in a value, in order."""
    if isinstance(labels, Tensor):
        yield labels
    elif isinstance(labels, tuple | list):
        for part in labels:
            yield from tensors_in(part)


def nothing(value: Any) -> Any:
    """Labels of a value of which nothing can go."""
    if isinstance(value, Tensor):
        return torch.tensor(FIXED).expand(value.shape)
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        return [nothing(part) for part in value]
    return None

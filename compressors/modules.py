"""Functions with weights, as the modules that they are: only those can be pruned and quantized.

``F.linear(x, self.weight)`` computes what a Linear does, and so does ``x @ self.weight``.
Subclasses of PyTorch's layers that have a forward of their own (LayerNorm2d, Conv2dSame,
convolutions that standardize their weights) are traced down to such functions too.
"""

import copy
import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from ..spaces import BadInput
from ..spaces.operations import shape_of
from ..spaces.tracing import arguments, trace_graph
from .plainer import make_plainer_

TOLERANCE = 1e-4  # share of the largest answer: other orders of the same sums
FIXED = "fixed"  # attribute of a module: which of its tensors no student trains
SEVERAL = 3  # requests in the batch that a rewritten network is compared on, beside the example

Made = TypeVar("Made", bound=nn.Module)
Given = dict[str, Any]  # the arguments of a call by name, weights as tensors
# (the arguments, the shape of what is read) -> a module that computes it; None where there is none
Maker = Callable[[Given, tuple[int, ...]], nn.Module | None]


def with_modules(model: nn.Module, example: Any) -> nn.Module:
    """``model`` as the graph of its operations, in which functions with weights are modules and
    modules plain; ``model`` itself where there are none or where it would not compute the same.

    model: in eval mode; stays as it is.
    """
    try:
        graph = trace_graph(model, example)
    except BadInput:  # whoever traces it next says so
        return model
    if not any(p.requires_grad for p in graph.parameters()):
        graph.requires_grad_()  # frozen as a whole, as some do with a model that is only run
    made: dict[Any, str] = {}
    try:
        plainer = make_plainer_(graph)
        for node in list(graph.graph.nodes):
            _replace(graph, node, made)
        graph.graph.eliminate_dead_code()
        graph.delete_all_unused_submodules()
        graph.recompile()
        return graph.eval() if (made or plainer) and _is_same(graph, model, example) else model
    except Exception:  # the model as it was can be prepared, whatever went wrong here
        return model


def _is_same(graph: nn.Module, model: nn.Module, example: Any) -> bool:
    """Whether ``graph`` answers as ``model`` does: to the example, and to several other requests at
    once, where the model takes such and answers with numbers."""
    if not _are_close(_answer(graph, example), _answer(model, example)):
        return False
    several = _several(example)
    try:
        expected = _answer(model, several)
    except Exception:  # it is for one request, or for those alone that make sense
        return True
    return not expected.isfinite().all() or _are_close(_answer(graph, several), expected)


def _are_close(found: Tensor, expected: Tensor) -> bool:
    most = TOLERANCE * expected.abs().max().item()
    return torch.allclose(found, expected, rtol=0, atol=most)


def _answer(module: nn.Module, request: Any) -> Any:
    args, kwargs = arguments(copy.deepcopy(request))  # the model may change them in place
    with torch.no_grad():
        return module(*args, **kwargs)


def _several(example: Any) -> Any:
    """A batch of SEVERAL requests with the values of ``example`` in other orders: they are as
    large, and words remain words. What is true or false stays in place: it may be a mask."""
    generator = torch.Generator().manual_seed(0)

    def shuffled(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if value.dtype == torch.bool:
            return torch.cat([value] * SEVERAL)
        orders = [torch.randperm(value.numel(), generator=generator) for _ in range(SEVERAL)]
        return torch.cat([value.flatten()[order].view_as(value) for order in orders])

    return fx.node.map_aggregate(example, shuffled)


def _replace(graph: fx.GraphModule, node: fx.Node, made: dict[Any, str]) -> None:
    """Makes ``node`` the call of a module, if it is a function with weights. made: the modules so
    far, by what they compute: a function that is called twice is one layer that runs twice."""
    name = str(getattr(node.target, "__name__", node.target))
    if node.op not in ("call_function", "call_method") or name not in MAKERS:
        return
    names, source_name, maker = MAKERS[name]
    if len(node.args) > len(names):
        return
    given: Given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    given = {_KEYWORDS.get(k, k): _size(v) for k, v in given.items()}
    source = given.pop(source_name, None)
    held = {k: v for k, v in given.items() if isinstance(v, fx.Node)}
    if not isinstance(source, fx.Node) or _is_constant(source) or not shape_of(source):
        return
    nested = [v for v in given.values() if isinstance(v, list | tuple)]  # sizes among its settings
    if any(isinstance(n, fx.Node) for v in nested for n in v):
        return
    if not all(map(_is_constant, held.values())):
        return
    key = name, len(shape_of(source)), *((k, _identity(v)) for k, v in sorted(given.items()))
    if key not in made:
        weights = {k: _constant(graph, v) for k, v in held.items()}
        if not all(isinstance(v, Tensor) and v.is_floating_point() for v in weights.values()):
            return
        if name in NEED_WEIGHT and "weight" not in weights:
            return
        module = maker(given | weights, shape_of(source))
        if module is None:
            return
        fixed = {k for k, v in held.items() if not _is_trained(graph, v)}
        setattr(module, FIXED, frozenset(fixed))
        made[key] = _name(graph, node, held, type(module).__name__)
        graph.add_submodule(made[key], module.eval())
    with graph.graph.inserting_before(node):
        call = graph.graph.call_module(made[key], (source,))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.graph.erase_node(node)


def _size(value: Any) -> Any:
    """The number that ``value`` is, if it is an axis of a shape but that of the batch."""
    if not isinstance(value, fx.Node) or len(value.args) != 2 or not isinstance(value.args[1], int):
        return value
    shape: Any = ()
    source, axis = value.args
    if value.target == "size":
        shape = shape_of(source)  # type: ignore[arg-type]
    elif value.target is operator.getitem and isinstance(source, fx.Node):
        read = source.target == "size" or source.args[1:] == ("shape",)
        shape = shape_of(source.all_input_nodes[0]) if read else ()
    return shape[axis] if shape and axis % len(shape) else value  # type: ignore[operator]


def _identity(value: Any) -> Any:
    """By which two arguments are known to be the same."""
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "get_attr" else value
    return repr(value)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """``node`` and what it is worked out from."""
    found, ahead = set(), [node]
    while ahead:
        now = ahead.pop()
        if now not in found:
            found.add(now)
            ahead += now.all_input_nodes
    return found


def _is_constant(node: fx.Node) -> bool:
    """Whether ``node`` is the same for every request: a weight, or worked out from weights."""
    return all(n.op != "placeholder" for n in _ancestors(node))


def _is_trained(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` is worked out from a weight that is trained: a buffer is none."""
    sources = (n for n in _ancestors(node) if n.op in ("get_attr", "call_module"))
    for found in (operator.attrgetter(str(n.target))(graph) for n in sources):
        held = found.parameters() if isinstance(found, nn.Module) else [found]
        if any(value.requires_grad for value in held):
            return True
    return False


def _constant(graph: fx.GraphModule, node: fx.Node) -> Any:
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(graph)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _constant(graph, n))
    call: Any = node.target
    if node.op == "call_module":
        call = graph.get_submodule(str(node.target))
    elif node.op == "call_method":
        call, args = getattr(args[0], str(node.target)), args[1:]
    with torch.no_grad():
        return call(*args, **kwargs)


def _name(graph: fx.GraphModule, node: fx.Node, held: Mapping[str, fx.Node], kind: str) -> str:
    """Of a new module: that of the module whose weights it takes, if it takes all that is there, as
    a layer with a forward of its own does; else of its weight. held: what it takes."""
    ours = {n for value in held.values() for n in _ancestors(value)}
    weights = _ancestors(held["weight"]) if "weight" in held else ours
    known = min((str(n.target) for n in weights if n.op == "get_attr"), default=node.name)
    owner, _, attribute = known.rpartition(".")
    read = ("get_attr", "call_module")
    others = {str(n.target) for n in graph.graph.nodes if n.op in read and n not in ours}
    alone = not any(f"{name}.".startswith(f"{owner}.") for name in others)
    if owner and attribute == "weight" and alone:
        return owner
    taken = {name for name, _ in (*graph.named_modules(), *graph.named_parameters())}
    taken |= {name for name, _ in graph.named_buffers()}
    name = f"{known}_{kind.lower()}"
    numbered = (f"{name}_{i}" for i in itertools.count(2))
    return next(n for n in itertools.chain([name], numbered) if n not in taken)


def _filled(module: Made, given: Given, names: tuple[str, ...] = ("weight", "bias")) -> Made:
    """``module`` with the tensors of ``given``."""
    for name in names:
        value = given.get(name)
        if isinstance(value, Tensor):
            value = value.detach().clone()
            is_buffer = name in module._buffers
            setattr(module, name, value if is_buffer else nn.Parameter(value))
    return module


def _linear(given: Given, shape: tuple[int, ...]) -> nn.Module | None:
    weight = given["weight"]
    if weight.ndim != 2 or len(shape) < 2:
        return None
    out, read = weight.shape
    return _filled(nn.Linear(read, out, given.get("bias") is not None), given)


def _product(given: Given, shape: tuple[int, ...]) -> nn.Module | None:
    """``x @ weight``, perhaps with a bias, as ``torch.addmm`` has it."""
    if any(given.get(name, 1) != 1 for name in ("beta", "alpha")):
        return None
    weight, bias = given["weight"], given.get("bias")
    if not isinstance(weight, Tensor) or (bias is not None and bias.ndim != 1):
        return None
    return _linear(given | {"weight": weight.t() if weight.ndim == 2 else weight}, shape)


def _einsum(given: Given, shape: tuple[int, ...]) -> nn.Module | None:
    """One with a matrix that makes other channels of those along the last axis, or along axis 1."""
    read, arrow, made = str(given["equation"]).replace(" ", "").partition("->")
    one, _, two = read.partition(",")
    weight = given["weight"]
    if not arrow or not (one + two + made).isalpha() or len(two) != 2 or weight.ndim != 2:
        return None
    gone, new = [c for c in two if c in one], [c for c in two if c not in one]
    if len(gone) != 1 or len(new) != 1 or made != one.replace(gone[0], new[0]):
        return None
    matrix = weight if two == new[0] + gone[0] else weight.t()
    axis = one.index(gone[0])
    if axis == len(one) - 1 > 0:
        return _linear({"weight": matrix}, shape)
    if axis == 1 and 3 <= len(one) <= 5:
        ones = (1,) * (len(one) - 2)
        return _convolution({"weight": matrix.reshape(*matrix.shape, *ones)}, shape)
    return None


def _convolution(given: Given, shape: tuple[int, ...]) -> nn.Module | None:
    weight = given["weight"]
    if len(shape) != weight.ndim:
        return None
    kind: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
    groups = given.get("groups", 1)
    made: nn.Module = kind(
        weight.shape[1] * groups, len(weight), tuple(weight.shape[2:]), given.get("stride", 1),
        given.get("padding", 0), given.get("dilation", 1), groups, given.get("bias") is not None,
    )  # fmt: skip
    return _filled(made, given)


def _layer_norm(given: Given, _: tuple[int, ...]) -> nn.Module | None:
    sizes, eps = given["normalized_shape"], given.get("eps", 1e-5)
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    if not all(isinstance(size, int) for size in sizes):
        return None
    affine, bias = (given.get(name) is not None for name in ("weight", "bias"))
    if bias and not affine:
        return None
    return _filled(nn.LayerNorm(sizes, eps, affine, bias), given)


def _group_norm(given: Given, shape: tuple[int, ...]) -> nn.Module | None:
    affine = given.get("weight") is not None
    if affine != (given.get("bias") is not None):
        return None
    eps = given.get("eps", 1e-5)
    return _filled(nn.GroupNorm(given["num_groups"], shape[1], eps, affine), given)


def _batch_norm(given: Given, shape: tuple[int, ...]) -> nn.Module | None:
    affine = given.get("weight") is not None
    if given.get("training", False) is not False or affine != (given.get("bias") is not None):
        return None
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    if len(shape) not in kinds:
        return None
    made: nn.Module = kinds[len(shape)](
        shape[1], given.get("eps", 1e-5), given.get("momentum", 0.1), affine
    )
    return _filled(made, given, ("weight", "bias", "running_mean", "running_var"))


def _embedding(given: Given, _: tuple[int, ...]) -> nn.Module | None:
    plain = {"weight", "padding_idx", "scale_grad_by_freq", "sparse"}
    if any(v is not None for k, v in given.items() if k not in plain and v not in (2.0, False)):
        return None
    return _filled(nn.Embedding(*given["weight"].shape), given)


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_RUNNING = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_KEYWORDS = {"other": "weight", "mat2": "weight"}
NEED_WEIGHT = {"linear", "matmul", "mm", "addmm", "einsum", "conv1d", "conv2d", "conv3d"}
# By the name of a function or method: the names of its arguments, which of them it reads, and what
# makes the module.
MAKERS: dict[str, tuple[tuple[str, ...], str, Maker]] = {
    "linear": (("input", "weight", "bias"), "input", _linear),
    "matmul": (("input", "weight"), "input", _product),
    "mm": (("input", "weight"), "input", _product),
    "addmm": (("bias", "input", "weight"), "input", _product),
    "einsum": (("equation", "input", "weight"), "input", _einsum),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), (_CONVOLUTION, "input", _convolution)),
    "layer_norm": (("input", "normalized_shape", "weight", "bias", "eps"), "input", _layer_norm),
    "group_norm": (("input", "num_groups", "weight", "bias", "eps"), "input", _group_norm),
    "batch_norm": (_RUNNING, "input", _batch_norm),
    "embedding": (("input", "weight", "padding_idx"), "input", _embedding),
}

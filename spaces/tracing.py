"""Traces a module into a ``Network``: its operations, its layers, and what of them can go."""

import builtins
import copy
import inspect
import math
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from .chunks import cut_at_once
from .errors import BadInput, Untraceable
from .grouping import Found, doubled, find_blocks, repeated, run_quietly, trial_widths
from .label_rules import TRANSPOSED
from .memory import Change, changes, versions, write_once
from .network import LAYER_KINDS, Group, Layer, Network, Op
from .operations import LAYERS, SHAPE, callee, operations, shape_of
from .surgery import operate_
from .tracer import PROXIES, Tracer

NUMPY = (
    "; what passes through numpy can be neither traced nor deployed: compute it in torch, or in "
    "__init__ where it is the same for every request"
)
# Of tensors, from numbers alone; and of the ends of a type, which is known as sizes are.
MAKERS = ("zeros", "ones", "full", "arange", "eye", "linspace", "finfo", "iinfo")
# Requests in a batch by which it is told what hangs on how many there are, also on whether there
# are many, and on whether their number is even.
BATCHES = (1, 2, 67)
SAME = 0.03  # of the largest answer: bfloat16 inside of a model is float32 in its trace
_LIBRARY = (str(Path(torch.__file__).parent), "<eval_with_key>", str(Path(__file__).parent))


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a request: a tensor, a tuple or a dict."""
    if isinstance(example, dict):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


def trace(model: nn.Module, example: Any) -> Network:
    """The network that ``model`` computes for ``example`` (one request, batch 1).

    Nothing is changed in ``model``. A module that runs several times is one layer with several
    operations. Raises Untraceable, naming the operation, when the model's control flow depends on
    values or when it does not run on ``example``; BadInput when ``example`` does not fit its
    forward.
    """
    graph = trace_graph(model, example)
    _check(graph)
    inputs = _bind(model, example)[0]
    _compare(graph, inputs, model, example)
    found = Found(graph, inputs)
    groups = _sound(graph, inputs, found, found.groups)
    network = _network(graph, found, groups)
    return replace(network, blocks=find_blocks(network.ops, groups))


def trace_graph(model: nn.Module, example: Any) -> fx.GraphModule:
    """``model`` in eval mode as an fx graph with weights of its own, whose nodes carry their shapes
    and change nothing in place.

    Functions that a library keeps whole for torch.fx (``fx.wrap``) are looked into where the model
    calls some and that can be: of the attention of torchvision's Swin nothing could be pruned else.
    """
    kept = fx._symbolic_trace._wrapped_fns_to_patch
    foreign = {key: held for key, held in kept.items() if not _is_torchs_own(held)}
    try:
        graph = _traced_graph(model, example)
    except Untraceable:
        if foreign and (inside := _looked_into(model, example, foreign)):
            return inside
        raise
    whole = [held.get(name, getattr(builtins, name, None)) for (_, name), held in foreign.items()]
    if any(node.target is function for node in graph.graph.nodes for function in whole):
        return _looked_into(model, example, foreign) or graph
    return graph


def _looked_into(
    model: nn.Module, example: Any, foreign: Mapping[tuple[int, str], dict[str, Any]]
) -> fx.GraphModule | None:
    """``model`` traced also into the functions ``foreign``, if it still answers as it does."""
    kept = fx._symbolic_trace._wrapped_fns_to_patch
    for key in foreign:
        del kept[key]
    try:
        graph = _traced_graph(model, example)
        _compare(graph, _bind(model, example)[0], model, example)
    except Untraceable:
        return None
    finally:
        kept.update(foreign)
    return graph


def _is_torchs_own(module: Mapping[str, Any]) -> bool:
    return str(module.get("__name__")).partition(".")[0] == "torch"


def _traced_graph(model: nn.Module, example: Any) -> fx.GraphModule:
    bound, defaults = _bind(model, example)
    try:
        graph = _symbolic(model, bound, defaults)
    except Exception as error:
        reason = str(error) or f"{type(error).__name__} with {_shapes(bound)}"  # a bare assert
        raise Untraceable(
            f"the model cannot be traced at {_where(error)}: {reason}{_advice(error)}"
        ) from error
    if any(node.op == "call_method" and node.target == "numpy" for node in graph.graph.nodes):
        raise Untraceable(f"the model calls .numpy() in its forward{NUMPY}")
    _drop_defaults(graph, [n in defaults for n in inspect.signature(model.forward).parameters])
    _place_arguments(graph)
    made = _constants(graph)
    before = {name: getattr(graph, name).clone() for name in made}
    seen = note_shapes(graph, bound)
    for name, value in before.items():  # it may have been changed in place
        setattr(graph, name, value)
    for node, source in seen.idle.items():  # in order: what one reads is gone if it was idle too
        node.replace_all_uses_with(seen.idle.get(source, source))
        graph.graph.erase_node(node)
    write_once(graph, seen.changes)
    cut_at_once(graph)
    graph.graph.eliminate_dead_code()  # not before: it would drop changes whose result is not used
    graph.recompile()
    return graph


def _symbolic(model: nn.Module, bound: Sequence[Any], defaults: dict[str, Any]) -> fx.GraphModule:
    """``model`` as torch.fx traces it: first with its buffers as the tensors they are, by which it
    may decide what runs."""

    def traced(buffers: bool) -> fx.GraphModule:
        own = copy.deepcopy(model).eval()  # it may keep what stands for its values
        tracer = Tracer([given(repeated(bound, times)) for times in BATCHES], buffers)
        graph = tracer.trace(own, defaults or None)
        return fx.GraphModule(tracer.root, graph, type(model).__name__)

    def given(values: Sequence[Any]) -> list[Any]:
        left = iter(values)
        names = inspect.signature(model.forward).parameters
        return [defaults[n] if n in defaults else next(left) for n in names]

    with _sized_by_requests(), _einops():
        try:
            return traced(buffers=False)
        except Exception as error:
            try:
                return traced(buffers=True)
            except Exception:
                raise error from None


@contextmanager
def _einops() -> Iterator[None]:
    """While a model is traced, einops takes what stands for a tensor for one, if it is loaded."""
    backends: Any = sys.modules.get("einops._backends")
    for kind in PROXIES if hasattr(backends, "_type2backend") else ():  # it asks a tensor's type
        backends._type2backend[kind] = backends.get_backend(torch.empty(0))
    try:
        yield
    finally:
        # It keeps what it works out by the sizes it is for, and these would keep the whole model.
        cached: Any = getattr(sys.modules.get("einops.einops"), "_reconstruct_from_shape", None)
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


@contextmanager
def _sized_by_requests() -> Iterator[None]:
    """While a model is traced, tensors that are made as large as a batch of requests asks (the
    first state of a recurrent layer), or expanded to that, are noted: of sizes alone torch.fx sees
    nothing. What is as large for every request is made."""

    def noted(make: Any, kind: str, target: Any) -> Any:
        def maker(*args: Any, **kwargs: Any) -> Any:
            found: list[fx.Proxy] = []
            fx.node.map_aggregate(
                (args, kwargs), lambda a: found.append(a) if isinstance(a, fx.Proxy) else None
            )
            known = [proxy.tracer.constant(proxy) for proxy in found]  # type: ignore[attr-defined]
            if all(value is not None for value in known):
                values = iter(known)  # in the same order
                args, kwargs = fx.node.map_aggregate(
                    (args, kwargs), lambda a: next(values) if isinstance(a, fx.Proxy) else a
                )
                return make(*args, **kwargs)
            return found[0].tracer.create_proxy(kind, target, args, kwargs)

        return maker

    known = {name: getattr(torch, name) for name in MAKERS}
    try:
        for name, make in known.items():
            setattr(torch, name, noted(make, "call_function", make))
        torch.Tensor.expand = noted(torch.Tensor.expand, "call_method", "expand")  # type: ignore[method-assign]
        yield
    finally:
        del torch.Tensor.expand  # it is inherited
        for name, make in known.items():
            setattr(torch, name, make)


def note_shapes(graph: fx.GraphModule, inputs: Sequence[Any]) -> "_Shapes":
    """Runs ``graph`` and notes at every node the shape of its value."""
    runner = _Shapes(graph)
    run_quietly(runner, (value.clone() for value in inputs))  # the model may change them in place
    return runner


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape of every value (torch's own prints what fails).

    changes: what is changed in place. idle: functions of other libraries that are told not to
    train and give what they are given (torchvision's stochastic_depth), and the node of that. One
    that is told nothing may do so for these values alone.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.changes: list[Change] = []
        self.idle: dict[fx.Node, fx.Node] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = versions(self.env)
        try:
            result = super().run_node(n)
        except Exception as error:
            what = getattr(n.target, "__name__", n.target)
            raise Untraceable(
                f"the model does not run on example_input(): {what!r} fails: {error}"
            ) from error
        if isinstance(result, torch.Tensor):
            n.meta[SHAPE] = tuple(result.shape)
        changed = changes(n, result, before, self.env)
        self.changes += changed
        same = [given for given in n.all_input_nodes if self.env[given] is result]
        told = any(value is False for value in (*n.args, *n.kwargs.values()))
        if same and told and n.op == "call_function" and not changed and not is_torchs(n.target):
            self.idle[n] = self.idle.get(same[0], same[0])
        return result


def is_torchs(function: Any) -> bool:
    """Whether ``function`` is PyTorch's or Python's own, about which more is known."""
    if isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(function).startswith("aten.")  # a library may add operations of its own
    library = (getattr(function, "__module__", None) or "torch").partition(".")[0]
    return library in ("torch", "_operator", "builtins", "math")


def _constants(graph: fx.GraphModule) -> list[str]:
    """What was made from numbers while ``graph`` was traced, each of which is then read once,
    before anything runs: so it is seen where it, or a view of it, is changed in place."""
    first: dict[str, fx.Node] = {}
    for node in graph.graph.nodes:
        name = str(node.target)
        if node.op != "get_attr" or not name.startswith("_tensor_constant"):
            continue
        if name in first:
            node.replace_all_uses_with(first[name])
            graph.graph.erase_node(node)
        else:
            first[name] = node
    start = next((n for n in graph.graph.nodes if n.op != "placeholder"), None)
    for node in first.values():
        if start is not None and node is not start:
            start.prepend(node)
    return list(first)


def _place_arguments(graph: fx.GraphModule) -> None:
    """Whatever a call of ``graph`` reads first is given by place, also where it is by name in the
    model, as in ``self.conv(input=x)``."""
    for node in graph.graph.nodes:
        if node.args or node.op not in ("call_module", "call_function"):
            continue
        call: Any = node.target
        if node.op == "call_module":
            call = graph.get_submodule(str(node.target)).forward
        name = next((n for n in _first_names(call) if n in node.kwargs), None)
        if name is not None:
            node.args = (node.kwargs[name],)
            node.kwargs = {n: value for n, value in node.kwargs.items() if n != name}


def _first_names(call: Any) -> tuple[str, ...]:
    """What the first argument of ``call`` may be called."""
    try:
        first = next(iter(inspect.signature(call).parameters.values()), None)
    except ValueError:  # one in C++, which does not say
        first = None
    if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD:
        return (first.name,)
    return ("condition", "tensors", "input")


def _bind(model: nn.Module, example: Any) -> tuple[list[Any], dict[str, Any]]:
    """What ``example`` gives the model's forward, in its order, and what it leaves at default."""
    args, kwargs = arguments(example)
    signature = inspect.signature(model.forward)
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Untraceable(f"the model's forward must name its arguments, but has {parameter}")
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise BadInput(f"example_input() does not fit the model's forward: {error}") from error
    for name, value in bound.items():
        if not isinstance(value, torch.Tensor):
            raise BadInput(
                "example_input() must be a tensor, or a tuple or dict of tensors, but its "
                f"{name!r} is of type {type(value).__name__}"
            )
    left = (p for p in signature.parameters.values() if p.name not in bound)
    return list(bound.values()), {p.name: p.default for p in left}


def _drop_defaults(graph: fx.GraphModule, is_default: list[bool]) -> None:
    """Erases what tracing leaves of arguments at their default."""
    holders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    for holder, default in zip(holders, is_default, strict=True):
        if default:  # all that reads it are checks that it still has that value
            checks = list(holder.users)
            for node in [*(u for n in checks for u in list(n.users)), *checks, holder]:
                graph.graph.erase_node(node)


def _shapes(inputs: list[torch.Tensor]) -> str:
    """The shapes of ``inputs``, in words."""
    shapes = " and ".join(str(list(x.shape)) for x in inputs)
    return f"an input of {shapes}, of which the first axis is the batch"


def _where(error: BaseException) -> str:
    """The line of the user's code in which ``error`` arose."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_LIBRARY):
            return f"{frame.filename}:{frame.lineno} ({(frame.line or '').strip()!r})"
    return "an unknown place"


def _advice(error: Exception) -> str:
    if re.search(r"numpy|ndarray|ufunc|__array", str(error)) or ".numpy(" in _where(error):
        return NUMPY
    if "Unable to cast Proxy" in str(error):
        return "; a function of torch.jit.script cannot be traced: take that decorator off"
    if not isinstance(error, fx.proxy.TraceError) and "symbolic" not in str(error):
        return ""
    return (
        "; what runs must not depend on an input's values, nor on how many requests are in a "
        "batch: decide it in __init__"
    )


def _check(graph: fx.GraphModule) -> None:
    """What a network must be; where it is not, everything after would fail less clearly."""
    called = [(str(n.target), callee(graph, n)) for n in graph.graph.nodes]
    layers = {name for name, kind in called if kind in LAYERS}
    if not layers and not any(kind in TRANSPOSED for _, kind in called):
        raise Untraceable("the model has no convolution and no linear layer: nothing to compress")
    for node in graph.graph.nodes:
        owner = str(node.target).rpartition(".")[0]
        if node.op == "get_attr" and owner in layers:
            raise Untraceable(
                f"{str(node.target)!r} is read outside of its layer {owner!r}: pruned or in "
                "integers it would be another; give the other use a parameter of its own"
            )
    answer = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    if isinstance(answer, fx.Node) and answer.meta.get(SHAPE) == ():
        raise Untraceable(
            "the model's answer to one request is a number, without the axis of requests in a "
            "batch: a squeeze() takes that off too (say squeeze(-1)), and so does a mean over all"
        )
    if not isinstance(answer, fx.Node) or not shape_of(answer):
        kind = "no tensor" if isinstance(answer, fx.Node) else type(answer).__name__
        kind = kind.removeprefix("immutable_")  # torch.fx's own dict and list
        raise Untraceable(
            f"the model must return one tensor, but it returns {kind}; wrap it in a module that "
            "returns the one that loss and metric take"
        )


def _compare(graph: fx.GraphModule, inputs: Sequence[Any], model: nn.Module, example: Any) -> None:
    """Raises Untraceable if ``graph`` answers otherwise than ``model``, of which it is a trace: it
    would be searched, pruned and deployed as another network."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        found = graph(*(value.clone() for value in inputs))
        try:
            expected = [_asked(model, example) for _ in range(2)]
        except Exception:  # whoever runs it next says so
            return
    if not all(isinstance(answer, torch.Tensor) for answer in (found, *expected)):
        return
    if not all(e.is_floating_point() and e.numel() and e.isfinite().all() for e in expected):
        return
    found, *expected = (answer.float() for answer in (found, *expected))  # autocast may change it
    most = SAME * expected[0].abs().max().item()
    if any(
        found.shape != e.shape or not torch.allclose(found, e, rtol=0, atol=most) for e in expected
    ):
        raise Untraceable(
            "the model answers one request otherwise when it is asked again, or traced: its answer "
            "must hang on the request and the weights alone, not on random numbers (F.dropout "
            "needs training=self.training), nor on buffers that its forward changes"
        )


def _asked(model: nn.Module, example: Any) -> Any:
    args, kwargs = arguments(copy.deepcopy(example))  # it may be changed in place
    return model(*args, **kwargs)


def _sound(
    graph: fx.GraphModule, inputs: Sequence[Any], found: Found, groups: Mapping[str, Group]
) -> dict[str, Group]:
    """The groups that really can be pruned: every shape of the pruned model is as predicted.

    A model may hold a width as a number where nobody looks for it. Halves the groups until those
    that fail are found; a model without any costs one run.
    """
    if not groups or _agrees(graph, inputs, found, groups):
        return dict(groups)
    names = list(groups)
    if len(names) == 1:
        return {}
    middle = len(names) // 2
    halves = ({n: groups[n] for n in part} for part in (names[:middle], names[middle:]))
    first, second = (_sound(graph, inputs, found, half) for half in halves)
    both = first | second
    return both if _agrees(graph, inputs, found, both) else first


def _agrees(
    graph: fx.GraphModule, inputs: Sequence[Any], found: Found, groups: Mapping[str, Group]
) -> bool:
    network, widths = _network(graph, found, groups), trial_widths(groups)
    try:
        kept = {name: groups[name].first(width) for name, width in widths.items()}
        pruned = operate_(copy.deepcopy(graph), network, kept)
        if found.takes_two:  # a number that held the batch for one request would show here
            run_quietly(fx.Interpreter(pruned), doubled(inputs))
        note_shapes(pruned, inputs)
    except Exception:  # whatever surgery or the model says: these cannot be pruned
        return False
    shapes = {n.name: shape_of(n) for n in pruned.graph.nodes}
    return all(shapes.get(op.name) == network.shape(op.name, widths) for op in network.ops)


def _network(graph: fx.GraphModule, found: Found, groups: Mapping[str, Group]) -> Network:
    out_group = {layer: group.name for group in groups.values() for layer in group.members}
    ops = operations(graph, found.channels(groups))
    uses: dict[str, list[Op]] = {}
    for op in ops:
        if op.kind in LAYER_KINDS:
            uses.setdefault(op.module, []).append(op)
    return Network(
        ops=tuple(ops),
        layers={name: _layer(graph, own, out_group.get(name)) for name, own in uses.items()},
        groups=dict(groups),
        inputs=tuple(op.name for op in ops if op.kind == "input"),
        output=next(op.inputs[0] for op in ops if op.kind == "output"),
        parameters=sum(p.numel() for p in graph.parameters()),
    )


def _layer(graph: fx.GraphModule, uses: list[Op], group: str | None) -> Layer:
    op = uses[0]
    module: Any = graph.get_submodule(op.module)
    conv = op.kind == "conv"
    positions = sum(math.prod(use.shape[2:] if conv else use.shape[1:-1]) for use in uses)
    return Layer(
        name=op.module,
        kind=op.kind,
        op=op.name,
        in_channels=module.in_channels if conv else module.in_features,
        out_channels=module.out_channels if conv else module.out_features,
        kernel=tuple(module.kernel_size) if conv else (),
        stride=tuple(module.stride) if conv else (),
        groups=module.groups if conv else 1,
        out_group=group,
        parameters=sum(p.numel() for p in module.parameters()),
        macs=module.weight.numel() * positions,
        dilation=tuple(module.dilation) if conv else (),
    )

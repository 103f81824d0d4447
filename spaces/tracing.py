"""Traces a module into a ``Network``: torch.fx for the operations, torch-pruning for the groups."""

import copy
import math
import operator
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from .errors import BadInput, Untraceable
from .network import Group, Layer, Network, Op, Part

LAYERS = {nn.Conv1d: "conv", nn.Conv2d: "conv", nn.Conv3d: "conv", nn.Linear: "linear"}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Activations that a runtime fuses into the layer before them and a quantizer's range expresses.
CLAMPS: dict[Any, str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", torch.relu: "relu", torch.relu_: "relu",
    F.relu: "relu", F.relu_: "relu", F.relu6: "relu6", "relu": "relu", "relu_": "relu",
}  # fmt: skip
KINDS: dict[Any, str] = {
    operator.add: "add", operator.iadd: "add", torch.add: "add", "add": "add", "add_": "add",
    torch.cat: "concat", torch.concat: "concat",
    nn.AdaptiveAvgPool1d: "pool", nn.AdaptiveAvgPool2d: "pool", nn.AvgPool2d: "pool",
    nn.AvgPool1d: "pool", nn.MaxPool1d: "maxpool", nn.MaxPool2d: "maxpool",
    F.adaptive_avg_pool1d: "pool", F.adaptive_avg_pool2d: "pool", F.avg_pool2d: "pool",
    F.avg_pool1d: "pool", F.max_pool1d: "maxpool", F.max_pool2d: "maxpool",
    torch.mean: "pool", "mean": "pool",
    nn.Flatten: "reshape", torch.flatten: "reshape", "flatten": "reshape", "view": "reshape",
    "reshape": "reshape", torch.reshape: "reshape",
}  # fmt: skip
# What changes nothing in a deployed network; its value is that of its input.
TRANSPARENT = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, F.dropout, "contiguous", "clone",
)  # fmt: skip


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a request: a tensor, a tuple or a dict."""
    if isinstance(example, dict):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


def trace(model: nn.Module, example: Any) -> Network:
    """The network that ``model`` computes for ``example`` (one request, batch 1).

    Nothing is changed in ``model``. Raises Untraceable, naming the operation, when the model's
    control flow depends on values, when a layer runs twice, or when it does not run on ``example``.
    """
    model = copy.deepcopy(model).eval().requires_grad_()  # groups are found by autograd
    graph = trace_graph(model, example)
    groups, out_group = _groups(model, graph, example)
    ops = _ops(graph, out_group)
    layers = _layers(graph, ops, out_group)
    return Network(
        ops=tuple(ops),
        layers=layers,
        groups={name: groups[name] for name in layers if name in groups},
        inputs=tuple(op.name for op in ops if op.kind == "input"),
        output=next(op.inputs[0] for op in ops if op.kind == "output"),
        parameters=sum(p.numel() for p in model.parameters()),
    )


def trace_graph(model: nn.Module, example: Any) -> fx.GraphModule:
    """``model`` as an fx graph whose nodes carry shapes (``node.meta["tensor_meta"]``)."""
    args, kwargs = arguments(example)
    try:
        graph = fx.symbolic_trace(model)
    except Exception as error:
        raise Untraceable(f"the model cannot be traced at {_where(error)}: {error}") from error
    used = {p.target for p in graph.graph.nodes if p.op == "placeholder"}
    if unknown := set(kwargs) - used:
        raise BadInput(f"example_input() has keys the model's forward lacks: {sorted(unknown)}")
    holders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node in holders[len(args) :]:  # an argument left at its default is no input
        if node.target not in kwargs and node.args:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    values = [*args, *(kwargs[n.target] for n in graph.graph.nodes if n.target in kwargs)]
    try:
        with torch.no_grad():
            ShapeProp(graph).propagate(*values)
    except Exception as error:
        raise Untraceable(f"the model does not run on example_input(): {error}") from error
    return graph


def _where(error: BaseException) -> str:
    """The line of the user's code in which ``error`` arose."""
    library = ("torch/", "torch\\", "<eval_with_key>", "spaces/tracing.py")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not any(part in frame.filename for part in library):
            return f"{frame.filename}:{frame.lineno} ({(frame.line or '').strip()!r})"
    return "an unknown place"


def _shape(node: fx.Node) -> tuple[int, ...]:
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if hasattr(meta, "shape") else ()


def _callee(graph: fx.GraphModule, node: fx.Node) -> Any:
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target)))
    return node.target


def _kind(graph: fx.GraphModule, node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return {"placeholder": "input", "output": "output"}[node.op]
    callee = _callee(graph, node)
    if callee in LAYERS:
        return LAYERS[callee]
    if callee in NORMS:
        return "norm"
    if callee in CLAMPS:
        return "act"
    kind = KINDS.get(callee, "other") if node.op != "get_attr" else "other"
    tensors = [a for a in node.all_input_nodes if _shape(a)]
    if kind == "add" and (len(tensors) != 2 or _shape(tensors[0]) != _shape(tensors[1])):
        return "other"  # a constant or a broadcast: no residual add
    if kind == "concat" and (node.kwargs.get("dim", (*node.args, 0)[1]) != 1):
        return "other"
    return kind


def _ops(graph: fx.GraphModule, out_group: dict[str, str]) -> list[Op]:
    ops: dict[str, Op] = {}
    same: dict[str, str] = {}  # the output of a transparent operation -> the value it is
    for node in graph.graph.nodes:
        kind, shape = _kind(graph, node), _shape(node)
        callee = _callee(graph, node)
        if callee in TRANSPARENT:
            source = node.all_input_nodes[0].name
            same[node.name] = same.get(source, source)
            continue
        module = str(node.target) if node.op == "call_module" else ""
        inputs = tuple(same.get(a.name, a.name) for a in node.all_input_nodes)
        parts: tuple[Part, ...]
        if kind in ("conv", "linear"):
            size = shape[1] if kind == "conv" else shape[-1]
            parts = ((out_group.get(module), size),)
        else:
            parts = _parts(kind, shape, [ops[i] for i in inputs if ops[i].shape])
        detail = CLAMPS.get(callee) or getattr(callee, "__name__", str(callee))
        ops[node.name] = Op(node.name, kind, detail, inputs, module, shape, parts)
    return list(ops.values())


def _parts(kind: str, shape: tuple[int, ...], inputs: list[Op]) -> tuple[Part, ...]:
    if len(shape) < 2:
        return ()
    if not inputs:
        return ((None, shape[1]),)
    parts = sum((op.parts for op in inputs), ()) if kind == "concat" else inputs[0].parts
    total = sum(n for _, n in parts)
    if not total or kind == "other" and total not in (shape[1], shape[-1]):
        return ((None, shape[1]),)
    spread = max(shape[1] // total, 1) if kind == "reshape" else 1  # flattened: positions follow
    return tuple((group, n * spread) for group, n in parts)


def _layers(graph: fx.GraphModule, ops: list[Op], out_group: dict[str, str]) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    for op in ops:
        if op.kind not in ("conv", "linear"):
            continue
        if op.module in layers:
            raise Untraceable(
                f"layer {op.module!r} runs twice in one forward pass; "
                "give each use a layer of its own"
            )
        module: Any = graph.get_submodule(op.module)
        conv = op.kind == "conv"
        positions = math.prod(op.shape[2:] if conv else op.shape[1:-1])
        layers[op.module] = Layer(
            name=op.module,
            kind=op.kind,
            op=op.name,
            in_channels=module.in_channels if conv else module.in_features,
            out_channels=module.out_channels if conv else module.out_features,
            kernel=tuple(module.kernel_size) if conv else (),
            stride=tuple(module.stride) if conv else (),
            groups=module.groups if conv else 1,
            out_group=out_group.get(op.module),
            parameters=sum(p.numel() for p in module.parameters()),
            macs=module.weight.numel() * positions,
        )
    if not layers:
        raise Untraceable("the model has no convolution and no linear layer: nothing to compress")
    return layers


def dependencies(model: nn.Module, example: Any) -> Any:
    """torch-pruning's dependency graph of ``model``."""
    args, kwargs = arguments(example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return tp.DependencyGraph().build_dependency(
                model, example_inputs=kwargs or args, forward_fn=_forward
            )
        except Exception as error:
            raise Untraceable(f"no dependency graph of the model: {error}") from error


def _forward(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def pruner(module: nn.Module) -> Callable[..., Any]:
    """The function of torch-pruning that removes output channels of ``module``."""
    if isinstance(module, nn.Linear):
        return tp.prune_linear_out_channels
    if module.groups > 1 and module.groups == module.out_channels:
        return tp.prune_depthwise_conv_out_channels
    return tp.prune_conv_out_channels


def _groups(
    model: nn.Module, graph: fx.GraphModule, example: Any
) -> tuple[dict[str, Group], dict[str, str]]:
    """Groups by name, and for each layer the group of its output channels (if it can be pruned)."""
    depends = dependencies(model, example)
    names = {module: name for name, module in model.named_modules()}
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    order = {name: i for i, name in enumerate(calls)}
    final = _finals(graph)
    groups: dict[str, Group] = {}
    out_group: dict[str, str] = {}
    kinds = list(LAYERS)
    for members in depends.get_all_groups(ignored_layers=[], root_module_types=kinds):
        outs: dict[str, int] = {}
        multiple, whole = 1, True
        for dependency, indices in members:
            module = dependency.target.module
            if type(module) not in LAYERS:
                continue
            name = names[module]
            if depends.is_out_channel_pruning_fn(dependency.handler):
                size = module.out_features if isinstance(module, nn.Linear) else module.out_channels
                whole &= len(indices) == size
                outs[name] = size
            groups_of = getattr(module, "groups", 1)
            if groups_of > 1 and groups_of != module.out_channels:
                multiple = math.lcm(multiple, groups_of)
        # Channels of the answer are fixed; channels that only partly coincide are left alone.
        if not outs or not whole or len(set(outs.values())) != 1 or final & outs.keys():
            continue
        ordered = tuple(sorted(outs, key=lambda n: order.get(n, len(order))))
        first = ordered[0]
        groups[first] = Group(first, outs[first], ordered, multiple)
        out_group.update(dict.fromkeys(outs, first))
    return groups, out_group


def _finals(graph: fx.GraphModule) -> set[str]:
    """Layers whose channels are channels of the answer: nothing with weights stands between."""
    layers = {n: _callee(graph, n) in LAYERS for n in graph.graph.nodes}
    found: set[str] = set()
    stack = list(next(n for n in graph.graph.nodes if n.op == "output").all_input_nodes)
    while stack:
        node = stack.pop()
        if layers[node]:
            found.add(str(node.target))
        else:
            stack += node.all_input_nodes
    return found

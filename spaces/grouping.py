"""Which channels can be pruned, and which of them together: torch-pruning's dependency graph."""

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_pruning as tp  # type: ignore[import-untyped]
from torch import fx, nn

from .errors import Untraceable
from .network import Group
from .operations import LAYERS, callee


def dependencies(model: nn.Module, example: Any) -> Any:
    """torch-pruning's dependency graph of ``model``. Raises Untraceable if there is none."""
    with warnings.catch_warnings(), torch.enable_grad():  # it follows autograd
        warnings.simplefilter("ignore")
        try:
            return tp.DependencyGraph().build_dependency(
                model,
                example_inputs=example if isinstance(example, dict | tuple | list) else (example,),
                forward_fn=_forward,
            )
        except Exception as error:
            raise Untraceable(f"no dependency graph of the model: {error}") from error


def _forward(model: nn.Module, inputs: Any) -> Any:
    inputs = copy.deepcopy(inputs)  # the model may change them in place
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def pruner(module: nn.Module) -> Callable[..., Any]:
    """The function of torch-pruning that removes output channels of ``module``."""
    if isinstance(module, nn.Linear):
        how = tp.prune_linear_out_channels
    elif _depthwise(module):
        how = tp.prune_depthwise_conv_out_channels
    else:
        how = tp.prune_conv_out_channels
    return how  # type: ignore[no-any-return]


def remove_channels(model: nn.Module, example: Any, gone: Mapping[str, list[int]]) -> None:
    """Removes from ``model``, in place, the channels ``gone`` of each group."""
    depends = dependencies(model, example)
    modules = dict(model.named_modules())
    for name, channels in gone.items():
        module = modules[name]
        depends.get_pruning_group(module, pruner(module), channels).prune()


def find_groups(model: nn.Module, graph: fx.GraphModule, example: Any) -> dict[str, Group]:
    """Groups by name, in execution order. ``graph`` is the trace of ``model``.

    Left at full width are the channels of the answer, channels of which only a part depends on
    others, and channels that a grouped convolution makes or reads: there the same number would
    have to go from each of its parts.
    """
    depends = dependencies(model, example)
    names = {module: name for name, module in model.named_modules()}
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    order = {name: i for i, name in reversed(list(enumerate(calls)))}  # of the first call
    final = _finals(graph)
    groups: dict[str, Group] = {}
    for members in depends.get_all_groups(ignored_layers=[], root_module_types=list(LAYERS)):
        outs: dict[str, int] = {}
        multiple, whole = 1, True
        for dependency, indices in members:
            module = dependency.target.module
            if isinstance(module, nn.GroupNorm):
                multiple = math.lcm(multiple, module.num_groups)
            if type(module) not in LAYERS:
                continue
            if depends.is_out_channel_pruning_fn(dependency.handler):
                size = _out_channels(module)
                whole &= len(indices) == size
                outs[names[module]] = size
            whole &= getattr(module, "groups", 1) == 1 or _depthwise(module)
        called = all(name in order for name in outs)
        if not (outs and whole and called and len(set(outs.values())) == 1) or final & outs.keys():
            continue
        ordered = tuple(sorted(outs, key=lambda name: order[name]))
        groups[ordered[0]] = Group(ordered[0], outs[ordered[0]], ordered, multiple)
    return {name: groups[name] for name in sorted(groups, key=lambda name: order[name])}


def _out_channels(module: Any) -> int:
    size = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    return int(size)


def _depthwise(module: Any) -> bool:
    return bool(1 < module.groups == module.in_channels == module.out_channels)


def _finals(graph: fx.GraphModule) -> set[str]:
    """Layers whose channels are channels of the answer: nothing with weights stands between."""
    found: set[str] = set()
    seen: set[fx.Node] = set()
    stack = list(next(n for n in graph.graph.nodes if n.op == "output").all_input_nodes)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if callee(graph, node) in LAYERS:
            found.add(str(node.target))
        else:
            stack += node.all_input_nodes
    return found


def trial_widths(groups: Mapping[str, Group]) -> dict[str, int]:
    """A narrower width for each group that has one; neighbours get different ones."""
    out = {}
    for i, (name, group) in enumerate(groups.items()):
        step = group.multiple_of
        width = max(step, (group.width // 2 // step - i % 3) * step)
        if width < group.width:
            out[name] = width
    return out


def narrowed(
    model: nn.Module, example: Any, groups: Mapping[str, Group], widths: Mapping[str, int]
) -> nn.Module:
    """A copy of ``model`` whose groups keep their last ``widths`` channels."""
    student = copy.deepcopy(model)
    gone = {name: list(range(groups[name].width - width)) for name, width in widths.items()}
    remove_channels(student, example, gone)
    return student

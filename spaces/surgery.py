"""Surgery on a traced graph: channels and residual branches go, numbers that held them follow."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .labels import called
from .network import Group, Network

# Calls that are told the size of their result, or a part of it, and where.
_SIZES = {"reshape": 1, "expand": 1, "unflatten": 2, "layer_norm": 1}


def operate_(
    student: fx.GraphModule,
    network: Network,
    kept: Mapping[str, Sequence[int] | Tensor],
    drop: Iterable[str] = (),
) -> fx.GraphModule:
    """Leaves ``student`` only the channels ``kept`` of each group, and not ``drop``, in place.

    student: a trace of the model that ``network`` describes, with modules of its own. Raises
    ValueError where ``kept`` has only a part of a unit.
    """
    _drop(student, network, drop)
    units = {name: _units(network.groups[name], channels) for name, channels in kept.items()}
    _slice(student, network, units)
    widths = {name: len(channels) for name, channels in kept.items()}
    stale: set[fx.Node] = set()  # numbers that are another since the surgery
    for node in student.graph.nodes:
        node.meta.clear()  # the shapes are those of the whole model
        if node.name in network.op:
            if _is_stale(network, node, widths):
                stale.add(node)
            _resize(student, network, node, widths, stale)
    student.graph.lint()
    student.recompile()
    return student


def _units(group: Group, channels: Sequence[int] | Tensor) -> set[int]:
    some = {int(i) for i in channels}
    units = {group.unit[i] for i in some}
    if len(some) != len(units) * group.multiple_of:
        raise ValueError(
            f"group {group.name!r} loses whole units of {group.multiple_of} channels, but is to "
            f"keep {sorted(some)}"
        )
    return units


def _drop(student: fx.GraphModule, network: Network, drop: Iterable[str]) -> None:
    nodes = {node.name: node for node in student.graph.nodes}
    for name in drop:
        block = network.blocks[name]
        add = nodes[block.add]
        # The skip may be the add of another block that went.
        skip = nodes[network.without(n for n in drop if n != name).blocks[name].skip]
        add.replace_all_uses_with(skip)
    if drop:
        student.graph.eliminate_dead_code()
        student.delete_all_unused_submodules()


def _slice(student: fx.GraphModule, network: Network, units: Mapping[str, set[int]]) -> None:
    """Cuts the tensors of ``student`` and the sizes that its modules state."""
    masks: dict[tuple[str, int], Tensor] = {}
    for name, remain in units.items():
        for slot in network.groups[name].slots:
            stays = torch.tensor([unit < 0 or unit in remain for unit in slot.units])
            place = (slot.tensor, slot.axis)
            masks[place] = masks[place] & stays if place in masks else stays
    modules = dict(student.named_modules())
    for (name, axis), mask in masks.items():
        path, _, attribute = name.rpartition(".")
        if (module := modules.get(path)) is None:
            continue  # it went with a block
        old = getattr(module, attribute)
        new = old.detach().index_select(axis, mask.nonzero().flatten())
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, old.requires_grad)
        setattr(module, attribute, new)
    for module in modules.values():
        _state_sizes(module)


def _state_sizes(module: Any) -> None:
    """The sizes that ``module`` states become those of its tensors."""
    if isinstance(module, nn.RNNBase):
        module.input_size = module.get_parameter("weight_ih_l0").shape[1]
        return
    if isinstance(module, nn.RNNCellBase):
        module.input_size = module.weight_ih.shape[1]
        return
    weight = getattr(module, "weight", None)
    if weight is None:
        weight = getattr(module, "running_mean", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        if module.groups == module.in_channels > 1:  # depthwise
            module.groups = len(weight)
        module.in_channels, module.out_channels = len(weight), weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.conv._ConvNd):
        if module.groups == module.in_channels > 1:  # depthwise
            module.groups = len(weight) // (module.out_channels // module.groups)
        module.out_channels, module.in_channels = len(weight), weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif hasattr(module, "num_features"):
        module.num_features = len(weight)


def _is_stale(network: Network, node: fx.Node, widths: Mapping[str, int]) -> bool:
    """Whether ``node`` is a number, or several, worked out from a size that has changed."""
    if network.op[node.name].shape or not node.all_input_nodes:
        return False
    try:
        return bool(_number(network, node, {}) != _number(network, node, widths))
    except Exception:  # something else, that hangs on a size: it may have changed with that
        sources = [_value(network, n) for n in node.all_input_nodes]
        return any(
            network.op[n.name].shape != network.shape(n.name, widths)
            or _is_stale(network, n, widths)
            for n in sources
        )


def _number(network: Network, node: fx.Node, widths: Mapping[str, int]) -> Any:
    """What ``node``, a number or several, is when the groups have ``widths``."""
    node = _value(network, node)
    if (node.op == "call_method" and node.target == "size") or node.target is getattr:
        if node.target is getattr and node.args[1] != "shape":
            raise NotImplementedError
        shape = network.shape(_value(network, node.all_input_nodes[0]).name, widths)
        axis: Any = node.kwargs.get("dim", (*node.args, None)[1])
        return torch.Size(shape)[axis] if isinstance(axis, int) else torch.Size(shape)
    if node.op != "call_function" or network.op[node.name].shape:
        raise NotImplementedError
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _number(network, n, widths))
    call: Any = node.target
    return call(*args, **kwargs)


def _value(network: Network, node: fx.Node) -> fx.Node:
    """The node whose value that of ``node`` is: dropout and the like are no operations."""
    while node.name not in network.op:
        node = node.all_input_nodes[0]
    return node


def _resize(
    student: fx.GraphModule,
    network: Network,
    node: fx.Node,
    widths: Mapping[str, int],
    stale: set[fx.Node],
) -> None:
    """Numbers among the arguments of ``node`` that are sizes of its value become the new ones."""
    old, new = network.op[node.name].shape, network.shape(node.name, widths)
    name = called(student, node)
    if node.op == "call_module":
        module: Any = student.get_submodule(str(node.target))
        if hasattr(module, "normalized_shape"):
            module.normalized_shape = new[-len(module.normalized_shape) :]
        elif isinstance(module, nn.Unflatten) and isinstance(module.dim, int):
            count = len(module.unflattened_size)
            first = module.dim % (len(old) - count + 1)
            module.unflattened_size = tuple(
                s if s == -1 else size
                for s, size in zip(module.unflattened_size, new[first:], strict=False)
            )
        return
    if name == "split":
        _resize_parts(network, node, widths)
        return
    if name not in _SIZES or (new == old and stale.isdisjoint(node.all_input_nodes)):
        return
    place = _SIZES[name]
    given: Any = node.args[place:]
    sizes = given[0] if given and not isinstance(given[0], int | fx.Node) else given
    if len(given) == 1 < len(old) and isinstance(given[0], fx.Node):  # x.size()[:-1] + (4, 8)
        with student.graph.inserting_before(node):
            sizes = tuple(
                student.graph.call_function(operator.getitem, (given[0], i))
                for i in range(len(old))
            )
        if given[0] in stale:
            stale.update(sizes[1:])  # the first says how many requests there are
    first = 0
    if name == "layer_norm":
        first = len(old) - len(sizes)
    elif name == "unflatten":
        axis: Any = node.args[1]
        first = axis % (len(old) - len(sizes) + 1)
    ends = zip(sizes, old[first:], new[first:], strict=False)
    fitted = tuple(
        s if s == -1 or (before == after and s not in stale) else after for s, before, after in ends
    )
    if name == "reshape" and isinstance(sizes[0], fx.Node) and fitted[0] == new[0] != old[0]:
        # Heads of several requests in one axis, as B * 4: however many remain of them.
        fitted = (-1, *fitted[1:]) if -1 not in fitted else fitted
    rest = given[1:] if sizes is not given else ()
    node.args = (*node.args[:place], fitted, *rest)


def _resize_parts(network: Network, node: fx.Node, widths: Mapping[str, int]) -> None:
    """The sizes that a split is told become those of what remains. Parts of one size lose the same;
    along an axis with parts of several nothing goes."""
    source = _value(network, node.all_input_nodes[0]).name
    dim: Any = node.kwargs.get("dim", (*node.args, 0, 0)[2])
    old, new = network.op[source].shape[dim], network.shape(source, widths)[dim]
    given = {"split_size", "split_size_or_sections"} & node.kwargs.keys()
    sizes: Any = node.kwargs[given.pop()] if given else node.args[1]
    if new == old:
        return

    def fitted(size: Any) -> Any:
        return (_number(network, size, {}) if isinstance(size, fx.Node) else size) * new // old

    fit = [fitted(s) for s in sizes] if isinstance(sizes, list | tuple) else fitted(sizes)
    node.args, node.kwargs = (node.args[0], fit, dim), {}

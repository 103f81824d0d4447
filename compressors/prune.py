"""Structured pruning: which channels stay, and the surgery that removes the others."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch_pruning as tp  # type: ignore[import-untyped]
from torch import Tensor, fx, nn

from ..spaces import Group, Impossible, Network, Prune, nearest
from ..spaces.surgery import operate_
from ..spaces.tracing import trace_graph
from .data import Items
from .modules import FIXED

# Importance of a channel from its weights in all layers of the group (and their gradients).
# l1: Li et al. 2017, "Pruning filters for efficient convnets". taylor: Molchanov et al. 2019,
# "Importance estimation for neural network pruning", first order.
# median: He et al. 2019, "Filter pruning via geometric median": what others can stand in for goes.
CRITERIA: dict[str, Callable[[], Any]] = {
    "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1, normalizer=None),
    "taylor": lambda: tp.importance.GroupTaylorImportance(normalizer=None),
    "median": lambda: tp.importance.FPGMImportance(normalizer=None),
    "random": lambda: tp.importance.RandomImportance(),
}

LEAST_LEFT = 1e-3  # of a channel's variance, where pruning leaves next to nothing of it

Model = TypeVar("Model", bound=nn.Module)


def importance(
    model: nn.Module,
    network: Network,
    criterion: str,
    calibration: Items,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """For each group the importance of its channels, [width]; ``model`` stays as it is."""
    if criterion not in CRITERIA:
        raise Impossible(f"no criterion {criterion!r}; {nearest(criterion, CRITERIA)}")
    model = copy.deepcopy(model).eval().requires_grad_()
    if criterion == "taylor":
        try:
            _mean_gradients(model, calibration, loss)
        except RuntimeError as error:  # say, a value that is needed is changed in place
            raise Impossible(f"criterion {criterion!r} needs gradients: {error}") from error
    score = CRITERIA[criterion]()
    out: dict[str, Tensor] = {}
    for name, group in network.groups.items():
        with torch.random.fork_rng([]):
            torch.manual_seed(len(out))  # "random" is the same in every process
            scores = score(members(model, group))
        if scores is None:
            raise Impossible(f"criterion {criterion!r} finds nothing to judge group {name!r} by")
        # A unit, such as an attention head, counts as the sum of its channels.
        out[name] = _normalized(scores.detach()[torch.tensor(group.unit)])
    return out


def members(model: nn.Module, group: Group) -> Any:
    """``group`` as torch-pruning's criteria read one: modules, what they lose, and whose it is."""
    found = tp.dependency.Group()
    for slot in group.slots:
        path, _, attribute = slot.tensor.rpartition(".")
        module = model.get_submodule(path)
        handler = _handler(module, slot.axis) if attribute == "weight" else None
        if handler is None:
            continue
        node = tp.dependency.Node(module, None, path)
        places = [i for i, unit in enumerate(slot.units) if unit >= 0]
        found.add_dep(tp.dependency.Dependency(handler, handler, node, node), places)
        found[-1].root_idxs = [slot.units[i] for i in places]
    return found


def _handler(module: nn.Module, axis: int) -> Any:
    """torch-pruning's function that removes channels along ``axis`` of the weights."""
    if isinstance(module, nn.Linear):
        return (tp.prune_linear_out_channels, tp.prune_linear_in_channels)[axis]
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if 1 < module.groups == module.in_channels == module.out_channels:
            return tp.prune_depthwise_conv_out_channels
        return (tp.prune_conv_out_channels, tp.prune_conv_in_channels)[axis]
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and axis == 1:
        return tp.prune_conv_out_channels
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return tp.prune_batchnorm_out_channels
    if isinstance(module, nn.LayerNorm):
        return tp.prune_layernorm_out_channels
    return None


def _normalized(scores: Tensor) -> Tensor:
    """``scores`` [width] with mean 1, so that groups compare: 0.1 is a tenth of an average channel
    of its own group, whatever its weights' scale. All 1 where nothing distinguishes them."""
    mean = scores.mean()
    return scores / mean if mean > 0 else torch.ones_like(scores)


def _mean_gradients(
    model: nn.Module, items: Items, loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Leaves in ``grad`` of every parameter the gradient of the mean loss over ``items``."""
    for batch in items.chunks():
        value = loss(call(model, batch.inputs), batch.targets) * len(batch) / len(items)
        value.backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        if parameter.grad is None:  # nothing learns there: of a backbone under no_grad
            parameter.grad = torch.zeros_like(parameter)


def kept_channels(
    scores: Mapping[str, Tensor], widths: Mapping[str, int], groups: Mapping[str, Group]
) -> dict[str, Tensor]:
    """For each group the channels of its most important units, ascending, [width]."""
    kept = {}
    for name, width in widths.items():
        group, unit = groups[name], torch.tensor(groups[name].unit)
        if width == group.width:
            continue
        count = group.width // group.multiple_of
        totals = torch.zeros(count, dtype=scores[name].dtype).index_add(0, unit, scores[name])
        best = totals.topk(width // group.multiple_of).indices
        kept[name] = torch.isin(unit, best).nonzero().flatten()
    return kept


def remove(
    model: nn.Module,
    network: Network,
    example: Any,
    kept: Mapping[str, Tensor],
    drop: Iterable[str] = (),
) -> fx.GraphModule:
    """A copy of ``model`` without the channels that are not in ``kept`` and without the residual
    branches ``drop``, as the graph of its operations. What is to be trained requires gradients."""
    student = operate_(trace_graph(model, example), network, kept, drop)
    student.eval().requires_grad_()
    for module in student.modules():
        for attribute in getattr(module, FIXED, frozenset()) & module._parameters.keys():
            getattr(module, attribute).requires_grad_(False)
    return student


def shaped(model: nn.Module, network: Network, example: Any, how: Prune) -> fx.GraphModule:
    """The student of ``how`` in its shapes alone: of each group it keeps the first channels."""
    groups = network.groups
    kept = {
        name: torch.tensor(groups[name].first(width))
        for name, width in how.width.items()
        if width < groups[name].width
    }
    return remove(model, network, example, kept, how.drop)


def lay_out(model: Model, layout: torch.memory_format) -> Model:
    """``model``, whose two-dimensional convolutions keep their weights in ``layout``, in place.

    On a CPU channels_last saves a sixth of training and a quarter of inference (measured:
    a step of the half-width ResNet, one thread, 733 -> 600 us an image).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=layout)  # type: ignore[call-overload]
    return model


@torch.no_grad()
def recompute_statistics(model: nn.Module, inputs: Items, batch: int = 128) -> None:
    """Batch-norm statistics of ``model`` anew from ``inputs``, in place.

    Pruning shifts every activation; without this the network says almost nothing about how good
    it will be (Li et al. 2020, "EagleEye"). Of the variance that a channel had at least
    ``LEAST_LEFT`` counts: divided by the root of almost nothing, what ``inputs`` do not show would
    come out some hundred times as large.
    """
    modules = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    norms: list[Any] = [m for m in modules if m.track_running_stats]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    # Of those that have seen data: of others it says nothing.
    before = [m.running_var * (m.num_batches_tracked > 0) for m in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
        norm.train()
    for part in inputs.batches(batch):
        if len(part) > 1:  # one item alone has no variance
            call(model, part.inputs)
    for norm, momentum, variance in zip(norms, momenta, before, strict=True):
        norm.momentum = momentum
        norm.running_var = torch.maximum(norm.running_var, LEAST_LEFT * variance)
    model.eval()


def call(model: nn.Module, inputs: Any) -> Tensor:
    """``model`` on a batch of inputs (a tensor, a tuple or a dict)."""
    if isinstance(inputs, Mapping):
        return model(**inputs)  # type: ignore[no-any-return]
    if isinstance(inputs, tuple):
        return model(*inputs)  # type: ignore[no-any-return]
    return model(inputs)  # type: ignore[no-any-return]


def in_order(graph: fx.GraphModule, inputs: Any) -> list[Tensor]:
    """The tensors of a batch of inputs as the placeholders of ``graph`` take them."""
    holders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if isinstance(inputs, Mapping):
        return [inputs[str(node.target)] for node in holders]
    return list(inputs) if isinstance(inputs, tuple | list) else [inputs]

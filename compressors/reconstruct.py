"""Reconstruction: the weights that remain answer for those that went.

A layer whose input channels were pruned solves, over its remaining weights W', least squares
against the teacher's output Y = X W (He et al. 2017, "Channel pruning for accelerating very deep
neural networks", eq. 3): with the covariance C = cov(X) of the teacher's inputs, of which k remain,

    W' = (C_kk + lambda I)^-1 C_k: W.

The bias, or the norm behind the layer, takes what is left of the mean; where there is neither,
C = E[X^T X]. C belongs to the teacher and is measured once; a policy costs one small solve a layer.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..spaces import Network
from .data import Items
from .prune import call

RIDGE = 1e-3  # lambda, as a share of the mean variance: rank-deficient inputs stay harmless
LARGEST = 4_608  # inputs of a layer (channels x kernel) whose covariance is kept: 85 MB
GRADIENTS_ROOM = 1 << 30  # bytes of all values of the items whose gradients are taken at once
ROOM = 256 << 20  # bytes of input rows at once: of 64 channels at 512 x 512 an image has 604 MB


@dataclass(frozen=True)
class Moments:
    """Of the inputs of a layer, G groups (1 but for a grouped convolution) of F = channels x kernel
    positions: mean [G, F], covariance [G, F, F]."""

    mean: Tensor
    covariance: Tensor


def input_moments(model: nn.Module, network: Network, items: Items) -> dict[str, Moments]:
    """Moments of the inputs of every layer that can be reconstructed, over ``items``.

    model: changes nothing in place and keeps nothing, as a traced one does. Of sequences without
    the positions that no answer depends on, as those that a mask hides: more than half of the words
    of a review may be padding, and fitting to it costs the others.
    """
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}
    sequences: list[tuple[str, Any, Tensor]] = []  # inputs, until it is known what depends on them

    @torch.no_grad()
    def add(name: str, module: Any, x: Tensor) -> None:
        for part in torch.split(x, _images(module, x)):
            rows = input_rows(module, part)  # [G, rows, F]
            count, total, square = sums.get(name, (0, 0.0, 0.0))
            square = square + rows.mT @ rows
            sums[name] = (count + rows.shape[1], total + rows.sum(1), square)

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
            x, *others = inputs
            if not isinstance(module, nn.Linear) or x.ndim < 3:
                add(name, module, x)
                return inputs
            x = x if x.requires_grad else x.detach().requires_grad_()
            sequences.append((name, module, x))
            return x, *others

        return hook

    modules = dict(model.named_modules())
    with ExitStack() as hooks:
        for name in network.layers:
            if _solvable(modules[name]):
                hooks.enter_context(modules[name].register_forward_pre_hook(watch(name)))
        gradients = any(op.kind == "linear" and len(op.shape) > 2 for op in network.ops)
        for batch in items.batches(_at_once(network, items) if gradients else items.chunk):
            with torch.set_grad_enabled(gradients):
                answers = call(model, batch.inputs)
            given = list(sequences)
            sequences.clear()
            found = _gradients(answers, [x for _, _, x in given])
            for (name, module, x), gradient in zip(given, found, strict=True):
                rows = x.detach()
                add(name, module, rows if gradient is None else rows[_shown(gradient)])
            del answers, given, found
    moments = {}
    for name, (count, total, square) in sums.items():
        mean = total / count
        moments[name] = Moments(mean, square / count - mean[:, :, None] * mean[:, None])
    return moments


def _at_once(network: Network, items: Items) -> int:
    """How many items have room for all their values, which gradients need."""
    each = 4 * sum(math.prod(op.shape) for op in network.ops)
    return max(1, min(items.chunk, GRADIENTS_ROOM // max(1, each)))


def _gradients(answers: Tensor, values: list[Tensor]) -> Sequence[Tensor | None]:
    """For each of ``values`` a gradient that is 0 where ``answers`` do not depend on it; None where
    that cannot be told."""
    if not values or not answers.requires_grad:
        return [None] * len(values)
    # No plain sum: that of probabilities is always 1.
    mixed = torch.randn(answers.shape, generator=torch.Generator().manual_seed(0))
    try:
        return torch.autograd.grad(answers, values, mixed.to(answers.dtype), allow_unused=True)
    except Exception:  # say, a function with a gradient of the user's own
        return [None] * len(values)


def _shown(gradient: Tensor) -> Tensor:
    """Which positions of a sequence [N, ..., F] count. All of an item without any gradient: its
    answer is rounded or clipped, which says nothing of its inputs."""
    shown = gradient.any(-1)
    items = shown.flatten(1).any(1)
    return shown | ~items.reshape(-1, *[1] * (shown.ndim - 1))


@torch.no_grad()
def reconstruct_(
    student: nn.Module,
    teacher: nn.Module,
    network: Network,
    kept: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
) -> None:
    """Solves the remaining weights of every layer of ``student`` that lost inputs, in place."""
    for name, layer in network.layers.items():
        inputs = _remaining(network, kept, f"{name}.weight", 1)
        if inputs is None or name not in moments:
            continue
        theirs: Any = teacher.get_submodule(name)
        ours: Any = student.get_submodule(name)
        outputs = _remaining(network, kept, f"{name}.weight", 0)
        if outputs is None:
            outputs = torch.arange(len(theirs.weight))
        positions = math.prod(layer.kernel)
        k = (inputs[:, None] * positions + torch.arange(positions)).flatten()
        groups, m = len(moments[name].mean), moments[name]
        full = theirs.weight[outputs].flatten(1).unflatten(0, (groups, -1))  # [G, out, F]
        c = m.covariance[:, k]  # [G, k, F]
        if ours.bias is None and name not in network.folded:  # nothing else makes up for the mean
            c = c + m.mean[:, k, None] * m.mean[:, None]
        square, target = c[:, :, k], c @ full.mT
        del c  # of them all the largest, and not needed while solving takes memory
        diagonal = square.diagonal(dim1=1, dim2=2)
        diagonal += RIDGE * diagonal.mean(1, keepdim=True).clamp_min(1e-12)
        solved = torch.linalg.solve(square, target).mT  # [G, out, k]
        ours.weight.copy_(solved.reshape(ours.weight.shape))
        if ours.bias is not None:
            shift = full @ m.mean[:, :, None] - solved @ m.mean[:, k, None]
            ours.bias.copy_(theirs.bias[outputs] + shift.flatten())


def _solvable(module: Any) -> bool:
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        # A depthwise convolution has one input for an output: it loses none and keeps the output.
        if module.padding_mode != "zeros" or module.groups == module.in_channels:
            return False
    elif not isinstance(module, nn.Linear):
        return False
    return row_size(module) <= LARGEST


def row_size(module: Any) -> int:
    """How many inputs of a layer meet the weights of one output."""
    return math.prod(module.weight.shape[1:])


def _images(module: Any, x: Tensor) -> int:
    """How many items of ``x`` give rows at once."""
    if isinstance(module, nn.Linear):
        return len(x)  # rows are the values themselves
    positions = math.prod(x.shape[2:]) / math.prod(module.stride)
    return max(1, int(ROOM / (4 * positions * module.groups * row_size(module))))


def input_rows(module: Any, x: Tensor) -> Tensor:
    """The inputs that meet the weights, one row for each output position: [G, rows, F]."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    where = {n: getattr(module, n) for n in ("kernel_size", "dilation", "stride")}
    x = F.pad(x, _padding(module))
    if isinstance(module, nn.Conv1d):
        x = x[:, :, None]
        where = {n: (1, *v) for n, v in where.items()}
    columns = F.unfold(x, **where).mT  # [N, positions, G x F]
    return columns.reshape(*columns.shape[:2], module.groups, -1).flatten(0, 1).transpose(0, 1)


def _padding(module: Any) -> list[int]:
    """What a convolution adds before and after each axis, the last axis first."""
    sizes: list[tuple[int, int]] = []
    for axis, (size, dilation) in enumerate(zip(module.kernel_size, module.dilation, strict=True)):
        if module.padding == "same":
            total = dilation * (size - 1)
            sizes.append((total // 2, total - total // 2))
        else:
            one = 0 if module.padding == "valid" else module.padding[axis]
            sizes.append((one, one))
    return [n for pair in reversed(sizes) for n in pair]


def _remaining(
    network: Network, kept: Mapping[str, Tensor], tensor: str, axis: int
) -> Tensor | None:
    """The positions along ``axis`` of ``tensor`` that remain, None if all do."""
    lost = None
    for name in kept.keys() & network.groups.keys():
        channels, group = kept[name], network.groups[name]
        for slot in group.slots:
            if (slot.tensor, slot.axis) != (tensor, axis):
                continue
            units = torch.tensor(slot.units)
            stays = torch.tensor([group.unit[i] for i in channels.tolist()])
            gone = (units >= 0) & ~torch.isin(units, stays)
            lost = gone if lost is None else lost | gone
    return None if lost is None else (~lost).nonzero().flatten()

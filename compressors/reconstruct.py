"""Reconstruction: the weights that remain answer for those that went.

A layer whose input channels were pruned solves, over its remaining weights W', least squares
against the teacher's output Y = X W (He et al. 2017, "Channel pruning for accelerating very deep
neural networks", eq. 3): with the covariance C = cov(X) of the teacher's inputs, of which k remain,

    W' = (C_kk + lambda I)^-1 C_k: W.

C belongs to the teacher and is measured once; a policy costs one small solve a layer.
"""

import math
from collections.abc import Mapping
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


@dataclass(frozen=True)
class Moments:
    """Of a layer's inputs (F = channels x kernel positions): mean [F], covariance [F, F]."""

    mean: Tensor
    covariance: Tensor


@torch.no_grad()
def input_moments(model: nn.Module, network: Network, items: Items) -> dict[str, Moments]:
    """Moments of the inputs of every layer that can be reconstructed, over ``items``."""
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = _rows(module, inputs[0])
            count, total, square = sums.get(name, (0, 0.0, 0.0))
            sums[name] = (count + len(rows), total + rows.sum(0), square + rows.T @ rows)

        return hook

    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(watch(name))
        for name in network.layers
        if _solvable(modules[name])
    ]
    try:
        for batch in items.batches(64):
            call(model, batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: Moments(total / count, square / count - torch.outer(total / count, total / count))
        for name, (count, total, square) in sums.items()
    }


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
        inputs = _kept_inputs(network, network.op[layer.op].inputs[0], kept)
        if inputs is None or name not in moments:
            continue
        theirs: Any = teacher.get_submodule(name)
        ours: Any = student.get_submodule(name)
        positions = math.prod(layer.kernel)
        k = (inputs[:, None] * positions + torch.arange(positions)).flatten()
        outputs = kept.get(layer.out_group or "", torch.arange(layer.out_channels))
        full = theirs.weight[outputs].flatten(1)  # [out, F]
        m = moments[name]
        c = m.covariance[k]
        ridge = RIDGE * c[:, k].diagonal().mean().clamp_min(1e-12)
        solved = torch.linalg.solve(c[:, k] + ridge * torch.eye(len(k)), c @ full.T).T  # [out, k]
        ours.weight.copy_(solved.reshape(ours.weight.shape))
        if ours.bias is not None:
            ours.bias.copy_(theirs.bias[outputs] + full @ m.mean - solved @ m.mean[k])


def _solvable(module: Any) -> bool:
    if isinstance(module, nn.Linear):
        return module.in_features <= LARGEST
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        size = module.in_channels * math.prod(module.kernel_size)
        plain = module.groups == 1 and module.padding_mode == "zeros"
        return plain and not isinstance(module.padding, str) and size <= LARGEST
    return False


def _rows(module: Any, x: Tensor) -> Tensor:
    """The inputs that meet the weights, one row for each output position: [rows, F]."""
    if isinstance(module, nn.Linear):
        return x.flatten(0, -2)
    where = {n: getattr(module, n) for n in ("kernel_size", "dilation", "padding", "stride")}
    if isinstance(module, nn.Conv1d):
        x = x[:, :, None]
        where = {n: (0 if n == "padding" else 1, *v) for n, v in where.items()}
    columns = F.unfold(x, **where)  # [N, F, positions]
    return columns.transpose(1, 2).flatten(0, 1)


def _kept_inputs(network: Network, value: str, kept: Mapping[str, Tensor]) -> Tensor | None:
    """Indices of the channels of ``value`` that remain, None if all do."""
    indices, offset, lost = [], 0, False
    for group, size in network.op[value].parts:
        if group is not None and group in kept:
            spread = size // network.groups[group].width
            part = (kept[group][:, None] * spread + torch.arange(spread)).flatten()
            lost = True
        else:
            part = torch.arange(size)
        indices.append(part + offset)
        offset += size
    return torch.cat(indices) if lost else None

"""What modules with weights do to the labels of channels: ``RULES``, by type of module."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .ties import FIXED, core

if TYPE_CHECKING:
    from .labels import Labels

# (the labels so far, name of the module, module, labels of its input, its output) -> labels
Rule = Callable[["Labels", str, Any, Tensor, Any], Any]


def _along(labels: Tensor, axis: int, like: Tensor) -> Tensor:
    """Labels of channels, [size], as those of a value shaped as ``like``."""
    shape = [1] * like.ndim
    shape[axis] = -1
    return labels.reshape(shape).expand(like.shape)


def _across(module: Any, x: Tensor, axis: int) -> bool:
    """Whether a layer that reads ``x`` along ``axis`` runs once for each of the channels, that lie
    along other axes: as the layers of an MLP-Mixer that mix tokens (Tolstikhin et al. 2021)."""
    shape = core(x).shape
    apart = isinstance(module, nn.Linear) or (
        module.groups == 1
        and all(n == 1 for n in (*module.kernel_size, *module.stride))
        and not any(module.padding)
    )
    return apart and shape[axis] == 1 < x.shape[axis] and any(n > 1 for n in shape)


def _layer(axis: int) -> Rule:
    def rule(t: "Labels", name: str, module: Any, x: Tensor, result: Tensor) -> Tensor:
        if _across(module, x, axis) and not (name in t.makes and t.makes[name].any()):
            t.makes[name] = torch.tensor(FIXED).expand(result.shape[axis])
            t.reads[name] = torch.tensor(FIXED).expand(x.shape[axis])
            return x.narrow(axis, 0, 1).expand(result.shape)
        channels, groups = t.channels(x, axis), getattr(module, "groups", 1)
        if name not in t.makes:
            t.makes[name] = t.ties.fresh(result.shape[axis])
            t.reads[name] = channels
        made = t.makes[name]
        t.ties.tie(t.reads[name], channels)
        if groups == len(channels) > 1:  # depthwise: each channel makes its own
            t.ties.tie(made.reshape(groups, -1), channels[:, None])
        else:
            inside = channels.reshape(groups, -1)  # the same go from every group of a convolution
            for parts in (inside, made.reshape(groups, -1)):
                t.ties.tie(parts, parts[:1])
            t.slot(name, module, "weight", 1, inside[0])
        for attribute in ("weight", "bias"):
            t.slot(name, module, attribute, 0, made)
        return _along(made, axis, result)

    return rule


def _norm(axis: int) -> Rule:
    def rule(t: "Labels", name: str, module: Any, x: Tensor, result: Tensor) -> Tensor:
        if math.prod(getattr(module, "normalized_shape", ())[:-1]) != 1:
            t.give_up([x], None)  # normalised over positions too
        channels = t.channels(x, axis)
        if isinstance(module, nn.GroupNorm):  # the same go from every group
            parts = channels.reshape(module.num_groups, -1)
            t.ties.tie(parts, parts[:1])
        for attribute in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(module, attribute, None)
            if tensor is not None and tensor.shape == channels.shape:
                t.slot(name, module, attribute, 0, channels)
        return _along(channels, axis, result)

    return rule


def _embedding(t: "Labels", name: str, module: Any, x: Tensor, result: Tensor) -> Tensor:
    t.ties.fix(x)
    made = t.ties.fresh(result.shape[-1])
    t.slot(name, module, "weight", 1, made)
    return _along(made, -1, result)


def _transposed(t: "Labels", name: str, module: Any, x: Tensor, result: Tensor) -> Tensor:
    """Its weight is [in, out / groups, ...]."""
    channels = t.channels(x, 1)
    if name not in t.makes:
        t.makes[name] = t.ties.fresh(result.shape[1])
    made = t.makes[name]
    if module.groups == 1:
        t.slot(name, module, "weight", 1, made)
    elif module.groups == len(channels):  # depthwise: each channel makes its own
        t.ties.tie(made.reshape(module.groups, -1), channels[:, None])
    else:
        t.give_up([channels, made], None)
    t.slot(name, module, "weight", 0, channels)
    t.slot(name, module, "bias", 0, made)
    return _along(made, 1, result)


def _recurrent(t: "Labels", name: str, module: Any, x: Tensor, result: Any) -> Any:
    """What a recurrent layer reads may go; its own states, which it reads again, stay."""
    channels = t.channels(x, -1)
    for attribute in ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse"):
        t.slot(name, module, attribute, 1, channels)
    return t.give_up([], result)


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RULES: dict[Any, Rule] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _layer(1)),
    nn.Linear: _layer(-1),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _norm(1)),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d), _norm(1)),
    **dict.fromkeys((nn.GroupNorm, nn.PReLU), _norm(1)),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), _norm(-1)),
    nn.Embedding: _embedding,
    **dict.fromkeys((nn.RNN, nn.GRU, nn.LSTM), _recurrent),
    **dict.fromkeys((nn.RNNCell, nn.GRUCell, nn.LSTMCell), _recurrent),
    **dict.fromkeys(TRANSPOSED, _transposed),
}  # fmt: skip

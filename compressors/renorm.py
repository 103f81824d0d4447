"""Norms come back for quantization-aware training, and are folded again after it.

What is deployed has its norms folded, but without them a network does not bear the learning rates
it was trained with. Rounding weights to a step for each output channel commutes with a factor for
each: when a norm behind a rounded layer is folded, its integers stay what they were and only the
steps change. So the student trains with the statistics of its batches (as Jacob et al. 2018 do,
sec. 3.2) and is exactly what is deployed once they stand still.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..spaces import Network
from .data import Items
from .prune import call
from .quantize import QuantizedLayer

LEAST = 1e-4  # factor of a norm below which its channel is dead, and nothing to go by
TINIEST = 1e-12  # a scale is never 0


@torch.no_grad()
def restore_norms(
    graph: fx.GraphModule, student: fx.GraphModule, network: Network, items: Items
) -> dict[str, str]:
    """Puts a norm behind every layer of the quantized ``graph`` that took one in, in place.

    Layer and norm share what they do as those of ``student`` do, which is in float with the norms
    that were folded, so that training goes on as it was. Statistics are those of ``items``; the
    answers stay. Returns the norm of each layer, for ``fold_again``. Layers that run several times
    or share a norm stay as they are, and those whose norm never moves (momentum 0).
    """
    shared = list(network.folded.values())
    norms = {
        name: norm
        for name, norm in network.folded.items()
        if shared.count(norm) == 1
        and len(network.uses[name]) == 1
        and _norm(student, norm).momentum != 0
    }
    moments = _output_moments(graph, list(norms), items)
    for name, norm_name in norms.items():
        layer, old = _layer(graph, name), _norm(student, norm_name)
        gain: Any = 1.0 if old.weight is None else old.weight.abs()
        factor = gain / (old.running_var + old.eps).sqrt()  # [out_channels]
        factor = torch.where(factor > LEAST, factor, 1.0)
        _scale(graph.get_submodule(name), 1 / factor)
        mean, variance = moments[name]
        bias = torch.zeros_like(mean) if layer.bias is None else layer.bias
        norm: Any = type(old)(len(mean), eps=old.eps, momentum=old.momentum)
        norm.running_mean.copy_((mean - bias) / factor)
        norm.running_var.copy_(variance / factor**2)
        norm.weight.copy_((norm.running_var + norm.eps).sqrt() * factor)
        norm.bias.copy_(mean)
        layer.bias = None
        graph.set_submodule(norm_name, norm.eval())
    return norms


@torch.no_grad()
def fold_again(graph: fx.GraphModule, norms: dict[str, str]) -> None:
    """Folds what ``restore_norms`` put there, in place. Biases are to be settled after it."""
    for name, norm_name in norms.items():
        layer, norm = _layer(graph, name), _norm(graph, norm_name)
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()  # [out_channels]
        _scale(graph.get_submodule(name), factor)
        layer.bias = nn.Parameter(norm.bias - norm.running_mean * factor)
        graph.set_submodule(norm_name, nn.Identity())


def _scale(module: Any, factor: Tensor) -> None:
    """Multiplies the weights of a layer by ``factor`` [out_channels]; its integers stay."""
    layer = module
    if isinstance(module, QuantizedLayer):
        layer = module.layer
        module.scale.mul_(factor.abs()).clamp_min_(TINIEST)
    layer.weight.mul_(factor.reshape(-1, *[1] * (layer.weight.ndim - 1)))


def _norm(graph: fx.GraphModule, name: str) -> Any:
    return graph.get_submodule(name)


def _layer(graph: fx.GraphModule, name: str) -> Any:
    module = graph.get_submodule(name)
    return module.layer if isinstance(module, QuantizedLayer) else module


@torch.no_grad()
def _output_moments(
    graph: fx.GraphModule, names: list[str], items: Items
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of each channel of what the layers ``names`` answer, [channels] each."""
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            rows = output.transpose(0, 1).flatten(1).double()  # [channels, values]
            count, total, square = sums.get(name, (0, 0.0, 0.0))
            sums[name] = (count + rows.shape[1], total + rows.sum(1), square + (rows**2).sum(1))

        return hook

    graph.eval()
    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(graph.get_submodule(name).register_forward_hook(watch(name)))
        for batch in items.chunks():
            call(graph, batch.inputs)
    found = {}
    for name, (count, total, square) in sums.items():
        mean = total / count
        found[name] = (mean.float(), (square / count - mean**2).clamp_min(0).float())
    return found

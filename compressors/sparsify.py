"""Single weights: magnitude masks. The zeros themselves are the mask."""

from typing import cast

import torch
from torch import Tensor, nn

from ..spaces import Network
from ..spaces.operations import LAYERS


@torch.no_grad()
def sparsify_(model: nn.Module, network: Network, sparsity: float) -> None:
    """Sets the share ``sparsity`` of the weights of every layer to 0, in place: the smallest.

    Han et al. 2015, "Learning both weights and connections for efficient neural networks".
    """
    for name in network.layers:
        weight = model.get_parameter(f"{name}.weight")
        gone = int(sparsity * weight.numel())
        stays = torch.ones(weight.numel(), dtype=torch.bool)
        stays[weight.abs().flatten().topk(gone, largest=False).indices] = False
        weight.mul_(stays.reshape(weight.shape))


def masks(model: nn.Module) -> dict[Tensor, Tensor]:
    """For every weight of a layer that has zeros: where it has none."""
    layers = (m for m in model.modules() if isinstance(m, tuple(LAYERS)))
    weights = [cast(Tensor, layer.weight) for layer in layers]
    return {w: w != 0 for w in weights if not w.all()}

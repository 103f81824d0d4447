"""Single weights: magnitude masks. The zeros themselves are the mask."""

import torch
from torch import Tensor, nn

from ..spaces import Network


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
    """For every weight with more than one axis that has zeros: where it has none."""
    weights = (p for p in model.parameters() if p.ndim > 1)
    return {p: p != 0 for p in weights if not p.all()}

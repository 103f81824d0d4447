"""Ranges for quantizers: from the extremes, a percentile, or the least squared error."""

from collections.abc import Callable

import torch
from torch import Tensor

BINS = 2048
PERCENTILE = 99.99  # of the values; what lies beyond is clipped


class Observer:
    """Sees all values of a tensor: first its extremes, then (``counting``) its histogram."""

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")
        self.counting = False
        self.counts = torch.zeros(BINS)

    def see(self, x: Tensor) -> None:
        if self.counting:
            if self.high > self.low:
                self.counts += torch.histc(x.detach().float(), BINS, self.low, self.high)
        else:
            self.low = min(self.low, x.min().item())
            self.high = max(self.high, x.max().item())

    @property
    def centres(self) -> Tensor:  # [BINS]
        width = (self.high - self.low) / BINS
        return self.low + width * (torch.arange(BINS) + 0.5)


def _minmax(seen: Observer) -> tuple[float, float]:
    return seen.low, seen.high


def _percentile(seen: Observer) -> tuple[float, float]:
    total = seen.counts.sum()
    if not total:
        return seen.low, seen.high
    share = seen.counts.cumsum(0) / total
    width = (seen.high - seen.low) / BINS
    top = int((share < PERCENTILE / 100).sum())
    bottom = int((share <= 1 - PERCENTILE / 100).sum())
    return seen.low + width * bottom, seen.low + width * (min(top, BINS - 1) + 1)


def _least_squares(seen: Observer) -> tuple[float, float]:
    """Shrinks the range towards zero as long as rounding gains more than clipping loses."""
    if not seen.counts.sum():
        return seen.low, seen.high
    best, bounds = float("inf"), (seen.low, seen.high)
    x = seen.centres
    for ratio in torch.linspace(1.0, 0.3, 71).tolist():
        low, high = min(seen.low * ratio, 0.0), max(seen.high * ratio, 0.0)
        scale = max(high - low, 1e-8) / 255
        zero = round(-low / scale)
        rounded = (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale
        error = float((seen.counts * (rounded - x) ** 2).sum())
        if error < best:
            best, bounds = error, (low, high)
    return bounds


ACTIVATION_RANGES: dict[str, Callable[[Observer], tuple[float, float]]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "mse": _least_squares,
}


@torch.no_grad()
def weight_scale(weight: Tensor, limit: int, calibration: str) -> Tensor:
    """The scale of each output channel, [out_channels]; integers run from -limit to limit.

    Weights are few and all of them matter: percentile has no meaning for them, so only "mse"
    differs from the largest magnitude.
    """
    rows = weight.flatten(1)
    largest = rows.abs().amax(1).clamp_min(1e-8)
    scale = largest / limit
    if calibration != "mse":
        return scale.float()
    best = torch.full_like(largest, float("inf"))
    out = scale.clone()
    for ratio in torch.linspace(1.0, 0.5, 51).tolist():
        tried = (scale * ratio)[:, None]
        error = ((torch.round(rows / tried).clamp(-limit, limit) * tried - rows) ** 2).sum(1)
        better = error < best
        best, out = torch.where(better, error, best), torch.where(better, tried[:, 0], out)
    return out.float()

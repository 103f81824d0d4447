"""Ranges for quantizers: from the extremes, a percentile, or the least squared error."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

BINS = 2_048  # on each side of 0
PERCENTILE = 99.99  # of the values; what lies beyond is clipped
MARGIN = 1.5  # reach of the histogram at the first batch: later ones seldom go beyond


class Observer:
    """Sees all values of a tensor, once: their extremes, and a histogram unless told otherwise.

    The histogram reaches from -reach to reach. When a value lies beyond, two bins become one and
    the reach doubles, so that nobody has to know the extremes beforehand.
    """

    def __init__(self, counting: bool = True) -> None:
        self.low, self.high = float("inf"), float("-inf")
        self.counting = counting
        self.reach = 0.0
        self.counts = torch.zeros(2 * BINS, dtype=torch.float64)

    def see(self, x: Tensor) -> None:
        x = x.detach().flatten()
        low, high = x.aminmax()  # NaN, once seen, stays: min() would forget it
        self.low = torch.minimum(torch.tensor(self.low), low).item()
        self.high = torch.maximum(torch.tensor(self.high), high).item()
        if not self.counting or not math.isfinite(self.high - self.low):
            return
        largest = max(-low.item(), high.item())
        self.reach = self.reach or MARGIN * largest
        while largest > self.reach:
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts = F.pad(pairs, (BINS // 2, BINS // 2))
            self.reach *= 2
        # A fifth of the time that torch.histc takes.
        places = (x * (BINS / self.reach) + BINS if self.reach else torch.full_like(x, BINS)).int()
        self.counts += torch.bincount(places.clamp_(0, 2 * BINS - 1), minlength=2 * BINS)

    @property
    def edges(self) -> Tensor:
        """The edges of the bins, [2 * BINS + 1] float64."""
        return torch.linspace(-self.reach, self.reach, 2 * BINS + 1, dtype=torch.float64)


def _minmax(seen: Observer) -> tuple[float, float]:
    return seen.low, seen.high


def _percentile(seen: Observer) -> tuple[float, float]:
    share = seen.counts.cumsum(0) / seen.counts.sum()
    top = int((share < PERCENTILE / 100).sum()) + 1
    bottom = int((share <= 1 - PERCENTILE / 100).sum())
    edges = seen.edges
    return max(edges[bottom].item(), seen.low), min(edges[top].item(), seen.high)


def _least_squares(seen: Observer) -> tuple[float, float]:
    """Shrinks the range towards zero as long as rounding gains more than clipping loses."""
    some = seen.counts > 0
    x = ((seen.edges[1:] + seen.edges[:-1]) / 2)[some]
    ratios = torch.linspace(1.0, 0.3, 71, dtype=torch.float64)[:, None]  # [71, 1]
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    scale = ratios * max(high - low, 1e-8) / 255
    zero = torch.round(-low * ratios / scale)
    rounded = (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale  # [71, bins]
    ratio = ratios[((rounded - x) ** 2 @ seen.counts[some]).argmin()].item()
    return low * ratio, high * ratio


ACTIVATION_RANGES: dict[str, Callable[[Observer], tuple[float, float]]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "mse": _least_squares,
    "fitted": _minmax,  # of channels made alike, for weights and biases fitted afterwards
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

"""What a task's output is, as its loss says: it decides how two networks' answers are compared."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LEAST = 1e-7  # probability whose logarithm is taken
SAME = 1e-3  # relative difference of what is the same but for rounding
ROUNDED = 1e-6  # deviation, as a share of the answers' size, of what is constant but for rounding
DRAWS = 3  # of noise: one may leave a loss where it was by chance


@dataclass(frozen=True)
class OutputKind:
    """Scores of classes along ``axis``; where that is None logits of labels that may all be true,
    or quantities.

    probabilities: whether scores or logits are given as the probabilities that they stand for.
    labels: whether it is labels. variance: of quantities, as it broadcasts over an output: each
    channel's own, so that a price counts no more than a share.
    """

    axis: int | None = -1
    probabilities: bool = False
    labels: bool = False
    variance: Tensor = field(default=torch.ones(()), compare=False)

    def scores(self, output: Tensor) -> Tensor:
        """``output`` with its classes last, their softmax the probabilities: [..., classes]; or
        logits of labels, shaped as they are."""
        if self.axis is None:
            return output.clamp(LEAST, 1 - LEAST).logit() if self.probabilities else output
        scores = output.movedim(self.axis, -1)
        return scores.clamp(LEAST).log() if self.probabilities else scores

    def same(self, output: Tensor, other: Tensor, step: float) -> Tensor:
        """Where two networks predict the same: the class, what is true, or a quantity within
        ``step``."""
        if self.labels:
            least = 0.5 if self.probabilities else 0.0
            return (output > least) == (other > least)
        if self.axis is None:
            return (output - other).abs() <= step
        return output.argmax(self.axis) == other.argmax(self.axis)


CLASSES = OutputKind()


def kind_of(loss: Callable[[Tensor, Any], Tensor], output: Tensor, target: Any) -> OutputKind:
    """The kind of ``output`` [N, ...], the teacher's answers, as ``loss`` reads them.

    Classes lie along the axis where probabilities sum to 1, or where a constant added to all scores
    changes no loss, as softmax has it. Labels have a loss like a sigmoid's cross-entropy, or one
    that takes nothing but probabilities. Everything else are quantities: what is regressed, pixels.
    """
    axes = [a for a in range(1, output.ndim) if output.shape[a] > 1]
    for axis in axes:
        if output.min() >= 0 and _ones(output.sum(axis)):
            return OutputKind(axis, probabilities=True)
        if _ones(output.logsumexp(axis).exp()):
            return OutputKind(axis)
    generator = torch.Generator().manual_seed(0)
    scale = output.std(correction=0) + output.abs().mean() + LEAST

    def change(shape: list[int]) -> float:
        """How far the loss moves when noise of ``shape`` is added to all answers."""
        noise = [scale * torch.randn(shape, generator=generator) for _ in range(DRAWS)]
        losses = [float(loss(output + part, target)) for part in noise]
        return max(abs(value - before) for value in losses)

    before = float(loss(output, target))
    try:
        most = change(list(output.shape))
        for axis in axes:
            if change([1 if a == axis else n for a, n in enumerate(output.shape)]) <= SAME * most:
                return OutputKind(axis)
        if _is_logistic(loss, output, target):
            return OutputKind(None, labels=True)
    except Exception:  # the user's: it takes no output that the model does not give
        if output.min() >= 0 and output.max() <= 1:  # F.binary_cross_entropy
            return OutputKind(None, probabilities=True, labels=True)
    return OutputKind(None, variance=_variance(output))


def _variance(output: Tensor) -> Tensor:
    """The variance of each channel of ``output`` [N, ...], as it broadcasts over it; of one that
    is constant, which has no scale of its own, the mean of all.

    Channels lie along axis 1, as in [N, D] and [N, C, H, W]. With three axes it may be [N, C, T] or
    [N, T, D]: they lie where variances differ more.
    """
    if output.ndim < 2:
        return _variance(output[:, None]).squeeze()
    exact = output.double()
    least = ROUNDED**2 * exact.square().mean()

    def along(axis: int) -> Tensor:
        others = [a for a in range(output.ndim) if a != axis]
        found = exact.var(others, correction=0, keepdim=True)
        return torch.where(found > least, found, found.mean().clamp_min(LEAST))

    axes = (1, 2) if output.ndim == 3 else (1,)
    return max(map(along, axes), key=lambda v: (v.max() / v.min()).item()).float()


def _is_logistic(loss: Callable[[Tensor, Any], Tensor], output: Tensor, target: Any) -> bool:
    """Whether the gradient of ``loss`` is that of cross-entropies of sigmoids: the same far out,
    and at 0 halfway between both ends."""

    def slope(at: float) -> Tensor:
        with torch.enable_grad():
            place = torch.full_like(output, at).requires_grad_()
            return torch.autograd.grad(loss(place, target), place)[0]

    low, lower, high, higher, middle = map(slope, (-50.0, -100.0, 50.0, 100.0, 0.0))
    least = SAME * (high - low).abs().max()
    pairs = ((low, lower), (high, higher), (middle, (low + high) / 2))
    return bool(least > 0) and all(bool(((a - b).abs() <= least).all()) for a, b in pairs)


def _ones(sums: Tensor) -> bool:
    return bool((sums - 1).abs().max() <= SAME)

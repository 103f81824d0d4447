"""Distillation: the student learns from the teacher's softened answers and from the labels."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..spaces import Distill, Impossible
from .data import Items
from .prune import call

WARM_UP = 0.15  # share of the steps in which the learning rate rises
CLIP = 5.0  # norm of the gradient


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training data sees: items and the teacher's answers to them."""

    items: Items
    answers: Tensor  # [N, ...]


def kl_divergence(output: Tensor, answer: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(teacher || student) of softened answers, times T^2 (Hinton et al. 2015, sec. 2)."""
    student = F.log_softmax(output / temperature, -1).flatten(0, -2)  # [n, classes]
    teacher = F.log_softmax(answer / temperature, -1).flatten(0, -2)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def distill(
    student: nn.Module,
    epochs: Callable[[int], Epoch],
    count: float,
    settings: Distill,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    peak: float,
    batch: int,
    seed: int,
    first: int = 0,
    train_norms: bool = True,
) -> int:
    """Trains ``student`` in place for ``count`` epochs, beginning with the data of epoch ``first``.

    SGD with momentum on alpha * KL + (1 - alpha) * loss; the learning rate rises to ``peak`` and
    falls as a cosine. Returns the number of samples seen. Raises Impossible when it diverges.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    size = len(epochs(first).items)
    total = max(1, round(count * max(1, size // batch)))
    optimizer = torch.optim.SGD(parameters, peak, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total))
    student.train(train_norms)
    samples = 0
    for items, answers in _steps(epochs, first, total, batch, seed):
        output = call(student, items.inputs)
        hard = loss(output, items.targets) if settings.alpha < 1 else output.sum() * 0
        soft = kl_divergence(output, answers, settings.temperature)
        value = settings.alpha * soft + (1 - settings.alpha) * hard
        if not torch.isfinite(value):
            raise Impossible(
                f"distillation diverged after {samples} samples: the loss is {value.item()} at "
                f"learning rate {settings.learning_rate:g}"
            )
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        samples += len(items)
    student.eval()
    return samples


def _rate(step: int, total: int) -> float:
    rise = max(1, round(WARM_UP * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def _steps(
    epochs: Callable[[int], Epoch], first: int, total: int, batch: int, seed: int
) -> Iterator[tuple[Items, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    number, done = first, 0
    while True:
        epoch = epochs(number)
        batch = min(batch, len(epoch.items))
        order = torch.randperm(len(epoch.items), generator=generator)
        for start in range(0, len(order) - batch + 1, batch):
            index = order[start : start + batch]
            yield epoch.items.take(index), epoch.answers[index]
            done += 1
            if done == total:
                return
        number += 1



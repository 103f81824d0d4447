"""Distillation: the student learns from the teacher's softened answers and from the labels."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..spaces import Distill, Impossible, nearest
from .data import Items
from .mixed import mixed
from .outputs import CLASSES, OutputKind
from .parity import run_module
from .prune import call
from .sparsify import masks

WARM_UP = 0.15  # share of the steps in which the learning rate rises
CLIP = 5.0  # norm of the gradient
LAST = 10  # steps whose mean loss says where training stands
HOPELESS = 10.0  # times the loss of a student that has learned nothing: training stops at once
CPU = torch.device("cpu")


class Diverged(Impossible):
    """Training led nowhere. samples: how many were seen by then."""

    def __init__(self, samples: int, settings: Distill, what: str) -> None:
        self.samples = samples
        super().__init__(
            f"distillation diverged after {samples} samples: {what} at learning rate "
            f"{settings.learning_rate:g}"
        )


@dataclass(frozen=True)
class Asked:
    """The answers of ``teacher`` to ``items``, worked out when they are read."""

    teacher: nn.Module
    items: Items

    def __getitem__(self, index: Tensor) -> Tensor:
        return run_module(self.teacher, self.items.take(index))


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training data sees: items and the teacher's answers to them."""

    items: Items
    answers: Tensor | Asked  # [N, ...]


def kl_divergence(
    output: Tensor, answer: Tensor, temperature: float = 1.0, kind: OutputKind = CLASSES
) -> Tensor:
    """Mean KL(teacher || student) of softened answers, times T^2 (Hinton et al. 2015, sec. 2).

    Of logits of labels the sum over the labels of an item (axis 1) of what each label has, not
    softened (Yang et al. 2023, "Multi-label knowledge distillation"). Of quantities that between
    normal distributions around them, of the variance that the teacher's answers have: the squared
    error, in units that any output has.
    """
    if kind.labels:
        # A softmax shares one probability out whatever the temperature. Softened sigmoids all come
        # near to 1/2: of CREPE's 360 bins those that both networks rule out then made the gradient
        # 150 times as long at temperature 4, and training drove the student away from the teacher.
        ours, theirs = kind.scores(output), kind.scores(answer)
        chance = theirs.sigmoid()
        each = chance * (F.logsigmoid(theirs) - F.logsigmoid(ours))
        each = each + (1 - chance) * (F.logsigmoid(-theirs) - F.logsigmoid(-ours))
        return (each if each.ndim < 2 else each.sum(1)).mean()
    if kind.axis is None:
        variance = kind.variance.to(output.device)
        return ((output - answer).square() / (2 * variance)).mean()
    pair = (kind.scores(x) / temperature for x in (output, answer))
    student, teacher = (x.log_softmax(-1).flatten(0, -2) for x in pair)  # [n, classes]
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def decoupled(
    output: Tensor,
    answer: Tensor,
    temperature: float,
    kind: OutputKind = CLASSES,
    beta: float = 4.0,
) -> Tensor:
    """Zhao et al. 2022, "Decoupled knowledge distillation", eq. 7: target class against the rest,
    plus ``beta`` times the rest among itself. The target is the teacher's first choice. Raises
    Impossible where the output are quantities."""
    if kind.axis is None:
        raise Impossible("the loss 'decoupled' compares classes, but this output has none")
    pair = (kind.scores(x) / temperature for x in (output, answer))
    ours, theirs = (x.flatten(0, -2) for x in pair)  # [n, classes]
    target = F.one_hot(theirs.argmax(-1), theirs.shape[-1]).bool()

    def apart(logits: Tensor) -> tuple[Tensor, Tensor]:  # [n, 2], [n, classes]
        rest = logits.masked_fill(target, -1e4)
        two = torch.stack([logits[target], rest.logsumexp(-1)], -1)
        return two.log_softmax(-1), rest.log_softmax(-1)

    pairs = zip(apart(ours), apart(theirs), strict=True)
    among = [F.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in pairs]
    return (among[0] + beta * among[1]) * temperature**2


# (student's answers, teacher's, temperature, what they are) -> a scalar. At equal cost hints,
# attention transfer and relations beat KL on no network (docs/ablation.md).
LOSSES: dict[str, Callable[[Tensor, Tensor, float, OutputKind], Tensor]] = {
    "kl": kl_divergence,
    "decoupled": decoupled,
}


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
    first: float = 0.0,
    cycle: tuple[float, float] | None = None,
    hold_zeros: bool = False,
    device: torch.device = CPU,
    halves: bool = False,
    kind: OutputKind = CLASSES,
) -> int:
    """Trains ``student`` in place for ``count`` epochs, going on where ``first`` epochs end.

    SGD with momentum on alpha * (what the policy's loss asks) + (1 - alpha) * loss; the learning
    rate rises to ``peak`` and falls as a cosine. cycle: the epoch where that begins and how many it
    takes, if this training is only a part of it. hold_zeros: weights that are 0 stay 0. device:
    where the student trains; halves: whether it multiplies in bfloat16. kind: what the student's
    output is. Returns the number of samples seen. Raises Diverged.
    """
    if settings.loss not in LOSSES:
        raise Impossible(f"no loss {settings.loss!r}; {nearest(settings.loss, LOSSES)}")
    soft = LOSSES[settings.loss]
    student.to(device)
    parameters = [p for p in student.parameters() if p.requires_grad]
    if not parameters:  # buffers alone
        student.to(CPU)
        return 0
    holds = masks(student) if hold_zeros else {}

    def objective(output: Tensor, items: Items, answers: Tensor) -> Tensor:
        value = torch.zeros((), device=output.device)
        if settings.alpha > 0:
            value = settings.alpha * soft(output, answers, settings.temperature, kind)
        if settings.alpha < 1:
            value = value + (1 - settings.alpha) * loss(output, items.targets)
        return value

    optimizer = torch.optim.SGD(parameters, peak, momentum=0.9, nesterov=True, weight_decay=5e-4)
    _train_mode(student)
    samples, seen, top = 0, [], 0.0
    for rate, items, answers in _steps(epochs, first, count, batch, seed, cycle):
        items, answers = items.to(device), answers.to(device)
        for group in optimizer.param_groups:
            group["lr"] = peak * rate
        with mixed(device, halves):
            output = call(student, items.inputs)
        output = output.float()
        value = objective(output, items, answers)
        seen.append(value.item())
        if not math.isfinite(seen[-1]):
            raise Diverged(samples, settings, f"the loss is {seen[-1]}")
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        with torch.no_grad():
            for weight, stays in holds.items():
                weight.mul_(stays)
        samples += len(items)
        top = seen[0]
        if _mean(seen) > top:
            # That of a student that has learned nothing and gives the same answer to everything.
            top = max(top, objective(torch.zeros_like(output), items, answers).item())
        if _mean(seen) - top > (HOPELESS - 1) * abs(top):  # a loss may be below 0
            break
    if _mean(seen) > top:
        what = f"the loss rose from {seen[0]:.3g} to {_mean(seen):.3g}"
        raise Diverged(samples, settings, what)
    if not all(torch.isfinite(p).all() for p in parameters):  # by the last step: no loss saw it
        raise Diverged(samples, settings, "weights are infinite or NaN")
    student.eval().to(CPU)
    return samples


def _train_mode(student: nn.Module) -> None:
    student.train()
    for module in student.modules():
        # With momentum 0 statistics never move: training on those of the batch would part the
        # student that is trained from the one that is deployed.
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum == 0:
            module.eval()


def _mean(values: list[float]) -> float:
    return sum(values[-LAST:]) / len(values[-LAST:])


def _rate(step: int, total: int) -> float:
    """The learning rate at ``step`` of ``total`` as a share of its peak, never 0."""
    rise = max(1, round(WARM_UP * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def _steps(
    epochs: Callable[[int], Epoch],
    first: float,
    count: float,
    batch: int,
    seed: int,
    cycle: tuple[float, float] | None = None,
) -> Iterator[tuple[float, Items, Tensor]]:
    """For ``count`` epochs: the share of the learning rate, a batch and the teacher's answers.

    Every epoch has an order of its own, so that training in pieces sees what training in one
    piece would. The incomplete batch at the end of an epoch is left out.
    """
    epoch, number = epochs(int(first)), int(first)
    size = len(epoch.items)
    batch = min(batch, size)
    each = size // batch  # steps of an epoch
    begin, total = round(first * each), max(1, round(count * each))
    start, length = begin, total
    if cycle:
        start, length = round(cycle[0] * each), max(1, round(cycle[1] * each))
    order = torch.empty(0)
    for step in range(begin, begin + total):
        if step // each != number:
            number = step // each
            epoch = epochs(number)
        if step % each == 0 or step == begin:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            order = torch.randperm(size, generator=generator)
        index = order[step % each * batch :][:batch]
        yield _rate(step - start, length), epoch.items.take(index), epoch.answers[index]

"""What a student learns from its teacher, beside the labels. One contract: ``Loss``."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..spaces import Network


@dataclass(frozen=True)
class Seen:
    """A network's answer to a batch, [N, ..., classes], and the values inside that are matched."""

    output: Tensor
    values: Mapping[str, Tensor] = field(default_factory=dict)


# (student, teacher, temperature) -> a scalar
Loss = Callable[[Seen, Seen, float], Tensor]


def kl_divergence(output: Tensor, answer: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(teacher || student) of softened answers, times T^2 (Hinton et al. 2015, sec. 2)."""
    student = F.log_softmax(output / temperature, -1).flatten(0, -2)  # [n, classes]
    teacher = F.log_softmax(answer / temperature, -1).flatten(0, -2)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def kl(student: Seen, teacher: Seen, temperature: float) -> Tensor:
    return kl_divergence(student.output, teacher.output, temperature)


def decoupled(student: Seen, teacher: Seen, temperature: float, beta: float = 4.0) -> Tensor:
    """Zhao et al. 2022, "Decoupled knowledge distillation", eq. 7: target class against the rest,
    plus ``beta`` times the rest among itself. The target is the teacher's first choice."""
    ours = (student.output / temperature).flatten(0, -2)  # [n, classes]
    theirs = (teacher.output / temperature).flatten(0, -2)
    target = F.one_hot(theirs.argmax(-1), theirs.shape[-1]).bool()

    def two(logits: Tensor) -> Tensor:  # log of (target, the rest), [n, 2]
        rest = logits.masked_fill(target, -math.inf).logsumexp(-1)
        return torch.stack([logits[target], rest], -1).log_softmax(-1)

    def rest(logits: Tensor) -> Tensor:
        return logits.masked_fill(target, -1e4).log_softmax(-1)

    how: Any = {"reduction": "batchmean", "log_target": True}
    tckd = F.kl_div(two(ours), two(theirs), **how)
    nckd = F.kl_div(rest(ours), rest(theirs), **how)
    return (tckd + beta * nckd) * temperature**2


def _positions(value: Tensor) -> Tensor:
    """[N, positions, channels] of a feature map [N, C, ...] or a sequence [N, T, C]."""
    return value if value.ndim == 3 else value.flatten(2).transpose(1, 2)


def attention_transfer(student: Seen, teacher: Seen, temperature: float, w: float = 10.0) -> Tensor:
    """Zagoruyko & Komodakis 2017, eq. 2: where the squares over channels are large."""

    def attention(value: Tensor) -> Tensor:
        return F.normalize(_positions(value).square().mean(-1), dim=-1)  # [N, positions]

    total = kl(student, teacher, temperature)
    for name, value in student.values.items():
        apart = attention(value) - attention(teacher.values[name])
        total = total + w * apart.square().sum(-1).mean()
    return total


def relations(student: Seen, teacher: Seen, temperature: float, w: float = 1.0) -> Tensor:
    """Wang et al. 2020, "MiniLM", eq. 8, on hidden states: how positions relate to each other."""

    def relate(value: Tensor) -> Tensor:
        x = _positions(value)
        x = F.layer_norm(x, x.shape[-1:])
        return (x @ x.transpose(1, 2) / math.sqrt(x.shape[-1])).log_softmax(-1).flatten(0, 1)

    name, value = list(student.values.items())[-1]  # of the last layer, as in the paper
    apart = F.kl_div(
        relate(value), relate(teacher.values[name]), reduction="batchmean", log_target=True
    )
    return kl(student, teacher, temperature) + w * apart


class Hints(nn.Module):
    """Romero et al. 2015, "FitNets", eq. 3: the student's values, projected, are the teacher's."""

    def __init__(self, student: Seen, teacher: Seen, w: float = 1.0) -> None:
        super().__init__()
        self.weight = w
        self.projections = nn.ModuleDict(
            {
                name: nn.Linear(
                    _positions(value).shape[-1], _positions(teacher.values[name]).shape[-1]
                )
                for name, value in student.values.items()
            }
        )

    def forward(self, student: Seen, teacher: Seen, temperature: float) -> Tensor:
        total = kl(student, teacher, temperature)
        for name, value in student.values.items():
            theirs = _positions(teacher.values[name])
            apart = self.projections[name](_positions(value)) - theirs
            total = total + self.weight * apart.square().mean() / theirs.var()
        return total


LOSSES: dict[str, Loss | type[Hints]] = {
    "kl": kl,
    "decoupled": decoupled,
    "hints": Hints,
    "attention": attention_transfer,
    "relations": relations,
}
NEED_VALUES = {"hints", "attention", "relations"}


def matched(student: fx.GraphModule, teacher: Network) -> list[str]:
    """The values that both have: of each resolution the last residual add, else the last layer."""
    known = {node.name for node in student.graph.nodes}
    found: dict[tuple[int, ...], tuple[bool, str]] = {}
    for op in teacher.ops:
        if op.name not in known or op.name == teacher.output or len(op.shape) < 3:
            continue
        add = op.kind == "add"
        if not add and op.kind not in ("conv", "linear"):
            continue
        where = (*op.shape[1 : op.axis], *op.shape[op.axis + 1 :])
        if add or not found.get(where, (False, ""))[0]:
            found[where] = (add, op.name)
    return [name for _, name in found.values()]


def tapped(graph: fx.GraphModule, names: list[str]) -> fx.GraphModule:
    """``graph`` with the same modules, answering (output, {name: value})."""
    copied = fx.Graph()
    places: dict[fx.Node, fx.Node] = {}
    answer = copied.graph_copy(graph.graph, places)
    values = {node.name: places[node] for node in graph.graph.nodes if node.name in names}
    copied.output((answer, values))
    return fx.GraphModule(graph, copied)

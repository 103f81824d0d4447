"""Small networks for tests: ``make(name)`` gives a model and its example input."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.spaces import Network
from flyweight.spaces.tracing import trace


def image(channels: int = 3, size: int = 8) -> Tensor:
    return torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    """Two convolutions, flattened into two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 16, 3, padding=1)
        self.c2 = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.l1 = nn.Linear(24 * 2 * 2, 32)
        self.l2 = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c1(x))
        x = F.max_pool2d(F.relu(self.c2(x)), 2)
        return self.l2(F.relu(self.l1(x.flatten(1))))


class Mlp(nn.Module):
    """Linear layers, one with a norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 32)
        self.n = nn.BatchNorm1d(32)
        self.b = nn.Linear(32, 16)
        self.c = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.n(self.a(x)).relu()).relu())


class Separable(nn.Module):
    """An inverted residual (Sandler et al. 2018, "MobileNetV2") with ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(16, 48, 1), nn.BatchNorm2d(48), nn.ReLU6())
        self.depth = nn.Sequential(
            nn.Conv2d(48, 48, 3, padding=1, groups=48), nn.BatchNorm2d(48), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(48, 16, 1), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depth(self.expand(x)))
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    """Two branches side by side, and the input of both as a third."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left = nn.Conv2d(16, 24, 1)
        self.right = nn.Conv2d(16, 8, 3, padding=1)
        self.join = nn.Conv2d(48, 16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x)), x], dim=1)
        x = F.adaptive_avg_pool2d(torch.relu(self.join(x)), 1)
        return self.head(torch.flatten(x, 1))


class Quiet(nn.Module):
    """Dropout and identities, which a deployed network does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 1)
        self.none = nn.Identity()
        self.drop = nn.Dropout(0.5)
        self.b = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.none(self.drop(F.relu(self.a(x))))
        x = F.dropout(self.b(x), 0.5, self.training) + x
        return self.head(self.drop(x.mean((2, 3))))


class Two(nn.Module):
    """Two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 16)
        self.b = nn.Linear(4, 16)
        self.head = nn.Linear(32, 3)

    def forward(self, left: Tensor, right: Tensor, scale: float = 2.0, mask: Any = None) -> Tensor:
        x = torch.cat([torch.relu(self.a(left)), torch.relu(self.b(right))], dim=-1) * scale
        if mask is not None:
            x = x * mask
        return self.head(x)


class Sequence(nn.Module):
    """A feed-forward block on sequences; as many steps as channels, to tell the axes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 32, 16]
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


class PreActivation(nn.Module):
    """A norm and an activation behind an add, as in pre-activation residual networks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.c1 = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.c2 = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.norm(self.c1(x) + x))
        return self.head(self.c2(x).mean((2, 3)))


class Grouped(nn.Module):
    """A grouped convolution: what it makes and reads stays at full width."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 16, 3, padding=1)
        self.c2 = nn.Conv2d(16, 24, 1)
        self.grouped = nn.Conv2d(24, 32, 3, padding=1, groups=4)
        self.c3 = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c2(F.relu(self.c1(x))))
        return self.head(F.relu(self.c3(F.relu(self.grouped(x)))).mean((2, 3)))


class GroupNorm(nn.Module):
    """Channels normalised in groups: the width stays a multiple of their number."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 24, 3, padding=1)
        self.norm = nn.GroupNorm(6, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.c1(x))).mean((2, 3)))


class Gate(nn.Module):
    """Squeeze and excitation (Hu et al. 2018), the gate on the left of the product."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 8, 1)
        self.up = nn.Conv2d(8, 16, 1)
        self.c2 = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c1(x))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(F.relu(self.c2(gate * x)).mean((2, 3)))


class Fixed(nn.Module):
    """Channels that cannot go: added to the input, held as a number, given to other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(3, 3, 3, padding=1)  # + x
        self.number = nn.Conv2d(3, 16, 3, padding=1)  # view(-1, 16, 64)
        self.free = nn.Conv1d(16, 24, 1)
        self.last = nn.Conv1d(24, 16, 1)  # read by a transposed convolution
        self.other = nn.ConvTranspose1d(16, 16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.number(x + self.same(x)).view(-1, 16, 64)
        return self.head(self.other(self.last(F.relu(self.free(x)))).mean(2))


class Siamese(nn.Module):
    """Two branches with the same layers and norms; the answer compares them."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 16, 3, padding=1)
        self.n1 = nn.BatchNorm2d(16)
        self.c2 = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.head = nn.Linear(48, 4)

    def branch(self, x: Tensor) -> Tensor:
        return F.relu(self.c2(F.relu(self.n1(self.c1(x))))).mean((2, 3))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.branch(left), self.branch(right)
        return self.head(torch.cat([a, b], dim=1))


class Recurrent(nn.Module):
    """One layer that reads what it made, each time with a norm of its own behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.step = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(3))
        self.join = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for norm in self.norms:
            x = F.relu(x + norm(self.step(x)))
        return self.head(F.relu(self.join(x)).mean((2, 3)))


class Dense(nn.Module):
    """A dense block (Huang et al. 2017, "Densely connected networks"): all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 8 * i) for i in range(3))
        self.layers = nn.ModuleList(nn.Conv2d(16 + 8 * i, 8, 3, padding=1) for i in range(3))
        self.last = nn.Conv2d(40, 16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, layer(F.relu(norm(x)))], 1)
        return self.head(F.max_pool2d(F.relu(self.last(x)), 2).mean((2, 3)))


class Inception(nn.Module):
    """Branches of several depths side by side (Szegedy et al. 2015, "Going deeper"), twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self.unit(3, 16, 3)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    self.unit(inputs, 8, 1),
                    nn.Sequential(self.unit(inputs, 16, 1), self.unit(16, 16, 3)),
                    nn.Sequential(nn.MaxPool2d(3, 1, 1), self.unit(inputs, 8, 1)),
                ]
            )
            for inputs in (16, 32)
        )
        self.head = nn.Linear(32, 3)

    @staticmethod
    def unit(inputs: int, outputs: int, size: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.cat([branch(x) for branch in block], 1)
        return self.head(x.mean((2, 3)))


class InPlace(nn.Module):
    """Values that are changed in place and read again, by operators, functions and modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.c = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x.relu_()  # nobody reads the result but through x
        y = self.b(x)
        y += x
        z = self.c(self.relu(y))
        return self.head((F.relu(z, inplace=True) + z).mean((2, 3)))  # z is the relu by now


class Signal(nn.Module):
    """A residual network in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, 16, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm1d(16)
        self.c1 = nn.Conv1d(16, 24, 3, padding=1)
        self.c2 = nn.Conv1d(24, 16, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.c2(F.relu(self.c1(x))))
        return self.head(F.adaptive_avg_pool1d(x, 1).flatten(1))


MAKERS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "plain": lambda: (Plain(), image()),
    "mlp": lambda: (Mlp(), torch.rand(1, 12)),
    "separable": lambda: (Separable(), image()),
    "concat": lambda: (Concat(), image()),
    "quiet": lambda: (Quiet(), image()),
    "two": lambda: (Two(), (torch.rand(1, 6), torch.rand(1, 4))),
    "sequence": lambda: (Sequence(), torch.rand(1, 32, 16)),
    "preactivation": lambda: (PreActivation(), image()),
    "grouped": lambda: (Grouped(), image()),
    "groupnorm": lambda: (GroupNorm(), image()),
    "gate": lambda: (Gate(), image()),
    "fixed": lambda: (Fixed(), image()),
    "siamese": lambda: (Siamese(), (image(), image().flip(3))),
    "recurrent": lambda: (Recurrent(), image()),
    "dense": lambda: (Dense(), image()),
    "inception": lambda: (Inception(), image()),
    "inplace": lambda: (InPlace(), image()),
    "signal": lambda: (Signal(), torch.rand(1, 4, 32)),
}


def make(name: str) -> tuple[nn.Module, Any]:
    """The model called ``name`` in eval mode, always with the same weights, and its example."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, example = MAKERS[name]()
    return model.eval(), example


@functools.cache
def traced(name: str) -> Network:
    return trace(*make(name))

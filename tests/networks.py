"""Small networks for tests: ``make(name)`` gives a model and its example input."""

import functools
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.spaces import Group, Network
from flyweight.spaces.tracing import trace


def image(channels: int = 3, size: int = 8) -> Tensor:
    return torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(0))


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 50, (1, 6), generator=generator)
    return words, torch.tensor([[1.0, 1, 1, 1, 0, 0]])


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


class Pixels(nn.Module):
    """A convolution gives the answer, one for each place."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 16, 3, padding=1)
        self.c2 = nn.Conv2d(16, 24, 3, padding=1)
        self.c3, self.norm = nn.Conv2d(24, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.c3(F.relu(self.c2(F.relu(self.c1(x))))))


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


class Fused(nn.Module):
    """Attention with one projection for queries, keys and values and the number of heads as a
    number, as vision transformers have it, on patches with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.patch = nn.Conv2d(3, 32, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.position = nn.Parameter(torch.randn(1, 5, 32))
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.position
        b, n, c = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.proj(y)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x[:, 0])


class Separate(nn.Module):
    """Attention with three projections, written out, and a mask, on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 3, 8
        self.words = nn.Embedding(50, 24)
        self.places = nn.Embedding(6, 24)
        self.norm = nn.LayerNorm(24)
        self.query, self.key, self.value = (nn.Linear(24, 24) for _ in range(3))
        self.out = nn.Linear(24, 24)
        self.head = nn.Linear(24, 3)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), self.heads, self.size).transpose(1, 2)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:  # [N, 6] both
        places = torch.arange(6).expand(1, -1)
        x = self.norm(self.words(tokens) + self.places(places))
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.size)
        scores = scores + (1.0 - mask[:, None, None, :]) * -1e4
        y = torch.matmul(F.softmax(scores, dim=-1), v).permute(0, 2, 1, 3).contiguous()
        y = y.view(y.size(0), 6, self.heads * self.size)
        return self.head((x + self.out(y)).mean(1))


class Interleaved(nn.Module):
    """Attention whose projection holds queries, keys and values head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 72), nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 5, 16]
        q, k, v = self.qkv(x).view(-1, 5, 3, 24).transpose(1, 2).chunk(3, dim=-1)
        y = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1) @ v
        return self.head(x + self.out(y.transpose(1, 2).reshape(-1, 5, 24))).mean(1)


class Summed(nn.Module):
    """Attention by Einstein's sums, as many write it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 96, bias=False), nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 5, 16]
        q, k, v = (t.view(-1, 5, 4, 8) for t in self.qkv(x).chunk(3, dim=-1))
        scores = torch.einsum("bihd, bjhd -> bhij", q, k) * 8**-0.5
        y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        return self.head(x + self.out(y.flatten(2))).mean(1)


class Edges(nn.Module):
    """Graph convolutions (Kipf and Welling 2017), whose edges mix nodes and no channels."""

    def __init__(self) -> None:
        super().__init__()
        edges = torch.eye(5) + torch.eye(5).roll(1, 1)
        self.register_buffer("edges", edges / 2)
        self.a, self.n, self.b = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor, more: Tensor) -> Tensor:  # [N, 5, 6], [N, 5, 5]
        x = F.relu(self.n(torch.matmul(self.edges, self.a(x))))
        x = F.relu(torch.bmm(more / more.sum(-1, keepdim=True), self.b(x)))
        return self.head(x.sum(1))


class Library(nn.Module):
    """PyTorch's own attention, which has no layers of its own, and a feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 5, 6]
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.down(F.relu(self.up(self.norm(x))))
        return self.head(x.mean(1))


class Shuffle(nn.Module):
    """Grouped convolutions with their channels shuffled between (Zhang et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 36, 3, padding=1)
        self.c2 = nn.Conv2d(36, 36, 1, groups=3)
        self.n2 = nn.BatchNorm2d(36)
        self.c3 = nn.Conv2d(36, 48, 3, padding="same", groups=3)
        self.c4 = nn.Conv2d(48, 16, 3, padding="same")
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n2(self.c2(F.relu(self.c1(x)))))
        x = x.view(-1, 3, 12, 8, 8).transpose(1, 2).reshape(-1, 36, 8, 8)
        return self.head(F.relu(self.c4(F.relu(self.c3(x)))).mean((2, 3)))


class Inverted(nn.Module):
    """Inverted residuals one behind the other, one with a gate, one that doubles its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.blocks = nn.Sequential(self.block(16), self.block(16))
        self.wide = nn.Conv2d(16, 32, 3, padding=1, groups=16)
        self.last = nn.Conv2d(32, 24, 1)
        self.head = nn.Linear(24, 3)

    @staticmethod
    def block(width: int) -> nn.Module:
        return Residual(
            nn.Sequential(
                nn.Conv2d(width, 32, 1, bias=False), nn.BatchNorm2d(32), nn.Hardswish(),
                nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32),
                nn.ReLU6(), nn.Conv2d(32, width, 1, bias=False), nn.BatchNorm2d(width),
            )
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(F.relu(self.last(F.relu6(self.wide(x)))).mean((2, 3)))


class Residual(nn.Module):
    """What a module computes, added to its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Gated(nn.Module):
    """Gated linear units (Dauphin et al. 2017), from one projection and from two, and a branch
    inside of another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.both, self.out = nn.Linear(16, 48), nn.Linear(24, 16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 6]
        x = torch.relu(self.embed(x))
        left, right = self.both(x).chunk(2, dim=-1)
        x = x + self.out(left * torch.sigmoid(right))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        y = self.a(x)
        x = x + self.c(y + self.b(torch.relu(y)))
        return self.head(x)


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


class Text(nn.Module):
    """Convolutions of several lengths over words, of each its maximum (Kim 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(16, 24, k, padding=k // 2) for k in (3, 4, 5))
        self.head = nn.Linear(72, 4)

    def forward(self, ids: Tensor) -> Tensor:  # [N, T]
        x = self.words(ids).transpose(1, 2)
        return self.head(torch.cat([F.relu(c(x)).max(dim=2)[0] for c in self.convs], 1))


class ChannelNorm(nn.Module):
    """A layer norm of the channels of images, written out, as ConvNeXt's own code has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.bias = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNext(nn.Module):
    """A block of ConvNeXt (Liu et al. 2022, "A ConvNet for the 2020s") with its layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 2, 2), ChannelNorm(16))
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)
        self.scale = nn.Parameter(torch.rand(16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean([-2, -1]))


class Mixer(nn.Module):
    """A block of an MLP-Mixer (Tolstikhin et al. 2021), whose one half mixes tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 2, 2)
        self.tokens = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.positions = nn.Conv1d(16, 16, 1)
        self.channels = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)  # [N, 16, 24]
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        x = x + F.relu(self.positions(x))
        return self.head((x + self.channels(x)).mean(1))


class Shuffled(nn.Module):
    """Two units of a ShuffleNet V2 (Ma et al. 2018): halves, of which one goes through a branch,
    and channels that change places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.branches = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.join = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for branch in self.branches:
            one, two = x.chunk(2, dim=1)
            x = torch.cat((one, F.relu(branch(two))), dim=1)
            n, c, h, w = x.size()
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.head(F.relu(self.join(x)).mean((2, 3)))


class CrossStage(nn.Module):
    """Halves of which one goes through residual blocks, and all that was on the way (Wang et al.
    2020, "CSPNet"), as detectors have it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 1))
            for _ in range(2)
        )
        self.join = nn.Conv2d(64, 16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(F.relu(self.stem(x))[:, :32].chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.head(F.relu(self.join(torch.cat(parts, 1))).mean((2, 3)))


class Heard(nn.Module):
    """Convolutions, then a recurrent layer that reads them in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv1d(4, 24, 3, padding=1), nn.Conv1d(24, 16, 3, padding=1)
        self.states = nn.GRU(16, 10, batch_first=True, bidirectional=True)
        self.l1, self.head = nn.Linear(20, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c2(F.relu(self.c1(x)))).transpose(1, 2)
        return self.head(F.relu(self.l1(self.states(x)[0][:, -1])))


class Parallel(nn.Module):
    """Branches side by side and one around them all (Ismail Fawaz et al. 2020, "InceptionTime")."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv1d(4, 8, k, padding=k // 2) for k in (1, 3, 5))
        self.around, self.norm = nn.Conv1d(4, 24, 1), nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([branch(x) for branch in self.branches], 1)
        return self.head(F.relu(self.norm(y) + self.around(x)).mean(2))


class Parts(nn.Module):
    """Channels in parts that are read together, or some of them, or by the name of their size."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.c3, self.c4 = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c2(torch.stack(F.relu(self.c1(x)).split(8, 1)).sum(0))
        x = self.c3(torch.cat(F.relu(x).split(split_size=8, dim=1)[1:], 1))
        x = self.c4(torch.cat(torch.split(F.relu(x), [4, 12], dim=1), 1))
        return self.head(F.relu(x).mean((2, 3)))


MAKERS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "plain": lambda: (Plain(), image()),
    "mlp": lambda: (Mlp(), torch.rand(1, 12)),
    "pixels": lambda: (Pixels(), image()),
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
    "fused": lambda: (Fused(), image()),
    "separate": lambda: (Separate(), tokens()),
    "interleaved": lambda: (Interleaved(), torch.rand(1, 5, 16)),
    "summed": lambda: (Summed(), torch.rand(1, 5, 16)),
    "edges": lambda: (Edges(), (torch.rand(1, 5, 6), torch.rand(1, 5, 5))),
    "library": lambda: (Library(), torch.rand(1, 5, 6)),
    "shuffle": lambda: (Shuffle(), image()),
    "inverted": lambda: (Inverted(), image()),
    "gated": lambda: (Gated(), torch.rand(1, 6)),
    "siamese": lambda: (Siamese(), (image(), image().flip(3))),
    "recurrent": lambda: (Recurrent(), image()),
    "dense": lambda: (Dense(), image()),
    "inception": lambda: (Inception(), image()),
    "inplace": lambda: (InPlace(), image()),
    "signal": lambda: (Signal(), torch.rand(1, 4, 32)),
    "text": lambda: (Text(), tokens()[0]),
    "convnext": lambda: (ConvNext(), image()),
    "mixer": lambda: (Mixer(), image()),
    "shuffled": lambda: (Shuffled(), image()),
    "crossstage": lambda: (CrossStage(), image()),
    "parallel": lambda: (Parallel(), torch.rand(1, 4, 32)),
    "parts": lambda: (Parts(), image()),
    "heard": lambda: (Heard(), torch.rand(1, 4, 32)),
}


def make(name: str) -> tuple[nn.Module, Any]:
    """The model called ``name`` in eval mode, always with the same weights, and its example."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, example = MAKERS[name]()
    return model.eval(), example


def some(group: Group, width: int, rng: random.Random) -> Tensor:
    """The channels of units of ``group`` drawn at random, ``width`` in all."""
    units = range(group.width // group.multiple_of)
    kept = rng.sample(units, width // group.multiple_of)
    return torch.tensor([i for i, unit in enumerate(group.unit) if unit in kept])


@functools.cache
def traced(name: str) -> Network:
    return trace(*make(name))

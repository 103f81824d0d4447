"""A vision transformer for 28 x 28 grey images, 0.50 M parameters."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [N, tokens, width]
        n, tokens, width = x.shape
        x = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)  # [N, heads, tokens, width / heads] each
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(n, tokens, width))


class Block(nn.Module):
    """Norms before attention and before the feed-forward layers (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Three convolutions make 16 tokens (Xiao et al. 2021, "Early convolutions help transformers
    see better"), then come blocks of attention, the mean of the tokens and one linear layer."""

    def __init__(
        self,
        width: int = 96,
        depth: int = 6,
        heads: int = 4,
        hidden: int = 192,
        classes: int = 10,
    ) -> None:
        super().__init__()
        stem: list[nn.Module] = []
        for inputs, outputs in ((1, width // 4), (width // 4, width // 2), (width // 2, width)):
            stem += [
                nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            ]  # fmt: skip
        self.stem = nn.Sequential(*stem)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # [N, 1, 28, 28] -> [N, classes]
        x = self.stem(x).flatten(2).transpose(1, 2) + self.position  # [N, 16, width]
        return self.head(self.norm(self.blocks(x)).mean(1))

"""The teacher's network: a residual network in one dimension, 0.40 M parameters."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions of five steps and a shortcut (He et al. 2016, fig. 2, along time)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.c1 = nn.Conv1d(inputs, outputs, 5, stride, 2, bias=False)
        self.n1 = nn.BatchNorm1d(outputs)
        self.c2 = nn.Conv1d(outputs, outputs, 5, 1, 2, bias=False)
        self.n2 = nn.BatchNorm1d(outputs)
        self.short = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(
                nn.Conv1d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm1d(outputs)
            )
        )

    def forward(self, x: Tensor) -> Tensor:  # [N, inputs, T] -> [N, outputs, T / stride]
        y = torch.relu(self.n1(self.c1(x)))
        return torch.relu(self.n2(self.c2(y)) + self.short(x))


class SignalNet(nn.Module):
    """Stem of stride 2, three stages of two blocks, mean over time, one linear layer."""

    def __init__(
        self, channels: int = 6, widths: tuple[int, ...] = (32, 64, 128), classes: int = 12
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(channels, widths[0], 5, 2, 2, bias=False),
            nn.BatchNorm1d(widths[0]),
            nn.ReLU(),
        )
        blocks, inputs = [], widths[0]
        for stage, width in enumerate(widths):
            blocks += [Block(inputs, width, 1 if stage == 0 else 2), Block(width, width, 1)]
            inputs = width
        self.body = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:  # [N, channels, T] -> [N, classes]
        return self.head(torch.flatten(self.pool(self.body(self.stem(x))), 1))

"""Large to small: CREPE's full pitch network teaches its tiny one.

The weights are real, the sound is not: harmonic tones of known pitch in noise, made here, because
no labelled recordings come with a package. Figures say how networks agree on such tones, not how
well they hear music.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from crepe import BINS, FRAME, load  # noqa: E402

RATE = 16_000
FIRST = 1997.3794084376191  # cents above 10 Hz of the first bin
CENTS = FIRST + 20 * torch.arange(BINS)
LOWEST, HIGHEST = 55.0, 880.0  # Hz


def tones(count: int, seed: int) -> TensorDataset:
    """``count`` frames [1024] of harmonic tones in noise, and their pitch in cents above 10 Hz."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    hertz = LOWEST * (HIGHEST / LOWEST) ** uniform(0, 1)
    time = torch.arange(FRAME) / RATE
    sound = torch.zeros(count, FRAME)
    for n in range(1, 9):  # partials, each weaker than the one before by and large
        loud = uniform(0, 1, 1) / n * (n * hertz < RATE / 2)[:, None]
        angle = 2 * torch.pi * (n * hertz[:, None] * time + uniform(0, 1, 1))
        sound += loud * torch.sin(angle)
    decibels = uniform(-5, 25, 1)  # of the tone above the noise
    noise = torch.randn(sound.shape, generator=generator)
    sound = sound / sound.std(1, keepdim=True) + noise * 10 ** (-decibels / 20)
    sound = (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)
    return TensorDataset(sound, 1200 * torch.log2(hertz / 10))


def pitch(output: Tensor) -> Tensor:
    """Cents above 10 Hz [N]: the mean of the bins around the largest, weighted by the answer."""
    peak = output.argmax(1)
    near = (torch.arange(BINS) - peak[:, None]).abs() <= 4
    weights = torch.sigmoid(output) * near
    return (weights * CENTS).sum(1) / weights.sum(1)


class Pitch:
    """Raw pitch accuracy: per cent of frames within half a semitone."""

    def __init__(self, train: int = 600, val: int = 400) -> None:
        self.train, self.val = tones(train, 1), tones(val, 2)

    def model(self) -> nn.Module:
        return load("full")

    def students(self) -> dict[str, nn.Module]:
        return {"tiny": load("tiny")}

    def example_input(self) -> Tensor:
        return self.train[0][0][None]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:  # [N, 360], [N] -> []
        """Cross-entropy against a bell of 25 cents around the pitch (Kim et al. 2018, eq. 2)."""
        bell = torch.exp(-((CENTS - target[:, None]) ** 2) / (2 * 25**2))
        return F.binary_cross_entropy_with_logits(output, bell)

    def metric(self, output: Tensor, target: Tensor) -> float:  # [N, 360], [N]
        return 100.0 * ((pitch(output) - target).abs() <= 50).double().mean().item()

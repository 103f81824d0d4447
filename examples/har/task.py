"""Human activity recognition from a phone's accelerometer and gyroscope (UCI HAPT)."""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from flyweight.compressors import ClassificationTask

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import windows  # noqa: E402
from network import SignalNet  # noqa: E402


class Windows:
    """Windows [N, 6, 128] and classes [N] as a data set of (window, class)."""

    def __init__(self, signals: np.ndarray, classes: np.ndarray) -> None:
        self.signals, self.classes = torch.from_numpy(signals), classes

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.signals[index], int(self.classes[index])


def augment(inputs: Tensor, generator: torch.Generator) -> Tensor:  # [N, 6, T]
    """Sensors with other gains and a little more noise."""
    gain = 1 + 0.1 * torch.randn(len(inputs), inputs.shape[1], 1, generator=generator)
    return inputs * gain + 0.02 * torch.randn(inputs.shape, generator=generator)


class Activities(ClassificationTask):
    """Twelve activities, six of them transitions; no subject is in two of train, val and test."""

    def __init__(self) -> None:
        self.train, self.val, self.test = (
            Windows(*windows.read(part)) for part in ("train", "val", "test")
        )

    def model(self) -> SignalNet:
        model = SignalNet()
        model.load_state_dict(load_file(HERE / "teacher.safetensors"))
        return model

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return augment(inputs, generator)

"""The reference task: Fashion-MNIST and a residual network trained on it."""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from flyweight.compressors import ClassificationTask

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import official  # noqa: E402
from resnet import ResNet  # noqa: E402
from vit import ViT  # noqa: E402

MEAN, STD = 0.2860, 0.3530  # of the official training images, in units of 255


class Images:
    """uint8 images [N, 28, 28] and labels [N] as a data set of (float [1, 28, 28], class)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(self.images[index].astype(np.float32))
        return ((image / 255 - MEAN) / STD)[None], int(self.labels[index])


class FashionMnist(ClassificationTask):
    """``data="embedded"``: the subset in this folder. ``data="full"``: all of it, from the Debian
    package's folder or ``folder``. ``test`` is the official 10,000 wherever they are on this disk,
    else the 2,000 of them in this folder."""

    def __init__(self, data: str = "embedded", folder: str | None = None) -> None:
        if data not in ("embedded", "full"):
            raise ValueError(f"data must be 'embedded' or 'full', but got {data!r}")
        where = Path(folder) if folder else official.folder()
        if data == "full":
            if where is None:
                raise FileNotFoundError(f"data='full': not on this disk; {official.HOW}")
            images, labels = official.read("train", where)
            seen, held = official.split(labels)
            self.train = Images(images[seen], labels[seen])
            self.val = Images(images[held], labels[held])
        else:
            self.train, self.val = (self._embedded(name) for name in ("train", "val"))
        self.test = Images(*official.read("t10k", where)) if where else self._embedded("test")

    @staticmethod
    def _embedded(name: str) -> Images:
        with np.load(HERE / "data" / f"{name}.npz") as file:
            return Images(file["images"], file["labels"])

    def model(self) -> torch.nn.Module:
        model = ResNet()
        model.load_state_dict(load_file(HERE / "teacher.safetensors"))
        return model

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:  # [N, 1, 28, 28]
        """Mirrored at random and shifted by up to two pixels."""
        n = len(inputs)
        flip = torch.rand(n, generator=generator) < 0.5
        x = torch.where(flip[:, None, None, None], inputs.flip(3), inputs)
        padded = F.pad(x, (2, 2, 2, 2), value=-MEAN / STD)
        dy, dx = torch.randint(0, 5, (2, n, 1), generator=generator)
        rows, columns = torch.arange(28) + dy, torch.arange(28) + dx
        return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][
            :, None
        ]


class FashionMnistViT(FashionMnist):
    """The same data, a vision transformer as the teacher."""

    def model(self) -> torch.nn.Module:
        model = ViT()
        model.load_state_dict(load_file(HERE / "vit.safetensors"))
        return model


class FashionMnistTwin(FashionMnist):
    """The same data, a residual network of half the width as the teacher: seconds a policy."""

    def model(self) -> torch.nn.Module:
        model = ResNet((16, 32, 64))
        model.load_state_dict(load_file(HERE / "twin.safetensors"))
        return model

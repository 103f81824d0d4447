"""Whether the runtime executes the kernels that a blueprint says."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flyweight.compressors import ClassificationTask
from flyweight.compressors.data import tree_map
from flyweight.search.spec import Spec

HERE = Path(__file__).resolve()
EXAMPLES = HERE.parents[1] / "examples"
ITEMS = 16


def _images(channels: int, size: int) -> torch.Tensor:
    return torch.rand(ITEMS, channels, size, size)


def _words() -> dict[str, torch.Tensor]:
    mask = torch.ones(ITEMS, 64, dtype=torch.int64)
    mask[1::2, 40:] = 0
    return {"input_ids": torch.randint(30_522, (ITEMS, 64)), "attention_mask": mask}


def _from(folder: str) -> None:
    sys.path.insert(0, str(EXAMPLES / folder))


def _resnet() -> tuple[nn.Module, Any]:
    _from("fashion_mnist")
    from resnet import ResNet

    return ResNet(), _images(1, 28)


def _vit() -> tuple[nn.Module, Any]:
    _from("fashion_mnist")
    from vit import ViT

    return ViT(), _images(1, 28)


def _har() -> tuple[nn.Module, Any]:
    _from("har")
    from network import SignalNet

    return SignalNet(), torch.randn(ITEMS, 6, 128)


def _article_cnn() -> tuple[nn.Module, Any]:
    _from("article_cnn")
    from article import ArticleCnn

    return ArticleCnn(), _images(3, 32)


def _minilm() -> tuple[nn.Module, Any]:
    _from("rotten_tomatoes")
    from minilm import Classifier, MiniLM

    return Classifier(MiniLM()), _words()


def _mobilenet_v2() -> tuple[nn.Module, Any]:
    _from("imagenet")
    from mobilenet_v2 import MobileNetV2

    return MobileNetV2(), _images(3, 224)


def _efficientnet_lite0() -> tuple[nn.Module, Any]:
    _from("imagenet")
    from efficientnet_lite0 import EfficientNetLite0

    return EfficientNetLite0(), _images(3, 224)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    make.__name__.removeprefix("_"): make
    for make in (_resnet, _har, _article_cnn, _vit, _minilm, _mobilenet_v2, _efficientnet_lite0)
}


class Untrained(ClassificationTask):
    """One of ``NETWORKS`` with random weights, on noise."""

    def __init__(self, network: str) -> None:
        torch.manual_seed(0)
        made, inputs = NETWORKS[network]()
        self._model = made.eval()
        items = [(tree_map(lambda t, i=i: t[i], inputs), i % 2) for i in range(ITEMS)]
        self.train, self.val = items[::2], items[1::2]

    def model(self) -> nn.Module:
        return self._model


def spec_of(network: str) -> Spec:
    return Spec.model_validate(
        {
            "task": f"{HERE}:Untrained", "task_args": {"network": network},
            "objective": {"speedup": 1.0}, "space": {"prune": {"min_keep": 0.125}},
        }
    )  # fmt: skip

"""The networks of the examples, as tasks.

HAR's data must be made first (examples/har/README.md); MiniLM and the networks of ImageNet need
other packages (examples/rotten_tomatoes/README.md, examples/imagenet/README.md).
"""

import copy
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from flyweight.compressors import Candidate, ClassificationTask, Prepared, load_task
from flyweight.compressors.compress import quantize
from flyweight.compressors.data import CALIBRATION, Items
from flyweight.compressors.export import to_onnx
from flyweight.compressors.freeze import freeze
from flyweight.compressors.parity import INPUTS
from flyweight.compressors.prune import lay_out

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def _article() -> ClassificationTask:
    """The CNN of examples/article_cnn, trained as there."""
    sys.path.insert(0, str(EXAMPLES / "article_cnn"))
    import article

    torch.manual_seed(0)
    data = {part: article.images(part, 15_000) for part in ("train", "val", "test")}
    model = article.ArticleCnn()
    article.train(model, data["train"], epochs=4)
    return ClassificationTask(model.eval(), data["train"], data["val"], data["test"])


def _example(folder: str, kind: str, **arguments: Any) -> Callable[[], Any]:
    return lambda: load_task(f"task.py:{kind}", EXAMPLES / folder, arguments)


# Crops enough for parity, and all photographs that nothing was chosen on.
PHOTOGRAPHS = {"val": INPUTS, "tested": ("evaluation", "unseen")}


NETWORKS: dict[str, Callable[[], Any]] = {
    "resnet": _example("fashion_mnist", "FashionMnist"),
    "vit": _example("fashion_mnist", "FashionMnistViT"),
    "har": _example("har", "Activities"),
    "article_cnn": _article,
    "minilm": _example("rotten_tomatoes", "RottenTomatoes"),
    "mobilenet_v2": _example("imagenet", "ImageNet", network="mobilenet_v2", **PHOTOGRAPHS),
    "efficientnet_lite0": _example(
        "imagenet", "ImageNet", network="efficientnet_lite0", **PHOTOGRAPHS
    ),
}


def drawn(prepared: Prepared, seed: int) -> Prepared:
    """``prepared`` with another draw of the calibration data."""
    train = prepared.splits.train
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randperm(len(train), generator=generator)[:CALIBRATION]
    splits = dataclasses.replace(prepared.splits, calibration=train.take(picks))
    return dataclasses.replace(prepared, splits=splits)


def twin(prepared: Prepared, candidate: Candidate) -> fx.GraphModule:
    """The frozen twin of an artifact of ``compress`` that was not trained with quantizers."""
    student = lay_out(copy.deepcopy(candidate.student), torch.channels_last)  # as it was then
    frozen = freeze(quantize(prepared, candidate.policy, candidate.plan, student))
    assert to_onnx(frozen, prepared.example) == candidate.model
    return frozen


def joined(parts: list[Items]) -> Items:
    """All items of ``parts``, in order."""
    inputs = [part.inputs for part in parts]
    targets = torch.cat([part.targets for part in parts])
    if isinstance(inputs[0], dict):
        return Items({name: torch.cat([i[name] for i in inputs]) for name in inputs[0]}, targets)
    return Items(torch.cat(inputs), targets)

"""Sentiment of film reviews: the MiniLM sentence encoder with a linear head."""

import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from flyweight.compressors import ClassificationTask

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from minilm import Classifier, MiniLM  # noqa: E402
from reviews import splits  # noqa: E402


class RottenTomatoes(ClassificationTask):
    """Reviews cut or filled to ``length`` words."""

    def __init__(self, length: int = 64) -> None:
        self.train, self.val, self.test = splits(length)

    def model(self) -> Classifier:
        model = Classifier(MiniLM.pretrained())
        model.head.load_state_dict(load_file(HERE / "head.safetensors"))
        return model.eval()

    def example_input(self) -> Any:
        return {k: v[:1] for k, v in self.train.inputs.items()}

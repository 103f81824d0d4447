"""The rules of benchmarks/rewritten.py against the graphs that ONNX Runtime makes."""

from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def kernels(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("benchmarks/kernels.py")


@pytest.mark.parametrize("network", ["resnet", "har", "article_cnn", "vit"])
def test_the_runtime_executes_the_kernels_that_the_blueprint_says(
    kernels: ModuleType, network: str
) -> None:
    found = kernels.measure(network, 9)
    assert (found["impossible"], found["both"]) == (0, 1), found["first"]

"""The artifact: a module as an ONNX file with a dynamic batch axis."""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..spaces import Impossible

OPSET = 20  # QuantizeLinear of 8-bit types, understood by every runtime flyweight names


def to_onnx(module: nn.Module, example: Any) -> bytes:
    """``module`` as ONNX. A single input is named ``input``, those of a dict carry their keys.

    Raises Impossible when torch.onnx cannot export it, with its reason.
    """
    args = () if isinstance(example, dict) else example if isinstance(example, tuple) else (example,)
    kwargs = dict(example) if isinstance(example, dict) else None
    batch = torch.export.Dim("batch")
    if kwargs:
        names, shapes = list(kwargs), {name: {0: batch} for name in kwargs}
    else:
        names = ["input"] if len(args) == 1 else [f"input_{i}" for i in range(len(args))]
        shapes = tuple({0: batch} for _ in args)  # type: ignore[assignment]
    try:
        with _quiet():
            program = torch.onnx.export(
                module.eval(),
                args,
                kwargs=kwargs,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=names,
                output_names=["output"],
                opset_version=OPSET,
                verbose=False,
            )
            assert program is not None
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.onnx"
                program.save(path, external_data=False)
                return path.read_bytes()
    except Exception as error:  # the exporter raises what it likes
        raise Impossible(f"torch.onnx cannot export this student: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter narrates; what matters arrives as an exception."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

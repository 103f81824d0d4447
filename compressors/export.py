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
from torch import fx, nn

from ..spaces import Impossible
from ..spaces.tracing import arguments, trace_graph
from .onnx_writer import OPSET, write


def to_onnx(module: nn.Module, example: Any) -> bytes:
    """``module`` as ONNX. A single input is named ``input``, those of a tuple ``input_0`` and so
    on, those of a dict carry their keys.

    Raises Impossible when it cannot be exported, with torch.onnx's reason.
    """
    args, kwargs = arguments(example)
    names = [f"input_{i}" for i in range(len(args))] if len(args) > 1 else ["input"]
    names = list(kwargs) or names
    graph = module if isinstance(module, fx.GraphModule) else trace_graph(module, example)
    return write(graph.eval(), example, names) or _torch_onnx(module, args, kwargs, names)


def _torch_onnx(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]
) -> bytes:
    """The same by torch.onnx, for modules with operations that ``write`` does not know."""
    axis = {0: torch.export.Dim("batch")}
    shapes: Any = dict.fromkeys(kwargs, axis) if kwargs else tuple(axis for _ in args)
    # Two requests: torch.export takes a size of 1 for one that never changes.
    args = tuple(torch.cat((value, value)) for value in args)
    kwargs = {name: torch.cat((value, value)) for name, value in kwargs.items()}
    try:
        with _quiet():
            program = torch.onnx.export(
                module.eval(),
                args,
                kwargs=kwargs or None,
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
    """The exporter narrates, as do the libraries it uses; what matters arrives as an exception."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

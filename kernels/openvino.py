"""OpenVINO's CPU plugin behind the seam of ``runtime.py``. Importing this file needs OpenVINO."""

import functools
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import openvino as ov  # type: ignore[import-untyped]

from ..spaces.capabilities import Capabilities
from ..spaces.errors import Impossible
from .device import describe, fingerprint_of
from .probe import measured_weight_bits
from .runtime import Array, Inputs

NAME = "openvino"
# A static shape was 8 to 25% faster on one image (ResNet, vision transformer), and is still 0 to 8%
# faster on 256 of them, but compiling costs as much as running thousands of images.
MOST_STATIC = 16
_INT8 = ("fp32", "int8")


def settings(threads: int) -> dict[str, Any]:
    """How a model is compiled: ``threads`` threads for one request at a time, in float32.

    Left to itself OpenVINO uses all cores, computes float layers in bfloat16 where the CPU has it,
    may quantize the inputs of layers by itself, and pins the calling thread to the first core,
    where all processes meet.
    """
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "ENABLE_CPU_PINNING": False,
        "ENABLE_HYPER_THREADING": True,  # else it may use fewer threads than it is told
    }


@functools.cache
def _core() -> Any:
    return ov.Core()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())


class OpenVinoSession:
    """A model read by OpenVINO, compiled when it is first asked: for the shapes of the inputs if
    they are few, and once more, with its axes free, for all other shapes."""

    def __init__(self, model: Any, threads: int) -> None:
        self._model = model
        self._settings = settings(threads)
        self._names = {port.any_name for port in model.inputs}
        self._shapes: tuple[Any, ...] = ()  # those of the inputs that ``_static`` is compiled for
        self._static: Any = None
        self._dynamic: Any = None

    def run(self, inputs: Inputs) -> Array:
        """The output. Raises Impossible with OpenVINO's reason."""
        shapes = tuple((name, array.shape) for name, array in inputs.items())
        try:
            compiled = self._static if shapes == self._shapes else self._compiled(shapes)
            output: Array = compiled(dict(inputs))[0]
        except RuntimeError as error:
            raise Impossible(f"OpenVINO cannot run the model: {_reason(error)}") from error
        return output

    def _compiled(self, shapes: tuple[Any, ...]) -> Any:
        given = dict(shapes)
        if given.keys() != self._names:  # one that is missing would be taken for an empty array
            raise RuntimeError(
                f"its inputs are {sorted(self._names)}, but it was given {sorted(given)}"
            )
        rows = max((shape[0] for shape in given.values() if shape), default=1)
        if rows <= MOST_STATIC and self._static is None and self._dynamic is None:
            static = _at(self._model, given)
            self._static = _core().compile_model(static, "CPU", self._settings)
            self._shapes = shapes
            return self._static
        if self._dynamic is None:
            self._dynamic = _core().compile_model(self._model, "CPU", self._settings)
        return self._dynamic


def _at(model: Any, shapes: dict[str, tuple[int, ...]]) -> Any:
    """A copy of ``model`` whose free axes have the sizes that inputs of ``shapes`` give them."""
    model = model.clone()
    sizes = {}
    for port in model.inputs:
        axes, shape = list(port.partial_shape), shapes[port.any_name]
        if len(axes) != len(shape):
            raise RuntimeError(
                f"input {port.any_name!r} has {len(axes)} axes, but was given {len(shape)}"
            )
        sizes[port.any_name] = [
            size if axis.is_dynamic else axis.get_length()
            for axis, size in zip(axes, shape, strict=True)
        ]
    model.reshape(sizes)
    return model


class OpenVinoRuntime:
    """OpenVINO on the CPU."""

    name = NAME

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @cached_property
    def device(self) -> dict[str, str]:
        found = describe(self.name, ov.__version__, self.threads)
        most = os.environ.get("ONEDNN_MAX_CPU_ISA")  # other kernels than the CPU's flags say
        return {**found, "isa": most} if most else found

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(self.device)

    @cached_property
    def capabilities(self) -> Capabilities:
        """Every layer runs in int8 once its input is quantized, whatever its output is.

        So nothing else is: with the outputs of layers and residual adds in int8 too, ResNets,
        MobileNetV2, vision transformers and networks with max pools took from 3% less to 18% more
        time, and the ResNet's answers strayed 30 times as far from the student's.
        """
        return Capabilities(
            precisions={"conv": _INT8, "linear": _INT8},
            weight_bits=measured_weight_bits(self),
            # Convolutions work on blocks of 16 channels with AVX-512, but half a block is not
            # wasted: at widths of 16, 24 and 32 six of them took 46, 89 and 103 us.
            width_multiple=8,
            output_quantized=frozenset(),
            act_output_quantized=frozenset(),
            int8_ops=frozenset(),
        )

    def load(self, model: bytes | Path) -> OpenVinoSession:
        """The model, read; the first call compiles it. Raises Impossible if it cannot be read."""
        return OpenVinoSession(_read(model), self.threads)


def _read(model: bytes | Path) -> Any:
    try:
        read = _core().read_model(model)
    except RuntimeError as error:
        raise Impossible(f"OpenVINO cannot load the model: {_reason(error)}") from error
    if (outputs := len(read.outputs)) != 1:
        raise Impossible(f"a model has one output, but this one has {outputs}")
    return read

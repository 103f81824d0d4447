"""OpenVINO's CPU plugin behind the seam of ``runtime.py``. Importing this file needs OpenVINO."""

import functools
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import openvino as ov  # type: ignore[import-untyped]

from ..spaces.capabilities import Capabilities
from ..spaces.errors import Impossible
from .device import describe, fingerprint_of
from .layers import layers
from .probe import measured_weight_bits
from .runtime import Array, Executed, Inputs

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
        return describe(self.name, ov.__version__, self.threads)

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

    def executed(self, model: bytes) -> list[Executed]:
        """The kernels of ``model`` at batch 1. Raises Impossible if it does not load."""
        read = _read(model)
        shapes = {
            port.any_name: tuple(1 if a.is_dynamic else a.get_length() for a in port.partial_shape)
            for port in read.inputs
        }
        try:
            compiled = _core().compile_model(_at(read, shapes), "CPU", settings(self.threads))
        except RuntimeError as error:
            raise Impossible(f"OpenVINO cannot load the model: {_reason(error)}") from error
        return _kernels(compiled.get_runtime_model(), model)


def _read(model: bytes | Path) -> Any:
    try:
        read = _core().read_model(model)
    except RuntimeError as error:
        raise Impossible(f"OpenVINO cannot load the model: {_reason(error)}") from error
    if (outputs := len(read.outputs)) != 1:
        raise Impossible(f"a model has one output, but this one has {outputs}")
    return read


def _kernels(executed: Any, model: bytes) -> list[Executed]:
    """What ``executed`` (the graph that the plugin made of ``model``) runs."""
    nodes = [(node, _facts(node)) for node in executed.get_ordered_ops()]
    known = {name for _, facts in nodes for name in facts["originalLayersNames"].split(",")}
    products = _products(model, known)
    return [
        Executed(f"{facts['layerType']} {facts['primitiveType']}", _layers(node, facts, products))
        for node, facts in nodes
        if facts["layerType"] not in ("Const", "Input", "Output")
    ]


def _facts(node: Any) -> dict[str, str]:
    return {key: value.astype(str) for key, value in node.get_rt_info().items()}


def _products(model: bytes, known: set[str]) -> set[str]:
    """The names that the products of the layers of ``model`` go by in the plugin's graph.

    A node with a bias becomes a product, with a suffix, and a sum; one that gives the model's
    output is called as that is.
    """
    found = set()
    for node in layers(onnx.load_from_string(model).graph):
        suffixed = f"{node.name}/WithoutBiases"
        found.update({suffixed} if suffixed in known else {node.name, node.output[0]})
    return found


def _layers(node: Any, facts: dict[str, str], products: set[str]) -> tuple[str, ...]:
    """The precision of each layer that the executed ``node`` computes.

    A layer is int8 if its weights are and its input is. A "Subgraph" is code generated for several
    operations, a row of linear layers among them; it may quantize in between.
    """
    kind, ports = facts["layerType"], node.inputs()
    integers = [port.get_element_type().get_type_name() in ("i8", "u8") for port in ports]
    constant = [_is_constant(port) for port in ports]
    if kind == "Subgraph":
        int8 = sum(i and c for i, c in zip(integers, constant, strict=True))
        count = len(products.intersection(facts["originalLayersNames"].split(",")))
        return ("int8",) * int8 + ("fp32",) * (count - int8)
    if kind not in ("Convolution", "FullyConnected", "MatMul") or not constant[1]:
        return ()
    return ("int8",) if all(integers[:2]) else ("fp32",)


def _is_constant(port: Any) -> bool:
    """Whether what arrives at ``port`` is a constant, rearranged or not."""
    node = port.get_source_output().get_node()
    while (kind := _facts(node)["layerType"]) in ("Transpose", "Reshape", "Reorder"):
        node = node.input(0).get_source_output().get_node()
    return bool(kind == "Const")

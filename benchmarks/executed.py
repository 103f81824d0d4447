"""Which kernels a runtime really runs: read from what it made of the model, never from the file.

For the tests and the benchmarks, which ask whether what is built runs as it was meant to.
"""

import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from flyweight.kernels import Runtime
from flyweight.kernels.onnxruntime import CPU, session_options
from flyweight.spaces import Impossible

INT8_KERNELS = {
    "QLinearConv",
    "ConvInteger",
    "QGemm",
    "QLinearMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
}
FLOAT_KERNELS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
_KEEPS_CONSTANT = {"DequantizeLinear", "Transpose", "Reshape", "Cast", "Identity"}


@dataclass(frozen=True)
class Executed:
    """One kernel that a runtime runs.

    name: the runtime's own. layers: the precision of each convolution or linear layer that it
        computes; a runtime may put several into one kernel, and most kernels hold none.
    """

    name: str
    layers: tuple[str, ...] = ()


def optimized_kernels(model: bytes, runtime: Runtime | None = None) -> Counter[str]:
    """How often each kernel runs, by the name that ``runtime`` (ONNX Runtime if None) gives it."""
    return Counter(kernel.name for kernel in _executed(model, runtime))


def int8_layers(model: bytes, runtime: Runtime | None = None) -> int:
    """Convolutions and linears of ``model`` that run as int8 kernels in ``runtime`` (None: ONNX
    Runtime)."""
    return sum(kernel.layers.count("int8") for kernel in _executed(model, runtime))


def float_layers(model: bytes, runtime: Runtime | None = None) -> int:
    """Convolutions and linears of ``model`` that run in float in ``runtime`` (None: ONNX
    Runtime)."""
    return sum(kernel.layers.count("fp32") for kernel in _executed(model, runtime))


def _executed(model: bytes, runtime: Runtime | None) -> list[Executed]:
    if runtime is not None and runtime.name == "openvino":
        return openvino_kernels(model, runtime.threads)
    return onnxruntime_kernels(model, runtime.threads if runtime else 1)


def layers(graph: onnx.GraphProto, operations: Collection[str] = LAYERS) -> list[onnx.NodeProto]:
    """The nodes of ``operations`` whose second input is a weight, in order of execution.

    A weight is an initializer, dequantized or rearranged or not. A MatMul of two activations, as in
    attention, is no layer.
    """
    constants = {weight.name for weight in graph.initializer}
    for node in graph.node:  # in order of execution: producers first
        constant = node.op_type == "Constant"
        if constant or (node.op_type in _KEEPS_CONSTANT and node.input[0] in constants):
            constants.update(node.output)
    found = (node for node in graph.node if node.op_type in operations)
    return [node for node in found if len(node.input) > 1 and node.input[1] in constants]


# -- ONNX Runtime --------------------------------------------------------------------------------


def optimized_graph(model: bytes, threads: int = 1) -> onnx.GraphProto:
    """The graph that the CPU provider runs for ``model``. Raises Impossible if it does not load."""
    options = session_options(threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        try:
            ort.InferenceSession(model, options, providers=[CPU])
        except Exception as error:  # its exceptions have no base of their own
            raise Impossible(f"ONNX Runtime cannot load the model: {error}") from error
        return onnx.load(path).graph


def onnxruntime_kernels(model: bytes, threads: int = 1) -> list[Executed]:
    """The kernels of the CPU provider by operation; the domain (blocked layout or not) is ignored.

    Raises Impossible if the model does not load.
    """
    graph = optimized_graph(model, threads)
    float_names = {node.output[0] for node in layers(graph, FLOAT_KERNELS)}

    def precision(node: onnx.NodeProto) -> tuple[str, ...]:
        if node.op_type in INT8_KERNELS:
            return ("int8",)
        return ("fp32",) if node.output[0] in float_names else ()

    return [Executed(node.op_type, precision(node)) for node in graph.node]


# -- OpenVINO ------------------------------------------------------------------------------------


def openvino_kernels(model: bytes, threads: int) -> list[Executed]:
    """The kernels of ``model`` at batch 1. Raises Impossible if it does not load."""
    from flyweight.kernels import openvino  # an optional package

    read = openvino._read(model)
    shapes = {
        port.any_name: tuple(1 if a.is_dynamic else a.get_length() for a in port.partial_shape)
        for port in read.inputs
    }
    static, settings = openvino._at(read, shapes), openvino.settings(threads)
    try:
        compiled = openvino._core().compile_model(static, "CPU", settings)
    except RuntimeError as error:
        raise Impossible(f"OpenVINO cannot load the model: {openvino._reason(error)}") from error
    return _kernels(compiled.get_runtime_model(), model)


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

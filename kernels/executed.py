"""Which kernels ONNX Runtime really runs: read from the graph that it made, never from the file."""

import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort  # type: ignore[import-untyped]

from ..spaces.errors import Impossible
from .onnxruntime import CPU, session_options

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
_KEEPS_CONSTANT = {"DequantizeLinear", "Transpose", "Reshape", "Cast", "Identity"}


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


def optimized_kernels(model: bytes, threads: int = 1) -> Counter[str]:
    """How often each kernel runs, by operation; the domain (blocked layout or not) is ignored."""
    return Counter(node.op_type for node in optimized_graph(model, threads).node)


def int8_layers(model: bytes, threads: int = 1) -> int:
    """Convolutions and linears of ``model`` that run as int8 kernels."""
    kernels = optimized_kernels(model, threads)
    return sum(kernels[op] for op in INT8_KERNELS)


def float_layers(model: bytes, threads: int = 1) -> int:
    """Convolutions and linears of ``model`` that run in float.

    Their second input is a weight: an initializer, dequantized or rearranged or not. A MatMul of
    two activations, as in attention, is no layer.
    """
    graph = optimized_graph(model, threads)
    constants = {weight.name for weight in graph.initializer}
    for node in graph.node:  # in order of execution: producers first
        constant = node.op_type == "Constant"
        if constant or (node.op_type in _KEEPS_CONSTANT and node.input[0] in constants):
            constants.update(node.output)
    layers = (n for n in graph.node if n.op_type in FLOAT_KERNELS)
    return sum(len(n.input) > 1 and n.input[1] in constants for n in layers)

"""Which kernels a runtime really runs: read from what it made of the model, never from the file."""

import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort  # type: ignore[import-untyped]

from ..spaces.errors import Impossible
from .layers import layers
from .onnxruntime import CPU, OnnxRuntime, session_options
from .runtime import Executed, Runtime

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
    return (runtime or OnnxRuntime(threads=1)).executed(model)


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

"""How many bits an int8 weight may use: asked of the kernels themselves, not looked up."""

import platform

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ..spaces.errors import Impossible
from .device import cpu, weight_bits_by_flags
from .runtime import Runtime

CHANNELS = 32  # whole blocks of every layout, so that the vector kernel runs and not its remainder
_measured: dict[str, int] = {}


def probe_model(kind: str, weight: int) -> tuple[ModelProto, float]:
    """A quantized "conv" or "linear" whose weights are all ``weight``, and its exact output.

    Every input is 255 and every scale but the output's is 1, so the exact output is the largest
    sum (smallest, if ``weight`` is negative) that the layer can reach: any saturation shows.
    """
    shape = (CHANNELS, CHANNELS, 3, 3) if kind == "conv" else (CHANNELS, CHANNELS)
    output = (1, CHANNELS, 1, 1) if kind == "conv" else (1, CHANNELS)
    exact = 255.0 * weight * np.prod(shape[1:])
    arrays = {
        "one": np.float32(1),
        "zero": np.uint8(0),
        "weight_zero": np.int8(0),
        "weight": np.full(shape, weight, np.int8),
        "step": np.float32(abs(exact) / 255),
        "output_zero": np.uint8(0 if weight > 0 else 255),
    }
    node = helper.make_node
    layer = (
        node("Conv", ["x", "w"], ["y"])
        if kind == "conv"
        else node("Gemm", ["x", "w"], ["y"], transB=1)
    )
    nodes = [
        node("QuantizeLinear", ["input", "one", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "one", "zero"], ["x"]),
        node("DequantizeLinear", ["weight", "one", "weight_zero"], ["w"]),
        layer,
        node("QuantizeLinear", ["y", "step", "output_zero"], ["y_q"]),
        node("DequantizeLinear", ["y_q", "step", "output_zero"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, (1, *shape[1:]))],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, output)],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()],
    )
    opset = helper.make_opsetid("", 19)
    return helper.make_model(graph, opset_imports=[opset], ir_version=9), float(exact)


def _exact(runtime: Runtime, weight: int) -> bool:
    for kind in ("conv", "linear"):
        model, exact = probe_model(kind, weight)
        session = runtime.load(model.SerializeToString())
        shape = (1, CHANNELS, 3, 3) if kind == "conv" else (1, CHANNELS)
        output = session.run({"input": np.full(shape, 255, np.float32)})
        if not np.allclose(output, exact, rtol=0.01, atol=0):  # saturation halves it
            return False
    return True


def measured_weight_bits(runtime: Runtime) -> int:
    """The most bits, 8 down to 5, with which ``runtime`` is exact at both ends of the range.

    Falls back to the rule by CPU flags if the probe cannot run. Measured once a process.
    """
    key = runtime.fingerprint
    if key not in _measured:
        try:
            fits = (b for b in (8, 7, 6, 5) if all(_exact(runtime, w) for w in _ends(b)))
            bits = next(fits, None)
        except Impossible:
            bits = None
        _measured[key] = bits or weight_bits_by_flags(cpu()[1], platform.machine())
    return _measured[key]


def _ends(bits: int) -> tuple[int, int]:
    top = 2 ** (bits - 1) - 1
    return top, -top - 1

"""Which nodes of an ONNX graph are layers: convolutions and linears, which have weights."""

from collections.abc import Collection

import onnx

LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
_KEEPS_CONSTANT = {"DequantizeLinear", "Transpose", "Reshape", "Cast", "Identity"}


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

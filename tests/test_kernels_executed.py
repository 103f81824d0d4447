"""Counting kernels in the graph that ONNX Runtime makes, on graphs whose fusions are known."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from flyweight.kernels import float_layers, int8_layers, optimized_kernels
from flyweight.spaces.errors import Impossible

node = helper.make_node
CONV = np.full((8, 8, 3, 3), 3, np.int8)
LINEAR = np.full((8, 8), 3, np.int8)


def build(nodes, shape, arrays):
    scales = {"s": np.float32(0.1), "z": np.uint8(128), "wz": np.int8(0)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in {**scales, **arrays}.items()],
    )
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()


def quantized(x, out):
    return [
        node("QuantizeLinear", [x, "s", "z"], [f"{out}_q"]),
        node("DequantizeLinear", [f"{out}_q", "s", "z"], [out]),
    ]


def layer(op, weight, shape, quantized_output, bias=None, **attributes):
    """One layer between Q/DQ, weight int8 through DQ, bias as it is given."""
    arrays = {"w_q": weight}
    inputs = ["x", "w"]
    if bias is not None:
        arrays["b"] = bias
        inputs.append("b")
    result = "y" if quantized_output else "output"
    nodes = [
        *quantized("input", "x"),
        node("DequantizeLinear", ["w_q", "s", "wz"], ["w"]),
        node(op, inputs, [result], **attributes),
        *(quantized("y", "output") if quantized_output else []),
    ]
    return build(nodes, shape, arrays)


def counts(model):
    return int8_layers(model), float_layers(model)


def test_a_convolution_is_int8_only_with_a_quantized_output():
    assert counts(layer("Conv", CONV, (1, 8, 9, 9), quantized_output=True)) == (1, 0)
    assert counts(layer("Conv", CONV, (1, 8, 9, 9), quantized_output=False)) == (0, 1)


def test_a_linear_is_int8_with_or_without_a_quantized_output():
    assert counts(layer("Gemm", LINEAR, (1, 8), True, transB=1)) == (1, 0)
    assert counts(layer("Gemm", LINEAR, (1, 8), False, transB=1)) == (1, 0)


def test_a_linear_with_a_float_bias_stays_float():
    bias = np.ones(8, np.float32)
    assert counts(layer("Gemm", LINEAR, (1, 8), False, bias, transB=1)) == (0, 1)


def test_a_linear_on_sequences_is_int8():
    model = layer("MatMul", LINEAR, (1, 5, 8), False)
    assert counts(model) == (1, 0)
    assert optimized_kernels(model)["MatMulIntegerToFloat"] == 1


def test_float_layers_are_counted_in_every_layout():
    weights = {"w": CONV.astype(np.float32), "v": CONV.astype(np.float32)}
    nodes = [
        node("Conv", ["input", "w"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "v"], ["output"]),
    ]
    model = build(nodes, (1, 8, 9, 9), weights)
    assert counts(model) == (0, 2)
    assert optimized_kernels(model)["Relu"] == 0  # fused away: this is not the file's own graph


def test_products_of_activations_are_no_layers():
    nodes = [
        node("Transpose", ["input"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["input", "t"], ["m"]),
        node("MatMul", ["m", "w"], ["output"]),
    ]
    model = build(nodes, (1, 5, 8), {"w": np.ones((5, 4), np.float32)})
    assert counts(model) == (0, 1)


def test_a_dequantized_activation_is_no_weight():
    nodes = [*quantized("input", "x"), node("MatMul", ["input", "x"], ["output"])]
    assert counts(build(nodes, (1, 8, 8), {})) == (0, 0)


def test_a_broken_model_is_impossible():
    with pytest.raises(Impossible, match="load"):
        optimized_kernels(b"not a model")

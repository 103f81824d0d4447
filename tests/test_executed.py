"""Counting kernels in the graph that a runtime makes, on graphs whose fusions are known."""

import numpy as np
import pytest
from executed import float_layers, int8_layers, optimized_kernels
from onnx import TensorProto, helper, numpy_helper

from flyweight.kernels import make_runtime
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


def counts(model, runtime=None):
    return int8_layers(model, runtime), float_layers(model, runtime)


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
    for runtime in (None, make_runtime("openvino", 1)):
        with pytest.raises(Impossible, match="load"):
            optimized_kernels(b"not a model", runtime)


# -- OpenVINO ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openvino():
    return make_runtime("openvino", 1)


@pytest.mark.parametrize("quantized_output", [True, False])
@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])
def test_openvino_runs_a_layer_in_int8_whatever_its_output_is(openvino, op, quantized_output):
    weight, shape = (CONV, (1, 8, 9, 9)) if op == "Conv" else (LINEAR, (1, 8))
    assert counts(layer(op, weight, shape, quantized_output), openvino) == (1, 0)
    if op != "MatMul":
        bias = np.ones(8, np.float32)
        assert counts(layer(op, weight, shape, quantized_output, bias), openvino) == (1, 0)


def test_openvino_runs_float_layers_in_float(openvino):
    weights = {"w": CONV.astype(np.float32), "b": np.ones(8, np.float32)}
    nodes = [
        *quantized("input", "x"),
        node("Conv", ["x", "w", "b"], ["a"]),
        node("Relu", ["a"], ["output"]),
    ]
    model = build(nodes, (1, 8, 9, 9), weights)
    assert counts(model, openvino) == (0, 1)
    kernels = optimized_kernels(model, openvino)
    assert not any(name.startswith("Relu") for name in kernels)  # fused away


@pytest.mark.parametrize("wide", [1, 16])  # to a single feature a weight looks like a bias
@pytest.mark.parametrize("bias", [True, False])
def test_openvino_generates_one_kernel_for_several_linear_layers(openvino, wide, bias):
    weights = {
        "w": np.full((8, 32), 0.1, np.float32), "v": np.full((32, wide), 0.1, np.float32),
        "b": np.ones(32, np.float32), "c": np.ones(wide, np.float32),
    }  # fmt: skip
    nodes = [
        node("Gemm", ["input", "w", *["b"] * bias], ["a"], name="a:Gemm"),
        node("Relu", ["a"], ["r"]),
        node("Gemm", ["r", "v", *["c"] * bias], ["output"], name="output:Gemm"),
    ]
    model = build(nodes, (1, 8), weights)
    assert counts(model, openvino) == (0, 2)
    assert sum(optimized_kernels(model, openvino).values()) < 3


def test_openvino_tells_products_of_activations_from_layers(openvino):
    nodes = [
        node("Transpose", ["input"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["input", "t"], ["m"]),
        node("MatMul", ["m", "w"], ["output"]),
    ]
    model = build(nodes, (1, 5, 8), {"w": np.ones((5, 4), np.float32)})
    assert counts(model, openvino) == (0, 1)
    nodes = [*quantized("input", "x"), node("MatMul", ["input", "x"], ["output"])]
    assert counts(build(nodes, (1, 8, 8), {}), openvino) == (0, 0)

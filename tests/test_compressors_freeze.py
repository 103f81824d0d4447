"""The frozen twin computes in integers what the runtime's kernels compute."""

import platform
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor, fx, nn

from flyweight.compressors.data import Items
from flyweight.compressors.freeze import FrozenAdd, FrozenAverage, FrozenLayer, freeze
from flyweight.compressors.parity import _run_noisy, run_module
from flyweight.compressors.quantize import ActivationQuantizer, Average, QuantizedLayer

scales = st.floats(2.0**-13, 0.5, width=32) | st.integers(1, 64).map(lambda k: k / 64)
zeros = st.integers(0, 255)
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="other kernels round otherwise")


def quantizer(scale: float, zero: int) -> ActivationQuantizer:
    made = ActivationQuantizer()
    made.scale.fill_(scale)
    made.zero.fill_(zero)
    return made


def quantized(weight: Tensor, bias: Tensor, source: ActivationQuantizer) -> QuantizedLayer:
    """A linear layer with the integers ``weight`` and ``bias``, in steps of 0.01."""
    made = QuantizedLayer(nn.Linear(weight.shape[1], weight.shape[0]), 8, "minmax")
    made.scale.fill_(0.01)
    made.bias_step.copy_(made.scale * source.scale)
    made.layer.double()  # floats of 32 bits do not hold the biases
    with torch.no_grad():
        made.layer.weight.copy_(0.01 * weight)
        made.layer.bias.copy_(bias * made.bias_step.double())
    return made


@settings(deadline=None)
@given(st.data(), scales, scales, zeros)
def test_a_layer_rounds_the_exact_sum_once(
    data: st.DataObject, source_scale: float, scale: float, zero: int
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    inputs = data.draw(st.sampled_from([1, 7, 1_000, 20_000]))
    low = data.draw(st.sampled_from([-127, 0, 100]))  # sums of one sign are the largest
    room = data.draw(st.sampled_from([2**10, 2**30]))
    weight, bias = rng.integers(low, 128, (3, inputs)), rng.integers(-room, room, 3)
    source, rounder = quantizer(source_scale, zero), quantizer(scale, 0)
    made = quantized(torch.tensor(weight), torch.tensor(bias), source)
    layer = FrozenLayer(made, source, rounder)
    assert layer.weight.tolist() == weight.tolist()
    assert layer.bias is not None
    assert layer.bias.tolist() == bias.tolist()
    integers = rng.integers(0, 256, (5, inputs))
    x = torch.tensor(integers - zero, dtype=torch.float32) * source.scale
    sums = ((integers - zero) @ weight.T + bias).astype(np.float32)
    step = source.scale.numpy() * np.float32(0.01) / rounder.scale.numpy()
    np.testing.assert_array_equal(layer(x).numpy(), np.rint(sums * step) * rounder.scale.numpy())


def qlinear_add(*quantizers: ActivationQuantizer) -> Any:
    """ONNX Runtime's kernel, of two vectors of integers."""
    names, constants = [], []
    for name, one in zip("abc", quantizers, strict=True):
        scale, zero = f"{name}_scale", f"{name}_zero"
        constants.append(helper.make_tensor(scale, TensorProto.FLOAT, [], [one.scale.item()]))
        constants.append(helper.make_tensor(zero, TensorProto.UINT8, [], [int(one.zero)]))
        names.append([name, scale, zero])
    inputs = [*names[0], *names[1], *names[2][1:]]
    node = helper.make_node("QLinearAdd", inputs, ["c"], domain="com.microsoft")
    ends = [helper.make_tensor_value_info(n, TensorProto.UINT8, ["n"]) for n in "abc"]
    graph = helper.make_graph([node], "sum", ends[:2], ends[2:], constants)
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString())


@x86
@settings(deadline=None, max_examples=300)
@given(scales, scales, scales, zeros, zeros, zeros)
def test_a_sum_is_that_of_the_runtimes_kernel(
    a: float, b: float, c: float, first: int, second: int, third: int
) -> None:
    quantizers = [quantizer(a, first), quantizer(b, second), quantizer(c, third)]
    x, y = (v.ravel() for v in np.meshgrid(*[np.arange(256, dtype=np.uint8)] * 2))
    (theirs,) = qlinear_add(*quantizers).run(None, {"a": x, "b": y})
    values = (
        (torch.from_numpy(v).float() - q.zero) * q.scale
        for v, q in zip((x, y), quantizers, strict=False)
    )
    ours = torch.round(FrozenAdd(*quantizers)(*values) / quantizers[2].scale) + third
    np.testing.assert_array_equal(ours.clamp(0, 255).numpy(), theirs)


@x86
@settings(deadline=None, max_examples=300)
@given(
    st.data(), scales, scales, zeros, zeros, st.integers(1, 70), st.integers(1, 3), st.booleans()
)
def test_an_average_is_that_of_the_runtimes_kernel(
    data: st.DataObject,
    a: float,
    b: float,
    first: int,
    second: int,
    rows: int,
    columns: int,
    last: bool,
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = rng.integers(0, 256, (2, 17, rows, columns), np.uint8)
    assume(2.0**-32 < a / (b * rows * columns) < 256)  # what the kernel takes
    source, rounder = quantizer(a, first), quantizer(b, second)
    constants = []
    for name, one in (("x", source), ("y", rounder)):
        constants.append(helper.make_tensor(f"{name}s", TensorProto.FLOAT, [], [one.scale.item()]))
        constants.append(helper.make_tensor(f"{name}z", TensorProto.UINT8, [], [int(one.zero)]))
    node = helper.make_node(
        "QLinearGlobalAveragePool", ["x", "xs", "xz", "ys", "yz"], ["y"],
        domain="com.microsoft", channels_last=int(last),
    )  # fmt: skip
    given = x.transpose(0, 2, 3, 1) if last else x
    ends = [helper.make_tensor_value_info(n, TensorProto.UINT8, list("abcd")) for n in "xy"]
    graph = helper.make_graph([node], "average", ends[:1], ends[1:], constants)
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (theirs,) = session.run(None, {"x": np.ascontiguousarray(given)})
    values = (torch.from_numpy(x).float() - first) * source.scale
    averages = FrozenAverage(Average(flat=True), source, rounder)(values)
    ours = torch.round(averages / rounder.scale) + second
    np.testing.assert_array_equal(ours.clamp(0, 255).numpy(), theirs.reshape(2, 17))


class Sums(nn.Module):
    """With a name that a sum would take."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.drop, self.sum_add, self.kind = nn.Dropout(), nn.Identity(), kind

    def forward(self, a: Tensor, b: Tensor) -> Any:
        if self.kind == "doubled":
            return torch.relu(a + a)
        if self.kind == "scalar":
            return torch.relu(a + 2)
        total = self.sum_add(a + self.drop(b))
        return torch.relu(total) if self.kind == "plain" else (torch.relu(total), total)


def frozen_sums(kind: str, scales: dict[str, float]) -> fx.GraphModule:
    """Frozen, with a quantizer behind each value that has a scale, for its first reader."""
    graph = fx.symbolic_trace(Sums(kind).eval())
    for node in list(graph.graph.nodes):
        if node.name in scales:
            name = f"quantizer_{node.name}"
            graph.add_submodule(
                name, quantizer(scales[node.name], 128 if node.name != "relu" else 0)
            )
            first = next(iter(node.users))
            with graph.graph.inserting_after(node):
                made = graph.graph.call_module(name, (node,))
            node.replace_all_uses_with(made, delete_user_cb=lambda user, first=first: user is first)
    graph.recompile()
    return freeze(graph)


@pytest.mark.parametrize(
    ("kind", "rounded", "whole"),
    [
        ("plain", "a b relu", True),
        ("plain", "a b sum_add", True),
        ("plain", "a b", False),
        ("plain", "a relu", False),
        ("doubled", "a relu", True),
        ("scalar", "a relu", False),
        ("read", "a b relu", False),  # as it is, too
    ],
)
def test_a_sum_of_integers_is_one_that_only_integers_come_of(
    kind: str, rounded: str, whole: bool
) -> None:
    graph = frozen_sums(kind, dict.fromkeys(rounded.split(), 0.5))
    kinds = [type(module) for module in graph.children()]
    assert (FrozenAdd in kinds) == whole
    x = torch.tensor([[-1.5, 0.5, 2.0]])
    found = graph(x, x + 1)
    found = found[0] if isinstance(found, tuple) else found
    expected = {"doubled": 2 * x, "scalar": x + 2}.get(kind, 2 * x + 1)
    assert torch.equal(found, expected.clamp_min(0))


def differing(graph: fx.GraphModule, *inputs: Tensor) -> float:
    """The share of what noise before the roundings changes."""
    given: Any = inputs if len(inputs) > 1 else inputs[0]
    items = Items(given, torch.zeros(len(inputs[0])))
    return (run_module(graph, items) != _run_noisy(graph, items)).double().mean().item()


def test_noise_comes_before_each_rounding() -> None:
    odd = 2.0 * torch.arange(-40, 40)[:, None] + 1
    zero = torch.zeros_like(odd)
    # In halves of what they are rounded to: each is between two.
    ties = frozen_sums("plain", {"a": 1.0, "b": 1.0, "sum_add": 2.0})
    assert differing(ties, odd, zero) == pytest.approx(0.5, abs=0.25)
    # 1.00001 of 2 is 5e-6 beyond a half; and the noise is of the value, not of its zero point 128.
    near = frozen_sums("plain", {"a": 1.0, "b": 1e-3, "sum_add": 2.0})
    assert differing(near, zero + 1, zero + 1e-3) == 0
    source, rounder = quantizer(1.0, 128), quantizer(2.0, 128)
    layer = quantized(torch.tensor([[1]]), torch.tensor([0]), source)
    layer.layer.float()
    graph = fx.symbolic_trace(nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity()))
    for name, module in (("0", source), ("1", layer), ("2", rounder)):
        graph.set_submodule(name, module)
    layer.scale.fill_(1.0)
    layer.bias_step.fill_(1.0)
    with torch.no_grad():
        layer.layer.weight.fill_(1.0)
    assert differing(freeze(graph), odd) == pytest.approx(0.5, abs=0.25)

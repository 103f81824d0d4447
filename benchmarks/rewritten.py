"""What ONNX Runtime's CPU provider makes of a blueprint, by rules, and what it did, by its graph.

A kernel is a line: of a layer its operation, precision, weights (made x read of a group x window),
stride, groups, activation, and "+add" where a residual add runs inside; of anything else the
runtime's name. The rules are those of ONNX Runtime 1.32 on x86 that networks of kernels.py need:

- Float convolutions in two dimensions keep channels in blocks (NCHWc), padded to whole ones; values
  are reordered where somebody else makes or reads them. A sum of two of them runs inside the
  convolution that makes its first input, or its second, if nobody else reads that.
- Integer convolutions have channels last; values are transposed where somebody else makes or reads
  them. What moves or adds integers has them last if all that it reads has; so has a float sum on
  the way to another transposition: one behind it is then enough.
- An activation before a quantizer alone is left out: the quantizer clips as it does.
- A quantizer stands before what only moves values, which then moves integers.
- Whatever reads integers in float has a dequantizer of its own.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from executed import optimized_graph

from flyweight.spaces import Blueprint
from flyweight.spaces.blueprint import Kernel

BOUNDARIES = {"QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput"}
_WEIGHTS = {  # which input they are
    "Conv": 1, "FusedConv": 1, "Gemm": 1, "FusedGemm": 1, "MatMul": 1, "MatMulIntegerToFloat": 1,
    "QLinearConv": 3, "QGemm": 3, "QLinearMatMul": 3,
}  # fmt: skip
_ACTS = {"relu": "Relu", "relu6": "Clip"}
_MOVES = ("maxpool", "reshape", "transpose", "permute", "unflatten")  # kinds and details


def _line(
    operation: str,
    precision: str,
    weights: Sequence[int],
    stride: Sequence[int] = (),
    groups: int = 1,
    act: str = "",
    added: bool = False,
) -> str:
    parts = [operation, precision, "x".join(map(str, weights))]
    parts += ["/" + "x".join(map(str, stride))] * bool(stride)
    parts += [f"g{groups}"] * (groups > 1) + [act] * bool(act) + ["+add"] * added
    return " ".join(parts)


# -- what runs -----------------------------------------------------------------------------------


def executed(graph: onnx.GraphProto) -> Counter[str]:
    """The kernels of ``graph``, which ONNX Runtime made."""
    sizes = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    return Counter(_executed(node, sizes) for node in graph.node)


def _executed(node: onnx.NodeProto, sizes: Mapping[str, tuple[int, ...]]) -> str:
    place = _WEIGHTS.get(node.op_type)
    if place is None or node.input[place] not in sizes:
        return node.op_type
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    weights, act = sizes[node.input[place]], given.get("activation", b"").decode()
    int8 = place == 3 or node.op_type == "MatMulIntegerToFloat"
    precision = "int8" if int8 else "fp32"
    if node.op_type.endswith("Conv"):
        added = not int8 and len(node.input) > 3
        return _line("conv", precision, weights, given["strides"], given["group"], act, added)
    return _line("linear", precision, weights if given.get("transB") else weights[::-1], act=act)


def block() -> int:
    """Channels that float convolutions have side by side here: 8, or 16 with AVX-512."""
    weight = onnx.numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "weight")
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (1, 1, 4, 4))
        for name in ("input", "output")
    ]
    node = onnx.helper.make_node("Conv", ["input", "weight"], ["output"])
    graph = onnx.helper.make_graph([node], "one", values[:1], values[1:], [weight])
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)
    found = optimized_graph(model.SerializeToString())
    return max(weight.dims[0] for weight in found.initializer if len(weight.dims) == 4)


# -- what is said to run -------------------------------------------------------------------------


def rewritten(plan: Blueprint, block: int) -> Counter[str]:
    """The kernels of ``plan``. block: as ``block`` says."""
    return _Rewriting(plan, block).found()


class _Rewriting:
    def __init__(self, plan: Blueprint, block: int) -> None:
        self._plan, self._block = plan, block
        self._makers = {kernel.output: kernel for kernel in plan.kernels}
        self._readers: dict[str, list[Kernel]] = {}
        for kernel in plan.kernels:
            for value in dict.fromkeys(kernel.inputs):
                self._readers.setdefault(value, []).append(kernel)
        self._layers: dict[str, dict[str, Any]] = {}  # by what they make
        self._others: Counter[str] = Counter()
        # Float values
        self._rounded: set[str] = set()  # that are quantized
        self._blocked: dict[str, int] = {}  # in blocks, with their channels
        self._unblocked: set[str] = set()  # of those, what somebody reads otherwise
        self._reordered: set[str] = set()  # of the others, what somebody reads in blocks
        # Integer values, made by what is a float kernel in the blueprint
        self._moved: set[str] = set()
        # Values of either kind
        self._last: set[str] = set()  # with channels last
        self._turned: set[str] = set()  # that are transposed for who wants them otherwise

    def found(self) -> Counter[str]:
        for value in self._plan.quantized:
            self._quantize(value)
        for kernel in self._plan.kernels:
            if kernel.precision == "int8" or kernel.output in self._moved:
                self._integer(kernel)
            else:
                self._float(kernel)
        answer = self._plan.network.output
        self._unblocked |= self._blocked.keys() & {*self._rounded, answer}
        self._others["DequantizeLinear"] += self._is_integer(answer)
        self._turned |= self._last & {answer}
        self._others += Counter(
            QuantizeLinear=len(self._rounded), Transpose=len(self._turned),
            ReorderInput=len(self._reordered), ReorderOutput=len(self._unblocked),
        )  # fmt: skip
        return self._others + Counter(_line(**layer) for layer in self._layers.values())

    # -- quantizers

    def _is_integer(self, value: str) -> bool:
        """Whether ``value`` is made in integers, as the blueprint says."""
        maker = self._makers.get(value)
        return bool(maker and maker.precision == "int8" and value in self._plan.quantized)

    def _quantize(self, value: str) -> None:
        """Puts the quantizer of ``value`` where it is made, or before what only moves it there."""
        if self._is_integer(value):
            return
        while self._only_rounded(value) and (maker := self._makers.get(value)):
            if maker.kind not in _MOVES and maker.detail not in _MOVES:
                break
            self._moved.add(value)
            value = maker.inputs[0]
        self._rounded.add(value)

    def _only_rounded(self, value: str) -> bool:
        """Whether nobody reads ``value`` as it was made."""
        if value in self._plan.quantized:
            return self._plan.rounded[value] == self._plan.network.consumers[value]
        return all(reader.output in self._moved for reader in self._readers[value])

    def _act(self, kernel: Kernel) -> str:
        """What is left of its activation."""
        clipped = kernel.output in self._rounded and self._only_rounded(kernel.output)
        return _ACTS[kernel.act] if kernel.act and not clipped else ""

    # -- kernels of integers

    def _integer(self, kernel: Kernel) -> None:
        last = self._last.intersection(kernel.inputs)
        if kernel.kind == "conv":
            read, made = kernel.channels
            self._layers[kernel.output] = dict(
                operation="conv", precision="int8", stride=kernel.stride, groups=kernel.groups,
                weights=(made, read // kernel.groups, *kernel.kernel),
            )  # fmt: skip
            self._turned.update({*kernel.inputs} - last)
            self._last.add(kernel.output)
            return
        if kernel.kind in ("add", "maxpool", "pool"):
            name = "NhwcMaxPool" if last else "MaxPool"
            names = {"add": "QLinearAdd", "pool": "QLinearGlobalAveragePool"}
            self._others[names.get(kernel.kind, name)] += 1
            if last.issuperset(kernel.inputs):
                self._last.add(kernel.output)
                return
        elif kernel.kind == "linear":
            self._layers[kernel.output] = dict(
                operation="linear", precision="int8", weights=kernel.channels[::-1]
            )
        self._turned |= last

    # -- float kernels

    def _float(self, kernel: Kernel) -> None:
        if kernel.kind == "conv":
            self._convolution(kernel)
        elif kernel.kind == "add":
            self._sum(kernel)
        elif kernel.kind == "linear":
            self._read(kernel)
            self._layers[kernel.output] = dict(
                operation="linear", precision="fp32", weights=kernel.channels[::-1],
                act=self._act(kernel),
            )  # fmt: skip
        elif kernel.kind in ("maxpool", "pool"):
            self._others["MaxPool" if kernel.kind == "maxpool" else "GlobalAveragePool"] += 1
            whole = len(kernel.out_shape) == 4 and kernel.out_shape[1] % self._block == 0
            blocked = whole and (kernel.kind == "maxpool" or kernel.inputs[0] in self._blocked)
            self._read(kernel, blocked)
            if blocked:
                self._blocked[kernel.output] = kernel.out_shape[1]
        else:
            self._read(kernel)

    def _read(self, kernel: Kernel, blocked: bool = False) -> None:
        """What stands before ``kernel``. blocked: whether it reads channels in blocks."""
        for value in dict.fromkeys(kernel.inputs):
            if self._is_integer(value):
                self._others["DequantizeLinear"] += 1
                self._others["ReorderInput"] += blocked
            elif blocked != (value in self._blocked):
                (self._reordered if blocked else self._unblocked).add(value)
            if self._meets_float(value, kernel):
                self._others.update(["Transpose", "QuantizeLinear", "DequantizeLinear"])
            else:
                self._turned |= self._last & {value}

    def _meets_float(self, value: str, kernel: Kernel) -> bool:
        """Whether ``kernel`` is a sum where ``value``, an integer with channels last, meets a float
        on the way to another transposition.

        Its own then moves towards that one as far as it can: behind the dequantizer, before the
        sum. Between the two it gets a quantizer and a dequantizer around it.
        """
        alone = self._last.intersection(kernel.inputs) == {value} and self._is_integer(value)
        return alone and kernel.kind == "add" and self._turns(kernel.output)

    def _turns(self, value: str) -> bool:
        """Whether ``value`` gets to a transposition through sums."""
        return any(
            (reader.kind == "conv" and reader.precision == "int8")
            or (reader.kind == "add" and self._turns(reader.output))
            for reader in self._readers.get(value, ())
        )  # fmt: skip

    def _convolution(self, kernel: Kernel) -> None:
        (read, made), groups = kernel.channels, kernel.groups
        each, blocked = read // groups, False
        if len(kernel.out_shape) == 4:
            self._blocked[kernel.output] = made
            made = self._whole(made)
            blocked = groups > 1 or read >= self._block  # a few channels are read as they are
            if groups == read > 1:
                groups = made
            elif blocked:
                each = self._whole(each)
        self._read(kernel, blocked)
        self._layers[kernel.output] = dict(
            operation="conv", precision="fp32", weights=(made, each, *kernel.kernel),
            stride=kernel.stride, groups=groups, act=self._act(kernel),
        )  # fmt: skip

    def _whole(self, channels: int) -> int:
        """``channels`` in whole blocks."""
        return -(-channels // self._block) * self._block

    def _sum(self, kernel: Kernel) -> None:
        act = self._act(kernel)
        if self._blocked.keys() >= {*kernel.inputs}:
            self._blocked[kernel.output] = kernel.out_shape[1]
            for value in kernel.inputs:
                layer = self._layers.get(value)
                if layer and not layer["act"] and len(self._readers[value]) == 1:
                    layer.update(added=True, act=act)
                    return
        elif self._last.issuperset(kernel.inputs) and (
            self._turns(kernel.output) or not all(map(self._is_integer, kernel.inputs))
        ):
            # The transpositions of all that it reads move behind it, where one is left.
            self._others["DequantizeLinear"] += sum(map(self._is_integer, kernel.inputs))
            self._last.add(kernel.output)
        else:
            self._read(kernel)
        self._others.update(["Add", act] if act else ["Add"])

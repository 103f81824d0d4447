"""What ONNX Runtime's CPU provider executes for a blueprint, by rules, and what it did, by its graph.

A kernel is written in a line: operation, precision, weights (made x read of a group x window),
stride, groups, activation, "+add" where a residual add runs inside. The rules are those of version
1.32, on x86, of what the networks of the benchmarks need.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import onnx

from flyweight.spaces import Blueprint
from flyweight.spaces.blueprint import Kernel

BOUNDARIES = {"QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput"}
_WEIGHT = {
    "Conv": 1, "FusedConv": 1, "Gemm": 1, "FusedGemm": 1, "MatMul": 1, "MatMulIntegerToFloat": 1,
    "QLinearConv": 3, "QGemm": 3, "QLinearMatMul": 3,
}  # fmt: skip
_MOVES = ("maxpool", "reshape")  # and these, by their names:
_MOVES_TOO = ("transpose", "permute", "unflatten")
_ACTS = {"relu": "Relu", "relu6": "Clip"}


def line(
    operation: str,
    precision: str,
    weights: Sequence[int],
    stride: Sequence[int] = (),
    groups: int = 1,
    act: str = "",
    added: bool = False,
) -> str:
    """A layer's kernel."""
    parts = [operation, precision, "x".join(map(str, weights))]
    parts += ["/" + "x".join(map(str, stride))] * bool(stride)
    parts += [f"g{groups}"] * (groups > 1) + [act] * bool(act) + ["+add"] * added
    return " ".join(parts)


# -- what was executed ---------------------------------------------------------------------------


def executed(graph: onnx.GraphProto) -> Counter[str]:
    """The kernels of ``graph``, which ONNX Runtime made."""
    sizes = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    return Counter(_executed(node, sizes) for node in graph.node)


def _executed(node: onnx.NodeProto, sizes: Mapping[str, tuple[int, ...]]) -> str:
    kind = node.op_type
    place = _WEIGHT.get(kind)
    if place is None or node.input[place] not in sizes:
        return kind
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    weights = sizes[node.input[place]]
    precision = "fp32" if place == 1 and kind != "MatMulIntegerToFloat" else "int8"
    if kind.endswith("Conv"):
        act = given.get("activation", b"").decode()
        added = precision == "fp32" and len(node.input) > 3
        return line("conv", precision, weights, given["strides"], given["group"], act, added)
    if len(weights) == 2 and not given.get("transB", 0):
        weights = weights[::-1]
    return line("linear", precision, weights, act=given.get("activation", b"").decode())


# -- what is said to be --------------------------------------------------------------------------


def rewritten(plan: Blueprint, block: int) -> Counter[str]:
    """The kernels of ``plan``. block: channels that the runtime's float convolutions have side by
    side."""
    return _Rewriting(plan, block).found()


class _Rewriting:
    def __init__(self, plan: Blueprint, block: int) -> None:
        self._plan, self._block = plan, block
        self._makers = {kernel.output: kernel for kernel in plan.kernels}
        self._readers: dict[str, list[Kernel]] = {}
        for kernel in plan.kernels:
            for value in dict.fromkeys(kernel.inputs):
                self._readers.setdefault(value, []).append(kernel)
        self._layers: dict[str, dict] = {}  # by what they make
        self._others: list[str] = []
        self._blocked: dict[str, int] = {}  # value that is in blocks -> its channels
        self._rounds: set[str] = set()  # float values that are quantized
        self._moved: set[str] = set()  # what movers of integers make

    def found(self) -> Counter[str]:
        for value in self._plan.quantized:
            self._quantize(value)
        for kernel in self._plan.kernels:
            self._add(kernel)
        lines = [line(**layer) for layer in self._layers.values()]
        return Counter(lines + self._others)

    def _in_int8(self, value: str) -> bool:
        maker = self._makers.get(value)
        return maker is not None and maker.precision == "int8"

    def _quantize(self, value: str) -> None:
        """Quantization moves up through what only moves values."""
        if self._in_int8(value):
            return
        while self._only_rounded(value) and (maker := self._makers.get(value)):
            if maker.kind not in _MOVES and maker.detail not in _MOVES_TOO:
                break
            if maker.precision == "int8":
                break
            self._moved.add(value)
            value = maker.inputs[0]
        self._rounds.add(value)

    def _only_rounded(self, value: str) -> bool:
        """Whether nobody reads ``value`` as it was made."""
        if value == self._plan.network.output:
            return False
        readers = self._readers.get(value, [])
        if all(r.output in self._moved for r in readers):
            return True
        return value in self._plan.quantized and self._plan.rounded[
            value
        ] == self._plan.network.consumers[value]

    def _act(self, kernel: Kernel) -> str:
        """What is left of an activation: a quantizer behind it clips as it does."""
        if not kernel.act or (kernel.output in self._rounds and self._only_rounded(kernel.output)):
            return ""
        return _ACTS[kernel.act]

    def _add(self, kernel: Kernel) -> None:
        if kernel.kind == "conv":
            self._convolution(kernel)
        elif kernel.kind == "linear":
            read, made = kernel.channels
            act = "" if kernel.precision == "int8" else self._act(kernel)
            self._layers[kernel.output] = dict(
                operation="linear", precision=kernel.precision, weights=(made, read), act=act
            )
        elif kernel.kind == "add":
            self._sum(kernel)
        elif kernel.kind == "act":
            self._others.append(_ACTS[kernel.detail])

    def _convolution(self, kernel: Kernel) -> None:
        read, made = kernel.channels
        groups, each = kernel.groups, read // kernel.groups
        act = ""
        if kernel.precision == "fp32":
            act = self._act(kernel)
            if len(kernel.out_shape) == 4:
                made_in = self._up(made)
                if groups == read == made:
                    groups = made_in
                elif groups == 1 and read >= self._block:
                    each = self._up(read)
                self._blocked[kernel.output] = made
                made = made_in
        self._layers[kernel.output] = dict(
            operation="conv", precision=kernel.precision, weights=(made, each, *kernel.kernel),
            stride=kernel.stride, groups=groups, act=act,
        )  # fmt: skip

    def _up(self, channels: int) -> int:
        return -(-channels // self._block) * self._block

    def _sum(self, kernel: Kernel) -> None:
        if kernel.precision == "int8":
            self._others.append("QLinearAdd")
            return
        act = self._act(kernel)
        if all(value in self._blocked for value in kernel.inputs):
            self._blocked[kernel.output] = kernel.out_shape[1]
            for value in kernel.inputs:
                layer = self._layers.get(value)
                if layer and not layer["act"] and len(self._readers[value]) == 1:
                    layer |= {"added": True, "act": act}
                    return
        self._others += ["Add", act] if act else ["Add"]

"""An ONNX file in the making: runs a traced module on one request and notes what it runs."""

from collections.abc import Callable, Mapping
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx

_TYPES = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}


class NotCovered(Exception):
    """The module has an operation that is not known here."""


class Writer(fx.Interpreter):
    """Runs the module on one request, so that every shape is known, and notes what it runs."""

    def __init__(
        self,
        graph: fx.GraphModule,
        inputs: Mapping[fx.Node, str],
        operations: Mapping[Any, "Operation"],
    ) -> None:
        super().__init__(graph)
        self.operations = operations
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.tensors: dict[str, Tensor] = {}
        self.quantized: dict[str, Any] = {}  # value -> the module that quantizes it
        taken = {*inputs.values(), "output"}
        self.names = {
            node: f"{node.name}_value" if node.name in taken else node.name
            for node in graph.graph.nodes
        }
        self.names.update(inputs)
        (answer,) = next(n for n in graph.graph.nodes if n.op == "output").args
        if not isinstance(answer, fx.Node) or answer in inputs:
            self.names = {}  # several outputs, or none that is computed
        else:
            self.names[answer] = "output"

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if not self.names or not isinstance(result, Tensor) or result.dtype not in _TYPES:
            raise NotCovered
        if n.op in ("placeholder", "output"):
            name = self.names[n] if n.op == "placeholder" else "output"
            shape = ["batch", *result.shape[1:]]
            info = helper.make_tensor_value_info(name, _TYPES[result.dtype], shape)
            (self.inputs if n.op == "placeholder" else self.outputs).append(info)
            return result
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        operation = self.operations.get(n.target if module is None else type(module))
        if n.op == "get_attr" or operation is None:
            raise NotCovered
        operation(self, n, result if module is None else module)
        return result

    def constant(self, name: str, tensor: Tensor) -> str:
        self.tensors[name] = tensor.detach()
        return name

    def constants(self) -> list[onnx.TensorProto]:
        return [
            numpy_helper.from_array(t.contiguous().numpy(), name)
            for name, t in self.tensors.items()
        ]

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        made = helper.make_node(kind, inputs, [output], name=f"{output}:{kind}", **attributes)
        self.nodes.append(made)
        return output

    def value(self, node: fx.Node, place: int = 0) -> str:
        """The name of the tensor that is argument ``place`` of ``node``."""
        found = node.args[place] if place < len(node.args) else None
        if not isinstance(found, fx.Node):
            raise NotCovered
        return self.names[found]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of the first argument of ``node`` for one request."""
        return tuple(self.env[node.args[0]].shape)  # type: ignore[index]


# Notes what a node does: of a module the module is given, of a function its result.
Operation = Callable[[Writer, fx.Node, Any], None]

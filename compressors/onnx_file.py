"""An ONNX file in the making: runs a traced module on one request and notes what it runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.bool: TensorProto.BOOL,
}


class NotCovered(Exception):
    """The module has an operation that is not known here."""


class Writer(fx.Interpreter):
    """Runs the module on one request, so that every shape is known, and notes what it runs.

    A node gives numbers (sizes and what is computed from them), which are simply known; or
    tensors that no request changes (parameters, positions), which are ``fixed`` and become
    constants where they are read; or tensors that ``operations`` writes.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        request: Sequence[Tensor],
        inputs: Mapping[fx.Node, str],
        operations: Mapping[Any, "Operation"],
    ) -> None:
        super().__init__(graph)
        self.request = request
        self.operations = operations
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.tensors: dict[str, Tensor] = {}
        self.fixed: set[fx.Node] = set()
        self.casts: set[str] = set()
        self.quantized: dict[str, Any] = {}  # value -> the module that quantizes it
        self.zeros: dict[fx.Node, list[int]] = {}  # what the layers behind a padding add for it
        self.parts: dict[fx.Node, list[Any]] = {}  # of nodes that give several tensors their names
        taken = {*inputs.values(), "output"}
        self.names = {
            node: f"{node.name}_value" if node.name in taken else node.name
            for node in graph.graph.nodes
        }
        self.names.update(inputs)
        (answer,) = next(n for n in graph.graph.nodes if n.op == "output").args
        if not isinstance(answer, fx.Node) or answer in inputs:
            raise NotCovered  # several outputs, or none that is computed
        self.names[answer] = "output"

    @cached_property
    def doubled(self) -> dict[fx.Node, Any]:
        """What each node gives for two requests: of tensors their shapes, numbers as they are.

        What differs from one request depends on the batch.
        """
        seen: dict[fx.Node, Any] = {}

        class Watch(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                seen[n] = shapes(result)
                return result

        try:
            Watch(self.module).run(*(torch.cat([t, t]) for t in self.request))
        except Exception as error:  # of the module, made for one request
            raise NotCovered from error
        return seen

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op in ("placeholder", "output"):
            name = self.names[n] if n.op == "placeholder" else "output"
            if not isinstance(result, Tensor) or result.dtype not in TYPES or not result.ndim:
                raise NotCovered
            shape = ["batch", *result.shape[1:]]
            info = helper.make_tensor_value_info(name, TYPES[result.dtype], shape)
            (self.inputs if n.op == "placeholder" else self.outputs).append(info)
        elif not _tensors(result):
            pass  # a number; who reads it knows it
        elif self._is_fixed(n):
            if self.names[n] == "output":
                raise NotCovered
            self.fixed.add(n)
        else:
            operation = self.operations.get(
                n.target if self.owner(n) is None else type(self.owner(n))
            )
            if operation is None or any(t.dtype not in TYPES for t in _tensors(result)):
                raise NotCovered
            operation(self, n, result)
        return result

    def _is_fixed(self, node: fx.Node) -> bool:
        return node.op == "get_attr" or all(
            source in self.fixed
            if _tensors(self.env[source])
            else self.env[source] == self.doubled[source]
            for source in node.all_input_nodes
        )

    def owner(self, node: fx.Node) -> Any:
        """The module that ``node`` calls, None if it calls a function."""
        return self.fetch_attr(str(node.target)) if node.op == "call_module" else None

    def call(self, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
        """What ``node`` calls, on other arguments."""
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        target: Any = self.owner(node) or node.target
        return target(*args, **kwargs)

    def settings(self, node: fx.Node, **defaults: Any) -> list[Any]:
        """The settings called as ``defaults``, in their order: of a module its attributes, of a
        function its arguments behind the first. Tensors among them stay nodes."""
        owner = self.owner(node)
        if isinstance(owner, nn.Module):
            return [getattr(owner, name, default) for name, default in defaults.items()]
        return self.arguments(node, **defaults)

    def arguments(self, node: fx.Node, **defaults: Any) -> list[Any]:
        """The arguments called as ``defaults`` behind the first, also of the call of a module."""
        given = {**dict(zip(defaults, node.args[1:], strict=False)), **node.kwargs}
        if len(node.args) - 1 > len(defaults) or not given.keys() <= defaults.keys():
            raise NotCovered
        return [self.known(given.get(name, default)) for name, default in defaults.items()]

    def known(self, argument: Any) -> Any:
        """``argument`` with its numbers worked out; tensors in it stay nodes."""

        def work_out(node: fx.Node) -> Any:
            value = self.env[node]
            if _tensors(value):
                return node
            if value != self.doubled[node]:
                raise NotCovered  # a number of requests
            return value

        return fx.node.map_arg(argument, work_out)

    def read(self, argument: Any, dtype: torch.dtype | None = None) -> str:
        """The name of the tensor that is ``argument``, a node or a number, as ``dtype``."""
        argument = self.known(argument)
        if not isinstance(argument, fx.Node):
            if not isinstance(argument, bool | int | float):
                raise NotCovered
            return self.numbers(argument, dtype)
        tensor = self.env[argument]
        if not isinstance(tensor, Tensor):
            raise NotCovered  # several
        dtype = dtype or tensor.dtype
        if argument in self.fixed:
            return self.constant(f"{argument.name}:{plain(dtype)}", tensor.to(dtype))
        name = self.names[argument]
        return name if dtype == tensor.dtype else self.cast(name, dtype)

    def cast(self, name: str, dtype: torch.dtype) -> str:
        made = f"{name}:{plain(dtype)}"
        if made not in self.casts:
            self.casts.add(made)
            self.node("Cast", [name], made, to=TYPES[dtype])
        return made

    def value(self, node: fx.Node, place: int = 0, dtype: torch.dtype | None = None) -> str:
        """The name of the tensor that is argument ``place`` of ``node``."""
        if place >= len(node.args):
            raise NotCovered
        return self.read(node.args[place], dtype)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of the first argument of ``node`` for one request."""
        return tuple(self.env[source_of(node)].shape)

    def varies(self, node: Any, axis: int) -> bool:
        """Whether the size of ``node`` along ``axis`` depends on the batch."""
        return bool(self.env[node].shape[axis] != self.doubled[node][axis])

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(
            helper.make_node(kind, inputs, [output], name=f"{output}:{kind}", **attributes)
        )
        return output

    def several(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        """A node that gives ``outputs``."""
        name = f"{outputs[0]}:{kind}"
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, **attributes))

    def alias(self, node: fx.Node, name: str) -> None:
        """``node`` gives the value ``name`` as it is."""
        if self.names[node] == "output":
            self.node("Identity", [name], "output")
        else:
            self.names[node] = name

    def constant(self, name: str, tensor: Tensor) -> str:
        self.tensors[name] = tensor.detach()
        return name

    def numbers(self, value: Any, dtype: torch.dtype | None = None) -> str:
        """A constant of one or several numbers; equal ones are one."""
        tensor = torch.tensor(value, dtype=dtype)
        return self.constant(f"{value}:{plain(tensor.dtype)}", tensor)

    def constants(self, read: set[str]) -> Iterator[onnx.TensorProto]:
        """Those that are called as one of ``read``."""
        for name, tensor in self.tensors.items():
            if name in read:
                yield numpy_helper.from_array(tensor.contiguous().numpy(), name)


def plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def source_of(node: fx.Node) -> fx.Node:
    """The node that is the first argument of ``node``."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        raise NotCovered
    return source


def shapes(value: Any) -> Any:
    """Of tensors, also those in a tuple, their shapes; anything else as it is."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return tuple(tuple(t.shape) for t in _tensors(value)) or value


def _tensors(value: Any) -> list[Tensor]:
    """The tensors that a node gives, none if it gives something else."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):  # attention gives (tensor, None)
        return [t for t in value if isinstance(t, Tensor)]
    return []


# Notes what a node does, given the writer, the node and what it gives for one request.
Operation = Callable[[Writer, fx.Node, Any], None]

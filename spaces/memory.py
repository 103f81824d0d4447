"""Makes a traced graph independent of memory: every node a value of its own, written once.

Tracing keeps ``y += x`` and ``relu_(y)`` as they are written. But a graph in which quantizers are
put between values, and an ONNX file, know no memory: whoever reads ``y`` after it was changed must
read the result of the change. And ``view`` asks for a layout that the student does not have.
"""

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from .errors import Untraceable

# (an operation, a value that it changed, whether its result is that value and not a part of it)
Change = tuple[fx.Node, fx.Node, bool]

_OPERATORS = {
    getattr(operator, f"i{name}".rstrip("_")): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod", "and_", "or_", "xor")
}
_METHODS = {"view": "reshape", "view_as": "reshape_as"}


def versions(values: dict[fx.Node, Any]) -> dict[fx.Node, int]:
    """How often each tensor of ``values`` was written; views of one another count together."""
    return {node: t._version for node, t in values.items() if isinstance(t, Tensor)}


def changes(
    node: fx.Node, result: Any, before: dict[fx.Node, int], values: dict[fx.Node, Any]
) -> list[Change]:
    """What ``node`` wrote to, given the ``versions`` of ``values`` before it ran."""
    found = (m for m, version in before.items() if values[m]._version != version)
    return [(node, m, _same(values[m], result)) for m in found]


def _same(value: Tensor, result: Any) -> bool:
    return (
        isinstance(result, Tensor)
        and value.data_ptr() == result.data_ptr()
        and (value.shape, value.stride()) == (result.shape, result.stride())
    )


def write_once(graph: fx.GraphModule, found: Sequence[Change]) -> None:
    """Readers of a changed value read the operation that changed it; then nothing is in place.

    Modules of the traced model stay as they are. Raises Untraceable where only a part of a value
    that is read again was changed.
    """
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    now: dict[fx.Node, fx.Node] = {}  # a value -> where it is found since it was changed
    for node, value, same in found:
        while value in now:
            value = now[value]
        readers = [user for user in value.users if order[user] > order[node]]
        if readers and not same and value is not node:
            raise Untraceable(
                f"{node.name!r} changes in place a part or a view of {value.name!r}, which "
                f"{readers[0].name!r} reads afterwards; give the changed value a name of its own"
            )
        for reader in readers:
            reader.replace_input_with(value, node)
        if same and value is not node:
            now[value] = node
    for node in graph.graph.nodes:
        _out_of_place(graph, node)


def _out_of_place(graph: fx.GraphModule, node: fx.Node) -> None:
    if node.op == "call_method":
        node.target = _method(str(node.target), node.args)
    elif node.op == "call_function":
        node.target = _function(node.target)
    elif node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if getattr(module, "inplace", False) is True:
            module = copy.deepcopy(module)
            module.inplace = False  # type: ignore[assignment]
            graph.set_submodule(str(node.target), module)
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}


def _method(name: str, args: Sequence[Any]) -> str:
    if name in _METHODS and not any(isinstance(a, torch.dtype) for a in args):
        return _METHODS[name]
    plain = name.removesuffix("_")
    return plain if callable(getattr(torch.Tensor, plain, None)) else name


def _function(function: Any) -> Any:
    if function in _OPERATORS:
        return _OPERATORS[function]
    name = getattr(function, "__name__", "")
    if not name.endswith("_") or name.startswith("_"):
        return function
    return getattr(torch, name[:-1], None) or getattr(F, name[:-1], None) or function

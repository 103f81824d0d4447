"""Writes a traced module as ONNX, operation by operation.

In milliseconds; torch.onnx takes seconds (it rebuilds its registry at each call and traces a
network four times), and every trial would pay for them. Here are the operations that convolutional
networks and transformers consist of. ``write`` returns None for a module that has another, and
``export.to_onnx`` gives that one to torch.onnx.
"""

from collections.abc import Mapping
from typing import Any

import onnx
import torch
from onnx import helper
from torch import fx

from .onnx_file import NotCovered, Writer
from .onnx_operations import OPERATIONS
from .prune import in_order

OPSET = 20  # QuantizeLinear of 8-bit types, understood by every runtime flyweight names


def write(graph: fx.GraphModule, example: Any, inputs: list[str]) -> bytes | None:
    """``graph`` as ONNX with a dynamic first axis, or None if it has an operation unknown here.

    inputs: what to call the inputs; those of a dict carry their keys. The output is named
    ``output``; every other value is named as its node.
    """
    holders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    if isinstance(example, Mapping):
        inputs = [str(node.target) for node in holders]
    request = in_order(graph, example)
    try:
        writer = Writer(graph, request, dict(zip(holders, inputs, strict=True)), OPERATIONS)
        with torch.no_grad():
            writer.run(*request)
    except NotCovered:
        return None
    nodes = _read(writer.nodes)
    made = helper.make_graph(nodes, "flyweight", writer.inputs, writer.outputs, [])
    opset = helper.make_opsetid("", OPSET)
    version = helper.find_min_ir_version_for([opset])
    model = helper.make_model(
        made, opset_imports=[opset], ir_version=version, producer_name="flyweight"
    )
    # Last, and one by one: onnx copies what it is given, and the helpers copy again.
    model.graph.initializer.extend(writer.constants({name for n in nodes for name in n.input}))
    return model.SerializeToString(deterministic=True)  # type: ignore[no-any-return]


def _read(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Those of ``nodes``, in execution order, that the output depends on.

    A value that is dequantized for each reader apart needs no dequantization for all.
    """
    kept, read = [], {"output"}
    for node in reversed(nodes):
        if not read.isdisjoint(node.output):
            kept.append(node)
            read.update(node.input)
    return kept[::-1]

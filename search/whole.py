"""What of a network stays whole, and why: what a plan tells of it."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..spaces import Network, Space
from ..spaces.label_rules import RULES
from ..spaces.network import Op

FUNCTIONAL = ("linear", "conv1d", "conv2d", "conv3d")  # torch.nn.functional's layers


def left_whole(space: Space, student: str, model: nn.Module) -> dict[str, str]:
    """By name the layers of ``student`` that keep every output, and the modules with weights that
    nothing is done to, with the reason. model: what the student starts from."""
    network = space.networks[student]
    found = {}
    for op in network.ops:
        if op.module and (kind := _unknown(model, op)):
            found[op.module] = f"a {kind} is not looked into, and stays in float"
        if weight := _own_weight(network, model, op):
            found[weight] = f"{op.detail} reads it outside of a torch.nn layer; it stays in float"
    for name, layer in network.layers.items():
        if layer.out_group is None:
            found[name] = _reason(network, name, model)
            continue
        group = layer.out_group if student == "pruned" else f"{student}:{layer.out_group}"
        widths = space.widths[group]
        if len(widths) == 1:
            found[name] = f"of its {widths[0]} channels none may go by min_keep and multiple_of"
    return found


def _unknown(model: nn.Module, op: Op) -> str:
    """The type of the module that ``op`` calls if it has weights and no rule says what it does."""
    module: Any = model.get_submodule(op.module)
    known = type(module) in RULES or not any(True for _ in module.parameters())
    return "" if known else type(module).__name__


def _own_weight(network: Network, model: nn.Module, op: Op) -> str:
    """The weight that ``op`` reads itself where that makes it a layer that nobody knows as one:
    a subclass of a layer with a forward of its own is traced into."""
    if op.detail not in FUNCTIONAL:
        return ""
    parameters = {name for name, value in model.named_parameters() if value.ndim > 1}
    behind = list(op.inputs[1:])
    for value in behind:  # grows: the weight may be made of a parameter
        made = network.op[value]
        if made.detail in parameters:
            return made.detail
        behind += [] if made.module else made.inputs
    return ""


def _reason(network: Network, layer: str, model: nn.Module) -> str:
    for op in _reached(network, layer):
        if op.kind == "output":
            return "its outputs are the answer"
        if op.kind == "input":
            return "its outputs are added to the request"
        if op.module and (kind := _unknown(model, op)):
            return f"its outputs meet {op.module}, a {kind}, which is not looked into"
    return "what reads its outputs needs all of them"


def _reached(network: Network, layer: str) -> Iterator[Op]:
    """What the outputs of ``layer`` meet before another layer makes others of them; where they are
    added to what another one gives, also what that meets."""
    stack = [reader for use in network.uses[layer] for reader in network.consumers[use.name]]
    seen: set[str] = set()
    while stack:
        name = stack.pop()
        op = network.op[name]
        if name in seen or op.module in network.layers:
            continue
        seen.add(name)
        yield op
        if op.kind != "input":
            stack += network.consumers[name]
        if op.kind == "add":
            for value in op.inputs:
                from_layer = network.op[value].module in network.layers
                stack += network.consumers[value] if from_layer else [value]

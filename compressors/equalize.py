"""Equalization: quiet channels are made louder before they are rounded.

All channels of a quantized value share one step, so a channel much quieter than the loudest is
rounded to a few levels. Multiplying channel c where it is made by s_c and dividing by s_c the
weights that read it changes nothing in float, wherever all that lies between is homogeneous
(Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction",
sec. 4.1; for activations Meller et al. 2019, "Same, same but different"). What is gained on
activations can be lost on the weights that read them, so each set of channels takes the scales for
which the expected squared error of its readers is least:

    sum_oc W_oc^2 step^2 / (12 s_c^2)  +  sum_oc s_c^2 E[x_c^2] weight_step_o^2 / 12,

and a depthwise reader, whose step follows its only channel, loses nothing.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..spaces import Blueprint, Network
from ..spaces.network import LAYER_KINDS, Op
from .data import Items
from .prune import in_order

HOMOGENEOUS = ("act", "add", "pool", "avgpool", "average", "maxpool", "reshape", "norm")
CLIP = 6.0  # of ReLU6, which stays what it was only where no channel is scaled beyond it
# Room for values larger than any seen: with 1.1 times what 64 crops showed, clipping made 44% of
# the squared error of EfficientNet-Lite0's logits in int8 on other photographs.
MARGIN = 1.5
POWERS = torch.linspace(0, 1, 11).tolist()
CHECKED = 16  # items on which the outcome is compared with the graph that it came from
TOLERANCE = 1e-3  # share of the largest answer
LOUDEST = 2.0**10  # of a channel against itself: a channel that never speaks stays finite


@dataclass
class Channels:
    """Channels that must be scaled together, of one or several values.

    makers, readers: layers by name. values: all of them; fixed: whether something on the way is
    not homogeneous. clipped: the values behind a ReLU6.
    """

    width: int
    makers: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    clipped: list[str] = field(default_factory=list)
    fixed: bool = False

    def join(self, other: "Channels") -> None:
        for name in ("makers", "readers", "values", "clipped"):
            getattr(self, name).extend(getattr(other, name))
        self.fixed |= other.fixed or self.width != other.width


def tied_channels(network: Network) -> list[Channels]:
    """The sets of channels of ``network`` that may be scaled, in execution order."""
    of: dict[str, Channels] = {}

    def merge(a: Channels, b: Channels) -> Channels:
        if a is not b:
            a.join(b)
            for value in b.values:
                of[value] = a
        return a

    for op in network.ops:
        if op.name in network.sizes:
            continue
        known = [of[i] for i in op.inputs if i in of]
        if op.kind in LAYER_KINDS:
            layer = network.layers[op.module]
            own = Channels(layer.out_channels, makers=[layer.name], values=[op.name])
            again = len(network.uses[layer.name]) > 1
            own.fixed = op.axis != 1 or again or (op.kind == "linear" and len(op.shape) > 2)
            for source in known:
                source.readers.append(layer.name)
                whole = layer.groups == 1 or layer.groups == layer.in_channels == layer.out_channels
                source.fixed |= not whole or again or len(op.shape) == 3
        elif op.kind in HOMOGENEOUS and known and _homogeneous(op, network):
            own = known[0]
            for other in known[1:]:
                own = merge(own, other)
            own.values.append(op.name)
            if op.detail == "relu6":
                own.clipped.append(op.name)
        else:
            for source in known:
                source.fixed = True
            width = op.shape[1] if len(op.shape) > 1 else 0
            own = Channels(width, values=[op.name], fixed=True)
        of[op.name] = own
    if network.output in of:
        of[network.output].fixed = True
    return list({id(c): c for c in of.values() if not c.fixed and c.readers}.values())


def _homogeneous(op: Op, network: Network) -> bool:
    """Whether scaled channels give scaled channels, each as many values in a row."""
    if op.kind == "act" and op.detail not in ("relu", "relu6"):
        return False
    before = network.op[op.inputs[0]]
    if op.kind == "norm":  # one that is folded is no operation any more
        return network.folded.get(before.module) == op.module
    if op.kind == "reshape":
        return len(op.shape) == 2 and before.axis == op.axis == 1
    return op.shape[1:2] == before.shape[1:2]


@torch.no_grad()
def equalize(
    graph: fx.GraphModule, network: Network, plan: Blueprint, items: Items
) -> fx.GraphModule:
    """A copy of the folded ``graph`` that computes the same with channels of like loudness."""
    before, graph = graph, copy.deepcopy(graph)
    some = [c for c in tied_channels(network) if not plan.quantized.keys().isdisjoint(c.values)]
    rounded = {v for c in some for v in c.values if v in plan.quantized}
    seen = _loudness(graph, rounded.union(*(c.clipped for c in some)), items)
    for channels in some:
        width = len(graph.get_submodule(channels.makers[0]).weight)  # type: ignore[arg-type]
        # Of a flattened value each channel is several features in a row.
        found = [[t.reshape(width, -1) for t in seen[v]] for v in channels.values if v in rounded]
        low = torch.stack([f[0].amin(1) for f in found])  # [values, channels]
        high = torch.stack([f[1].amax(1) for f in found])
        square = torch.stack([f[2].mean(1) for f in found]).amax(0)
        readers: list[Any] = [graph.get_submodule(name) for name in channels.readers]
        highest = [seen[v][1].reshape(width, -1).amax(1) for v in channels.clipped]
        ceiling = torch.stack(highest).amax(0) if highest else None
        scale = best_scale(low, high, square, readers, ceiling, plan)
        for name in channels.makers:
            maker: Any = graph.get_submodule(name)
            maker.weight.mul_(scale.reshape(-1, *[1] * (maker.weight.ndim - 1)))
            if maker.bias is not None:
                maker.bias.mul_(scale)
        for reader in readers:
            reader.weight.div_(_for_reader(reader, scale))
    return graph if _same(graph, before, items) else before


def _same(ours: fx.GraphModule, theirs: fx.GraphModule, items: Items) -> bool:
    """Whether both compute the same but for float rounding: a network may do what looks homogeneous
    here and is not."""
    inputs = in_order(ours, items.first(CHECKED).inputs)
    expected = theirs(*inputs)
    return bool((ours(*inputs) - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _for_reader(reader: Any, scale: Tensor) -> Tensor:
    """``scale`` [channels] in the shape of the weights of ``reader``."""
    ones = [1] * (reader.weight.ndim - 2)
    if _depthwise(reader):
        return scale.reshape(-1, 1, *ones)
    spread = reader.weight.shape[1] // len(scale)  # a flattened channel is several features
    return scale.repeat_interleave(spread).reshape(1, -1, *ones)


def _depthwise(reader: Any) -> bool:
    return getattr(reader, "groups", 1) > 1


def _columns(reader: Any, width: int) -> Tensor:
    """The weights of ``reader`` by input channel: [outputs, channels, weights for each]."""
    weight: Tensor = reader.weight
    return weight.reshape(1 if _depthwise(reader) else len(weight), width, -1)


def best_scale(
    low: Tensor,
    high: Tensor,
    square: Tensor,
    readers: list[Any],
    ceiling: Tensor | None,
    plan: Blueprint,
) -> Tensor:
    """The scale of each channel [channels] with the least expected error.

    low, high: extremes of the channels of each value [values, channels]; square: mean squares;
    ceiling: the largest values behind a ReLU6 [channels], None if there is none.
    """
    loud = torch.maximum(high, -low).amax(0).clamp_min(1e-8)  # [channels]
    silent = loud <= loud.max() / LOUDEST
    dense = [_columns(r, len(loud)) for r in readers if not _depthwise(r)]
    gain = sum(((_columns(r, len(loud)) ** 2).sum((0, 2)) for r in readers), torch.zeros_like(loud))
    limit = 2 ** (plan.weight_bits - 1) - 1
    best, chosen = float("inf"), torch.ones_like(loud)
    reach = torch.stack([w.abs().amax((0, 2)) for w in dense]).amax(0) if dense else None
    for power in POWERS:
        for weighed in (False, True) if reach is not None else (False,):
            scale = loud**-power
            if weighed and reach is not None:
                scale = scale * reach.clamp_min(reach.max() / LOUDEST) ** (1 - power)
            scale = scale / scale[loud.argmax()]
            # What is silent here need not be so elsewhere: it is not made louder.
            scale = torch.where(silent, scale.clamp_max(1), scale)
            if ceiling is not None:
                room = CLIP / (MARGIN * ceiling.clamp_min(1e-8))
                scale = scale.clamp(torch.ones(()), torch.where(silent, 1, room.clamp(1, LOUDEST)))
            else:
                scale = scale.clamp(1 / LOUDEST, LOUDEST)
            step = ((high * scale).amax(1) - (low * scale).amin(1).clamp_max(0)).amax() / 255
            error = (gain * step**2 / scale**2).sum()
            for w in dense:
                weight_step = (w.abs().amax(2) / scale).amax(1) / limit  # [outputs]
                error += (square * scale**2).sum() * w.shape[2] * (weight_step**2).sum()
            if error < best:
                best, chosen = error.item(), scale
    return chosen


def _loudness(
    graph: fx.GraphModule, values: set[str], items: Items
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of each value the least, the largest and the mean square of every channel [channels]."""
    seen: dict[str, list[Tensor]] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            x = super().run_node(n)
            if n.name in values:
                rows = x.transpose(0, 1).flatten(1)  # [channels, N ...]
                one = [rows.amin(1), rows.amax(1), (rows**2).mean(1) * len(x)]
                if n.name in seen:
                    low, high, square = seen[n.name]
                    one = [torch.minimum(low, one[0]), torch.maximum(high, one[1]), square + one[2]]
                seen[n.name] = one
            return x

    for batch in items.chunks():
        Watch(graph).run(*in_order(graph, batch.inputs))
    count = len(items)
    return {name: (low, high, square / count) for name, (low, high, square) in seen.items()}

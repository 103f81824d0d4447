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

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..spaces import Blueprint, Network
from ..spaces.network import Op
from .data import Items
from .prune import in_order

HOMOGENEOUS = ("act", "add", "pool", "maxpool", "reshape", "norm")  # norms are folded
CLIP = 6.0  # of ReLU6, which stays what it was only where no channel is scaled beyond it
MARGIN = 1.1  # room for values larger than any seen
POWERS = torch.linspace(0, 1, 11).tolist()
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
    uses = Counter(op.module for op in network.ops if op.module in network.layers)

    def merge(a: Channels, b: Channels) -> Channels:
        if a is not b:
            a.join(b)
            for value in b.values:
                of[value] = a
        return a

    for op in network.ops:
        known = [of[i] for i in op.inputs if i in of]
        if op.kind in ("conv", "linear"):
            layer = network.layers[op.module]
            own = Channels(layer.out_channels, makers=[layer.name], values=[op.name])
            own.fixed = op.axis != 1 or uses[op.module] > 1
            for source in known:
                source.readers.append(layer.name)
                whole = layer.groups == 1 or layer.groups == layer.in_channels == layer.out_channels
                source.fixed |= not whole or uses[op.module] > 1 or len(op.shape) == 3
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
    if op.kind == "reshape":
        return len(op.shape) == 2 and before.axis == op.axis == 1
    return op.shape[1:2] == before.shape[1:2]

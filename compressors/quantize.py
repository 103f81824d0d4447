"""Static int8 in core PyTorch arithmetic: calibrated, trainable (straight-through), exact.

Weights: symmetric, per output channel. Activations: asymmetric uint8, per tensor. The scheme and
its straight-through training follow Jacob et al. 2018, "Quantization and training of neural
networks for efficient integer-arithmetic-only inference".
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ..spaces import Blueprint, Impossible, Network
from ..spaces.blueprint import Kernel
from ..spaces.network import Window
from .data import Items
from .observe import ACTIVATION_RANGES, Observer, weight_scale
from .prune import call

BIAS_LIMIT = 2.0**30  # half of what 32 bits hold: training may move a bias
# A step of what is averaged, of the steps of the sum: ONNX Runtime's kernel refuses 2^-32 and less.
FINEST = 2.0**-31


class ActivationQuantizer(nn.Module):
    """Rounds a value to 256 steps between ``low`` and ``high``, which contain 0."""

    scale: Tensor  # [] float32
    zero: Tensor  # [] int32, 0 to 255

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero", torch.zeros((), dtype=torch.int32))
        self.observer: Observer | None = None

    def set_range(self, low: float, high: float) -> None:
        low, high = min(low, 0.0), max(high, 0.0)
        # A constant zero has no range: any scale is exact for it.
        scale = max(high - low, 1e-8) / 255
        self.scale.fill_(scale)
        self.zero.fill_(min(max(round(-low / scale), 0), 255))

    def coarsen(self, scale: float) -> None:
        """Makes each step at least ``scale``."""
        if self.scale < scale:
            low = -self.zero.item() * self.scale.item()
            self.set_range(low, low + 255 * scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.see(x)
            return x
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, 0, 255)


class QuantizedLayer(nn.Module):
    """A convolution or linear layer whose weights are rounded to ``bits`` bits per channel."""

    scale: Tensor  # [out_channels] float32
    bias_step: Tensor  # [out_channels] float32, 0 where the bias stays as it is

    def __init__(self, layer: Any, bits: int, calibration: str) -> None:
        super().__init__()
        self.layer = layer
        self.limit = 2 ** (bits - 1) - 1
        self.register_buffer("scale", weight_scale(layer.weight, self.limit, calibration))
        self.register_buffer("zero", torch.zeros(len(self.scale), dtype=torch.int32))
        self.register_buffer("bias_step", torch.zeros(len(self.scale)))

    @torch.no_grad()
    def settle_bias(self, input_scale: Tensor) -> None:
        """The bias becomes a 32-bit integer in steps of input scale x weight scale.

        Where that is too small for it (a channel with weights of almost nothing, an input that is
        almost always 0) the weight scale grows.
        """
        if self.layer.bias is not None:
            fits = self.layer.bias.abs() / (input_scale * BIAS_LIMIT)
            self.scale.copy_(torch.maximum(self.scale, fits))
            self.bias_step.copy_(self.scale * input_scale)

    def bias_integers(self) -> Tensor:
        """The bias in steps, [out_channels] float64."""
        return torch.round(self.layer.bias.detach().double() / self.bias_step.double())

    def rounded_bias(self) -> Tensor | None:
        bias: Tensor | None = self.layer.bias
        if bias is None or not self.bias_step.any():
            return bias
        rounded = self.bias_integers().float() * self.bias_step
        return bias + (rounded - bias).detach()

    def rounded_weight(self) -> Tensor:
        zero: Any = self.zero
        return torch.fake_quantize_per_channel_affine(
            self.layer.weight, self.scale, zero, 0, -self.limit, self.limit
        )

    def forward(self, x: Tensor) -> Tensor:
        return apply_layer(self.layer, x, self.rounded_weight(), self.rounded_bias())


class Average(nn.Module):
    """The average of all positions of each channel, where the runtime makes it in int8. flat:
    without the axes of the positions."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(tuple(range(2, x.ndim)), keepdim=not self.flat)


class Averages(nn.Module):
    """The averages of a window, where the runtime makes them in int8."""

    def __init__(self, channels: int, window: Window) -> None:
        super().__init__()
        self.channels, self.window = channels, window

    def forward(self, x: Tensor) -> Tensor:
        window = self.window
        pool: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(window.size) - 1]
        averages: Tensor = pool(x, window.size, window.stride, window.padding)
        return averages * (math.prod(window.size) / window.count)

    def layer(self) -> QuantizedLayer:
        """The same as a depthwise convolution with the integers 1: ONNX Runtime's kernel for
        averages takes several times as long (docs/benchmarks.md)."""
        window = self.window
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(window.size) - 1]
        depthwise: Any = convolution(
            self.channels, self.channels, window.size, window.stride, window.padding,  # type: ignore[arg-type]
            groups=self.channels, bias=False,
        )  # fmt: skip
        nn.init.constant_(depthwise.weight, 1 / window.count)
        made = QuantizedLayer(depthwise, 8, "minmax")
        made.scale.fill_(1 / window.count)
        return made


def apply_layer(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What ``layer`` computes, with another weight and bias."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, bias)
    convolve: dict[int, Callable[..., Tensor]] = {
        1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d,
    }  # fmt: skip
    return convolve[len(layer.kernel_size)](
        x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )


@torch.no_grad()
def fold_norms(graph: fx.GraphModule, network: Network) -> fx.GraphModule:
    """A copy in which every norm that can be is part of the layers before it.

    The nodes stay, as identities, so that every value keeps its name.
    """
    instead: dict[int, Any] = {}  # of being copied first: that would be a model's worth of memory
    for name, norm_name in network.folded.items():
        layer: Any = graph.get_submodule(name)
        norm: Any = graph.get_submodule(norm_name)
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        instead[id(layer)] = fuse(layer, norm)
        instead[id(norm)] = nn.Identity()
    return copy.deepcopy(graph, instead).eval()


def insert_quantizers(graph: fx.GraphModule, plan: Blueprint, calibration: str) -> fx.GraphModule:
    """A copy of the folded ``graph`` with a quantizer at every value the blueprint names, for
    the operations that it says read it rounded."""
    graph = copy.deepcopy(graph)
    for name, precision in plan.precision.items():
        if precision != "int8":
            continue
        layer: Any = graph.get_submodule(name)
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            mode = layer.padding_mode
            raise Impossible(f"layer {name!r}: int8 needs padding with zeros, not {mode}")
        graph.set_submodule(name, QuantizedLayer(layer, plan.weight_bits, calibration))
    nodes = {node.name: node for node in graph.graph.nodes}
    for kernel in plan.kernels:
        if kernel.kind in ("pool", "avgpool") and kernel.precision == "int8":
            name, pool = f"average_{kernel.name}", nodes[kernel.name]
            while hasattr(graph, name):
                name += "_"
            graph.add_submodule(name, _average(plan, kernel))
            pool.op, pool.target, pool.kwargs = "call_module", name, {}
            pool.args = (pool.all_input_nodes[0],)
    for value, scale in plan.quantized.items():
        target = quantizer_name(scale)
        if value == scale:
            graph.add_submodule(target, ActivationQuantizer())
        for node, readers in _reads(nodes[value], plan, value):
            with graph.graph.inserting_after(node):
                rounded = graph.graph.call_module(target, (node,))
            node.replace_all_uses_with(rounded, delete_user_cb=readers.__contains__)
    graph.recompile()
    return graph


def _average(plan: Blueprint, kernel: Kernel) -> Average | Averages:
    """What computes ``kernel``, an average in int8."""
    window = plan.network.op[kernel.name].window
    if kernel.kind == "pool" or window is None:
        return Average(flat=len(kernel.out_shape) == 2)
    return Averages(kernel.out_shape[1], window)


def _reads(node: fx.Node, plan: Blueprint, value: str) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Nodes that give ``value``, which ``node`` makes, and those that read it there rounded.

    Dropout and the like give the value too, and may have readers of both kinds.
    """
    if plan.rounded[value] == plan.network.consumers[value]:
        return [(node, list(node.users))]
    givers, found = [node], []
    for giver in givers:  # grows
        givers += [user for user in giver.users if user.name not in plan.network.op]
        readers = [user for user in giver.users if user.name in plan.rounded[value]]
        if readers:
            found.append((giver, readers))
    return found


def settle(graph: fx.GraphModule, network: Network, plan: Blueprint) -> None:
    """Makes a calibrated graph what the runtime's kernels can compute, in place.

    Scales of averages come near enough to those of what is averaged, and biases of int8 layers are
    rounded. Not on sequences: there the runtime's kernel wants them in float
    (MatMulIntegerToFloat).
    """
    pools = [k for k in plan.kernels if k.kind == "pool" and k.precision == "int8"]
    for kernel in pools * 2:  # what one makes coarser another may read or make
        values = (kernel.inputs[0], kernel.output)
        read, made = (_quantizer(graph, plan.quantized[value]) for value in values)
        count = math.prod(kernel.in_shapes[0][2:])
        # Steps of the sum over all positions are fine enough for the average.
        made.coarsen(read.scale.item() / count)
        read.coarsen(made.scale.item() * count * FINEST)
    for name, uses in network.uses.items():
        module = graph.get_submodule(name)
        sequences = all(op.kind == "linear" and len(op.shape) > 2 for op in uses)
        if isinstance(module, QuantizedLayer) and not sequences:
            # Wherever the layer runs its inputs share one scale.
            source = _quantizer(graph, plan.quantized[uses[0].inputs[0]])
            module.settle_bias(source.scale)


def _quantizer(graph: fx.GraphModule, scale: str) -> ActivationQuantizer:
    found: Any = graph.get_submodule(quantizer_name(scale))
    return found  # type: ignore[no-any-return]


def quantizer_name(scale: str) -> str:
    return f"quantizer_{scale}"


@torch.no_grad()
def calibrate(graph: fx.GraphModule, items: Items, calibration: str) -> None:
    """Sets the range of every activation quantizer of ``graph`` from ``items``, in place."""
    if calibration not in ACTIVATION_RANGES:
        raise Impossible(f"no calibration {calibration!r}; known: {', '.join(ACTIVATION_RANGES)}")
    quantizers = {n: m for n, m in graph.named_modules() if isinstance(m, ActivationQuantizer)}
    graph.eval()
    for quantizer in quantizers.values():
        quantizer.observer = Observer(counting=calibration in ("percentile", "mse"))
    for batch in items.chunks():
        call(graph, batch.inputs)
    for name, quantizer in quantizers.items():
        assert quantizer.observer is not None
        seen, quantizer.observer = quantizer.observer, None
        if not (-float("inf") < seen.low <= seen.high < float("inf")):
            bounds = f"{seen.low} to {seen.high}"
            raise Impossible(f"{name}: the values to calibrate are not finite ({bounds})")
        quantizer.set_range(*ACTIVATION_RANGES[calibration](seen))

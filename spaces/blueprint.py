"""The blueprint: a policy worked out for a traced network and a target's capabilities.

What compressors build and what kernels price, decided once, here: every width, every precision,
every value that is quantized, and which values share a scale.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from .capabilities import Capabilities
from .errors import Impossible, nearest
from .network import Network, Op
from .policy import Policy

# What a runtime fuses behind what, if nobody else reads the value between. Only a layer takes a
# norm in (it becomes part of its weights), and nothing is fused behind an activation.
_BEHIND = {"conv": ("norm", "act"), "linear": ("norm", "act"), "norm": ("act",), "add": ("act",)}
# Operations that move values without changing them: int8 passes through at the same scale.
_PASSES = ("maxpool", "reshape")


@dataclass(frozen=True)
class Kernel:
    """One fused operation that the runtime executes, with widths worked out.

    name: the layer's name, else the operation's. inputs, output: values.
    in_shapes, out_shape: for one request. act: the fused activation, "" if none.
    """

    name: str
    kind: str
    detail: str
    inputs: tuple[str, ...]
    output: str
    in_shapes: tuple[tuple[int, ...], ...]
    out_shape: tuple[int, ...]
    precision: str
    act: str = ""
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    groups: int = 1
    dilation: tuple[int, ...] = ()

    @property
    def channels(self) -> tuple[int, int]:
        """Channels that a layer reads and makes."""
        axis = -1 if self.kind == "linear" else 1
        return self.in_shapes[0][axis], self.out_shape[axis]

    @property
    def weights(self) -> int:
        """Weights of a layer, its bias aside; 0 for any other operation."""
        if self.kind not in ("conv", "linear"):
            return 0
        read, made = self.channels
        return math.prod(self.kernel) * read // self.groups * made

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one request; 0 for what is no layer."""
        if self.kind not in ("conv", "linear"):
            return 0
        return self.weights * math.prod(self.out_shape[1:]) // self.channels[1]


@dataclass(frozen=True)
class Blueprint:
    """network: what is left of the traced one without the blocks that the policy drops. widths:
    channels kept, of every group. precision: of every layer. quantized: for each value that is
    quantized the name of its scale; values with the same name share it. rounded: for each of them
    the operations that read it rounded; the others read it as it was made."""

    policy: Policy
    widths: Mapping[str, int]
    precision: Mapping[str, str]
    kernels: tuple[Kernel, ...]
    quantized: Mapping[str, str]
    rounded: Mapping[str, tuple[str, ...]]
    weight_bits: int
    network: Network

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of one request."""
        return sum(kernel.macs for kernel in self.kernels)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of all layers: about what the artifact's file takes."""
        return sum(k.weights * (1 if k.precision == "int8" else 4) for k in self.kernels)


def blueprint(network: Network, policy: Policy, capabilities: Capabilities) -> Blueprint:
    """Works ``policy`` out. Raises Impossible with the rule it breaks."""
    network = without_blocks(network, policy)
    widths = _widths(network, policy)
    precision = _precision(network, policy, capabilities)
    fused = _fuse(network, precision)
    quantized = _quantize(network, fused, precision, capabilities)
    if alone := _signed(network, fused, precision, quantized):
        fused = _fuse(network, precision, alone)
        quantized = _quantize(network, fused, precision, capabilities)
    kernels = tuple(
        _kernel(network, run, widths, precision, quantized, capabilities) for run in fused
    )
    rounded = _rounded(network, fused, kernels, quantized)
    return Blueprint(
        policy, widths, precision, kernels, quantized, rounded, capabilities.weight_bits, network
    )


def without_blocks(network: Network, policy: Policy) -> Network:
    """What is left without the blocks that ``policy`` drops. Raises Impossible where it names what
    is not there, or what goes with them."""
    for name in policy.prune.drop:
        if name not in network.blocks:
            hint = nearest(name, network.blocks)
            raise Impossible(f"no residual block {name!r} in this network; {hint}")
        block = network.blocks[name]
        named = {*policy.prune.width, *policy.quantize.precision, *policy.prune.drop} - {name}
        inside = {*block.layers, *block.groups}
        if inert := named & inside:
            raise Impossible(f"block {name!r} is dropped, and {min(inert)!r} with it: leave it out")
    return network.without(policy.prune.drop)


def _widths(network: Network, policy: Policy) -> dict[str, int]:
    widths = {name: group.width for name, group in network.groups.items()}
    for name, width in policy.prune.width.items():
        if name not in widths:
            raise Impossible(f"no group {name!r} in this network; {nearest(name, widths)}")
        group = network.groups[name]
        if not 1 <= width <= group.width:
            raise Impossible(
                f"1 <= width <= {group.width} must hold for group {name!r}, but got {width}"
            )
        if width % group.multiple_of:
            raise Impossible(
                f"the width of group {name!r} must be a multiple of {group.multiple_of} (its "
                f"channels go by so many), but got {width}"
            )
        widths[name] = width
    return widths


def _precision(network: Network, policy: Policy, capabilities: Capabilities) -> dict[str, str]:
    out = dict.fromkeys(network.layers, "fp32")
    for name, precision in policy.quantize.precision.items():
        if name not in out:
            raise Impossible(f"no layer {name!r} in this network; {nearest(name, out)}")
        known = capabilities.precisions.get(network.layers[name].kind, ("fp32",))
        if precision not in known:
            raise Impossible(
                f"the target runs layer {name!r} in {' or '.join(known)}, but got {precision!r}"
            )
        out[name] = precision
    return out


Run = tuple[Op, ...]  # operations that become one kernel


def _fuse(
    network: Network, precision: Mapping[str, str], alone: frozenset[str] = frozenset()
) -> list[Run]:
    """The kernels, each a run of operations; those in ``alone`` are fused behind nothing."""
    runs: list[list[Op]] = []
    ends: dict[str, list[Op]] = {}  # value at the end of a run that may grow
    for op in network.ops:
        if op.kind in ("input", "output") or not op.shape or not op.inputs:
            continue  # a size or a constant is no kernel
        before = op.inputs[0]
        run = ends.get(before)
        if run and op.name not in alone and _fuses(network, precision, run[-1], op):
            run.append(op)
        else:
            run = [op]
            runs.append(run)
        if op.kind in _BEHIND and run[0].kind != "norm":
            ends[op.name] = run
    return [tuple(run) for run in runs]


def _fuses(network: Network, precision: Mapping[str, str], before: Op, op: Op) -> bool:
    """Whether ``op``, which reads ``before``, becomes part of its kernel."""
    if op.kind not in _BEHIND[before.kind] or len(network.consumers[before.name]) > 1:
        return False
    if op.kind != "norm" or network.folded.get(before.module) == op.module:
        return True
    # A convolution with a norm of its own for each use: in float the runtime folds each by itself.
    return before.kind == "conv" and precision[before.module] == "fp32"


def _signed(
    network: Network, fused: list[Run], precision: Mapping[str, str], quantized: Mapping[str, str]
) -> frozenset[str]:
    """Activations behind an int8 layer that share a scale with values of either sign.

    An integer kernel ends in an activation only by clipping at its zero point, which is then not
    0: it must end before the activation, or ONNX Runtime runs the layer in float.
    """
    positive = {op.name for op in network.ops if op.kind == "act"}
    for op in network.ops:
        if op.kind in (*_PASSES, "concat") and positive.issuperset(op.inputs):
            positive.add(op.name)
    signed = {scale for value, scale in quantized.items() if value not in positive}
    ends = {run[-1] for run in fused if precision.get(run[0].module) == "int8"}
    acts = (op.name for op in ends if op.kind == "act")
    return frozenset(name for name in acts if quantized.get(name) in signed)


def _quantize(
    network: Network, fused: list[Run], precision: Mapping[str, str], capabilities: Capabilities
) -> dict[str, str]:
    """The values that are quantized.

    A value is quantized if an int8 layer reads it, or if an int8 layer makes it whose kernel
    exists only with a quantized output. An add whose inputs are all quantized runs in int8 too
    where somebody reads its result in int8, and a concatenation likewise; an operation that only
    moves values passes the scale on. The network's answer is never quantized.
    """

    def int8(run: Run) -> bool:
        return precision.get(run[0].module) == "int8"

    wanted = {run[0].inputs[0] for run in fused if int8(run)}
    made = (run for run in fused if int8(run))
    wanted |= {run[-1].name for run in made if _ends_in_int8(network, run, capabilities)}
    wanted.discard(network.output)
    carriers = [run for run in fused if _carries(run, capabilities)]
    able = set(wanted)  # what could be quantized without a kernel of its own
    for run in carriers:
        if able.issuperset(run[0].inputs):
            able.add(run[-1].name)
    for run in reversed(carriers):  # from the end, so that a chain is wanted as a whole
        if run[-1].name in wanted and able.issuperset(run[0].inputs):
            wanted.update(run[0].inputs)
    return _scales(network, carriers, wanted, precision)


def _ends_in_int8(network: Network, run: Run, capabilities: Capabilities) -> bool:
    """Whether the int8 kernel of a layer exists only if its output is quantized too."""
    head, end = run[0], run[-1]
    if head.kind in capabilities.act_output_quantized and len(end.shape) == 2:
        acts = [end, *(network.op[reader] for reader in network.consumers[end.name])]
        return any(op.kind == "act" for op in acts)
    return head.kind in capabilities.output_quantized


def _carries(run: Run, capabilities: Capabilities) -> bool:
    """Whether the kernel of ``run`` has no weights and still can run in int8."""
    if run[0].kind == "add":
        return "add" in capabilities.int8_ops
    return run[0].kind in (*_PASSES, "concat")


def _scales(
    network: Network, carriers: list[Run], quantized: set[str], precision: Mapping[str, str]
) -> dict[str, str]:
    """For each quantized value the first value, in execution order, of those on its scale."""
    scale = {op.name: op.name for op in network.ops if op.name in quantized}
    order = {value: i for i, value in enumerate(scale)}
    # A concatenation in int8 copies, as does what only moves values: all share one scale.
    alike = [{*run[0].inputs, run[-1].name} for run in carriers if run[0].kind != "add"]
    # So do the inputs of a layer that runs several times: its bias is an integer in steps of
    # input scale x weight scale, and it has one bias.
    alike += [
        {use.inputs[0] for use in uses}
        for name, uses in network.uses.items()
        if precision[name] == "int8"
    ]
    for values in alike:
        if quantized.issuperset(values):
            joined = {scale[v] for v in values}
            first = min(joined, key=lambda v: order[v])
            scale = {v: first if s in joined else s for v, s in scale.items()}
    return scale


def _rounded(
    network: Network, fused: list[Run], kernels: tuple[Kernel, ...], quantized: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """For each quantized value the operations that read it rounded.

    What an int8 kernel makes exists in integers only: all read it dequantized. What is made in
    float is there as it was: only int8 kernels read it rounded. (So the sums between the layers of
    a transformer are not rounded at every layer.)
    """
    made = {k.output for k in kernels if k.precision == "int8"}
    heads = {run[0].name for run, k in zip(fused, kernels, strict=True) if k.precision == "int8"}
    return {
        value: tuple(op for op in network.consumers[value] if value in made or op in heads)
        for value in quantized
    }


def _kernel(
    network: Network,
    run: Run,
    widths: Mapping[str, int],
    precision: Mapping[str, str],
    quantized: Mapping[str, str],
    capabilities: Capabilities,
) -> Kernel:
    head, end = run[0], run[-1]
    layer = network.layers.get(head.module)
    act = next((op.detail for op in run if op.kind == "act"), "") if len(run) > 1 else ""
    values = [i for i in head.inputs if network.op[i].shape]
    in_int8 = _carries(run, capabilities) and all(v in quantized for v in (*values, end.name))
    groups = layer.groups if layer else 1
    if layer and groups > 1 and groups == layer.in_channels:  # depthwise: as many as channels
        groups = network.channels(head.inputs[0], widths)
    return Kernel(
        name=layer.name if layer else head.name,
        kind=head.kind,
        detail=head.detail,
        inputs=tuple(values),
        output=end.name,
        in_shapes=tuple(network.shape(v, widths) for v in values),
        out_shape=network.shape(end.name, widths),
        precision=precision[layer.name] if layer else ("int8" if in_int8 else "fp32"),
        act=act,
        kernel=layer.kernel if layer else (),
        stride=layer.stride if layer else (),
        groups=groups,
        dilation=layer.dilation if layer else (),
    )

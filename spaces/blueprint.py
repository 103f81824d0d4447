"""The blueprint: a policy worked out for a traced network and a target's capabilities.

What compressors build and what kernels price, decided once, here: every width, every precision,
every value that is quantized, and which values share a scale.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import and_, or_

from .capabilities import Capabilities
from .errors import Impossible, nearest
from .network import LAYER_KINDS, Network, Op
from .policy import Policy

# What a runtime fuses behind what, if nobody else reads the value between. Only a layer takes a
# norm in (it becomes part of its weights), and nothing is fused behind an activation.
_BEHIND = {"conv": ("norm", "act"), "linear": ("norm", "act"), "norm": ("act",), "add": ("act",)}
# Operations that move values without changing them: int8 passes through at the same scale.
_PASSES = ("maxpool", "reshape")
# What a runtime may compute in int8 on a scale of its own, without weights.
_COMPUTES = ("add", "pool", "avgpool")


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
        if self.kind not in LAYER_KINDS:
            return 0
        read, made = self.channels
        return math.prod(self.kernel) * read // self.groups * made

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one request; 0 for what is no layer."""
        if self.kind not in LAYER_KINDS:
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
        """Bytes of the weights of all layers: about what the artifact's file takes. A layer that
        runs several times has them once."""
        layers = {k.name: k.weights * (1 if k.precision == "int8" else 4) for k in self.kernels}
        return sum(layers.values())


def blueprint(network: Network, policy: Policy, capabilities: Capabilities) -> Blueprint:
    """Works ``policy`` out. Raises Impossible with the rule it breaks."""
    network = without_blocks(network, policy)
    widths = _widths(network, policy)
    precision = _precision(network, policy, capabilities)
    int8 = {name: int(chosen == "int8") for name, chosen in precision.items()}
    decided = Decisions(network, capabilities, int8)
    kernels = tuple(
        kernel_of(network, run, widths, "int8" if decided.in_int8(run, rows) else "fp32")
        for run, rows in decided.runs
    )
    quantized = decided.scales()
    rounded = _rounded(network, [run for run, _ in decided.runs], kernels, quantized)
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
        # A group that stays may be called as a layer that goes: its first producer.
        inert = (policy.quantize.precision.keys() | {*policy.prune.drop} - {name}) & {*block.layers}
        inert |= policy.prune.width.keys() & {*block.groups}
        if inert:
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
Rows = int  # some of the policies that are worked out at once: the i-th is bit i


class Decisions:
    """What precisions decide, whatever the widths: kernels and quantized values.

    For many policies of one network at once: a set of them is a whole number (``Rows``), and ``&``,
    ``|`` and ``& ~`` decide for all. A blueprint is made of the decisions for a single one.

    int8: for each layer the policies that run it so. everyone: all policies. runs: every run of
    operations that becomes a kernel, in execution order, with the policies in which it does.
    quantized: for each value the policies in which it is, if there are any.
    """

    def __init__(
        self,
        network: Network,
        capabilities: Capabilities,
        int8: Mapping[str, Rows],
        everyone: Rows = 1,
    ) -> None:
        self._network, self._capabilities = network, capabilities
        self._int8, self._everyone = int8, everyone
        self._work_out({})
        if alone := self._beyond():
            self._work_out(alone)

    def _work_out(self, alone: Mapping[str, Rows]) -> None:
        self.runs = self._fuse(alone)
        self._carriers = [(r, rows) for r, rows in self.runs if self._carries(r)]
        self.quantized = {value: rows for value, rows in self._quantize().items() if rows}

    def in_int8(self, run: Run, rows: Rows) -> Rows:
        """Those of ``rows``, for which ``run`` is a kernel, in which it runs in int8."""
        head, end = run[0], run[-1]
        if head.module in self._int8:
            return rows & self._int8[head.module]
        if not self._carries(run):
            return 0
        return rows & _all(self.quantized, (*self._network.reads[head.name], end.name))

    def _carries(self, run: Run) -> bool:
        """Whether the kernel of ``run`` has no weights and is to run in int8 where it can.

        Sums of sums stay in float: were each rounded, the errors would add up along the stream.
        """
        head = run[0]
        if not self._network.reads[head.name]:  # what it reads are parts that a split gives
            return False
        if head.kind in _COMPUTES:
            in_int8 = head.kind in self._capabilities.int8_ops
            return in_int8 and head.name not in self._network.sums_of_sums
        return head.kind in (*_PASSES, "concat")

    def scales(self) -> dict[str, str]:
        """Of the first policy: for each quantized value the first value, in execution order, of
        those on its scale."""
        named = (op.name for op in self._network.ops)
        scale = {value: value for value in named if self.quantized.get(value, 0) & 1}
        order = {value: i for i, value in enumerate(scale)}
        for values, rows in self._alike():
            if rows & 1:
                joined = {scale[v] for v in values}
                first = min(joined, key=lambda v: order[v])
                scale = {v: first if s in joined else s for v, s in scale.items()}
        return scale

    def _fuse(self, alone: Mapping[str, Rows]) -> list[tuple[Run, Rows]]:
        """The kernels; an operation in ``alone`` is fused behind nothing there."""
        runs: dict[str, list[tuple[Run, Rows]]] = {}  # by the first operation
        ends: dict[str, Run] = {}  # value -> the run that it ends and that may grow
        for op in self._network.ops:
            if op.kind in ("input", "output") or not op.shape or not op.inputs:
                continue  # a size or a constant is no kernel
            rest = self._everyone
            if before := ends.get(op.inputs[0]):
                same = runs[before[0].name]
                run, rows = same[-1]
                grows = rows & self._fuses(run[-1], op) & ~alone.get(op.name, 0)
                if grows:
                    same[-1:] = [(run, rows & ~grows)] if rows & ~grows else []
                    same.append(((*run, op), grows))
                    rest &= ~grows
                    ends[op.name] = (*run, op)
            if rest:
                runs[op.name] = [((op,), rest)]
                if op.kind in _BEHIND and op.kind != "norm":
                    ends[op.name] = (op,)
        return [found for same in runs.values() for found in same]

    def _fuses(self, before: Op, op: Op) -> Rows:
        """Where ``op``, which reads ``before``, becomes part of its kernel."""
        network = self._network
        if op.kind not in _BEHIND.get(before.kind, ()) or len(network.consumers[before.name]) > 1:
            return 0
        if op.kind != "norm" or network.folded.get(before.module) == op.module:
            return self._everyone
        # A convolution with a norm of its own for each use: in float the runtime folds each by
        # itself.
        return ~self._int8[before.module] if before.kind == "conv" else 0

    def _beyond(self) -> dict[str, Rows]:
        """Activations behind an int8 layer or sum that share a scale with values beyond their ends.

        An integer kernel ends in an activation only by clipping at the ends of its scale. Where
        these are not those of the activation a layer must end before it, or ONNX Runtime runs it
        in float, as it does a sum.
        """
        found: dict[str, Rows] = {}
        if alike := self._alike():
            for act in {op.detail for op in self._network.ops if op.kind == "act"}:
                found |= self._sharing(act, alike)
        return found

    def _sharing(self, act: str, alike: list[tuple[set[str], Rows]]) -> dict[str, Rows]:
        """Of ``_beyond`` those that are an ``act``. A value within the ends of a relu6 is also
        within those of a relu."""
        ops = self._network.ops
        within = {op.name for op in ops if op.kind == "act" and op.detail in (act, "relu6")}
        for op in ops:
            passes = op.kind in (*_PASSES, "concat", "pool", "avgpool")
            read = self._network.reads[op.name]
            if passes and read and within.issuperset(read):
                within.add(op.name)
        beyond = {v: 0 if v in within else rows for v, rows in self.quantized.items()}
        before = None
        while beyond != before:
            before = dict(beyond)
            for values, rows in alike:
                found = rows & _any(beyond, values)
                beyond.update({v: beyond[v] | found for v in values})
        acts = {
            run[-1].name: self.in_int8(run, rows) & beyond.get(run[-1].name, 0)
            for run, rows in self.runs
            if len(run) > 1 and run[-1].kind == "act" and run[-1].detail == act
        }
        return {name: rows for name, rows in acts.items() if rows}

    def _quantize(self) -> dict[str, Rows]:
        """The values that are quantized.

        A value is quantized if an int8 layer reads it, or if an int8 layer makes it whose kernel
        exists only with a quantized output. An add whose inputs are all quantized runs in int8 too
        where somebody reads its result in int8, a concatenation and averages likewise; an operation
        that only moves values passes the scale on.
        """
        wanted: dict[str, Rows] = {op.name: 0 for op in self._network.ops}
        for run, rows in self.runs:
            if int8 := rows & self._int8.get(run[0].module, 0):
                wanted[run[0].inputs[0]] |= int8
                if _ends_in_int8(self._network, run, self._capabilities):
                    wanted[run[-1].name] |= int8
        able = dict(wanted)  # what could be quantized without a kernel of its own
        for run, rows in self._carriers:
            able[run[-1].name] |= rows & _all(able, self._network.reads[run[0].name])
        for run, rows in reversed(self._carriers):  # from the end: a chain is wanted as a whole
            values = self._network.reads[run[0].name]
            if carried := rows & wanted[run[-1].name] & _all(able, values):
                for value in values:
                    wanted[value] |= carried
        return wanted

    def _alike(self) -> list[tuple[set[str], Rows]]:
        """Values that share one scale, with the policies in which they do."""
        # A concatenation in int8 copies, as does what only moves values: all share one scale.
        found = [
            ({*self._network.reads[run[0].name], run[-1].name}, rows)
            for run, rows in self._carriers
            if run[0].kind not in _COMPUTES
        ]
        # So do the inputs of a layer that runs several times: its bias is an integer in steps of
        # input scale x weight scale, and it has one bias.
        found += [
            ({use.inputs[0] for use in uses}, self._int8[name])
            for name, uses in self._network.uses.items()
            if len(uses) > 1
        ]
        shared = ((values, rows & _all(self.quantized, values)) for values, rows in found)
        return [(values, rows) for values, rows in shared if rows]


def _all(of: Mapping[str, Rows], values: Iterable[str]) -> Rows:
    return reduce(and_, (of.get(value, 0) for value in values))


def _any(of: Mapping[str, Rows], values: Iterable[str]) -> Rows:
    return reduce(or_, (of.get(value, 0) for value in values))


def _ends_in_int8(network: Network, run: Run, capabilities: Capabilities) -> bool:
    """Whether the int8 kernel of a layer exists only if its output is quantized too."""
    head, end = run[0], run[-1]
    if head.kind in capabilities.act_output_quantized and len(end.shape) == 2:
        acts = [end, *(network.op[reader] for reader in network.consumers[end.name])]
        return any(op.kind == "act" for op in acts)
    return head.kind in capabilities.output_quantized


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


def kernel_of(network: Network, run: Run, widths: Mapping[str, int], precision: str) -> Kernel:
    """The kernel that ``run`` becomes."""
    head, end = run[0], run[-1]
    layer = network.layers.get(head.module)
    act = next((op.detail for op in run if op.kind == "act"), "") if len(run) > 1 else ""
    values = network.reads[head.name]
    window = head.window if head.kind == "avgpool" else None  # a pool's is all there is
    groups = layer.groups if layer else 1
    if layer and groups > 1 and groups == layer.in_channels:  # depthwise: as many as channels
        groups = network.channels(head.inputs[0], widths)
    return Kernel(
        name=layer.name if layer else head.name,
        kind=head.kind,
        detail=head.detail,
        inputs=values,
        output=end.name,
        in_shapes=tuple(network.shape(v, widths) for v in values),
        out_shape=network.shape(end.name, widths),
        precision=precision,
        act=act,
        kernel=layer.kernel if layer else window.size if window else (),
        stride=layer.stride if layer else window.stride if window else (),
        groups=groups,
        dilation=layer.dilation if layer else (),
    )

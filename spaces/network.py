"""What is known of a traced network: its operations, its layers, its groups. Plain data, frozen."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

LAYER_KINDS = ("conv", "linear")  # of operations: those that get a precision
SIZES = ("size", "getattr", "dim", "numel", "len")  # what asks for them; getattr: for x.shape
Part = tuple[str | None, int]  # (the group that governs these channels or None, channels unpruned)


@dataclass(frozen=True)
class Window:
    """What an average is of, at each place: spatial settings, and what the sum is divided by."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    count: int

    def covers(self, before: tuple[int, ...]) -> bool:
        """Whether it holds all positions of a value of shape ``before``, and nothing else."""
        whole = self.size == before[2:] and self.count == math.prod(self.size)
        return whole and not any(self.padding)


@dataclass(frozen=True)
class Op:
    """One operation, in execution order. Its name is also the name of the value it produces.

    kind: input, conv, linear, norm, act, add, concat, pool (the average of all positions), avgpool
        (those of equal windows), average (any other), maxpool, reshape, other or output.
    detail: the operation as its author wrote it ("relu", "max_pool2d").
    module: qualified name of the module it calls, "" for a function.
    shape: of the value at full width for one request; () where it is not one tensor.
    parts: what the channels of the value consist of; widths follow from it.
    axis: where in ``shape`` the channels are.
    window: of a pool or avgpool.
    """

    name: str
    kind: str
    detail: str
    inputs: tuple[str, ...]
    module: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    axis: int = 1
    window: Window | None = None


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer: the unit that gets a precision.

    op: name of its operation, the first if it runs several times (``Network.uses`` has them all).
    out_group: the group its output channels belong to, None if fixed. kernel, stride, dilation:
    spatial, () for a linear layer. parameters and macs, of all its operations, are those at full
    width.
    """

    name: str
    kind: str
    op: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    out_group: str | None
    parameters: int
    macs: int
    dilation: tuple[int, ...] = ()


@dataclass(frozen=True)
class Slot:
    """Where channels of a group sit: an axis of one tensor of the model.

    units: of each position along ``axis`` the unit of the group, -1 if it belongs to none.
    """

    tensor: str
    axis: int
    units: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Channels of several layers that are pruned together, named after the first producer.

    members: the layers, and transposed convolutions, whose output channels they are. multiple_of:
    channels in one unit, which stays or goes as a whole: those of an attention head, or one from
    each group of a grouped convolution or group norm. units: the unit of each channel, () where
    each is its own.
    """

    name: str
    width: int
    members: tuple[str, ...]
    multiple_of: int = 1
    units: tuple[int, ...] = ()
    slots: tuple[Slot, ...] = ()

    @property
    def unit(self) -> tuple[int, ...]:
        """The unit of each channel."""
        return self.units or tuple(range(self.width))

    def first(self, width: int) -> list[int]:
        """The channels of the first units, ``width`` in all."""
        return [i for i, unit in enumerate(self.unit) if unit < width // self.multiple_of]


@dataclass(frozen=True)
class Block:
    """A residual branch that can be dropped, named after its first layer.

    add: the add behind it, which becomes ``skip``, its other input. layers, groups: those that go
    with the branch.
    """

    name: str
    add: str
    skip: str
    layers: tuple[str, ...]
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Network:
    """A traced network. ``inputs`` name the values a request carries, ``output`` the answer.

    parameters: of the whole model. blocks: residual branches that can be dropped.
    """

    ops: tuple[Op, ...]
    layers: Mapping[str, Layer]
    groups: Mapping[str, Group]
    inputs: tuple[str, ...]
    output: str
    parameters: int = field(default=0)
    blocks: Mapping[str, Block] = field(default_factory=dict)

    @cached_property
    def op(self) -> dict[str, Op]:
        """Operations by name."""
        return {op.name: op for op in self.ops}

    @cached_property
    def sizes(self) -> frozenset[str]:
        """Operations that give sizes of values, as ``x.shape``, or numbers computed from them."""
        found: set[str] = set()
        for op in self.ops:
            computed = op.inputs and found.issuperset(op.inputs)
            if not op.shape and (op.detail in SIZES or computed):
                found.add(op.name)
        return frozenset(found)

    @cached_property
    def reads(self) -> dict[str, tuple[str, ...]]:
        """For each operation the values that it reads, in order; none of the sizes and of the parts
        that a split gives."""
        return {op.name: tuple(v for v in op.inputs if self.op[v].shape) for op in self.ops}

    @cached_property
    def consumers(self) -> dict[str, tuple[str, ...]]:
        """For each value the operations that read it, in execution order; not its size alone."""
        out: dict[str, tuple[str, ...]] = {op.name: () for op in self.ops}
        for op in self.ops:
            for name in dict.fromkeys(op.inputs if op.name not in self.sizes else ()):
                out[name] += (op.name,)
        return out

    @cached_property
    def uses(self) -> dict[str, tuple[Op, ...]]:
        """For each layer the operations that run it, in execution order."""
        out: dict[str, tuple[Op, ...]] = {name: () for name in self.layers}
        for op in self.ops:
            if op.module in out:
                out[op.module] += (op,)
        return out

    @cached_property
    def folded(self) -> dict[str, str]:
        """For each layer that takes a norm into its weights: the module of that norm.

        It must follow the layer wherever the layer runs, directly and read by nobody else, and
        may follow nothing else.
        """
        out = {}
        for name, uses in self.uses.items():
            readers = [self.op[r] for use in uses for r in self.consumers[use.name]]
            alike = {(reader.kind, reader.module) for reader in readers}
            # Behind a linear layer on sequences a norm is one over steps, not over its outputs.
            plain = all(u.axis == 1 and (u.kind != "linear" or len(u.shape) == 2) for u in uses)
            if len(readers) == len(uses) and len(alike) == 1 and plain:
                kind, module = alike.pop()
                if kind == "norm":
                    out[name] = module
        for op in self.ops:
            if op.kind == "norm" and out.get(self.op[op.inputs[0]].module) != op.module:
                out = {name: norm for name, norm in out.items() if norm != op.module}
        return out

    @cached_property
    def sums_of_sums(self) -> frozenset[str]:
        """Adds that read what another one makes, and those: a stream that nothing clips, as
        through the narrow ends of inverted residuals."""
        adds = {op.name for op in self.ops if op.kind == "add"}
        pairs = ((v, op.name) for op in self.ops if op.name in adds for v in op.inputs if v in adds)
        return frozenset(name for pair in pairs for name in pair)

    def channels(self, value: str, widths: Mapping[str, int]) -> int:
        """Channels of ``value`` when the groups have ``widths`` (those not named are full)."""
        total = 0
        for group, full in self.op[value].parts:
            if group is None or group not in widths:
                total += full
            else:
                total += full * widths[group] // self.groups[group].width
        return total

    def shape(self, value: str, widths: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of ``value`` for one request when the groups have ``widths``."""
        op = self.op[value]
        if not op.parts:
            return op.shape
        return (*op.shape[: op.axis], self.channels(value, widths), *op.shape[op.axis + 1 :])

    def without(self, drop: Iterable[str]) -> "Network":
        """The network that is left when the blocks ``drop`` are gone."""
        gone = [self.blocks[name] for name in drop]
        if not gone:
            return self
        instead = {block.add: block.skip for block in gone}

        def left(value: str) -> str:
            while value in instead:
                value = instead[value]
            return value

        ops = tuple(
            op if instead.keys().isdisjoint(op.inputs)
            else replace(op, inputs=tuple(left(v) for v in op.inputs))
            for op in self.ops if op.name not in instead
        )  # fmt: skip
        alive = reachable(ops)
        ops = tuple(op for op in ops if op.name in alive)
        layers = {name: layer for name, layer in self.layers.items() if layer.op in alive}
        modules = {op.module for op in ops}
        groups = {
            group.name: replace(group, members=tuple(m for m in group.members if m in modules))
            for group in self.groups.values()
            if any(m in modules for m in group.members)
        }
        blocks = {
            name: replace(block, skip=left(block.skip))
            for name, block in self.blocks.items()
            if block.add in alive
        }
        return replace(
            self, ops=ops, layers=layers, groups=groups, blocks=blocks, output=left(self.output)
        )


def reachable(ops: Iterable[Op]) -> set[str]:
    """Operations that the answer depends on, and the inputs of the network."""
    found: set[str] = set()
    for op in reversed(tuple(ops)):
        if op.kind in ("input", "output") or op.name in found:
            found.update((op.name, *op.inputs))
    return found

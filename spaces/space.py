"""The space of legal policies for a network, a target and the user's settings."""

import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from .blueprint import without_blocks
from .capabilities import Capabilities
from .errors import BadInput, Impossible, nearest
from .network import Block, Group, Layer, Network
from .parameter import Parameter
from .policy import Distill, Policy, Prune, Quantize
from .settings import Range, Settings

FEW = 4  # widths, less than which are no choice


@dataclass(frozen=True)
class Space:
    """Offers ``parameters`` and makes a policy of their values; knows nothing of who chooses.

    network: of the teacher. others: of the task's ``students()``, by name. Here a group or layer of
    another student carries its name, "small:conv1"; a policy, which has one student, leaves it out.
    Raises BadInput for a student of the settings that is none of them.
    """

    network: Network
    capabilities: Capabilities
    settings: Settings
    others: Mapping[str, Network] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {"pruned", *self.others}
        for name in self.settings.students:
            if name not in known:
                raise BadInput(f"space: no student {name!r}; {nearest(name, known)}")

    @cached_property
    def networks(self) -> dict[str, Network]:
        """The network that each student of the settings starts from."""
        known = {"pruned": self.network, **self.others}
        return {name: known[name] for name in self.settings.students}

    @cached_property
    def groups(self) -> dict[str, tuple[str, Group]]:
        """The student and the group of every name under ``width/``."""
        return {
            _qualified(student, name): (student, group)
            for student, network in self.networks.items()
            for name, group in network.groups.items()
        }

    @cached_property
    def layers(self) -> dict[str, tuple[str, Layer]]:
        """The student and the layer of every name under ``precision/``."""
        return {
            _qualified(student, name): (student, layer)
            for student, network in self.networks.items()
            for name, layer in network.layers.items()
        }

    @cached_property
    def blocks(self) -> dict[str, tuple[str, Block]]:
        """The student and the residual block of every name under ``drop/``."""
        if not self.settings.depth:
            return {}
        return {
            _qualified(student, name): (student, block)
            for student, network in self.networks.items()
            for name, block in network.blocks.items()
        }

    @cached_property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """Per group the widths it may have, ascending; the last is the full width."""
        out = {}
        for name, (_, group) in self.groups.items():
            asked = self.settings.multiple_of or self.capabilities.width_multiple
            step = math.lcm(asked, group.multiple_of)
            if self.settings.multiple_of is None and group.width < FEW * step:
                # What the target likes is no rule: the group's own multiples, about as coarse.
                step = -(-asked // group.multiple_of) * group.multiple_of
            # 0.07 * 100 is 7.000000000000001 and must not ask for 8.
            least = max(1, math.ceil(group.width * self.settings.min_keep - 1e-9))
            first = -(-least // step) * step
            out[name] = (*range(first, group.width, step), group.width)
        return out

    @cached_property
    def precisions(self) -> dict[str, tuple[str, ...]]:
        """Per layer the precisions that both the user and the target allow."""
        out = {}
        for name, (_, layer) in self.layers.items():
            known = self.capabilities.precisions.get(layer.kind, ("fp32",))
            out[name] = tuple(p for p in known if p in self.settings.precisions) or ("fp32",)
        return out

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every axis with more than one value comes as a choice; fixed ones stay, with one."""
        s = self.settings

        def choice(
            name: str,
            choices: tuple[Any, ...],
            at: int = 0,
            rung: str = "recalibrate",
            needs: str = "",
            student: str = "",
            unless: tuple[str, ...] = (),
        ) -> Parameter:
            return Parameter(
                name, choices[at], choices, rung=rung, needs=needs, student=student, unless=unless
            )

        def between(name: str, bounds: Range, log: bool = False) -> Parameter:
            low, high = bounds
            if low == high:
                return Parameter(name, low, (low,), rung="short")
            middle = math.sqrt(low * high) if log else (low + high) / 2
            return Parameter(name, middle, (), low, high, log, rung="short")

        return (
            choice("student", s.students),  # first: what follows may depend on it
            *(
                choice(
                    f"drop/{n}", (False, True), student=student, unless=self._around(student, block)
                )
                for n, (student, block) in self.blocks.items()
            ),
            *(
                choice(f"width/{n}", w, at=-1, student=student, unless=self._around(student, group))
                for n, w in self.widths.items()
                for student, group in [self.groups[n]]
            ),
            choice("criterion", s.criteria, needs="prune"),
            choice("reconstruct", s.reconstruct, needs="prune"),
            choice("sparsity", s.sparsity),
            *(
                choice(f"precision/{n}", p, student=student, unless=self._around(student, layer))
                for n, p in self.precisions.items()
                for student, layer in [self.layers[n]]
            ),
            choice("calibration", s.calibrations, needs="quantize"),
            choice("qat", s.qat, rung="short", needs="quantize"),
            choice("loss", s.losses, rung="short"),
            between("temperature", s.temperature),
            between("alpha", s.alpha),
            between("learning_rate", s.learning_rate, log=True),
        )

    def _around(self, student: str, what: Block | Group | Layer) -> tuple[str, ...]:
        """The drop parameters of the blocks that take ``what`` with them, the innermost first."""
        around = [
            (len(block.layers), f"drop/{name}")
            for name, (owner, block) in self.blocks.items()
            if owner == student and block is not what and _takes(block, what)
        ]
        return tuple(name for _, name in sorted(around))

    @cached_property
    def axes(self) -> tuple[Parameter, ...]:
        """The parameters that decide latency, all of them choices."""
        decide = ("student", "drop", "width", "precision")
        return tuple(p for p in self.parameters if p.name.split("/")[0] in decide)

    def point(self, policy: Policy) -> list[int]:
        """For each of the ``axes`` the index of what ``policy`` chooses, or of the default where
        that is inert. The policy must be one of this space."""
        values = self.defaults | self.values(policy)
        return [axis.choices.index(values[axis.name]) for axis in self.axes]

    def values_at(self, point: Iterable[int]) -> dict[str, Any]:
        """The values of the ``axes`` at ``point``, for ``policy``."""
        return {a.name: a.choices[i] for a, i in zip(self.axes, point, strict=True)}

    @cached_property
    def defaults(self) -> dict[str, Any]:
        return {p.name: p.default for p in self.parameters}

    def policy(self, values: Mapping[str, Any]) -> Policy:
        """The policy that ``values`` describe; what is not named has its default.

        Raises BadInput for a name that is no parameter; ``check`` judges the values.
        """
        for name in values:
            if name not in self.defaults:
                raise BadInput(f"space: no parameter {name!r}; {nearest(name, self.defaults)}")
        v = {**self.defaults, **values}
        student = v["student"]
        if student not in self.networks:
            raise BadInput(f"space: no student {student!r}; {nearest(student, self.networks)}")
        drop = self._dropped(student, v)
        network = self.networks[student].without(drop)
        chosen = {n: v[f"width/{_qualified(student, n)}"] for n in network.groups}
        widths = {n: w for n, w in chosen.items() if w != network.groups[n].width}
        precision = {n: v[f"precision/{_qualified(student, n)}"] for n in network.layers}
        return Policy(
            Prune(widths, v["criterion"], v["reconstruct"], v["sparsity"], drop),
            Quantize(precision, v["calibration"], v["qat"]),
            Distill(v["student"], v["loss"], v["temperature"], v["alpha"], v["learning_rate"]),
        )

    def _dropped(self, student: str, values: Mapping[str, Any]) -> tuple[str, ...]:
        """The blocks that go; not those inside of one that does."""
        chosen = {
            name: block
            for name, (owner, block) in self.blocks.items()
            if owner == student and values[f"drop/{name}"]
        }
        return tuple(
            block.name
            for block in chosen.values()
            if not any(values[around] for around in self._around(student, block))
        )

    def values(self, policy: Policy) -> dict[str, Any]:
        """The inverse of ``policy``: a value for every parameter that acts in it."""
        student, drop = policy.student, policy.prune.drop
        network = self.networks[student].without(drop)
        out: dict[str, Any] = {
            f"width/{_qualified(student, n)}": policy.prune.width.get(n, g.width)
            for n, g in network.groups.items()
        }
        out |= {
            f"precision/{_qualified(student, n)}": policy.quantize.precision.get(n, "fp32")
            for n in network.layers
        }
        if self.settings.depth:
            names = (*network.blocks, *drop)
            out |= {f"drop/{_qualified(student, n)}": n in drop for n in names}
        out |= {"student": student, "sparsity": policy.prune.sparsity}
        if policy.prune.width:
            out |= {"criterion": policy.prune.criterion, "reconstruct": policy.prune.reconstruct}
        if policy.quantize.acts:
            out |= {"calibration": policy.quantize.calibration, "qat": policy.quantize.qat}
        if policy.distill is not None:
            for name in ("loss", "temperature", "alpha", "learning_rate"):
                out[name] = getattr(policy.distill, name)
        return out

    def check(self, policy: Policy) -> None:
        """Raises Impossible with the rule if ``policy`` is not in this space."""
        if policy.student not in self.networks:
            known = self.settings.students
            raise Impossible(f"student is one of {known}, but got {policy.student!r}")
        network, strangers = self.networks[policy.student], {*policy.prune.drop}
        if self.settings.depth:
            network, strangers = without_blocks(network, policy), set()
        strangers |= policy.prune.width.keys() - network.groups.keys()
        strangers |= policy.quantize.precision.keys() - network.layers.keys()
        if strangers:
            raise Impossible(f"not in this network: {', '.join(sorted(strangers))}")
        by_name = {p.name: p for p in self.parameters}
        for name, value in self.values(policy).items():
            parameter = by_name[name]
            if parameter.choices:
                if value not in parameter.choices:
                    raise Impossible(f"{name} is one of {parameter.choices}, but got {value!r}")
            elif not parameter.low <= value <= parameter.high:
                raise Impossible(
                    f"{parameter.low} <= {name} <= {parameter.high} must hold, but got {value!r}"
                )

    def contains(self, policy: Policy) -> bool:
        """Whether ``policy`` is legal here."""
        try:
            self.check(policy)
        except Impossible:
            return False
        return True

    @property
    def size(self) -> int:
        """The number of policies that differ in a discrete choice; ranges do not count.

        Settings that are inert without pruning or without int8 make no policies of their own.
        """
        count = {name: len(p.choices) for name, p in self._choices.items()}
        shared = count["loss"] * count["sparsity"]
        return sum(self._size(name, count) for name in self.networks) * shared

    def _size(self, student: str, count: Mapping[str, int]) -> int:
        """Policies of ``student`` that differ in a width, a block, a precision or what hangs on
        them."""
        widths = count["criterion"] * count["reconstruct"]
        int8 = count["calibration"] * count["qat"]
        both, neither = self._points(student, True, True), self._points(student, False, False)
        pruned, quantized = self._points(student, True, False), self._points(student, False, True)
        return (
            (both - pruned - quantized + neither) * widths * int8
            + (pruned - neither) * widths
            + (quantized - neither) * int8
            + neither
        )

    def _points(self, student: str, pruned: bool, quantized: bool, inside: str = "") -> int:
        """The points in the block whose drop is ``inside`` ("" for none), it not being dropped.

        Where nothing is pruned every group has one width, where nothing is quantized every layer
        one precision, if it is legal.
        """
        total = 1
        for what, name in self._inside.get((student, inside), ()):
            if what == "width":
                total *= len(self.widths[name]) if pruned else 1
            elif what == "precision":
                known = self.precisions[name]
                total *= len(known) if quantized else known.count("fp32")
            else:
                total *= self._points(student, pruned, quantized, f"drop/{name}") + 1
        return total

    @cached_property
    def _inside(self) -> dict[tuple[str, str], list[tuple[str, str]]]:
        """By student and drop of the innermost block: what kind of thing, and its name."""
        out: dict[tuple[str, str], list[tuple[str, str]]] = {}
        kinds: dict[str, Mapping[str, tuple[str, Block | Group | Layer]]] = {
            "width": self.groups, "precision": self.layers, "drop": self.blocks,
        }  # fmt: skip
        for kind, named in kinds.items():
            for name, (student, what) in named.items():
                innermost = (*self._around(student, what), "")[0]
                out.setdefault((student, innermost), []).append((kind, name))
        return out

    def sample(self, rng: random.Random) -> Policy:
        """A legal policy at random, every parameter uniform."""
        return self.policy({p.name: p.sample(rng) for p in self.parameters})

    def neighbours(self, policy: Policy) -> Iterator[Policy]:
        """Every policy that differs in one discrete choice by one step.

        Raises Impossible if ``policy`` is not in this space.
        """
        self.check(policy)
        values = self.values(policy)
        for name, parameter in self._choices.items():
            if name not in values or (name == "student" and policy.distill is None):
                continue
            at = parameter.choices.index(values[name])
            for other in (at - 1, at + 1):
                if 0 <= other < len(parameter.choices):
                    near = self.policy({**values, name: parameter.choices[other]})
                    # What is not trained stays untrained.
                    yield near if policy.distill else replace(near, distill=None)

    @cached_property
    def _choices(self) -> dict[str, Parameter]:
        return {p.name: p for p in self.parameters if p.choices}

    def uniform(self, keep: float, precision: str = "fp32", student: str = "") -> Policy:
        """The recipe by hand: every group at the share ``keep``, every layer at ``precision``.

        Widths are the nearest legal ones; a layer without that precision takes its first. student:
        "" is the first of the settings.
        """
        values: dict[str, Any] = {"student": student or self.settings.students[0]}
        for name, choices in self.widths.items():
            wish = keep * self.groups[name][1].width
            values[f"width/{name}"] = min(choices, key=lambda w: (abs(w - wish), -w))
        for name, known in self.precisions.items():
            values[f"precision/{name}"] = precision if precision in known else known[0]
        return self.policy(values)

    def smallest(self, precision: str, student: str) -> Policy:
        """What a student can come to at most: least widths, most zeros, every block dropped."""
        values = self.values(self.uniform(0.0, precision, student))
        gone = {
            f"drop/{name}": True for name, (owner, _) in self.blocks.items() if owner == student
        }
        return self.policy(values | gone | {"sparsity": max(self.settings.sparsity)})

    def shrunk(self, policy: Policy, share: float) -> Policy:
        """``policy`` with every width at ``share`` of what it is, rounded to a legal one.

        At share 1 it is ``policy`` itself, at 0 the smallest of its precisions.
        """
        values = self.values(policy)
        for name, choices in self.widths.items():
            if f"width/{name}" in values:  # of this student, and not in a block that is gone
                wish = share * values[f"width/{name}"]
                values[f"width/{name}"] = min(choices, key=lambda w: (abs(w - wish), w))
        return self.policy(values)

    def in_int8(self, policy: Policy) -> Policy:
        """``policy`` with every layer in int8 that may be."""
        values = self.values(policy)
        for name, known in self.precisions.items():
            if f"precision/{name}" in values and "int8" in known:
                values[f"precision/{name}"] = "int8"
        return self.policy(values)


def _takes(block: Block, what: Block | Group | Layer) -> bool:
    """Whether ``what`` goes when ``block`` is dropped."""
    return what.name in (block.groups if isinstance(what, Group) else block.layers)


def _qualified(student: str, name: str) -> str:
    """The name of a group or layer of ``student`` among those of all students."""
    return name if student == "pruned" else f"{student}:{name}"

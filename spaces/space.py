"""The space of legal policies for a network, a target and the user's settings."""

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .capabilities import Capabilities
from .errors import BadInput, Impossible
from .network import Network
from .policy import Distill, Policy, Prune, Quantize

Range = tuple[float, float]


@dataclass(frozen=True)
class Settings:
    """What the user allows; the meaning of each is that of search.yaml's ``space``."""

    min_keep: float = 0.125
    multiple_of: int | None = None  # None: what the target likes
    criteria: tuple[str, ...] = ("l1",)
    reconstruct: tuple[bool, ...] = (False,)
    precisions: tuple[str, ...] = ("fp32", "int8")
    calibrations: tuple[str, ...] = ("minmax",)
    qat: tuple[bool, ...] = (False,)
    students: tuple[str, ...] = ("pruned",)
    losses: tuple[str, ...] = ("kl",)
    temperature: Range = (4.0, 4.0)
    alpha: Range = (0.9, 0.9)
    learning_rate: Range = (0.02, 0.02)


@dataclass(frozen=True)
class Parameter:
    """One axis of the space: ``choices``, or a range ``low`` to ``high`` (``log``: of its logarithm).

    default: what holds where nothing is known. rung: the lowest rung at which it acts. needs: the part of the policy without which it is
    inert ("prune", "quantize"), "" for none.
    """

    name: str
    default: Any
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    rung: str = "recalibrate"
    needs: str = ""

    def sample(self, rng: random.Random) -> Any:
        if self.choices:
            return rng.choice(self.choices)
        if self.log:
            return math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return rng.uniform(self.low, self.high)


@dataclass(frozen=True)
class Space:
    """Offers ``parameters`` and makes a policy of their values; knows nothing of who chooses."""

    network: Network
    capabilities: Capabilities
    settings: Settings

    @cached_property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """Per group the widths it may have, ascending; the last is the full width."""
        out = {}
        for name, group in self.network.groups.items():
            asked = self.settings.multiple_of or self.capabilities.width_multiple
            step = math.lcm(asked, group.multiple_of)
            least = max(1, math.ceil(group.width * self.settings.min_keep))
            first = -(-least // step) * step
            out[name] = (*range(first, group.width, step), group.width)
        return out

    @cached_property
    def precisions(self) -> dict[str, tuple[str, ...]]:
        """Per layer the precisions that both the user and the target allow."""
        out = {}
        for name, layer in self.network.layers.items():
            known = self.capabilities.precisions.get(layer.kind, ("fp32",))
            out[name] = tuple(p for p in known if p in self.settings.precisions) or ("fp32",)
        return out

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every axis with more than one value comes as a choice; fixed ones stay, with one."""
        s = self.settings

        def choice(name: str, choices: tuple[Any, ...], at: int = 0, **more: str) -> Parameter:
            return Parameter(name, choices[at], choices, **more)

        def between(name: str, bounds: Range, log: bool = False) -> Parameter:
            low, high = bounds
            if low == high:
                return Parameter(name, low, (low,), rung="short")
            middle = math.sqrt(low * high) if log else (low + high) / 2
            return Parameter(name, middle, (), low, high, log, rung="short")

        return (
            *(choice(f"width/{n}", w, at=-1) for n, w in self.widths.items()),
            choice("criterion", s.criteria, needs="prune"),
            choice("reconstruct", s.reconstruct, needs="prune"),
            *(choice(f"precision/{n}", p) for n, p in self.precisions.items()),
            choice("calibration", s.calibrations, needs="quantize"),
            choice("qat", s.qat, rung="short", needs="quantize"),
            choice("student", s.students),
            choice("loss", s.losses, rung="short"),
            between("temperature", s.temperature),
            between("alpha", s.alpha),
            between("learning_rate", s.learning_rate, log=True),
        )

    @cached_property
    def defaults(self) -> dict[str, Any]:
        return {p.name: p.default for p in self.parameters}

    def policy(self, values: Mapping[str, Any]) -> Policy:
        """The policy that ``values`` describe; what is not named has its default. Raises BadInput."""
        if unknown := values.keys() - self.defaults.keys():
            raise BadInput(f"no such parameter: {sorted(unknown)}")
        v = {**self.defaults, **values}
        groups = self.network.groups
        widths = {n: v[f"width/{n}"] for n in groups if v[f"width/{n}"] != groups[n].width}
        precision = {n: v[f"precision/{n}"] for n in self.network.layers}
        return Policy(
            Prune(widths, v["criterion"], v["reconstruct"]),
            Quantize(precision, v["calibration"], v["qat"]),
            Distill(v["student"], v["loss"], v["temperature"], v["alpha"], v["learning_rate"]),
        )

    def values(self, policy: Policy) -> dict[str, Any]:
        """The inverse of ``policy``: a value for every parameter that acts in it."""
        out: dict[str, Any] = {
            f"width/{n}": policy.prune.width.get(n, g.width) for n, g in self.network.groups.items()
        }
        out |= {
            f"precision/{n}": policy.quantize.precision.get(n, "fp32") for n in self.network.layers
        }
        if policy.prune.acts:
            out |= {"criterion": policy.prune.criterion, "reconstruct": policy.prune.reconstruct}
        if policy.quantize.acts:
            out |= {"calibration": policy.quantize.calibration, "qat": policy.quantize.qat}
        if policy.distill is not None:
            for name in ("student", "loss", "temperature", "alpha", "learning_rate"):
                out[name] = getattr(policy.distill, name)
        return out

    def check(self, policy: Policy) -> None:
        """Raises Impossible with the rule if ``policy`` is not in this space."""
        strangers = policy.prune.width.keys() - self.network.groups.keys()
        strangers |= policy.quantize.precision.keys() - self.network.layers.keys()
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
        """The number of choices of structure: widths, precisions and discrete settings."""
        return math.prod(len(p.choices) for p in self.parameters if p.choices)

    def sample(self, rng: random.Random) -> Policy:
        """A legal policy at random, every parameter uniform."""
        return self.policy({p.name: p.sample(rng) for p in self.parameters})

    def neighbours(self, policy: Policy) -> Iterator[Policy]:
        """Every policy that differs in one discrete choice by one step."""
        values = self.values(policy)
        for parameter in self.parameters:
            if parameter.name not in values or len(parameter.choices) < 2:
                continue
            at = parameter.choices.index(values[parameter.name])
            for other in (at - 1, at + 1):
                if 0 <= other < len(parameter.choices):
                    yield self.policy({**values, parameter.name: parameter.choices[other]})

    def uniform(self, keep: float, precision: str = "fp32") -> Policy:
        """The recipe of people in a hurry: every group at ``keep``, every layer at ``precision``."""
        values: dict[str, Any] = {}
        for name, choices in self.widths.items():
            wish = keep * self.network.groups[name].width
            values[f"width/{name}"] = min(choices, key=lambda w: (abs(w - wish), -w))
        for name, known in self.precisions.items():
            values[f"precision/{name}"] = precision if precision in known else known[0]
        return self.policy(values)

"""A policy: one point of the search space, frozen, with one canonical form and one digest."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any, Self

from .errors import BadInput, nearest

VERSION = 1
MAX_SPARSITY = 0.95  # beyond it whole channels die, and removing channels is what widths are for
_OPTIONAL = {"optional": True}  # left out of the canonical form while it does nothing


def _frozen(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(sorted(values.items())))


def _require(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise BadInput(f"policy: {rule} must hold, but got {value!r}")


def _named(values: object, what: str) -> None:
    _require(isinstance(values, Mapping), f"{what} is an object", values)
    for name in values:  # type: ignore[attr-defined]
        _require(isinstance(name, str), f"every key of {what} is a name", name)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # True is an int in Python


def _finite(value: object) -> bool:
    number = isinstance(value, float) or _whole(value)
    return number and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _hash(part: Any) -> int:  # a mapping proxy does not hash
    values = (getattr(part, f.name) for f in fields(part))
    return hash(tuple(tuple(v.items()) if isinstance(v, Mapping) else v for v in values))


def _reduce(part: Any) -> tuple[Any, ...]:  # nor does it pickle
    values = (getattr(part, f.name) for f in fields(part))
    return type(part), tuple(dict(v) if isinstance(v, Mapping) else v for v in values)


@dataclass(frozen=True)
class Prune:
    """What goes. ``width``: channels kept per group; a group not named keeps all. ``sparsity``:
    share of the single weights of every layer that are 0, and stay so. ``drop``: residual blocks
    that go as a whole."""

    width: Mapping[str, int] = field(default_factory=dict)
    criterion: str = "l1"
    reconstruct: bool = False
    sparsity: float = field(default=0.0, metadata=_OPTIONAL)
    drop: tuple[str, ...] = field(default=(), metadata=_OPTIONAL)

    def __post_init__(self) -> None:
        _named(self.width, "prune.width")
        for name, width in self.width.items():
            rule = f"prune.width[{name!r}] is a whole number >= 1"
            _require(_whole(width) and width >= 1, rule, width)
        _require(isinstance(self.criterion, str), "prune.criterion is a name", self.criterion)
        is_bool = isinstance(self.reconstruct, bool)
        _require(is_bool, "prune.reconstruct is true or false", self.reconstruct)
        rule = f"0 <= prune.sparsity <= {MAX_SPARSITY}"
        within = _finite(self.sparsity) and 0 <= self.sparsity <= MAX_SPARSITY
        _require(within, rule, self.sparsity)
        object.__setattr__(self, "sparsity", float(self.sparsity) + 0.0)
        listed = isinstance(self.drop, list | tuple) and all(isinstance(n, str) for n in self.drop)
        _require(listed, "prune.drop is a list of names", self.drop)
        _require(len({*self.drop}) == len(self.drop), "prune.drop names a block once", self.drop)
        object.__setattr__(self, "drop", tuple(sorted(self.drop)))
        object.__setattr__(self, "width", _frozen(self.width))
        if not self.width:  # inert
            object.__setattr__(self, "criterion", "l1")
            object.__setattr__(self, "reconstruct", False)

    @property
    def acts(self) -> bool:
        """Whether anything is pruned; if not, the other settings are inert."""
        return bool(self.width or self.sparsity or self.drop)

    __hash__ = _hash
    __reduce__ = _reduce


@dataclass(frozen=True)
class Quantize:
    """Which precision each layer gets. ``precision``: per layer; a layer not named stays fp32."""

    precision: Mapping[str, str] = field(default_factory=dict)
    calibration: str = "minmax"
    qat: bool = False

    def __post_init__(self) -> None:
        _named(self.precision, "quantize.precision")
        for name, precision in self.precision.items():
            rule = f"quantize.precision[{name!r}] is a name"
            _require(isinstance(precision, str), rule, precision)
        is_name = isinstance(self.calibration, str)
        _require(is_name, "quantize.calibration is a name", self.calibration)
        _require(isinstance(self.qat, bool), "quantize.qat is true or false", self.qat)
        kept = {layer: p for layer, p in self.precision.items() if p != "fp32"}
        object.__setattr__(self, "precision", _frozen(kept))

    @property
    def acts(self) -> bool:
        """Whether anything is quantized; if not, the other settings are inert."""
        return bool(self.precision)

    __hash__ = _hash
    __reduce__ = _reduce


@dataclass(frozen=True)
class Distill:
    """How the student learns from the teacher (Hinton et al. 2015).

    alpha: weight of the softened loss; 1 - alpha is that of the task's own loss.
    temperature: divides the logits of both before the softmax.
    learning_rate: the peak of the one-cycle schedule.
    """

    student: str = "pruned"
    loss: str = "kl"
    temperature: float = 4.0
    alpha: float = 0.9
    learning_rate: float = 0.02

    def __post_init__(self) -> None:
        for name in ("temperature", "alpha", "learning_rate"):
            value = getattr(self, name)
            _require(_finite(value), f"distill.{name} is a finite number", value)
            object.__setattr__(self, name, float(value) + 0.0)  # -0.0 becomes 0.0: one digest
        _require(self.temperature > 0, "distill.temperature > 0", self.temperature)
        _require(0 <= self.alpha <= 1, "0 <= distill.alpha <= 1", self.alpha)
        _require(self.learning_rate > 0, "distill.learning_rate > 0", self.learning_rate)
        for name in ("student", "loss"):
            value = getattr(self, name)
            _require(isinstance(value, str), f"distill.{name} is a name", value)

    acts = True


_PARTS: dict[str, Any] = {"prune": Prune, "quantize": Quantize, "distill": Distill}


@dataclass(frozen=True)
class Policy:
    """Widths per group, precision per layer, distillation settings (None: no training).

    Inert settings (a criterion where nothing is pruned) are set back to their defaults.
    """

    prune: Prune = field(default_factory=Prune)
    quantize: Quantize = field(default_factory=Quantize)
    distill: Distill | None = None

    def __post_init__(self) -> None:
        for name, kind in _PARTS.items():
            part = getattr(self, name)
            if not isinstance(part, kind) and not (name == "distill" and part is None):
                raise TypeError(f"{name} must be a {kind.__name__}, but got {part!r}")
            if part is not None and not part.acts:
                object.__setattr__(self, name, kind())

    @property
    def student(self) -> str:
        """What it starts from: "pruned" is the teacher, others are the task's ``students()``."""
        return "pruned" if self.distill is None else self.distill.student

    def to_dict(self) -> dict[str, Any]:
        """The policy without inert settings: what does nothing is not part of it."""
        out: dict[str, Any] = {"version": VERSION}
        for name in _PARTS:
            part = getattr(self, name)
            if part is not None and part.acts:
                values = {
                    f.name: getattr(part, f.name)
                    for f in fields(part)
                    if not f.metadata.get("optional") or getattr(part, f.name)
                }
                out[name] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
        return out

    def canonical(self) -> str:
        """JSON with sorted keys, no spaces and the shortest floats that round-trip."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical form, 64 hexadecimal digits."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The policy that ``values`` describe. Raises BadInput for anything it does not know."""
        if not isinstance(values, Mapping):
            raise BadInput(f"policy: an object is needed, but got {type(values).__name__}")
        rest = dict(values)
        version = rest.pop("version", None)
        if not _whole(version) or version != VERSION:
            raise BadInput(f"policy: version {VERSION} is needed, but got {version!r}")
        parts: dict[str, Any] = {}
        for name, content in rest.items():
            if name not in _PARTS:
                raise BadInput(f"policy: unknown key {name!r}; {nearest(str(name), _PARTS)}")
            if (part := _part(name, content)) is not None:
                parts[name] = part
        return cls(**parts)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of ``canonical``; any JSON layout is accepted."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise BadInput(f"policy: not JSON: {error}") from error

    def __hash__(self) -> int:
        return hash(self.canonical())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self.canonical() == other.canonical()

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy does not pickle; JSON does
        return Policy.from_json, (self.canonical(),)


def _part(name: str, content: object) -> Any:
    kind = _PARTS[name]
    known = [f.name for f in fields(kind)]
    if not isinstance(content, Mapping):
        raise BadInput(f"policy: {name} is an object, but got {content!r}")
    for key in content:
        if key not in known:
            raise BadInput(f"policy: unknown key {name}.{key}; {nearest(str(key), known)}")
    return kind(**content) if content else None  # an empty object is as good as none

"""A policy: one point of the search space, frozen, with one canonical form and one digest."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Self

from .errors import BadInput, nearest

VERSION = 1


def _frozen(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(sorted(values.items())))


def _require(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise BadInput(f"policy: {rule} must hold, but got {value!r}")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Prune:
    """Which channels go. ``width``: channels kept per group; a group not named keeps all."""

    width: Mapping[str, int] = field(default_factory=dict)
    criterion: str = "l1"
    reconstruct: bool = False

    def __post_init__(self) -> None:
        for name, width in self.width.items():
            whole = isinstance(width, int) and not isinstance(width, bool)
            _require(whole and width >= 1, f"prune.width[{name!r}] is a whole number >= 1", width)
        _require(isinstance(self.criterion, str), "prune.criterion is a name", self.criterion)
        _require(isinstance(self.reconstruct, bool), "prune.reconstruct is true or false", self.reconstruct)
        object.__setattr__(self, "width", _frozen(self.width))

    @property
    def acts(self) -> bool:
        return bool(self.width)


@dataclass(frozen=True)
class Quantize:
    """Which precision each layer gets. ``precision``: per layer; a layer not named stays fp32."""

    precision: Mapping[str, str] = field(default_factory=dict)
    calibration: str = "minmax"
    qat: bool = False

    def __post_init__(self) -> None:
        for name, precision in self.precision.items():
            _require(isinstance(precision, str), f"quantize.precision[{name!r}] is a name", precision)
        _require(isinstance(self.calibration, str), "quantize.calibration is a name", self.calibration)
        _require(isinstance(self.qat, bool), "quantize.qat is true or false", self.qat)
        kept = {layer: p for layer, p in self.precision.items() if p != "fp32"}
        object.__setattr__(self, "precision", _frozen(kept))

    @property
    def acts(self) -> bool:
        return bool(self.precision)


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
            _require(_number(value), f"distill.{name} is a number", value)
            object.__setattr__(self, name, float(value))
        _require(0 < self.temperature < float("inf"), "distill.temperature > 0", self.temperature)
        _require(0 <= self.alpha <= 1, "0 <= distill.alpha <= 1", self.alpha)
        _require(0 < self.learning_rate < float("inf"), "distill.learning_rate > 0", self.learning_rate)
        for name in ("student", "loss"):
            value = getattr(self, name)
            _require(isinstance(value, str), f"distill.{name} is a name", value)

    acts = True


_PARTS = {"prune": Prune, "quantize": Quantize, "distill": Distill}


@dataclass(frozen=True)
class Policy:
    """Widths per group, precision per layer, distillation settings (None: no training)."""

    prune: Prune = field(default_factory=Prune)
    quantize: Quantize = field(default_factory=Quantize)
    distill: Distill | None = None

    def to_dict(self) -> dict[str, Any]:
        """The policy without inert settings: what does nothing is not part of it."""
        out: dict[str, Any] = {"version": VERSION}
        for name in _PARTS:
            part = getattr(self, name)
            if part is not None and part.acts:
                values = {f.name: getattr(part, f.name) for f in fields(part)}
                out[name] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
        return out

    def canonical(self) -> str:
        """JSON with sorted keys, no spaces and the shortest floats that round-trip."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form, 64 hexadecimal digits."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The policy that ``values`` describe. Raises BadInput for anything it does not know."""
        if not isinstance(values, Mapping):
            raise BadInput(f"policy: an object is needed, but got {type(values).__name__}")
        rest = dict(values)
        if (version := rest.pop("version", None)) != VERSION:
            raise BadInput(f"policy: version {VERSION} is needed, but got {version!r}")
        parts: dict[str, Any] = {}
        for name, content in rest.items():
            if name not in _PARTS:
                raise BadInput(f"policy: unknown key {name!r}; {nearest(name, _PARTS)}")
            parts[name] = _part(name, content)
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
    for key, value in content.items():
        if key not in known:
            raise BadInput(f"policy: unknown key {name}.{key}; {nearest(key, known)}")
        if key in ("width", "precision") and not isinstance(value, Mapping):
            raise BadInput(f"policy: {name}.{key} is an object, but got {value!r}")
    return kind(**content)

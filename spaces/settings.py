"""What the user allows: the settings that make a space of a network and a target."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from .errors import BadInput
from .policy import MAX_SPARSITY

Range = tuple[float, float]


_CHOICES = {
    "criteria": str, "reconstruct": bool, "precisions": str, "calibrations": str, "qat": bool,
    "students": str, "losses": str, "sparsity": float,
}  # fmt: skip
_RANGES: dict[
    str, tuple[str, Callable[[float], bool]]
] = {  # what every value of the range must satisfy
    "temperature": ("temperature > 0", lambda x: x > 0),
    "alpha": ("0 <= alpha <= 1", lambda x: 0 <= x <= 1),
    "learning_rate": ("learning_rate > 0", lambda x: x > 0),
}


@dataclass(frozen=True)
class Settings:
    """What the user allows; the meaning of each is that of search.yaml's ``space``.

    Raises BadInput, naming the rule and the value, for what cannot be a space.
    """

    min_keep: float = 0.125
    multiple_of: int | None = None  # None: what the target likes
    criteria: tuple[str, ...] = ("l1",)
    reconstruct: tuple[bool, ...] = (False,)
    sparsity: tuple[float, ...] = (0.0,)
    precisions: tuple[str, ...] = ("fp32", "int8")
    calibrations: tuple[str, ...] = ("minmax",)
    qat: tuple[bool, ...] = (False,)
    depth: bool = False  # whole residual blocks may go
    students: tuple[str, ...] = ("pruned",)
    losses: tuple[str, ...] = ("kl",)
    temperature: Range = (4.0, 4.0)
    alpha: Range = (0.9, 0.9)
    learning_rate: Range = (0.02, 0.02)

    def __post_init__(self) -> None:
        _require(0 < self.min_keep <= 1, "0 < min_keep <= 1", self.min_keep)
        step = self.multiple_of
        whole = step is None or (type(step) is int and step >= 1)
        _require(whole, "multiple_of is a whole number >= 1", step)
        _require(type(self.depth) is bool, "depth is true or false", self.depth)
        for name, kind in _CHOICES.items():
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            _require(len(values) > 0, f"{name} has at least one choice", list(values))
            rule = f"every choice of {name} is a {kind.__name__}"
            _require(all(type(v) is kind for v in values), rule, list(values))
            rule = f"the choices of {name} differ"
            _require(len(set(values)) == len(values), rule, list(values))
        within = all(0 <= share <= MAX_SPARSITY for share in self.sparsity)
        _require(within, f"0 <= sparsity <= {MAX_SPARSITY}", list(self.sparsity))
        for name, (rule, holds) in _RANGES.items():
            bounds = tuple(getattr(self, name))
            object.__setattr__(self, name, bounds)
            _require(len(bounds) == 2, f"{name} is a range [low, high]", list(bounds))
            low, high = bounds
            _require(math.isfinite(low) and math.isfinite(high), f"{name} is finite", list(bounds))
            text = f"(low={low}, high={high})"
            if low > high:
                raise BadInput(f"space: low <= high must hold for {name}, but got {text}")
            _require(holds(low) and holds(high), rule, list(bounds))


def _require(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise BadInput(f"space: {rule} must hold, but got {value!r}")

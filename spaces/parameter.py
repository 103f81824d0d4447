"""One axis of a space."""

import math
import random
from dataclasses import dataclass
from typing import Any

RUNGS = ("recalibrate", "short", "full")  # as a trial climbs them


@dataclass(frozen=True)
class Parameter:
    """One axis of the space: ``choices``, or a range ``low`` to ``high``.

    log: the range is one of the logarithm. default: what holds where nothing is known. rung: the
    lowest rung at which it acts. needs: the part of the policy without which it is inert
    ("prune", "quantize"), "" for none. student: the only student for which it acts, "" for all.
    unless: parameters any of which, true, makes it inert: the drop of a block around it.
    """

    name: str
    default: Any
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    rung: str = "recalibrate"
    needs: str = ""
    student: str = ""
    unless: tuple[str, ...] = ()

    def sample(self, rng: random.Random) -> Any:
        """A value at random, uniform (in its logarithm if ``log``)."""
        if self.choices:
            return rng.choice(self.choices)
        if self.log:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = rng.uniform(self.low, self.high)
        return min(max(value, self.low), self.high)  # exp(log(x)) may lie beside x

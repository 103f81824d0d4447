"""Ray's own OptunaSearch as a source of policies, wired as its documentation has it.

The whole space flat, two objectives, Optuna's sampler as it comes; a policy is told what its full
rung gave. What is inert in a policy is suggested all the same, and what was tried may come again.
"""

from typing import Any

from ray import tune
from ray.tune.search.optuna import OptunaSearch

from flyweight.compressors import RUNGS
from flyweight.spaces import Parameter, Policy, Space

OBJECTIVES = ("loss", "latency")


def domain(parameter: Parameter) -> Any:
    if parameter.choices:
        return tune.choice(list(parameter.choices))
    make = tune.loguniform if parameter.log else tune.uniform
    return make(parameter.low, parameter.high)


class RayOptuna:
    """A ``Source`` (``search/strategies.py``)."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed
        flat = {p.name.replace("/", ":"): domain(p) for p in space.parameters}  # it takes no "/"
        found = OptunaSearch.convert_search_space(flat)
        self._search = OptunaSearch(found, metric=[*OBJECTIVES], mode=["min", "min"], seed=seed)
        self._count = 0
        self._running: dict[str, list[str]] = {}  # by digest, Tune's ids

    def ask(self) -> Policy | None:
        self._count += 1
        values = self._search.suggest(f"t{self._count}")
        policy = self.space.policy({name.replace(":", "/"): v for name, v in values.items()})
        self._running.setdefault(policy.digest, []).append(f"t{self._count}")
        return policy

    def claim(self, _: Policy) -> bool:
        return True

    def reject(self, policy: Policy, *_: float) -> None:
        self.fail(policy)

    def tell(self, policy: Policy, rung: str, loss: float, latency_ms: float, _: float) -> None:
        if rung == RUNGS[-1] and (ids := self._running.get(policy.digest)):
            found = dict(zip(OBJECTIVES, (loss, latency_ms), strict=True))
            self._search.on_trial_complete(ids.pop(0), result=found)

    def fail(self, policy: Policy) -> None:
        if ids := self._running.get(policy.digest):
            self._search.on_trial_complete(ids.pop(0), error=True)

"""Whether the limits of a search can be reached at all, found out before it costs anything."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..compressors import untrained
from ..kernels import MeasuringProcess
from ..spaces import BadInput, Impossible, Policy
from .finder import Price
from .limits import Limits
from .meter import Feed, Meter
from .pricing import Pricing, timed
from .ready import Ready
from .store import compressed_bytes
from .words import milliseconds

# What the fastest policy that the solver finds may take more than the least: it is one that no
# single change makes faster, not the fastest of all. It mixes precisions and widths already, so
# this is less than ``limits.NOT_LEAST``.
NOT_FASTEST = 1.03


def check_without_ray(ready: Ready, local: bool) -> None:
    """Raises BadInput for a limit that is out of reach, as far as this process can tell: sizes, and
    latencies where it is this machine that they are measured on (``local``)."""
    if not ready.limits(1.0).costs():
        return
    if local:
        target = ready.spec.target
        start = target.runtime, target.threads, ready.teacher, ready.request()
        with MeasuringProcess(*start) as process:
            meter = CarefulMeter(*start, process)
            check_limits(ready, ready.limits(meter.alone()), timed(ready.prepared, meter))
    else:
        check_limits(ready, replace(ready.limits(1.0), latency_ms=None), _sizes(ready))


class CarefulMeter(Meter):
    """A meter in this process, of models that ``process`` outlives."""

    def __init__(
        self, runtime: str, threads: int, teacher: bytes, feed: Feed, process: MeasuringProcess
    ) -> None:
        super().__init__(runtime, threads, teacher, feed)
        self._process = process

    def provisional(self, model: bytes) -> tuple[float, float, float]:
        if not self._process.bears({"model": model}):
            raise Impossible("the runtime refuses it, or dies of it")
        return super().provisional(model)


def _sizes(ready: Ready) -> Pricing:
    def price(policy: Policy) -> Price:
        model = untrained(ready.prepared, policy)
        return Price((math.nan,) * 3, len(model), compressed_bytes(model))

    return price


def check_limits(ready: Ready, bounds: Limits, price: Pricing) -> None:
    """Raises BadInput if even the smallest policies miss a limit of ``COSTS``."""
    cases: list[Mapping[str, float]] = []
    for policy in ready.smallest() if bounds.costs() else ():
        with contextlib.suppress(Impossible):  # a search would leave it out and try others
            found = price(policy)
            cases.append(vars(found) | {"latency_ms": found.latency_ms[1]})
    check_reachable(ready, bounds, cases)


def check_fastest(
    ready: Ready, bounds: Limits, fastest_ms: tuple[float, float, float], teacher_ms: float
) -> None:
    """Raises BadInput if even the lower end of ``fastest_ms``, what the fastest policy is predicted
    to take, misses the limit of latency by more than may be due to the solver."""
    low, middle, _ = fastest_ms
    if bounds.latency_ms is not None and low > bounds.latency_ms * NOT_FASTEST:
        takes = f"is predicted to take {milliseconds(middle)} ms"
        asked = _latency_missed(ready, bounds.latency_ms, takes)
        speedup = f"a speed-up of {teacher_ms / middle:.2f}"
        raise BadInput(f"objective: {asked}, {speedup}. {ready.advice()}")


def _latency_missed(ready: Ready, most: float, takes: str) -> str:
    objective = ready.spec.objective
    asked = "speedup" if objective.speedup else "latency_ms"
    return (
        f"{asked} {getattr(objective, asked):g} means at most {milliseconds(most)} ms, but the "
        f"fastest policy of this space {takes}"
    )


def check_reachable(ready: Ready, bounds: Limits, cases: Sequence[Mapping[str, float]]) -> None:
    """Raises BadInput if even the smallest policies, ``cases``, miss a limit of ``COSTS``."""
    missed = []
    for name, least in bounds.out_of_reach(cases).items():
        most = getattr(bounds, name)
        if name == "latency_ms":
            missed.append(_latency_missed(ready, most, f"takes {milliseconds(least)} ms"))
        else:
            missed.append(
                f"{name} is {most}, but the smallest policy of this space has {least:.0f}"
            )
    if missed:
        raise BadInput(f"objective: {'; '.join(missed)}. {ready.advice()}")

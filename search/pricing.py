"""What a policy costs on the target before it is trained: timed, or predicted from a profile."""

import math
from collections.abc import Callable, Mapping

from ..compressors import Prepared, untrained
from ..kernels import LatencyPredictor
from ..spaces import Impossible, Policy
from .finder import Price
from .limits import Limits
from .meter import Meter
from .placement import Place
from .store import compressed_bytes

Pricing = Callable[[Policy], Price]


def timed(prepared: Prepared, place: Place | Meter, pace: float = 1.0) -> Pricing:
    """Timed untrained where it is to be measured. pace: what a millisecond of now counts, where the
    limits are of a day on which the device was as much faster or slower. Raises OSError if what
    measures is lost."""

    def price(policy: Policy) -> Price:
        model = untrained(prepared, policy)
        low, middle, high = place.provisional(model)
        latency_ms = pace * low, pace * middle, pace * high
        return Price(latency_ms, len(model), compressed_bytes(model))

    return price


def predicted(
    prepared: Prepared,
    predictor: LatencyPredictor,
    limits: Limits,
    sizes: Mapping[str, tuple[int, int]],
) -> Pricing:
    """By the predictor, without building anything unless sizes are limited: then they are those of
    the policy untrained, else those of its weights. sizes: by digest those that are known."""

    def price(policy: Policy) -> Price:
        plan = prepared.plan(policy)
        low, middle, high = predictor.predict([plan])[0].tolist()
        if not math.isfinite(high):
            raise Impossible("the runtime died of networks with work that this policy has")
        if known := sizes.get(policy.digest):
            return Price((low, middle, high), *known)
        if limits.size_bytes is None and limits.compressed_bytes is None:
            return Price((low, middle, high), plan.weight_bytes, plan.weight_bytes)
        model = untrained(prepared, policy)
        return Price((low, middle, high), len(model), compressed_bytes(model))

    return price

"""The in-memory twin of a runtime: true answers, and latencies that are given, on a clock that is.

Answers come from ONNX's own reference implementation, so the twin needs no vendor; time passes
only when a session runs, so hours of measuring take no time and every figure is known beforehand.
"""

from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import onnx
from onnx.reference import ReferenceEvaluator

from ..spaces.capabilities import Capabilities
from ..spaces.errors import Impossible
from .device import fingerprint_of
from .runtime import Array, Inputs

SIMULATED = Capabilities(precisions={"conv": ("fp32", "int8"), "linear": ("fp32", "int8")})


class SimulatedClock:
    """Nanoseconds that pass only when told. Call it to read it, as ``time.perf_counter_ns``."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns

    def advance_ms(self, ms: float) -> None:
        self.now_ns += round(ms * 1e6)


class SimulatedSession:
    """Answers with ``answer`` and takes the given latencies, one a call, over and over."""

    def __init__(
        self,
        clock: SimulatedClock,
        latencies_ms: Iterable[float],
        answer: Callable[[Inputs], Array],
    ) -> None:
        self.clock = clock
        self.latencies_ms = cycle(latencies_ms)
        self.answer = answer
        self.calls = 0

    def run(self, inputs: Inputs) -> Array:
        self.calls += 1
        self.clock.advance_ms(next(self.latencies_ms))
        return self.answer(inputs)


class SimulatedRuntime:
    """A runtime whose latencies are given. ``latencies_ms``: those of a model, by its content."""

    name = "simulated"

    def __init__(
        self,
        latencies_ms: Callable[[bytes], Iterable[float]] = lambda _: (1.0,),
        clock: SimulatedClock | None = None,
        threads: int = 1,
        capabilities: Capabilities = SIMULATED,
    ) -> None:
        self.latencies_ms = latencies_ms
        self.clock = clock or SimulatedClock()
        self.threads = threads
        self.capabilities = capabilities

    @property
    def device(self) -> dict[str, str]:
        return {"runtime": self.name, "threads": str(self.threads)}

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.device)

    def load(self, model: bytes | Path) -> SimulatedSession:
        """The model, run by ONNX's reference implementation. Raises Impossible if it cannot."""
        try:
            content = model.read_bytes() if isinstance(model, Path) else model
            proto = onnx.load_from_string(content)
            onnx.checker.check_model(proto)
            evaluator = ReferenceEvaluator(proto)
        except Exception as error:  # protobuf's, the checker's, or an operation that it lacks
            raise Impossible(f"the model does not load: {error}") from error
        if (outputs := len(proto.graph.output)) != 1:
            raise Impossible(f"a model has one output, but this one has {outputs}")
        return SimulatedSession(self.clock, self.latencies_ms(content), _answer(evaluator))


def _answer(evaluator: Any) -> Callable[[Inputs], Array]:
    def answer(inputs: Inputs) -> Array:
        try:
            output: Array = evaluator.run(None, dict(inputs))[0]
        except Exception as error:  # whatever numpy raises for shapes that do not fit
            raise Impossible(f"the model cannot be run: {error}") from error
        return output

    return answer

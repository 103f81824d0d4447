"""A search whose trials do nothing: what is around them is what is looked at."""

import importlib.util
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "fashion_mnist"


def no_op(seconds: float = 0.0) -> Any:
    """A trainable that does nothing, for ``seconds`` a rung, and reports what one might find."""
    import random
    import time

    from ray import tune

    rungs = ("recalibrate", "short", "full")

    class NoOp(tune.Trainable):  # in a function: workers get it by value, and import nothing more
        def setup(self, config: dict[str, Any]) -> None:
            self.reset_config(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            # Bare trials are told how many steps they have. flyweight's scheduler ends its own: a
            # result that says "done" would pass it by.
            first = rungs.index(new_config.get("rung", rungs[0]))
            self.steps, self.done_steps = new_config.get("steps"), first
            self.quality = random.gauss(0.0, 0.3)
            return True

        def step(self) -> dict[str, Any]:
            time.sleep(seconds)
            loss = 0.4 + abs(self.quality) / (1 + self.done_steps) + random.random() * 0.05
            outcome = {
                "rung": rungs[self.done_steps],
                "loss": loss,
                "metric": 94.0 - 4 * loss,
                "size_bytes": 900_000,
                "compressed_bytes": 800_000,
                "seconds": 0.001,
                "rung_seconds": 0.001,
                "samples": 0,
                "macs": 1_000_000,
                "parity": None,
                "artifact": None,
            }
            self.done_steps += 1
            return {"outcome": json.dumps(outcome), "done": self.done_steps == self.steps}

        def save_checkpoint(self, *_: Any) -> None:
            return None

        def load_checkpoint(self, *_: Any) -> None:
            return None

    return NoOp


def price(policy: Any) -> Any:
    """Costs nothing and is within the limit, but differs: were all latencies the same, every trial
    would be a front of its own and sorting them would be what is measured."""
    from flyweight.search.controller import Price

    latency_ms = 0.1 + 0.2 * int(policy.digest[:8], 16) / 2**32
    return Price((0.95 * latency_ms, latency_ms, 1.05 * latency_ms), 900_000, 800_000)


def make_controller(
    trials: int, record: Any, listen: Callable[[dict[str, Any]], None], sampler: str = "tpe"
) -> Any:
    """The search's own controller, on the space of the reference network."""
    from flyweight.search.controller import Budget, Controller
    from flyweight.search.limits import Limits
    from flyweight.search.proposals import Proposals

    proposals = Proposals(_space(), sampler, seed=secrets.randbits(16))
    limits = Limits(92.5, latency_ms=0.4, max_drop=0.5)
    return Controller(
        proposals, price, limits, record, Budget(trials), listen=[listen], look_ahead=True
    )


def _space() -> Any:
    import torch

    from flyweight.kernels import make_runtime
    from flyweight.search.spec import load_spec
    from flyweight.spaces import Space, trace

    torch.set_num_threads(1)
    place = importlib.util.spec_from_file_location("resnet", EXAMPLE / "resnet.py")
    assert place is not None
    assert place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    network = trace(module.ResNet().eval(), torch.zeros(1, 1, 28, 28))
    settings = load_spec(EXAMPLE / "search.yaml").space.settings()
    return Space(network, make_runtime("onnxruntime", 1).capabilities, settings)

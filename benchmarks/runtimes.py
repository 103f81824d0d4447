"""The same policies on ONNX Runtime and on OpenVINO: latency, layers in int8, parity, metric.

    python benchmarks/runtimes.py [--task FashionMnistViT]

Each artifact is built for its runtime, without training, at the full rung: the metric of a pruned
one says only that both runtimes compute the same. Latencies of all are measured side by side in one
process, one thread, batch 1: interleaved rounds, minimum of a round, median over the rounds.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import write
from executed import float_layers, int8_layers

from flyweight.compressors import Schedule, compress, load_task, prepare
from flyweight.kernels import make_runtime, time_sessions
from flyweight.spaces import Policy, Settings, Space

TASK = Path(__file__).resolve().parents[1] / "examples" / "fashion_mnist" / "task.py"
RUNTIMES = ("onnxruntime", "openvino")


def policies(space: Space) -> dict[str, Policy]:
    """The uniform recipes, without their distillation."""
    found = {}
    for keep, what in ((1.0, "full width"), (0.5, "half width")):
        for precision in ("fp32", "int8"):
            uniform = space.uniform(keep, precision)
            found[f"{precision}, {what}"] = Policy(uniform.prune, uniform.quantize)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="FashionMnist")
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = load_task(f"{TASK}:{options.task}", Path(), {})
    rows: list[dict[str, Any]] = []
    sessions = {}
    for name in RUNTIMES:
        runtime = make_runtime(name, 1)
        prepared = prepare(task, runtime, Schedule())
        space = Space(prepared.network, runtime.capabilities, Settings())
        for what, policy in policies(space).items():
            found = compress(prepared, policy, "full")
            assert found.parity is not None
            counts = int8_layers(found.model, runtime), float_layers(found.model, runtime)
            rows.append(
                {
                    "runtime": name, "policy": what, "metric": found.metric,
                    "agreement": found.parity.agreement, "mean_steps": found.parity.mean_steps,
                    "int8_layers": counts[0], "float_layers": counts[1],
                    "size_bytes": len(found.model),
                }
            )  # fmt: skip
            sessions[f"{name}: {what}"] = runtime.load(found.model)
    requests = {"input": prepared.example.numpy()}
    timed = time_sessions(sessions, requests, rounds=options.rounds)
    for row, timing in zip(rows, timed.values(), strict=True):
        row |= {
            "latency_ms": timing.median_ms, "fastest_ms": timing.min_ms, "spread": timing.spread,
            "waiting": timing.waiting,
        }  # fmt: skip
        print(row, flush=True)
    write(f"runtimes_{options.task}", {"rows": rows, "rounds": options.rounds})


if __name__ == "__main__":
    main()

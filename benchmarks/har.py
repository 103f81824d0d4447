"""The one-dimensional network on inertial signals, from policy to runtime.

    python benchmarks/har.py [--epochs 2]

Float and int8, at full and at half width, at every rung: metric, parity on up to 2,000 windows of
validation and test subjects, which kernels ONNX Runtime really runs, and latency measured side by
side; and at the lowest rung what reconstruction gives over three draws of the calibration data.
Writes benchmarks/out/har.json.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import write
from executed import float_layers, int8_layers, optimized_kernels
from networks import twin

from flyweight.compressors import RUNGS, Candidate, Prepared, Schedule, compress, load_task, prepare
from flyweight.compressors.data import Items, split, stack
from flyweight.compressors.parity import compare, feed, run_module, run_session
from flyweight.kernels import disturbed, make_runtime, time_sessions
from flyweight.spaces import Distill, Policy, Prune, Settings, Space

EXAMPLE = Path(__file__).parents[1] / "examples" / "har"
INPUTS = 2_000
SEEDS = 3


def policies(space: Space) -> dict[str, Policy]:
    """The recipes by hand, distilled as the full rung will."""
    out = {}
    for precision in ("fp32", "int8"):
        for keep in (1.0, 0.5):
            policy = space.uniform(keep, precision)
            if policy.prune.acts:
                policy = replace(policy, prune=Prune(policy.prune.width, "taylor", True))
            out[f"{precision}, keep {keep:g}"] = replace(policy, distill=Distill(alpha=0.7))
    return out


def parity(prepared: Prepared, found: Candidate, items: Items) -> dict[str, float]:
    """How the runtime agrees with the frozen student on ``items``."""
    answers = run_session(prepared.runtime.load(found.model), items)
    seen = compare(run_module(twin(prepared, found), items), answers)
    return {"inputs": seen.inputs, "agreement": seen.agreement, "mean_steps": seen.mean_steps}


def reconstruction(prepared: Prepared, space: Space) -> list[dict[str, Any]]:
    """KL to the teacher and accuracy at the lowest rung, with and without."""
    rows = []
    widths = space.uniform(0.5).prune.width
    for seed in range(SEEDS):
        drawn = replace(prepared, splits=split(prepared.task, seed))
        for criterion in ("l1", "taylor", "random"):
            row: dict[str, Any] = {"seed": seed, "criterion": criterion}
            for name, solved in (("plain", False), ("reconstructed", True)):
                found = compress(drawn, Policy(Prune(widths, criterion, solved)), "recalibrate")
                row[name] = {"kl": found.loss, "metric": found.metric}
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=2.0, help="of the full rung")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = load_task("task.py:Activities", EXAMPLE, {})
    runtime = make_runtime("onnxruntime", 1)
    prepared = prepare(task, runtime, Schedule(full_epochs=args.epochs, batch=64))
    space = Space(prepared.network, runtime.capabilities, Settings(min_keep=0.25))
    parts = [stack(getattr(task, name), name) for name in ("val", "test")]
    pool = Items(torch.cat([p.inputs for p in parts]), torch.cat([p.targets for p in parts]))
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
    items, test = pool.take(order[:INPUTS]), parts[1]

    rows, models = [], {"teacher": compress(prepared, Policy(), "recalibrate").model}
    for name, policy in policies(space).items():
        found = None
        for rung in RUNGS:
            found = compress(prepared, policy, rung, found)
            kernels = optimized_kernels(found.model)
            row = {
                "policy": name,
                "rung": rung,
                "val": found.metric,
                "kl": found.loss,
                "test": task.metric(run_session(runtime.load(found.model), test), test.targets),
                "parity": parity(prepared, found, items),
                "int8_layers": int8_layers(found.model),
                "float_layers": float_layers(found.model),
                "qlinearconv": kernels["QLinearConv"],
                "size_bytes": len(found.model),
            }
            rows.append(row)
            print(row, flush=True)
        models[name] = found.model
    sessions = {name: runtime.load(model) for name, model in models.items()}
    timings = time_sessions(sessions, feed(prepared.example))
    base = timings["teacher"].median_ms
    latency = {
        name: {"ms": t.median_ms, "speedup": base / t.median_ms} for name, t in timings.items()
    }
    print(latency, flush=True)
    answers = run_session(sessions["teacher"], test)
    path = write(
        "har",
        {
            "teacher_test": task.metric(answers, test.targets),
            "compressed": rows,
            "latency": latency,
            "disturbed": disturbed(timings),
            "reconstruction": reconstruction(prepared, space),
        },
    )
    print(path)


if __name__ == "__main__":
    sys.exit(main())

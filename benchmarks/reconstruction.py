"""Reconstruction against plain removal at the recalibrate rung, and the latency of what is left.

    python benchmarks/reconstruction.py [--task FashionMnistViT] [--seeds 3]

One policy, with and without reconstruction, over draws of the calibration data: the KL divergence
to the teacher and the metric, on search validation. ``inner`` prunes what lies inside of residual
branches (heads, hidden widths), ``all`` the residual stream too.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import write

from flyweight.compressors.compress import compress
from flyweight.compressors.data import CALIBRATION
from flyweight.compressors.prepared import Prepared, Schedule, prepare
from flyweight.compressors.task import load_task
from flyweight.kernels import make_runtime, time_sessions
from flyweight.spaces import Policy, Settings, Space

TASK = Path(__file__).resolve().parents[1] / "examples" / "fashion_mnist" / "task.py"
CRITERION = "taylor"


def policies(space: Space) -> dict[str, Policy]:
    """The widths to compare, without and with the channels of the residual stream."""
    network = space.network
    inside = {name for block in network.blocks.values() for name in block.groups}
    found = {}
    for keep in (0.75, 0.5):
        widths = space.uniform(keep).prune.width
        for what, names in (("inner", inside), ("all", set(widths))):
            chosen = {n: w for n, w in widths.items() if n in names}
            found[f"{what} {keep}"] = replace(
                Policy(), prune=replace(space.uniform(keep).prune, width=chosen)
            )
    return found


def drawn(prepared: Prepared, seed: int) -> Prepared:
    """``prepared`` with another draw of the calibration data."""
    train = prepared.splits.train
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randperm(len(train), generator=generator)[:CALIBRATION]
    return replace(prepared, splits=replace(prepared.splits, calibration=train.take(picks)))


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="FashionMnistViT")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = load_task(f"{TASK}:{options.task}", Path(), {})
    prepared = prepare(task, make_runtime("onnxruntime", 1), Schedule())
    space = Space(prepared.network, prepared.runtime.capabilities, Settings(criteria=(CRITERION,)))
    plain = compress(prepared, Policy(), "recalibrate")
    rows: list[dict[str, Any]] = [{"policy": "teacher", "metric": plain.metric}]
    sessions = {"teacher": prepared.runtime.load(plain.model)}
    for name, policy in policies(space).items():
        for how in (False, True):
            prune = replace(policy.prune, criterion=CRITERION, reconstruct=how)
            results = [
                compress(drawn(prepared, seed), replace(policy, prune=prune), "recalibrate")
                for seed in range(options.seeds)
            ]
            rows.append(
                {
                    "policy": name,
                    "reconstruct": how,
                    "kl": spread([r.loss for r in results]),
                    "metric": spread([r.metric for r in results]),
                }
            )
            print(rows[-1], flush=True)
        sessions[name] = prepared.runtime.load(results[0].model)
    requests = {"input": prepared.example.numpy()}
    # CPU time of the one thread: what an undisturbed machine would take.
    timed = time_sessions(sessions, requests, clock=time.thread_time_ns)
    for name, timing in timed.items():
        print(f"{name}: {timing.median_ms / timed['teacher'].median_ms:.3f} of the teacher")
    latency = {name: timing.median_ms for name, timing in timed.items()}
    write(f"reconstruction_{options.task}", {"rows": rows, "latency_ms": latency})


if __name__ == "__main__":
    main()

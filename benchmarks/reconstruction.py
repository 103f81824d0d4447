"""Reconstruction against plain removal at the recalibrate rung, on every example network.

    python benchmarks/reconstruction.py [resnet vit har article_cnn minilm mobilenet_v2 ...]
        [--seeds 5]

Each seed draws a policy at random (every group its own width, at least ``--keep`` of its channels)
and the calibration items; for each criterion the same channels go with and without reconstruction.
Metric and KL to the teacher on search validation, in the runtime, fp32. Writes
benchmarks/out/reconstruction.json after every network; one that is there already is kept.
"""

import argparse
import json
import random
import statistics
from typing import Any

import torch
from common import OUT, write
from networks import NETWORKS, drawn

from flyweight.compressors import Prepared, Schedule, compress, prepare
from flyweight.kernels import make_runtime
from flyweight.spaces import Policy, Prune, Settings, Space

CRITERIA = ("l1", "taylor")


def pairs(ready: Prepared, seed: int, keep: float) -> list[dict[str, Any]]:
    """One random policy by each criterion, with and without."""
    space = Space(ready.network, ready.runtime.capabilities, Settings(keep, precisions=("fp32",)))
    widths = space.sample(random.Random(seed)).prune.width
    here, rows = drawn(ready, seed), []
    for criterion in CRITERIA:
        row: dict[str, Any] = {"seed": seed, "criterion": criterion}
        for name, solved in (("plain", False), ("reconstructed", True)):
            found = compress(here, Policy(Prune(widths, criterion, solved)), "recalibrate")
            row[name] = {"metric": found.metric, "kl": found.loss}
        rows.append(row)
        print({k: v if isinstance(v, int | str) else round(v["metric"], 2)
               for k, v in row.items()}, flush=True)  # fmt: skip
    return rows


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values)}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By criterion: each way over seeds, and the paired gain."""
    out: dict[str, Any] = {}
    for criterion in CRITERIA:
        mine = [row for row in rows if row["criterion"] == criterion]
        plain, solved = ([row[name] for row in mine] for name in ("plain", "reconstructed"))
        gains = [b["metric"] - a["metric"] for a, b in zip(plain, solved, strict=True)]
        out[criterion] = {
            "plain": spread([r["metric"] for r in plain]),
            "reconstructed": spread([r["metric"] for r in solved]),
            "gain": spread(gains),
            "least_gain": min(gains),
            "kl": [statistics.mean(r["kl"] for r in part) for part in (plain, solved)],
            "kl_wins": sum(b["kl"] < a["kl"] for a, b in zip(plain, solved, strict=True)),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep", type=float, default=0.5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = OUT / "reconstruction.json"
    done: dict[str, Any] = json.loads(path.read_text())["networks"] if path.exists() else {}
    for name in given.networks:
        if name in done:
            continue
        ready = prepare(NETWORKS[name](), make_runtime("onnxruntime", 1), Schedule())
        teacher = compress(ready, Policy(), "recalibrate").metric
        rows = [row for seed in range(given.seeds) for row in pairs(ready, seed, given.keep)]
        done[name] = {"teacher": teacher, "summary": summary(rows), "rows": rows}
        write("reconstruction", {"keep": given.keep, "networks": done})
        print(f"{name}, teacher {teacher:.2f}")
        for criterion, row in done[name]["summary"].items():
            gain, before, after = row["gain"], row["plain"]["mean"], row["reconstructed"]["mean"]
            print(
                f"  {criterion:7s} plain {before:.2f}, reconstructed {after:.2f}, gain "
                f"{gain['mean']:.2f} ± {gain['sd']:.2f}, least {row['least_gain']:.2f}; "
                f"KL less in {row['kl_wins']} of {given.seeds}",
                flush=True,
            )


if __name__ == "__main__":
    main()

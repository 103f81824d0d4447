"""The sensitivity table of the recorded benchmark's task, and how well its sums rank policies.

    python benchmarks/joint_sensitivity.py

judges single choices as a search does, on one core, and keeps them in benchmarks/joint/. Then, for
the policies of the recorded table, the sum of their harms against what training came to: Spearman's
rank correlation with the loss at the full rung, overall and within latency bands (of neighbours by
latency, ``BAND`` of them), beside that of the loss at the lower rungs.
"""

import json
import time
from typing import Any

import numpy as np
import torch
from common import write
from joint_table import FOLDER, read, space, spec
from scipy.stats import spearmanr

from flyweight.compressors import RUNGS, harm
from flyweight.search.ready import ready
from flyweight.search.sensitivity import Sensitivity, axes_of, measure
from flyweight.spaces import Impossible, Policy

SENSITIVITY = FOLDER / "sensitivity.json"
BAND = 16


def judged() -> dict[str, Any]:
    """The table, and the CPU seconds that it took on one core."""
    torch.set_num_threads(1)
    found = ready(spec())

    def judge(policies: list[Policy], recalibrated: bool = False) -> list[float | None]:
        out: list[float | None] = []
        for policy in policies:
            try:
                out.append(harm(found.prepared, policy, recalibrated=recalibrated))
            except Impossible:
                out.append(None)
        return out

    began = time.process_time()
    table = measure(found.space, judge)
    return table.to_dict() | {"seconds": time.process_time() - began}


def sensitivity() -> tuple[Sensitivity, float]:
    """The kept table and its seconds."""
    kept = json.loads(SENSITIVITY.read_text())
    harms = {
        axis.name: {choice: kept["harm"][axis.name][str(choice)] for choice in axis.choices}
        for axis in axes_of(space())
    }
    return Sensitivity(harms, kept["settings"], kept["students"], kept["judged"]), kept["seconds"]


def summed(table: Sensitivity, policy: Policy) -> float:
    values = space().values(policy)
    return sum(table.harm[axis.name][values[axis.name]] for axis in axes_of(space()))


def within_bands(latency: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """The mean rank correlation of ``a`` and ``b`` among policies of about the same latency."""
    order = np.argsort(latency)
    bands = [order[i : i + BAND] for i in range(0, len(order) - BAND + 1, BAND // 2)]
    return float(np.mean([spearmanr(a[band], b[band]).statistic for band in bands]))


def main() -> None:
    if not SENSITIVITY.exists():
        SENSITIVITY.write_text(json.dumps(judged(), indent=1) + "\n")
    table, seconds = sensitivity()
    rows = [row for row in read() if row.whole]
    latency = np.array([row.latency for row in rows])
    full = np.array([row.rungs[RUNGS[-1]]["loss"] for row in rows])
    seen = {"sum of single harms": np.array([summed(table, row.policy) for row in rows])}
    for rung in RUNGS[:-1]:
        seen[f"loss at {rung}"] = np.array([row.rungs[rung]["loss"] for row in rows])
    seen["latency alone"] = -latency
    figures: dict[str, Any] = {"trials": len(rows), "judged": table.judged, "seconds": seconds}
    print(f"{len(rows)} trials, {table.judged} choices judged in {seconds:.1f} s")
    for name, values in seen.items():
        overall = float(spearmanr(values, full).statistic)
        given = within_bands(latency, values, full)
        figures[name] = {"spearman": overall, "given latency": given}
        print(f"{name:24s} {overall:6.2f} {given:6.2f}")
    print(write("joint_sensitivity", figures))


if __name__ == "__main__":
    main()

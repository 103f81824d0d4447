"""How well sums of single harms order the recorded policies, none of which they have seen.

    python benchmarks/joint_sensitivity.py

The sensitivity table of the network is judged as a search does it, forward only; a policy's sum is
that of the harms of its choices. Beside it the losses that the rungs found, which have to build
each policy: rank correlations with the loss at the full rung, overall and given latency, as in
``joint_rungs.py``.
"""

import time

import numpy as np
import torch
from common import judge, write
from joint_rungs import agreement_of
from joint_table import by_policy, read, space, spec

from flyweight.compressors import RUNGS
from flyweight.search.ready import prepare_task
from flyweight.search.sensitivity import Sensitivity, axes_of, measure
from flyweight.spaces import Policy


def judged() -> tuple[Sensitivity, float]:
    """The table, and the CPU seconds that it took on one core."""
    torch.set_num_threads(1)
    prepared = prepare_task(spec())
    prepared.input_moments("pruned")  # as every trial of the record found it

    began = time.process_time()
    table = measure(space(), judge(prepared))
    return table, time.process_time() - began


def summed(table: Sensitivity, policy: Policy) -> float:
    """The harms of all choices of ``policy``, added."""
    values = space().values(policy)
    return sum(table.harm[axis.name][values[axis.name]] for axis in axes_of(space()))


def main() -> None:
    table, seconds = judged()
    rows = [same[0] for same in by_policy(read()) if same[0].whole]
    full = np.array([row.rungs[RUNGS[-1]]["loss"] for row in rows])
    latency = np.array([row.latency for row in rows])
    seen = {"sum of single harms": np.array([summed(table, row.policy) for row in rows])}
    for rung in RUNGS[:-1]:
        seen[f"loss at {rung}"] = np.array([row.rungs[rung]["loss"] for row in rows])
    print(f"{len(rows)} policies; {table.judged} choices judged in {seconds:.1f} CPU s")
    print("| seen | Spearman | given latency |\n|---|---|---|")
    figures = {}
    for name, values in seen.items():
        figures[name] = agreement_of(np.stack([values, full, latency], 1))
        shown = " | ".join(f"{m:.2f} ({a:.2f} to {b:.2f})" for m, a, b in figures[name])
        print(f"| {name} | {shown} |")
    print(write("joint_sensitivity", {"seconds": seconds, "judged": table.judged, **figures}))


if __name__ == "__main__":
    main()

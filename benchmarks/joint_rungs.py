"""How far the cheap rungs order policies as the full one does, from the recorded benchmark.

    python benchmarks/joint_rungs.py

Spearman's rank correlation, and the partial one given the latency: what a search needs, for it
compares policies of like latency. For policies that only prune, only quantize, and do both. The
intervals hold 95% of bootstrap draws of policies; of those with several seeds the first counts.
"""

from collections.abc import Callable, Sequence

import numpy as np
from common import write
from joint_table import Row, by_policy, read, teacher

from flyweight.compressors import RUNGS
from flyweight.search.correlation import rank_correlations

DRAWS = 2000
FIGURES = ("loss", "metric")
FEW = 2.0  # points of the metric, lost at the full rung
WHICH: dict[str, Callable[[Row], bool]] = {
    "pruning alone": lambda row: row.kind == "prune",
    "quantization alone": lambda row: row.kind == "quantize",
    "both together": lambda row: row.kind == "both",
    "all": lambda _: True,
    f"all that lose less than {FEW:g} points": lambda row: _lost(row) < FEW,
}


def agreement(rows: Sequence[Row], rung: str, low: str, high: str) -> list[list[float]]:
    """Of figure ``low`` at ``rung`` with ``high`` at the full one: Spearman's correlation and the
    partial one given latency, each with the ends of its interval. Good agreement is positive."""
    sign = 1 if low == high else -1
    columns = np.array(
        [[r.rungs[rung][low], sign * r.rungs[RUNGS[-1]][high], r.latency] for r in rows]
    )
    return agreement_of(columns)


def agreement_of(columns: np.ndarray) -> list[list[float]]:
    """The same for ``columns`` [policies, 3]: what is seen, what it should tell, latency."""
    count = len(columns)
    rng, ones = np.random.default_rng(0), np.ones(count)
    draws = [rank_correlations(columns[rng.integers(0, count, count)], ones) for _ in range(DRAWS)]
    found = np.array([rank_correlations(columns, ones), *draws], float)
    low_ends, high_ends = np.nanpercentile(found[1:], [2.5, 97.5], axis=0)
    return np.stack([found[0], low_ends, high_ends], 1).tolist()


def _lost(row: Row) -> float:
    return float(teacher()["metric_selection"]) - row.rungs[RUNGS[-1]]["metric"]


def main() -> None:
    rows = [same[0] for same in by_policy(read()) if same[0].whole]
    figures = []
    print("| policies | n | rung | its | full | Spearman | given latency |\n|" + "---|" * 7)
    for kind, belongs in WHICH.items():
        some = [row for row in rows if belongs(row)]
        for rung in RUNGS[:-1]:
            for low, high in (("loss", "loss"), ("loss", "metric"), ("metric", "metric")):
                found = agreement(some, rung, low, high)
                shown = " | ".join(f"{m:.2f} ({a:.2f} to {b:.2f})" for m, a, b in found)
                print(f"| {kind} | {len(some)} | {rung} | {low} | {high} | {shown} |")
                figures.append([kind, len(some), rung, low, high, *found])
    print(write("joint_rungs", {"rows": figures}))


if __name__ == "__main__":
    main()

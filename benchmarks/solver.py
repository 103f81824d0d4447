"""How well the warm start is solved: HiGHS step by step against evolution, at the same cost.

    python benchmarks/solver.py [--spec examples/fashion_mnist/full.yaml] [--seeds 5]

The sensitivity table of the task is judged, a device profile made (or gone on with: both lie under
benchmarks/out), then for a sweep of latency limits each method looks for the least summed harm
within the limit. Evolution is scipy's differential evolution over the same batch predictor (whole
numbers, the excess over the limit as a penalty), with as many evaluations as the steps of HiGHS
took, with ten times as many, and with a hundred times. Beside them the best uniform recipe.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from common import OUT, judge, write
from scipy import optimize

from flyweight.kernels import LatencyPredictor
from flyweight.search.batch import BatchPredictor
from flyweight.search.profiling import make_profile
from flyweight.search.ready import ready
from flyweight.search.sensitivity import measure
from flyweight.search.solver import Solver
from flyweight.search.spec import load_spec

ROOT = Path(__file__).resolve().parents[1]
SHARES = (0.5, 0.35, 0.25, 0.18)  # of the teacher's latency
POPULATION = 40


def evolve(solver: Solver, limit: float, evaluations: int, seed: int) -> float:
    """The least harm that differential evolution finds within ``limit``; infinite for none."""
    sizes = [len(h) for h in solver.harms]
    most = max(sizes)
    table = np.array([np.pad(h, (0, most - len(h))) for h in solver.harms])
    best = np.inf

    def loss(xs: np.ndarray) -> np.ndarray:
        nonlocal best
        points = np.rint(xs.T).astype(int)
        harms = table[np.arange(len(sizes)), points].sum(1)
        excess = np.maximum(solver.latency(points) / limit - 1, 0)
        best = min(best, harms[excess <= 0].min(initial=np.inf))
        return harms + 10 * excess

    optimize.differential_evolution(
        loss, [(0, size - 1) for size in sizes], integrality=np.ones(len(sizes), bool),
        vectorized=True, updating="deferred", polish=False, rng=seed, tol=0,
        init=np.random.default_rng(seed).random((POPULATION, len(sizes))) * np.array(sizes) - 0.5,
        maxiter=max(1, evaluations // POPULATION - 1),
    )  # fmt: skip
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--spec", type=Path, default=ROOT / "examples/fashion_mnist/full.yaml")
    parser.add_argument("--profile", type=Path, default=OUT / "solver-profile.jsonl")
    parser.add_argument("--networks", type=int, default=384)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    found = ready(load_spec(given.spec))

    table = measure(found.space, judge(found.prepared))
    predictor = LatencyPredictor(make_profile(found, given.profile, networks=given.networks))
    batch, space = BatchPredictor(found.prepared, found.space, predictor), found.space
    axes = space.axes[1:]  # all but the student, of which there is one
    solver = Solver(
        [np.array(table.of(axis)) for axis in axes],
        lambda points: batch.predict(np.pad(points, ((0, 0), (1, 0))))[:, 2],
        [axis.name.startswith("width/") for axis in axes],
    )

    def point(policy: object) -> np.ndarray:
        return np.array(space.point(policy))[1:]

    precisions = space.settings.precisions
    starts = [point(space.uniform(keep, p)) for keep in (1.0, 0.5, 0.25) for p in precisions]
    recipes = [point(space.uniform(k, p)) for k in np.linspace(0.1, 1, 40) for p in precisions]
    took = solver.latency(np.array(recipes))
    rows = []
    for share in SHARES:
        limit = share * predictor.teacher_ms
        solver.evaluations, began = 0, time.process_time()
        solved = solver.solve(limit, starts)
        row = {
            "limit": share,
            "HiGHS": solver.harm(solved) if solved is not None else None,
            "evaluations": solver.evaluations,
            "seconds": time.process_time() - began,
            "uniform": min(
                (solver.harm(p) for p, ms in zip(recipes, took, strict=True) if ms <= limit),
                default=None,
            ),
        }
        for times in (1, 10, 100):
            began = time.process_time()
            harms = [
                evolve(solver, limit, times * row["evaluations"], seed)
                for seed in range(given.seeds)
            ]
            row[f"evolution x{times}"] = [float(np.median(harms)), min(harms), max(harms)]
            row[f"seconds x{times}"] = (time.process_time() - began) / given.seeds
        rows.append(row)
        print(row, flush=True)
    write("solver", {"spec": str(given.spec), "judged": table.judged, "limits": rows})


if __name__ == "__main__":
    main()

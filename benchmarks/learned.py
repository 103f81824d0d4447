"""Whether results teach what the sensitivity table does not know.

    python benchmarks/learned.py RUN_DIR [--rounds 5]

RUN_DIR: of a search with a sensitivity table, its task where spec.yaml says. Ten times a tenth of
the finished policies is left out, at all rungs; the rest teaches (``search/learned.py``). Shown for
those left out: how far the predicted loss at the full rung is off, and the rank correlation with
it, overall and given latency. Beside it the table as it is: only the line from its sums to the
losses is learned, and what settings do.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from common import write
from joint_rungs import agreement_of
from numpy.typing import NDArray
from scipy import optimize

from flyweight.compressors import RUNGS
from flyweight.search import learned
from flyweight.search.learned import HarmModel
from flyweight.search.ready import make_space, prepare_task
from flyweight.search.sensitivity import axes_of
from flyweight.search.spec import load_spec
from flyweight.search.warm import settings_of
from flyweight.spaces import Policy, Space

FOLDS = 10
FULL = RUNGS[-1]
Rows = list[tuple[NDArray[np.float64], NDArray[np.float64], float]]  # harms, settings, log loss


def read(run: Path, space: Space) -> tuple[dict[str, Rows], list[dict[str, Any]]]:
    """By digest what each trained rung found, and the entries of the full rung."""
    harm = json.loads((run / "sensitivity.json").read_text())["harm"]
    rows: dict[str, dict[str, Any]] = {}
    full = {}
    for line in (run / "record.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["kind"] != "result" or entry["rung"] == RUNGS[0]:
            continue
        policy = Policy.from_dict(entry["policy"])
        values = space.defaults | space.values(policy)
        chosen = np.array([harm[a.name][str(values[a.name])] for a in axes_of(space)])
        found = (chosen, settings_of(space, policy), float(np.log(entry["loss"])))
        rows.setdefault(entry["digest"], {})[entry["rung"]] = found
        if entry["rung"] == FULL:
            full[entry["digest"]] = entry
    return rows, [*full.values()]


def predicted(rows: dict[str, Any], left_out: set[str], doubt: float) -> dict[str, float]:
    """The log loss of each of ``left_out`` at the full rung, learned from the others."""
    known = {
        rung: [found[rung] for d, found in rows.items() if rung in found and d not in left_out]
        for rung in RUNGS[1:]
    }
    arrays = [tuple(map(np.array, zip(*known[rung], strict=True))) for rung in RUNGS[1:]]
    model = HarmModel(0.0, arrays, doubt)
    at = optimize.least_squares(model.misfit, model.prior(), model.slopes, method="lm").x
    return {d: model.predict(at, len(arrays) - 1, *rows[d][FULL][:2]) for d in left_out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    spec = load_spec(given.run / "spec.yaml")
    prepared = prepare_task(spec)
    rows, full = read(given.run, make_space(prepared, spec))
    digests = [entry["digest"] for entry in full]
    truth = np.log([entry["loss"] for entry in full])
    latency = np.array([entry["latency_ms"][1] for entry in full])
    print(f"{len(full)} finished policies, {len(rows)} that were trained")
    print("| predicted by | off by (log loss) | Spearman | given latency |\n|---|---|---|---|")
    figures = {}
    for name, doubt in (("the table", 1e-3), ("the table and results", learned.DOUBT)):
        rng, off, agreement = np.random.default_rng(0), [], []
        for _ in range(given.rounds):
            found: dict[str, float] = {}
            for part in np.array_split(rng.permutation(digests), FOLDS):
                found |= predicted(rows, {*map(str, part)}, doubt)
            values = np.array([found[d] for d in digests])
            off.append(float(np.sqrt(np.mean((values - truth) ** 2))))
            agreement.append(agreement_of(np.stack([values, truth, latency], 1)))
        figures[name] = {"off": off, "agreement": agreement}
        ranks = [f"{np.mean([a[k][0] for a in agreement]):.2f}" for k in range(2)]
        spread = f"{np.mean(off):.3f} ({min(off):.3f} to {max(off):.3f})"
        print(f"| {name} | {spread} | {' | '.join(ranks)} |")
    print(write("learned", {"run": str(given.run), "finished": len(full), **figures}))


if __name__ == "__main__":
    main()

"""How well latency is predicted where a search ends: near its front, chosen for what was predicted.

    python benchmarks/latency_front.py RUN_DIR [--networks 150]

The policies of the front of a finished search, then their neighbours in one to three choices, are
timed as benchmarks/latency.py times what it holds out, and predicted from two profiles: the one
that the search made for itself, and that of latency.py of the network's whole space, if it is there
(of the same runtime; --network says of which). Resumable: what was timed lies under benchmarks/out.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import OUT, write
from latency import figures

from flyweight.kernels import DeviceProfile, LatencyPredictor
from flyweight.search import load_run
from flyweight.search.profiling import make_profile
from flyweight.search.ready import ready
from flyweight.search.run_files import PROFILE, SPEC
from flyweight.search.spec import load_spec
from flyweight.spaces import Policy, Space

STEPS = 3


def near_front(front: list[Policy], space: Space) -> Iterator[Policy]:
    """``front``, then policies up to ``STEPS`` choices away from one of it, without end."""
    yield from front
    rng = random.Random(0)
    while True:
        policy = rng.choice(front)
        for _ in range(rng.randint(1, STEPS)):
            policy = rng.choice([*space.neighbours(policy)])
        yield policy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the run directory of a finished search")
    parser.add_argument("--networks", type=int, default=150)
    parser.add_argument("--network", default="resnet")
    given = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    found = ready(load_spec(given.run / SPEC))
    run = load_run(given.run)
    digests = list(run.front["digest"])
    front = [Policy.from_json(json.dumps(run.model(digest).policy)) for digest in digests]
    name = f"latency-front-{given.run.resolve().name}"
    timed = make_profile(
        found, OUT / f"{name}.jsonl", networks=given.networks, narrow=0.0,
        policies=near_front(front, found.space),
    ).timed  # fmt: skip
    alive = [t for t in timed if t.ms]
    took = np.array([t.ms / t.teacher_ms for t in alive if t.ms])
    places = {"front": np.array([t.policy in digests for t in alive])}
    places["neighbours"] = ~places["front"]

    whole = OUT / f"latency-{given.network}-{found.spec.target.runtime}-profile.jsonl"
    profiles = {"the search's": given.run / PROFILE, "the whole space's": whole}
    cells = {}
    for label, path in profiles.items():
        if not path.exists():
            continue
        profile = DeviceProfile.load(path)
        predictor = LatencyPredictor(profile)
        ends = predictor.predict_work([t.counts for t in alive]) / predictor.teacher_ms
        for place, at in places.items():
            cell = figures(took, ends, at)
            cell["median_over_predicted"] = float(np.median(took[at] / ends[at, 1]) - 1)
            cells[f"{label} ({len(profile.timed)} networks), {place}"] = cell
    for label, cell in cells.items():
        print(label, {key: round(value, 4) for key, value in cell.items()})
    write(name, {"run": str(given.run), "cells": cells})


if __name__ == "__main__":
    main()

"""How well latency is predicted where a search ends: near its front, chosen for what was predicted.

    python benchmarks/latency_front.py RUN_DIR [--profile benchmarks/out/latency-...-profile.jsonl]

The policies of the front of a finished search, among their neighbours in one to three choices, are
timed as benchmarks/latency.py times what it holds out, and predicted from the profile that the
search made for itself, and from another one. Neither has what is timed here: the search adds its
finalists to its own, which are taken out again. Resumable: what was timed is in benchmarks/out.
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import OUT, write
from latency import figures, ratios

from flyweight.kernels import DeviceProfile, LatencyPredictor, signature
from flyweight.search import load_run
from flyweight.search.profiling import check_profile, empty_profile, make_profile
from flyweight.search.ready import ready
from flyweight.search.run_files import PROFILE, SPEC
from flyweight.search.spec import load_spec
from flyweight.spaces import Policy, Space

STEPS, EVERY = 3, 10


def near_front(front: list[Policy], space: Space) -> Iterator[Policy]:
    """Policies up to ``STEPS`` choices away from one of ``front``, without end; one in ``EVERY`` is
    of ``front`` itself, as long as there are any."""
    rng, left = random.Random(0), list(front)
    while True:
        if left:
            yield left.pop()
        for _ in range(EVERY - 1):
            policy = rng.choice(front)
            for _ in range(rng.randint(1, STEPS)):
                policy = rng.choice([*space.neighbours(policy)])
            yield policy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the run directory of a finished search")
    parser.add_argument("--profile", type=Path, help="another profile to predict from")
    parser.add_argument("--networks", type=int, default=150)
    given = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    found, run = ready(load_spec(given.run / SPEC)), load_run(given.run)
    models = [run.model(digest) for digest in run.front["digest"]]
    front = [Policy.from_json(json.dumps(model.policy)) for model in models]
    name = f"latency-front-{given.run.resolve().name}"
    held = make_profile(
        found, OUT / f"{name}.jsonl", networks=given.networks, narrow=0.0,
        policies=near_front(front, found.space),
    )  # fmt: skip
    alive = [t for t in held.timed if t.ms]
    works = [t.counts for t in alive]
    took = ratios(alive)
    finalists = [signature(found.prepared.plan(policy)) for policy in front]
    of_front = np.array([t.counts in finalists for t in alive])
    all_ = np.ones(len(alive), bool)
    places = {"all": all_, "the front itself": of_front, "its neighbours": ~of_front}

    cells = {}
    for label, path in {"own": given.run / PROFILE, "other": given.profile}.items():
        if path is None:
            continue
        profile = DeviceProfile.load(path)
        check_profile(profile, empty_profile(found.spec, found.prepared))
        unseen = [t for t in profile.timed if t.counts not in works]
        predictor = LatencyPredictor(replace(profile, timed=unseen))
        ends = predictor.predict_work(works) / predictor.teacher_ms
        for place, at in places.items():
            cell = figures(took, ends, at)
            cell["longer_than_predicted"] = float(np.median(took[at] / ends[at, 1]) - 1)
            cells[f"{label} profile ({len(unseen)} networks), {place}"] = cell
    for label, cell in cells.items():
        print(label, {key: round(value, 4) for key, value in cell.items()})
    write(name, {"run": str(given.run), "cells": cells})


if __name__ == "__main__":
    main()

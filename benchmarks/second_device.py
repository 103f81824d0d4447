"""A second device from few networks: timed there, predicted with the help of the first's profile.

    python benchmarks/second_device.py [--network resnet] [--runtime onnxruntime] [--threads 2]
    pip install --no-deps --target OLDER onnxruntime==1.20.1
    PYTHONPATH=OLDER python benchmarks/second_device.py --threads 1 --label onnxruntime-1.20.1
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/second_device.py --threads 1 --label avx2
        --first openvino --runtime openvino

The first device is this machine with one thread of --first; its profile is that of
benchmarks/latency.py, made if it is not there. The second is this machine with --threads threads of
--runtime, or, with a --label for its files, this process: another version of the runtime, or
kernels of another processor. ``MOST`` networks are timed on it as `flyweight profile --like` does,
and ``--held`` others of another seed. Every disjoint set of k of the ``MOST`` makes a profile: with
the first device's ("like"), and without (alone); "scaled" is the first device's profile with the
median ratio of the k, and "foreign" is that profile as it is, in units of the teacher. Rows are
means over the sets; "least" is the worst set's share within 10%. Resumable: what was timed lies
under benchmarks/out.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from common import OUT, write
from latency import HELD_SEED, Networks, figures, ratios, spec_of

from flyweight.kernels import DeviceProfile, LatencyPredictor, Timed, signature
from flyweight.kernels.additive import AdditiveProcess
from flyweight.kernels.predictor import LEAST
from flyweight.search.profiling import NETWORKS, make_profile
from flyweight.search.ready import Ready, ready

COUNTS, MOST = (8, 16, 24, 48), 48
COLUMNS = ("within_5", "least_10", "within_10", "median_error", "spearman", "coverage", "width")


def target(network: str, runtime: str, threads: int) -> Ready:
    spec = spec_of(network, runtime)
    changes = {"threads": threads}
    return ready(spec.model_copy(update={"target": spec.target.model_copy(update=changes)}))


def sets(timed: Sequence[Timed], k: int) -> list[list[Timed]]:
    """Disjoint ones of ``k`` each."""
    return [list(timed[i : i + k]) for i in range(0, len(timed) - k + 1, k)]


def compared(
    first: DeviceProfile, few: DeviceProfile, held: Networks
) -> dict[str, dict[str, float]]:
    """The rows of the table."""
    everything = np.ones(len(held.ratio), bool)
    sums = [signature(plan) for plan in held.plans]
    theirs = LatencyPredictor(first)
    foreign = theirs.predict_work(sums) / theirs.teacher_ms
    cells = {"foreign": figures(held.ratio, foreign, everything)}
    alive = [t for t in few.timed if t.ms]

    def middle(value: np.ndarray) -> np.ndarray:
        return np.stack([value] * 3, 1)

    for k in COUNTS:
        found: dict[str, list[dict[str, float]]] = {}
        for own in sets(alive, k):
            known = [t.counts for t in own]
            expected = theirs.predict_work(known)[:, 1] / theirs.teacher_ms
            like = LatencyPredictor(replace(few, timed=own, like=first))
            beside = [t.beside for t in own]
            alone = middle(AdditiveProcess(known, list(ratios(own)), beside).predict(sums)[0])
            if k >= LEAST:
                plain = LatencyPredictor(replace(few, timed=own, like=None))
                alone = plain.predict_work(sums) / plain.teacher_ms
            ends = {
                "like": like.predict_work(sums) / like.teacher_ms,
                "alone": alone,
                "scaled": middle(foreign[:, 1] * np.median(ratios(own) / expected)),
            }
            for name, predicted in ends.items():
                found.setdefault(name, []).append(figures(held.ratio, predicted, everything))
        for name, rows in found.items():
            cells[f"{name}, {k}"] = {
                **{c: float(np.mean([r[c] for r in rows])) for c in COLUMNS if c in rows[0]},
                "least_10": min(r["within_10"] for r in rows),
                "sets": len(rows),
            }
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", default="resnet", choices=("resnet", "mobilenet", "minilm"))
    parser.add_argument("--first", default="onnxruntime")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--held", type=int, default=200)
    parser.add_argument("--label", default="", help="what is different in this process")
    given = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    load = [os.getloadavg()[0]]

    path = OUT / f"latency-{given.network}-{given.first}-profile.jsonl"
    if not path.exists():
        if given.label:
            raise SystemExit(
                f"{path} is not there: benchmarks/latency.py makes it, without {given.label}"
            )
        make_profile(target(given.network, given.first, 1), path, networks=NETWORKS)
    first = DeviceProfile.load(path)
    second = target(given.network, given.runtime, given.threads)
    name = f"second-{given.network}-{given.first}-1-{given.label or given.runtime}-{given.threads}"
    few = make_profile(second, OUT / f"{name}-few.jsonl", like=first, networks=MOST, narrow=0.0)
    other = make_profile(
        second, OUT / f"{name}-held.jsonl", networks=given.held, seed=HELD_SEED, narrow=0.0
    )
    held = Networks(second, other, HELD_SEED)
    load.append(os.getloadavg()[0])

    cells = compared(first, few, held)
    print(
        f"{len(first.timed)} networks on the first device; {len(held.ratio)} held out; load {load}"
    )
    print(f"{'':16s}" + "".join(f"{c:>14s}" for c in COLUMNS))
    for label, values in cells.items():
        shown = [f"{values[c]:14.4g}" if c in values else f"{'':14s}" for c in COLUMNS]
        print(f"{label:16s}" + "".join(shown))
    write(name, {**vars(given), "load": load, "cells": cells})


if __name__ == "__main__":
    main()

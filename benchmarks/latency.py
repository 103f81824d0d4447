"""How well latency is predicted: networks that the profile has not seen, timed and predicted.

    python benchmarks/latency.py [--network resnet] [--runtime onnxruntime] [--minutes 15]

A device profile is made as `flyweight profile` makes it; then ``HELD`` policies of another seed are
timed in sessions of their own, two thirds of random widths, a third near uniform recipes, as many
in each precision as mixed; the first of them once more, which says how well measurements repeat.
Others learn from the same networks: multiply-accumulates, a table of kernels (one time for each,
those not in it at the nominal time of their work), a ridge on the work of each layer with a boosted
residual, a random forest and a multilayer perceptron, these on the features nn-Meter uses, of all
layers of a network at once (nn-Meter and LitePred themselves learn from kernels timed alone).
Latencies are in units of the teacher that was timed beside them. Resumable: what was timed lies
under benchmarks/out.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import OUT, write
from scipy import stats
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from sklearn.linear_model import LinearRegression, RidgeCV
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import nn
from torch.utils.data import TensorDataset

from flyweight.compressors import ClassificationTask
from flyweight.kernels import DeviceProfile, LatencyPredictor, Signature, Timed, signature
from flyweight.kernels.signature import nominal_ms
from flyweight.search.batch import BatchPredictor
from flyweight.search.profiling import NARROW, NETWORKS, make_profile, mixed_policies
from flyweight.search.ready import Ready, ready
from flyweight.search.spec import Spec
from flyweight.spaces import Blueprint

HERE = Path(__file__).resolve()
EXAMPLES = HERE.parents[1] / "examples"
HELD, AGAIN, HELD_SEED = 450, 96, 1_000
MANY, REPEATS = 1_000, 5  # policies of which the cost of predicting is measured, and how often
CELLS = [(near, precision) for near in (False, True) for precision in ("fp32", "int8", "mixed")]


class _Untrained(ClassificationTask):
    """A network with random weights on noise: its latency is that of a trained one."""

    network: nn.Module

    def __init__(self, inputs: torch.Tensor) -> None:
        targets = torch.arange(len(inputs)) % 2
        self.train = TensorDataset(inputs[:8], targets[:8])
        self.val = TensorDataset(inputs[8:], targets[8:])

    def model(self) -> nn.Module:
        return self.network


class MobileNetV2(_Untrained):
    """At 224 x 224."""

    def __init__(self) -> None:
        sys.path.insert(0, str(EXAMPLES / "imagenet"))
        from mobilenet_v2 import MobileNetV2 as Network

        torch.manual_seed(0)
        self.network = Network().eval()
        super().__init__(torch.rand(16, 3, 224, 224))


SPECS: dict[str, tuple[str, dict[str, Any], float]] = {  # task, its arguments, least share kept
    "resnet": (f"{EXAMPLES / 'fashion_mnist' / 'task.py'}:FashionMnist", {}, 0.125),
    "mobilenet": (f"{HERE}:MobileNetV2", {}, 0.25),
    "minilm": (f"{EXAMPLES / 'rotten_tomatoes' / 'task.py'}:RottenTomatoes", {}, 0.25),
}


def spec_of(network: str, runtime: str) -> Spec:
    task, arguments, least = SPECS[network]
    return Spec.model_validate(
        {
            "task": task, "task_args": arguments, "target": {"runtime": runtime},
            "objective": {"speedup": 1.0}, "space": {"prune": {"min_keep": least}},
        }
    )  # fmt: skip


def ratios(timed: Sequence[Timed]) -> np.ndarray:
    """Latencies in units of the teacher."""
    return np.array([t.ms / t.teacher_ms for t in timed if t.ms])


class Networks:
    """What was timed, with its plans, in units of the teacher beside it."""

    def __init__(self, found: Ready, profile: DeviceProfile, seed: int) -> None:
        named = {
            policy.digest: (i, policy)
            for i, policy in enumerate(islice(mixed_policies(found.space, seed), 2 * NETWORKS))
        }
        timed = [t for t in profile.timed if t.ms and t.policy in named]
        self.ratio = ratios(timed)
        self.digests = [t.policy for t in timed]
        places = [named[t.policy] for t in timed]
        self.precision = np.array([("fp32", "int8", "mixed")[i % 3] for i, _ in places])
        self.near = np.array([i // 3 % 3 == 2 for i, _ in places])
        self.plans = [found.prepared.plan(policy) for _, policy in places]


def figures(took: np.ndarray, ends: np.ndarray, at: np.ndarray) -> dict[str, float]:
    """Of the networks ``at``: errors, ranks, and what the intervals (where there are any) hold."""
    y, middle = took[at], ends[at, 1]
    error = np.abs(middle / y - 1)
    out = {
        "networks": int(at.sum()),
        "within_5": float((error < 0.05).mean()),
        "within_10": float((error < 0.10).mean()),
        "median_error": float(np.median(error)),
        "spearman": float(stats.spearmanr(middle, y).statistic),
        "tau_within_10": _tau(y, middle),
    }
    if ends[at, 2].max() > ends[at, 0].min() and (ends[:, 2] != ends[:, 0]).any():
        held = (y >= ends[at, 0]) & (y <= ends[at, 2])
        out["coverage"] = float(held.mean())
        out["width"] = float(np.median((ends[at, 2] - ends[at, 0]) / middle))
    return out


def _tau(took: np.ndarray, predicted: np.ndarray) -> float:
    """Kendall's tau over the pairs whose latencies are within 10% of each other."""
    agree = pairs = 0.0
    for i in range(len(took) - 1):
        close = np.abs(np.log(took[i + 1 :] / took[i])) < np.log(1.1)
        signs = np.sign(took[i + 1 :] - took[i]) * np.sign(predicted[i + 1 :] - predicted[i])
        agree += signs[close].sum()
        pairs += close.sum()
    return float(agree / max(pairs, 1))


def features(plan: Blueprint) -> list[float]:
    """Per layer: positions, channels, window, stride, MACs, weights (nn-Meter), as logarithms, and
    whether it is in int8; then the logarithms of all MACs in either precision."""
    out: list[float] = []
    for k in plan.kernels:
        if k.weights:
            positions = np.prod(k.out_shape[1:]) // k.channels[1]
            sizes = [
                positions,
                *k.channels,
                np.prod(k.kernel),
                np.prod(k.stride),
                k.macs,
                k.weights,
            ]
            out += [*np.log1p(sizes), k.precision == "int8"]
    return [*out, *np.log1p(macs(plan))]


def macs(plan: Blueprint) -> list[float]:
    """In fp32, in int8."""
    total = {"fp32": 0.0, "int8": 0.0}
    for kernel in plan.kernels:
        total[kernel.precision] += kernel.macs
    return list(total.values())


def linear(plan: Blueprint) -> list[float]:
    """Per layer, apart for fp32 and int8: one, MACs, weights, values read and made."""
    out: list[float] = []
    for k in plan.kernels:
        if k.weights:
            read, made = np.prod(k.in_shapes[0][1:]), np.prod(k.out_shape[1:])
            for precision in ("fp32", "int8"):
                there = k.precision == precision
                out += [there * size for size in (1, k.macs, k.weights, read, made)]
    return out


def baselines(known: Networks, held: Networks) -> dict[str, np.ndarray]:
    """What others' predictors, learned from ``known``, say of ``held``."""
    out = {}
    y, logs = known.ratio, np.log(known.ratio)
    weights = 1 / y**2  # relative errors count

    def both(rows: Callable[[Blueprint], list[float]]) -> tuple[np.ndarray, np.ndarray]:
        x, z = (np.array([rows(p) for p in n.plans], float) for n in (known, held))
        scale = np.abs(x).max(0)
        scale[scale == 0] = 1
        return x / scale, z / scale

    x, z = both(macs)
    out["MACs"] = LinearRegression().fit(x, y, weights).predict(z)

    # One time for each kernel, near its nominal time as long as nothing shows otherwise.
    sums, theirs = ([signature(p) for p in n.plans] for n in (known, held))
    nominal, nominal_held = (np.array([nominal_ms(c) for c in n]) for n in (sums, theirs))
    pace = np.median(y / nominal)
    keys: dict[Any, int] = {}
    for counts in sums:
        for s in counts:
            keys.setdefault((s.kind, s.form, s.sizes), len(keys))

    def table(networks: list[Counter[Signature]]) -> np.ndarray:
        found = np.zeros((len(networks), len(keys)))
        for i, counts in enumerate(networks):
            for s, n in counts.items():
                if (key := (s.kind, s.form, s.sizes)) in keys:
                    found[i, keys[key]] += n * pace * s.nominal_ms
        return found

    strengths = np.logspace(-4, 3, 15)
    ridge = RidgeCV(strengths, fit_intercept=False)
    ridge.fit(table(sums), y - pace * nominal, weights)
    out["table of kernels"] = pace * nominal_held + ridge.predict(table(theirs))

    x, z = both(linear)
    ridge = RidgeCV(strengths).fit(x, y, weights)
    first, rest = (np.maximum(ridge.predict(of), y.min() / 2) for of in (x, z))
    x, z = both(features)
    boosted = HistGradientBoostingRegressor(learning_rate=0.05, max_iter=300, random_state=0)
    boosted.fit(x, logs - np.log(first))
    out["ridge, boosted"] = rest * np.exp(boosted.predict(z))
    forest = RandomForestRegressor(300, min_samples_leaf=2, random_state=0)
    out["random forest"] = np.exp(forest.fit(x, logs).predict(z))
    perceptron = TransformedTargetRegressor(
        make_pipeline(
            StandardScaler(),
            MLPRegressor(hidden_layer_sizes=(128, 128), alpha=0.1, max_iter=1000, random_state=0),
        ),
        transformer=StandardScaler(),
    )
    out["perceptron"] = np.exp(perceptron.fit(x, logs).predict(z))
    return out


def costs(found: Ready, predictor: LatencyPredictor) -> dict[str, float]:
    """Microseconds of CPU time a policy, in batches of 1,000. Best of ``REPEATS``: from a policy to
    its plan, from that to its signatures, from those to latencies; and all of it at once, from
    points, for policies that were met before (batch). Once: the same when nothing was met yet
    (batch_first), and for the next 1,000 policies, again and again (batch_new)."""

    def took(work: Callable[[], Any]) -> tuple[Any, float]:
        began = time.process_time()
        result = work()
        return result, 1e6 * (time.process_time() - began) / MANY

    def best(work: Callable[[], Any]) -> tuple[Any, float]:
        return min((took(work) for _ in range(REPEATS)), key=lambda found: found[1])

    out = {}
    drawn = mixed_policies(found.space, HELD_SEED + 1)
    batches = [list(islice(drawn, MANY)) for _ in range(1 + REPEATS)]
    plans, out["plan_us"] = best(lambda: [found.prepared.plan(p) for p in batches[0]])
    sums, out["signature_us"] = best(lambda: [signature(plan) for plan in plans])
    plain, out["predict_us"] = best(lambda: predictor.predict_work(sums))
    batch = BatchPredictor(found.prepared, found.space, predictor)
    points = [np.array([found.space.point(p) for p in policies]) for policies in batches]
    _, out["batch_first_us"] = took(lambda: batch.predict(points[0]))
    ends, out["batch_us"] = best(lambda: batch.predict(points[0]))
    np.testing.assert_allclose(ends, plain, rtol=1e-9)
    for i in range(1, 1 + REPEATS):
        _, out[f"batch_new_{i}_us"] = took(partial(batch.predict, points[i]))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", choices=SPECS, default="resnet")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--networks", type=int, default=NETWORKS)
    parser.add_argument("--held", type=int, default=HELD)
    parser.add_argument("--minutes", type=float, default=15.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = ready(spec_of(given.network, given.runtime))
    OUT.mkdir(exist_ok=True)
    name = f"latency-{given.network}-{given.runtime}"

    def timed(part: str, count: int, seed: int, seconds: float = float("inf")) -> DeviceProfile:
        path = OUT / f"{name}-{part}.jsonl"
        narrow = NARROW if part == "profile" else 0.0  # the others are timed to their end
        return make_profile(
            found, path, networks=count, seconds=seconds, seed=seed, narrow=narrow,
            say=lambda line: print(part, line, flush=True),
        )  # fmt: skip

    fresh, began = not (OUT / f"{name}-profile.jsonl").exists(), time.monotonic()
    profile = timed("profile", given.networks, 0, 60 * given.minutes)
    seconds = time.monotonic() - began if fresh else None
    held = Networks(found, timed("held", given.held, HELD_SEED), HELD_SEED)
    again = Networks(found, timed("again", min(AGAIN, given.held), HELD_SEED), HELD_SEED)

    predictor = LatencyPredictor(profile)
    ends = predictor.predict(held.plans) / predictor.teacher_ms
    cells = {"all": figures(held.ratio, ends, np.ones(len(held.ratio), bool))}
    for near, precision in CELLS:
        at = (held.near == near) & (held.precision == precision)
        cells[f"{precision}, {'near recipes' if near else 'random'}"] = figures(
            held.ratio, ends, at
        )
    known = Networks(found, profile, 0)
    for label, middle in baselines(known, held).items():
        cells[label] = figures(held.ratio, np.stack([middle] * 3, 1), np.ones(len(middle), bool))
    twice = {digest: ratio for digest, ratio in zip(again.digests, again.ratio, strict=True)}
    both = [(r, twice[d]) for d, r in zip(held.digests, held.ratio, strict=True) if d in twice]
    first, second = np.array(both).T
    cells["measured again"] = figures(first, np.stack([second] * 3, 1), np.ones(len(first), bool))

    columns = (
        "networks",
        "within_5",
        "within_10",
        "median_error",
        "spearman",
        "tau_within_10",
        "coverage",
        "width",
    )
    print(f"{'':24s}" + "".join(f"{c:>14s}" for c in columns))
    for label, values in cells.items():
        shown = [f"{values[c]:14.4g}" if c in values else f"{'':14s}" for c in columns]
        print(f"{label:24s}" + "".join(shown))
    with threadpool_limits(1):  # a second thread of NumPy's waits, and costs as much
        cost = costs(found, predictor)
    cost |= {"profile_s": seconds, "profile_networks": len(known.ratio)}
    print(cost)
    write(name, {"network": given.network, "runtime": given.runtime, "cells": cells, **cost})


if __name__ == "__main__":
    main()

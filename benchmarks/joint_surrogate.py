"""A surrogate fitted to the recorded benchmark: what any policy of the space would give.

    python benchmarks/joint_surrogate.py

prints its held-out errors (ten-fold cross validation; the seeds of a policy stay together) beside
those of other models. The same surrogate answers every search method, so that they can be compared
over many seeds in minutes. What it cannot say: whether a policy outside of what was drawn for the
table is as good as its neighbours there.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from common import write
from joint_table import Row, by_policy, read, space, spec, teacher
from scipy.stats import spearmanr
from sklearn.ensemble import ExtraTreesRegressor, GradientBoostingRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.multioutput import MultiOutputRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from flyweight.compressors import RUNGS
from flyweight.kernels import DeviceProfile, LatencyPredictor, Timed, signature
from flyweight.kernels.signature import digest
from flyweight.spaces import Blueprint, Policy, blueprint

Array = np.ndarray[Any, Any]
LEAST_LOSS = 1e-4  # KL below which losses are not told apart
FOLDS = 10
NAMES = [f"{rung} {figure}" for rung in RUNGS for figure in ("loss", "error", "seconds")]
SETTINGS = ("temperature", "alpha", "learning_rate")


def plan(policy: Policy) -> Blueprint:
    return blueprint(space().network, policy, space().capabilities)


def features(policies: Sequence[Policy], plans: Sequence[Blueprint]) -> Array:
    """[policies, features]: shares of channels, which layers are in int8, settings, and what the
    whole comes to."""
    whole = plan(Policy())
    rows = []
    for policy, made in zip(policies, plans, strict=True):
        known = space().values(policy)
        widths = [known[f"width/{n}"] / g.width for n, (_, g) in space().groups.items()]
        int8 = [float(known[f"precision/{n}"] == "int8") for n in space().layers]
        macs = sum(k.macs for k in made.kernels if k.precision == "int8") / made.macs
        rows.append(
            [
                *widths,
                *int8,
                *(math.log(known[name]) for name in SETTINGS),
                known.get("criterion") == "taylor",
                known.get("reconstruct", False),
                *(known.get("calibration") == name for name in spec().space.quantize.calibrations),
                known.get("qat", False),
                math.log(made.macs / whole.macs),
                math.log(made.weight_bytes / whole.weight_bytes),
                float(np.log(widths).sum()),
                float(np.log(widths).min()),
                macs,
            ]
        )
    return np.array(rows, float)


def targets(rows: Sequence[Row]) -> Array:
    """[rows, 3 * rungs]: logarithms of loss, of the error (100 - metric) and of seconds."""
    return np.array(
        [
            [
                value
                for rung in RUNGS
                for value in (
                    math.log(max(row.rungs[rung]["loss"], LEAST_LOSS)),
                    math.log(100 - row.rungs[rung]["metric"]),
                    math.log(row.rungs[rung]["seconds"]),
                )
            ]
            for row in rows
        ]
    )


def _process() -> Any:
    kernel = ConstantKernel(1.0, (1e-2, 1e3)) * RBF(10.0, (1.0, 1e3)) + WhiteKernel(0.1, (1e-3, 1))
    return GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)


class Forest(ExtraTreesRegressor):  # type: ignore[misc]
    """The same, ten times as fast for one policy at a time: without joblib's calls to threads."""

    def predict(self, x: Array) -> Array:
        single = np.asarray(x, np.float32)
        found: Array = np.mean([e.tree_.predict(single) for e in self.estimators_], 0)
        return found.reshape(len(single), -1)


MODELS: dict[str, Any] = {
    "ridge": lambda: make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 3, 13))),
    "Gaussian process": lambda: make_pipeline(StandardScaler(), MultiOutputRegressor(_process())),
    "extra trees": lambda: Forest(200, max_features=0.5, random_state=0),
    "boosting": lambda: MultiOutputRegressor(
        GradientBoostingRegressor(
            n_estimators=300, learning_rate=0.05, max_depth=3, subsample=0.5, random_state=0
        )
    ),
}

MODEL = "extra trees"


class Surrogate:
    """Answers for any policy of the space, from ``rows`` of the table.

    What is expected has no noise; ``trial`` adds what seeds differ by: the deviations from their
    mean, at all rungs together, of one trial of the policies that were tried with several seeds.
    """

    def __init__(self, rows: Sequence[Row], model: str = MODEL) -> None:
        whole = [row for row in rows if row.whole]
        plans = [plan(row.policy) for row in whole]
        self.rows = whole
        self.teacher = teacher()
        self._model = MODELS[model]()
        self._model.fit(features([row.policy for row in whole], plans), targets(whole))
        self._deviations = deviations(whole)
        self.predictor = latencies(whole, plans)
        self._known: dict[str, tuple[Array, tuple[float, float, float], int]] = {}
        #: mean CPU seconds of a trial that climbs all rungs: the unit in which a search is paid
        self.trial_seconds = float(np.mean([_seconds(row) for row in whole]))

    def learn(self, policies: Sequence[Policy]) -> None:
        """Works out ``policies`` together, which is faster than one by one."""
        new = list({p.digest: p for p in policies if p.digest not in self._known}.values())
        if not new:
            return
        plans = [plan(policy) for policy in new]
        expected = self._model.predict(features(new, plans))
        ends = self.predictor.predict(plans)
        for policy, made, values, (low, middle, high) in zip(
            new, plans, expected, ends.tolist(), strict=True
        ):
            self._known[policy.digest] = values, (low, middle, high), made.weight_bytes

    def latency(self, policy: Policy) -> tuple[float, float, float]:
        """Lower end, middle and upper end; the teacher's is 1."""
        self.learn([policy])
        return self._known[policy.digest][1]

    def size_bytes(self, policy: Policy) -> int:
        """Of the weights."""
        self.learn([policy])
        return self._known[policy.digest][2]

    def expected(self, policy: Policy) -> dict[str, dict[str, float]]:
        """Per rung what a table has, without noise."""
        self.learn([policy])
        return _figures(self._known[policy.digest][0])

    def trial(self, policy: Policy, seed: int) -> dict[str, dict[str, float]]:
        """The same with the noise of this seed: equal arguments give equal answers."""
        self.learn([policy])
        noise = random.Random(f"{seed} {policy.digest}").choice(self._deviations)
        return _figures(self._known[policy.digest][0] + noise)

    def drop(self, policy: Policy) -> float:
        """Points of the metric lost against the teacher at the full rung, without noise."""
        return float(self.teacher["metric_selection"] - self.expected(policy)[RUNGS[-1]]["metric"])


def deviations(rows: Sequence[Row]) -> Array:
    """[trials, 3 * rungs]: of ``targets`` from the mean over the seeds of a policy, made as large
    as they are on average in a trial that is no part of the mean. Durations are without: their
    differences come from what else ran on the machine."""
    found = []
    for same in by_policy(list(rows)):
        if len(same) > 1:
            values = targets(same)
            values[:, 2::3] = 0
            found.append((values - values.mean(0)) * math.sqrt(len(same) / (len(same) - 1)))
    return np.concatenate(found) if found else np.zeros((1, 3 * len(RUNGS)))


def latencies(rows: Sequence[Row], plans: Sequence[Blueprint]) -> LatencyPredictor:
    """The predictor of docs/latency.md, from the table in place of a device profile."""
    timed = [
        Timed(signature(made), row.latency, 1.0, 0, row.policy.digest)
        for row, made in zip(rows, plans, strict=True)
    ]
    network = digest(signature(plan(Policy())))
    return LatencyPredictor(DeviceProfile({}, "", {}, network, timed))


def _seconds(row: Row) -> float:
    return sum(row.rungs[rung]["seconds"] for rung in RUNGS)


def _figures(values: Array) -> dict[str, dict[str, float]]:
    by_rung = np.exp(values).reshape(len(RUNGS), 3)
    return {
        rung: {"loss": float(loss), "metric": float(100 - error), "seconds": float(seconds)}
        for rung, (loss, error, seconds) in zip(RUNGS, by_rung, strict=True)
    }


def held_out(rows: Sequence[Row], model: str) -> Array:
    """``targets`` of each row, predicted by a model that has not seen its policy."""
    plans = [plan(row.policy) for row in rows]
    groups = [row.policy.digest for row in rows]
    inputs, outputs = features([row.policy for row in rows], plans), targets(rows)
    folds = GroupKFold(min(FOLDS, len(set(groups))), shuffle=True, random_state=0)
    found: Array = cross_val_predict(MODELS[model](), inputs, outputs, groups=groups, cv=folds)
    return found


def held_out_latency(rows: Sequence[Row]) -> Array:
    """The latency of each row, predicted from those of other policies."""
    groups = [row.policy.digest for row in rows]
    found = np.empty(len(rows))
    folds = GroupKFold(min(FOLDS, len(set(groups))), shuffle=True, random_state=0)
    plans = [plan(row.policy) for row in rows]
    for seen, unseen in folds.split(plans, groups=groups):
        predictor = latencies([rows[i] for i in seen], [plans[i] for i in seen])
        found[unseen] = predictor.predict([plans[i] for i in unseen])[:, 1]
    return found


def errors(predicted: Array, true: Array) -> dict[str, float]:
    """R2, Spearman's rank correlation and the root of the mean square error."""
    square = float(((predicted - true) ** 2).mean())
    return {
        "r2": 1 - square / float(true.var()),
        "spearman": float(spearmanr(predicted, true).statistic),
        "rmse": math.sqrt(square),
    }


def main() -> None:
    rows = [row for row in read() if row.whole]
    true = targets(rows)
    figures: dict[str, Any] = {"trials": len(rows), "policies": len(list(by_policy(rows)))}
    print(f"{len(rows)} trials of {figures['policies']} policies; {len(read()) - len(rows)} failed")
    print("| model | rung | log loss: R2, Spearman, RMSE | metric: R2, Spearman, RMSE in points |")
    print("|---|---|---|---|")
    for model in MODELS:
        found = held_out(rows, model)
        for i, rung in enumerate(RUNGS):
            loss = errors(found[:, 3 * i], true[:, 3 * i])
            metric = errors(*(100 - np.exp(y[:, 3 * i + 1]) for y in (found, true)))
            shown = " | ".join(", ".join(f"{v:.2f}" for v in e.values()) for e in (loss, metric))
            print(f"| {model} | {rung} | {shown} |")
            figures[f"{model} {rung}"] = {"log loss": loss, "metric": metric}
    latency = np.array([row.latency for row in rows])
    figures["latency"] = errors(held_out_latency(rows), latency)
    figures["seeds"] = dict(zip(NAMES, np.sqrt((deviations(rows) ** 2).mean(0)), strict=True))
    print("latency:", figures["latency"])
    print("deviation of seeds (logarithms):", figures["seeds"])
    print(write("joint_surrogate", figures))


if __name__ == "__main__":
    main()

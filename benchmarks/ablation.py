"""Every technique against the plain one, at equal cost, over seeds.

    python benchmarks/ablation.py [--networks resnet har vit] [--families NAME ...] [--seeds 0 1 2]

A family is a question; its first choice is the plain one, and a difference is paired: the same
seed, which draws the calibration items and the order of training. Metric and KL to the teacher are
the artifact's, in the runtime, on all of the task's validation data. Seconds are of the CPU, one
thread. Training given up: in how many cells it harmed, so that they are of the student as it was
before (docs/search.md). Writes benchmarks/out/ablation.json after every cell; a cell that is there
already is kept.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import time
import zlib
from collections.abc import Callable
from typing import Any

import torch
from common import OUT, write
from networks import NETWORKS, joined

from flyweight.compressors import Prepared, Schedule, compress, prepare
from flyweight.compressors.compress import _train as train
from flyweight.compressors.data import CALIBRATION
from flyweight.compressors.distill import LOSSES, kl_divergence
from flyweight.compressors.observe import ACTIVATION_RANGES
from flyweight.compressors.parity import run_module, run_session
from flyweight.compressors.prune import CRITERIA
from flyweight.kernels import make_runtime
from flyweight.spaces import Distill, FlyweightError, Policy, Prune, Settings, Space

EPOCHS = 1.0  # of training, where a family trains
RATES = {"resnet": 0.05}  # of learning
RATE = 0.02  # of the others


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a cell compresses. epochs: of distillation, which make the cost equal."""

    policy: Policy
    rung: str = "recalibrate"
    epochs: float = EPOCHS


Choices = dict[str, Choice]


def distilled(space: Space, **how: Any) -> Distill:
    return Distill(learning_rate=space.settings.learning_rate[0], **how)


def pruned(space: Space, keep: float, **how: Any) -> Prune:
    return Prune(space.uniform(keep).prune.width, **how)


def criteria(space: Space, how: dict[str, Any], rung: str) -> Choices:
    trained = distilled(space) if rung != "recalibrate" else None
    return {
        name: Choice(Policy(pruned(space, 0.5, criterion=name, **how), distill=trained), rung, 2.0)
        for name in CRITERIA
    }


def reconstruct(space: Space, rung: str) -> Choices:
    trained = distilled(space) if rung != "recalibrate" else None
    return {
        f"{keep:.0%}, {'reconstructed' if on else 'plain'}": Choice(
            Policy(pruned(space, keep, criterion="l1", reconstruct=on), distill=trained), rung, 2.0
        )
        for keep in (0.5, 0.75)
        for on in (False, True)
    }


def calibrations(space: Space) -> Choices:
    quantize = space.uniform(1.0, "int8").quantize
    return {
        name: Choice(Policy(quantize=dataclasses.replace(quantize, calibration=name)))
        for name in ACTIVATION_RANGES
    }


def qat(space: Space, keep: float) -> Choices:
    quantize = dataclasses.replace(space.uniform(keep, "int8").quantize, calibration="mse")
    prune = pruned(space, keep, criterion="l1", reconstruct=True)
    return {
        "qat off" if not on else "qat on": Choice(
            Policy(prune, dataclasses.replace(quantize, qat=on), distilled(space)),
            "full",
        )
        for on in (False, True)
    }


def losses(prepared: Prepared, space: Space, keep: float) -> Choices:
    prune = pruned(space, keep, criterion="l1", reconstruct=True)
    cost = seconds_a_sample(prepared, prune)
    return {
        name: Choice(
            Policy(prune, distill=distilled(space, loss=name)),
            "full",
            EPOCHS * cost["kl"] / cost[name],
        )
        for name in LOSSES
    }


def seconds_a_sample(prepared: Prepared, prune: Prune) -> dict[str, float]:
    """CPU seconds that training takes a sample with each loss: the least of three in turn."""
    few = dataclasses.replace(prepared, schedule=Schedule(full_epochs=0.2, short=0.4))
    few.epoch(0)
    student = compress(few, Policy(prune), "recalibrate").student
    found: dict[str, list[float]] = {name: [] for name in LOSSES}
    for _ in range(4):
        for name, tries in found.items():
            policy = Policy(prune, distill=Distill(loss=name))
            began = time.thread_time()
            samples = train(few, policy, copy.deepcopy(student), "short", seed=0)
            tries.append((time.thread_time() - began) / samples)
    return {name: min(tries[1:]) for name, tries in found.items()}  # the first warms up


def sparsity(space: Space, pairs: list[tuple[float, float]], precision: str = "int8") -> Choices:
    """Widths and masks; pairs: share of channels kept, share of zeros."""
    out = {}
    for keep, share in pairs:
        quantize = dataclasses.replace(space.uniform(keep, precision).quantize, calibration="mse")
        prune = pruned(space, keep, criterion="l1", reconstruct=True, sparsity=share)
        out[f"{keep:.0%} of the channels, {share:.0%} zeros"] = Choice(
            Policy(prune, dataclasses.replace(quantize, qat=True), distilled(space)),
            "full",
        )
    return out


FAMILIES: dict[str, Callable[[Prepared, Space], Choices]] = {
    "criteria": lambda _, s: criteria(s, {}, "recalibrate"),
    "criteria, reconstructed": lambda _, s: criteria(s, {"reconstruct": True}, "recalibrate"),
    "criteria, trained": lambda _, s: criteria(s, {"reconstruct": True}, "short"),
    "reconstruction": lambda _, s: reconstruct(s, "recalibrate"),
    "reconstruction, trained": lambda _, s: reconstruct(s, "short"),
    "calibrations": lambda _, s: calibrations(s),
    "losses at 50%": lambda p, s: losses(p, s, 0.5),
    "losses at 25%": lambda p, s: losses(p, s, 0.25),
    "qat at 50%": lambda _, s: qat(s, 0.5),
    "qat at 25%": lambda _, s: qat(s, 0.25),
    "masks, fp32": lambda _, s: sparsity(s, [(1.0, 0.0), (1.0, 0.5), (1.0, 0.75)], "fp32"),
    "masks, int8": lambda _, s: sparsity(s, [(1.0, 0.0), (1.0, 0.5), (1.0, 0.75)]),
    # About equal compressed size: by widths alone, by masks alone, by both.
    "sparsity, 150 kB": lambda _, s: sparsity(s, [(0.5, 0.0), (0.75, 0.75), (1.0, 0.88)]),
    "sparsity, 43 kB": lambda _, s: sparsity(s, [(0.25, 0.0), (0.375, 0.79), (0.5, 0.89)]),
}


class Bench:
    """A network prepared once, scored on all of its validation data."""

    def __init__(self, name: str) -> None:
        runtime, rate = make_runtime("onnxruntime", 1), RATES.get(name, RATE)
        self.prepared = prepare(NETWORKS[name](), runtime, Schedule(EPOCHS, 0.1))
        settings = Settings(min_keep=0.01, learning_rate=(rate, rate))
        self.space = Space(self.prepared.network, runtime.capabilities, settings)
        splits = self.prepared.splits
        self.validation = joined([splits.search, splits.selection])
        self.answers = run_module(self.prepared.teacher, self.validation)

    def seeded(self, seed: int, epochs: float) -> Prepared:
        """With calibration items of their own, and nothing that was worked out of others."""
        train = self.prepared.splits.train
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        calibration = train.take(order[:CALIBRATION])
        splits = dataclasses.replace(self.prepared.splits, calibration=calibration)
        schedule = Schedule(epochs, 0.1)
        found = dataclasses.replace(self.prepared, splits=splits, schedule=schedule)
        generator = torch.Generator().manual_seed(seed)  # the control is drawn anew
        found._importance["pruned", "random"] = {
            name: torch.rand(group.width, generator=generator)
            for name, group in found.network.groups.items()
        }
        return found

    def run(self, choice: Choice, seed: int) -> dict[str, Any]:
        prepared = self.seeded(seed, choice.epochs)
        for number in range(prepared.variants if choice.policy.distill else 0):
            prepared.epoch(number)  # the teacher's answers are everybody's
        began = time.thread_time()
        try:
            found = compress(prepared, choice.policy, choice.rung, seed=seed)
        except FlyweightError as error:
            return {"error": str(error)}
        seconds = time.thread_time() - began
        answers = run_session(prepared.runtime.load(found.model), self.validation)
        return {
            "metric": prepared.task.metric(answers, self.validation.targets),
            "loss": kl_divergence(answers, self.answers).item(),
            "samples": found.samples,
            "cpu_seconds": seconds,
            "size_bytes": len(found.model),
            "compressed_bytes": len(zlib.compress(found.model, 9)),
            "macs": found.plan.macs,
            "settled": found.settled,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=["resnet"], choices=NETWORKS)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = OUT / "ablation.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in args.networks:
        bench = Bench(name)
        for family in args.families:
            choices = FAMILIES[family](bench.prepared, bench.space)
            for seed in args.seeds:
                for label, choice in choices.items():
                    key = {"network": name, "family": family, "choice": label, "seed": seed}
                    if any(key.items() <= row.items() for row in rows):
                        continue
                    found = bench.run(choice, seed)
                    facts = {"policy": choice.policy.digest, "epochs": choice.epochs}
                    rows.append(key | facts | {"rung": choice.rung} | found)
                    write("ablation", {"rows": rows})
                    print(
                        key,
                        f"{choice.epochs:.2f}",
                        found.get("metric", found.get("error")),
                        flush=True,
                    )
            show(name, family, [r for r in rows if (r["network"], r["family"]) == (name, family)])


def show(network: str, family: str, rows: list[dict[str, Any]]) -> None:
    """The table of a family, as Markdown."""
    print(f"\n### {network}: {family}\n")
    print(
        "| choice | metric | against the plain one | KL | epochs | training given up | CPU s "
        "| compressed kB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    plain: dict[int, float] = {}
    for label in dict.fromkeys(row["choice"] for row in rows):
        cells = [row for row in rows if row["choice"] == label]
        good = [row for row in cells if "metric" in row]
        if not good:
            print(f"| {label} | {cells[0]['error']} | | | | | | |")
            continue
        plain = plain or {row["seed"]: row["metric"] for row in good}
        gains = [row["metric"] - plain[row["seed"]] for row in good if row["seed"] in plain]
        print(
            f"| {label} | {spread([r['metric'] for r in good])} | {spread(gains, '+')} "
            f"| {statistics.mean(r['loss'] for r in good):.3g} | {good[0]['epochs']:.2f} "
            f"| {given_up(good)} "
            f"| {statistics.mean(r['cpu_seconds'] for r in good):.1f} "
            f"| {statistics.mean(r['compressed_bytes'] for r in good) / 1e3:.0f} |"
        )
    print(flush=True)


def given_up(rows: list[dict[str, Any]]) -> str:
    """In how many of ``rows`` training was given up."""
    if any("settled" not in row for row in rows):
        return "not recorded"
    return f"{sum(row['settled'] for row in rows)} of {len(rows)}"


def spread(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation."""
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{sign}.2f} ± {deviation:.2f}"


if __name__ == "__main__":
    main()

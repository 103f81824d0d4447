"""What quantization-aware distillation gives back of what post-training quantization loses.

    python benchmarks/qat.py [har-2 vit-2 resnet-8-0.25 ...] [--seeds 5] [--epochs 2]

NETWORK-BITS[-KEEP]: every layer is quantized, activations to 8 bits, weights to BITS; KEEP of the
channels stay. 8 bits are what the kernels here bear; fewer are what a target would get whose
weights have so many (here they are computed in the int8 kernels, exactly). A seed draws the
calibration items and the order of training. It trains one student in float, which is scored as it
is and after post-training quantization, and for each calibration one of as many epochs whose
training ends with the quantizers in place. Metric and KL to the teacher on the test set, in the
runtime. The share recovered is (trained - post-training) / (float - post-training), of the means
over seeds. given_up: for how many seeds training harmed, so that the row is of the student as it
was before (docs/search.md). Writes benchmarks/out/qat.json after every seed; one that is there
already is kept.
"""

import argparse
import dataclasses
import json
import statistics
import time
from typing import Any

import torch
from common import OUT, write
from networks import NETWORKS, drawn

from flyweight.compressors import Candidate, Prepared, Schedule, compress, prepare
from flyweight.compressors.compress import quantize
from flyweight.compressors.distill import kl_divergence
from flyweight.compressors.export import to_onnx
from flyweight.compressors.freeze import freeze
from flyweight.compressors.parity import run_module, run_session
from flyweight.kernels import make_runtime
from flyweight.spaces import Distill, Policy, Prune, Quantize, Settings, Space, blueprint

CASES = ("har-2", "vit-2", "resnet-8-0.25")


def at_bits(prepared: Prepared, bits: int) -> Prepared:
    """``prepared`` for a target whose kernels bear weights of ``bits`` bits."""
    runtime: Any = make_runtime("onnxruntime", 1)
    runtime.capabilities = dataclasses.replace(runtime.capabilities, weight_bits=bits)
    return dataclasses.replace(prepared, runtime=runtime)


def scored(prepared: Prepared, model: bytes, answers: torch.Tensor) -> dict[str, float]:
    test = prepared.splits.test
    given = run_session(prepared.runtime.load(model), test)
    return {
        "metric": prepared.task.metric(given, test.targets),
        "kl": kl_divergence(given, answers).item(),
    }


def of_candidate(prepared: Prepared, found: Candidate, answers: torch.Tensor) -> dict[str, Any]:
    """Its scores, and whether its training was given up."""
    return {**scored(prepared, found.model, answers), "settled": found.settled}


def post_training(prepared: Prepared, trained: Candidate, calibration: str) -> bytes:
    """The artifact of a student trained in float; what ``compress`` makes without QAT."""
    precision = dict.fromkeys(prepared.network.layers, "int8")
    policy = dataclasses.replace(trained.policy, quantize=Quantize(precision, calibration))
    plan = blueprint(prepared.network, policy, prepared.runtime.capabilities)
    return to_onnx(freeze(quantize(prepared, policy, plan, trained.student)), prepared.example)


def seed_of(
    prepared: Prepared, prune: Prune, distill: Distill, seed: int, calibrations: list[str]
) -> dict[str, Any]:
    ready = drawn(prepared, seed)
    answers = run_module(prepared.teacher, prepared.splits.test)
    precision = dict.fromkeys(prepared.network.layers, "int8")
    began = time.process_time()
    trained = compress(ready, Policy(prune, distill=distill), "full", seed=seed)
    row: dict[str, Any] = {"float": of_candidate(ready, trained, answers)}
    for how in calibrations:
        row[f"{how}, post-training"] = scored(ready, post_training(ready, trained, how), answers)
        policy = Policy(prune, Quantize(precision, how, qat=True), distill)
        found = compress(ready, policy, "full", seed=seed)
        row[f"{how}, trained"] = of_candidate(ready, found, answers)
    print(seed, {k: round(v["metric"], 2) for k, v in row.items()}, flush=True)
    return {**row, "cpu_s": round(time.process_time() - began, 1)}


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    for name in [name for name in rows[0] if name != "cpu_s"]:
        values = [row[name]["metric"] for row in rows]
        out[name] = {
            "metric": statistics.mean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
            "kl": statistics.mean(row[name]["kl"] for row in rows),
        }
        if all("settled" in row[name] for row in rows):  # earlier rows do not say
            out[name]["given_up"] = sum(row[name]["settled"] for row in rows)
        how, _, kind = name.partition(", ")
        if kind == "trained":
            start = out[f"{how}, post-training"]["metric"]
            lost = out["float"]["metric"] - start
            if lost > 0:
                out[name]["recovered"] = (out[name]["metric"] - start) / lost
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--calibrations", nargs="+", default=["mse", "fitted"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    path, distill = OUT / "qat.json", Distill(learning_rate=given.rate)
    cells: dict[str, Any] = json.loads(path.read_text())["cells"] if path.exists() else {}
    for case in given.cases:
        name, bits, *keep = case.split("-")
        schedule = Schedule(full_epochs=given.epochs)
        ready = prepare(NETWORKS[name](), make_runtime("onnxruntime", 1), schedule)
        ready = at_bits(ready, int(bits))
        settings = Settings(min_keep=0.125, reconstruct=(True,))
        space = Space(ready.network, ready.runtime.capabilities, settings)
        prune = space.uniform(float(keep[0]) if keep else 1.0).prune
        cell = cells.setdefault(case, {"epochs": given.epochs, "rate": given.rate, "rows": {}})
        for seed in range(given.seeds):
            if str(seed) not in cell["rows"]:
                row = seed_of(ready, prune, distill, seed, given.calibrations)
                cell["rows"][str(seed)] = row
            cell["summary"] = summary(list(cell["rows"].values()))
            write("qat", {"cells": cells})
        for how, row in cell["summary"].items():
            print(case, how, {k: round(v, 4) for k, v in row.items()}, flush=True)


if __name__ == "__main__":
    main()

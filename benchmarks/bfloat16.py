"""Training that multiplies in bfloat16 beside float32: its steps, and where it leads.

    python benchmarks/bfloat16.py [resnet vit ...] [--rounds 5] [--epochs 4] [--seeds 3]

Steps: processor time of one thread for a batch of 128, of the teacher and of half of its channels,
interleaved round by round in one process. Where it leads: half of the channels in int8, trained for
as many epochs with either, a seed for the order; KL to the teacher on search validation and the
metric on selection validation, in the runtime. Writes benchmarks/out/bfloat16.json after every
network; one that is there already is kept. ``--epochs 0``: steps alone.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import time
from typing import Any

import torch
from common import OUT, write
from networks import NETWORKS

from flyweight.compressors import Prepared, Schedule, compress, prepare
from flyweight.compressors.bfloat16 import in_bfloat16
from flyweight.compressors.compress import prune
from flyweight.compressors.distill import distill
from flyweight.compressors.mixed import is_native
from flyweight.kernels import make_runtime
from flyweight.spaces import Distill, Policy, Settings, Space

STEPS = 20  # of a timing


def half(prepared: Prepared, keep: float = 0.5) -> Policy:
    """That share of the channels, in int8, without training with quantizers."""
    space = Space(
        prepared.network, prepared.runtime.capabilities, Settings(qat=(False,)), prepared.others
    )
    return space.uniform(keep, "int8")


def steps(prepared: Prepared, keep: float, rounds: int) -> list[tuple[float, float]]:
    """Milliseconds of a step in float32 and in bfloat16, a pair each round."""
    policy = half(prepared, keep)
    start = prune(prepared, policy, prepared.plan(policy))
    batch, epoch = prepared.schedule.batch, prepared.epoch(0)
    share = STEPS * batch / len(epoch.items)

    def took(halves: bool) -> float:
        student = copy.deepcopy(start)
        began = time.thread_time()
        distill(
            student, lambda _: epoch, share, Distill(), prepared.task.loss,
            peak=1e-3, batch=batch, seed=0, halves=halves, kind=prepared.kind,
        )  # fmt: skip
        return 1e3 * (time.thread_time() - began) / STEPS

    took(False), took(True)  # kernels are set up
    return [(took(False), took(True)) for _ in range(rounds)]


def led(prepared: Prepared, seeds: int) -> list[dict[str, Any]]:
    """What a training leads to, by seed, in float32 and in bfloat16."""
    out = []
    for seed in range(seeds):
        found: dict[str, Any] = {"seed": seed}
        for name, halves in (("float32", False), ("bfloat16", True)):
            so = dataclasses.replace(prepared, bfloat16=frozenset(["pruned"] if halves else []))
            candidate = compress(so, half(prepared), "full", None, seed)
            found[name] = {"kl": candidate.loss, "metric": candidate.metric}
        print(f"  {found}", flush=True)
        out.append(found)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("networks", nargs="*", default=["resnet", "article_cnn", "har", "vit"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = OUT / "bfloat16.json"
    rows = json.loads(path.read_text())["networks"] if path.exists() else {}
    for name in args.networks:
        if name in rows:
            continue
        schedule = Schedule(full_epochs=args.epochs or 1.0)
        prepared = prepare(NETWORKS[name](), make_runtime("onnxruntime", 1), schedule)
        timed = {f"{keep:g}": steps(prepared, keep, args.rounds) for keep in (1.0, 0.5)}
        pays = bool(in_bfloat16(prepared, ["pruned"], gpus=False))
        rows[name] = {
            "native": is_native(prepared.device), "used": pays, "epochs": args.epochs,
            "steps": timed, "led": led(prepared, args.seeds) if args.epochs else [],
        }  # fmt: skip
        write("bfloat16", {"networks": rows})
    print(
        "| network, channels | float32, ms a step | bfloat16 | times as fast, of rounds |\n|"
        + "---|" * 4
    )
    for name, row in rows.items():
        for keep, pairs in row["steps"].items():
            floats, halves = (statistics.median(each) for each in zip(*pairs, strict=True))
            ratios = sorted(a / b for a, b in pairs)
            middle = statistics.median(ratios)
            print(
                f"| {name}, {keep} | {floats:.1f} | {halves:.1f} | "
                f"{middle:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) |"
            )
    print("\n| network | KL, float32 | bfloat16 | metric, float32 | bfloat16 |\n|" + "---|" * 5)
    for name, row in rows.items():
        cells = [
            ", ".join(f"{each[kind][what]:.{digits}f}" for each in row["led"])
            for what, digits in (("kl", 4), ("metric", 2))
            for kind in ("float32", "bfloat16")
        ]
        print(f"| {name}, {row['epochs']:g} epochs | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

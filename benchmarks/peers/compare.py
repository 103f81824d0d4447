"""The peers' artifacts and those of flyweight's runs side by side.

    python benchmarks/peers/compare.py --run "20 minutes=RUN_DIR" [--run "LABEL=RUN_DIR@1200" ...]

All are timed in interleaved rounds by the same code (docs/latency.md), on one thread, and scored on
the official 10,000 test images in ONNX Runtime. For each limit what counts of everybody is the most
accurate on selection validation (``--by loss``: nearest to the teacher on search validation), among
what keeps the limit, up to 1% of it, once measured here; nothing is chosen by the test set. Of a
run these are its finalists; ``@1200``: those that it would have had, had it ended after 1,200
seconds of its budget. Artifacts of other seeds (hand-1) are somebody of their own. ``hand``,
``nncf`` and ``olive`` share one student. Prints tables for docs/benchmarks.md, says where a peer
wins, and writes benchmarks/out/peers.json.
"""

import argparse
import json
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import write  # noqa: E402
from executed import int8_layers  # noqa: E402
from run import LIMITS, PEERS  # noqa: E402

from flyweight.compressors import Schedule, compress, load_task, prepare  # noqa: E402
from flyweight.compressors.data import Items, stack  # noqa: E402
from flyweight.compressors.parity import run_session  # noqa: E402
from flyweight.kernels import Session, Timing, disturbed, make_runtime, time_sessions  # noqa: E402
from flyweight.kernels.timing import TEACHER  # noqa: E402
from flyweight.search.record import at_work, read  # noqa: E402
from flyweight.search.results import finalists, full_results  # noqa: E402
from flyweight.search.store import read_artifact  # noqa: E402
from flyweight.spaces import Policy  # noqa: E402

EXAMPLE = HERE.parent.parent / "examples" / "fashion_mnist"
OFFICIAL = 10_000
KEEPS = 0.99  # of a limit: timings differ by a per cent from one time to the next
CLOCKS = {"wall": time.perf_counter_ns, "cpu": time.thread_time_ns}


@dataclass(frozen=True)
class Artifact:
    """A model of somebody. metric: on selection validation; loss: KL to the teacher on search
    validation; cpu_seconds: what it cost."""

    whose: str
    name: str
    model: bytes
    metric: float
    loss: float
    cpu_seconds: float | None = None


def of_peers(folder: Path) -> list[Artifact]:
    found = []
    for whose in (path.name for peer in PEERS for path in sorted(folder.glob(f"{peer}*"))):
        for path in sorted((folder / whose).glob("*.json")):
            figures = json.loads(path.read_text())
            name, model = f"{whose} {path.stem}", path.with_suffix(".onnx").read_bytes()
            keys = ("metric_selection", "loss", "cpu_seconds")
            found.append(Artifact(whose, name, model, *(figures[key] for key in keys)))
    return found


@dataclass(frozen=True)
class Run:
    """A search. seconds: of its budget, that count."""

    label: str
    folder: Path
    seconds: float = math.inf


def run_of(text: str) -> Run:
    """LABEL=RUN_DIR or LABEL=RUN_DIR@SECONDS."""
    match = re.fullmatch(r"(.+?)=(.+?)(?:@([\d.]+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"LABEL=RUN_DIR[@SECONDS] is expected, but got {text!r}")
    return Run(match[1], Path(match[2]), float(match[3] or math.inf))


def of_run(run: Run) -> list[Artifact]:
    """The finalists of ``run``."""
    entries = list(read(run.folder / "record.jsonl"))
    early = [e for e, at in zip(entries, at_work(entries), strict=True) if at <= run.seconds]
    header = next(e for e in reversed(entries) if e["kind"] == "search")
    return [
        Artifact(
            run.label, f"{run.label} {e['digest'][:8]}", read_artifact(run.folder, e["digest"]),
            e["metric"], e["loss"],
        )
        for e in finalists(*full_results(header, early))
    ]  # fmt: skip


def interval(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """95% of the mean difference in points (normal, paired by test image); both [images]."""
    difference = 100 * (ours.astype(float) - theirs)
    error = 1.96 * difference.std() / len(difference) ** 0.5
    return float(difference.mean() - error), float(difference.mean() + error)


@dataclass(frozen=True)
class Measured:
    """speedup: over the teacher in float; hits: which test images it is right on."""

    artifact: Artifact
    speedup: float
    hits: np.ndarray
    int8: int


# What counts as the best of somebody, the greatest of this.
BY = {"metric": lambda a: a.metric, "loss": lambda a: -a.loss}


def best(of: list[Measured], limit: float, by: str) -> Measured | None:
    """What keeps ``limit``, the best by validation; of equals the fastest."""
    enough = [one for one in of if one.speedup >= KEEPS * limit]
    return max(enough, key=lambda one: (BY[by](one.artifact), one.speedup), default=None)


def verdict(ours: Measured | None, theirs: Measured | None) -> str:
    """Who wins on the test set, if anybody does."""
    if ours is None or theirs is None:
        return "nobody keeps it" if ours is theirs else f"{'they' if theirs else 'we'} alone"
    low, high = interval(ours.hits, theirs.hits)
    shown = f"{(low + high) / 2:+.2f} ({low:+.2f} to {high:+.2f})"
    return f"{shown}, {'**they win**' if high < 0 else 'we win' if low > 0 else 'no difference'}"


def session_of(runtime: Any, model: bytes) -> Session:
    loaded: Session = runtime.load(model)
    return loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", type=run_of, action="append", default=[], metavar="LABEL=RUN_DIR[@SECONDS]"
    )
    parser.add_argument("--artifacts", type=Path, default=HERE / "artifacts")
    parser.add_argument("--limits", type=float, nargs="+", default=list(LIMITS))
    parser.add_argument("--by", choices=BY, default="metric", help="what chooses for a limit")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(1)
    artifacts = [a for run in args.run for a in of_run(run)]
    artifacts += of_peers(args.artifacts)

    task = load_task("task.py:FashionMnist", EXAMPLE, {})
    test: Items = stack(task.test, "test")
    if len(test) != OFFICIAL:
        raise SystemExit(
            f"the official {OFFICIAL} test images must be on this disk, but found {len(test)} "
            "(see examples/fashion_mnist/README.md)"
        )
    runtime = make_runtime("onnxruntime", 1)
    prepared = prepare(task, runtime, Schedule())
    teacher = compress(prepared, Policy(), "recalibrate").model
    models = {TEACHER: teacher, **{a.name: a.model for a in artifacts}}
    sessions = {name: session_of(runtime, model) for name, model in models.items()}
    hits = {
        name: (run_session(s, test).argmax(1) == test.targets).numpy()
        for name, s in sessions.items()
    }
    request = {"input": prepared.example.numpy()}
    clock = CLOCKS[args.clock]
    timings = time_sessions(sessions, request, rounds=args.rounds, clock=clock)
    busy = args.clock == "wall" and disturbed(timings)
    if busy:
        print("the machine was too busy for these timings: run again, or with --clock cpu\n")
    report(args, artifacts, runtime, timings, hits, [run.label for run in args.run], busy)


def report(
    args: argparse.Namespace,
    artifacts: list[Artifact],
    runtime: Any,
    timings: dict[str, Timing],
    hits: dict[str, np.ndarray],
    labels: list[str],
    busy: bool,
) -> None:
    def latency(name: str) -> float:
        timing = timings[name]
        return timing.median_ms if args.clock == "wall" else timing.min_ms

    measured = [
        Measured(
            a, latency(TEACHER) / latency(a.name), hits[a.name],
            int8_layers(a.model, runtime),
        )
        for a in artifacts
    ]  # fmt: skip
    names = dict.fromkeys(m.artifact.whose for m in measured)  # in order
    whose = {w: [m for m in measured if m.artifact.whose == w] for w in names}
    accuracy = 100 * float(hits[TEACHER].mean())
    print(f"teacher: {latency(TEACHER):.4f} ms, {accuracy:.2f}%\n")
    print("| | speed-up | selection, % | lost on test | int8 layers | cost, CPU s |")
    print("|---|---|---|---|---|---|")
    own = hits[TEACHER].astype(float)
    for m in measured:
        lost = 100 * float(own.mean() - m.hits.mean())
        cost = f"{m.artifact.cpu_seconds:.0f}" if m.artifact.cpu_seconds is not None else ""
        print(
            f"| {m.artifact.name} | {m.speedup:.2f} | {m.artifact.metric:.2f} | {lost:.2f} | "
            f"{m.int8} | {cost} |"
        )
    print(f"\nA limit counts as kept from {100 * KEEPS:g}% of it on, for everybody.")
    print("\n| limit | " + " | ".join(whose) + " |\n|" + "---|" * (len(whose) + 1))
    chosen: dict[str, dict[str, Any]] = {}
    for limit in args.limits:
        picks = {name: best(some, limit, args.by) for name, some in whose.items()}
        cells = [
            f"{p.speedup:.2f}x at {100 * float(own.mean() - p.hits.mean()):.2f}"
            if p
            else f"missed ({max(m.speedup for m in whose[name]):.2f}x)"
            for name, p in picks.items()
        ]
        print(f"| {limit:g} | " + " | ".join(cells) + " |")
        chosen[f"{limit:g}"] = {n: p.artifact.name if p else None for n, p in picks.items()}
    for label in labels:
        print(f"\n{label} against (points on test, 95%):")
        for limit in args.limits:
            ours = best(whose.get(label, []), limit, args.by)
            others = [name for name in whose if name not in labels]
            says = {p: verdict(ours, best(whose[p], limit, args.by)) for p in others}
            print(f"  {limit:g}: " + "; ".join(f"{p} {said}" for p, said in says.items()))
    rows = [
        {
            "whose": m.artifact.whose, "name": m.artifact.name, "speedup": m.speedup,
            "metric_selection": m.artifact.metric, "metric_test": 100 * float(m.hits.mean()),
            "int8_layers": m.int8, "size_bytes": len(m.artifact.model),
            "cpu_seconds": m.artifact.cpu_seconds, "spread": timings[m.artifact.name].spread,
        }
        for m in measured
    ]  # fmt: skip
    figures = {
        "clock": args.clock, "by": args.by, "busy": busy, "rounds": args.rounds,
        "runs": [f"{r.label}={r.folder}@{r.seconds:g}" for r in args.run], "kept_from": KEEPS,
        "teacher": {"latency_ms": latency(TEACHER), "metric_test": accuracy},
        "artifacts": rows, "chosen": chosen,
    }  # fmt: skip
    print(f"\n{write('peers', figures)}")


if __name__ == "__main__":
    main()

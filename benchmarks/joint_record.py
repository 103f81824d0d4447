"""Adds trials to the recorded benchmark, as many as fit into the time.

    python benchmarks/joint_record.py --minutes 30

One process, one thread. What comes next depends on the table alone, so that it can be interrupted
and gone on with anywhere. Every policy climbs all rungs; every tenth does so with three seeds. Its
artifact is timed beside the teacher's at every rung, by the CPU time of the thread, so that other
work on the machine disturbs little: the ratio of the fastest rounds, the median of the three rungs.
"""

import argparse
import dataclasses
import json
import math
import random
import time
from functools import cache
from statistics import median
from typing import Any

import torch
from common import machine, versions
from joint_sensitivity import judged
from joint_surrogate import latencies, plan
from joint_table import FOLDER, TEACHER, Row, append, by_policy, read, space, spec, teacher

from flyweight.compressors import RUNGS, Candidate, Prepared, compress
from flyweight.kernels import Session, time_sessions
from flyweight.kernels.timing import TEACHER as SENTINEL
from flyweight.search.batch import BatchPredictor
from flyweight.search.limits import Limits
from flyweight.search.pareto import front
from flyweight.search.ready import RECIPES, prepare_task, request_of
from flyweight.search.warm import WarmStart
from flyweight.spaces import Impossible, Policy, Space

SOURCES = {"random": 0.15, "near": 0.75, "extreme": 0.1}  # 0.4, 0.45, 0.15 up to 85 policies
KINDS = {"both": 0.5, "prune": 0.3, "quantize": 0.2}  # of random and extreme policies
REPEATED = 10  # one policy in so many is tried with SEEDS seeds
SEEDS = 3
ROUNDS = 40
SOLVED = FOLDER / "solved.json"  # policies of the warm start, as a search of this space begins
SWEPT, DRAWN = 12, 28  # how many of them


def draw(of: Space, rng: random.Random, rows: list[Row]) -> tuple[str, Policy]:
    """The next policy and how it was drawn: everything at random; a few steps from a recipe, from a
    policy that was solved for or from a trial that none dominates so far; or most widths and
    precisions at an end."""
    source = _pick(rng, SOURCES)
    if source == "near":
        return source, _near(of, rng, rows)
    kind = _pick(rng, KINDS)
    values = {p.name: p.sample(rng) for p in of.parameters}
    if source == "extreme":
        narrow, int8 = rng.choice((0.0, 0.2, 0.8)), rng.choice((0.0, 0.1, 0.9, 1.0))
        for name, widths in of.widths.items():
            values[f"width/{name}"] = widths[0] if rng.random() < narrow else widths[-1]
        for name in of.precisions:
            values[f"precision/{name}"] = "int8" if rng.random() < int8 else "fp32"
    for name, widths in of.widths.items():
        if kind == "quantize":
            values[f"width/{name}"] = widths[-1]
    for name in of.precisions:
        if kind == "prune":
            values[f"precision/{name}"] = "fp32"
    return source, of.policy(_rounded(values))


def _near(of: Space, rng: random.Random, rows: list[Row]) -> Policy:
    whole = [row for row in rows if row.whole]
    points = [(row.rungs[RUNGS[-1]]["loss"], row.latency) for row in whole]
    ahead = [whole[i].policy for i in front(points)]
    recipes = [of.uniform(keep, p) for keep in RECIPES for p in ("fp32", "int8")]
    kinds = [some for some in (ahead, recipes, solved()) if some]
    policy = rng.choice(rng.choice(kinds))
    for _ in range(rng.randint(0, 4)):
        policy = rng.choice(list(of.neighbours(policy)))
    values = of.values(policy)
    good = of.values(rng.choice(ahead or recipes))
    for parameter in of.parameters:  # neighbours leave ranges alone
        if not parameter.choices:
            anew = rng.random() < 0.3
            values[parameter.name] = parameter.sample(rng) if anew else good[parameter.name]
    return of.policy(_rounded(values))


@cache
def solved() -> list[Policy]:
    """What ``Bench.solve`` wrote."""
    if not SOLVED.exists():
        return []
    return [Policy.from_dict(policy) for policy in json.loads(SOLVED.read_text())]


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in values.items()}


def _pick(rng: random.Random, shares: dict[str, float]) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def due(of: Space, rows: list[Row]) -> tuple[str, Policy, int]:
    """What comes after ``rows``: source, policy and seed."""
    tried = list(by_policy(rows))
    if tried and (len(tried) % REPEATED == 0) and len(tried[-1]) < SEEDS:
        last = tried[-1][-1]
        return last.source, last.policy, last.seed + 1
    known = {row.policy.digest for row in rows}
    rng = random.Random(f"joint {len(tried)}")
    while True:
        source, policy = draw(of, rng, rows)
        if policy.digest not in known:
            return source, policy, 0


class Bench:
    """The task prepared, all that policies share worked out, the teacher's artifact loaded."""

    def __init__(self) -> None:
        self.prepared: Prepared = prepare_task(spec())
        for variant in range(self.prepared.variants):
            self.prepared.epoch(variant)
        for criterion in spec().space.prune.criteria:
            self.prepared.importance("pruned", criterion)
        self.prepared.input_moments("pruned")
        self.teacher = compress(self.prepared, Policy(), "full")
        self.request = request_of(spec(), self.prepared)
        self._session: Session = self.prepared.runtime.load(self.teacher.model)

    def describe(self) -> None:
        """Writes the teacher's figures."""
        _, latency_ms = self.timed(self.teacher.model)
        figures = {
            "metric_search": compress(self.prepared, Policy(), "recalibrate").metric,
            "metric_selection": self.teacher.metric,
            "latency_ms": latency_ms,
            "size_bytes": len(self.teacher.model),
            "machine": machine(),
            "versions": versions(("flyweight", "torch", "onnxruntime")),
        }
        TEACHER.write_text(json.dumps(figures, indent=1) + "\n")

    def solve(self, rows: list[Row]) -> None:
        """Writes policies of the warm start, their latencies predicted from ``rows``."""
        table, _ = judged()
        priced = latencies(rows, [plan(row.policy) for row in rows])
        batch = BatchPredictor(self.prepared, space(), priced)
        limits = Limits(float(teacher()["metric_selection"]), 1.0)
        start, rng = WarmStart(space(), table, batch, limits), random.Random("solved")
        policies = start.sweep(SWEPT)
        drawn = [start.draw(rng) for _ in range(DRAWN)]
        policies += [space().policy({**start.settings, **v}) for v in drawn if v is not None]
        lines = [policy.canonical() for policy in dict.fromkeys(policies)]
        SOLVED.write_text("[\n" + ",\n".join(lines) + "\n]\n")

    def timed(self, model: bytes) -> tuple[float, float]:
        """The latency of ``model`` as a share of the teacher's, and the teacher's in ms."""
        sessions = {SENTINEL: self._session, "model": self.prepared.runtime.load(model)}
        found = time_sessions(sessions, self.request, rounds=ROUNDS, clock=time.thread_time_ns)
        return found["model"].min_ms / found[SENTINEL].min_ms, found[SENTINEL].min_ms

    def trial(self, source: str, policy: Policy, seed: int) -> Row:
        row = Row(policy, source, seed)
        candidate: Candidate | None = None
        rungs: dict[str, dict[str, float]] = {}
        try:
            latencies = []
            for rung in RUNGS:
                began = time.process_time()
                candidate = compress(self.prepared, policy, rung, candidate, seed)
                seconds = time.process_time() - began
                figures = {"loss": candidate.loss, "metric": candidate.metric, "seconds": seconds}
                if not all(map(math.isfinite, figures.values())):
                    raise Impossible(f"{rung}: {figures}")
                rungs[rung] = figures
                latencies.append(self.timed(candidate.model)[0])
        except Impossible as error:
            return dataclasses.replace(row, rungs=rungs, error=str(error).splitlines()[0])
        assert candidate is not None
        size = len(candidate.model)
        return dataclasses.replace(row, rungs=rungs, latency=median(latencies), size_bytes=size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    ends = time.monotonic() + 60 * parser.parse_args().minutes
    torch.set_num_threads(1)
    bench, rows = Bench(), read()
    if not TEACHER.exists():
        bench.describe()
    if not SOLVED.exists():
        bench.solve([row for row in rows if row.whole])
    while time.monotonic() < ends:
        row = bench.trial(*due(space(), rows))
        append(row)
        rows.append(row)
        full = row.rungs.get(RUNGS[-1], {})
        print(
            f"{len(rows)} trials, {len(list(by_policy(rows)))} policies: {row.source} {row.kind}, "
            f"latency {row.latency:.3f}, {full or row.error}",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Search methods on the surrogate of the recorded benchmark, at equal cost, over seeds.

    python benchmarks/joint_compare.py [--methods joint random ...] [--seeds 20] [--cost 64]
        [--speedup 1] [--without-solved] [--timings half]

The production controller and strategies run on a simulated clock with one worker. The cost is in
trials that climb all rungs; it includes what the controller and its solver take, and for methods
that begin with the warm start the sensitivity table and a device profile of as many networks as
the predictor is fitted to. What counts is the hypervolume of (latency, points lost) up to the
teacher's latency (or that divided by the speed-up asked for) and 5 points, as a share of the
reference front's: the best that a long search of the surrogate without noise finds. A method sees
noisy results: its front is what seems non-dominated to it, with its true points.

The recorded trials lean towards what the warm start proposes, whose policies some were drawn near:
--without-solved fits the surrogate without these. And the solver knows the very predictor that
scores it: with --timings half, methods have one fitted to every other policy.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import moocore
import numpy as np
import torch
from common import write
from joint_optuna import RayOptuna
from joint_record import ROUNDS, solved
from joint_sensitivity import judged
from joint_surrogate import Surrogate, latencies, plan
from joint_table import Row, by_policy, read, space, spec

from flyweight.compressors import RUNGS, untrained
from flyweight.kernels import LatencyPredictor, time_sessions
from flyweight.kernels.timing import TEACHER
from flyweight.search.batch import BatchPredictor
from flyweight.search.controller import Budget, Controller, Price
from flyweight.search.limits import Limits
from flyweight.search.pareto import Point, front
from flyweight.search.ready import RECIPES, prepare_task, request_of
from flyweight.search.record import Entry, MemoryRecord
from flyweight.search.sensitivity import Sensitivity
from flyweight.search.simulate import Clock, simulate
from flyweight.search.strategies import source
from flyweight.search.trial import Trial
from flyweight.search.warm import WarmStart
from flyweight.spaces import Policy

MOST_DROP = 5.0  # points of the metric
ENOUGH = 0.95  # of the reference hypervolume
TRIALS_A_COST = 2.4  # that a search with rungs makes, most of which are stopped early
MOST_TRIALS = 100_000  # the cost ends a search
SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # of the cost, at which the curve is read
NEAR = 4  # axes in which a row that was drawn near a policy may differ from it (joint_record.py)
STEPS = 64  # into which the cost is divided for a drawing
PROFILED = 8  # networks whose cost in a device profile is measured


@dataclass(frozen=True)
class Bench:
    """What methods are compared on. table: the sensitivity of the network itself. prepared_s: the
    CPU seconds that it and the device profile took, which a method that uses them pays. predictor:
    what methods believe of latency. timer: seconds that a controller takes pass by it."""

    surrogate: Surrogate
    predictor: LatencyPredictor
    batch: BatchPredictor
    table: Sensitivity
    prepared_s: float
    limits: Limits
    timer: Callable[[], float] = lambda: 0.0

    @classmethod
    def of(
        cls,
        surrogate: Surrogate,
        speedup: float = 1.0,
        predictor: LatencyPredictor | None = None,
        timer: Callable[[], float] = lambda: 0.0,
    ) -> Self:
        """Without a ``timer`` what methods decide takes no time, and is the same each time."""
        known = predictor or surrogate.predictor
        table, seconds = judged()
        seconds += profiled(surrogate.rows)
        batch = BatchPredictor(prepare_task(spec()), space(), known)
        metric = float(surrogate.teacher["metric_selection"])
        limits = Limits(metric, 1 / speedup, MOST_DROP)
        return cls(surrogate, known, batch, table, seconds, limits, timer)

    @property
    def latency(self) -> float:
        """That of the reference point."""
        assert self.limits.latency_ms is not None
        return self.limits.latency_ms

    def price(self, policy: Policy) -> Price:
        size = self.surrogate.size_bytes(policy)
        ends = self.surrogate.latency(policy)
        if self.predictor is not self.surrogate.predictor:
            low, middle, high = self.predictor.predict([plan(policy)])[0].tolist()
            ends = low, middle, high
        return Price(ends, size, size)

    def warm_start(self, draws: bool) -> WarmStart:
        """draws: whether it goes on to be asked after its sweep."""
        kind = WarmStart if draws else SweepAlone
        return kind(space(), self.table, self.batch, self.limits)


def profiled(rows: list[Row]) -> float:
    """CPU seconds to build and time as many networks as ``rows`` has policies, as some take."""
    prepared, policies = prepare_task(spec()), [same[0].policy for same in by_policy(rows)]
    load = prepared.runtime.load
    teacher, request = load(untrained(prepared, Policy())), request_of(spec(), prepared)
    began = time.process_time()
    for policy in policies[:PROFILED]:
        sessions = {TEACHER: teacher, "model": load(untrained(prepared, policy))}
        time_sessions(sessions, request, rounds=ROUNDS, clock=time.thread_time_ns)
    return (time.process_time() - began) * len(policies) / PROFILED


def without_solved(rows: list[Row]) -> list[Row]:
    """Those that differ from every policy of ``solved.json`` on more than ``NEAR`` axes."""
    points = np.array([space().point(policy) for policy in solved()])
    return [r for r in rows if ((points != space().point(r.policy)).sum(1) > NEAR).all()]


class SweepAlone(WarmStart):
    """A warm start that only is one."""

    def draw(self, *_: object) -> None:
        return None


class Patient(Controller):
    """Every trial climbs all rungs."""

    def _through(self, _: Entry) -> str | None:
        return "rank"


class Unheeded(Controller):
    """Nothing is decided at one rung, nor learned from it. It is paid all the same: what it does
    the next rung goes on from."""

    rung: str

    def _through(self, entry: Entry) -> str | None:
        return "rank" if entry["rung"] == self.rung else super()._through(entry)

    def _learn(self, trial: Trial, entry: Entry) -> None:
        if entry["rung"] != self.rung:
            super()._learn(trial, entry)


class WithoutRecalibrate(Unheeded):
    rung = "recalibrate"


class WithoutShort(Unheeded):
    rung = "short"


# Seed, bench, clock and cost in trials that climb all rungs: a search that has not begun.
Method = Callable[[int, Bench, Clock, float], Controller]


def searching(
    strategy: str,
    *,
    sampler: str = "tpe",
    rungs: bool = True,
    warm: bool = True,
    draws: bool = True,
    recipes: bool = True,
    kind: type[Controller] = Controller,
) -> Method:
    """A strategy of ``flyweight search``, with rungs, as ``kind`` has them, or without; warm,
    recipes: what ``joint`` and ``solver`` begin with; draws: whether ``joint`` goes on to draw
    from the warm start."""

    def method(seed: int, bench: Bench, clock: Clock, cost: float) -> Controller:
        trials = round(cost * (TRIALS_A_COST if rungs else 1))
        start, began = None, bench.timer()
        if warm and strategy in ("joint", "solver"):
            start = bench.warm_start(draws)
            clock.now += bench.prepared_s
        common = [space().uniform(keep, p) for keep in RECIPES for p in ("int8", "fp32")]
        asked = source(strategy, space(), sampler, seed, trials, start, common if recipes else ())
        clock.now += bench.timer() - began
        seconds = cost * bench.surrogate.trial_seconds - clock.now
        made = kind if rungs else Patient
        return made(
            asked, bench.price, bench.limits, MemoryRecord(),
            Budget(MOST_TRIALS, seconds), clock=clock,
        )  # fmt: skip

    return method


def ray_optuna(seed: int, bench: Bench, clock: Clock, cost: float) -> Controller:
    """Ray's OptunaSearch: every policy is trained whole."""
    return Patient(
        RayOptuna(space(), seed), bench.price, bench.limits, MemoryRecord(),
        Budget(MOST_TRIALS, cost * bench.surrogate.trial_seconds), clock=clock,
    )  # fmt: skip


METHODS: dict[str, Method] = {
    "joint": searching("joint"),  # what `flyweight search` does
    "joint without draws": searching("joint", draws=False),
    "joint without warm start": searching("joint", warm=False),
    "joint without rungs": searching("joint", rungs=False),
    "joint without recalibrate": searching("joint", kind=WithoutRecalibrate),
    "joint without short": searching("joint", kind=WithoutShort),
    "solver": searching("solver"),
    "sequential": searching("sequential"),
    "uniform": searching("uniform"),
    "TPE": searching("joint", rungs=False, warm=False, recipes=False),
    "TPE with rungs": searching("joint", warm=False, recipes=False),
    "Ray's OptunaSearch": ray_optuna,
    "random": searching("random", rungs=False),
    "random with rungs": searching("random"),
}


def hypervolume(points: list[Point], latency: float = 1.0) -> float:
    """Of (latency, points lost), up to ``latency`` and ``MOST_DROP``."""
    inside = [p for p in points if p[0] < latency and p[1] < MOST_DROP]
    if not inside:
        return 0.0
    return float(moocore.hypervolume(np.array(inside), ref=[latency, MOST_DROP]))


def true_point(surrogate: Surrogate, policy: Policy) -> Point:
    return surrogate.latency(policy)[1], surrogate.drop(policy)


def run(
    method: Method, seed: int, bench: Bench, cost: float
) -> tuple[list[tuple[float, float]], dict[str, int]]:
    """[(cost, hypervolume)] as the front grows, and how many trials finished each rung."""
    surrogate, clock = bench.surrogate, Clock()
    unit = surrogate.trial_seconds
    control = method(seed, bench, clock, cost)

    def evaluate(policy: Policy, rung: str) -> tuple[Entry | None, float]:
        found = surrogate.trial(policy, seed)[rung]
        size = surrogate.size_bytes(policy)
        entry = {"loss": found["loss"], "metric": found["metric"], "error": None}
        return entry | {"size_bytes": size, "compressed_bytes": size}, found["seconds"]

    simulate(control, evaluate, 1, clock, bench.timer)
    curve: list[tuple[float, float]] = []
    seen: list[Entry] = []
    for entry in control.results(RUNGS[-1]):
        seen.append(entry)
        ahead = front([(-e["metric"], e["latency_ms"][1]) for e in seen])
        points = [true_point(surrogate, Policy.from_dict(seen[i]["policy"])) for i in ahead]
        curve.append((entry["time"] / unit, hypervolume(points, bench.latency)))
    return curve, {rung: len(control.results(rung)) for rung in RUNGS}


def reference(surrogate: Surrogate, rounds: int = 100, each: int = 200) -> list[Policy]:
    """The front of a long search without noise: steps from what is non-dominated, and others."""
    rng = random.Random("reference")
    rows = surrogate.rows
    known = list({r.policy.digest: r.policy for r in rows}.values())
    ahead: list[Policy] = known
    for _ in range(rounds):
        tried = [_step(rng.choice(ahead), rng, rng.choice(ahead)) for _ in range(each)]
        surrogate.learn(tried)
        both = list(dict.fromkeys([*ahead, *tried]))
        points = [true_point(surrogate, policy) for policy in both]
        ahead = [both[i] for i in front([(drop, latency) for latency, drop in points])]
    return ahead


def _step(policy: Policy, rng: random.Random, other: Policy) -> Policy:
    """Some parameters from ``other``, a few drawn anew."""
    mine, theirs = space().values(policy), space().values(other)
    share = rng.choice((0.0, 0.2, 0.5))
    values = {k: theirs[k] if k in theirs and rng.random() < share else v for k, v in mine.items()}
    for parameter in rng.sample(space().parameters, rng.randint(1, 4)):
        values[parameter.name] = parameter.sample(rng)
    return space().policy(values)


def at(curve: list[tuple[float, float]], cost: float) -> float:
    """The hypervolume that was reached with ``cost``."""
    return next((v for c, v in reversed(curve) if c <= cost), 0.0)


def reached(curve: list[tuple[float, float]], volume: float) -> float:
    """The cost from which on at least ``volume`` was reached; infinite if it never was."""
    return next((c for c, v in curve if v >= volume), float("inf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--cost", type=float, default=64.0, help="in trials that climb all rungs")
    parser.add_argument("--speedup", type=float, default=1.0)
    parser.add_argument("--without-solved", action="store_true")
    parser.add_argument("--timings", choices=("all", "half"), default="all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = read()
    if args.without_solved:
        rows = without_solved(rows)
    surrogate, predictor = Surrogate(rows), None
    if args.timings == "half":
        some = [row for same in list(by_policy(surrogate.rows))[::2] for row in same]
        predictor = latencies(some, [plan(row.policy) for row in some])
    bench = Bench.of(surrogate, args.speedup, predictor, time.thread_time)
    best = reference(surrogate)
    whole = hypervolume([true_point(surrogate, policy) for policy in best], bench.latency)
    print(
        f"{len(surrogate.rows)} trials recorded; reference: {len(best)} policies, hypervolume "
        f"{whole:.3f}; the sensitivity table and the device profile cost "
        f"{bench.prepared_s / surrogate.trial_seconds:.2f} trials\n"
    )
    costs = [share * args.cost for share in SHARES]
    heads = "".join(f" {cost:g} |" for cost in costs)
    print(f"| method |{heads} reaches {ENOUGH:.0%} at | trials |\n|" + "---|" * (len(costs) + 3))
    grid = [args.cost * step / STEPS for step in range(1, STEPS + 1)]
    figures: dict[str, Any] = {"reference": whole, "grid": grid} | vars(args)
    for name in args.methods:
        runs = [run(METHODS[name], seed, bench, args.cost) for seed in range(args.seeds)]
        curves = [curve for curve, _ in runs]
        shares = [[at(curve, cost) / whole for curve in curves] for cost in costs]
        ends = [reached(curve, ENOUGH * whole) for curve in curves]
        counts = [statistics.mean(n[rung] for _, n in runs) for rung in RUNGS]
        cells = [*map(quartiles, shares), told(ends), " / ".join(f"{n:.0f}" for n in counts)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        anytime = [[at(curve, cost) / whole for curve in curves] for cost in grid]
        figures[name] = {
            "shares": shares, "reached": ends, "trials": counts, "anytime": anytime,
        }  # fmt: skip
    print(write(named(args), figures))


def named(args: argparse.Namespace) -> str:
    """The file of figures: runs of other methods, costs or tables lie beside each other."""
    methods = "all" if args.methods == list(METHODS) else "+".join(args.methods)
    name = f"joint_compare-{methods}-{args.cost:g}-{args.seeds}-{args.speedup:g}"
    name += "-without_solved" * args.without_solved + "-half" * (args.timings == "half")
    return name.replace(" ", "_").replace("'", "")


def quartiles(values: list[float]) -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.1%} ({low:.1%}-{high:.1%})"


def told(ends: list[float]) -> str:
    """The median cost, where more than half got there, and how many did."""
    good = sum(map(np.isfinite, ends))
    middle = statistics.median(ends)
    return (
        f"{middle:.0f} ({good} of {len(ends)})" if np.isfinite(middle) else f"{good} of {len(ends)}"
    )


if __name__ == "__main__":
    main()

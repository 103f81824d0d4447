"""What the controller costs as a search grows: thousands of trials on simulated workers.

The production classes (controller, the strategy with its warm start, climbs, a record in a file)
run on a simulated clock; only the work is made up, the price of a policy, and what the warm start
knows: the sensitivity table, and the timings in the device profile. The processor seconds that
the controller really takes pass on that clock, one call at a time, so that workers wait for it as
they would for a driver that has a core of its own (the machine may be shared). Ray's own work,
MLflow and the live display are not in it (overhead.py), nor is pricing, which looks ahead on a
thread of its own; so does the solver in a search, but here it is in it.

    python benchmarks/scale.py [--trials 5000] [--workers 200] [--strategy joint] [--sampler tpe]
        [--minutes 1.5] [--layers 24]
"""

import argparse
import os
import random
import resource
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from common import write

from flyweight.compressors import RUNGS, Prepared
from flyweight.kernels import DeviceProfile, LatencyPredictor, Timed, signature
from flyweight.kernels.signature import digest
from flyweight.search.batch import BatchPredictor
from flyweight.search.controller import Budget, Controller, Price
from flyweight.search.limits import Limits
from flyweight.search.record import Entry, FileRecord
from flyweight.search.sensitivity import Sensitivity, axes_of
from flyweight.search.simulate import Clock, simulate
from flyweight.search.strategies import source
from flyweight.search.warm import WarmStart
from flyweight.spaces import (
    Capabilities,
    Group,
    Layer,
    Network,
    Op,
    Policy,
    Settings,
    Space,
    blueprint,
)

LAYERS = 24
WEIGHTS = dict(zip(RUNGS, (1.0, 3.0, 30.0), strict=True))  # of work
SHARES = dict(zip(RUNGS, (1.0, 0.5, 0.125), strict=True))  # of trials that reach a rung, about
DEATHS = 0.01  # share of rungs in which a worker dies
BAND = 100  # trials over which a cost is averaged
TIMED = 256  # networks in the device profile
LIMITS = Limits(90.0, latency_ms=0.6, max_drop=2.0)


class Chain:
    """Convolutions in a row, of 32 channels to 256: what they may become, cost and lose."""

    def __init__(self, layers: int) -> None:
        self.widths = {f"body.{i}": 32 * 2 ** (4 * i // layers) for i in range(layers)}

    def space(self) -> Space:
        """Width and precision of each, and how the whole is distilled."""
        both = ("fp32", "int8")
        ops = [Op("x", "input", "x", (), "", (1, 3, 8, 8), ((None, 3),))]
        layers, before, inputs = {}, 3, "x"
        for name, width in self.widths.items():
            shape = (1, width, 8, 8)
            ops.append(Op(name, "conv", "Conv2d", (inputs,), name, shape, ((name, width),)))
            layers[name] = Layer(name, "conv", name, before, width, (3, 3), (1, 1), 1, name, 1, 1)
            before, inputs = width, name
        groups = {name: Group(name, width, (name,), 1) for name, width in self.widths.items()}
        network = Network(tuple(ops), layers, groups, ("x",), inputs)
        target = Capabilities({"conv": both, "linear": both}, width_multiple=8)
        return Space(network, target, Settings(min_keep=0.125))

    def kept(self, policy: Policy) -> float:
        shares = [policy.prune.width.get(name, w) / w for name, w in self.widths.items()]
        return sum(shares) / len(shares)

    def price(self, policy: Policy) -> Price:
        ms, before = 0.0, 1.0  # 1 untouched; a layer takes some time however narrow it is
        for name, width in self.widths.items():
            share = policy.prune.width.get(name, width) / width
            int8 = policy.quantize.precision.get(name) == "int8"
            ms += (0.2 + 0.8 * before * share) * (0.5 if int8 else 1.0) / len(self.widths)
            before = share
        size = int(1e6 * ms)
        return Price((0.95 * ms, ms, 1.05 * ms), size, size)

    def warm_start(self, space: Space) -> WarmStart:
        """From a table, and a device profile of policies at random."""
        network, target, rng = space.network, space.capabilities, random.Random(0)
        harm = {
            axis.name: {
                choice: 0.01 * (choice == "int8")
                if isinstance(choice, str)
                else (1 - choice / axis.choices[-1]) ** 2
                for choice in axis.choices
            }
            for axis in axes_of(space)
        }
        count = sum(map(len, harm.values()))
        table = Sensitivity(harm, {}, dict.fromkeys(space.networks, 0.0), count, count)
        drawn = [Policy(), *(space.sample(rng) for _ in range(TIMED))]
        timed = [
            Timed(signature(blueprint(network, p, target)), self.price(p).latency_ms[1], 1.0, 0, "")
            for p in drawn
        ]
        profile = DeviceProfile({}, "", {}, digest(timed[0].counts), timed)
        start = SimpleNamespace(network=network)
        prepared = SimpleNamespace(
            runtime=SimpleNamespace(capabilities=target), start=lambda _: start
        )
        batch = BatchPredictor(cast(Prepared, prepared), space, LatencyPredictor(profile))
        return WarmStart(space, table, batch, LIMITS)

    def work(self, policy: Policy, rung: str, second: float) -> tuple[Entry | None, float]:
        """The smaller, the more it loses; a rung says what the next will up to noise."""
        rng = random.Random(f"{policy.digest}/{rung}")
        cost, noise = self.price(policy), (0.4, 0.2, 0.05)[RUNGS.index(rung)]
        loss = (1.5 - self.kept(policy)) ** 2 + 0.1 * policy.quantize.qat + rng.gauss(0.0, noise)
        seconds = second * WEIGHTS[rung] * rng.lognormvariate(0.0, 0.3)
        if rng.random() < DEATHS:
            return None, seconds
        figures = {"loss": loss, "metric": LIMITS.teacher_metric - loss, "samples": 1000}
        sizes = {"size_bytes": cost.size_bytes, "compressed_bytes": cost.compressed_bytes}
        return {**figures, **sizes, "macs": 10**9, "parity": None, "error": None}, seconds


def resident_kb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1024


def run(
    trials: int,
    workers: int,
    strategy: str,
    sampler: str,
    minutes: float,
    layers: int = LAYERS,
) -> dict[str, Any]:
    """minutes: what a trial takes a worker, on average over those that are stopped early too."""
    chain = Chain(layers)
    space = chain.space()
    second = 60 * minutes / sum(SHARES[rung] * WEIGHTS[rung] for rung in RUNGS)
    memory: list[float] = []  # at the beginning of each trial

    def evaluate(policy: Policy, rung: str) -> tuple[Entry | None, float]:
        if rung == RUNGS[0]:
            memory.append(resident_kb())
        return chain.work(policy, rung, second)

    with tempfile.TemporaryDirectory() as folder:
        record, clock = FileRecord(Path(folder) / "record.jsonl"), Clock()
        warm = chain.warm_start(space) if strategy == "joint" else None
        proposals = source(strategy, space, sampler, 0, trials, warm, ())
        budget = Budget(trials, seconds=1e9)
        control = Controller(proposals, chain.price, LIMITS, record, budget, clock=clock)
        began = time.perf_counter()
        outcome = simulate(control, evaluate, workers, clock, time.thread_time)
        real = time.perf_counter() - began
        record.close()
    bands = []
    for end in sorted({min(n, trials) for n in (BAND, 500, 1000, 2000, 3000, 4000, 5000, trials)}):
        costs = [outcome.controller_s[n] for n in range(end - BAND, end)]
        bands.append({"trial": end, "controller_ms": 1e3 * sum(costs) / len(costs)})
    counts = {rung: len(control.results(rung)) for rung in RUNGS}
    first = min(500, trials // 2)  # by then everything is imported, and the studies are full
    return {
        "trials": trials, "workers": workers, "strategy": strategy, "sampler": sampler,
        "results": counts,
        "parameters": len(space.parameters),
        "trial_worker_s": outcome.busy_s / trials, "idle": outcome.idle,
        "simulated_s": outcome.seconds, "real_s": real, "bands": bands,
        "memory_kb_per_trial": (memory[-1] - memory[first]) / (len(memory) - 1 - first),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--strategy", choices=("joint", "random"), default="joint")
    parser.add_argument("--sampler", choices=("tpe", "random"), default="tpe")
    parser.add_argument("--minutes", type=float, default=1.5, help="of a worker for a trial")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the network")
    args = parser.parse_args()
    figures = run(args.trials, args.workers, args.strategy, args.sampler, args.minutes, args.layers)
    print(f"| up to trial | controller, ms a trial (the last {BAND}) |\n|---|---|")
    for band in figures["bands"]:
        print(f"| {band['trial']} | {band['controller_ms']:.1f} |")
    print(
        f"\n{args.trials} trials of {figures['parameters']} parameters ({args.strategy}) on "
        f"{args.workers} workers, results {figures['results']}: "
        f"idle {figures['idle']:.2%} with {figures['trial_worker_s']:.0f} s of work a trial; "
        f"memory {figures['memory_kb_per_trial']:.1f} KB a trial; "
        f"{figures['simulated_s'] / 3600:.1f} simulated hours took {figures['real_s']:.0f} s"
    )
    print(write(f"scale-{args.trials}-{args.strategy}-{args.layers}", figures))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

"""What Tune, Optuna, the record and MLflow cost together, against bare Ray Tune.

All sides run the same no-op trials, side by side: the same trainable, as many trials, as many
reports in each, the same concurrency. Bare is Ray Tune with its own random search over one number,
once as it is installed, writing its own logs of every trial as it does for anyone, and once
stripped of them by the switches that flyweight sets. flyweight is its own controller, record,
tracker and sampler, on the space of the reference network. A run is a fresh process; its seconds
are those of Tune's ``fit`` alone, after a warm-up.

    python benchmarks/overhead.py [--trials 2000] [--rounds 3] [--parts] [--profile]
"""

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import OUT, machine, versions, write
from no_op import make_controller, no_op

CONCURRENCY = 2
WARM_UP = 4  # trials
LIMIT = 1.25  # times bare
INSTALLED, STRIPPED = "Tune as installed", "Tune stripped"
# What flyweight.search sets, turned back to what Tune does for anyone.
AS_INSTALLED = {
    "RAY_AIR_NEW_OUTPUT": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "0",
}
PARTS = ("no MLflow", "no record file", "no TPE")  # flyweight without one of its parts


class Each:
    """One step count after another, for as many trials."""

    def __init__(self, steps: list[int]) -> None:
        self.left = list(steps)

    def __call__(self, _: Any) -> int:
        return self.left.pop(0)


def bare(steps: list[int]) -> dict[str, Any]:
    """Ray Tune alone: a trial for each number of ``steps``."""
    from ray import tune

    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            tune.with_resources(no_op(), {"cpu": 1}),
            param_space={"x": tune.uniform(0.0, 1.0), "steps": tune.sample_from(Each(steps))},
            tune_config=tune.TuneConfig(
                num_samples=len(steps), max_concurrent_trials=CONCURRENCY, reuse_actors=True
            ),
            run_config=tune.RunConfig(name="trials", storage_path=folder, verbose=0),
        )
        with Stopwatch() as watch:
            found = tuner.fit()
    taken = [found[i].metrics["training_iteration"] for i in range(len(found))]
    return watch.figures() | {"steps": taken}


def flyweight(trials: int, without: str, profile: Path | None) -> dict[str, Any]:
    """The search's own machinery around ``trials`` no-op trials."""
    from flyweight.search.record import FileRecord, MemoryRecord
    from flyweight.search.tracking import MemoryTracker
    from flyweight.search.tracking_process import TrackerProcess
    from flyweight.search.tuning import run_trials

    sampler = "random" if without == "no TPE" else "tpe"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record: Any = FileRecord(folder / "record.jsonl")
        if without == "no record file":
            record = MemoryRecord()
        tracker: Any = MemoryTracker()
        if without != "no MLflow":
            place = (f"sqlite:///{folder}/mlflow.db", "overhead", (folder / "files").as_uri())
            tracker = TrackerProcess(*place, secrets.token_hex(8))
            tracker.wait_run_id(120.0)  # importing MLflow and making a database: once a search

        def listen(entry: dict[str, Any]) -> None:  # as the driver does
            if entry["kind"] not in ("begin", "rejected"):
                tracker.record(entry)

        controller = make_controller(trials, record, listen, sampler)
        with Stopwatch(profile) as watch:
            resources = {"cpu": 1.0}
            run_trials(controller, no_op(), concurrency=CONCURRENCY, resources=resources)
        began = time.perf_counter()
        missing = tracker.finish("FINISHED", timeout_s=300.0)
        finish_s = time.perf_counter() - began
    odd = {t.ended for t in controller.trials.values()} - {"finished", "stopped"}
    if odd or controller.fatal or len(controller.trials) != trials:
        raise SystemExit(f"not a search like any: trials ended {odd}, {controller.fatal}")
    reached = [len(trial.results) for trial in controller.trials.values()]
    lacking = {"finish_s": finish_s, "undelivered": missing.entries, "why": missing.reason}
    return watch.figures() | {"steps": reached} | lacking


class Stopwatch:
    """Wall seconds, and the seconds that this process, the driver, had a core."""

    def __init__(self, profile: Path | None = None) -> None:
        import cProfile

        self._path, self._profile = profile, cProfile.Profile() if profile else None

    def __enter__(self) -> "Stopwatch":
        self._began = time.perf_counter(), time.process_time()
        if self._profile:
            self._profile.enable()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended = time.perf_counter(), time.process_time()
        if self._profile:
            self._profile.disable()
            self._profile.dump_stats(str(self._path))

    def figures(self) -> dict[str, float]:
        wall, cpu = (b - a for a, b in zip(self._began, self._ended, strict=True))
        return {"fit_s": wall, "driver_cpu_s": cpu}


def one_run(job: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: what ``job`` asks for, on a Ray of its own."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        bare([1] * WARM_UP)
        if job["side"] in (INSTALLED, STRIPPED):
            return bare(job["steps"])
        profile = Path(job["profile"]) if job["profile"] else None
        return flyweight(job["trials"], job["side"], profile)
    finally:
        ray.shutdown()


def fresh(side: str, trials: int, steps: list[int], profile: Path | None = None) -> dict[str, Any]:
    """``one_run`` in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        job = {"side": side, "trials": trials, "steps": steps, "answer": str(answer)}
        job["profile"] = str(profile) if profile else None
        command = [sys.executable, str(Path(__file__).resolve()), "--job", json.dumps(job)]
        changes = AS_INSTALLED if side == INSTALLED else {}
        # Ray puts the working directory on its workers' path: not the repository.
        subprocess.run(command, check=True, cwd=folder, env=os.environ | changes)
        figures: dict[str, Any] = json.loads(answer.read_text())
    return figures | {"side": side, "load": round(os.getloadavg()[0], 2)}


def report(runs: list[dict[str, Any]], trials: int) -> dict[str, Any]:
    """Prints the table; the figures that the claim is about."""
    by = {side: [r for r in runs if r["side"] == side] for side in {r["side"]: None for r in runs}}
    first = by["flyweight"]
    print(f"\n{'fit, seconds':18}", *(f"round {i + 1:<2}" for i in range(len(first))), end="")
    print(
        f" {'median':>8} {'ms/trial':>9} {'driver CPU ms/trial':>20} {'flyweight is (range)':>24}"
    )
    summary = {}
    for side, rows in by.items():
        seconds = [r["fit_s"] for r in rows]
        ratios = [a["fit_s"] / b["fit_s"] for a, b in zip(first, rows, strict=True)]
        middle = statistics.median(seconds)
        ratio = statistics.median(r["fit_s"] for r in first) / middle
        cpu = statistics.median(r["driver_cpu_s"] for r in rows) * 1e3 / trials
        print(f"{side:18}", *(f"{s:8.2f}" for s in seconds), end="")
        span = f"{ratio:.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f" {middle:8.2f} {middle * 1e3 / trials:9.1f} {cpu:20.1f} {span:>24}")
        summary[side] = {
            "median_s": middle, "ms_per_trial": middle * 1e3 / trials,
            "driver_cpu_ms_per_trial": cpu, "flyweight_is": ratio, "ratios": ratios,
        }  # fmt: skip
    finish = statistics.median(r["finish_s"] for r in first)
    lost = sum(r["undelivered"] for r in first)
    print(f"Until MLflow had everything: {finish:.2f} s more; entries MLflow lacks: {lost}")
    claims = {}
    for side in (INSTALLED, STRIPPED):
        ratio = summary[side]["flyweight_is"]
        verdict = "kept" if ratio <= LIMIT else "missed"
        with_finish = (summary["flyweight"]["median_s"] + finish) / summary[side]["median_s"]
        claims[side] = {"limit": LIMIT, "ratio": ratio, "verdict": verdict}
        claims[side]["ratio_with_finish"] = with_finish
        print(f"At most {LIMIT} times {side}: {verdict} ({ratio:.2f}; {with_finish:.2f} with that)")
    return {"claims": claims, "finish_s": finish, "summary": summary}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", action="store_true", help="also without each part of it")
    parser.add_argument("--profile", action="store_true", help="also profile the driver, untimed")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        Path(job["answer"]).write_text(json.dumps(one_run(job)))
        return
    import flyweight.search  # noqa: F401 (Ray's switches in the environment, for both sides)

    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # before anything imports Ray
    here = machine()
    print(f"{here['name']}, {here['cores']} cores, load {here['load']}")
    print(", ".join(f"{name} {number}" for name, number in versions().items()))
    print(f"{options.trials} trials, {CONCURRENCY} at a time")
    runs: list[dict[str, Any]] = []
    for number in range(options.rounds):
        steps: list[int] = []
        for side in ("flyweight", INSTALLED, STRIPPED, *(PARTS if options.parts else ())):
            found = fresh(side, options.trials, steps)
            steps = steps or found["steps"]  # Tune alone takes as many as flyweight just took
            if side in (INSTALLED, STRIPPED) and sorted(found["steps"]) != sorted(steps):
                raise SystemExit(f"the sides differ: {sum(found['steps'])} and {sum(steps)} steps")
            runs.append(found)
            print(
                f"round {number + 1}, {side}: {found['fit_s']:.2f} s, {sum(found['steps'])} "
                f"reports, load {found['load']}",
                flush=True,
            )
    figures = report(runs, options.trials)
    settings = {"trials": options.trials, "rounds": options.rounds, "concurrency": CONCURRENCY}
    print("Written:", write("overhead", {**settings, **figures, "runs": runs}))
    if options.profile:
        path = OUT / "overhead.prof"
        fresh("flyweight", options.trials, [], path)
        print(f"Profile: {path} (python -m pstats)")


if __name__ == "__main__":
    main()

"""Whether workers wait: trials of a second on 16 logical slots of this machine.

The trials sleep, on average over those that are stopped early too for the time given; the
controller, TPE, the record and MLflow (a database file) are a search's own. Idle is the share of
the slots' time in which no trial slept, from the first moment at which all of them have answered to
the last beginning of a trial.

With --trials 5000 --seconds 0.05 it says by how much the driver's memory grows.

    python benchmarks/slots.py [--trials 2000] [--slots 16] [--seconds 1.0] [--sampler tpe]
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from common import write
from faults import Driver, entries, judge_mlflow, judge_record, verdict

RUNGS_A_TRIAL = 1.75  # half climb from each rung to the next


def idle(folder: Path, slots: int, rung_s: float) -> dict[str, float]:
    found = entries(folder)
    results = [e["time"] for e in found if e["kind"] == "result"]
    first: set[int] = set()
    for entry in found:
        if entry["kind"] == "result":
            first.add(entry["trial"])
            if len(first) >= slots:
                begins = entry["time"]
                break
    ends = max(e["time"] for e in found if e["kind"] == "begin")
    slept = sum(begins < at <= ends for at in results) * rung_s
    lasted = ends - begins
    return {
        "idle": 1 - slept / (slots * lasted), "lasted_s": lasted,
        "results_per_s": slept / rung_s / lasted,
    }  # fmt: skip


def run(trials: int, slots: int, seconds: float, sampler: str) -> dict[str, Any]:
    rung_s = seconds / RUNGS_A_TRIAL
    with tempfile.TemporaryDirectory(prefix="slots-") as name:
        folder = Path(name)
        uri = f"sqlite:///{folder}/mlflow.db"
        driver = Driver(
            folder, "slots", trials=trials, concurrency=slots, seconds=rung_s, sampler=sampler,
            uri=uri,
        )  # fmt: skip
        found = driver.wait()
        figures = {
            "trials": trials, "slots": slots, "sampler": sampler, "rung_s": rung_s,
            **idle(driver.folder, slots, rung_s),
            **judge_record(driver.folder, trials), **judge_mlflow(uri, driver.folder, "slots"),
            **found,
        }  # fmt: skip
    return figures | {"trial_s": rung_s * figures["results"] / trials, "wrong": verdict(figures)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a trial")
    parser.add_argument("--sampler", choices=("tpe", "random"), default="tpe")
    options = parser.parse_args()
    figures = run(options.trials, options.slots, options.seconds, options.sampler)
    print(
        f"{figures['trials']} trials of {figures['trial_s']:.2f} s on {figures['slots']} slots: "
        f"idle {figures['idle']:.1%} of {figures['lasted_s']:.0f} s after start-up; "
        f"{figures['grown_kb_a_trial']:.0f} KB a trial; "
        f"{'; '.join(figures['wrong']) or 'nothing lost'}"
    )
    print("Written:", write(f"slots-{options.trials}-{options.sampler}", figures))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

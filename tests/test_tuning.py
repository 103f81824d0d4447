"""Ray Tune around a controller, with workers that die: at work, when idle, and every time."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flyweight.compressors import RUNGS
from flyweight.search.controller import Controller
from flyweight.search.record import MemoryRecord

pytestmark = pytest.mark.slow  # starts a local Ray


@pytest.fixture(scope="module", autouse=True)
def local_ray(request: pytest.FixtureRequest) -> Iterator[None]:
    request.getfixturevalue("ray_token")
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def mortal(folder: Path) -> Any:
    """Trials that answer at once. The worker of trial 1 dies at short, once; that of trial 2 as
    often as it comes there; that of trial 3 a moment after the trial ended; trial 4 raises."""
    from ray import tune

    class Mortal(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.reset_config(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.number, self.rung = new_config["number"], RUNGS.index(new_config["rung"])
            return True

        def step(self) -> dict[str, Any]:
            rung = RUNGS[self.rung]
            seen = folder / f"{self.number}-{rung}-{time.monotonic_ns()}"
            seen.touch()
            once = len(list(folder.glob(f"{self.number}-{rung}-*"))) == 1
            if rung == "short" and (self.number == 2 or (self.number == 1 and once)):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.number == 4:
                raise RuntimeError("of the task's own")
            self.rung += 1
            if self.number == 3 and rung == "full":
                threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
            loss = 1.0 / (1 + self.number)  # each better than those before it: all climb
            return {"outcome": json.dumps(figures(rung, loss))}

        def save_checkpoint(self, *_: Any) -> None:
            return None

        def load_checkpoint(self, *_: Any) -> None:
            return None

    return Mortal


def figures(rung: str, loss: float) -> dict[str, Any]:
    return {
        "rung": rung, "loss": loss, "metric": 95 - loss, "size_bytes": 10, "compressed_bytes": 10,
        "seconds": 0.1, "samples": 1, "artifact": None, "error": None, "rung_seconds": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize("memory", [False, True])
def test_a_search_outlives_its_workers(
    memory: bool,
    tmp_path: Path,
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.exceptions import OutOfMemoryError, RayActorError

    from flyweight.search.tuning import OutlivingActors, run_trials

    take = OutlivingActors._actor_task_failed

    def as_by_the_monitor(
        actors: OutlivingActors, tracked_actor_task: Any, exception: Exception
    ) -> None:
        if isinstance(exception, RayActorError):  # what Ray says when it is its memory monitor
            exception = OutOfMemoryError("1 worker(s) were killed\nand a page of figures")
        take(actors, tracked_actor_task, exception)

    if memory:
        monkeypatch.setattr(OutlivingActors, "_actor_task_failed", as_by_the_monitor)
    everybody = {"recalibrate": 1.0, "short": 1.0}
    monkeypatch.setattr("flyweight.search.controller.REDUCTION", everybody)
    record = MemoryRecord()
    control: Controller = load("tests/test_controller.py").controller(record, trials=8)
    run_trials(control, mortal(tmp_path), concurrency=2, resources={"cpu": 1})
    assert sorted(control.trials) == list(range(8))
    ended = {number: trial.ended for number, trial in control.trials.items()}
    assert {n for n, reason in ended.items() if reason == "failed"} == {2, 4}
    assert not control.interrupted
    errors = {e["trial"]: e["error"] for e in record.entries() if e["kind"] == "end"}
    assert errors[2].startswith("poisonous: 2 workers died on it: ")
    assert errors[2].endswith("1 worker(s) were killed") == memory
    assert "of the task's own" in errors[4]
    results = [(e["trial"], e["rung"]) for e in record.entries() if e["kind"] == "result"]
    assert len(results) == len(set(results))
    for number in (1, 3):
        assert {rung for n, rung in results if n == number} == set(RUNGS)
    for number in (1, 2):
        begun = [p.name.split("-")[1] for p in tmp_path.glob(f"{number}-*")]
        assert begun.count("recalibrate") == 1
        assert begun.count("short") == 2
    assert control.proposals.running() == 0


def slow_to_start(folder: Path) -> Any:
    """Trials that answer soon, in workers of which all but the first are slow to get ready."""
    from ray import tune

    class SlowToStart(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            (folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()
            time.sleep(3.0 if len(list(folder.iterdir())) > 1 else 0.0)
            self.reset_config(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.rung = RUNGS.index(new_config["rung"])
            return True

        def step(self) -> dict[str, Any]:
            time.sleep(0.1)
            self.rung += 1
            return {"outcome": json.dumps(figures(RUNGS[self.rung - 1], 1.0))}

    return SlowToStart


@pytest.mark.parametrize("concurrency", [2, 4])  # of four, two wait for resources
def test_a_worker_is_started_once_for_each_place(
    concurrency: int, tmp_path: Path, load: Callable[[str], ModuleType]
) -> None:
    from flyweight.search.tuning import run_trials

    record = MemoryRecord()
    control: Controller = load("tests/test_controller.py").controller(record, trials=30)
    run_trials(control, slow_to_start(tmp_path), concurrency=concurrency, resources={"cpu": 1})
    assert {trial.ended for trial in control.trials.values()} <= {"finished", "stopped"}
    assert len(control.trials) == 30
    assert len(list(tmp_path.iterdir())) == 2


def test_a_worker_that_died_idle_is_no_fault_of_the_next_policy(
    load: Callable[[str], ModuleType],
) -> None:
    from ray import tune

    from flyweight.search.tuning import run_trials

    class Leaves(tune.Trainable):
        """Its worker is gone when the next trial is to begin."""

        def setup(self, config: dict[str, Any]) -> None:
            self.rung = RUNGS.index(config["rung"])

        def reset_config(self, _: dict[str, Any]) -> bool:
            os.kill(os.getpid(), signal.SIGKILL)
            return True

        def step(self) -> dict[str, Any]:
            self.rung += 1
            return {"outcome": json.dumps(figures(RUNGS[self.rung - 1], 1.0))}

    record = MemoryRecord()
    control: Controller = load("tests/test_controller.py").controller(record, trials=6)
    run_trials(control, Leaves, concurrency=2, resources={"cpu": 1})
    assert {trial.ended for trial in control.trials.values()} <= {"finished", "stopped"}
    died = [entry for entry in record.entries() if entry["kind"] == "died"]
    assert {entry["lost"] for entry in died} == {"idle"}

"""Which worker a trial gets, and what is told of one that died: Tune's own code, without a Ray."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.air.execution import ResourceManager
from ray.air.execution._internal import RayActorManager
from ray.air.execution._internal.tracked_actor import TrackedActor
from ray.air.execution._internal.tracked_actor_task import TrackedActorTask
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from flyweight.search import tuning
from flyweight.search.tuning import KeptActors, OutlivingActors, WarmController

PLACE = "one CPU"  # what all trials of a search ask for


class Places(ResourceManager):
    """As many as anybody asks for. freed: how many were given back."""

    freed = 0

    def request_resources(self, *_: Any) -> None:
        return None

    def cancel_resource_request(self, *_: Any) -> None:
        return None

    def has_resources_ready(self, *_: Any) -> bool:
        return True

    def acquire_resources(self, *_: Any) -> Any:
        return None

    def free_resources(self, acquired_resource: Any) -> None:  # noqa: ARG002
        self.freed += 1

    def clear(self) -> None:
        return None


def start(actors: RayActorManager, actor: TrackedActor) -> TrackedActor:
    """``actor``, running."""
    actors._live_actors_to_ray_actors_resources[actor] = (f"ray's {actor}", None)
    return actor


# -- a worker that died --------------------------------------------------------------------------

FULL = OutOfMemoryError("1 worker(s) were killed\nand a page of figures")


def test_what_the_memory_monitor_ends_at_work_has_died() -> None:
    places, told = Places(), []
    actors = OutlivingActors(places)
    actor = start(actors, TrackedActor(1))
    task = TrackedActorTask(actor, on_error=lambda _, error: told.append(error))
    actors._actor_task_failed(task, FULL)
    (error,) = told
    assert isinstance(error, RayActorError)
    assert str(error) == "1 worker(s) were killed"
    assert actors.live_actors == []
    assert places.freed == 1


def test_what_the_memory_monitor_ends_as_it_starts_has_died() -> None:
    told: list[Exception] = []
    actors = OutlivingActors(Places())
    actor = TrackedActor(1, on_error=lambda _, error: told.append(error))
    actors._actor_start_failed(start(actors, actor), FULL)
    (error,) = told
    assert isinstance(error, RayActorError)
    assert str(error) == "1 worker(s) were killed"


@pytest.mark.parametrize(
    ("error", "lives"),
    [
        (RayActorError(error_msg="its node has died"), False),
        (RayTaskError("step", "a traceback", ValueError("of the task's own")), True),
    ],
)
def test_what_ray_says_of_a_worker_is_passed_on_as_it_is(error: Exception, lives: bool) -> None:
    told: list[Exception] = []
    actors = OutlivingActors(Places())
    actor = start(actors, TrackedActor(1))
    task = TrackedActorTask(actor, on_error=lambda _, what: told.append(what))
    actors._actor_task_failed(task, error)
    assert told == [error]
    assert (actor in actors.live_actors) == lives


# -- a worker that is idle -----------------------------------------------------------------------


def test_all_idle_workers_wait_until_the_search_is_over() -> None:
    idle = KeptActors()
    assert all(idle.cache_object(PLACE, worker) for worker in "abc")
    assert list(idle.flush_cached_objects()) == []
    assert idle.pop_cached_object(PLACE) == "a"
    assert list(idle.flush_cached_objects(force_all=True)) == ["b", "c"]
    assert idle.num_cached_objects == 0
    assert not idle.has_cached_object(PLACE)


@dataclass(eq=False)
class Trial:
    """What Tune's controller reads and sets of one."""

    placement_group_factory: str = PLACE
    config: dict[str, Any] = field(default_factory=dict)
    experiment_tag: str = ""
    runs_on: Any = None

    def set_ray_actor(self, actor: Any) -> None:
        self.runs_on = actor


class Controller(WarmController):
    """Has workers and trials, and no search. removed: workers that it ended."""

    def __init__(self) -> None:
        self._actor_manager, self._actor_cache = RayActorManager(Places()), KeptActors()
        self._trial_to_actor: dict[Any, TrackedActor] = {}
        self._actor_to_trial: dict[TrackedActor, Any] = {}
        self._resetting_trials: set[Any] = set()
        self.removed: list[TrackedActor] = []
        self.idle = start(self._actor_manager, TrackedActor(1))
        self._actor_cache.cache_object(PLACE, self.idle)

    def give(self, trial: Trial, actor: TrackedActor) -> TrackedActor:
        self._trial_to_actor[trial], self._actor_to_trial[actor] = actor, trial
        return actor

    def _remove_actor(self, tracked_actor: TrackedActor) -> None:
        self.removed.append(tracked_actor)

    def _schedule_trial_reset(self, trial: Any, *_: Any) -> None:
        self._resetting_trials.add(trial)


def test_a_trial_without_a_worker_gets_an_idle_one() -> None:
    tuner, trial = Controller(), Trial()
    assert tuner._maybe_reuse_cached_actor(trial)
    assert tuner._trial_to_actor == {trial: tuner.idle}
    assert tuner._resetting_trials == {trial}
    assert trial.runs_on == f"ray's {tuner.idle}"
    other = Trial()
    assert not tuner._maybe_reuse_cached_actor(other)  # there is no second
    assert other not in tuner._trial_to_actor


def test_a_worker_that_is_starting_keeps_its_trial() -> None:
    tuner, trial = Controller(), Trial()
    own = tuner.give(trial, start(tuner._actor_manager, TrackedActor(2)))
    assert not tuner._maybe_reuse_cached_actor(trial)
    assert tuner._trial_to_actor == {trial: own}
    assert tuner.removed == []
    assert tuner._actor_cache.num_cached_objects == 1


def test_a_worker_that_waits_for_resources_makes_way_for_an_idle_one() -> None:
    tuner, trial = Controller(), Trial()
    own = tuner.give(trial, TrackedActor(2))
    assert tuner._maybe_reuse_cached_actor(trial)
    assert tuner._trial_to_actor == {trial: tuner.idle}
    assert tuner.removed == [own]


def test_a_trial_whose_worker_is_being_made_ready_has_one() -> None:
    tuner, trial = Controller(), Trial()
    own = tuner.give(trial, start(tuner._actor_manager, TrackedActor(2)))
    tuner._resetting_trials.add(trial)
    assert tuner._maybe_reuse_cached_actor(trial)
    assert tuner._trial_to_actor == {trial: own}
    assert tuner._actor_cache.num_cached_objects == 1


# -- what a trial ends with ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "called"),
    [
        (RayTaskError("step", "a traceback", RuntimeError("CUDA error")), "died"),  # tried again
        (ValueError("of the task's own"), "failed"),
    ],
)
def test_an_error_that_a_worker_does_not_bear_costs_the_worker(
    error: Exception, called: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    controller: Any = SimpleNamespace(
        died=lambda *_: told.append("died"), failed=lambda *_: told.append("failed")
    )
    searcher = tuning.ControlledSearcher(controller)
    searcher.numbers["a"] = 0
    monkeypatch.setattr(tuning, "_error", lambda _: error)
    tuner, trial = SimpleNamespace(_resetting_trials=[]), SimpleNamespace(trial_id="a")
    tuning.ControlledScheduler(searcher).on_trial_error(tuner, trial)
    assert told == [called]

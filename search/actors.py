"""Tune's actors, kept warm: what starts one imports torch and prepares the task, for seconds.

Tune (2.60) has no setting for any of this, so three of its own classes are extended. All trials of
a search ask for the same resources, so that an idle actor is in nobody's way.
"""

from collections.abc import Generator
from typing import Any

import ray.tune.tune
from ray.air.execution._internal import RayActorManager
from ray.exceptions import RayActorError, RayTaskError
from ray.tune.execution import tune_controller
from ray.tune.execution.tune_controller import TuneController
from ray.tune.utils.object_cache import _ObjectCache


def keep_actors() -> None:
    """Has Tune, in this process, run its trials with the classes below."""
    tune_controller.RayActorManager = OutlivingActors  # type: ignore[attr-defined]  # an import
    ray.tune.tune.TuneController = WarmController  # type: ignore[attr-defined]  # an import


class OutlivingActors(RayActorManager):
    """Ray's memory monitor ends a worker with an error that Tune does not expect of one, and ends
    the whole search for it. Here it is the death of a worker as any other."""

    def _actor_task_failed(self, tracked_actor_task: Any, exception: Exception) -> None:
        super()._actor_task_failed(tracked_actor_task, _as_death(exception))

    def _actor_start_failed(self, tracked_actor: Any, exception: Exception) -> None:
        super()._actor_start_failed(tracked_actor, _as_death(exception))


def _as_death(error: Exception) -> Exception:
    if isinstance(error, RayActorError | RayTaskError):
        return error
    return RayActorError(error_msg=str(error).partition("\n")[0] or type(error).__name__)


class KeptActors(_ObjectCache):
    """Every actor whose trial ended waits for the next one, until the search is over. Tune keeps
    one: where two trials end at once it ends the other's, and begins another for the next."""

    def cache_object(self, key: Any, obj: Any) -> bool:
        self._cached_objects[key].append(obj)
        self._num_cached_objects += 1
        return True

    def flush_cached_objects(self, force_all: bool = False) -> Generator[Any, None, None]:
        if force_all:
            yield from super().flush_cached_objects(force_all=True)


class WarmController(TuneController):
    """An idle actor goes to a trial that has none. Tune gives it to one whose own is starting, and
    ends that: with short trials on many slots one warm actor then did nearly all the work, while
    the others were started over and over."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._actor_cache = KeptActors()

    def _maybe_reuse_cached_actor(self, trial: Any) -> bool:
        own = self._trial_to_actor.get(trial)
        # One that waits for resources is not started: it may wait for those of the idle actor.
        starting = own is not None and self._actor_manager.is_actor_started(own)
        if starting and trial not in self._resetting_trials:
            return False
        return bool(super()._maybe_reuse_cached_actor(trial))

"""Ray Tune around the controller: it runs the trials, the controller decides."""

import json
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import ray.tune.tune
from ray import cloudpickle, tune
from ray.air.execution._internal import RayActorManager
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.tune.execution import tune_controller
from ray.tune.execution.tune_controller import TuneController
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.utils.object_cache import _ObjectCache

from .controller import Controller

# For a policy that is being looked for: while trials run, whose results must not wait for it, and
# while none does. Tune itself waits a second before it asks again then.
BUSY_S, IDLE_S = 0.05, 5.0


class _Unpickled:
    """Tune writes what it is given to disk. The record is the truth: its snapshots stay empty."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class ControlledSearcher(_Unpickled, Searcher):
    """Tune asks, the controller proposes. What comes of a trial reaches it through the scheduler
    alone: Tune does not tell a searcher what made it stop a trial."""

    def __init__(
        self, controller: Controller, interrupted: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__()
        self.controller = controller
        self._tell = interrupted
        self.numbers: dict[str, int] = {}  # Tune's trial id -> trial
        self._handler: Any = None

    def suggest(self, trial_id: str) -> Any:
        control = self.controller
        self._handler = self._handler or self._told_of(signal.getsignal(signal.SIGINT))
        trial = control.propose(BUSY_S if control.running() else IDLE_S)
        if trial is None:
            # What runs may come back: Tune asks again as long as it is not told that this is all.
            # It is where nothing can be recorded any more, though no trial could be ended then.
            waits = control.running() or (control.looking() and not self._interrupted())
            return None if waits and not control.fatal else Searcher.FINISHED
        self.numbers[trial_id] = trial.number
        policy = trial.policy.canonical()
        return {"number": trial.number, "policy": policy, "rung": trial.next_rung}

    def _told_of(self, handler: Any) -> Any:
        """Tune's ``handler`` of Ctrl-C, which ends the trials without a word, and what it replaces
        it by; both are gone once it was called."""
        if threading.current_thread() is not threading.main_thread() or not callable(handler):
            return handler

        def heard(*args: Any) -> None:
            self._tell()
            handler(*args)

        signal.signal(signal.SIGINT, heard)
        return heard

    def _interrupted(self) -> bool:
        """Whether Ctrl-C came while no trial ran. Tune (2.60) looks for that between two asks, but
        not while it waits for a first trial; its handler is gone once it was called."""
        return signal.getsignal(signal.SIGINT) is not self._handler

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        return None

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search resumes from its record, not from Tune's snapshots")

    def save_to_dir(self, *_: Any, **__: Any) -> None:
        return None


class ControlledScheduler(_Unpickled, FIFOScheduler):
    """Goes on or stops, never pauses: a paused trial would hold a place of the running ones."""

    def __init__(self, searcher: ControlledSearcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.searcher = searcher

    def on_trial_result(self, _: Any, trial: Any, result: dict[str, Any]) -> str:
        outcome = json.loads(result["outcome"])
        goes_on = self.searcher.controller.result(self.searcher.numbers[trial.trial_id], outcome)
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP)

    def on_trial_error(self, tuner: Any, trial: Any) -> None:
        number, controller = self.searcher.numbers[trial.trial_id], self.searcher.controller
        error = _error(trial)
        reason = (str(error).strip().splitlines() or ["its worker died or raised"])[-1]
        if isinstance(error, RayActorError) and not error.actor_init_failed:
            # It died while it was idle, before it began with this trial.
            idle = trial in tuner._resetting_trials
            controller.died(number, reason, "idle" if idle else _lost(error))
        elif isinstance(error, RayTaskError):  # of a GPU that may be out of order: see workers.py
            controller.died(number, reason)
        else:
            controller.failed(number, reason)


# Tune (2.60) has no setting for what follows. To start an actor takes seconds: it imports torch and
# prepares the task. All trials ask for the same resources: an idle actor is in nobody's way.


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


def _lost(error: RayActorError) -> str:
    """What was lost with a worker, as ``Controller.died`` is told it."""
    if error.preempted:
        return "preempted"
    # Ray's errors say of a node that it died in words alone. Of an actor that does not answer for
    # the moment, over a network that fails, nobody knows more.
    gone = isinstance(error, ActorUnavailableError) or "node has died" in str(error)
    return "node" if gone else "worker"


def _error(trial: Any) -> Any:
    """What ended ``trial``, as Tune has just noted it. (``get_pickled_error`` looks in a place to
    which that is copied later.)"""
    try:
        return cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    except Exception:  # whatever is wrong with the error must not end the search
        return ""


def run_trials(
    controller: Controller,
    trainable: Any,
    *,
    concurrency: int,
    resources: dict[str, float],
    interrupted: Callable[[], None] = lambda: None,
) -> None:
    """Runs trials until the controller proposes no more and all have ended. resources: what each
    asks of a node, in Ray's words. interrupted: is told of Ctrl-C when it comes.

    On Ctrl-C Tune ends the running trials and this returns.
    """
    searcher = ControlledSearcher(controller, interrupted)
    # A trial whose worker dies is proposed again by the controller. Tune's own way, max_failures,
    # would begin it anew, and by its source (2.60) waits for ever for a worker that died between
    # two trials: the trial stays among those whose actor is being reset.
    tune_controller.RayActorManager = OutlivingActors  # type: ignore[attr-defined]  # an import
    ray.tune.tune.TuneController = WarmController  # type: ignore[attr-defined]  # an import too
    scratch = tempfile.mkdtemp(prefix="flyweight-tune-")
    try:
        tune.Tuner(
            tune.with_resources(trainable, resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=ControlledScheduler(searcher),
                num_samples=-1,  # the controller says when it ends
                max_concurrent_trials=concurrency,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
                # Trials write what goes on from rung to rung themselves: to ask them again when
                # they end is one more message each.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if controller.cut_off():
        controller.interrupted = True  # Tune took the Ctrl-C and ended what ran
    controller.close()

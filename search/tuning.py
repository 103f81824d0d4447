"""Ray Tune around the controller: it runs the trials, the controller decides."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from .actors import keep_actors
from .controller import Controller


class _Unpickled:
    """Tune writes what it is given to disk. The record is the truth: its snapshots stay empty."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class ControlledSearcher(_Unpickled, Searcher):
    """Tune asks, the controller proposes. What comes of a trial reaches it through the scheduler
    alone: Tune does not tell a searcher what made it stop a trial."""

    def __init__(self, controller: Controller) -> None:
        super().__init__()
        self.controller = controller
        self.numbers: dict[str, int] = {}  # Tune's trial id -> trial

    def suggest(self, trial_id: str) -> Any:
        trial = self.controller.propose()
        if trial is None:
            # What runs may come back: Tune asks again as long as it is not told that this is all.
            # It is where nothing can be recorded any more, though no trial could be ended then.
            waits = self.controller.running() and not self.controller.fatal
            return None if waits else Searcher.FINISHED
        self.numbers[trial_id] = trial.number
        policy = trial.policy.canonical()
        return {"number": trial.number, "policy": policy, "rung": trial.next_rung}

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

    def on_trial_error(self, _: Any, trial: Any) -> None:
        number, controller = self.searcher.numbers[trial.trial_id], self.searcher.controller
        error = _error(trial)
        reason = (str(error).strip().splitlines() or ["its worker died or raised"])[-1]
        if isinstance(error, RayActorError) and not error.actor_init_failed:
            controller.died(number, reason, _lost(error))
        else:
            controller.failed(number, reason)


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
) -> None:
    """Runs trials until the controller proposes no more and all have ended. resources: what each
    asks of a node, in Ray's words.

    On Ctrl-C Tune ends the running trials and this returns.
    """
    searcher = ControlledSearcher(controller)
    # A trial whose worker dies is proposed again by the controller. Tune's own way, max_failures,
    # would begin it anew, and by its source (2.60) waits for ever for a worker that died between
    # two trials: the trial stays among those whose actor is being reset.
    keep_actors()
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

"""Who fills the sensitivity table: this process, Ray actors that judge policies once they have
begun, and the cache of what was said."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import ray
import torch

from ..compressors import Prepared, harm
from ..compressors.made import Made
from ..compressors.sensitivity import ITEMS
from ..spaces import BadInput, Impossible, Policy
from .cache import Lines, cache_folder, key_of
from .placement import for_actor
from .ready import Ready, prepare_task, versions
from .spec import Spec

# Seconds of judging from which on actors are begun: one takes about 5 to import torch and to make
# the task.
WORTH_ACTORS = 10.0
RECENT = 8  # policies judged last, by which it is known how long the next one takes
SEED = 0  # of what is drawn while a policy is built; the table is of the task, not of a search


class Judge:
    """Judges policies, one after another, with the task prepared once. prepared: the task, where
    this process has it; else it is made, and must be what was ``made`` where the search began."""

    def __init__(self, spec: Spec, made: Made, prepared: Prepared | None = None) -> None:
        self.refused: str | None = None
        if prepared is None:
            torch.set_num_threads(max(1, int(spec.resources.cpus)))
            try:
                prepared = prepare_task(spec, made=made)
            except BadInput as error:
                self.refused = str(error)
        self.prepared = prepared

    def ready(self) -> str | None:
        """Answers once the task is prepared: why it cannot be, if so."""
        return self.refused

    def harm(self, policy: str, recalibrated: bool) -> float | None:
        """What a policy (canonical) harms; None if it cannot be built."""
        assert self.prepared is not None
        try:
            parsed = Policy.from_json(policy)
            return harm(self.prepared, parsed, SEED, recalibrated=recalibrated)
        except Impossible:
            return None


class Judges:
    """As many actors as the search runs trials at once, if there is time enough for them to begin;
    until one has, this process judges. All of it takes ``seconds`` from now on: nothing is begun
    that will take longer, by what was judged before. count: told how many policies have an answer.
    failed: why a policy could not be judged, or an actor died; None if all went well.
    """

    def __init__(
        self, ready: Ready, seconds: float, count: Callable[[int], None] = lambda _: None
    ) -> None:
        self._spec, self._made = ready.spec, ready.made
        self._own = Judge(ready.spec, ready.made, ready.prepared)
        self._seconds, self._ends = seconds, time.monotonic() + seconds
        self._count, self._answered = count, 0
        self._took: list[float] = []  # seconds, of each that was judged
        prepared = ready.prepared
        models = (start.model.state_dict() for start in prepared.starts.values())
        weights = (
            t.contiguous().numpy().tobytes()
            for state in models
            for t in state.values()
            if isinstance(t, torch.Tensor)
        )
        key = key_of(
            ready.data_digest, repr(prepared.runtime.capabilities),
            versions(ready.spec.target.runtime), ITEMS, *weights,
        )  # fmt: skip
        self._cache = Lines(cache_folder(ready.spec) / f"sensitivity-{key}.jsonl")
        self._actors: list[Any] = []
        self._starting: dict[Any, Any] = {}  # by what they will answer
        self._free: list[Any] = []
        self.failed: str | None = None

    def __call__(
        self, policies: Sequence[Policy], recalibrated: bool = False
    ) -> list[float | None]:
        """What the policies harm; None for what cannot be built, or not in time. Raises BadInput if
        an actor cannot make the task."""
        keys = [_key(policy, recalibrated) for policy in policies]
        unknown = {k: p for k, p in zip(keys, policies, strict=True) if k not in self._cache.known}
        self._more(sum(key in self._cache.known for key in keys))
        if unknown:
            self._judge({p.canonical(): k for k, p in unknown.items()}, recalibrated)
        return [self._cache.known.get(key) for key in keys]

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def _more(self, answers: int) -> None:
        self._answered += answers
        self._count(self._answered)

    def _in_time(self) -> bool:
        """Whether one more will be judged before the time is over."""
        # The first one also works out what all others need: it says too much.
        usual = median(self._took[1:][-RECENT:] or [0.0])
        return time.monotonic() + usual < self._ends

    def _judge(self, wanted: dict[str, str], recalibrated: bool) -> None:
        """Adds to the cache what policies (canonical) harm under their keys."""
        if not self._actors and self._seconds >= WORTH_ACTORS and self._in_time():
            self._begin()
        left, again = list(wanted), set(wanted)  # again: those that may still be tried once more
        busy: dict[Any, tuple[Any, str, float]] = {}
        while busy or (left and self._in_time()):
            while left and self._free and self._in_time():
                actor, policy = self._free.pop(), left.pop(0)
                busy[actor.harm.remote(policy, recalibrated)] = actor, policy, time.monotonic()
            if left and not busy and self._in_time():  # no actor has begun, or none is left
                policy = left.pop(0)
                self._judge_here(policy, wanted[policy], recalibrated)
            # What is not answered in time is no more waited for.
            rest = max(0.0, self._ends - time.monotonic()) if busy else 0.0
            waited = [*busy, *self._starting]
            answers = ray.wait(waited, timeout=rest)[0] if waited else []
            if busy and not answers and rest == 0:
                return
            for answer in answers:
                actor, policy, began = busy.pop(answer, (None, "", 0.0))
                actor = actor or self._starting.pop(answer)
                try:
                    found = ray.get(answer)
                except ray.exceptions.RayError as error:
                    self._fails(str(error).strip().splitlines()[-1])
                    if isinstance(error, ray.exceptions.RayTaskError) and policy:
                        self._free.append(actor)  # it is the policy, not the actor
                    elif policy in again:
                        again.discard(policy)
                        left.append(policy)
                    continue
                if not policy and found is not None:
                    raise BadInput(found)
                self._free.append(actor)
                if policy:
                    self._learn(wanted[policy], found, began)

    def _judge_here(self, policy: str, key: str, recalibrated: bool) -> None:
        began = time.monotonic()
        try:
            self._learn(key, self._own.harm(policy, recalibrated), began)
        except Exception as error:  # of torch, say: the table can do without it
            self._fails(f"{type(error).__name__}: {error}")

    def _learn(self, key: str, found: float | None, began: float) -> None:
        self._took.append(time.monotonic() - began)
        self._cache.add(key, found)
        self._more(1)

    def _fails(self, why: str) -> None:
        self.failed = self.failed or why

    def _begin(self) -> None:
        kind = ray.remote(Judge).options(**for_actor(self._spec.resources))
        spec, made = ray.put(self._spec), ray.put(self._made)
        self._actors = [kind.remote(spec, made) for _ in range(self._spec.search.concurrency)]
        self._starting = {actor.ready.remote(): actor for actor in self._actors}


def _key(policy: Policy, recalibrated: bool) -> str:
    """A policy as far as it acts without training."""
    plain = policy.to_dict()
    plain.pop("distill", None)
    plain.get("quantize", {}).pop("qat", None)
    return key_of(plain, policy.student, recalibrated)

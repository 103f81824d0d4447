"""Who fills the sensitivity table: Ray actors that judge policies, and the cache of what they
said."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch

from ..compressors import harm
from ..compressors.sensitivity import ITEMS
from ..spaces import Impossible, Policy
from .cache import Lines, cache_folder, key_of
from .placement import for_actor
from .ready import Ready, prepare_task, versions
from .spec import Spec

# Seconds until the first actor must have begun; the share of the time budget, if there is one.
PATIENCE, PATIENCE_SHARE = 60.0, 0.15
SEED = 0  # of what is drawn while a policy is built; the table is of the task, not of a search


class Judge:
    """Judges policies, one after another, with the task prepared once."""

    def __init__(self, spec: Spec) -> None:
        torch.set_num_threads(max(1, int(spec.resources.cpus)))
        self.prepared = prepare_task(spec)

    def ready(self) -> None:
        """Answers once the task is prepared."""

    def harm(self, policy: str, recalibrated: bool) -> float | None:
        """What a policy (canonical) harms; None if it cannot be built."""
        try:
            parsed = Policy.from_json(policy)
            return harm(self.prepared, parsed, SEED, recalibrated=recalibrated)
        except Impossible:
            return None


class Judges:
    """As many actors as the search runs trials at once; they begin with the first policy that the
    cache does not know. Nothing is begun ``seconds`` after the first of them is ready. failed: why
    a policy could not be judged, or an actor died; None if all went well."""

    def __init__(
        self, ready: Ready, seconds: float, count: Callable[[int], None] = lambda _: None
    ) -> None:
        self._spec = ready.spec
        self._seconds, self._began = seconds, False
        budget = ready.spec.search.time_budget
        patience = PATIENCE if budget is None else min(PATIENCE, PATIENCE_SHARE * budget)
        self._ends = time.monotonic() + (seconds and seconds + patience)
        self._count, self._judged = count, 0
        prepared = ready.prepared
        models = (start.model.state_dict() for start in prepared.starts.values())
        weights = (t.contiguous().numpy().tobytes() for state in models for t in state.values())
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
        """What the policies harm; None for what cannot be built, or not in time."""
        keys = [_key(policy, recalibrated) for policy in policies]
        unknown = {k: p for k, p in zip(keys, policies, strict=True) if k not in self._cache.known}
        if unknown:
            self._judge({p.canonical(): k for k, p in unknown.items()}, recalibrated)
        self._judged += len(policies)
        self._count(self._judged)
        return [self._cache.known.get(key) for key in keys]

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def _judge(self, wanted: dict[str, str], recalibrated: bool) -> None:
        """Adds to the cache what policies (canonical) harm under their keys."""
        if not self._actors:
            self._begin()
        left, again = list(wanted), set(wanted)  # again: those that may still be tried once more
        busy: dict[Any, tuple[Any, str]] = {}
        done = 0
        while True:
            while left and self._free and time.monotonic() < self._ends:
                actor, policy = self._free.pop(), left.pop(0)
                busy[actor.harm.remote(policy, recalibrated)] = actor, policy
            rest = self._ends - time.monotonic()
            if not busy and not (left and self._starting and rest > 0):
                break  # all is judged, or the time is over, or no actor is left
            # Who works will answer; who begins may never be given a place.
            answers, _ = ray.wait([*busy, *self._starting], timeout=None if busy else rest)
            for answer in answers:
                actor, policy = busy.pop(answer, (None, ""))
                actor = actor or self._starting.pop(answer)
                try:
                    found = ray.get(answer)
                except ray.exceptions.RayError as error:
                    self.failed = self.failed or str(error).strip().splitlines()[-1]
                    if isinstance(error, ray.exceptions.RayTaskError) and policy:
                        self._free.append(actor)  # it is the policy, not the actor
                    elif policy in again:
                        again.discard(policy)
                        left.append(policy)
                    continue
                self._free.append(actor)
                if not self._began:  # to prepare the task is no part of the time to judge
                    self._began = True
                    self._ends = time.monotonic() + self._seconds
                if policy:
                    self._cache.add(wanted[policy], found)
                    done += 1
            self._count(self._judged + done)

    def _begin(self) -> None:
        kind = ray.remote(Judge).options(**for_actor(self._spec.resources))
        spec = ray.put(self._spec)
        self._actors = [kind.remote(spec) for _ in range(self._spec.search.concurrency)]
        self._starting = {actor.ready.remote(): actor for actor in self._actors}


def _key(policy: Policy, recalibrated: bool) -> str:
    """A policy as far as it acts without training."""
    plain = policy.to_dict()
    plain.pop("distill", None)
    plain.get("quantize", {}).pop("qat", None)
    return key_of(plain, policy.student, recalibrated)

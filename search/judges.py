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
from .ready import Ready, data_digest, prepare_task
from .spec import Spec

SEED = 0  # of what is drawn while a policy is built; the table is of the task, not of a search


class Judge:
    """Judges policies, one after another, with the task prepared once."""

    def __init__(self, spec: Spec) -> None:
        torch.set_num_threads(max(1, int(spec.resources.cpus)))
        self.prepared = prepare_task(spec)

    def harm(self, policy: str, recalibrated: bool) -> tuple[str, float | None]:
        try:
            parsed = Policy.from_json(policy)
            return policy, harm(self.prepared, parsed, SEED, recalibrated=recalibrated)
        except Impossible:
            return policy, None


class Judges:
    """As many actors as the search runs trials at once; they begin with the first policy that the
    cache does not know. Nothing is begun after ``seconds``. failed: why a policy could not be
    judged, or an actor died; None if all went well."""

    def __init__(
        self, ready: Ready, seconds: float, count: Callable[[int], None] = lambda _: None
    ) -> None:
        self._spec = ready.spec
        self._ends = time.monotonic() + seconds
        self._count, self._judged = count, 0
        capabilities = repr(ready.prepared.runtime.capabilities)
        key = key_of(data_digest(ready.prepared), ready.teacher, capabilities, ITEMS)
        self._cache = Lines(cache_folder(ready.spec) / f"sensitivity-{key}.jsonl")
        self._actors: list[Any] = []
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
        free, left = list(self._actors), list(wanted)
        busy: dict[Any, Any] = {}
        done = 0
        while True:
            while left and free and time.monotonic() < self._ends:
                actor = free.pop()
                busy[actor.harm.remote(left.pop(0), recalibrated)] = actor
            if not busy:
                break  # all is judged, or the time is over, or no actor is left
            answers, _ = ray.wait(list(busy))
            for answer in answers:
                actor = busy.pop(answer)
                try:
                    policy, found = ray.get(answer)
                except ray.exceptions.RayError as error:
                    self.failed = self.failed or str(error).strip().splitlines()[-1]
                    if isinstance(error, ray.exceptions.RayTaskError):
                        free.append(actor)  # the policy, not the actor
                    continue
                free.append(actor)
                self._cache.add(wanted[policy], found)
            done += len(answers)
            self._count(self._judged + done)

    def _begin(self) -> None:
        resources = self._spec.resources
        accelerator = {f"accelerator_type:{resources.accelerator}": 0.001}
        kind = ray.remote(Judge).options(
            num_cpus=resources.cpus, num_gpus=resources.gpus,
            resources=accelerator if resources.accelerator else None,
        )  # fmt: skip
        spec = ray.put(self._spec)
        self._actors = [kind.remote(spec) for _ in range(self._spec.search.concurrency)]


def _key(policy: Policy, recalibrated: bool) -> str:
    """A policy as far as it acts without training."""
    plain = policy.to_dict()
    plain.pop("distill", None)
    plain.get("quantize", {}).pop("qat", None)
    return key_of(plain, policy.student, recalibrated)

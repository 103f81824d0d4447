"""Where the policies of a search come from: the strategies to compare, over the same proposals.

joint (the default): the warm start and the uniform recipes, and after the first of these by turns
with them the solver, with what the results have taught, and the sampler over all parameters at
once. solver: the warm start and the recipes alone. uniform: recipes of every share of channels, in
each precision. random: the space, uniformly. sequential: prune, then distill, then quantize, each
chosen while what was chosen before stays.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np

from ..compressors import RUNGS
from ..spaces import Policy, Space
from .proposals import Proposals
from .warm import WarmStart, coarse_first

FIRST = 8  # one in so many trials is a policy of the warm start's sweep
# Of them at most; seconds for them, and the share of all that there is.
MOST_SOLVED, SWEEP_S, SWEEP_SHARE = 32, 60.0, 0.05
KEEPS = 16  # shares of channels of the uniform strategy
STREAK = 16  # proposals over a limit, one after another, that end a stage
STAGES = (  # of the sequential strategy: what is chosen in each, by the beginning of its name
    ("student", "drop/", "width/", "criterion", "reconstruct", "sparsity"),
    ("loss", "temperature", "alpha", "learning_rate"),
    ("precision/", "calibration", "qat"),
)


class Source(Protocol):
    """What a controller asks for policies and tells what came of them."""

    space: Space
    seed: int  # of the search

    def ask(self) -> Policy | None:
        """A policy that was not proposed before; None when none is found any more."""

    def claim(self, policy: Policy) -> bool:
        """Marks ``policy`` as proposed; whether it was new."""

    def reject(self, policy: Policy, latency_ms: float, constraint: float) -> None:
        """``policy`` is over a limit by its price alone."""

    def tell(
        self, policy: Policy, rung: str, loss: float, latency_ms: float, constraint: float
    ) -> None:
        """A result of ``policy`` at ``rung``; feasible if ``constraint`` <= 0."""

    def fail(self, policy: Policy) -> None:
        """``policy`` ended."""


def source(
    strategy: str,
    space: Space,
    sampler: str,
    seed: int,
    trials: int,
    warm: WarmStart | None,
    recipes: Sequence[Policy],
    seconds: float = math.inf,
) -> Source:
    """Where ``strategy`` takes its policies from. recipes: those of people. seconds: that the
    search has."""
    if strategy == "uniform":
        return Proposals(space, None, seed, _uniform(space))
    if strategy == "random":
        return Proposals(space, "random", seed)
    if strategy == "sequential":
        return Sequential(space, sampler, seed, trials)
    count = min(MOST_SOLVED, max(2, trials // FIRST))
    solved = warm.sweep(count, min(SWEEP_S, SWEEP_SHARE * seconds)) if warm else []
    by_turns = [p for pair in zip_longest(solved, recipes) for p in pair if p is not None]
    if strategy == "solver":
        return Proposals(space, None, seed, by_turns)
    return Proposals(space, sampler, seed, by_turns, warm=warm)


def _uniform(space: Space) -> list[Policy]:
    """The recipes, coarse ones first: halves before quarters."""
    shares = np.linspace(1, space.settings.min_keep, KEEPS + 1)
    found = [
        space.uniform(float(shares[i]), precision, student)
        for i in coarse_first(KEEPS + 1)
        for student in space.settings.students
        for precision in reversed(space.settings.precisions)
    ]
    return list(dict.fromkeys(found))


class Sequential:
    """One stage after the other, a third of the trials each; what a stage chose is what lost least
    at the highest rung that any reached, within the limits."""

    def __init__(self, space: Space, sampler: str, seed: int, trials: int) -> None:
        self.space, self.seed = space, seed
        self._sampler = sampler
        self._each = max(1, trials // len(STAGES))
        self._told: set[str] = set()  # of whom there is a result: also of a session before
        self._best: dict[str, tuple[float, Policy]] = {}
        self._seen: list[Policy] = []
        self._stage = 0
        self._over = 0  # in a row
        self._proposals = self._of_stage({})

    def _of_stage(self, chosen: Mapping[str, Any]) -> Proposals:
        free = STAGES[self._stage]
        fixed = {
            p.name: chosen.get(p.name, p.default)
            for p in self.space.parameters
            if not p.name.startswith(free)
        }
        return Proposals(self.space, self._sampler, self.seed + self._stage, fixed=fixed)

    def ask(self) -> Policy | None:
        if self._over >= STREAK and self._stage + 1 < len(STAGES):  # another may keep the limit
            self._next_stage()
        policy = self._proposals.ask()
        while policy is None and self._stage + 1 < len(STAGES):  # a stage has no other choices
            self._next_stage()
            policy = self._proposals.ask()
        if policy is not None:
            self._seen.append(policy)
        return policy

    def _next_stage(self) -> None:
        self._stage += 1
        self._over = 0
        rung = next((r for r in reversed(RUNGS) if r in self._best), None)
        chosen = self.space.values(self._best[rung][1]) if rung else {}
        self._proposals = self._of_stage(chosen)
        self._best.clear()
        for policy in self._seen:
            self._proposals.claim(policy)

    def claim(self, policy: Policy) -> bool:
        self._seen.append(policy)
        self._over = 0  # a smaller form, within
        return self._proposals.claim(policy)

    def reject(self, policy: Policy, latency_ms: float, constraint: float) -> None:
        self._over += 1
        self._proposals.reject(policy, latency_ms, constraint)

    def tell(
        self, policy: Policy, rung: str, loss: float, latency_ms: float, constraint: float
    ) -> None:
        self._proposals.tell(policy, rung, loss, latency_ms, constraint)
        chosen = self._proposals.keeps(policy)  # not of a stage before, that went on late
        if chosen and constraint <= 0 and loss < self._best.get(rung, (float("inf"), policy))[0]:
            self._best[rung] = loss, policy
        self._over = 0
        self._told.add(policy.digest)
        if len(self._told) >= self._each * (self._stage + 1) and self._stage + 1 < len(STAGES):
            self._next_stage()

    def fail(self, policy: Policy) -> None:
        self._proposals.fail(policy)

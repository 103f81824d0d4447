"""Which policy next: one in-memory Optuna study per rung. The only file that imports Optuna."""

import logging
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from ..compressors import RUNGS
from ..spaces import Impossible, Parameter, Policy, Space
from .warm import WarmStart

ENOUGH = 10  # results until a rung's study is asked
WINDOW = 256  # newest results a study holds: the time to ask stays flat
# Of the first policies so many come before any other, where there is a warm start; the rest take
# turns with what is drawn: it knows the results, and in a short search would never have its say.
ALONE = 8
TURNS = 4  # one in so many proposals is the sampler's alone, where there is a warm start
# Proposals after which the warm start is asked for one in so many alone: it has had its say, and
# solving takes longer than a proposal may where hundreds of workers wait.
MANY, LATE = 1000, 16
TRIES = 20  # proposals that were seen before until a neighbour is taken
DRAWS = 200  # policies at random, where every neighbour was seen, until the space counts as tried

optuna.logging.set_verbosity(optuna.logging.WARNING)
logging.getLogger("optuna").setLevel(logging.WARNING)


class Proposals:
    """Asks the highest rung that knows enough; parameters that do not act there come from above.

    Fidelities are never mixed: a study holds results of its own rung alone. ``tell`` takes every
    result; a trial asked from a study is told when its own rung's result arrives and failed when
    it ends before.

    sampler: "tpe", "random", or None for ``first`` alone. fixed: values of every other policy.
    warm: all but one in TURNS of those take their widths and precisions from there. (In a search of
    the reference network 23 of the artifacts after the sweep did, and 3 came from the sampler, half
    of the proposals each.)
    """

    def __init__(
        self,
        space: Space,
        sampler: str | None = "tpe",
        seed: int = 0,
        first: Sequence[Policy] = (),
        fixed: Mapping[str, Any] | None = None,
        warm: WarmStart | None = None,
    ) -> None:
        self.space = space
        self._sampler = sampler
        self._fixed = dict(fixed or {})
        self._warm, self._turn = warm, 1
        self.seed = seed  # of the search
        self._rng = random.Random(seed)
        self._seed = seed  # of the newest study
        self._queue = list(first)
        self._alone = ALONE
        self._seen: set[str] = set()
        # What is alike is one thing: a study copies all of a result that it is given.
        alike = {repr(d): d for d in map(_distribution, space.parameters)}
        self._distributions = {p.name: alike[repr(_distribution(p))] for p in space.parameters}
        self._studies = {rung: self._study() for rung in RUNGS}
        # Results that a study is given before it is asked: those of low rungs soon are no more.
        self._untold: dict[str, list[optuna.trial.FrozenTrial]] = {rung: [] for rung in RUNGS}
        self._asked: dict[str, tuple[str, optuna.Trial]] = {}  # digest -> (rung, trial)
        self._best: dict[str, dict[str, Any]] = {}  # rung -> values of its best policy
        self._best_loss: dict[str, float] = {}

    def ask(self) -> Policy | None:
        """A policy that was not proposed before; None when none is found any more."""
        while self._queue and (self._alone > 0 or not self._warm):
            policy = self._queue.pop(0)
            if self.claim(policy):
                self._alone -= 1
                return policy
        self._alone = 1
        if self._sampler is None:
            return None
        for _ in range(TRIES):
            policy = self._next()
            if self.claim(policy):
                return policy
        near = [p for p in self.space.neighbours(policy) if self._new(p) and self.keeps(p)]
        # A sampler that has settled is surrounded by what it tried: the rest of the space is not.
        anywhere = (self._anywhere() for _ in range(0 if near else DRAWS))
        found = self._rng.choice(near) if near else next(filter(self._new, anywhere), None)
        if found is not None:
            self.claim(found)
        return found

    def _new(self, policy: Policy) -> bool:
        return policy.digest not in self._seen

    def _anywhere(self) -> Policy:
        """A policy at random with the fixed values."""
        drawn = {p.name: p.sample(self._rng) for p in self.space.parameters}
        return self.space.policy(drawn | self._fixed)

    def keeps(self, policy: Policy) -> bool:
        """Whether ``policy`` has the fixed values, as far as they act in it."""
        values = self.space.values(policy)
        return all(values.get(name, value) == value for name, value in self._fixed.items())

    def claim(self, policy: Policy) -> bool:
        """Marks ``policy`` as proposed; whether it was new."""
        new = policy.digest not in self._seen
        self._seen.add(policy.digest)
        return new

    def reject(self, policy: Policy, latency_ms: float, constraint: float) -> None:
        """``policy`` is over a limit by its price alone: its study learns that."""
        asked = self._asked.pop(policy.digest, None)
        if asked:
            rung, trial = asked
            # What it would lose is unknown and does not matter: TPE ranks what breaks a
            # constraint by the breach alone.
            trial.set_constraint("limit", constraint)
            self._studies[rung].tell(trial, [0.0, latency_ms])

    def tell(
        self, policy: Policy, rung: str, loss: float, latency_ms: float, constraint: float
    ) -> None:
        """A result of ``policy`` at ``rung``; feasible if ``constraint`` <= 0."""
        self._seen.add(policy.digest)
        if self._warm:
            self._warm.tell(policy, rung, loss, constraint <= 0)
        asked = self._asked.get(policy.digest)
        if asked and asked[0] == rung:
            del self._asked[policy.digest]
            asked[1].set_constraint("limit", constraint)
            self._studies[rung].tell(asked[1], [loss, latency_ms])
        else:
            self._add(rung, policy, [loss, latency_ms], constraint)
        better = constraint <= 0 and loss <= self._best_loss.get(rung, float("inf"))
        if better and self.space.contains(policy):
            self._best[rung], self._best_loss[rung] = self.space.values(policy), loss
        held = len(self._studies[rung].get_trials(deepcopy=False)) + len(self._untold[rung])
        if held > 2 * WINDOW:
            self._trim(rung)

    def fail(self, policy: Policy) -> None:
        """``policy`` ended without the result its study waits for."""
        asked = self._asked.pop(policy.digest, None)
        if asked:
            self._studies[asked[0]].tell(asked[1], state=TrialState.FAIL)

    def running(self) -> int:
        """Trials that the studies still wait for."""
        return len(self._asked)

    def _next(self) -> Policy:
        rung = next((r for r in reversed(RUNGS) if len(self._completed(r)) >= ENOUGH), RUNGS[0])
        study = self._studies[rung]
        study.add_trials(self._untold[rung])
        self._untold[rung].clear()
        trial = study.ask()
        suggested = self._suggest(trial, rung)
        if suggested:
            policy = self.space.policy(self._inherited(rung) | suggested | self._fixed)
        else:  # nothing that is free acts at this rung
            policy = self._anywhere()
        turn, self._turn = self._turn, self._turn + 1
        settings = self._warm.settings | self._inherited(rung) | suggested if self._warm else {}
        solves = turn % LATE == 1 if turn > MANY else turn % TURNS
        if self._warm and solves and (axes := self._warm.draw(self._rng, settings)):
            study.tell(trial, state=TrialState.FAIL)
            return self.space.policy(settings | axes)
        if policy.digest in self._seen:
            study.tell(trial, state=TrialState.FAIL)
        else:
            self._asked[policy.digest] = (rung, trial)
        return policy

    def _completed(self, rung: str) -> list[optuna.trial.FrozenTrial]:
        told = self._studies[rung].get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return told + self._untold[rung]

    def _inherited(self, rung: str) -> dict[str, Any]:
        """Parameters that do not act at ``rung``: of the best at the highest rung that has any."""
        above = [
            r for r in reversed(RUNGS) if r in self._best and RUNGS.index(r) > RUNGS.index(rung)
        ]
        source = self._best[above[0]] if above else {}
        names = {p.name for p in self.space.parameters if not _acts(p, rung)}
        return {name: value for name, value in source.items() if name in names}

    def _suggest(self, trial: optuna.Trial, rung: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for parameter in self.space.parameters:
            student = values.get("student", self.space.defaults["student"])
            if parameter.student not in ("", student):
                continue
            if not _acts(parameter, rung) or len(parameter.choices) == 1:
                continue
            if parameter.name in self._fixed:
                values[parameter.name] = self._fixed[parameter.name]
                continue
            if parameter.needs and not self._active(parameter.needs, values):
                continue
            if any(values.get(drop) for drop in parameter.unless):
                continue
            values[parameter.name] = _draw(trial, parameter)
        return {name: value for name, value in values.items() if name not in self._fixed}

    def _active(self, part: str, values: Mapping[str, Any]) -> bool:
        full = {f"width/{n}": group.width for n, (_, group) in self.space.groups.items()}
        if part == "prune":
            return any(values.get(n, w) != w for n, w in full.items())
        return any(v != "fp32" for n, v in values.items() if n.startswith("precision/"))

    def _add(self, rung: str, policy: Policy, results: list[float], constraint: float) -> None:
        try:
            self.space.check(policy)
        except Impossible:
            return  # of an earlier, wider space: it counts as seen, and teaches nothing here
        known = self.space.values(policy)
        axes = [
            p for p in self.space.parameters
            if p.name in known and p.name not in self._fixed
            and _acts(p, rung) and len(p.choices) != 1
        ]  # fmt: skip
        self._untold[rung].append(
            optuna.create_trial(
                values=results,
                params={p.name: _in(p, known[p.name]) for p in axes},
                distributions={p.name: self._distributions[p.name] for p in axes},
                constraints={"limit": constraint},
            )
        )

    def _trim(self, rung: str) -> None:
        kept = self._completed(rung)[-WINDOW:]
        for digest in [d for d, (r, _) in self._asked.items() if r == rung]:
            del self._asked[digest]  # its result will be added like anybody's
        self._studies[rung], self._untold[rung] = self._study(), kept

    def _study(self) -> optuna.Study:
        self._seed = (self._seed + 1) % 2**32  # as numpy takes them
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler: optuna.samplers.BaseSampler = (
                optuna.samplers.RandomSampler(seed=self._seed)
                if self._sampler != "tpe"
                else optuna.samplers.TPESampler(
                    multivariate=True, group=True, n_startup_trials=ENOUGH, seed=self._seed
                )
            )
        return optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)


def _acts(parameter: Parameter, rung: str) -> bool:
    return RUNGS.index(parameter.rung) <= RUNGS.index(rung)


def _ordered(parameter: Parameter) -> bool:
    return parameter.name.startswith("width/")


def _distribution(parameter: Parameter) -> BaseDistribution:
    if _ordered(parameter):  # the index of a width, so that TPE knows which widths are neighbours
        return IntDistribution(0, len(parameter.choices) - 1)
    if parameter.choices:
        return CategoricalDistribution(parameter.choices)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def _draw(trial: optuna.Trial, parameter: Parameter) -> Any:
    if _ordered(parameter):
        return parameter.choices[trial.suggest_int(parameter.name, 0, len(parameter.choices) - 1)]
    if parameter.choices:
        return trial.suggest_categorical(parameter.name, parameter.choices)
    return trial.suggest_float(parameter.name, parameter.low, parameter.high, log=parameter.log)


def _in(parameter: Parameter, value: Any) -> Any:
    return parameter.choices.index(value) if _ordered(parameter) else value

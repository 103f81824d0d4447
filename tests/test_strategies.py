"""Where the policies of each strategy come from."""

import math
import random
from collections.abc import Callable
from typing import Any, ClassVar, cast, get_args

import pytest

from flyweight.compressors import RUNGS
from flyweight.search import proposals
from flyweight.search.spec import Search
from flyweight.search.strategies import STAGES, STREAK, source
from flyweight.search.warm import WarmStart
from flyweight.spaces import Capabilities, Network, Policy, Settings, Space

BOTH = ("fp32", "int8")


@pytest.fixture(scope="module")
def space(traced: Callable[[str], Network]) -> Space:
    target = Capabilities({"conv": BOTH, "linear": BOTH}, width_multiple=1)
    settings = Settings(
        min_keep=0.25, criteria=("l1", "taylor"), reconstruct=(True, False), qat=(True, False),
        calibrations=("minmax", "mse"), temperature=(1.0, 8.0), alpha=(0.5, 1.0),
        learning_rate=(0.001, 0.1),
    )  # fmt: skip
    return Space(traced("separable"), target, settings)


def loss(policy: Policy) -> float:
    return sum(1 / w for w in policy.prune.width.values()) + len(policy.quantize.precision) / 100


class Warm:
    """A warm start that knows one policy."""

    settings: ClassVar[dict[str, Any]] = {"criterion": "taylor"}

    def __init__(self, space: Space) -> None:
        self.space = space

    def sweep(self, count: int, seconds: float) -> list[Policy]:
        self.asked = count, seconds
        return [self.space.uniform(0.6)]

    def draw(self, rng: random.Random, _: Any) -> dict[str, Any]:
        return self.space.values_at(self.space.point(self.space.uniform(rng.uniform(0.3, 0.9))))

    def tell(self, *_: Any) -> None:
        return None


def drawn(space: Space, strategy: str, count: int, seed: int = 0) -> list[Policy]:
    recipes = [space.uniform(0.5, "int8")]
    found = source(strategy, space, "tpe", seed, count, Warm(space), recipes)
    out = []
    for _ in range(count):
        policy = found.ask()
        if policy is None:
            break
        out.append(policy)
        for rung in RUNGS:
            found.tell(policy, rung, loss(policy), 1.0, -1.0)
        found.fail(policy)
    return out


@pytest.mark.parametrize("strategy", get_args(Search.model_fields["strategy"].annotation))
def test_every_strategy_proposes_legal_policies_once(space: Space, strategy: str) -> None:
    found = drawn(space, strategy, 45)
    assert found
    assert len({p.digest for p in found}) == len(found)
    assert all(space.contains(p) for p in found)
    assert found == drawn(space, strategy, 45)


def test_what_is_solved_comes_first(space: Space) -> None:
    assert drawn(space, "joint", 12)[:2] == [space.uniform(0.6), space.uniform(0.5, "int8")]
    assert drawn(space, "solver", 12) == [space.uniform(0.6), space.uniform(0.5, "int8")]


def test_the_first_recipes_are_far_apart(space: Space) -> None:
    few = drawn(space, "uniform", 6)
    kept = [sum(p.prune.width.values()) for p in few]
    precisions = {len(p.quantize.precision) for p in few}
    assert precisions == {0, len(space.layers)}
    assert len(set(kept)) >= 3


def test_random_takes_nothing_that_was_solved(space: Space) -> None:
    assert space.uniform(0.6) not in drawn(space, "random", 45)


def test_sequential_keeps_what_it_chose(space: Space) -> None:
    found = drawn(space, "sequential", 45)
    stages = found[:15], found[15:30], found[30:]
    values = [[space.values(p) for p in stage] for stage in stages]
    assert not any(p.quantize.acts for p in (*stages[0], *stages[1]))
    for stage, free in zip(values[1:], STAGES[1:], strict=True):
        fixed = [{n: v for n, v in each.items() if not n.startswith(free)} for each in stage]
        names = set.intersection(*map(set, fixed))
        assert all(len({f[n] for f in fixed}) == 1 for n in names)
    best = min(stages[0], key=loss)
    assert stages[1][0].prune == best.prune
    assert any(p.quantize.acts for p in stages[2])


def test_joint_goes_on_asking_the_warm_start(space: Space) -> None:
    found = drawn(space, "joint", 40)
    uniform = {tuple(sorted(space.uniform(k / 1000).prune.width.items())) for k in range(300, 900)}
    from_there = [tuple(sorted(p.prune.width.items())) in uniform for p in found[2:]]
    assert sum(from_there) >= 20
    assert sum(from_there) <= 32


def test_a_long_search_seldom_asks_the_warm_start(
    space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposals, "MANY", 16)
    turns: list[int] = []

    class Counted(Warm):
        def draw(self, rng: random.Random, _: Any) -> dict[str, Any]:
            turns.append(found._turn - 1)
            return super().draw(rng, _)

    found = proposals.Proposals(space, "random", warm=cast(WarmStart, Counted(space)))
    while found._turn <= 64:
        found.ask()
    assert sum(turn <= 16 for turn in turns) == 12
    assert [turn for turn in turns if 16 < turn <= 64] == [17, 33, 49]


def test_sequential_goes_on_where_a_session_ended(space: Space) -> None:
    first = source("sequential", space, "tpe", 0, 30, None, [])
    begun = []
    for _ in range(12):  # the first stage has 10
        policy = first.ask()
        assert policy is not None
        begun.append(policy)
        first.tell(policy, "recalibrate", loss(policy), 1.0, -1.0)
    again = source("sequential", space, "tpe", 0, 30, None, [])
    for policy in begun:
        again.claim(policy)
        again.tell(policy, "recalibrate", loss(policy), 1.0, -1.0)
    following = [again.ask() for _ in range(4)]
    widths = {str(p.prune) for p in following if p}
    assert len(widths) == 1  # it distills what pruning chose
    assert not {p.digest for p in following if p} & {p.digest for p in begun}


def test_sequential_does_not_end_with_a_stage_that_has_few_choices(
    traced: Callable[[str], Network],
) -> None:
    target = Capabilities({"conv": BOTH, "linear": BOTH}, width_multiple=1)
    whole = Settings(min_keep=1.0, temperature=(1.0, 8.0))  # nothing to prune
    found = drawn(Space(traced("separable"), target, whole), "sequential", 12)
    assert any(p.quantize.acts for p in found)


def test_sequential_goes_on_to_a_stage_that_may_keep_a_limit_which_this_one_does_not(
    space: Space,
) -> None:
    proposals = source("sequential", space, "tpe", 0, 300, None, [])
    asked = []
    for _ in range(2 * STREAK + 3):
        policy = proposals.ask()
        assert policy is not None
        asked.append(policy)
        proposals.reject(policy, 9.0, 1.0)
    assert all(p.prune == asked[-1].prune for p in asked[STREAK:])
    assert not any(p.quantize.acts for p in asked[: 2 * STREAK])
    assert any(p.quantize.acts for p in asked[2 * STREAK :])


@pytest.mark.parametrize(("budget", "most"), [(math.inf, 60.0), (7200.0, 60.0), (120.0, 6.0)])
def test_the_sweep_keeps_to_its_share_of_the_time(space: Space, budget: float, most: float) -> None:
    warm = Warm(space)
    source("joint", space, "tpe", 0, 64, warm, [], budget)
    assert warm.asked == (8, most)

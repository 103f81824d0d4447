"""The sensitivity table: what is judged first, how the rest is filled in."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyweight.search.sensitivity import Sensitivity, axes_of, measure
from flyweight.spaces import Capabilities, Network, Policy, Settings, Space

BOTH = ("fp32", "int8")
TARGET = Capabilities({"conv": BOTH, "linear": BOTH}, width_multiple=1)


@pytest.fixture(scope="module")
def space(traced: Callable[[str], Network]) -> Space:
    settings = Settings(
        min_keep=0.125, criteria=("l1", "taylor"), reconstruct=(True, False),
        calibrations=("minmax", "mse"), depth=True,
    )  # fmt: skip
    return Space(traced("inverted"), TARGET, settings)


STATISTICS = 0.1  # what recomputing them harms by itself


class Quadratic:
    """Harm that is truly a sum, of squares of the shares removed; ``budget`` policies at most."""

    def __init__(self, space: Space, budget: float = float("inf")) -> None:
        self.space, self.left = space, budget
        self.asked: list[Policy] = []

    def weight(self, name: str) -> float:
        return 1.0 + sum(map(ord, name)) % 7

    def truth(self, policy: Policy) -> float:
        network = self.space.network.without(policy.prune.drop)
        removed = {
            n: 1 - policy.prune.width.get(n, g.width) / g.width for n, g in network.groups.items()
        }
        found = sum(self.weight(n) * r**2 for n, r in removed.items())
        found += sum(0.01 * self.weight(n) for n in policy.quantize.precision)
        found += sum(5 * self.weight(n) for n in policy.prune.drop)
        if policy.prune.width:
            found *= {"l1": 2, "taylor": 1}[policy.prune.criterion]
            found *= {True: 1, False: 3}[policy.prune.reconstruct]
        if policy.quantize.acts:
            found *= {"minmax": 2, "mse": 1}[policy.quantize.calibration]
        return found

    def __call__(
        self, policies: Sequence[Policy], recalibrated: bool = False
    ) -> list[float | None]:
        out: list[float | None] = []
        for policy in policies:
            self.left -= 1
            statistics = STATISTICS if recalibrated or policy.prune.acts else 0.0
            out.append(self.truth(policy) + statistics if self.left >= 0 else None)
        self.asked += policies
        return out


def alone(space: Space, table: Sensitivity, name: str, choice: Any) -> Policy:
    return space.policy({**table.settings, name: choice})


def test_a_sum_of_squares_is_found_exactly(space: Space) -> None:
    judge = Quadratic(space)
    table = measure(space, judge)
    assert table.settings == {"criterion": "taylor", "reconstruct": True, "calibration": "mse"}
    for axis in axes_of(space):
        for choice, harm in zip(axis.choices, table.of(axis), strict=True):
            true = judge.truth(alone(space, table, axis.name, choice))
            assert harm == pytest.approx(true, rel=1e-9, abs=1e-12)


def test_every_judged_policy_has_one_choice_of_its_own(space: Space) -> None:
    judge = Quadratic(space)
    table = measure(space, judge)
    recipes = 2 * 2 + 2 + 2  # criteria x reconstruct, calibrations, the untouched student twice
    for policy in judge.asked[recipes:]:
        changed = (policy.prune.width, policy.quantize.precision, policy.prune.drop)
        assert sum(map(len, changed)) == 1
    assert table.judged == table.choices == len(judge.asked) - recipes


@given(budget=st.integers(0, 80))
def test_what_there_was_no_time_for_is_filled_in(space: Space, budget: int) -> None:
    table = measure(space, Quadratic(space, budget))
    assert table.judged <= max(0, budget - 8)  # settings and the untouched student come first
    assert table.students["pruned"] == 0.0
    for axis in axes_of(space):
        harms = table.of(axis)
        assert all(0 <= h < float("inf") for h in harms)
        if axis.name.startswith("width/"):  # ascending: the more channels, the less harm
            assert harms == sorted(harms, reverse=True)
            assert harms[-1] == 0
        else:
            assert harms[axis.choices.index(axis.default)] == 0


@given(st.randoms(use_true_random=False))
def test_noise_never_makes_fewer_channels_better(space: Space, rng: Any) -> None:
    table = measure(space, lambda policies, _: [rng.random() for _ in policies])
    for axis in axes_of(space):
        if axis.name.startswith("width/"):
            assert table.of(axis) == sorted(table.of(axis), reverse=True)


def test_what_cannot_be_built_is_left_out(space: Space) -> None:
    group = next(iter(space.widths))
    judge = Quadratic(space)

    def refuses(policies: Sequence[Policy], recalibrated: bool = False) -> list[float | None]:
        return [
            None if group in policy.prune.width else harm
            for policy, harm in zip(policies, judge(policies, recalibrated), strict=True)
        ]

    table = measure(space, refuses)
    harms = list(table.harm[f"width/{group}"].values())
    assert harms == sorted(harms, reverse=True)
    assert harms[0] > 0  # as the usual group


def test_where_all_is_int8_the_base_has_the_same_calibration(
    traced: Callable[[str], Network],
) -> None:
    settings = Settings(precisions=("int8",), calibrations=("minmax", "mse"))
    space = Space(traced("inverted"), TARGET, settings)

    def judge(policies: Sequence[Policy], _: bool = False) -> list[float | None]:
        costs = {"minmax": 0.05, "mse": 0.01}
        return [costs[p.quantize.calibration] + 0.02 * len(p.prune.width) for p in policies]

    table = measure(space, judge)
    half = next(axis for axis in axes_of(space) if axis.name.startswith("width/"))
    assert max(table.of(half)) >= 0.02 - 1e-9


def test_other_students_are_judged_against_themselves(traced: Callable[[str], Network]) -> None:
    settings = Settings(students=("pruned", "small"))
    space = Space(traced("plain"), TARGET, settings, {"small": traced("mlp")})

    def judge(policies: Sequence[Policy], _: bool = False) -> list[float | None]:
        return [
            (3.0 if p.student == "small" else 0.0) + len(p.prune.width) + len(p.quantize.precision)
            for p in policies
        ]

    table = measure(space, judge)
    assert table.students == {"pruned": 0.0, "small": 3.0}
    layer = next(name for name in space.layers if name.startswith("small:"))
    assert table.harm[f"precision/{layer}"] == {"fp32": 0.0, "int8": 1.0}

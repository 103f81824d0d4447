"""The warm start on a device whose truth is known."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flyweight.compressors import RUNGS
from flyweight.search.controller import Budget, Controller, Price
from flyweight.search.limits import Limits
from flyweight.search.record import MemoryRecord
from flyweight.search.sensitivity import Sensitivity, measure
from flyweight.search.simulate import Clock, simulate
from flyweight.search.strategies import source
from flyweight.search.warm import BEYOND, NEAR, WarmStart, coarse_first
from flyweight.spaces import Capabilities, Network, Policy, Settings, Space

BOTH = ("fp32", "int8")


@pytest.fixture(scope="module")
def space(traced: Callable[[str], Network]) -> Space:
    target = Capabilities({"conv": BOTH, "linear": BOTH}, width_multiple=1)
    settings = Settings(min_keep=0.25, students=("pruned", "small"))
    return Space(traced("separable"), target, settings, {"small": traced("plain")})


class Device:
    """Half of the time of a layer in fp32 goes in int8; each channel costs. Another student is
    twice as fast."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.axes = tuple(
            p for p in space.parameters
            if p.name == "student" or p.name.startswith(("width/", "precision/"))
        )  # fmt: skip

    def ms(self, policy: Policy) -> float:
        network = self.space.networks[policy.student]
        share = np.mean([policy.prune.width.get(n, g.width) / g.width
                         for n, g in network.groups.items()])  # fmt: skip
        int8 = len(policy.quantize.precision) / len(network.layers)
        return float(share * (1 - 0.5 * int8)) * (0.5 if policy.student == "small" else 1.0)

    def predict(self, points: NDArray[np.int64]) -> NDArray[np.float64]:
        """The same of many points, a column at a time."""
        names = [axis.name for axis in self.axes]
        ms = np.zeros(len(points))
        for student, network in self.space.networks.items():
            whose = "" if student == "pruned" else f"{student}:"
            share, int8 = np.zeros(len(points)), np.zeros(len(points))
            for group, full in network.groups.items():
                at = names.index(f"width/{whose}{group}")
                share += np.array(self.axes[at].choices)[points[:, at]] / full.width
            for layer in network.layers:
                at = names.index(f"precision/{whose}{layer}")
                int8 += np.array(self.axes[at].choices)[points[:, at]] == "int8"
            at = names.index("student")
            mine = np.array(self.axes[at].choices)[points[:, at]] == student
            found = share / len(network.groups) * (1 - 0.5 * int8 / len(network.layers))
            ms = np.where(mine, found * (0.5 if student == "small" else 1.0), ms)
        return ms[:, None] * np.array([0.9, 1.0, 1.1])


def harm(space: Space, policy: Policy) -> float:
    network = space.networks[policy.student]
    removed = [1 - w / network.groups[n].width for n, w in policy.prune.width.items()]
    base = 0.5 if policy.student == "small" else 0.0
    return base + sum(r**2 for r in removed) + 0.01 * len(policy.quantize.precision)


def test_the_device_says_the_same_of_one_and_of_many(space: Space) -> None:
    device, rng = Device(space), random.Random(0)
    drawn = [space.sample(rng) for _ in range(20)]
    names = [axis.name for axis in space.axes]
    columns = [names.index(axis.name) for axis in device.axes]
    points = np.array([space.point(policy) for policy in drawn])[:, columns]
    assert device.predict(points)[:, 1] == pytest.approx([device.ms(policy) for policy in drawn])


@pytest.fixture(scope="module")
def table(space: Space) -> Sensitivity:
    return measure(space, lambda policies, _: [harm(space, p) for p in policies])


def test_it_keeps_the_limit_and_beats_the_recipes(space: Space, table: Sensitivity) -> None:
    device = Device(space)
    limits = Limits(95.0, latency_ms=0.4)
    found = WarmStart(space, table, device, limits).sweep(4)
    assert all(space.contains(p) for p in found)
    assert all(1.1 * device.ms(p) <= 0.4 for p in found)
    recipes = [space.uniform(keep, "int8") for keep in (1.0, 0.75, 0.5, 0.25)]
    allowed = [harm(space, p) for p in recipes if 1.1 * device.ms(p) <= 0.4]
    ours = [harm(space, p) for p in found if p.student == "pruned"]
    assert min(ours) < min(allowed)


def test_the_sweep_goes_on_below_the_limit(space: Space, table: Sensitivity) -> None:
    device = Device(space)
    found = WarmStart(space, table, device, Limits(95.0, latency_ms=0.4)).sweep(4)
    for student in space.networks:
        mine = [p for p in found if p.student == student]
        latencies = [device.ms(p) for p in mine]
        assert latencies[0] == max(latencies)
        assert latencies[1] == min(latencies)
        assert latencies[1] < 0.8 * latencies[0]
    assert Counter(p.student for p in found[:2]) == {"pruned": 1, "small": 1}


class Narrow(Device):
    """Where every width is the least, all takes longer than at half the widths."""

    def predict(self, points: NDArray[np.int64]) -> NDArray[np.float64]:
        widths = [i for i, axis in enumerate(self.axes) if axis.name.startswith("width/")]
        return super().predict(points) + 1.0 * (points[:, widths] == 0).any(1)[:, None]


def test_the_sweep_goes_beyond_the_smallest_where_that_is_not_the_fastest(
    space: Space, table: Sensitivity
) -> None:
    device = Narrow(space)
    found = WarmStart(space, table, device, Limits(95.0, latency_ms=1.0)).sweep(4)
    mine = [device.ms(p) for p in found if p.student == "pruned"]
    assert min(mine) < 0.5 * max(mine)


def test_without_a_latency_limit_it_begins_at_full_width_in_int8(
    space: Space, table: Sensitivity
) -> None:
    device = Device(space)
    found = WarmStart(space, table, device, Limits(95.0, max_drop=1.0)).sweep(5)
    for student in space.networks:
        mine = [device.ms(p) for p in found if p.student == student]
        assert max(mine) == pytest.approx(device.ms(space.uniform(1.0, "int8", student)))
        assert min(mine) < 0.7 * max(mine)


def test_a_limit_out_of_reach_gives_nothing(space: Space, table: Sensitivity) -> None:
    limits = Limits(95.0, latency_ms=0.01)
    start = WarmStart(space, table, Device(space), limits)
    assert start.sweep(4) == []
    fastest = min(
        Device(space).ms(space.smallest(precision, student))
        for precision in BOTH
        for student in space.networks
    )
    assert start.fastest_ms() == pytest.approx((0.9 * fastest, fastest, 1.1 * fastest))


def test_the_fastest_is_not_known_where_a_student_was_not_judged(
    space: Space, table: Sensitivity
) -> None:
    alone = replace(table, students={"pruned": 0.0})
    assert WarmStart(space, alone, Device(space), Limits(95.0, 0.01)).fastest_ms() is None


def test_what_the_clock_decided_is_told(space: Space, table: Sensitivity) -> None:
    start = WarmStart(space, table, Device(space), Limits(95.0, latency_ms=0.3))
    start.sweep(2)
    assert start.note() is None
    assert len(start.sweep(9, seconds=0.0)) < 9
    assert "the sweep of the warm start was cut after 0 s" in (start.note() or "")


class Weights:
    """Sizes in place of ``search.sizes``: the channels, a quarter in int8; zeros take nothing when
    packed. most: of the size packed."""

    def __init__(self, device: Device, most: float) -> None:
        self.device, self.most = device, most

    def of(self, policy: Policy) -> float:
        space, student = self.device.space, policy.student
        channels = [policy.prune.width.get(n, g.width)
                    for n, g in space.networks[student].groups.items()]  # fmt: skip
        int8 = len(policy.quantize.precision) / len(space.networks[student].layers)
        return sum(channels) * (1 - 0.75 * int8) * (1 - policy.prune.sparsity)

    def shares(
        self, points: NDArray[np.int64], student: str, sparsity: float
    ) -> NDArray[np.float64]:
        found = []
        for point in points:
            values = self.device.space.values_at(point)
            policy = self.device.space.policy({**values, "sparsity": sparsity})
            assert policy.student == student
            found.append(self.of(policy) / self.most)
        return np.array(found)[:, None]


@pytest.mark.parametrize("slowest", [None, 0.45])
def test_all_that_is_proposed_is_within_the_size(
    space: Space, table: Sensitivity, slowest: float | None
) -> None:
    device, rng = Device(space), random.Random(0)
    sizes: Any = Weights(device, 10.0)
    assert sizes.of(space.uniform(1.0, "int8")) > 10
    limits = Limits(95.0, latency_ms=slowest, compressed_bytes=10)
    warm = WarmStart(space, table, device, limits, sizes)
    found = warm.sweep(5)
    assert {p.student for p in found} == {"pruned", "small"}
    found += [space.policy({**warm.settings, **(warm.draw(rng) or {})}) for _ in range(12)]
    assert max(sizes.of(p) for p in found) <= 10
    assert max(sizes.of(p) for p in found) > 0.8 * 10
    assert all(1.1 * device.ms(p) <= (slowest or 0.55) for p in found)
    assert len(set(found)) > 8


def test_zeros_are_drawn_where_nothing_else_is_small_enough(
    space: Space, table: Sensitivity
) -> None:
    settings = replace(space.settings, sparsity=(0.0, 0.8, 0.5), students=("pruned",))
    sparse = replace(space, settings=settings, others={})
    device, alone = Device(sparse), replace(table, students={"pruned": 0.0})
    sizes: Any = Weights(device, 1.0)
    sizes.most = 0.6 * sizes.of(sparse.uniform(0.0, "int8"))
    limits = Limits(95.0, compressed_bytes=10)
    warm = WarmStart(sparse, alone, device, limits, sizes)
    found = warm.sweep(3)
    assert {p.prune.sparsity for p in found} == {0.5}
    assert all(sizes.of(p) <= sizes.most for p in found)
    rng = random.Random(0)
    assert warm.draw(rng, {"sparsity": 0.0}) is None
    drawn = [
        sparse.policy(settings | (warm.draw(rng, settings) or {}))
        for settings in ({"sparsity": 0.5}, {"sparsity": 0.8})
    ]
    assert all(sizes.of(p) <= sizes.most for p in drawn)


def test_a_size_out_of_reach_gives_nothing(space: Space, table: Sensitivity) -> None:
    device = Device(space)
    sizes: Any = Weights(device, 1.0)
    warm = WarmStart(space, table, device, Limits(95.0, compressed_bytes=1), sizes)
    assert warm.sweep(4) == []
    assert warm.draw(random.Random(0)) is None


def test_what_is_drawn_keeps_the_limit_and_differs(space: Space, table: Sensitivity) -> None:
    device, rng = Device(space), random.Random(0)
    warm = WarmStart(space, table, device, Limits(95.0, latency_ms=0.4))
    swept = warm.sweep(4)
    drawn = [space.policy({**warm.settings, **(warm.draw(rng) or {})}) for _ in range(8)]
    assert all(1.1 * device.ms(p) <= 0.4 for p in drawn)
    assert len({*drawn} - {*swept}) >= 4
    again, rng = (
        WarmStart(space, table, device, Limits(95.0, latency_ms=0.4)),
        random.Random(0),
    )
    again.sweep(4)
    assert [space.policy({**warm.settings, **(again.draw(rng) or {})}) for _ in range(8)] == drawn


def test_draws_learn_what_training_makes_of_a_choice(space: Space, table: Sensitivity) -> None:
    """Training repairs all that pruning harmed, but for one group: that one is left alone."""
    alone = replace(table, students={"pruned": 0.0})
    warm, rng = (
        WarmStart(space, alone, Device(space), Limits(95.0, latency_ms=0.4)),
        random.Random(0),
    )
    warm.sweep(4)
    dear = next(name for name in space.widths if not name.startswith("small:"))

    def kept() -> float:
        same = random.Random(1)  # the same limits and doubts
        drawn = [space.values(space.policy(warm.draw(same) or {})) for _ in range(20)]
        return float(np.mean([values[f"width/{dear}"] for values in drawn]))

    before = kept()
    for _ in range(40):
        policy = space.sample(rng)
        if policy.student == "pruned":
            removed = (
                1 - policy.prune.width.get(dear, space.widths[dear][-1]) / space.widths[dear][-1]
            )
            warm.tell(policy, "short", 0.02 * harm(space, policy) + 2.0 * removed**2, True)
    assert kept() > 1.1 * before
    assert all(1.1 * Device(space).ms(space.policy(warm.draw(rng) or {})) <= 0.4 for _ in range(3))


@pytest.mark.parametrize("climbs", [False, True])
@pytest.mark.parametrize("good", ["pruned", "small"])
def test_of_several_students_that_is_drawn_which_training_helps(
    space: Space, table: Sensitivity, good: str, climbs: bool
) -> None:
    """Also where the other is always stopped at short."""
    warm, rng = (
        WarmStart(space, table, Device(space), Limits(95.0, latency_ms=0.4)),
        random.Random(0),
    )
    warm.sweep(3)
    for _ in range(30):
        policy = space.sample(rng)
        share = 0.01 if policy.student == good else 1.0
        warm.tell(policy, "short", share * harm(space, policy), True)
        if climbs and policy.student == good:
            warm.tell(policy, "full", harm(space, policy), True)
    drawn = [space.policy(warm.draw(rng) or {}) for _ in range(20)]
    assert sum(policy.student == good for policy in drawn) >= 18


def test_draws_go_as_far_as_the_limits_are_kept(space: Space, table: Sensitivity) -> None:
    """Before anything is finished three quarters of the way to the fastest; then a little beyond
    what kept the limits, or as far as what broke them."""
    device, slowest = Device(space), 0.8

    def fastest(finished: dict[float, bool]) -> float:
        warm, rng = WarmStart(space, table, device, Limits(95.0, slowest)), random.Random(0)
        for keep, kept in finished.items():
            warm.tell(space.uniform(keep, "fp32"), "full", 0.1, kept)
        drawn = [space.policy(warm.draw(rng) or {}) for _ in range(25)]
        return 1.1 * min(device.ms(p) for p in drawn if p.student == "pruned")

    at = {keep: 1.1 * device.ms(space.uniform(keep, "fp32")) for keep in (0.7, 0.6, 0.5)}
    little = 2**-BEYOND
    assert fastest({}) < 0.4 * slowest
    assert 0.95 * little * at[0.6] <= fastest({0.6: True}) < at[0.6]
    assert 0.95 * at[0.6] <= fastest({0.6: False}) < slowest
    assert 0.95 * little * at[0.6] <= fastest({0.7: False, 0.6: True, 0.5: False}) < at[0.6]


def test_one_at_the_limit_that_broke_another_leaves_draws_some_spread(
    space: Space, table: Sensitivity
) -> None:
    device, policy = Device(space), space.uniform(0.6, "fp32")
    slowest = 1.1 * device.ms(policy)
    warm, rng = WarmStart(space, table, device, Limits(95.0, slowest)), random.Random(0)
    warm.tell(policy, "full", 0.1, False)
    student = warm._students["pruned"]
    limits = [student.limit(rng, warm._finished, False) for _ in range(25)]
    assert slowest * 2**-NEAR <= min(limits) < 0.95 * slowest


def test_where_points_are_limited_draws_lean_to_the_fast_end(
    space: Space, table: Sensitivity
) -> None:
    device, rng = Device(space), random.Random(0)
    student = WarmStart(space, table, device, Limits(95.0))._students["pruned"]
    even, leaning = (
        sorted(student.limit(rng, [], fast) for _ in range(400)) for fast in (False, True)
    )
    at_the_end = [sum(ms < even[0] * 2**BEYOND for ms in drawn) for drawn in (even, leaning)]
    assert at_the_end[1] == pytest.approx(200 + at_the_end[0] / 2, abs=30)
    assert leaning[0] == pytest.approx(even[0], rel=0.02)
    assert leaning[-1] == pytest.approx(even[-1], rel=0.05)


def test_a_seed_decides_a_whole_joint_search(space: Space, table: Sensitivity) -> None:
    """With the same table and one worker; the solver's draws, TPE and what climbs included."""
    device, limits, records = Device(space), Limits(95.0, 0.6, max_drop=1.0), []

    def price(policy: Policy) -> Price:
        ms = device.ms(policy)
        return Price((0.9 * ms, ms, 1.1 * ms), 1000, 1000)

    def evaluate(policy: Policy, rung: str) -> tuple[dict[str, Any], float]:
        noise = random.Random(f"{policy.digest}/{rung}").gauss(0.0, 0.02)
        loss = harm(space, policy) / (1 + RUNGS.index(rung)) + abs(noise)
        sizes = {"size_bytes": 1000, "compressed_bytes": 1000}
        return {"loss": loss, "metric": 95.0 - loss, "error": None, **sizes}, 1.0 + loss

    for seed in (1, 1, 2):
        clock, record = Clock(), MemoryRecord()
        warm = WarmStart(space, table, device, limits)
        recipes = [space.uniform(keep, precision) for keep in (1.0, 0.5) for precision in BOTH]
        asked = source("joint", space, "tpe", seed, 60, warm, recipes)
        control = Controller(asked, price, limits, record, Budget(60), clock=clock)
        simulate(control, evaluate, 1, clock)
        assert warm.note() is None
        records.append(record.entries())
    assert records[0] == records[1] != records[2]
    policies = {e["digest"] for e in records[0] if e["kind"] == "begin"}
    assert len(policies) == 60


def test_coarse_first() -> None:
    assert coarse_first(0) == []
    assert coarse_first(1) == [0]
    assert coarse_first(5) == [0, 4, 2, 1, 3]
    for count in range(2, 40):
        order = coarse_first(count)
        assert sorted(order) == list(range(count))
        assert order[:2] == [0, count - 1]

"""Latencies of many policies at once against those of their blueprints, one by one."""

import functools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.compressors import Prepared, Schedule
from flyweight.compressors.prepared import Start
from flyweight.kernels import (
    DeviceProfile,
    LatencyPredictor,
    Signature,
    SimulatedRuntime,
    Timed,
    signature,
)
from flyweight.search.batch import BatchPredictor
from flyweight.spaces import Capabilities, Impossible, Policy, Settings, Space

BOTH = ("fp32", "int8")
TARGETS = {
    "ends in int8": Capabilities({"conv": BOTH, "linear": BOTH}),
    "ends in float": Capabilities(
        {"conv": BOTH, "linear": BOTH},
        output_quantized=frozenset(), int8_ops=frozenset(), act_output_quantized=frozenset(),
    ),
    "no int8 linear": Capabilities({"conv": BOTH}),
}  # fmt: skip
WIDE = Settings(min_keep=0.01, multiple_of=1, depth=True)
# What is special: widths of several groups read at once, layers that run several times, norms of
# their own for each run, grouped convolutions that widths make depthwise, blocks inside of blocks.
NAMES = [
    "plain", "mlp", "pixels", "separable", "concat", "two", "sequence", "preactivation", "grouped",
    "gate", "fixed", "fused", "separate", "library", "shuffle", "inverted", "gated", "siamese",
    "recurrent", "dense", "inception", "inplace",
]  # fmt: skip


def took(piece: Signature) -> float:
    """What a piece takes on a device of our own, in ms."""
    return piece.nominal_ms * random.Random(repr(piece)).uniform(0.5, 3)


def timed(sums: list[Counter[Signature]]) -> list[Timed]:
    return [
        Timed(counts, sum(n * took(s) for s, n in counts.items()), 1.0, i % 4)
        for i, counts in enumerate(sums)
    ]


def predictor_of(networks: list[Timed]) -> LatencyPredictor:
    return LatencyPredictor(DeviceProfile({}, "", {}, "", networks))


class Case:
    """A space with a profile of ``known`` of its policies."""

    def __init__(
        self, networks: dict[str, Any], target: str, settings: Settings = WIDE, known: int = 24
    ) -> None:
        runtime = SimulatedRuntime(capabilities=TARGETS[target])
        starts = {name: Start(Any, network) for name, network in networks.items()}  # type: ignore[arg-type]
        self.prepared = Prepared(None, None, starts, None, runtime, Schedule())  # type: ignore[arg-type]
        others = self.prepared.others
        self.space = Space(self.prepared.network, TARGETS[target], settings, others)
        rng = random.Random(0)
        self.work = [self.work_of(self.space.sample(rng)) for _ in range(known)]
        self.predictor = predictor_of(timed(self.work))
        self.batch = BatchPredictor(self.prepared, self.space, self.predictor)

    def work_of(self, policy: Policy) -> Counter[Signature]:
        return signature(self.prepared.plan(policy))

    def sample(self, seed: int, count: int) -> list[Policy]:
        """Policies at random, some of them but a step apart, or in one precision."""
        rng = random.Random(seed)
        out = [self.space.sample(rng)]
        while len(out) < count:
            values = self.space.values(rng.choice(out))
            others = self.space.values(self.space.sample(rng))
            some = {n: v for n, v in others.items() if rng.random() < rng.choice((0.1, 0.5, 1.0))}
            if rng.random() < 0.2:
                for name, known in self.space.precisions.items():
                    some[f"precision/{name}"] = known[-1]
            out.append(self.space.policy(values | some))
        return out

    def check(self, policies: list[Policy], batch: BatchPredictor | None = None) -> Any:
        points = np.array([self.space.point(policy) for policy in policies])
        ends = (batch or self.batch).predict(points)
        plans = [self.prepared.plan(policy) for policy in policies]
        np.testing.assert_allclose(ends, self.predictor.predict(plans), rtol=1e-9)
        return ends


@pytest.fixture(scope="module")
def case(networks: ModuleType) -> Callable[..., Case]:
    @functools.cache
    def make(name: str, target: str = "ends in int8") -> Case:
        return Case({"pruned": networks.traced(name)}, target)

    return make


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 20), target=st.sampled_from([*TARGETS]))
def test_a_batch_is_predicted_as_its_blueprints_are(
    name: str, seed: int, count: int, target: str, case: Callable[..., Case]
) -> None:
    found = case(name, target)
    assert np.isfinite(found.check(found.sample(seed, count))).all()


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_students_are_networks_of_their_own(seed: int, networks: ModuleType) -> None:
    traced = networks.traced
    named = {"pruned": traced("inverted"), "small": traced("plain"), "other": traced("gated")}
    students = _students(named)
    students.check(students.sample(seed, 12))


_cases: dict[int, Case] = {}


def _students(named: dict[str, Any]) -> Case:
    if not _cases:
        _cases[0] = Case(
            named, "ends in int8", replace(WIDE, students=("small", "pruned", "other")), 60
        )
    return _cases[0]


def test_a_task_without_a_student_of_the_space_makes_it_impossible(networks: ModuleType) -> None:
    both = {"pruned": networks.traced("inverted"), "small": networks.traced("plain")}
    found = Case(both, "ends in int8", replace(WIDE, students=("pruned", "small")))
    del found.prepared.starts["small"]  # type: ignore[attr-defined]
    policies = [found.space.uniform(1.0, student=name) for name in ("pruned", "small", "pruned")]
    batch = BatchPredictor(found.prepared, found.space, found.predictor)
    ends = batch.predict(np.array([found.space.point(policy) for policy in policies]))
    assert np.isfinite(ends).all(1).tolist() == [True, False, True]
    with pytest.raises(Impossible):
        found.prepared.plan(policies[1])


def test_work_that_kills_the_runtime_is_infinite_in_a_batch(case: Callable[..., Case]) -> None:
    found = case("concat")
    forms = Counter((s.kind, s.form) for counts in found.work for s in counts)
    deadly = min((n, form) for form, n in forms.items() if n > 1)[1]
    rest = [c for c in found.work * 2 if deadly not in {(s.kind, s.form) for s in c}]
    died = [Timed(c, None, 1.0, 0) for c in found.work if c not in rest]
    found = Case({"pruned": found.prepared.network}, "ends in int8")
    found.predictor = predictor_of([*timed(rest), *died])
    found.batch = BatchPredictor(found.prepared, found.space, found.predictor)
    policies = found.sample(1, 60)
    alive = [deadly not in {(s.kind, s.form) for s in found.work_of(p)} for p in policies]
    assert 0 < sum(alive) < 60
    assert np.isfinite(found.check(policies)).all(1).tolist() == alive


def test_what_is_kept_is_bounded_and_changes_nothing(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = case("inverted")
    monkeypatch.setattr("flyweight.kernels.pieces.ROWS_BYTES", 24 * 8 * 150)
    monkeypatch.setattr("flyweight.kernels.pieces.MOST", 300)
    monkeypatch.setattr("flyweight.search.batch.NETWORKS", 2)
    batch = BatchPredictor(found.prepared, found.space, found.predictor)
    seen = []
    for seed in range(6):
        found.check(found.sample(seed, 20), batch)
        seen.append(len(batch._pieces._numbers))
    assert max(seen) < 900
    assert any(after < before for before, after in pairwise(seen))


def test_no_policies_take_no_time(case: Callable[..., Case]) -> None:
    found = case("plain")
    assert found.batch.predict(np.zeros((0, len(found.space.axes)), np.int64)).shape == (0, 3)


@pytest.mark.parametrize("name", ["inverted", "grouped", "gated"])
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_a_point_says_all_of_a_policy_that_decides_latency(
    name: str, seed: int, case: Callable[..., Case]
) -> None:
    space = case(name).space
    policy = space.sample(random.Random(seed))
    point = space.point(policy)
    back = space.policy(space.values_at(point))
    assert (back.student, back.prune.drop) == (policy.student, policy.prune.drop)
    assert back.prune.width == policy.prune.width
    assert back.quantize.precision == policy.quantize.precision
    assert space.point(back) == point
    assert all(0 <= i < len(axis.choices) for i, axis in zip(point, space.axes, strict=True))

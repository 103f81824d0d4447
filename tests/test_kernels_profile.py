"""Device profiles: nothing lost, nothing foreign; and what is predicted from them."""

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from flyweight.kernels import (
    DeviceProfile,
    LatencyPredictor,
    Signature,
    Timed,
    predictor_for,
    signature,
)
from flyweight.kernels.predictor import LEAST
from flyweight.kernels.signature import SESSION
from flyweight.spaces import (
    BadInput,
    Blueprint,
    Capabilities,
    Network,
    Settings,
    Space,
    blueprint,
)

DEVICE = {"cpu": "a CPU", "runtime": "onnxruntime", "threads": "1"}


@pytest.fixture(scope="module")
def device(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("tests/pieces.py")


def measured(device: ModuleType, seed: int, n: int, speed: float = 1.0) -> list[Timed]:
    """Networks on the device of tests/pieces.py, in four sessions whose speed differs."""
    rng = np.random.default_rng(seed)
    out = []
    for i, counts in enumerate(device.networks(seed, n)):
        pace = speed * (1 + 0.02 * (i * 4 // n))
        ms = device.total(counts) * pace * (1 + 0.01 * rng.standard_normal())
        out.append(Timed(counts, ms, 0.5 * pace, i * 4 // n, f"policy {i}"))
    return out


def profile(timed: list[Timed]) -> DeviceProfile:
    return DeviceProfile(DEVICE, "0123456789abcdef", {"input": (1, 3, 8, 8)}, "a network", timed)


def took(s: Signature) -> float:
    """What a piece of a traced network takes on a made-up device, in ms."""
    return s.nominal_ms * (3.0 if "int8" in s.kind else 4.0) + 0.001


def random_plans(network: Network, capabilities: Capabilities, n: int) -> list[Blueprint]:
    space, rng = Space(network, capabilities, Settings()), random.Random(0)
    return [blueprint(network, space.sample(rng), capabilities) for _ in range(n)]


def timed_plans(plans: list[Blueprint]) -> list[Timed]:
    return [
        Timed(counts, sum(n * took(s) for s, n in counts.items()), 0.5, 0)
        for counts in map(signature, plans)
    ]


def test_a_profile_comes_back_from_its_file(device: ModuleType, tmp_path: Path) -> None:
    made, path = profile(measured(device, 1, 10)), tmp_path / "p.jsonl"
    made.create(path)
    (another,) = measured(device, 2, 1)
    made.append(path, another)
    made.append(path, Timed(another.counts, None, 0.5, 4, "dies"))
    assert DeviceProfile.load(path) == made
    assert len(made.timed) == 12


@pytest.mark.parametrize(
    ("facts", "bits"),
    [
        ({"architecture": "x86_64", "flags": "avx2"}, 7),
        ({"architecture": "x86_64", "flags": "avx2 avx512f avx512_vnni"}, 8),
        ({"architecture": "aarch64", "flags": "asimddp"}, 8),
        ({"architecture": "x86_64", "flags": "avx2", "gpu": "a GPU"}, 8),
    ],
)
def test_a_profile_knows_the_weights_that_its_device_bears(
    facts: dict[str, str], bits: int, device: ModuleType, tmp_path: Path
) -> None:
    path, told = tmp_path / "p.jsonl", replace(profile(measured(device, 1, 3)), weight_bits=6)
    told.create(path)
    assert DeviceProfile.load(path).weight_bits == 6  # as its kernels were found to
    head, *rest = path.read_text().splitlines()
    old = json.loads(head) | {"device": facts}  # an earlier flyweight's
    del old["weight_bits"]
    path.write_text("\n".join([json.dumps(old), *rest]))
    assert DeviceProfile.load(path).weight_bits == bits


def test_two_that_write_a_profile_at_once_do_not_mix(device: ModuleType, tmp_path: Path) -> None:
    """Two searches that end together: each writes all of it, under a name of its own first."""
    path, made = tmp_path / "p.jsonl", profile(measured(device, 0, 30))
    (tmp_path / ".p.jsonl.partial").mkdir()  # where another writes
    made.create(path)
    assert DeviceProfile.load(path) == made
    assert {p.name for p in tmp_path.iterdir()} == {"p.jsonl", ".p.jsonl.partial"}


def test_a_last_line_that_was_cut_off_is_left_out(device: ModuleType, tmp_path: Path) -> None:
    made, path = profile(measured(device, 1, 10)), tmp_path / "p.jsonl"
    made.create(path)
    path.write_text(path.read_text()[:-30])
    assert DeviceProfile.load(path).timed == made.timed[:9]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["no device profile", "flyweight profile"]),
        ("{}", ["no device profile"]),
        ("not json\n{}", ["line 1", "not JSON"]),
        ('{"fingerprint": "0", "version": 9}', ["version 9", "1 or 2 is"]),
        ('{"fingerprint": "0", "version": 1}', ["line 1", "device"]),
        ('{"fingerprint": "0", "version": 1, "device": {}, "request": []}', ["line 1"]),
        (
            '{"fingerprint": "0", "version": 1, "device": {}, "request": {}, "network": ""}\n'
            '{"ms": 1}\n',
            ["line 2"],
        ),
    ],
)
def test_what_is_no_profile_is_refused_with_the_line(
    content: str, words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(BadInput) as caught:
        DeviceProfile.load(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)
    with pytest.raises(BadInput, match=r"no device profile at .*`flyweight profile --spec SPEC"):
        DeviceProfile.load(tmp_path / "absent")


INF = float("inf")


@pytest.mark.parametrize(
    "wrong",
    [
        {"ms": 0},
        {"ms": -1},
        {"ms": float("nan")},
        {"teacher_ms": INF},
        {"session": INF},
        {"work": [["conv fp32", "", "", [INF], 0.1, 1]]},
        {"work": [["conv fp32", "", "", [8], 0.1, INF]]},
    ],
)
def test_a_number_that_is_none_is_refused(
    wrong: dict[str, Any], device: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    profile(measured(device, 1, 2)).create(path)
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | wrong)
    path.write_text("\n".join(lines))
    with pytest.raises(BadInput, match="line 2"):
        DeviceProfile.load(path)


def test_intervals_hold_nine_tenths_of_networks_never_seen(device: ModuleType) -> None:
    predictor = LatencyPredictor(profile(measured(device, 3, 240)))
    unseen = device.networks(4, 400)
    ends = predictor.predict_work(unseen)
    # on a machine as fast as the teacher says it is
    took = np.array([device.total(c) for c in unseen]) * predictor.teacher_ms / 0.5
    noisy = took * (1 + 0.01 * np.random.default_rng(5).standard_normal(400))
    assert (np.diff(ends) > 0).all()
    inside = ((noisy >= ends[:, 0]) & (noisy <= ends[:, 2])).mean()
    assert 0.84 <= inside <= 0.97  # 400 draws of 0.9: within four standard deviations
    assert np.median((ends[:, 2] - ends[:, 0]) / ends[:, 1]) < 0.1


@pytest.mark.parametrize("fed_back", [0, 1, 8])
def test_one_session_and_a_few_finalists_still_make_intervals_that_hold(
    fed_back: int, device: ModuleType
) -> None:
    """A small session has to predict all others: what it says of deviations must not count."""
    alone = [replace(t, session=0, teacher_ms=0.5) for t in measured(device, 3, 90)]
    others = [replace(t, session=1) for t in alone[:fed_back]]
    predictor = LatencyPredictor(profile([*others, *alone[fed_back:]]))
    unseen = device.networks(4, 400)
    ends = predictor.predict_work(unseen)
    took = np.array([device.total(c) for c in unseen]) * 1.03  # the middle of the sessions' speeds
    noisy = took * (1 + 0.01 * np.random.default_rng(5).standard_normal(400))
    assert ((noisy >= ends[:, 0]) & (noisy <= ends[:, 2])).mean() >= 0.85


@pytest.mark.parametrize("scale", [1 / 3000, 64, 3000])
def test_a_device_may_be_as_fast_or_slow_as_it_likes(scale: float, device: ModuleType) -> None:
    timed = measured(device, 3, 120)
    other = [replace(t, ms=t.ms and scale * t.ms, teacher_ms=scale * t.teacher_ms) for t in timed]
    unseen = device.networks(4, 20)
    ends = LatencyPredictor(profile(timed)).predict_work(unseen)
    scaled = LatencyPredictor(profile(other)).predict_work(unseen)
    np.testing.assert_allclose(scaled / scale, ends, rtol=1e-6)


def test_a_machine_that_is_slower_now_is_slower_in_everything(device: ModuleType) -> None:
    made = profile(measured(device, 3, 120))
    usual, slow = LatencyPredictor(made), LatencyPredictor(made, teacher_ms=1.0)
    unseen = device.networks(4, 20)
    ratio = slow.predict_work(unseen) / usual.predict_work(unseen)
    np.testing.assert_allclose(ratio, 1.0 / usual.teacher_ms, rtol=1e-6)


def test_work_that_kills_the_runtime_is_never_predicted_to_end(device: ModuleType) -> None:
    timed, deadly = measured(device, 3, 60), Signature("conv int8", "7x7", "", (8, 8, 4), 0.01)
    good = device.networks(4, 1)[0]
    bad = Counter({**timed[0].counts, deadly: 1})
    made = profile([*timed, Timed(bad, None, 0.5, 0)])
    assert made.unavailable() == {("conv int8", "7x7")}
    ends = LatencyPredictor(made).predict_work([good, Counter({SESSION: 1, deadly: 1})])
    assert np.isfinite(ends).all(axis=1).tolist() == [True, False]
    # Of one size alone: other sizes of that form run.
    other = replace(deadly, sizes=(16, 8, 4))
    made.timed.append(Timed(Counter({SESSION: 1, other: 1}), 0.2, 0.5, 0))
    assert made.unavailable() == {deadly}
    cases = [Counter({SESSION: 1, piece: 1}) for piece in (other, deadly)]
    ends = LatencyPredictor(made).predict_work(cases)
    assert np.isfinite(ends).all(axis=1).tolist() == [True, False]


@pytest.mark.parametrize("name", ["plain", "separable", "concat", "gated"])
def test_a_prediction_is_the_sum_of_its_kernels(
    name: str, traced: Callable[[str], Any], capabilities: Capabilities
) -> None:
    plans = random_plans(traced(name), capabilities, 60)
    predictor = LatencyPredictor(profile(timed_plans(plans[:40])), teacher_ms=0.7)
    for plan, (_, middle, _) in zip(plans, predictor.predict(plans), strict=True):
        session, *kernels = predictor.parts(plan)
        assert session.name == ""
        assert [(k.name, k.precision) for k in kernels] == [
            (k.name, k.precision) for k in plan.kernels
        ]
        assert sum(part.ms for part in (session, *kernels)) == pytest.approx(middle, rel=1e-9)


def test_a_change_is_known_better_than_what_changes(
    traced: Callable[[str], Any], capabilities: Capabilities
) -> None:
    network = traced("plain")
    plans = random_plans(network, capabilities, 60)
    predictor = LatencyPredictor(profile(timed_plans(plans[:40])), teacher_ms=0.7)
    space = Space(network, capabilities, Settings())
    pairs = [
        (plan, blueprint(network, policy, capabilities))
        for plan in plans[40:]
        for policy in space.neighbours(plan.policy)
    ]
    before, after = (predictor.predict([pair[i] for pair in pairs])[:, 1] for i in (0, 1))
    changes = predictor.changes(pairs)
    np.testing.assert_allclose(changes[:, 0], after - before, atol=1e-9)
    back = predictor.changes([(after, before) for before, after in pairs])
    np.testing.assert_allclose(back, changes * (-1, 1), atol=1e-9)
    assert predictor.changes([(plans[0], plans[0])]).tolist() == [[0, 0]]
    assert predictor.changes([]).shape == (0, 2)

    apart = [predictor.times([signature(pair[i]) for pair in pairs])[:, 1] for i in (0, 1)]
    assert (changes[:, 1] < np.hypot(*apart)).mean() > 0.95
    sums = [[sum(n * took(s) for s, n in signature(p).items()) for p in pair] for pair in pairs]
    true = 0.7 / 0.5 * np.diff(sums)[:, 0]
    assert (np.abs(changes[:, 0] - true) < 3 * changes[:, 1] + 1e-9).mean() > 0.9


def test_a_predictor_beside_another_teacher(device: ModuleType) -> None:
    usual, unseen = LatencyPredictor(profile(measured(device, 3, 120))), device.networks(4, 20)
    before, slow = usual.predict_work(unseen), usual.beside(2 * usual.teacher_ms)
    np.testing.assert_allclose(slow.predict_work(unseen), 2 * before)
    np.testing.assert_allclose(usual.predict_work(unseen), before)


def test_of_no_plans_nothing_is_said(device: ModuleType) -> None:
    assert LatencyPredictor(profile(measured(device, 3, 60))).predict([]).shape == (0, 3)


def test_too_few_networks_say_nothing(device: ModuleType) -> None:
    with pytest.raises(BadInput, match=f"at least {LEAST} timed networks"):
        LatencyPredictor(profile(measured(device, 3, LEAST - 1)))


def test_a_profile_of_another_device_is_refused_or_used_with_wider_intervals(
    device: ModuleType,
) -> None:
    made = profile(measured(device, 3, 60))
    with pytest.raises(BadInput) as caught:
        predictor_for(made, "fedcba9876543210")
    words = "0123456789abcdef", "fedcba9876543210", "a CPU", "--allow-foreign", "earlier flyweight"
    for word in words:
        assert word in str(caught.value)
    known = replace(made, device=DEVICE | {"model": "family 25"})
    assert "earlier flyweight" not in known.told()
    unseen = device.networks(9, 10)
    own = predictor_for(made, made.fingerprint).predict_work(unseen)
    foreign = predictor_for(made, "fedcba9876543210", allow_foreign=True).predict_work(unseen)
    np.testing.assert_allclose(own[:, 1], foreign[:, 1])
    np.testing.assert_allclose(foreign[:, 2] - foreign[:, 1], 3 * (own[:, 2] - own[:, 1]))

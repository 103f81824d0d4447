"""A second device learned with the first: against a plain regression, and known truths."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from flyweight.kernels import DeviceProfile, LatencyPredictor, Signature, Timed
from flyweight.kernels.additive import AdditiveProcess
from flyweight.kernels.predictor import LEAST, LEAST_LIKE
from flyweight.kernels.signature import SESSION
from flyweight.kernels.transfer import TransferredProcess
from flyweight.search.profiling import lean
from flyweight.spaces import BadInput

FIRST = {"cpu": "a CPU", "runtime": "onnxruntime", "threads": "1"}
SECOND = {**FIRST, "threads": "4"}


@pytest.fixture(scope="module")
def device(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("tests/pieces.py")


def second(device: ModuleType, s: Signature) -> float:
    """What a piece takes on another device: faster at work, slower to begin it, and not by the
    same factor in all."""
    faster = {"conv fp32": 0.35, "conv int8": 0.6, "session": 1.0}[s.kind]
    return float(faster * device.truth(s) * (1.3 if s.form == "1x1" else 1.0) + 0.002)


def took(device: ModuleType, sums: list[Counter[Signature]], seed: int, on: str) -> list[float]:
    """Times of networks with an error of 1%."""
    rng = np.random.default_rng(seed)
    truth = {"first": device.truth, "second": lambda s: second(device, s)}[on]
    return [
        sum(n * truth(s) for s, n in counts.items()) * (1 + 0.01 * rng.standard_normal())
        for counts in sums
    ]


def profile(
    device: ModuleType, on: str, seed: int, n: int, session: int = 8, **changes: Any
) -> DeviceProfile:
    sums = device.networks(seed, n)
    timed = [
        Timed(counts, ms, 0.5, i // session, f"policy {seed} {i}")
        for i, (counts, ms) in enumerate(zip(sums, took(device, sums, seed, on), strict=True))
    ]
    name, told = {"first": ("1" * 16, FIRST), "second": ("2" * 16, SECOND)}[on]
    made = DeviceProfile(told, name, {"input": (1, 3, 8, 8)}, "a network", timed)
    return replace(made, **changes)


@pytest.fixture(scope="module")
def first(device: ModuleType) -> DeviceProfile:
    return profile(device, "first", 1, 200, session=50)


def groups_of(s: Signature, ms: float, call_ms: float) -> list[tuple[tuple[int, Any], float]]:
    """What a piece adds to which column of the regression."""
    shares = [((g, value), ms) for g, value in enumerate((None, s.kind, (s.kind, s.form)))]
    return shares if s == SESSION else [*shares, ((3, None), call_ms)]


def test_predictions_are_those_of_a_plain_linear_regression(device: ModuleType) -> None:
    """In the space of weights (Rasmussen & Williams 2006, 2.8), not of networks."""
    theirs, sums, new = device.networks(1, 60), device.networks(2, 12), device.networks(3, 6)
    strange = Signature("conv fp32", "7x7", "a", (8, 8, 4), 0.01)  # never timed on the second
    new[0][strange] += 2
    ms = np.array(took(device, sums, 2, "second"))
    like = AdditiveProcess(theirs, took(device, theirs, 1, "first"))
    process = TransferredProcess(sums, list(ms), like)

    def there(sums: list[Counter[Signature]]) -> tuple[Any, Any]:
        mean, deviation = like.predict(sums)
        return mean, deviation**2 - (like.noise * mean) ** 2

    mean, variance = there(sums)
    call_ms = mean.sum() / sum(c.total() - c[SESSION] for c in sums)
    rows = []
    for counts in (*sums, *new):
        row: dict[Any, float] = {}
        for s, n in counts.items():
            for key, part in groups_of(s, float(like.predict([{s: 1}])[0][0]), call_ms):
                row[key] = row.get(key, 0.0) + n * part
        rows.append(row)
    keys = list({key: None for row in rows for key in row})
    features = np.array([[row.get(key, 0.0) for key in keys] for row in rows])
    prior = np.diag([process.deviations[group] ** -2 for group, _ in keys])
    pace = float(np.median(ms / mean))
    noise = variance + (process.noise * ms / pace) ** 2

    def given(at: list[int]) -> tuple[Any, Any]:
        """Mean and covariance of the weights."""
        precise = features[at].T / noise[at]
        covariance = np.linalg.inv(prior + precise @ features[at])
        return covariance @ precise @ (ms / pace - mean)[at], covariance

    weights, covariance = given(list(range(12)))
    theirs_mean, theirs_variance = there(new)
    slow = theirs_mean + features[12:] @ weights
    spread = theirs_variance + np.diag(features[12:] @ covariance @ features[12:].T)
    found, deviation = process.predict(new)
    np.testing.assert_allclose(found, pace * slow, rtol=1e-6)
    expected = np.sqrt(spread + (process.noise * slow) ** 2)
    np.testing.assert_allclose(deviation, pace * expected, rtol=1e-5)

    groups = [i // 4 for i in range(12)]
    found, deviation = process.left_out(groups)
    for group in range(3):
        at = [i for i in range(12) if groups[i] == group]
        weights, covariance = given([i for i in range(12) if i not in at])
        slow = mean[at] + features[at] @ weights
        spread = noise[at] + np.diag(features[at] @ covariance @ features[at].T)
        np.testing.assert_allclose(found[at], pace * slow, rtol=1e-5)
        np.testing.assert_allclose(deviation[at], pace * np.sqrt(spread), rtol=1e-5)


@pytest.mark.parametrize("k", [8, 24])
def test_few_networks_are_enough_where_another_device_is_known(
    k: int, device: ModuleType, first: DeviceProfile
) -> None:
    few = profile(device, "second", 2, k)
    unseen = device.networks(5, 200)
    true = np.array([sum(n * second(device, s) for s, n in c.items()) for c in unseen])
    ends = LatencyPredictor(replace(few, like=first)).predict_work(unseen)
    error = abs(ends[:, 1] / true - 1)
    assert (error < 0.1).mean() >= 0.95
    assert ((true >= ends[:, 0]) & (true <= ends[:, 2])).mean() >= 0.85
    alone = AdditiveProcess([t.counts for t in few.timed], [t.ms or 0 for t in few.timed])
    assert np.median(error) < 0.5 * np.median(abs(alone.predict(unseen)[0] / true - 1))


def test_a_device_that_is_only_slower_is_learned_from_eight_networks(
    device: ModuleType, first: DeviceProfile
) -> None:
    few = profile(device, "first", 2, 8, fingerprint="2" * 16)
    few.timed = [replace(t, ms=t.ms and 7 * t.ms) for t in few.timed]
    unseen = device.networks(5, 100)
    before = LatencyPredictor(first).predict_work(unseen)
    after = LatencyPredictor(replace(few, like=first)).predict_work(unseen)
    error = abs(after[:, 1] / (7 * before[:, 1]) - 1)
    assert (error < 0.1).all()  # what is asked of a second device
    assert np.median(error) < 0.02  # twice what a network is measured to


def test_a_device_that_is_not_like_the_other_is_left_to_its_own_networks(
    device: ModuleType, first: DeviceProfile
) -> None:
    strange = random.Random(0).sample(first.timed, len(first.timed))
    timed = [replace(t, ms=s.ms) for t, s in zip(first.timed, strange, strict=True)]
    other = replace(first, timed=timed)
    few, unseen = profile(device, "second", 2, 48), device.networks(5, 100)
    ends = LatencyPredictor(replace(few, like=other)).predict_work(unseen)
    alone = LatencyPredictor(few).predict_work(unseen)
    np.testing.assert_allclose(ends[:, 1], alone[:, 1], rtol=1e-9)


def test_fewer_networks_make_wider_intervals(device: ModuleType, first: DeviceProfile) -> None:
    unseen = device.networks(5, 100)
    widths = []
    for k in (8, 24, 96):
        ends = LatencyPredictor(replace(profile(device, "second", 2, k), like=first)).predict_work(
            unseen
        )
        widths.append(float(np.median((ends[:, 2] - ends[:, 0]) / ends[:, 1])))
    assert widths[0] > widths[1] > widths[2]


def test_a_profile_that_leans_on_another_comes_back_from_its_file(
    device: ModuleType, first: DeviceProfile, tmp_path: Path
) -> None:
    made, path = profile(device, "second", 2, 8, like=first), tmp_path / "p.jsonl"
    made.create(path)
    (another,) = profile(device, "second", 3, 1).timed
    made.append(path, another)
    made.append(path, Timed(another.counts, None, 0.5, 4, "dies"))
    found = DeviceProfile.load(path)
    assert found == made
    assert found.like == first
    assert len(found.timed) == 10
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].replace('"like"', '"no"'), *lines[1:]]))
    with pytest.raises(BadInput, match=r"line 2.*no other device"):
        DeviceProfile.load(path)


def test_too_few_networks_of_its_own_say_nothing(device: ModuleType, first: DeviceProfile) -> None:
    with pytest.raises(BadInput, match=f"at least {LEAST_LIKE} timed networks"):
        LatencyPredictor(profile(device, "second", 2, LEAST_LIKE - 1, like=first))


def test_what_the_other_device_dies_of_has_to_be_shown(
    device: ModuleType, first: DeviceProfile
) -> None:
    here, there = (Signature("conv int8", form, "", (8, 8, 4), 0.01) for form in ("7x7", "5x5"))
    other = replace(first, timed=[*first.timed, Timed(Counter([SESSION, there]), None, 0.5, 0)])
    few = profile(device, "second", 2, 8, like=other)
    assert few.unavailable() == {("conv int8", "5x5")}
    few.timed.append(Timed(Counter([SESSION, here]), None, 0.5, 0))
    assert few.unavailable() == {("conv int8", "5x5"), ("conv int8", "7x7")}
    few.timed.append(Timed(Counter([SESSION, there]), 0.1, 0.5, 0))
    assert few.unavailable() == {("conv int8", "7x7")}


def test_profiles_that_cannot_be_leaned_on_are_refused_with_the_reason(
    device: ModuleType, first: DeviceProfile
) -> None:
    def of_second(**changes: Any) -> DeviceProfile:
        return profile(device, "second", 2, 8, **changes)

    third = replace(first, fingerprint="3" * 16)
    refused: list[tuple[DeviceProfile, DeviceProfile, list[str]]] = [
        (of_second(), replace(first, network="another"), ["another", "a network"]),
        (of_second(), replace(first, request={"input": (1,)}), ["(1,)", "(1, 3, 8, 8)"]),
        (of_second(), replace(first, fingerprint="2" * 16), ["this device itself", "go on"]),
        (of_second(), replace(third, like=first), ["1" * 16, "name that one"]),
        (of_second(like=third), first, ["3" * 16, "1" * 16, "another file"]),
        (of_second(), replace(first, timed=first.timed[: LEAST - 1]), [f"least {LEAST}"]),
    ]
    for own, other, words in refused:
        with pytest.raises(BadInput) as caught:
            lean(own, other)
        for word in words:
            assert word in str(caught.value)
    own = of_second()
    lean(own, first)
    assert own.like is first
    grown = replace(first, timed=[*first.timed, *first.timed[:1]])
    lean(own, grown)  # the same device, known better
    assert own.like is grown

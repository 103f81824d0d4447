"""A second device learned with the first: against a plain slow process, and known truths."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from flyweight.kernels import DeviceProfile, LatencyPredictor, Signature, Timed
from flyweight.kernels.additive import PARTS, AdditiveProcess
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


@pytest.fixture(scope="module")
def plainly(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("tests/test_kernels_additive.py")


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


def dense(
    plainly: ModuleType, process: TransferredProcess, like: AdditiveProcess, sums: Any, new: Any
) -> tuple[Any, Any]:
    """Covariance between all of ``like``'s sums, ``sums`` and ``new``, from the definition: shared
    by both devices, and the second's own. Mean and covariance of the last two are asked of it."""
    rows = [*like.sums, *sums, *new]
    second_from = len(like.sums)
    keys = list({s: None for counts in rows for s in counts})
    weights = np.array([[counts[s] * s.nominal_ms for s in keys] for counts in rows])
    shared = sum(
        deviation**2 * np.array([[plainly.correlation(part, a, b) for b in keys] for a in keys])
        for deviation, part in zip(like.deviations, PARTS, strict=True)
    )
    joint = weights @ shared @ weights.T
    joint[second_from:, second_from:] *= 1 + process.apart**2
    return joint, second_from


def test_predictions_are_those_of_a_plain_process_of_both_devices(
    device: ModuleType, plainly: ModuleType
) -> None:
    theirs, sums, new = device.networks(1, 30), device.networks(2, 12), device.networks(3, 6)
    times, ms = took(device, theirs, 1, "first"), np.array(took(device, sums, 2, "second"))
    like = AdditiveProcess(theirs, times)
    process = TransferredProcess(sums, list(ms), like)
    joint, n = dense(plainly, process, like, sums, new)
    pace = plainly.pace_of(theirs, times)
    ratio = float(np.median(ms / like.predict(sums)[0]))
    y = np.concatenate([np.array(times) / pace, ms / (pace * ratio)])
    noise = np.concatenate([like.noise * y[:n], process.noise * y[n:]])

    def given(at: list[int], wanted: list[int]) -> tuple[Any, Any]:
        known = joint[np.ix_(at, at)] + np.diag(noise[at] ** 2)
        cross = joint[np.ix_(wanted, at)]
        mean = cross @ np.linalg.solve(known, y[at])
        rest = joint[np.ix_(wanted, wanted)] - cross @ np.linalg.solve(known, cross.T)
        return pace * ratio * mean, pace * ratio * np.sqrt(np.diag(rest))

    mean, deviation = process.predict(new)
    slow_mean, slow = given(list(range(42)), list(range(42, 48)))
    np.testing.assert_allclose(mean, slow_mean, rtol=1e-6)
    np.testing.assert_allclose(
        deviation, np.sqrt(slow**2 + (process.noise * slow_mean) ** 2), rtol=1e-4
    )
    groups = [i // 4 for i in range(12)]
    mean, deviation = process.left_out(groups)
    for group in range(3):
        out = [n + i for i in range(12) if groups[i] == group]
        slow_mean, slow = given([i for i in range(42) if i not in out], out)
        at = [i - n for i in out]
        np.testing.assert_allclose(mean[at], slow_mean, rtol=1e-5)
        own = (process.noise * ms[at]) ** 2
        np.testing.assert_allclose(deviation[at] ** 2, slow**2 + own, rtol=1e-3)


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
    np.testing.assert_allclose(after[:, 1], 7 * before[:, 1], rtol=0.05)


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

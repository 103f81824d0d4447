"""The additive process against a slow, plain one, and against a device whose truth is known."""

import math
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from flyweight.kernels.additive import BLOCK, PARTS, AdditiveProcess, Part, _Table, places
from flyweight.kernels.pieces import AdditivePieces
from flyweight.kernels.signature import SESSION, Signature


@pytest.fixture(scope="module")
def device(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("tests/pieces.py")


def predict(process: AdditiveProcess, sums: list[Any]) -> tuple[Any, Any]:
    pieces = AdditivePieces(process)
    return pieces.predict(pieces.numbers(sums))


def correlation(part: Part, a: Signature, b: Signature) -> float:
    """Of two pieces under ``part``, from its definition."""
    if part.octaves is None:
        return float(part.key(a) == part.key(b))
    if (a.kind, a.form) != (b.kind, b.form):
        return 0.0
    square = sum(
        (np.log2(x / y) / part.octaves) ** 2 for x, y in zip(a.sizes, b.sizes, strict=True)
    )
    for x, y in list(zip(a.sizes, b.sizes, strict=True))[:2]:
        square += ((-x % BLOCK - -y % BLOCK) / BLOCK / (part.octaves / 2)) ** 2
    return float(np.exp(-square / 2))


def pace_of(sums: list[Any], ms: list[float]) -> float:
    """How much slower the device is than the nominal one."""
    nominal = [sum(n * s.nominal_ms for s, n in counts.items()) for counts in sums]
    return float(np.median(np.array(ms) / nominal))


def plain(
    process: AdditiveProcess,
    sums: list[Any],
    ms: list[float],
    new: list[Any],
    pace: float,
    beside: Any = None,
) -> Any:
    """Mean and deviation of ``new``, piece by piece and without closed forms."""
    everything = list(dict.fromkeys(s for counts in [*sums, *new] for s in counts))
    factor = np.zeros((len(everything),) * 2)
    for i, a in enumerate(everything):
        for j, b in enumerate(everything):
            factor[i, j] = sum(
                d**2 * correlation(part, a, b)
                for d, part in zip(process.deviations, PARTS, strict=True)
            )
    nominal = np.array([s.nominal_ms for s in everything]) * pace
    rows = np.array([[counts.get(s, 0) for s in everything] for counts in [*sums, *new]]) * nominal
    joint = rows @ factor @ rows.T
    n, y = len(sums), np.array(ms)
    known = joint[:n, :n] + np.diag((process.noise**2 - process.common**2) * y**2)
    if process.common:
        one = np.eye(n) - 1 / n  # of the errors only how they differ
        same = one @ np.array([[a == b for b in beside] for a in beside]) @ one
        known += process.common**2 * same * np.outer(y, y)
    mean = joint[n:, :n] @ np.linalg.solve(known, y)
    variance = np.diag(joint[n:, n:] - joint[n:, :n] @ np.linalg.solve(known, joint[:n, n:]))
    return mean, np.sqrt(np.maximum(variance, 0) + (process.noise * mean) ** 2)


def test_predictions_are_those_of_a_plain_gaussian_process(device: ModuleType) -> None:
    sums, new = device.networks(1, 40), device.networks(2, 10)
    rng = np.random.default_rng(0)
    ms = [device.total(c) * (1 + 0.01 * rng.standard_normal()) for c in sums]
    process = AdditiveProcess(sums, ms)
    mean, deviation = predict(process, new)
    slow_mean, slow_deviation = plain(process, sums, ms, new, pace_of(sums, ms))
    np.testing.assert_allclose(mean, slow_mean, rtol=1e-6)
    np.testing.assert_allclose(deviation, slow_deviation, rtol=1e-4)


def test_what_was_observed_together_has_an_error_in_common(device: ModuleType) -> None:
    """Of 4%, of twenty times eight networks; of 1% each has its own."""
    sums, new = device.networks(1, 160), device.networks(2, 40)
    rng, beside = np.random.default_rng(0), [f"group {i // 8}" for i in range(160)]
    errors = np.repeat(1 + 0.04 * rng.standard_normal(20), 8) + 0.01 * rng.standard_normal(160)
    ms = list(errors * [device.total(c) for c in sums])
    process, blind = AdditiveProcess(sums, ms, beside), AdditiveProcess(sums, ms)
    assert process.common == pytest.approx(0.04, rel=0.5)
    assert AdditiveProcess(sums, ms, ["one group"] * 160).common == 0
    assert process.noise == pytest.approx(math.hypot(0.01, 0.04), rel=0.5)
    assert blind.common == 0
    mean, deviation = predict(process, new)
    slow = plain(process, sums, ms, new, pace_of(sums, ms), beside)
    np.testing.assert_allclose(mean, slow[0], rtol=1e-6)
    np.testing.assert_allclose(deviation, slow[1], rtol=1e-4)
    true = np.array([device.total(c) for c in new])
    off, off_blind = (np.abs(p / true - 1).mean() for p in (mean, predict(blind, new)[0]))
    assert off < off_blind


def test_channels_are_alike_that_fill_as_many_blocks() -> None:
    """A block more costs a whole one: 17 channels are nearer to 18, even to 24, than to 16."""

    def piece(channels: int) -> Signature:
        return Signature("conv fp32", "3x3", "", (channels, 32, 49), 0.1)

    at = places([piece(channels) for channels in (16, 17, 18, 24, 32)])
    apart = np.linalg.norm(at - at[1], axis=1)
    assert apart[2] < apart[3] < apart[0]
    six, eight, twelve = (piece(channels) for channels in (6, 8, 12))
    (lanes,) = (p for p in PARTS if p.key(eight) == p.key(twelve) != p.key(six))
    assert lanes.octaves is None


def test_variances_are_those_of_the_covariance(device: ModuleType) -> None:
    sums = [*device.networks(1, 200), *device.networks(1, 3), Counter()]
    for part in PARTS:
        table = _Table(part, sums)
        np.testing.assert_allclose(table.variances(), np.diag(table.covariance()), rtol=1e-12)
    for few in ([], [Counter()]):
        assert _Table(PARTS[-2], few).variances().tolist() == [0.0] * len(few)


def test_many_sums_at_once_take_no_square_of_memory(device: ModuleType) -> None:
    """A profile that leans on another one asks it so, of all policies that a search looks at."""
    sums = device.networks(1, 40)
    process = AdditiveProcess(sums, [device.total(counts) for counts in sums])
    many = device.networks(2, 3000)
    tracemalloc.start()
    process.predict(many)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 * len(many) ** 2 / 2  # of half a matrix


@pytest.mark.parametrize("groups", [list(range(12)), [i // 4 for i in range(12)]])
def test_what_is_left_out_is_predicted_as_if_it_had_never_been_seen(
    groups: list[int], device: ModuleType
) -> None:
    sums = device.networks(3, 12)
    rng = np.random.default_rng(1)
    ms = np.array([device.total(c) * (1 + 0.01 * rng.standard_normal()) for c in sums])
    process = AdditiveProcess(sums, list(ms))
    mean, deviation = process.left_out(groups)
    pace = pace_of(sums, list(ms))
    for group in set(groups):
        held = [i for i in range(12) if groups[i] == group]
        rest = [i for i in range(12) if groups[i] != group]
        slow_mean, slow = plain(
            process, [sums[i] for i in rest], list(ms[rest]), [sums[i] for i in held], pace
        )
        np.testing.assert_allclose(mean[held], slow_mean, rtol=1e-5)
        # its noise is relative to what was measured, a prediction's to what is predicted
        noise = process.noise**2 * (ms[held] ** 2 - slow_mean**2)
        np.testing.assert_allclose(deviation[held] ** 2, slow**2 + noise, rtol=1e-3)


def test_it_learns_a_device_from_sums_alone(device: ModuleType) -> None:
    sums, new = device.networks(4, 300), device.networks(5, 200)
    rng = np.random.default_rng(2)
    ms = [device.total(c) * (1 + 0.01 * rng.standard_normal()) for c in sums]
    mean, deviation = predict(AdditiveProcess(sums, ms), new)
    error = mean / np.array([device.total(c) for c in new]) - 1
    assert np.mean(abs(error) < 0.03) > 0.95
    held = abs(mean - np.array([device.total(c) for c in new])) < 2 * deviation
    assert held.mean() > 0.9


def test_it_is_less_sure_of_what_it_has_never_seen(device: ModuleType) -> None:
    sums = device.networks(6, 100)
    process = AdditiveProcess(sums, [device.total(c) for c in sums])
    known = Counter([SESSION, *device.pieces(random.Random(7), 10)])
    strange = Counter({SESSION: 1, Signature("softmax fp32", "", "", (4096,), 0.02): 10})
    mean, deviation = predict(process, [known, strange])
    assert deviation[1] / mean[1] > 5 * deviation[0] / mean[0]


@pytest.mark.parametrize("ms", [[1.0], [1.0, float("nan")], [1.0, 0.0]])
def test_times_that_are_none_are_refused(ms: list[float], device: ModuleType) -> None:
    with pytest.raises(ValueError, match="time"):
        AdditiveProcess(device.networks(8, 2), ms)

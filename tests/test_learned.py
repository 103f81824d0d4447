"""What results teach about harms, on losses whose truth is known."""

import random

import numpy as np
import pytest
from scipy import optimize

from flyweight.search.learned import DOUBT, HarmModel, LearnedHarms

AXES, CHOICES, SETTINGS = 6, 5, 3
HARMS = [np.linspace(0, 1, CHOICES) ** 2 * (j + 1) / AXES for j in range(AXES)]
TRUE = np.exp(np.array([1.0, -1.0, 0.5, -0.5, 0.0, 1.2]))
WEIGHTS = np.array([0.3, -0.2, 0.0])


def results(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Points, settings and what the loss would be, up to a rung's scale and power."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        point, settings = rng.integers(0, CHOICES, AXES), rng.uniform(-1, 1, SETTINGS)
        harm = sum(m * h[i] for m, h, i in zip(TRUE, HARMS, point, strict=True))
        out.append((point, settings, float(np.log(harm + 1e-3) + settings @ WEIGHTS)))
    return out


def drawn(learned: LearnedHarms, count: int = 300) -> np.ndarray:
    """log m of the axes [count, axes], as the drawn harms say."""
    rng = random.Random(0)
    return np.array(
        [[np.log(d[-1] / h[-1]) for d, h in zip(learned.draw(rng).harms, HARMS, strict=True)]
         for _ in range(count)]
    )  # fmt: skip


def test_without_results_harms_are_doubted_as_the_prior_says() -> None:
    found = drawn(LearnedHarms(HARMS, 0.0), 1000)
    assert found.mean(0) == pytest.approx(np.zeros(AXES), abs=0.1)
    assert found.std(0) == pytest.approx(DOUBT * np.ones(AXES), rel=0.1)


def test_results_of_two_rungs_teach_what_each_choice_harms() -> None:
    learned = LearnedHarms(HARMS, 1e-3)
    for k, (point, settings, log_loss) in enumerate(results(80)):
        learned.tell("short", point, settings, float(np.exp(0.8 * log_loss - 1)))
        if k % 3 == 0:
            learned.tell("full", point, settings, float(np.exp(0.6 * log_loss - 2)))
    found = drawn(learned)
    # All factors may grow together, which the rungs' scales take back: their ratios are known.
    apart = np.log(TRUE) - np.log(TRUE).mean()
    assert (found - found.mean(1, keepdims=True)).mean(0) == pytest.approx(apart, abs=0.2)
    assert found.std(0).max() < 0.8 * DOUBT


def test_more_results_leave_less_doubt() -> None:
    doubts = []
    for count in (0, 5, 20, 80):
        learned = LearnedHarms(HARMS, 1e-3)
        for point, settings, log_loss in results(count):
            learned.tell("full", point, settings, float(np.exp(log_loss)))
        found = drawn(learned)
        doubts.append(float((found - found.mean(1, keepdims=True)).std(0).mean()))
    assert doubts == sorted(doubts, reverse=True)
    assert doubts[-1] < 0.4 * doubts[0]


def test_a_loss_is_drawn_for_the_rung_that_it_is_asked_for() -> None:
    learned = LearnedHarms(HARMS, 1e-3)
    for point, settings, log_loss in results(60):
        learned.tell("full", point, settings, float(np.exp(0.7 * log_loss - 2)))
        learned.tell("short", point, settings, float(np.exp(0.9 * log_loss - 1)))
    rng = random.Random(0)
    point, settings, log_loss = results(60)[0]
    truth = log_loss - settings @ WEIGHTS
    for rung, power, scale in (("full", 0.7, -2), ("short", 0.9, -1)):
        found = []
        for _ in range(50):
            drawn = learned.draw(rng, rung)
            harm = sum(h[i] for h, i in zip(drawn.harms, point, strict=True))
            found.append(drawn.log_loss(float(harm)))
        assert np.mean(found) == pytest.approx(power * truth + scale, abs=0.15)
    # Of a rung without results hardly anything is known.
    assert np.std([learned.draw(rng, "other").log_loss(1.0) for _ in range(200)]) > 1


def test_it_orders_new_policies_better_than_the_table() -> None:
    learned = LearnedHarms(HARMS, 1e-3)
    for point, settings, log_loss in results(60):
        learned.tell("full", point, settings, float(np.exp(log_loss)))
    new = results(200, seed=1)
    truth = np.array([loss - settings @ WEIGHTS for _, settings, loss in new])
    harms = learned.draw(random.Random(0)).harms

    def summed(of: list[np.ndarray]) -> np.ndarray:
        return np.array([sum(h[i] for h, i in zip(of, p, strict=True)) for p, _, _ in new])

    agreement = [np.corrcoef(np.log(summed(h) + 1e-3), truth)[0, 1] for h in (HARMS, harms)]
    assert agreement[1] > 0.97 > agreement[0]


def test_the_doubt_is_that_of_the_whole_model() -> None:
    """The drawn factors have the covariance that inverting the whole precision gives."""
    learned = LearnedHarms(HARMS, 1e-3)
    told = results(15)
    for point, settings, log_loss in told:
        learned.tell("full", point, settings, float(np.exp(log_loss)))
    chosen = np.array([[h[i] for h, i in zip(HARMS, p, strict=True)] for p, _, _ in told])
    model = HarmModel(
        1e-3, [(chosen, np.array([s for _, s, _ in told]), np.array([t[2] for t in told]))]
    )
    best = optimize.minimize(lambda at: 0.5 * (model.misfit(at) ** 2).sum(), model.prior()).x
    slopes = optimize.approx_fprime(best, model.misfit, 1e-6)
    covariance = np.linalg.inv(slopes.T @ slopes)[:AXES, :AXES]
    found = drawn(learned, 4000)
    assert found.mean(0) == pytest.approx(best[:AXES], abs=0.05)
    assert np.cov(found.T) == pytest.approx(covariance, abs=0.03)


def test_slopes_are_those_of_the_misfit() -> None:
    rng = np.random.default_rng(0)
    rungs = [(rng.random((n, AXES)), rng.normal(size=(n, 2)), rng.normal(size=n)) for n in (7, 3)]
    model = HarmModel(0.01, rungs)
    at = rng.normal(size=model.size)
    expected = optimize.approx_fprime(at, model.misfit, 1e-7)
    assert model.slopes(at) == pytest.approx(expected, abs=1e-4)


def test_a_loss_of_zero_and_a_policy_without_harm_are_taken() -> None:
    learned = LearnedHarms(HARMS, 0.0)
    learned.tell("full", np.zeros(AXES, int), np.zeros(SETTINGS), 0.0)
    assert all(np.isfinite(h).all() for h in learned.draw(random.Random(0)).harms)


def test_the_same_results_and_seed_draw_the_same() -> None:
    def once() -> list[np.ndarray]:
        learned = LearnedHarms(HARMS, 1e-3)
        for point, settings, log_loss in results(12):
            learned.tell("full", point, settings, float(np.exp(log_loss)))
        return [*learned.draw(random.Random(3)).harms]

    for a, b in zip(once(), once(), strict=True):
        assert (a == b).all()

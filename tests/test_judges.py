"""Who fills the sensitivity table: this process, and actors of a real Ray that die, or never
begin; and that it takes no longer than it may."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from flyweight.search import judges as module
from flyweight.search.judges import Judges
from flyweight.search.ready import Ready, ready
from flyweight.search.spec import load_spec
from flyweight.spaces import BadInput, Policy

TASK = """
import torch
from torch import nn
from flyweight.compressors import ClassificationTask

class Patterns(ClassificationTask):
    def __init__(self):
        torch.manual_seed(0)
        self.train = self.val = [(torch.randn(3, 8, 8), i % 5) for i in range(60)]

    def model(self):
        pool = nn.AdaptiveAvgPool2d(1)
        return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(32, 5))
"""
SPEC = """
task: task.py:Patterns
objective: {max_drop: 1}
search: {concurrency: 2}
resources: {cpus: 1}
tracking: null
"""


slow = pytest.mark.slow


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ready:
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "search.yaml").write_text(SPEC)
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return ready(load_spec(tmp_path / "search.yaml"))


@pytest.fixture
def local_ray(ray_token: None, prepared: Ready) -> Any:  # noqa: ARG001 (they come first)
    import ray  # not before flyweight.search, which asks it for tokens

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)  # room for one of two
    yield ray
    ray.shutdown()


def begun(judges: Judges) -> Judges:
    """Its actors have begun: until then this process judges."""
    import ray

    judges._begin()
    assert ray.wait([*judges._starting], timeout=120)[0]
    return judges


def policies(found: Ready) -> list[Policy]:
    return [found.space.uniform(keep) for keep in (1.0, 0.75, 0.5, 0.25)]


class Clock:
    """Time that passes where something is judged."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("took", "seconds", "expected"),
    [
        ([1.0] * 4, 3.2, 3),  # the fourth would end at 4.0
        ([1.0] * 4, 4.2, 4),
        ([1.0] * 4, 0.0, 0),
        ([9.0] * 4, 3.2, 1),  # how long one takes is known when one was judged
        ([3.0, 0.5, 0.5, 0.5], 4.6, 4),  # the first works out what others need, too
    ],
)
def test_no_choice_is_begun_that_would_end_too_late(
    prepared: Ready, monkeypatch: pytest.MonkeyPatch, took: list[float], seconds: float,
    expected: int,
) -> None:  # fmt: skip
    clock, costs = Clock(), iter(took)

    class Timed(module.Judge):
        def harm(self, *_: Any) -> float | None:
            clock.now += next(costs)
            return 0.5

    monkeypatch.setattr(module, "Judge", Timed)
    monkeypatch.setattr(module, "time", clock)
    counted: list[int] = []
    judges = Judges(prepared, seconds, counted.append)
    harms = judges(policies(prepared))
    assert harms == [0.5] * expected + [None] * (4 - expected)
    assert counted[-1] == expected  # what there was no time for does not count
    counted.clear()
    again = Judges(prepared, 0.0, counted.append)
    assert again(policies(prepared)) == harms
    assert counted[-1] == expected  # what the cache knows does


def test_what_a_policy_raises_here_costs_its_answer_alone(
    prepared: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(module.Judge):
        def harm(self, policy: str, *_: Any) -> float | None:
            if "width" not in policy:
                raise ValueError("odd")
            return 0.5

    monkeypatch.setattr(module, "Judge", Failing)
    judges = Judges(prepared, 5)
    assert judges(policies(prepared)) == [None, 0.5, 0.5, 0.5]
    assert judges.failed == "ValueError: odd"


@slow
@pytest.mark.usefixtures("local_ray")
def test_an_actor_that_makes_another_task_ends_it_with_one_message(prepared: Ready) -> None:
    task = Path("task.py")
    task.write_text(task.read_text().replace("manual_seed(0)", "manual_seed(1)"))
    judges = begun(Judges(prepared, 600))
    with pytest.raises(BadInput, match="train and val must be the same each time"):
        judges(policies(prepared))
    judges.close()


@slow
@pytest.mark.usefixtures("local_ray")
def test_an_actor_that_finds_no_place_stops_nobody(prepared: Ready) -> None:
    judges = begun(Judges(prepared, 600))
    harms = judges(policies(prepared))
    judges.close()
    assert all(harm is not None and harm >= 0 for harm in harms)
    assert harms[0] == pytest.approx(0, abs=1e-6)
    assert harms[3] > harms[1]
    assert judges.failed is None

    again = Judges(prepared, 0)  # no time at all: the cache knows
    assert again(policies(prepared)) == harms
    assert again([prepared.space.uniform(1.0, "int8")]) == [None]
    again.close()


@slow
@pytest.mark.usefixtures("local_ray")
def test_a_policy_whose_actor_died_is_judged_by_another(
    prepared: Ready, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    marker, here = str(tmp_path / "died"), os.getpid()

    class Deadly(module.Judge):  # here, so that it travels to the actors
        def harm(self, policy: str, recalibrated: bool) -> float | None:
            if os.getpid() != here and not os.path.exists(marker):
                open(marker, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().harm(policy, recalibrated)

    monkeypatch.setattr(module, "Judge", Deadly)
    judges = begun(Judges(prepared, 600))
    harms = judges(policies(prepared))
    judges.close()
    assert all(harm is not None for harm in harms)
    assert judges.failed

"""Who fills the sensitivity table: actors of a real Ray that die, or never begin."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from flyweight.search import judges as module
from flyweight.search.judges import Judges
from flyweight.search.ready import Ready, ready
from flyweight.search.spec import load_spec
from flyweight.spaces import Policy

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_token")]  # a local Ray

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


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "search.yaml").write_text(SPEC)
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    import ray  # not before flyweight.search, which asks it for tokens

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)  # room for one of two
    yield ready(load_spec(tmp_path / "search.yaml"))
    ray.shutdown()


def policies(found: Ready) -> list[Policy]:
    return [found.space.uniform(keep) for keep in (1.0, 0.75, 0.5, 0.25)]


def test_an_actor_that_finds_no_place_stops_nobody(prepared: Ready) -> None:
    judges = Judges(prepared, 60)
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


def test_a_policy_whose_actor_died_is_judged_by_another(
    prepared: Ready, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    marker = str(tmp_path / "died")

    class Deadly(module.Judge):  # here, so that it travels to the actors
        def harm(self, policy: str, recalibrated: bool) -> float | None:
            if not os.path.exists(marker):
                open(marker, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().harm(policy, recalibrated)

    monkeypatch.setattr(module, "Judge", Deadly)
    judges = Judges(prepared, 60)
    harms = judges(policies(prepared))
    judges.close()
    assert all(harm is not None for harm in harms)
    assert judges.failed

"""What is refused once the task and its teacher's figures are known, before any cost."""

from pathlib import Path

import pytest

from flyweight.search.ready import ready
from flyweight.search.spec import load_spec
from flyweight.spaces import BadInput

TASK = """
import torch
from torch import nn
from torch.nn import functional as F

def items(n):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 6, generator=generator)
    return [(a, a[:1] * 2) for a in x]

class Shares:
    train, val = items(40), items(30)
    def model(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
    def example_input(self):
        return torch.zeros(1, 6)
    def loss(self, output, target):
        return F.mse_loss(output, target)
    def metric(self, output, target):
        return 0.97
"""


def write(folder: Path, text: str) -> Path:
    (folder / "task.py").write_text(TASK)
    path = folder / "search.yaml"
    path.write_text(f"task: task.py:Shares\ntracking: null\n{text}\n")
    return path


def test_a_limit_in_points_that_limits_nothing_is_refused(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, "objective: {max_drop: 1}"))
    with pytest.raises(BadInput, match=r"itself has 0\.97: it would limit nothing; .*0\.01"):
        ready(spec)
    found = ready(load_spec(write(tmp_path, "objective: {max_drop: 0.01}")))
    assert found.metric == 0.97


def test_a_loss_of_classes_is_refused_where_there_are_none(tmp_path: Path) -> None:
    text = "objective: {max_drop: 0.1}\nspace: {distill: {losses: [kl, decoupled]}}"
    with pytest.raises(BadInput, match="'decoupled' compares classes, but by the task's loss"):
        ready(load_spec(write(tmp_path, text)))

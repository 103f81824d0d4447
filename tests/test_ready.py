"""What is refused once the task and its teacher's figures are known, before any cost."""

from pathlib import Path

import pytest
import torch
from torch import nn

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
    with pytest.raises(BadInput, match=r"itself has 0\.97: next to nothing would be asked .*0\.01"):
        ready(spec)
    with pytest.raises(BadInput, match=r"max_drop 0\.5 is in points"):  # as for percent
        ready(load_spec(write(tmp_path, "objective: {max_drop: 0.5}")))
    found = ready(load_spec(write(tmp_path, "objective: {max_drop: 0.01}")))
    assert found.metric == 0.97


@pytest.mark.parametrize(("sign", "doubtful"), [("-", False), ("", True)])
def test_a_metric_of_which_less_is_better_is_doubted(
    tmp_path: Path, sign: str, doubtful: bool
) -> None:
    spec = write(tmp_path, "objective: {size_bytes: 100000}")
    task = TASK.replace("return 0.97", f"return {sign}float((output - target).square().mean())")
    made = "nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))"
    exact = (
        "m = nn.Linear(6, 1)\n        with torch.no_grad():\n"
        "            m.weight.copy_(torch.eye(6)[:1]), m.bias.zero_()\n        return m"
    )
    (tmp_path / "task.py").write_text(task.replace(f"return {made}", exact))
    doubt = ready(load_spec(spec)).doubt
    assert bool(doubt) == doubtful
    assert not doubtful or "is more of the metric better?" in str(doubt)


def test_relative_paths_of_a_task_begin_at_its_folder_wherever_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers run elsewhere: what is found here is found there."""
    spec = write(tmp_path, "objective: {max_drop: 0.01}")
    made = "nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))"
    loaded = f"m = {made}\n        m.load_state_dict(torch.load('weights.pt'))\n        return m"
    (tmp_path / "task.py").write_text(TASK.replace(f"return {made}", loaded))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
    torch.save(model.state_dict(), elsewhere / "weights.pt")
    with pytest.raises(BadInput) as refused:
        ready(load_spec(spec))
    for words in ("'weights.pt'", "Workers run elsewhere", "Path(__file__).parent / 'weights.pt'"):
        assert words in str(refused.value)
    (elsewhere / "weights.pt").rename(tmp_path / "weights.pt")
    found = ready(load_spec(spec)).prepared.teacher.state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    assert Path.cwd() == elsewhere


def test_a_loss_of_classes_is_refused_where_there_are_none(tmp_path: Path) -> None:
    text = "objective: {max_drop: 0.1}\nspace: {distill: {losses: [kl, decoupled]}}"
    with pytest.raises(BadInput, match="'decoupled' compares classes, but by the task's loss"):
        ready(load_spec(write(tmp_path, text)))


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        ("float('nan')", "There is no metric on test: it is nan there"),
        ("[][1]", "There is no metric on test: it fails there: IndexError: list index"),
    ],
)
def test_a_metric_that_is_none_on_test_is_told_and_costs_no_search(
    tmp_path: Path, fails: str, words: str
) -> None:
    spec = write(tmp_path, "objective: {size_bytes: 100000}")
    text = TASK.replace("return 0.97", f"return {fails} if len(output) == 20 else 0.97")
    text = text.replace("items(40), items(30)", "items(40), items(30)\n    test = items(20)")
    (tmp_path / "task.py").write_text(text)
    found = ready(load_spec(spec))
    assert found.metric == 0.97
    assert found.metric_test is None
    assert words in str(found.doubt)


def test_a_metric_that_is_none_on_selection_is_refused(tmp_path: Path) -> None:
    """It was one on the first items of val, and on those that are searched on."""
    spec = write(tmp_path, "objective: {size_bytes: 100000}")
    seen = "return float('nan') if torch.equal(target, selection) else 0.97"
    drawn = (
        "from flyweight.compressors.data import split\n        "
        "selection = split(self).selection.targets\n        "
    )
    (tmp_path / "task.py").write_text(TASK.replace("return 0.97", drawn + seen))
    with pytest.raises(BadInput, match="metric must be one finite number, but got nan on val"):
        ready(load_spec(spec))

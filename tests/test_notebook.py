"""The Python API: a search from objects, and what its results show."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from flyweight.compressors import load_task
from flyweight.search import load_run, search
from flyweight.spaces import BadInput

NET = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
DATA = TensorDataset(torch.zeros(40, 1, 8, 8), torch.zeros(40, dtype=torch.long))

# As a notebook has it: a class that no module holds, one that a module beside it does.
NOTEBOOK = """
import torch
from torch.utils.data import TensorDataset
from beside import Net
from flyweight.search import load_run, search
from flyweight.compressors import ClassificationTask

torch.manual_seed(0)
x = torch.randn(400, 1, 8, 8)
y = (x.mean((1, 2, 3)) > 0).long()

class Sign(ClassificationTask):
    def metric(self, output, target):
        return super().metric(output, target)

def main():
    net = Net().eval()
    task = Sign(net, TensorDataset(x[:300], y[:300]), TensorDataset(x[300:], y[300:]))
    before = [p.clone() for p in net.parameters()]
    run = search(task, max_drop=50, trials=2, rungs={"full_epochs": 0.5}, tracking=None, out="run",
                 concurrency=1, space={"quantize": {"precisions": ["fp32"]}})
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    print(repr(run))
    assert run.best(x[:3]).shape == (3, 2)
    assert run.front.loc[0, "digest"].startswith(run.model(run.front.digest[0][:8]).digest)
    assert "<table" in run._repr_html_() and "data:image/png" in run._repr_html_()
    assert set(run.trials.ended) == {"finished"}
    for file in ("report.html", "front.csv", "front.png", "trials.csv"):
        (run.folder / file).unlink()
    again = load_run("run")
    assert "data:image/png" in again._repr_html_() and not (run.folder / "report.html").exists()
    assert again.best.digest == run.best.digest and repr(again) == repr(run)

if __name__ == "__main__":
    main()
"""
BESIDE = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 2))
"""


@pytest.mark.slow
def test_a_search_from_objects(tmp_path: Path) -> None:
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    (tmp_path / "beside.py").write_text(BESIDE)
    done = subprocess.run(
        [sys.executable, "notebook.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Best: " in done.stdout
    assert not list((tmp_path / "run").rglob("*.pkl"))
    # Other commands say why they cannot: no file has the task.
    with pytest.raises(
        BadInput, match=r"Sign was an object .* write it as a class into a task\.py"
    ):
        load_task("<notebook>:Sign", tmp_path, {})


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        ((NET,), {"max_drop": 1}, "a model needs train and val"),
        ((NET, None, DATA, DATA), {"max_dorp": 1}, "unknown 'max_dorp'.*'max_drop'"),
        ((NET, None, DATA, DATA), {}, "give at least one of speedup"),
        ((NET, None, DATA, DATA), {"max_drop": 1, "time_budget": "soon"}, "duration such as 90s"),
        (("search.yaml",), {"speedup": 2}, "beside it speedup means nothing"),
        (("no.yaml",), {}, "no spec at no.yaml"),
        ((NET, None, DATA, (lambda: (i for i in ()))()), {"max_drop": 1}, "does not pickle"),
    ],
)
def test_what_is_refused_before_any_cost(
    tmp_path: Path, monkeypatch, arguments: tuple, settings: dict, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=words):
        search(*arguments, **settings)
    assert not list(tmp_path.iterdir())


def test_reading_a_run_writes_nothing(tmp_path: Path, load: Callable[[str], ModuleType]) -> None:
    """It may be another's, in a folder that one may only read."""
    report = load("tests/test_report.py")
    report.run_directory(tmp_path, report.entries(), report.result())
    before = sorted(tmp_path.iterdir())
    run = load_run(tmp_path)
    assert list(run.front.digest) == [report.digest(trial) for trial in (2, 1, 3)]
    assert "data:image/png" in run._repr_html_()
    assert "report.html" not in run._repr_html_()
    assert sorted(tmp_path.iterdir()) == before
    assert str(run.report) in run._repr_html_()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the directory of a run"):
        load_run(tmp_path)

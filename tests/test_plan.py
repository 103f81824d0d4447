"""What a plan tells before anything is spent."""

import json
import re
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from flyweight.compressors.parity import run_module
from flyweight.search import counting
from flyweight.search.cli import main
from flyweight.search.limits import limits
from flyweight.search.plan import idle, make_plan, print_plan, replay
from flyweight.search.ready import per_item
from flyweight.search.spec import Objective
from flyweight.spaces import Impossible, Policy

TASK = """
import torch
from torch import nn
from flyweight.compressors import ClassificationTask

class Patterns(ClassificationTask):
    def __init__(self):
        torch.manual_seed(0)
        self.train = self.val = [(torch.randn(6), i % 3) for i in range(60)]

    def model(self):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))
"""
TEACHER = {"metric": 93.0, "latency_ms": 2.0, "size_bytes": 2_800_000, "compressed_bytes": 900_000}


def write(folder: Path, **objective: Any) -> Path:
    (folder / "task.py").write_text(TASK)
    path = folder / "search.yaml"
    path.write_text(
        json.dumps({"task": "task.py:Patterns", "objective": objective, "tracking": None})
    )
    return path


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ({"speedup": 2, "max_drop": 0.5, "size_bytes": 900_000}, []),
        ({"max_drop": 93}, ["max_drop 93 asks for nothing: all that the model has of the metric"]),
        ({"speedup": 1}, ["speedup 1.0 asks for nothing: the model itself has 2.00 ms, and the"]),
        ({"latency_ms": 3}, ["latency_ms 3.0 asks for nothing"]),
        (
            {"size_bytes": 2_800_000, "compressed_bytes": 950_000, "speedup": 1.1},
            ["size_bytes 2800000 asks for nothing", "compressed_bytes 950000 asks for nothing"],
        ),
    ],
)
def test_a_limit_that_the_teacher_keeps_is_named(objective: Any, told: list[str]) -> None:
    asked = Objective(**objective)
    found = idle(asked, limits(asked.model_dump(), 93.0, 2.0), TEACHER)
    assert len(found) == len(told)
    assert all(text.startswith(words) for text, words in zip(found, told, strict=True))


def test_of_a_metric_that_is_negative_nothing_is_said() -> None:
    asked = Objective(max_drop=5.0)
    assert idle(asked, limits(asked.model_dump(), -1.0, 2.0), TEACHER | {"metric": -1.0}) == []


def test_a_plan_says_where_a_limit_limits_nothing_and_that_it_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "LINE_S", 0.02)
    monkeypatch.setattr(counting, "LOOK_S", 0.001)
    said, shown = StringIO(), StringIO()
    found = make_plan(write(tmp_path, speedup=0.5, max_drop=100), Console(file=said, width=60))
    print_plan(found, Console(file=shown, width=60))
    notes = [line for line in shown.getvalue().splitlines() if line.startswith("Note: ")]
    assert [note.split()[1] for note in notes if "asks for nothing" in note] == [
        "max_drop", "speedup",
    ]  # fmt: skip
    assert found["reachable"]
    text = "Timing the teacher and the simplest policies, untrained"
    assert f"{text}\n{text}, 0:0" in said.getvalue()
    assert "a full trial trains 2 epochs of 60 samples (rungs.full_epochs)" in shown.getvalue()
    assert "Not pruned: 2 (its outputs are the answer)" in shown.getvalue()


def test_names_are_no_emoji(tmp_path: Path) -> None:
    path = write(tmp_path, max_drop=4, speedup=0.5)
    (tmp_path / "heart.py").write_text(TASK.replace("Patterns", "Heart"))
    path.write_text(path.read_text().replace("task.py:Patterns", "heart.py:Heart"))
    said = CliRunner().invoke(main, ["plan", str(path)]).output
    assert "Checking heart.py:Heart and" in said
    assert "heart.py:Heart: metric" in said


def test_no_console_of_the_search_makes_emoji_of_names(root: Path) -> None:
    for path in (root / "search").glob("*.py"):
        made = re.findall(r"\bConsole\((.*?)\)", path.read_text())
        assert all("emoji=False" in arguments for arguments in made), path


def test_a_drop_of_less_than_an_item_is_told(tmp_path: Path) -> None:
    spec = write(tmp_path, max_drop=0.05, speedup=1.1)
    (told,) = make_plan(spec, Console(file=StringIO()))["idle"]
    assert told.startswith(
        "max_drop 0.05 is less than one item of selection validation, which counts 3.33 points "
        "(30 items): it allows no loss at all"
    )
    assert (
        make_plan(write(tmp_path, max_drop=4, speedup=1.1), Console(file=StringIO()))["idle"] == []
    )


@pytest.mark.parametrize(
    ("metric", "items", "counts"),
    [(97.5, 200, 0.5), (0.9, 10, 0.1), (100.0, 8, 12.5), (93.21, 30, None), (-1.0, 10, None)],
)
def test_what_an_item_counts_is_known_of_a_share(
    metric: float, items: int, counts: float | None
) -> None:
    assert per_item(metric, items) == counts


@pytest.mark.parametrize("where", ["untrained", "compress", "score"])
def test_a_plan_leaves_out_what_is_impossible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def impossible(*_: Any) -> Any:
        raise Impossible("parity")

    path = write(tmp_path, speedup=2)
    monkeypatch.setattr(f"flyweight.search.plan.{where}", impossible)
    found = make_plan(path, Console(file=StringIO()))
    print_plan(found, Console(file=StringIO()))
    assert found["cases"] == []
    assert found["reachable"]
    assert json.loads(json.dumps(found, allow_nan=False))["fastest_ms"] is None


@pytest.mark.parametrize(
    ("said", "known"),
    [('{"bfloat16": true}', True), ('{"bfloat16": false}', False), ("{}", None), ("[]", None),
     ("{", None), (None, None)],
)  # fmt: skip
def test_an_artifact_is_rebuilt_by_the_arithmetic_that_it_was_trained_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, known: bool | None
) -> None:
    path, built = write(tmp_path, speedup=2), []
    (tmp_path / "policy.json").write_text(json.dumps(Policy().to_dict()))
    if said is not None:
        (tmp_path / "metrics.json").write_text(said)

    def compressed(prepared: Any, *_: Any, **__: Any) -> Any:
        built.append(prepared.bfloat16)
        raise Impossible("enough")

    monkeypatch.setattr("flyweight.search.plan.compress", compressed)
    monkeypatch.setattr("flyweight.search.plan.trained_in_bfloat16", lambda *_: ["pruned"])
    with pytest.raises(Impossible, match="enough"):
        replay(tmp_path / "policy.json", path, "short", tmp_path / "out")
    assert built == [frozenset() if known is False else {"pruned"}]


def test_to_rebuild_an_artifact_the_teacher_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = write(tmp_path, speedup=2), Counter[int]()
    (tmp_path / "policy.json").write_text(json.dumps(Policy().to_dict()))

    def counted(model: Any, items: Any) -> Any:
        asked[id(items)] += 1
        return run_module(model, items)

    monkeypatch.setattr("flyweight.compressors.answering.run_module", counted)
    for part in ("prepared.is_native", "bfloat16.is_native", "bfloat16.Step.is_faster"):
        monkeypatch.setattr(f"flyweight.compressors.{part}", lambda _: True)
    found = replay(tmp_path / "policy.json", path, "recalibrate", tmp_path / "out")
    metrics = Path(found["artifact"]).with_name("metrics.json")
    assert json.loads(metrics.read_text())["bfloat16"]
    assert asked
    assert set(asked.values()) == {1}

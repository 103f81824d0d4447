"""What is kept between searches: losing it costs time and nothing else."""

from pathlib import Path

import pytest

from flyweight.search.cache import Lines, cache_folder, key_of
from flyweight.search.spec import Spec


def spec(**more: object) -> Spec:
    return Spec.model_validate({"task": "t.py:T", "objective": {"speedup": 2}, **more})


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "a" / "b.jsonl")
    lines.add("x", 0.1)
    lines.add("y", None)
    assert Lines(tmp_path / "a" / "b.jsonl").known == {"x": 0.1, "y": None}


@pytest.mark.parametrize("damage", ['["x", 0.', "7", '["x"]', "\x00"])
def test_a_damaged_line_is_left_out(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(f'["a", 1]\n{damage}\n["b", 2]\n')
    assert Lines(path).known == {"a": 1, "b": 2}


def test_a_file_that_cannot_be_written_is_not(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    lines = Lines(blocked / "lines.jsonl")
    lines.add("x", 1)
    assert lines.known == {"x": 1}


def test_a_key_differs_where_an_input_does() -> None:
    keys = {key_of(), key_of("a"), key_of("a", "b"), key_of("ab"), key_of(b"a"), key_of({"a": 1})}
    assert len(keys) == 6
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path))
    assert cache_folder(spec()) == tmp_path
    assert cache_folder(spec(storage=str(tmp_path / "s"))) == tmp_path / "s" / "cache"
    assert cache_folder(spec(storage="s3://bucket")) == tmp_path

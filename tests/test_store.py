"""Artifacts: whole or not at all, verified when read."""

import hashlib
import json
from pathlib import Path

import pytest

from flyweight.search.store import (
    artifact_path,
    read_artifact,
    read_policy,
    write_json,
    write_whole,
)
from flyweight.spaces import BadInput, FlyweightError, Policy

DIGEST = "d" * 64


def artifact(run: Path, model: bytes) -> Path:
    place = run / artifact_path(DIGEST)
    write_whole(place, model)
    write_json(place.with_name("metrics.json"), {"sha256": hashlib.sha256(model).hexdigest()})
    return place


def test_files_are_replaced_whole_and_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file"
    for content in (b"one", b"", b"longer than before"):
        write_whole(path, content)
        assert path.read_bytes() == content
        assert [p.name for p in path.parent.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError, match="x"):
        write_whole(tmp_path / "x", b"new")  # a folder is there
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    write_json(tmp_path / "y", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "y", {"a": float("nan")})
    assert json.loads((tmp_path / "y").read_text()) == {"a": 1}


def test_an_artifact_is_verified_when_read(tmp_path: Path) -> None:
    place = artifact(tmp_path, b"model")
    assert read_artifact(tmp_path, DIGEST) == b"model"
    place.write_bytes(b"modeL")
    with pytest.raises(FlyweightError, match="damaged"):
        read_artifact(tmp_path, DIGEST)
    for content in ("{}", "{", ""):
        place.with_name("metrics.json").write_text(content)
        with pytest.raises(FlyweightError, match="cannot be read"):
            read_artifact(tmp_path, DIGEST)
    place.unlink()
    with pytest.raises(FlyweightError, match="cannot be read"):
        read_artifact(tmp_path, DIGEST)


def test_read_policy(tmp_path: Path) -> None:
    write_json(tmp_path / "p.json", Policy().to_dict())
    assert read_policy(tmp_path / "p.json") == Policy()
    with pytest.raises(BadInput, match="no policy at"):
        read_policy(tmp_path / "none.json")
    (tmp_path / "p.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput):
        read_policy(tmp_path / "p.json")

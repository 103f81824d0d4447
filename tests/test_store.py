"""Artifacts and checkpoints: whole or not at all, verified when read."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flyweight.compressors import Candidate
from flyweight.search.storage import Storage
from flyweight.search.store import (
    artifact_path,
    checkpoint_folder,
    read_artifact,
    read_checkpoint,
    read_policy,
    remove_checkpoints,
    write_checkpoint,
    write_json,
    write_whole,
)
from flyweight.spaces import BadInput, FlyweightError, Policy, Prune

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


def candidate(policy: Policy, value: float) -> Candidate:
    student = torch.fx.symbolic_trace(nn.Linear(2, 2))
    nn.init.constant_(student.weight, value)
    plan: Any = None
    return Candidate(policy, "short", plan, student, b"model", 0.5, 90.0, 1, 1.0)


def test_a_checkpoint_is_found_by_what_it_depends_on_and_verified(tmp_path: Path) -> None:
    policy = Policy()
    write_checkpoint(Storage(tmp_path), candidate(policy, 1.0), "inputs")
    (place,) = (tmp_path / checkpoint_folder(policy.digest)).iterdir()
    content = place.read_bytes()
    assert hashlib.sha256(content).hexdigest() in place.name
    assert read_checkpoint(Storage(tmp_path), policy.digest, "short", "inputs") == content
    for others in ((DIGEST, "short", "inputs"), (policy.digest, "full", "inputs")):
        with pytest.raises(FlyweightError, match="no checkpoint"):
            read_checkpoint(Storage(tmp_path), *others)
    with pytest.raises(FlyweightError, match="no checkpoint"):
        read_checkpoint(Storage(tmp_path), policy.digest, "short", "others")
    for damaged in (content[:-1], b"", bytes([content[0] ^ 1]) + content[1:]):
        place.write_bytes(damaged)
        with pytest.raises(FlyweightError, match="damaged"):
            read_checkpoint(Storage(tmp_path), policy.digest, "short", "inputs")
    place.unlink()
    place.mkdir()
    with pytest.raises(FlyweightError, match="cannot be read"):
        read_checkpoint(Storage(tmp_path), policy.digest, "short", "inputs")


def test_checkpoints_are_removed_by_policy_and_all_together(tmp_path: Path) -> None:
    policies = [Policy(), Policy(Prune({"a": 8}))]
    for policy in policies:
        write_checkpoint(Storage(tmp_path), candidate(policy, 1.0), "inputs")
    write_checkpoint(Storage(tmp_path), candidate(policies[0], 2.0), "inputs")  # a rung done again
    remove_checkpoints(Storage(tmp_path), policies[0].digest)
    assert [p.name for p in (tmp_path / checkpoint_folder()).iterdir()] == [policies[1].digest]
    remove_checkpoints(Storage(tmp_path))
    remove_checkpoints(Storage(tmp_path))
    assert not list(tmp_path.iterdir())


def test_read_policy(tmp_path: Path) -> None:
    write_json(tmp_path / "p.json", Policy().to_dict())
    assert read_policy(tmp_path / "p.json") == Policy()
    with pytest.raises(BadInput, match="no policy at"):
        read_policy(tmp_path / "none.json")
    (tmp_path / "p.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput):
        read_policy(tmp_path / "p.json")

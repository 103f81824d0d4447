"""One narrow seam for what trials make: folders, URIs, and a file system in memory for the rest."""

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow import fs

from flyweight.search.opening import kept, open_run
from flyweight.search.preflight import check_cluster
from flyweight.search.run_files import RECORD
from flyweight.search.spec import Resources
from flyweight.search.storage import Mirror, Storage, kept_record
from flyweight.search.store import fetch_artifact, read_artifact, write_artifact
from flyweight.spaces import BadInput, Policy

Make = Callable[[], Storage]


class Objects(fs._MockFileSystem):  # type: ignore[misc]
    """Like an object store: there are no folders, and no moves."""

    type_name = "s3"

    def open_output_stream(self, path: str, **options: Any) -> Any:
        self.create_dir(path.rpartition("/")[0], recursive=True)
        return super().open_output_stream(path, **options)

    def move(self, *_: Any) -> None:
        raise NotImplementedError


@pytest.fixture(params=["folder", "uri", "mock", "objects"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "mock":
        return Storage("bucket/a", fs._MockFileSystem())
    if request.param == "objects":
        return Storage("bucket/a", Objects())
    return Storage(tmp_path / "a" if request.param == "folder" else f"file://{tmp_path}/a")


def test_files_are_read_as_they_were_written(storage: Storage) -> None:
    assert storage.names("x") == []
    with pytest.raises(FileNotFoundError):
        storage.read("x/y")
    storage.remove("x")
    for content in (b"one", b"", b"longer than before"):
        storage.write("x/y", content)
        assert storage.read("x/y") == content
    storage.write("x/z", b"z")
    assert storage.names("x") == ["y", "z"]
    assert storage.under("x").read("z") == b"z"
    storage.remove("x")
    assert storage.names("x") == []


def test_it_travels_to_workers(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Storage(f"file://{tmp_path}").under("a"))).write("b/c", b"c")
    assert (tmp_path / "a" / "b" / "c").read_bytes() == b"c"


def test_a_place_that_no_file_system_knows() -> None:
    with pytest.raises(BadInput, match="storage: no file system"):
        Storage("nosuch://bucket/a")


def test_an_artifact_reaches_the_run_directory(storage: Storage, tmp_path: Path) -> None:
    policy = Policy()
    candidate: Any = SimpleNamespace(
        policy=policy,
        model=b"model",
        rung="full",
        metric=1.0,
        loss=0.5,
        samples=3,
        settled=False,
        diverged=None,
        drop_error=None,
        parity=None,
    )
    write_artifact(storage, candidate, {"seed": 3})
    fetch_artifact(storage, tmp_path / "run", policy.digest)
    assert read_artifact(tmp_path / "run", policy.digest) == b"model"
    storage.remove("artifacts")
    fetch_artifact(storage, tmp_path / "run", policy.digest)  # it is there already
    with pytest.raises(FileNotFoundError):
        fetch_artifact(storage, tmp_path / "other", policy.digest)


def spec(place: Path) -> Any:
    return SimpleNamespace(storage=f"file://{place}", task="task.py:Net", tracking=None)


def test_a_new_head_goes_on_from_the_copy_of_the_record(tmp_path: Path) -> None:
    record = tmp_path / "old" / "run" / RECORD
    record.parent.mkdir(parents=True)
    record.write_bytes(b"one\n")
    where = spec(tmp_path / "storage")
    assert kept_record(where, record.parent) is None
    mirror = Mirror(record, Storage(where.storage).under("runs/run"))
    record.write_bytes(b"one\ntwo\n")
    mirror.close()
    assert mirror.failed is None
    with pytest.raises(BadInput, match="--resume"):
        open_run(where, tmp_path / "new" / "run", resume=False)
    assert not (tmp_path / "new").exists()
    head = open_run(where, tmp_path / "new" / "run", resume=True)
    assert (head / RECORD).read_bytes() == b"one\ntwo\n"
    with pytest.raises(BadInput, match="no record"):
        open_run(where, tmp_path / "new" / "another", resume=True)


def test_a_storage_that_is_away_fails_no_search(tmp_path: Path) -> None:
    (tmp_path / "storage").write_text("a file where the folder should be")
    (tmp_path / RECORD).write_bytes(b"one\n")
    mirror = Mirror(tmp_path / RECORD, Storage(tmp_path / "storage"))
    mirror.close()
    assert mirror.failed is not None
    assert str(tmp_path / "storage") in mirror.failed


def test_a_storage_that_cannot_be_written_is_refused_before_any_cost(tmp_path: Path) -> None:
    (tmp_path / "storage").write_text("a file where the folder should be")
    ready: Any = SimpleNamespace(
        spec=SimpleNamespace(storage=str(tmp_path / "storage"), resources=Resources())
    )
    with pytest.raises(BadInput, match="cannot be written"):
        check_cluster(ready, Storage(tmp_path / "storage"), True, 0.0, print)


@pytest.mark.parametrize("folder", ["/proc/nowhere", "{}/file/below"])
def test_a_storage_that_cannot_be_made_is_refused_and_leaves_nothing(
    tmp_path: Path, folder: str
) -> None:
    (tmp_path / "file").touch()
    where = spec(tmp_path)
    where.storage = folder.format(tmp_path)
    with (
        pytest.raises(BadInput, match=f"storage: {where.storage} cannot be (read|written)"),
        kept(where, tmp_path / "run", resume=False),
    ):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("local", "copied", "kept"),
    [
        (b"one\n", b"one\ntwo\n", b"one\ntwo\n"),  # another head went on with it
        (b"one\ntw", b"one\ntwo\n", b"one\ntwo\n"),
        (b"one\ntwo\n", b"one\n", b"one\ntwo\n"),  # killed before it was copied
        (b"", b"one\n", b"one\n"),
    ],
)
def test_the_longer_of_two_records_of_a_search_is_gone_on_with(
    tmp_path: Path, local: bytes, copied: bytes, kept: bytes
) -> None:
    where, run = spec(tmp_path / "storage"), tmp_path / "run"
    run.mkdir()
    (run / RECORD).write_bytes(local)
    Storage(where.storage).write(f"runs/run/{RECORD}", copied)
    with pytest.raises(BadInput, match="--resume"):
        open_run(where, run, resume=False)
    assert open_run(where, run, resume=True) == run
    assert (run / RECORD).read_bytes() == kept


def test_two_records_that_went_apart_are_refused(tmp_path: Path) -> None:
    where, run = spec(tmp_path / "storage"), tmp_path / "run"
    run.mkdir()
    (run / RECORD).write_bytes(b"one\ntwo\n")
    Storage(where.storage).write(f"runs/run/{RECORD}", b"one\nother\n")
    with pytest.raises(BadInput, match="what the other lacks"):
        open_run(where, run, resume=True)
    assert (run / RECORD).read_bytes() == b"one\ntwo\n"


def test_a_search_that_was_refused_leaves_no_record_in_the_storage(tmp_path: Path) -> None:
    where, record = spec(tmp_path / "storage"), tmp_path / "run" / RECORD
    record.parent.mkdir()
    record.touch()
    Mirror(record, Storage(where.storage).under("runs/run")).close()
    assert kept_record(where, record.parent) is None


def test_a_password_that_was_left_out_is_asked_for(tmp_path: Path) -> None:
    where = spec(tmp_path)
    where.storage = "s3://***@bucket/x"
    with pytest.raises(BadInput, match="password left out"):
        open_run(where, tmp_path / "run", resume=True)

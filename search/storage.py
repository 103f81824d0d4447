"""Where what trials make lies: a folder, or whatever pyarrow's file systems reach by a URI."""

import posixpath
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem

from ..kernels.files import write_whole as write_whole  # most of ``search`` has it from here
from ..spaces import BadInput
from .run_files import RECORD
from .spec import Spec
from .tracking import redact

WHOLE = ("s3", "gcs", "abfs")  # where a file is seen once all of it is there, or never
MIRROR_S = 10.0  # at least, between two copies of the record
MIRROR_SHARE = 0.05  # at most, of the time is spent copying


class Storage:
    """Files by name, each written whole or not at all. place: a folder or a URI; all nodes of a
    cluster must reach it. Methods raise OSError; a bad place is BadInput."""

    def __init__(self, place: str | Path, files: FileSystem | None = None) -> None:
        self._folder = str(place)
        self._files = files or LocalFileSystem()
        if files is None and "://" in self._folder:
            try:
                self._files, self._folder = FileSystem.from_uri(self._folder)
            except (ArrowException, OSError) as error:
                what = redact(str(error), self._folder)
                raise BadInput(f"storage: no file system for this URI: {what}") from error

    def under(self, name: str) -> "Storage":
        """The part of it below ``name``."""
        return Storage(posixpath.join(self._folder, name), self._files)

    def write(self, name: str, content: bytes) -> None:
        path = posixpath.join(self._folder, name)
        kind = self._files.type_name
        if kind == "local":
            write_whole(Path(path), content)
            return
        first = path if kind in WHOLE else f"{path}.{secrets.token_hex(4)}.part"
        with _as_os_error():
            if kind not in WHOLE:
                self._files.create_dir(posixpath.dirname(path), recursive=True)
            with self._files.open_output_stream(first) as stream:
                stream.write(content)
            if first != path:
                self._files.move(first, path)

    def read(self, name: str) -> bytes:
        path = posixpath.join(self._folder, name)
        with _as_os_error(), self._files.open_input_file(path) as file:
            return bytes(file.read())

    def names(self, folder: str) -> list[str]:
        """The files in ``folder``, oldest first; none if it is not there."""
        place = FileSelector(posixpath.join(self._folder, folder), allow_not_found=True)
        with _as_os_error():
            found = self._files.get_file_info(place)
        found = [f for f in found if not f.base_name.startswith(".") and f.extension != "part"]
        return [f.base_name for f in sorted(found, key=lambda f: f.mtime_ns or 0)]

    def remove(self, folder: str) -> None:
        """Removes ``folder`` with all that is in it, as far as it can be removed."""
        try:
            with _as_os_error():
                self._files.delete_dir(posixpath.join(self._folder, folder))
        except OSError:  # it is not there, or away: what stays there costs space and nothing else
            return


@contextmanager
def _as_os_error() -> Iterator[None]:
    """What a file system of pyarrow raises that is its own becomes an OSError."""
    try:
        yield
    except ArrowException as error:
        if isinstance(error, OSError):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error


def whole_lines(content: bytes) -> bytes:
    """``content`` without a last line that was cut off."""
    return content[: content.rfind(b"\n") + 1]


def storage_of(spec: Spec, run_dir: Path) -> Storage:
    """Where the trials of a run keep what they make: under ``storage``, by the name of its run
    directory; without one in the run directory itself."""
    if spec.storage is None:
        return Storage(run_dir)
    return Storage(spec.storage).under(f"runs/{run_dir.name}")


def kept_record(spec: Spec, run_dir: Path) -> bytes | None:
    """The record that the storage keeps of a run of this name; None if there is none. Raises
    BadInput if the storage cannot be read."""
    if spec.storage is None:
        return None
    try:
        return whole_lines(storage_of(spec, run_dir).read(RECORD))
    except FileNotFoundError:
        return None
    except OSError as error:
        what = redact(f"{spec.storage} cannot be read: {error}", spec.storage)
        raise BadInput(f"storage: {what}") from error


class Mirror:
    """Copies a record to the storage behind the search's back, so that a new head can go on from
    it. A storage that is away for a while is tried again; ``failed`` says why the last copy is not
    there, None if it is. check: raises OSError where the storage is another process's by now."""

    def __init__(
        self, record: Path, storage: Storage, check: Callable[[], None] = lambda: None
    ) -> None:
        self._record, self._storage, self._check = record, storage, check
        self._copied = -1  # bytes
        self._stop = threading.Event()
        self.failed: str | None = None
        self._thread = threading.Thread(target=self._run, name="flyweight-mirror", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 60.0) -> None:
        """Copies what is new, and waits for it for at most ``timeout_s``."""
        self._stop.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.failed = self.failed or f"not copied in {timeout_s:.0f} s"

    def _run(self) -> None:
        pause = 0.0
        while not self._stop.wait(pause):
            pause = max(MIRROR_S, self._copy() / MIRROR_SHARE)
        self._copy()

    def _copy(self) -> float:
        """Seconds that a copy took."""
        began = time.monotonic()
        try:
            self._check()
            content = self._record.read_bytes()
            if content and len(content) != self._copied:  # nothing: a search that may be refused
                self._storage.write(RECORD, content)
                self._copied = len(content)
            self.failed = None
        except OSError as error:
            self.failed = str(error)
        return time.monotonic() - began

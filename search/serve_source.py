"""What to serve: an artifact, found by its folder, its file or its alias in the registry."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..kernels import make_runtime
from ..spaces import BadInput, FlyweightError
from .choose import choose, read_result
from .run_files import RESULT

if TYPE_CHECKING:
    from .registry import Registry

ALIAS = re.compile(r"(?:models:/)?(?P<name>[\w.-]+)@(?P<alias>[\w-]+)")
SCHEME = "models:/"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)  # what clients call a model becomes a path
FIX = "build the artifact again, or copy it whole"


@dataclass(frozen=True)
class Source:
    """An artifact whose content is what was scored.

    content: the ONNX file. io: its inputs and outputs, as ``folder.describe`` says them. target:
    runtime and threads. version: what clients are told: the registry's number, or the beginning of
    the digest. where: where it was found, in words. notes: what its user should know.
    """

    content: bytes
    sha256: str
    io: dict[str, list[dict[str, Any]]]
    runtime: str
    threads: int
    version: str
    where: str
    notes: tuple[str, ...] = ()


def alias_of(model: str) -> tuple[str, str] | None:
    """Name and alias, if ``model`` is of the form [models:/]NAME@ALIAS and no file is called so."""
    found = ALIAS.fullmatch(model)
    if found and not Path(model).exists():
        return found["name"], found["alias"]
    if model.startswith(SCHEME):
        raise BadInput(
            f"MODEL: a registered model is given by an alias, {SCHEME}NAME@champion, but got "
            f"{model!r}"
        )
    return None


def file_of(path: Path) -> Path:
    """The ONNX file that ``path`` is or holds: a folder of an artifact, of ``deploy --folder``, or
    of a run, whose best it is then. Raises BadInput."""
    if path.is_dir() and (path / RESULT).is_file():
        path = path / "artifacts" / choose(path, read_result(path), None, None)
    file = path / "model.onnx" if path.is_dir() else path
    if not file.is_file():
        what = f"the folder {path} holds no model.onnx" if path.is_dir() else f"no {str(path)!r}"
        raise BadInput(
            f"MODEL: {what}; give an artifact's folder, an .onnx file, or an alias of the registry "
            "(NAME@champion)"
        )
    return file


def read_path(path: Path) -> Source:
    """The artifact that ``path`` names, see ``file_of``. Raises BadInput for what is none,
    FlyweightError for a file that is not what was scored."""
    file = file_of(path)
    facts = _facts(file) if file.name == "model.onnx" else None
    content = file.read_bytes()
    if facts is None:
        note = f"{file} comes without metrics.json: nothing says what its SHA-256 should be"
        facts = {"sha256": hashlib.sha256(content).hexdigest(), "runtime": "onnxruntime"}
        return _source(content, facts, None, str(file), (note,))
    return _source(content, facts, None, str(file))


def read_registered(registry: "Registry", version: str) -> Source:
    """A version of a registered model. Raises FlyweightError if it is not what was registered."""
    content, metrics = registry.fetch(version)
    where = f"version {version} of {registry.name}"
    return _source(content, {**metrics, **metrics.get("target", {})}, version, where)


def _facts(file: Path) -> dict[str, Any] | None:
    """What lies beside an artifact: metrics.json of a run, io.json of ``deploy --folder``."""
    for name in ("metrics.json", "io.json"):
        place = file.with_name(name)
        if not place.is_file():
            continue
        try:
            found = json.loads(place.read_text())
            return {**found, **found.get("target", {})}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise FlyweightError(f"{place} is damaged: {error}; {FIX}") from error
    return None


def _source(
    content: bytes,
    facts: dict[str, Any],
    version: str | None,
    where: str,
    notes: tuple[str, ...] = (),
) -> Source:
    runtime, threads = facts.get("runtime"), facts.get("threads", 1)
    said = facts.get("sha256")
    if not isinstance(said, str) or not isinstance(runtime, str) or not isinstance(threads, int):
        raise FlyweightError(
            f"{where}: what lies beside the model names no SHA-256 or no target; {FIX}"
        )
    from .folder import describe  # with onnx, which whoever names no artifact need not wait for

    check(content, said, where)
    try:
        io = describe(content)
    except Exception as error:  # protobuf's, which has no public base
        raise BadInput(f"MODEL: {where} is no ONNX file: {error}") from error
    if not io["inputs"] or len(io["outputs"]) != 1:
        raise BadInput(
            f"MODEL: what is served has inputs and one output, but {where} has "
            f"{len(io['inputs'])} and {len(io['outputs'])}"
        )
    measured = facts.get("fingerprint")
    if measured is not None and measured != make_runtime(runtime, threads).fingerprint:
        notes += ("it was measured on another device: its latency here is not known",)
    number = version or str(facts.get("digest") or said)[:12]
    return Source(content, said, io, runtime, threads, number, where, notes)


def check(content: bytes, sha256: str, where: str) -> None:
    """Raises FlyweightError if ``content`` is not what was scored."""
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise FlyweightError(
            f"{where} is not the file that was scored: its SHA-256 is {found}, but {sha256} was "
            f"recorded; {FIX}"
        )

"""Artifacts and checkpoints: named by what they depend on, verified when read."""

import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..spaces import BadInput, FlyweightError, Policy
from .run_files import REQUEST
from .storage import Storage, write_whole

if TYPE_CHECKING:
    from ..compressors import Candidate


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON, whole or not at all."""
    write_whole(path, _json(value))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def compressed_bytes(model: bytes) -> int:
    """Bytes of ``model`` when packed by DEFLATE at the level that gzip and zip have by default."""
    return len(zlib.compress(model, 6))


def artifact_path(digest: str) -> str:
    """Where an artifact's model lies, relative to the run directory."""
    return f"artifacts/{digest}/model.onnx"


def run_of(policy_path: Path) -> Path | None:
    """The run directory in whose artifacts a policy's file would lie; None if it lies too high."""
    folders = policy_path.resolve().parents
    return folders[2] if len(folders) > 2 else None


def write_artifact(storage: Storage, candidate: "Candidate", facts: dict[str, Any]) -> str:
    """Stores the artifact of ``candidate`` with its policy and ``facts``; its relative path.
    Raises OSError."""
    digest = candidate.policy.digest
    metrics = {
        "digest": digest,
        "sha256": hashlib.sha256(candidate.model).hexdigest(),
        "rung": candidate.rung,
        "metric": candidate.metric,
        "loss": candidate.loss,
        "size_bytes": len(candidate.model),
        "compressed_bytes": compressed_bytes(candidate.model),
        "samples": candidate.samples,
        "settled": candidate.settled,
        "diverged": candidate.diverged,
        "drop_error": candidate.drop_error,
        "parity": None if candidate.parity is None else vars(candidate.parity),
        **facts,
    }
    said = _json(metrics)  # first: what no JSON can hold leaves no half of an artifact
    folder = storage.under(f"artifacts/{digest}")
    folder.write("model.onnx", candidate.model)
    folder.write("policy.json", _json(candidate.policy.to_dict()))
    folder.write("metrics.json", said)
    return artifact_path(digest)


def fetch_artifact(storage: Storage, run_dir: Path, digest: str) -> None:
    """Brings an artifact that a worker stored into the run directory, if it is not there. Raises
    OSError."""
    place = run_dir / artifact_path(digest)
    for name in ("model.onnx", "policy.json", "metrics.json"):  # read_artifact verifies them
        if not place.with_name(name).exists():
            write_whole(place.with_name(name), storage.read(f"artifacts/{digest}/{name}"))


def read_artifact(run_dir: Path, digest: str) -> bytes:
    """The model of an artifact. Raises FlyweightError if it is not what was written."""
    place = run_dir / artifact_path(digest)
    try:
        model = place.read_bytes()
        known = json.loads(place.with_name("metrics.json").read_text())["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise FlyweightError(f"artifact {digest[:12]} cannot be read: {error}") from error
    if (found := hashlib.sha256(model).hexdigest()) != known:
        raise FlyweightError(f"{place} is damaged: its SHA-256 is {found}, not {known}")
    return model


def write_request(run_dir: Path, request: Mapping[str, NDArray[Any]]) -> None:
    """Stores the request, arrays by input name, that latency is measured with, so that it can be
    measured without the task. Raises OSError."""
    content = io.BytesIO()
    np.savez(content, **request)  # type: ignore[arg-type]  # its other arguments are keywords too
    write_whole(run_dir / REQUEST, content.getvalue())


def read_request(run_dir: Path) -> dict[str, NDArray[Any]]:
    """What ``write_request`` stored. Raises BadInput."""
    place = run_dir / REQUEST
    try:
        with np.load(place, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(
            f"{place}, the request that latency is measured with, cannot be read: {error}; fetch "
            "the run again, or let `flyweight search --resume` write it"
        ) from error


def write_checkpoint(storage: Storage, candidate: "Candidate", inputs: str) -> None:
    """Stores ``candidate`` for as long as its trial runs. inputs: digest of what it depends on
    besides its policy and rung. Raises OSError or FlyweightError."""
    from ..compressors import save_candidate  # with torch, which reading does without

    content = save_candidate(candidate)
    digest = hashlib.sha256(content).hexdigest()
    folder = storage.under(checkpoint_folder(candidate.policy.digest))
    folder.write(f"{candidate.rung}-{inputs}-{digest}.safetensors", content)


def read_checkpoint(storage: Storage, digest: str, rung: str, inputs: str) -> bytes:
    """What ``write_checkpoint`` stored for the policy ``digest``. Raises FlyweightError if there is
    none, or it is not what was written."""
    folder = checkpoint_folder(digest)
    try:
        names = [n for n in storage.names(folder) if n.startswith(f"{rung}-{inputs}-")]
        content = storage.read(f"{folder}/{names[-1]}") if names else b""
    except OSError as error:
        raise FlyweightError(f"its checkpoint cannot be read: {error}") from error
    if not names:
        raise FlyweightError("it has no checkpoint")
    if hashlib.sha256(content).hexdigest() != Path(names[-1]).stem.rpartition("-")[2]:
        raise FlyweightError("its checkpoint is damaged")
    return content


def checkpoint_folder(digest: str | None = None) -> str:
    """Where in a storage the checkpoints of the policy ``digest`` lie, or those of all."""
    return f"checkpoints/{digest}" if digest else "checkpoints"


def remove_checkpoints(storage: Storage, digest: str | None = None) -> None:
    """Removes those of the policy ``digest``, or all."""
    storage.remove(checkpoint_folder(digest))


def policy_file(path: Path, run_dir: Path) -> Path:
    """The file of the policy that is called ``path``: a file, the folder of an artifact, or the
    beginning of the digest of an artifact of ``run_dir``. Raises BadInput."""
    if path.is_dir() and (path / "policy.json").is_file():
        return path / "policy.json"
    if path.exists() or not re.fullmatch("[0-9a-f]+", str(path)):
        return path  # what is not there is told where it is read
    found = sorted(run_dir.glob(f"artifacts/{path}*/policy.json"))
    if len(found) > 1:
        named = ", ".join(file.parent.name[: len(str(path)) + 8] for file in found)
        raise BadInput(
            f"several artifacts of {run_dir} begin with {path}: {named}; give more of it"
        )
    return found[0] if found else path


def read_policy(path: Path) -> Policy:
    """The policy in a JSON file. Raises BadInput."""
    try:
        return Policy.from_json(path.read_text())
    except OSError as error:
        raise BadInput(
            f"no policy at {path}: {error.strerror}; `flyweight sample` writes some, and a run has "
            "those of its artifacts, artifacts/DIGEST/policy.json: with --spec RUN_DIR the first "
            "digits of DIGEST suffice"
        ) from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not a policy: {error}") from error
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error

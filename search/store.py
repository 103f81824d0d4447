"""Artifacts and checkpoints in a run directory: written whole or not at all, verified when read."""

import hashlib
import io
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..compressors import Candidate, save_candidate
from ..spaces import BadInput, FlyweightError, Policy

PROFILE = "profile.jsonl"  # the device profile in a run directory
REQUEST = "teacher/request.npz"  # beside the teacher's model


def write_whole(path: Path, content: bytes) -> None:
    """Writes ``path`` so that a reader sees all of it or nothing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON, whole or not at all."""
    write_whole(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


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


def write_artifact(run_dir: Path, candidate: Candidate, facts: dict[str, Any]) -> str:
    """Stores the artifact of ``candidate`` with its policy and ``facts``; its relative path."""
    digest = candidate.policy.digest
    place = run_dir / artifact_path(digest)
    write_whole(place, candidate.model)
    write_json(place.with_name("policy.json"), candidate.policy.to_dict())
    metrics = {
        "digest": digest,
        "sha256": hashlib.sha256(candidate.model).hexdigest(),
        "rung": candidate.rung,
        "metric": candidate.metric,
        "loss": candidate.loss,
        "size_bytes": len(candidate.model),
        "compressed_bytes": compressed_bytes(candidate.model),
        "samples": candidate.samples,
        "parity": None if candidate.parity is None else vars(candidate.parity),
        **facts,
    }
    write_json(place.with_name("metrics.json"), metrics)
    return artifact_path(digest)


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


def write_checkpoint(run_dir: Path, candidate: Candidate, inputs: str) -> None:
    """Stores ``candidate`` for as long as its trial runs. inputs: digest of what it depends on
    besides its policy and rung. Raises OSError or FlyweightError."""
    content = save_candidate(candidate)
    digest = hashlib.sha256(content).hexdigest()
    folder = checkpoint_folder(run_dir, candidate.policy.digest)
    write_whole(folder / f"{candidate.rung}-{inputs}-{digest}.safetensors", content)


def read_checkpoint(run_dir: Path, digest: str, rung: str, inputs: str) -> bytes:
    """What ``write_checkpoint`` stored for the policy ``digest``. Raises FlyweightError if there is
    none, or it is not what was written."""
    places = checkpoint_folder(run_dir, digest).glob(f"{rung}-{inputs}-*.safetensors")
    try:
        newest = max(places, key=lambda place: place.stat().st_mtime_ns, default=None)
        content = newest.read_bytes() if newest else b""
    except OSError as error:
        raise FlyweightError(f"its checkpoint cannot be read: {error}") from error
    if newest is None:
        raise FlyweightError("it has no checkpoint")
    if hashlib.sha256(content).hexdigest() != newest.stem.rpartition("-")[2]:
        raise FlyweightError("its checkpoint is damaged")
    return content


def checkpoint_folder(run_dir: Path, digest: str | None = None) -> Path:
    """Where the checkpoints of the policy ``digest`` lie, or those of all."""
    return run_dir / "checkpoints" / (digest or "")


def remove_checkpoints(run_dir: Path, digest: str | None = None) -> None:
    """Removes those of the policy ``digest``, or all."""
    shutil.rmtree(checkpoint_folder(run_dir, digest), ignore_errors=True)


def read_policy(path: Path) -> Policy:
    """The policy in a JSON file. Raises BadInput."""
    try:
        return Policy.from_json(path.read_text())
    except OSError as error:
        raise BadInput(f"no policy at {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not a policy: {error}") from error
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error

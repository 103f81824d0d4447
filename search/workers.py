"""What runs on Ray's workers: the trial as a Tune trainable."""

import contextlib
import json
import math
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import tune

from ..compressors import RUNGS, Candidate, Prepared, compress, load_candidate
from ..compressors.made import Made
from ..spaces import BadInput, FlyweightError, Impossible, Policy
from .ready import prepare_task
from .spec import Spec
from .storage import Storage
from .store import compressed_bytes, read_checkpoint, write_artifact, write_checkpoint

# Rungs of which a trial leaves a checkpoint: those that train, but the last, which has an artifact.
# To recalibrate the reference ResNet takes a second; it and short take 4 to 15 (busy machine), to
# read a checkpoint a tenth.
KEPT = RUNGS[1:-1]
# Before an artifact that could not be stored is tried again: a rung of training hangs on it, and a
# storage may be away for a moment.
PAUSES_S = (1.0, 5.0, 20.0)


@dataclass(frozen=True)
class Job:
    """What all trials of a search share. inputs: digest of all that a candidate depends on besides
    its policy and rung. answers: the teacher's, per variant of the data. made: by which a worker
    knows whether it makes the same task. bfloat16: students that train so."""

    spec: Spec
    storage: Storage
    facts: dict[str, Any]
    inputs: str
    answers: dict[int, np.ndarray[Any, Any]]
    made: Made | None = None
    bfloat16: Sequence[str] = ()


class Unstored(FlyweightError):
    """What a trial made could not be stored: a disk is full, a storage away. No fault of it."""


class CompressionTrial(tune.Trainable):
    """One policy climbing the rungs: each step is a rung, the scheduler says whether to go on."""

    prepared: Prepared | None = None
    refused: str | None = None  # why the task cannot be made here

    def setup(self, config: dict[str, Any], job: Job | None = None) -> None:
        assert job is not None
        self.job = job
        spec = job.spec
        torch.set_num_threads(max(1, int(spec.resources.cpus)))
        answers = {variant: _shared(array) for variant, array in job.answers.items()}
        try:
            self.prepared = prepare_task(spec, answers, job.made, job.bfloat16)
        except BadInput as error:  # an error of Ray's would tell it in forty lines, for each worker
            self.refused = str(error)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.policy = Policy.from_json(new_config["policy"])
        self.candidate: Candidate | None = None
        self.rung = RUNGS.index(new_config["rung"])
        return True

    def step(self) -> dict[str, Any]:
        # One string, so that Tune neither flattens nor inspects it.
        return {"outcome": json.dumps(self._climb() | _where())}

    def _climb(self) -> dict[str, Any]:
        rung = RUNGS[self.rung]
        if self.refused is not None:
            return {"rung": rung, "refused": self.refused}
        assert self.prepared is not None
        seed, note = self.job.spec.search.seed, None
        began = time.perf_counter()  # what has to be worked out again is part of what a rung takes
        try:
            if self.candidate is None and self.rung:
                self.candidate, note = self._resumed(self.prepared, RUNGS[self.rung - 1])
            candidate = compress(self.prepared, self.policy, rung, self.candidate, seed)
            outcome = self._outcome(candidate)
        except Unstored as error:
            return {"rung": rung, "unstored": f"{rung}: {error}"}
        except (Impossible, OSError) as error:
            return {"rung": rung, "error": f"{rung}: {error}"}
        except Exception as error:  # of the task's own code, or of torch
            if self.prepared.device.type != "cpu":  # it may be out of order: a new process
                raise
            return {"rung": rung, "error": f"{rung}: {_told(error)}"}
        if rung in KEPT:
            # Whatever keeps it from being written: without one the trial would begin anew.
            with contextlib.suppress(OSError, FlyweightError):
                write_checkpoint(self.job.storage, candidate, self.job.inputs)
        self.candidate = candidate
        self.rung += 1
        outcome |= {
            "rung_seconds": time.perf_counter() - began, "device": self.prepared.device.type
        }  # fmt: skip
        return outcome | ({"note": note} if note else {})

    def _resumed(self, prepared: Prepared, rung: str) -> tuple[Candidate, str | None]:
        """What the trial held at ``rung``, from its checkpoint; without one that can be read it is
        worked out again, and why is told."""
        note = None
        if rung in KEPT:
            try:
                digest, inputs = self.policy.digest, self.job.inputs
                content = read_checkpoint(self.job.storage, digest, rung, inputs)
                return load_candidate(prepared, content), None
            except FlyweightError as error:
                note = f"begun anew: {error}"
        return compress(prepared, self.policy, rung, None, self.job.spec.search.seed), note

    def _outcome(self, candidate: Candidate) -> dict[str, Any]:
        outcome = {
            "rung": candidate.rung,
            "loss": candidate.loss,
            "metric": candidate.metric,
            "size_bytes": len(candidate.model),
            "compressed_bytes": compressed_bytes(candidate.model),
            "seconds": candidate.seconds,
            "samples": candidate.samples,
            "settled": candidate.settled,
            "diverged": candidate.diverged,
            "drop_error": candidate.drop_error,
            "macs": candidate.plan.macs,
            "parity": None if candidate.parity is None else vars(candidate.parity),
            "artifact": None,
        }
        numbers = math.isfinite(candidate.loss) and math.isfinite(candidate.metric)
        if candidate.rung == RUNGS[-1] and numbers:  # without them the trial fails
            outcome["artifact"] = self._stored(candidate)
        return outcome

    def _stored(self, candidate: Candidate) -> str:
        """The path of its artifact. Raises Unstored."""
        assert self.prepared is not None
        so = {"bfloat16": self.prepared.trains_in_bfloat16(candidate.policy.student)}
        pauses = iter(PAUSES_S)
        while True:
            try:
                return write_artifact(self.job.storage, candidate, self.job.facts | so)
            except OSError as error:
                pause = next(pauses, None)
                if pause is None:
                    raise Unstored(f"the artifact cannot be stored: {error}") from error
            time.sleep(pause)

    def save_checkpoint(self, _: str) -> None:  # the record is what a resume reads
        return None

    def load_checkpoint(self, _: Any) -> None:
        return None


def _shared(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """The same memory as a tensor: the object store's, which all workers of a node share. Nothing
    may be written there; training takes rows by their index, which are copies."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def _told(error: Exception) -> str:
    """What was raised, in one line, and where."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{what} ({Path(last.filename).name}, line {last.lineno})"


def trainable(job: Job) -> Any:
    """The trial for Tune; ``job`` goes once to each node, through the object store."""
    return tune.with_parameters(CompressionTrial, job=job)


def _where() -> dict[str, str]:
    """The node of the cluster that this is."""
    if not ray.is_initialized():
        return {}
    return {"node": ray.get_runtime_context().get_node_id()}

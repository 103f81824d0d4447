"""A candidate as bytes, so that its trial goes on elsewhere from the rung it holds. No pickles.

A safetensors file: every parameter and buffer of the student, the artifact, and in the header, as
JSON, the policy and the figures. The module is rebuilt from what the student started from. Only
how many channels stay shapes it: which ones, the values themselves say. Nothing else goes from
rung to rung (every stage of training has an optimizer of its own, quantizers are calibrated at
every rung), so the next rung is, to the bit, what it would have been.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, fx

from ..spaces import FlyweightError, Policy
from .compress import Candidate
from .parity import Parity
from .prepared import Prepared
from .prune import lay_out, shaped

VERSION = 3  # of what the file holds
ARTIFACT = "artifact"  # [bytes] uint8
STUDENT = "student."  # before the name of each of its tensors


def save_candidate(candidate: Candidate) -> bytes:
    """``candidate`` as the content of a file. Raises FlyweightError for a student with tensors
    that safetensors does not know."""
    tensors = {
        STUDENT + name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in _values(candidate.student)
    }
    tensors[ARTIFACT] = torch.frombuffer(bytearray(candidate.model), dtype=torch.uint8)
    figures = {
        "version": VERSION,
        "policy": candidate.policy.to_dict(),
        "rung": candidate.rung,
        "loss": candidate.loss,
        "metric": candidate.metric,
        "samples": candidate.samples,
        "seconds": candidate.seconds,
        "parity": None if candidate.parity is None else asdict(candidate.parity),
        "settled": candidate.settled,
        "diverged": candidate.diverged,
        "drop_error": candidate.drop_error,
    }
    try:
        return safetensors.torch.save(tensors, {"candidate": json.dumps(figures)})
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise FlyweightError(f"the candidate cannot be saved: {error}") from error


def load_candidate(prepared: Prepared, content: bytes) -> Candidate:
    """The candidate of ``prepared``'s task that ``save_candidate`` wrote. Raises FlyweightError
    for what is none, also for one of another task."""
    try:
        tensors = safetensors.torch.load(content)
        figures = _figures(content)
        policy = Policy.from_dict(figures["policy"])
        model = tensors.pop(ARTIFACT).numpy().tobytes()
        parity = None if figures["parity"] is None else Parity(**figures["parity"])
        start = prepared.start(policy)
        plan = prepared.plan(policy)
        student = shaped(start.model, start.network, prepared.example, policy.prune)
        # By the same way as any student, so that the strides of its weights are the same too.
        lay_out(lay_out(student, torch.channels_last), torch.contiguous_format)
        _fill_(student, tensors)
        return Candidate(
            policy, figures["rung"], plan, student, model, figures["loss"], figures["metric"],
            figures["samples"], figures["seconds"], parity, figures["settled"],
            figures["diverged"], figures["drop_error"],
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise FlyweightError(f"this is no checkpoint: {type(error).__name__}: {error}") from error


def _figures(content: bytes) -> dict[str, Any]:
    """The JSON in the header, which safetensors gives only for a file: after eight bytes that say
    how long it is, the header is JSON itself."""
    size = int.from_bytes(content[:8], "little")
    figures: dict[str, Any] = json.loads(
        json.loads(content[8 : 8 + size])["__metadata__"]["candidate"]
    )
    if figures["version"] != VERSION:
        raise ValueError(f"its version is {figures['version']}, not {VERSION}")
    return figures


def _values(student: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """All it holds, buffers that are not persistent too."""
    yield from student.named_parameters()
    yield from student.named_buffers()


@torch.no_grad()
def _fill_(student: fx.GraphModule, tensors: dict[str, Tensor]) -> None:
    """Gives ``student`` the values in ``tensors``, in place. Raises ValueError if they are others
    than it has."""
    found = {STUDENT + name: value for name, value in _values(student)}
    kinds = [{n: (tuple(t.shape), t.dtype) for n, t in part.items()} for part in (found, tensors)]
    if kinds[0] != kinds[1]:
        odd = sorted(n for n, _ in kinds[0].items() ^ kinds[1].items())
        raise ValueError(f"its tensors are not this student's: {', '.join(odd[:3])}")
    for name, value in found.items():
        value.copy_(tensors[name])

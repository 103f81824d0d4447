"""A clean process that runs an artifact as the target would: without torch, Ray and MLflow.

``python -m flyweight.search.verify MODEL SHA256 RUNTIME THREADS INPUTS OUTPUT`` checks the digest
of MODEL, loads it with RUNTIME and writes its answers to INPUTS (.npz) to OUTPUT (.npy). With
``TEACHER REQUEST SPEEDUP`` after them it also times MODEL beside the ONNX file TEACHER on REQUEST
(.npz), and again, twice at most, where it is less than SPEEDUP times faster. What it ran on, and
what it took, is printed as one JSON object. Exit code 1 and a sentence on stderr if something is
wrong.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels import Session, make_runtime, time_sessions
from ..spaces.errors import FlyweightError

UNWANTED = frozenset({"torch", "ray", "mlflow"})  # what a device that serves the model lacks
BATCH = 100
TRIES = 3


def answer(
    model: Path, sha256: str, runtime: str, threads: int, inputs: Path, output: Path,
    timing: tuple[Path, Path, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes the model's answers, [N, ...], to ``output``; returns the device's fingerprint.

    inputs: arrays of N rows, each under the name that the model gives it. timing: a teacher, a
    request, and how many times faster than the teacher the model should be; the answer then has
    both latencies. Raises FlyweightError.
    """
    content = model.read_bytes()  # once: what was checked is what runs
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise FlyweightError(
            f"{model} is not the file that was scored: its SHA-256 is {found}, metrics.json says "
            f"{sha256}"
        )
    target = make_runtime(runtime, threads)
    session = target.load(content)
    with np.load(inputs, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    latencies = {}
    if timing is not None:
        teacher, request, speedup = timing
        sessions = {"teacher": target.load(teacher.read_bytes()), "model": session}
        with np.load(request, allow_pickle=False) as file:
            latencies = _side_by_side(sessions, {name: file[name] for name in file.files}, speedup)
    rows = len(next(iter(arrays.values())))
    parts = [
        session.run({name: array[start : start + BATCH] for name, array in arrays.items()})
        for start in range(0, rows, BATCH)
    ]
    np.save(output, np.concatenate(parts), allow_pickle=False)
    if loaded := UNWANTED & set(sys.modules):
        raise FlyweightError(f"the verifying process is not clean: it loaded {sorted(loaded)}")
    return {"fingerprint": target.fingerprint, **latencies}


def _side_by_side(
    sessions: dict[str, Session], request: dict[str, Any], speedup: float
) -> dict[str, float]:
    """Median latencies in ms, of the try in which the model was fastest beside the teacher. Other
    work on the device slows both, but not quite alike: hence more than one try."""
    tries = []
    for _ in range(TRIES):
        timings = time_sessions(sessions, request)
        model, teacher = timings["model"].median_ms, timings["teacher"].median_ms
        tries.append({"latency_ms": model, "teacher_latency_ms": teacher})
        if teacher / model >= speedup:
            break
    return min(tries, key=lambda found: found["latency_ms"] / found["teacher_latency_ms"])


def main(arguments: list[str]) -> int:
    model, sha256, runtime, threads, inputs, output, *timed = arguments
    timing = (Path(timed[0]), Path(timed[1]), float(timed[2])) if timed else None
    try:
        report = answer(
            Path(model), sha256, runtime, int(threads), Path(inputs), Path(output), timing
        )
    except (FlyweightError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

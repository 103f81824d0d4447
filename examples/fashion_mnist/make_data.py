"""Writes the embedded subset from the official files: ``python make_data.py [FOLDER]``.

15,000 of the 55,000 images the teacher learned from, all 5,000 it never saw, and 2,000 of the
official test set, each with as many images of every class as of any other.
"""

import sys
from pathlib import Path

import numpy as np
import official

OUT = Path(__file__).parent / "data"


def main() -> None:
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else official.folder()
    if where is None:
        raise SystemExit(f"the official Fashion-MNIST files are not on this disk: {official.HOW}")
    images, labels = official.read("train", where)
    test_images, test_labels = official.read("t10k", where)
    seen, held = official.split(labels)
    some = seen[official.stratified(labels[seen], 15_000, seed=1)]
    few = official.stratified(test_labels, 2_000, seed=2)
    OUT.mkdir(exist_ok=True)
    for name, x, y in (
        ("train", images[some], labels[some]),
        ("val", images[held], labels[held]),
        ("test", test_images[few], test_labels[few]),
    ):
        np.savez_compressed(OUT / f"{name}.npz", images=x, labels=y)
        print(f"{name}: {len(y)} images, {(OUT / f'{name}.npz').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

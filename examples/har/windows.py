"""The HAPT signals as windows, split by subject."""

from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "data" / "hapt.npz"
LENGTH, STRIDE = 128, 64  # rows at 50 Hz: 2.56 s, half of it new
SCALE = np.array([1 / 720] * 3 + [np.deg2rad(0.0175)] * 3, np.float32)  # to g and rad/s
ACTIVITIES = (
    "walking", "walking upstairs", "walking downstairs", "sitting", "standing", "lying",
    "stand to sit", "sit to stand", "sit to lie", "lie to sit", "stand to lie", "lie to stand",
)  # fmt: skip
SUBJECTS = {
    "train": (1, 3, 5, 6, 7, 8, 11, 14, 15, 16, 19, 21, 22, 25, 26, 27),
    "val": (17, 23, 28, 29, 30),
    "test": (2, 4, 9, 10, 12, 13, 18, 20, 24),  # those of the data set's authors
}


def read(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Windows float32 [N, 6, 128] in g and rad/s and classes int64 [N] of the subjects of
    ``part``; the class is what most rows of a window are labelled."""
    with np.load(FILE) as file:
        signals = np.cumsum(file["changes"], 1, dtype=np.int16).T  # [rows, 6]
        labels, lengths, subjects = file["labels"], file["lengths"], file["subjects"]
    windows, classes = [], []
    ends = np.cumsum(lengths)
    for first, end, subject in zip(ends - lengths, ends, subjects, strict=True):
        if subject not in SUBJECTS[part]:
            continue
        for start in range(first, end - LENGTH + 1, STRIDE):
            rows = slice(start, start + LENGTH)
            windows.append((signals[rows] * SCALE).T)
            classes.append(np.bincount(labels[rows]).argmax() - 1)
    return np.stack(windows), np.array(classes)

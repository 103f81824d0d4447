"""The demo over seeds: what ``make demo`` gives, measured again by a bare onnxruntime.

    python benchmarks/demo.py [--seeds 0 1 2]

Prints a row a seed and writes benchmarks/out/demo.json; a seed that is there already is kept.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import yaml
from common import OUT, write

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parent / "examples" / "fashion_mnist"


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def accuracy(model: ort.InferenceSession, x: Any, y: Any) -> float:
    hits = sum(
        int((model.run(None, {"input": x[i : i + 100]})[0].argmax(1) == y[i : i + 100]).sum())
        for i in range(0, len(x), 100)
    )
    return 100 * hits / len(x)


def speedup(teacher: ort.InferenceSession, other: ort.InferenceSession, x: Any) -> float:
    """Ratio of medians over 15 interleaved rounds of the minimum of 20 calls."""
    rounds: dict[str, list[float]] = {"teacher": [], "other": []}
    for _ in range(15):
        for name, model in (("teacher", teacher), ("other", other)):
            model.run(None, {"input": x[:1]})
            best = float("inf")
            for _ in range(20):
                began = time.perf_counter()
                model.run(None, {"input": x[:1]})
                best = min(best, time.perf_counter() - began)
            rounds[name].append(best)
    return float(np.median(rounds["teacher"]) / np.median(rounds["other"]))


def run(seed: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="flyweight-demo-"))
    spec = yaml.safe_load((EXAMPLE / "search.yaml").read_text())
    spec["search"]["seed"] = seed
    spec["task"] = f"{EXAMPLE / 'task.py'}:FashionMnist"
    (folder / "search.yaml").write_text(yaml.safe_dump(spec))
    command = [sys.executable, "-m", "flyweight.search.cli", "search", "search.yaml"]
    began = time.monotonic()
    subprocess.run([*command, "--out", "run"], cwd=folder, check=True, capture_output=True)
    wall = time.monotonic() - began
    result = json.loads((folder / "run" / "result.json").read_text())
    sys.path.insert(0, str(EXAMPLE))
    from task import FashionMnist

    test = FashionMnist().test
    x = np.stack([test[i][0].numpy() for i in range(len(test))])
    y = np.array([test[i][1] for i in range(len(test))])
    teacher = session(folder / "run" / "teacher" / "model.onnx")
    best = session(folder / "run" / "artifacts" / str(result["best"]) / "model.onnx")
    return {
        "seed": seed,
        "wall_s": wall,
        "trials": result["trials"],
        "speedup": speedup(teacher, best, x),
        "test_items": len(y),
        "drop_test": accuracy(teacher, x, y) - accuracy(best, x, y),
        "front": result["front"],
        "teacher": result["teacher"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    path = OUT / "demo.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for seed in args.seeds:
        if seed not in [row["seed"] for row in rows]:
            rows.append(run(seed))
            write("demo", {"rows": rows})
    print(f"{'seed':>4} {'wall s':>7} {'speed-up':>8} {'points lost on test':>20}")
    for row in rows:
        print(
            f"{row['seed']:>4} {row['wall_s']:>7.0f} {row['speedup']:>7.2f}x "
            f"{row['drop_test']:>12.2f} ({row['test_items']})"
        )


if __name__ == "__main__":
    main()

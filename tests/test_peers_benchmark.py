"""The comparison with peers: what counts of everybody, and who is said to win."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PEERS = BENCHMARKS / "peers"
sys.path[:0] = [str(folder) for folder in (BENCHMARKS, PEERS) if str(folder) not in sys.path]

import compare  # noqa: E402

RIGHT = np.arange(10_000) % 10 > 0  # on nine images of ten


def measured(speedup: float, metric: float, loss: float = 1.0) -> compare.Measured:
    artifact = compare.Artifact("hand", f"{speedup:g}", b"", metric, loss)
    return compare.Measured(artifact, speedup, RIGHT, 0)


def test_the_best_keeps_the_limit_and_is_not_chosen_by_the_test_set() -> None:
    slow, accurate, near = measured(2.4, 99), measured(2.6, 94), measured(2.7, 93, 0.5)
    assert compare.best([slow, accurate, near], 2.5, "metric") is accurate
    assert compare.best([slow, accurate, near], 2.5, "loss") is near
    assert compare.best([slow], 2.5, "metric") is None


def test_a_limit_is_kept_up_to_a_per_cent_and_of_equals_the_fastest_counts() -> None:
    nearly, equal = measured(2.48, 94), measured(2.6, 94)
    assert compare.best([nearly], 2.5, "metric") is nearly
    assert compare.best([equal, nearly], 2.5, "metric") is equal
    assert compare.best([measured(2.47, 94)], 2.5, "metric") is None


@pytest.mark.parametrize(
    ("text", "run"),
    [
        ("an hour=runs/a", compare.Run("an hour", Path("runs/a"))),
        ("20 min=runs/a@1200", compare.Run("20 min", Path("runs/a"), 1200.0)),
    ],
)
def test_a_run_may_be_cut_off(text: str, run: compare.Run) -> None:
    assert compare.run_of(text) == run


def test_what_a_search_would_have_had_earlier(tmp_path: Path) -> None:
    teacher = {"metric": 94.0, "latency_ms": 2.0}
    entries = [
        {"kind": "search", "time": 1000.0, "objective": {"speedup": 2.0}, "teacher": teacher}
    ]
    for digest, at, metric, latency in (("a", 1100, 93.0, 0.9), ("b", 1300, 93.5, 0.8)):
        folder = tmp_path / "artifacts" / digest
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(digest.encode())
        sha256 = hashlib.sha256(digest.encode()).hexdigest()
        (folder / "metrics.json").write_text(json.dumps({"sha256": sha256}))
        entries.append(
            {
                "kind": "result", "rung": "full", "digest": digest, "time": at, "metric": metric,
                "loss": 1.0, "latency_ms": [latency] * 3, "size_bytes": 1, "compressed_bytes": 1,
            }
        )  # fmt: skip
    (tmp_path / "record.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    early = compare.of_run(compare.Run("us", tmp_path, 200.0))
    assert [(one.model, one.metric) for one in early] == [(b"a", 93.0)]
    assert [one.model for one in compare.of_run(compare.Run("us", tmp_path))] == [b"b"]


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (RIGHT, np.ones_like(RIGHT), "**they win**"),
        (np.ones_like(RIGHT), RIGHT, "we win"),
        (RIGHT, np.roll(RIGHT, 1), "no difference"),
    ],
)
def test_who_wins(ours: np.ndarray, theirs: np.ndarray, said: str) -> None:
    def of(hits: np.ndarray) -> compare.Measured:
        return compare.Measured(measured(3, 94).artifact, 3.0, hits, 0)

    assert said in compare.verdict(of(ours), of(theirs))


def test_who_alone_keeps_the_limit_is_said() -> None:
    assert compare.verdict(None, measured(3, 94)) == "they alone"
    assert compare.verdict(measured(3, 94), None) == "we alone"
    assert compare.verdict(None, None) == "nobody keeps it"


def test_the_peers_are_pinned_as_flyweight_is() -> None:
    lines = (BENCHMARKS.parent / "constraints.txt").read_text().splitlines()
    ours = dict(line.split("==") for line in lines if "==" in line)
    for path in PEERS.glob("requirements-*.txt"):
        for line in path.read_text().splitlines():
            if not line.startswith("#"):
                name, _, version = line.partition("==")
                assert version, line
                assert ours.get(name, version) == version

"""The comparison with peers: what counts of everybody, and who is said to win."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PEERS = BENCHMARKS / "peers"
sys.path[:0] = [str(folder) for folder in (BENCHMARKS, PEERS) if str(folder) not in sys.path]

import compare  # noqa: E402
import shared  # noqa: E402

from flyweight.spaces import Impossible  # noqa: E402

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


class Speeds(shared.Bench):
    """A network of a size is 1 / size times as fast; below 0.2 there is none."""

    def __init__(self) -> None:
        self._timed = {}

    def _speed(self, size: float, precision: str, *_: object) -> float:
        if size < 0.2:
            raise Impossible("too small")
        self._timed[size, precision] = (1 if precision == "int8" else 0.5) / size
        return self._timed[size, precision]


@pytest.mark.parametrize(("limit", "size"), [(0.9, 1.0), (1.9, 0.5), (3.3, 0.25), (9.0, 0.25)])
def test_the_largest_size_that_keeps_a_limit_else_the_fastest(limit: float, size: float) -> None:
    sizes = [1.0, 0.75, 0.5, 0.25, 0.1]
    assert Speeds().widest(sizes, lambda _: nn.Identity(), limit) == (size, "int8")


def test_artifacts_of_another_budget_are_not_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "2.2.json"
    path.write_text(json.dumps({"budget": 60.0, "data": "full", "cpu_seconds": 5.0}))
    assert shared.known(path, {"budget": 60.0, "data": "full"})["cpu_seconds"] == 5.0
    for asked in ({"budget": 120.0}, {"data": "embedded"}, {"seed": 1}):
        with pytest.raises(SystemExit, match="was made with"):
            shared.known(path, asked)
    with pytest.raises(SystemExit, match="hand comes first"):
        shared.known(tmp_path / "3.json", {})

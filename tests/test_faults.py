"""Short forms of benchmarks/faults.py: nothing is lost, whatever fails."""

import os
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    # No machine was quiet enough yet to see them all pass: until then they are asked for.
    pytest.mark.skipif("FLYWEIGHT_FAULTS" not in os.environ, reason="set FLYWEIGHT_FAULTS=1"),
]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))

import faults  # noqa: E402


@pytest.mark.parametrize("name", faults.FAULTS)
def test_nothing_is_lost(name: str, tmp_path: Path) -> None:
    if name == "disk" and not faults.can_mount():
        pytest.skip("no small disk can be mounted here: it needs root")
    figures = faults.suffer(name, tmp_path, short=True)
    assert figures["wrong"] == [], figures
    if name == "workers":
        assert figures["killed"] or figures["workers_died"], figures

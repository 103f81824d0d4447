"""Short forms of benchmarks/faults.py: nothing is lost, whatever fails."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))

import faults  # noqa: E402


@pytest.mark.parametrize("name", faults.FAULTS)
def test_nothing_is_lost(name: str, tmp_path: Path) -> None:
    if reason := faults.lacking(name):
        pytest.skip(reason)
    figures = faults.suffer(name, tmp_path, short=True)
    assert figures["wrong"] == [], figures
    if name == "workers":
        assert figures["killed"] or figures["workers_died"], figures

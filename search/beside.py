"""Other runs of the same task on the same target, to compare with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..spaces import BadInput
from .figures import LOOKS
from .reading import Row, Run, read_run

# What must be the same for metrics and speed-ups to be comparable: a name in words, where it is.
_SAME = (("data", "data_digest"), ("target", "target"))


@dataclass(frozen=True)
class Other:
    """A run in the table and the legend. look: a colour of the page, the path of its mark."""

    name: str
    strategy: str
    results: int
    wall_s: float | None
    front: int
    chosen: Row | None
    colour: str = "front"
    mark: str = ""


def read_beside(run: Run, folders: Sequence[Path]) -> list[Run]:
    """Raises BadInput for a run that cannot be compared, and says why."""
    if len(folders) > len(LOOKS):
        raise BadInput(f"--beside takes at most {len(LOOKS)} other runs, but got {len(folders)}")
    others = [read_run(folder) for folder in folders]
    for folder, other in zip(folders, others, strict=True):
        for words, key in _SAME:
            mine, its = run.search.get(key), other.search.get(key)
            if mine != its:
                raise BadInput(
                    f"--beside {folder}: its {words} must be those of {run.folder}, but "
                    f"{its} is not {mine}"
                )
    return others


def table(run: Run, others: Sequence[Run]) -> list[Other]:
    """A row a run, ``run`` first; none where there is nothing to compare with."""
    looks = [("front", ""), *((colour, path) for colour, _, _, path in LOOKS)]
    return [
        Other(
            other.folder.resolve().name, other.strategy,
            sum(map(len, other.summary.results.values())),
            other.result["wall_s"] if other.result else None,
            len(other.front), other.chosen, colour, path,
        )
        for other, (colour, path) in zip([run, *others] if others else [], looks, strict=False)
    ]  # fmt: skip

"""This very flyweight, as folders that a Ray job takes along."""

import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOMS = ("spaces", "kernels", "compressors", "search")


def pack(folder: Path) -> list[Path]:
    """Copies the package and what names its version into ``folder``; the ``py_modules`` of a job.

    However it is installed here: the four rooms are found as Python finds them. They come first on
    the job's path, so the cluster runs what was submitted, whatever it has itself.
    """
    package = folder / "flyweight"
    for room in ROOMS:
        found = find_spec(f"flyweight.{room}")
        assert found is not None
        assert found.submodule_search_locations is not None
        source = Path(next(iter(found.submodule_search_locations)))
        shutil.copytree(source, package / room, ignore=shutil.ignore_patterns("__pycache__"))
    number = version("flyweight")
    facts = folder / f"flyweight-{number}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flyweight\nVersion: {number}\n")
    return [package, facts]

"""Draws how far methods are at each cost: median and quartiles over the seeds.

    python benchmarks/joint_curves.py benchmarks/out/joint_compare-*.json [-o PICTURE]

The files are what ``joint_compare.py`` wrote: of one cost, speed-up and table.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from flyweight.search.drawing import Colours, png

SIZE = (7.0, 4.2)
SAME = ("cost", "speedup", "without_solved", "timings")


def read(paths: list[Path]) -> tuple[list[float], dict[str, Any]]:
    """The costs, and by method [costs][seeds] the share of the reference that was reached."""
    found = [json.loads(path.read_text()) for path in paths]
    if any(one[name] != found[0][name] for one in found for name in SAME):
        raise SystemExit(f"files of one {', '.join(SAME)} each can be drawn together")
    curves = {name: one[name]["anytime"] for one in found for name in one["methods"]}
    return found[0]["grid"], curves


def draw(axes: Axes, colours: Colours, grid: list[float], curves: dict[str, Any]) -> None:
    shades = [colours.front, colours.best, colours.limit, colours.second, colours.third]
    for i, (name, shares) in enumerate(curves.items()):
        low, middle, high = np.percentile(100 * np.array(shares), [25, 50, 75], axis=1)
        colour, dashes = shades[i % len(shades)], ("-", "--", ":")[i // len(shades) % 3]
        axes.plot(grid, middle, dashes, color=colour, label=name)
        axes.fill_between(grid, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("cost, in trials that climb all rungs")
    axes.set_ylabel("share of the reference, %")
    axes.set_ylim(60, 100)
    axes.legend(frameon=False, loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/pictures/joint.png"))
    args = parser.parse_args()
    grid, curves = read(args.files)
    args.out.write_bytes(png(lambda axes, colours: draw(axes, colours, grid, curves), SIZE))
    print(args.out)


if __name__ == "__main__":
    main()

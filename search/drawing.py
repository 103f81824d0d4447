"""Figures for a page that is read in light and in dark: SVG whose colours are the page's."""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

# Placeholders that become CSS variables: one drawing serves light and dark mode.
INK, FRONT, BEST, LIMIT = "#0000f1", "#0000f2", "#0000f3", "#0000f4"
_VARIABLES = {INK: "ink", FRONT: "front", BEST: "best", LIMIT: "limit"}


def svg(draw: Callable[[Axes], None], size: tuple[float, float], label: str) -> str:
    """What ``draw`` draws, of ``size`` in inches, to stand in a page. label: for those who cannot
    see it."""
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 10}
    style |= {name: INK for name in ("text.color", "axes.labelcolor", "axes.edgecolor",
                                     "xtick.color", "ytick.color")}  # fmt: skip
    with mpl.rc_context(style):
        room = ConstrainedLayoutEngine(w_pad=0.14)  # letters are drawn larger on a phone
        figure = Figure(figsize=size, layout=room)
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        out = io.StringIO()
        figure.savefig(
            out,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _inline(out.getvalue(), label)


def _inline(text: str, label: str) -> str:
    """Without what belongs to a file of its own, and with the page's colours."""
    text = text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    # Every figure has a "figure_1"; what is used is named by the salt.
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if f"#{m[1]}" in text else "", text)
    for placeholder, name in _VARIABLES.items():
        text = text.replace(placeholder, f"var(--{name})")
    return text

"""Figures for a page that is read in light and in dark: SVG whose colours are the page's, and PNG
for elsewhere."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine


@dataclass(frozen=True)
class Colours:
    """Those of Okabe and Ito, which colour-blind people can tell apart; marks differ in shape too.
    second and third are other runs."""

    ink: str = "#1b1f24"
    front: str = "#0072b2"
    best: str = "#d55e00"
    limit: str = "#00805c"
    second: str = "#a6467e"
    third: str = "#8a6d00"


# Placeholders that become CSS variables: one drawing serves light and dark mode.
_PLACEHOLDERS = Colours(*(f"#0000f{n}" for n in range(len(fields(Colours)))))
Draw = Callable[[Axes, Colours], None]
Size = tuple[float, float]  # inches


def svg(draw: Draw, size: Size, label: str) -> str:
    """What ``draw`` draws, to stand in a page. label: for those who cannot see it."""
    out = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with mpl.rc_context(_style(_PLACEHOLDERS) | {"svg.hashsalt": label}):
        figure = _figure(draw, size, _PLACEHOLDERS)
        FigureCanvasSVG(figure)
        figure.savefig(out, format="svg", transparent=True, metadata=metadata)
    return _inline(out.getvalue(), label)


def png(draw: Draw, size: Size) -> bytes:
    """What ``draw`` draws, on white."""
    out, colours = io.BytesIO(), Colours()
    with mpl.rc_context(_style(colours)):
        figure = _figure(draw, size, colours)
        FigureCanvasAgg(figure)
        figure.savefig(out, format="png", dpi=200, metadata={"Software": None})
    return out.getvalue()


def _style(colours: Colours) -> Any:  # matplotlib has a type of 300 literals for it
    names = "text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"
    return dict.fromkeys(names, colours.ink) | {"svg.fonttype": "none", "font.size": 10}


def _figure(draw: Draw, size: Size, colours: Colours) -> Figure:
    room = ConstrainedLayoutEngine(w_pad=0.14)  # letters are drawn larger on a phone
    figure = Figure(figsize=size, layout=room)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes, colours)
    return figure


def _inline(text: str, label: str) -> str:
    """Without what belongs to a file of its own, and with the page's colours."""
    text = text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    # Every figure has a "figure_1"; what is used is named by the salt.
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if f"#{m[1]}" in text else "", text)
    for field in fields(Colours):
        text = text.replace(getattr(_PLACEHOLDERS, field.name), f"var(--{field.name})")
    return text

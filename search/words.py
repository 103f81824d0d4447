"""Figures in words, as every output says them."""

import math


def speed(ratio: float) -> str:
    return f"{ratio:.2f} times {'faster' if ratio >= 1 else 'as fast'}"


def milliseconds(ms: float) -> str:
    """Three digits that mean something, of 800 ms as of 0.0123: times repeat within 1%."""
    return f"{ms:.{max(0, 2 - math.floor(math.log10(ms)))}f}" if 0 < ms < math.inf else f"{ms:g}"


def metric_value(value: float) -> str:
    """A metric: two decimals, and four of one of 0 to 1."""
    return f"{value:.4f}" if 0 < abs(value) < 1 else points(value)


def points(value: float) -> str:
    """A difference of two metrics: two decimals, and two digits that mean something of what
    is smaller, as with a metric of 0 to 1; nothing of what is the rounding of floats."""
    small = 1e-7 < abs(value) < 0.095
    return f"{value:.2g}" if small else f"{round(value, 2) + 0.0:.2f}"


def lost(drop: float) -> str:
    text = points(drop)
    return f"{text[1:]} points gained" if text[0] == "-" else f"{text} points lost"


def size(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def clock_time(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def one_line(text: str) -> str:
    """Text of a user's code on one line, without what could steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())

"""Pieces of work on a device whose truth is known: a network takes the sum of its pieces."""

import random
from collections import Counter

from flyweight.kernels.signature import SESSION, Signature


def pieces(rng: random.Random, n: int) -> list[Signature]:
    """Signatures of two kinds with forms, places and sizes at random."""
    out = []
    for _ in range(n):
        read, made, at = (
            rng.choice([8, 16, 24, 40]),
            rng.choice([8, 16, 32, 48]),
            rng.choice([4, 49]),
        )
        kind, form = rng.choice(["conv fp32", "conv int8"]), rng.choice(["3x3", "1x1"])
        nominal = 0.001 + read * made * at / 60e3
        out.append(Signature(kind, form, rng.choice("ab"), (read, made, at), nominal))
    return out


def truth(s: Signature) -> float:
    """What a piece takes on the device of these tests: whole blocks of 16 channels, in ms."""
    if s == SESSION:
        return 0.02
    read, made, at = s.sizes
    speed = {"conv fp32": 40e3, "conv int8": 110e3}[s.kind] * {"3x3": 1.0, "1x1": 0.6}[s.form]
    blocks = -(-made // 16) * 16
    return 0.003 + read * blocks * at / speed + {"a": 0.0, "b": 0.001}[s.place]


def networks(seed: int, n: int) -> list[Counter[Signature]]:
    rng = random.Random(seed)
    return [Counter([SESSION, *pieces(rng, rng.randint(5, 15))]) for _ in range(n)]


def total(counts: Counter[Signature]) -> float:
    return sum(n * truth(s) for s, n in counts.items())

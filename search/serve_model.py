"""A model that answers requests: loaded as its target does, warm, several requests at once."""

from collections.abc import Sequence

import numpy as np

from ..kernels import Array, Inputs, make_runtime
from ..spaces import FlyweightError, Impossible
from .serve_source import Source, check

# Of the largest answer, by which two rows may be answered otherwise together than alone: a value of
# an int8 network that is rounded the other way moves an answer by about a hundredth.
NOISE = 0.05


class ServedModel:
    """One artifact in its target's runtime. Making it verifies, loads and warms up; raises
    FlyweightError (BadInput where the runtime is not here) if any of that fails.

    most_rows: what runs at once; a request of more runs in pieces, so that memory has a bound.
    batches: whether requests run together: the first axis is of rows that do not know of each
    other. Those of a network that compares its rows each run whole and alone.
    """

    def __init__(self, source: Source, most_rows: int) -> None:
        check(source.content, source.sha256, source.where)  # again: it has travelled
        self.source, self._most = source, most_rows
        self._session = make_runtime(source.runtime, source.threads).load(source.content)
        values = [*source.io["inputs"], *source.io["outputs"]]
        self.batches = all(value["shape"] and value["shape"][0] is None for value in values)
        self.batches = self.batches and self._independent()
        for rows in (1, most_rows) if self.batches else (1,):
            self._run(self._made_up(rows))

    def _made_up(self, rows: int, seed: int | None = None) -> dict[str, Array]:
        """Inputs of zeros; with a ``seed`` of numbers at random, those of an index 0 or 1."""

        def shape(sizes: Sequence[int | None]) -> list[int]:
            free = [rows] + [1] * len(sizes)
            return [free[min(i, 1)] if s is None else s for i, s in enumerate(sizes)]

        rng, out = np.random.default_rng(seed), {}
        for v in self.source.io["inputs"]:
            made: Array = np.zeros(shape(v["shape"]), v["dtype"])
            if seed is not None:
                real = np.issubdtype(made.dtype, np.floating)
                drawn = rng.normal(size=made.shape) if real else rng.integers(0, 2, made.shape)
                made = drawn.astype(made.dtype)
            out[v["name"]] = made
        return out

    def _independent(self) -> bool:
        """Whether two rows are answered together as each is alone, as far as numbers at random
        show it."""
        both = self._made_up(2, seed=0)
        each = [{name: a[i : i + 1] for name, a in both.items()} for i in range(2)]
        try:
            together = self._session.run(both)
            alone = np.concatenate([self._session.run(inputs) for inputs in each])
        except Impossible:  # it takes no such numbers: nothing is known
            return True
        if together.shape != alone.shape:
            return False
        apart = np.abs(together.astype(np.float64) - alone)
        return not apart.max(initial=0.0) > NOISE * np.abs(alone).max(initial=0.0)

    def answer(self, requests: Sequence[Inputs]) -> list[Array | FlyweightError]:
        """The output for each of ``requests``, or why there is none.

        Those of equal shapes, but for their rows, run together; if that fails, one by one, so that
        nobody answers for another's values.
        """
        answers: dict[int, Array | FlyweightError] = {}
        for members in self._groups(requests):
            found = self._together([requests[i] for i in members]) if len(members) > 1 else None
            if found is None:
                found = [self._alone(requests[i]) for i in members]
            answers.update(zip(members, found, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _groups(self, requests: Sequence[Inputs]) -> list[list[int]]:
        if not self.batches:
            return [[i] for i in range(len(requests))]
        groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for i, inputs in enumerate(requests):
            groups.setdefault(tuple(a.shape[1:] for a in inputs.values()), []).append(i)
        return list(groups.values())

    def _together(self, requests: Sequence[Inputs]) -> list[Array | FlyweightError] | None:
        rows = [len(next(iter(inputs.values()))) for inputs in requests]
        try:
            output = self._run({
                name: np.concatenate([inputs[name] for inputs in requests]) for name in requests[0]
            })  # fmt: skip
        except Impossible:
            return None
        if len(output) != sum(rows):
            return None
        return list(np.split(output, np.cumsum(rows)[:-1]))

    def _alone(self, inputs: Inputs) -> Array | FlyweightError:
        try:
            return self._run(inputs)
        except Impossible as error:
            return error

    def _run(self, inputs: Inputs) -> Array:
        rows = len(next(iter(inputs.values()))) if self.batches else 1
        if rows <= self._most:
            return self._session.run(inputs)
        pieces = [
            self._session.run({name: a[i : i + self._most] for name, a in inputs.items()})
            for i in range(0, rows, self._most)
        ]
        return np.concatenate(pieces)

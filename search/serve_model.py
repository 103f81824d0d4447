"""A model that answers requests: loaded as its target does, warm, several requests at once."""

from collections.abc import Sequence

import numpy as np

from ..kernels import Array, Inputs, make_runtime
from ..spaces import FlyweightError, Impossible
from .serve_source import Source, check


class ServedModel:
    """One artifact in its target's runtime. Making it verifies, loads and warms up; raises
    FlyweightError (BadInput where the runtime is not here) if any of that fails.

    most_rows: what runs at once; a request of more runs in pieces, so that memory has a bound.
    """

    def __init__(self, source: Source, most_rows: int) -> None:
        check(source.content, source.sha256, source.where)  # again: it has travelled
        self.source, self._most = source, most_rows
        self._session = make_runtime(source.runtime, source.threads).load(source.content)
        values = [*source.io["inputs"], *source.io["outputs"]]
        self.batches = all(value["shape"] and value["shape"][0] is None for value in values)
        for rows in (1, most_rows) if self.batches else (1,):
            self._run(self._zeros(rows))

    def _zeros(self, rows: int) -> dict[str, Array]:
        def shape(sizes: Sequence[int | None]) -> list[int]:
            free = [rows] + [1] * len(sizes)
            return [free[min(i, 1)] if s is None else s for i, s in enumerate(sizes)]

        inputs = self.source.io["inputs"]
        return {v["name"]: np.zeros(shape(v["shape"]), v["dtype"]) for v in inputs}

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

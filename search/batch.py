"""Latencies of many policies of a space at once."""

import numpy as np
from numpy.typing import NDArray

from ..compressors import Prepared
from ..kernels import LatencyPredictor
from ..spaces import Impossible, Space
from .profiling import plan_of


class BatchPredictor:
    """Latency of many policies of a space at once.

    axes: the parameters of the space that decide latency.
    """

    def __init__(self, prepared: Prepared, space: Space, predictor: LatencyPredictor) -> None:
        self._prepared, self._space, self._predictor = prepared, space, predictor
        self.axes = tuple(
            p for p in space.parameters
            if p.name == "student" or p.name.startswith(("drop/", "width/", "precision/"))
        )  # fmt: skip

    def predict(self, points: NDArray[np.int64]) -> NDArray[np.float64]:
        """[n, 3]: lower end, middle and upper end in ms of each of ``points`` [n, axes], which are
        indices into the choices of ``axes``; infinite for what is impossible."""
        out = np.full((len(points), 3), np.inf)
        plans, at = [], []
        for row, point in enumerate(points):
            values = {a.name: a.choices[i] for a, i in zip(self.axes, point, strict=True)}
            try:
                plans.append(plan_of(self._prepared, self._space.policy(values)))
                at.append(row)
            except Impossible:
                continue
        if plans:
            out[at] = self._predictor.predict(plans)
        return out

"""The latency of thousands of policies of a space, for whoever solves for one."""

from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from ..compressors import Prepared
from ..kernels import Array, Batch, Known, LatencyPredictor
from ..spaces import Impossible, Network, Parameter, Space
from ..spaces.blueprint import without_blocks

NETWORKS = 256  # with other blocks dropped, which are kept
MANY = 4_000  # policies worked out together: in batches of more, each costs as much


class BatchPredictor:
    """Latency of many policies of a space at once, without making each into a blueprint.

    axes: the parameters of the space that decide latency. What it keeps takes up to 0.5 GB.
    """

    axes: tuple[Parameter, ...]

    def __init__(self, prepared: Prepared, space: Space, predictor: LatencyPredictor) -> None:
        self._prepared, self._space, self._predictor = prepared, space, predictor
        self.axes = space.axes
        self._columns = {axis.name: j for j, axis in enumerate(self.axes)}
        self._kinds = [
            j for name, j in self._columns.items() if name.split("/")[0] in ("student", "drop")
        ]
        self._int8 = [np.array([c == "int8" for c in axis.choices]) for axis in self.axes]
        # Columns, by student, kind of axis and name in the network of that student.
        self._names: dict[str, dict[tuple[str, str], int]] = {s: {} for s in space.networks}
        for kind, named in (("width", space.groups), ("precision", space.layers)):
            for name, (student, part) in named.items():
                self._names[student][kind, part.name] = self._columns[f"{kind}/{name}"]
        self._begin()

    def _begin(self) -> None:
        self._pieces = self._predictor.pieces()
        self._known = {student: Known(self._pieces) for student in self._space.networks}
        self._networks: dict[bytes, tuple[str, Network]] = {}

    def predict(self, points: NDArray[np.int64]) -> Array:
        """[policies, 3]: lower end, middle and upper end of the latency in ms; infinite where a
        policy is impossible, or has work that the runtime is known to die of.

        points: [policies, axes], the index into the ``choices`` of each of the ``axes``.
        """
        if len(points) > MANY:
            parts = range(0, len(points), MANY)
            return np.concatenate([self.predict(points[i : i + MANY]) for i in parts])
        if any(known.full for known in self._known.values()):
            self._begin()
        kinds, kind = np.unique(points[:, self._kinds], axis=0, return_inverse=True)
        found = {}
        for i in range(len(kinds)):
            rows = np.nonzero(kind.ravel() == i)[0]
            with suppress(Impossible):
                found[i] = rows, self._numbers(points[rows])
        most = max((own.shape[1] for _, own in found.values()), default=0)
        numbers = np.zeros((len(points), most), np.int64)
        possible = np.zeros(len(points), bool)
        for rows, own in found.values():
            numbers[rows, : own.shape[1]] = own
            possible[rows] = True
        out = np.full((len(points), 3), np.inf)
        out[possible] = self._predictor.predict_pieces(self._pieces, numbers[possible])
        return out

    def _numbers(self, points: NDArray[np.int64]) -> NDArray[np.int64]:
        """[policies, kernels]: the work of policies of one student and the same blocks."""
        student, network = self._network(points[0])
        names = self._names[student]
        widths = {group: names["width", group] for group in network.groups}
        layers = {layer: names["precision", layer] for layer in network.layers}
        batch = Batch(
            network,
            self._prepared.runtime.capabilities,
            {group: self.axes[j].choices for group, j in widths.items()},
            {group: points[:, j] for group, j in widths.items()},
            {layer: self._int8[j][points[:, j]] for layer, j in layers.items()},
            len(points),
        )
        return batch.numbers(self._known[student])

    def _network(self, point: NDArray[np.int64]) -> tuple[str, Network]:
        """The student of a policy, and what its network is without the blocks that it drops."""
        key = point[self._kinds].tobytes()
        if key not in self._networks:
            if len(self._networks) == NETWORKS:
                self._networks.clear()
            policy = self._space.policy(self._space.values_at(point))
            start = self._prepared.start(policy)
            self._networks[key] = policy.student, without_blocks(start.network, policy)
        return self._networks[key]

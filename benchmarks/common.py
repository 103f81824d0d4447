"""What every benchmark says about where it ran, and where it writes its figures."""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flyweight.compressors import Prepared, harm
from flyweight.kernels.cores import cores
from flyweight.search.sensitivity import Judge
from flyweight.spaces import Impossible, Policy

OUT = Path(__file__).resolve().parent / "out"
LIBRARIES = ("flyweight", "torch", "onnxruntime", "openvino", "ray", "optuna", "mlflow")


def machine() -> dict[str, Any]:
    """The processor's name, its cores, and the load over the last minute: processes that run."""
    return {"name": _processor(), "cores": cores(), "load": round(os.getloadavg()[0], 2)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions(libraries: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """The versions of Python and ``libraries``."""
    return {"python": platform.python_version(), **{name: version(name) for name in libraries}}


def write(name: str, figures: dict[str, Any]) -> Path:
    """Writes ``figures``, with the machine and the versions, to benchmarks/out/NAME.json."""
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{name}.json"
    content = {"machine": machine(), "versions": versions(), **figures}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def judge(prepared: Prepared) -> Judge:
    """Says what policies harm, in this process: what a search has Ray actors do."""

    def harms(policies: Sequence[Policy], recalibrated: bool = False) -> list[float | None]:
        out: list[float | None] = []
        for policy in policies:
            try:
                out.append(harm(prepared, policy, recalibrated=recalibrated))
            except Impossible:
                out.append(None)
        return out

    return harms

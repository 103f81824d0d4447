"""Runs a peer in a virtual environment of its own, made the first time.

    python benchmarks/peers/run.py hand|nncf|fastnas|olive [--budget 2400] [--seed 0]

``nncf`` and ``olive`` do not prune: they begin with the students of ``hand``, which runs first, and
carry what those cost. Where int8 alone keeps the limit the student is the teacher, and costs
nothing. Artifacts, with what they cost, go to benchmarks/peers/artifacts/PEER (PEER-SEED for
another seed than 0); a limit whose artifact is there is not run again. The environments are kept in
the user's cache (FLYWEIGHT_PEERS names another folder), flyweight's folders are linked there, so
that all peers train, read data and take time by the same code as flyweight itself.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("FLYWEIGHT_PEERS", Path.home() / ".cache" / "flyweight" / "peers"))
# Nobody is told what runs here. Olive sends a first message before it reads its own switch, unless
# it believes itself in CI.
QUIET = {"OLIVE_DISABLE_TELEMETRY": "1", "CI": "true"}
PEERS = ("hand", "nncf", "fastnas", "olive")
# Times as fast as the teacher. int8 alone brings about 2.3: 2.2 is where quantizers are as good as
# anybody; the others ask for pruning, little, some and much of it. All share one budget, flyweight
# serves them by the front of one search (flyweight.yaml).
LIMITS = (2.2, 3.0, 4.0, 5.0)


def environment(peer: str) -> Path:
    """The interpreter of the peer's environment; made anew when its requirements change."""
    needs, pins = HERE / f"requirements-{peer}.txt", ROOT / "constraints.txt"
    alone = HERE / f"requirements-{peer}-alone.txt"  # without what they say that they need
    files = [path for path in (needs, pins, alone) if path.exists()]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    folder = CACHE / f"{peer}-{digest}"
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        print(f"== Installing {needs.name} into {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(pins)]
        subprocess.run([*install, "-r", str(needs)], check=True)
        if alone.exists():
            subprocess.run([*install, "--no-deps", "-r", str(alone)], check=True)
        ready.touch()
    return python


def linked() -> Path:
    """A folder from which ``flyweight`` is imported without being installed: the package maps
    folders of the repository to its own (pyproject.toml)."""
    folder = CACHE / f"linked-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]}"
    (folder / "flyweight").mkdir(parents=True, exist_ok=True)
    for room in ("spaces", "kernels", "compressors"):
        link = folder / "flyweight" / room
        if not link.is_symlink():
            link.symlink_to(ROOT / room)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("peer", choices=PEERS)
    args, rest = parser.parse_known_args()
    python = environment(args.peer)
    variables = {**os.environ, **QUIET, "PYTHONPATH": str(linked())}
    script = HERE / f"peer_{args.peer}.py"
    return subprocess.run([str(python), str(script), *rest], env=variables).returncode


if __name__ == "__main__":
    sys.exit(main())

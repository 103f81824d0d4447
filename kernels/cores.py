"""How many CPUs this process has: what a container or a cluster's scheduler gives it."""

import os
from pathlib import Path, PurePosixPath

CGROUP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def _allowed() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


# At once: OpenMP (OMP_PROC_BIND) binds the thread that asks to one of them when it first computes.
ALLOWED = _allowed()


def cores() -> int:
    """The CPUs that this process may use, at least 1: those of its cpuset, and no more than the
    quota of its cgroup (version 2) allows at a time. The machine may have many more."""
    return max(1, min([ALLOWED, *map(int, _quotas())]))


def _quotas() -> list[float]:
    """Those of the group of this process and of all that it is in, in CPUs."""
    try:
        lines = CGROUP.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        if line.startswith("0::/"):  # version 2; from within a container it is often the root
            own = PurePosixPath(line[4:])
            for group in (own, *own.parents):
                found += _quota(GROUPS / group / "cpu.max")
    return found


def _quota(path: Path) -> list[float]:
    """What ``path`` allows, "microseconds period"; none where it says "max" or is not there."""
    try:
        quota, period = path.read_text().split()
        return [int(quota) / int(period)]
    except (OSError, ValueError):
        return []

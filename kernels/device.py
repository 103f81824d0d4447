"""What a device is: the facts that latency and arithmetic depend on, and their fingerprint."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

# Instruction sets that choose a kernel, and so a latency and (VNNI) an arithmetic.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
VNNI = {"avx512_vnni", "avx_vnni"}
X86 = {"x86_64", "amd64", "i686", "i386"}


# What tells CPUs apart where a virtual machine has a name for all generations ("AMD EPYC").
MODEL = ("cpu family", "model", "stepping", "cpu implementer", "cpu part")


class Cpu(NamedTuple):
    """name: "" if it is not said, as on many ARM boards. model: which of that name."""

    name: str
    flags: frozenset[str]
    model: str


def parse_cpuinfo(text: str) -> Cpu:
    """The first core."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = fields.get("flags", fields.get("features", ""))  # x86 and ARM call it differently
    name = fields.get("model name") or fields.get("hardware") or fields.get("cpu part", "")
    model = " ".join(f"{key} {fields[key]}" for key in MODEL if key in fields)
    return Cpu(name, frozenset(flags.split()), model)


def cpu() -> Cpu:
    """This machine's CPU; no flags and no model where there is no /proc/cpuinfo."""
    found = parse_cpuinfo(_read(Path("/proc/cpuinfo")))
    name = found.name or brand() or platform.processor() or platform.machine()
    board = _read(Path("/proc/device-tree/model")).strip("\0\n ")  # of ARM
    return found._replace(name=name, model=f"{found.model} {board}".strip())


def brand() -> str:
    """What macOS calls the CPU, "" elsewhere."""
    if platform.system() != "Darwin":
        return ""
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def gpu() -> str:
    """Model of the first NVIDIA GPU as its driver tells, else "unknown". Not run on a GPU."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return "unknown"


def weight_bits_by_flags(flags: Collection[str], arch: str) -> int:
    """Bits an int8 weight may use.

    x86 without VNNI adds pairs of products of u8 x s8 in saturating 16-bit arithmetic (vpmaddubsw):
    2 x 255 x 127 does not fit 16 bits, 2 x 255 x 64 does.
    """
    return 7 if arch.lower() in X86 and VNNI.isdisjoint(flags) else 8


def weight_bits_of(device: Mapping[str, str]) -> int:
    """The same of a device by its facts, as ``describe`` tells them."""
    if "gpu" in device:  # the flags are those of the CPU beside it
        return 8
    return weight_bits_by_flags(device.get("flags", "").split(), device.get("architecture", ""))


def describe(runtime: str, version: str, threads: int) -> dict[str, str]:
    """This machine as ``runtime`` uses it.

    The operating system without its version: a patched kernel keeps its profiles.
    """
    name, flags, model = cpu()
    return {
        "architecture": platform.machine(),
        "cpu": name,
        "flags": " ".join(flag for flag in FLAGS if flag in flags),
        "model": model,
        "os": platform.system(),
        "runtime": runtime,
        "threads": str(threads),
        "version": version,
    }


def fingerprint_of(device: Mapping[str, str]) -> str:
    """16 hexadecimal digits of the SHA-256 of the canonical JSON of ``device``."""
    text = json.dumps(dict(device), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

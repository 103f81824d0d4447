"""What a device is: the facts that latency and arithmetic depend on, and their fingerprint."""

import hashlib
import json
import platform
from collections.abc import Collection, Mapping
from pathlib import Path

# Instruction sets that choose a kernel, and so a latency and (VNNI) an arithmetic.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
VNNI = {"avx512_vnni", "avx_vnni"}
X86 = {"x86_64", "amd64", "i686", "i386"}


def parse_cpuinfo(text: str) -> tuple[str, frozenset[str]]:
    """Model name ("" if it is not said, as on many ARM boards) and flags of the first core."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = fields.get("flags", fields.get("features", ""))  # x86 and ARM call it differently
    model = fields.get("model name") or fields.get("hardware") or fields.get("cpu part", "")
    return model, frozenset(flags.split())


def cpu() -> tuple[str, frozenset[str]]:
    """Model name and flags of this machine's CPU; no flags where there is no /proc/cpuinfo."""
    try:
        model, flags = parse_cpuinfo(Path("/proc/cpuinfo").read_text(errors="replace"))
    except OSError:
        model, flags = "", frozenset()
    return model or platform.processor() or platform.machine(), flags


def gpu() -> str:
    """Model of the first NVIDIA GPU as its driver tells, else "unknown". Not run on a GPU."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return "unknown"


def saturates(flags: Collection[str], arch: str) -> bool:
    """Whether u8 x s8 kernels add pairs of products in saturating 16-bit arithmetic.

    They do on x86 without VNNI (vpmaddubsw): 2 x 255 x 127 does not fit 16 bits, 2 x 255 x 64 does.
    """
    return arch.lower() in X86 and VNNI.isdisjoint(flags)


def weight_bits_by_flags(flags: Collection[str], arch: str) -> int:
    """Bits an int8 weight may use, by the rule of ``saturates``."""
    return 7 if saturates(flags, arch) else 8


def describe(runtime: str, version: str, threads: int) -> dict[str, str]:
    """This machine as ``runtime`` uses it.

    The operating system without its version: a patched kernel keeps its profiles.
    """
    model, flags = cpu()
    return {
        "architecture": platform.machine(),
        "cpu": model,
        "flags": " ".join(flag for flag in FLAGS if flag in flags),
        "os": platform.system(),
        "runtime": runtime,
        "threads": str(threads),
        "version": version,
    }


def fingerprint_of(device: Mapping[str, str]) -> str:
    """16 hexadecimal digits of the SHA-256 of the canonical JSON of ``device``."""
    text = json.dumps(dict(device), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

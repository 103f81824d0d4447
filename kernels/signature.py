"""Kernel signatures: what a blueprint's latency is the sum of, without building the model.

A signature says what the time of one piece of work depends on: the work of a kernel (kind,
precision, window, fused activation, channels, positions), and the handing over of a value from the
kernel that makes it to those that read it, where a runtime quantizes, dequantizes and reorders.
Two pieces with the same signature are taken to take the same time.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..spaces.blueprint import Blueprint, Kernel

# A nominal device, one core of it: where nothing is measured yet, times are in proportion to what
# they would be there (the roofline of Williams et al. 2009, summed instead of the larger of both).
NOMINAL_MACS = {"fp32": 60e6, "int8": 150e6}  # multiply-accumulates in a millisecond
NOMINAL_BYTES = 20e6  # in a millisecond
NOMINAL_CALL_MS = 0.0007  # of one kernel, however small
NOMINAL_SESSION_MS = 0.005
_BYTES = {"fp32": 4, "int8": 1}
_PRODUCTS = ("matmul", "bmm", "baddbmm", "scaled_dot_product_attention")


@dataclass(frozen=True, slots=True)
class Signature:
    """One piece of work.

    kind: what is compared first ("conv int8", "handover"). form: what must be equal for two to be
    close ("3x3/2 relu"). place: what stands around it. sizes: channels read, channels made and
    positions (output elements of a channel) or, where there are no channels, elements. nominal_ms:
    its time on the nominal device.
    """

    kind: str
    form: str
    place: str
    sizes: tuple[int, ...]
    nominal_ms: float


SESSION = Signature("session", "", "", (), NOMINAL_SESSION_MS)


def signature(plan: Blueprint) -> Counter[Signature]:
    """Every piece of work of one request, with how often it occurs."""
    found = Counter([SESSION])
    for _, work, handover in by_kernel(plan):
        found.update((work, handover))
    return found


def by_kernel(plan: Blueprint) -> Iterator[tuple[Kernel, Signature, Signature]]:
    """Each kernel, in execution order, with its work and the handing over of what it makes."""
    readers: dict[str, list[Kernel]] = {}
    makers = {kernel.output: kernel for kernel in plan.kernels}
    for kernel in plan.kernels:
        for value in kernel.inputs:
            readers.setdefault(value, []).append(kernel)
    for kernel in plan.kernels:
        made = [makers[value] for value in kernel.inputs if value in makers]
        read = readers.get(kernel.output, [])
        yield kernel, *pieces_of(kernel, made, read, kernel.output in plan.quantized)


def pieces_of(
    kernel: Kernel, makers: Iterable[Kernel], readers: Iterable[Kernel], quantized: bool
) -> tuple[Signature, Signature]:
    """The work of ``kernel``, and the handing over of what it makes.

    makers: of its inputs. readers: of its output, which may be quantized.
    """
    after = _names(readers) + (" q" if quantized else "")
    return _work(kernel, f"{_names(makers)} > {after}"), _handover(kernel, after)


def digest(counts: Mapping[Signature, int]) -> str:
    """16 hexadecimal digits; the same for the same work."""
    work = sorted((s.kind, s.form, s.place, s.sizes, n) for s, n in counts.items())
    return hashlib.sha256(repr(work).encode()).hexdigest()[:16]


def nominal_ms(counts: Mapping[Signature, int]) -> float:
    """What all of it takes on the nominal device."""
    return sum(n * s.nominal_ms for s, n in counts.items())


def _names(kernels: Iterable[Kernel]) -> str:
    """Who makes or reads a value, as far as its layout depends on them."""
    return " ".join(sorted(f"{_plain(k)}:{k.precision}" for k in kernels))


def _plain(kernel: Kernel) -> str:
    if kernel.kind == "conv" and kernel.groups > 1:
        return "depthwise" if kernel.groups == kernel.out_shape[1] else "grouped"
    return kernel.detail if kernel.kind == "other" else kernel.kind


def _work(kernel: Kernel, place: str) -> Signature:
    made = math.prod(kernel.out_shape[1:])
    elements = made + sum(math.prod(shape[1:]) for shape in kernel.in_shapes)
    macs = kernel.macs
    sizes: tuple[int, ...] = (made,)
    if kernel.weights:
        sizes = (*kernel.channels, made // kernel.channels[1])
    elif kernel.detail in _PRODUCTS and len(kernel.in_shapes) > 1:
        inner = kernel.in_shapes[0][-1]
        macs, sizes = made * inner, (inner, made)
    window = "x".join(map(str, kernel.kernel))
    stride = "x".join(map(str, kernel.stride))
    dilated = ""
    if any(step > 1 for step in kernel.dilation):
        dilated = "d" + "x".join(map(str, kernel.dilation))
    grouped = f"g{kernel.groups}" if _plain(kernel) == "grouped" else ""
    return Signature(
        kind=f"{_plain(kernel)} {kernel.precision}",
        form=" ".join(part for part in (window, stride, dilated, kernel.act, grouped) if part),
        place=place,
        sizes=sizes,
        nominal_ms=NOMINAL_CALL_MS
        + macs / NOMINAL_MACS[kernel.precision]
        + _BYTES[kernel.precision] * (elements + kernel.weights) / NOMINAL_BYTES,
    )


def _handover(maker: Kernel, after: str) -> Signature:
    """What happens to a value between its maker and its readers: quantized, reordered, nothing."""
    made = math.prod(maker.out_shape[1:])
    return Signature(
        kind="handover",
        form=f"{_plain(maker)}:{maker.precision} > {after}",
        place="",
        sizes=(made,),
        nominal_ms=NOMINAL_CALL_MS + 4 * made / NOMINAL_BYTES / 2,
    )

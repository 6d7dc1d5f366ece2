"""The physical limit: what a device can do at most, and the least time that a launch can take there.

Williams, Waterman, Patterson, "Roofline" (2009): a launch needs its arithmetic and it needs its bytes; neither can go faster than the
device. Both speeds are measured here, by a matrix product and by reading and copying memory, in the same run as what they limit.

How a share of the limit has to be read. It is a share of what this device was seen to do, not of a data sheet. Two things can carry a
launch beyond it. What a launch touches may stay in a cache from one launch to the next, which is faster than memory: therefore the
bandwidth is measured at sizes from a cache's to the memory's, and a launch is judged by the one of its own size. And a convolution may
be computed with fewer multiplications than its definition has (Winograd, FFT), or the device was disturbed while its limit was measured.
That cannot be excluded, so a share above 1 is said: `Measurement.warnings` has the words.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lenet_deploy.bench.cpu import last_level_cache_bytes
from lenet_deploy.bench_records import Limit
from lenet_deploy.errors import Unusable, first_line
from lenet_deploy.models.layers import FLOAT32_BYTES

if TYPE_CHECKING:
    import torch

    from lenet_deploy.models.layers import Layer

Clock = Callable[[], float]

# Bytes of one weight. Inputs and outputs are float32 in every precision: sessions take and give nothing else.
WEIGHT_BYTES: Mapping[str, int] = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "int8": 1}
PIXEL_BYTES = 1

MIN_REPETITIONS = 3
MIB = 1 << 20
# STREAM: arrays of at least four times the last-level cache measure memory. One half is copied into the other here, so twice that.
CACHES = 8
# Where the cache is not known or the memory would not suffice. Less than STREAM's rule makes the limit higher, never lower.
SMALLEST_MEMORY, LARGEST_MEMORY = 64 * MIB, 1024 * MIB
STEP = 4  # from one working set to the next
PINNED_BYTES = 64 * MIB  # PCIe is at its full speed from a few MiB on


@dataclass(frozen=True)
class Effort:
    """How much is spent on measuring a kind of device.

    Attributes:
        sides: of square matrices, to be tried in this order until a product takes `enough_s`.
        enough_s: from there on the time to start a product is less than 1 % of it.
        product_s: seconds for each side.
        smallest_set: bytes of the smallest working set.
        copy_s: seconds for each working set, and each way to use it.
        burst_bytes: moved between two readings of the clock, where the working set is smaller.
        burst_products: products between two readings of the clock.
    """

    sides: tuple[int, ...]
    enough_s: float
    product_s: float
    smallest_set: int
    copy_s: float
    burst_bytes: int
    burst_products: int


# A product of side 1024 takes 20 to 40 ms on one core. All together a second or two on either device.
CPU = Effort((256, 512, 1024), enough_s=0.01, product_s=0.1, smallest_set=MIB // 4, copy_s=0.02, burst_bytes=16 * MIB, burst_products=1)
CUDA = Effort(
    (1024, 2048, 4096, 8192), enough_s=0.005, product_s=0.1, smallest_set=4 * MIB, copy_s=0.02, burst_bytes=4096 * MIB, burst_products=4
)
MOST_COPIES = 256  # in one burst


def measure_limit(device: torch.device, precisions: Iterable[str], clock: Clock = time.perf_counter) -> Limit:
    """What `device` can do at most: arithmetic by precision, memory, and on CUDA the copy from pinned host memory.

    Each is the best of several sizes and repetitions, since a disturbance only ever makes it less. The CPU is measured with the threads
    that torch has and with one: a small operator uses one, and on busy cores threads wait for each other. A precision is at least as fast
    as `fp32`, to which a device without arithmetic of its own for it converts. One that torch has no product for (`int8`) is left out,
    and so is the compute floor of what uses it.

    Args:
        precisions: of WEIGHT_BYTES. `tf32` is `fp32` on the CPU. `fp32` is measured in any case.
        clock: seconds; read only while nothing runs on the device.

    Raises:
        Unusable: the device has no memory left, or does not multiply.
    """
    effort = CUDA if device.type == "cuda" else CPU
    try:
        flops = {"fp32": _flops(device, "fp32", effort, clock)}
        for precision in dict.fromkeys(precisions):
            if precision in _dtypes() and precision not in flops:
                same = precision == "tf32" and device.type != "cuda"
                flops[precision] = max(flops["fp32"], 0.0 if same else _flops(device, precision, effort, clock))
        bandwidths = _bandwidths(device, effort, clock)
        pcie_bps = _pcie_bps(device, effort, clock) if device.type == "cuda" else None
    except RuntimeError as error:  # torch's only word for a device that is full or broken
        raise Unusable(f"the limit of {device} cannot be measured: {first_line(error)}; free its memory, or use another device") from None
    return Limit(str(device), flops, list(bandwidths.values())[-1], pcie_bps, {str(size): bps for size, bps in bandwidths.items()})


def floors(
    layers: Sequence[Layer], input_shape: tuple[int, int, int], classes: int, batch_size: int, scope: str, precision: str, limit: Limit
) -> dict[str, float]:
    """The least seconds that one launch can take on a device, by what limits it.

    `compute` = 2 x MACs x batch / flops of the precision; left out where the limit has no such precision.
    `memory` = `launch_bytes` / `bandwidth_bps` at that many bytes.
    `pcie` = (uint8 images + float32 scores) x batch / pcie_bps, for `e2e` where the limit has one: the way back is assumed to be as fast
    as the way there, and not to begin before it ends, as one launch cannot.

    Args:
        layers: the model's layer table.
        input_shape: (C, H, W) of the model's input, and of a uint8 image.
        scope: `device` or `e2e`.
    """
    size = launch_bytes(layers, input_shape, classes, batch_size, scope, precision)
    found = {"memory": size / bandwidth_bps(limit, size)}
    if precision in limit.flops:
        found = {"compute": 2 * batch_size * sum(layer.macs for layer in layers) / limit.flops[precision], **found}
    if scope == "e2e" and limit.pcie_bps is not None:
        found["pcie"] = batch_size * (math.prod(input_shape) * PIXEL_BYTES + classes * FLOAT32_BYTES) / limit.pcie_bps
    return found


def launch_bytes(
    layers: Sequence[Layer], input_shape: tuple[int, int, int], classes: int, batch_size: int, scope: str, precision: str
) -> int:
    """The fewest bytes that one launch moves to and from the device's memory.

    The float32 input read, the scores written, every weight read once per launch; what lies between layers may stay in registers. `e2e`
    adds that the uint8 images are read and the float32 input is written: preprocessing is a step of its own on the same device.
    """
    pixels = math.prod(input_shape)
    image = pixels * FLOAT32_BYTES + classes * FLOAT32_BYTES
    if scope == "e2e":
        image += pixels * PIXEL_BYTES + pixels * FLOAT32_BYTES
    return batch_size * image + WEIGHT_BYTES[precision] * sum(layer.parameters + layer.fixed_parameters for layer in layers)


def bandwidth_bps(limit: Limit, size_bytes: int) -> float:
    """Bytes per second that a launch touching `size_bytes` may reach, in favour of the device.

    The best of all measured working sets from the last that is not larger: a launch between two may be as fast as the smaller, and a
    small set that starting a copy slowed down is not slower than a larger one.
    """
    rates = sorted((int(size), bps) for size, bps in limit.bandwidths_bps.items())
    start = max((size for size, _ in rates if size <= size_bytes), default=0)
    return max((bps for size, bps in rates if size >= start), default=limit.memory_bps)


def best_rate(work: Callable[[], object], amount: float, clock: Clock, budget_s: float) -> float:
    """`amount` per second of the fastest of MIN_REPETITIONS or more runs of `work`, after one that does not count."""
    work()
    fastest, repetitions, end = math.inf, 0, clock() + budget_s
    while True:
        before = clock()
        work()
        after = clock()
        fastest, repetitions = min(fastest, after - before), repetitions + 1
        if repetitions >= MIN_REPETITIONS and after >= end:
            return amount / fastest


def working_sets(smallest: int, cache_bytes: int | None) -> tuple[int, ...]:
    """Bytes of the working sets to measure, STEP times as many each, and last what no cache of `cache_bytes` holds."""
    last = min(max(CACHES * (cache_bytes or 0), SMALLEST_MEMORY), LARGEST_MEMORY)
    sizes = itertools.takewhile(lambda size: size < last, (smallest * STEP**n for n in itertools.count()))
    return (*sizes, last)


def _dtypes() -> Mapping[str, torch.dtype]:
    import torch

    return {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def _best(device: torch.device, work: Callable[[], object], amount: float, clock: Clock, budget_s: float) -> float:
    """`best_rate` on the device; on the CPU with as many threads as torch has and with one."""
    import torch

    from lenet_deploy.devices import synchronise

    def complete() -> None:
        work()
        synchronise(device)

    rate = best_rate(complete, amount, clock, budget_s)
    if device.type == "cpu" and torch.get_num_threads() > 1:
        with _one_thread():
            rate = max(rate, best_rate(complete, amount, clock, budget_s))
    return rate


def _flops(device: torch.device, precision: str, effort: Effort, clock: Clock) -> float:
    """Floating-point operations per second of the best matrix product, 2 x side^3 each; 0 where torch does not multiply so."""
    import torch

    from lenet_deploy.devices import computing_on

    best = 0.0
    with computing_on(device, allow_tf32=precision == "tf32"):
        for side in effort.sides:
            try:
                left, right, out = (torch.ones(side, side, dtype=_dtypes()[precision], device=device) for _ in range(3))

                def multiply(left: torch.Tensor = left, right: torch.Tensor = right, out: torch.Tensor = out) -> None:
                    for _ in range(effort.burst_products):
                        torch.mm(left, right, out=out)

                amount = 2.0 * side**3 * effort.burst_products
                rate = _best(device, multiply, amount, clock, effort.product_s)
            except RuntimeError:  # no memory for this side, or no product of this type
                if precision == "fp32" and not best:
                    raise
                break
            best = max(best, rate)
            if amount / rate >= effort.enough_s:
                break
    return best


def _bandwidths(device: torch.device, effort: Effort, clock: Clock) -> dict[int, float]:
    """Bytes per second by working set: the better of copying one half of it into the other, and of reading it all.

    A copy counts what it reads and what it writes. Reading alone is the better one where a write first reads what it overwrites.
    """
    import torch

    from lenet_deploy.devices import computing_on

    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else last_level_cache_bytes()
    sizes = working_sets(effort.smallest_set, cache)
    found = {}
    with computing_on(device):
        memory = torch.ones(sizes[-1] // FLOAT32_BYTES, device=device)
        for size in sizes:
            used = memory[: size // FLOAT32_BYTES]
            source, target = used.chunk(2)
            times = max(1, min(effort.burst_bytes // size, MOST_COPIES))

            def copy(source: torch.Tensor = source, target: torch.Tensor = target, times: int = times) -> None:
                for _ in range(times):
                    target.copy_(source)

            def read(used: torch.Tensor = used, times: int = times) -> None:
                for _ in range(times):
                    used.sum()

            found[size] = max(_best(device, work, float(size * times), clock, effort.copy_s) for work in (copy, read))
    return found


def _pcie_bps(device: torch.device, effort: Effort, clock: Clock) -> float:
    """Bytes per second from pinned host memory to the device."""
    import torch

    from lenet_deploy.devices import computing_on

    host = torch.ones(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    with computing_on(device):
        target = torch.empty(PINNED_BYTES, dtype=torch.uint8, device=device)
        return _best(device, lambda: target.copy_(host, non_blocking=True), float(PINNED_BYTES), clock, effort.copy_s)

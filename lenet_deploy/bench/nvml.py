"""What an NVIDIA GPU says about itself through NVML (nvidia-ml-py): clocks, heat, power, and who else uses it.

Everything here is a function of a `Device`, which answers questions or has no answer; a field without an answer is left out. Nothing
raises: without the package, without a driver, on a MIG instance or an old GPU there is less to say, and that is all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

# nvbench, measure_cold.cu: a sample is thrown away where the clock was below this share of the default one.
THROTTLED = 0.75
# An idle GPU answers 0; a desktop drawn by it answers a few per cent.
BUSY_BEFORE_PERCENT = 5

_SM, _MEMORY, _CORE_TEMPERATURE = 1, 2, 0  # NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU of nvml.h

# Bits of NvmlClocksEventReasons (nvml.h), in words.
REASONS: Mapping[int, str] = {
    0x001: "idle",
    0x002: "application clock setting",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clock setting",
}
_SETTINGS = frozenset({"application clock setting", "display clock setting"})  # what somebody asked for: no accident


class Device(Protocol):
    """One GPU that can be asked."""

    def ask(self, function: str, *arguments: int) -> Any:
        """What `nvmlDeviceGet<function>` answers; None where this GPU, driver or user gets no answer."""


@dataclass(frozen=True)
class Clock:
    """The clock of the multiprocessors at one moment; None is unknown.

    Attributes:
        mhz: now.
        most_mhz: the highest there is.
        reasons: why it is not higher, in words.
    """

    mhz: int | None
    most_mhz: int | None
    reasons: tuple[str, ...] | None


class NvmlDevice:
    """A GPU asked through the real library."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle

    def ask(self, function: str, *arguments: int) -> Any:
        call = getattr(self._library, f"nvmlDeviceGet{function}", None)  # older packages know fewer functions
        if call is None:
            return None
        try:
            return call(self._handle, *arguments)
        except self._library.NVMLError:
            return None


@contextlib.contextmanager
def opened(devices: Iterable[torch.device]) -> Iterator[Device | None]:
    """The GPU behind the first CUDA device, whatever CUDA_VISIBLE_DEVICES renumbers; None without one, or where NVML does not work."""
    import torch

    device = next((device for device in devices if device.type == "cuda"), None)
    if device is None or not torch.cuda.is_available():
        yield None
        return
    with opened_by_uuid(str(torch.cuda.get_device_properties(device).uuid)) as found:
        yield found


@contextlib.contextmanager
def opened_by_uuid(uuid: str) -> Iterator[Device | None]:
    """The GPU of that UUID (without its prefix); for a MIG instance the GPU that it is part of. None where NVML does not work."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, or one that does not fit its library
        yield None
        return
    try:
        yield _find(pynvml, uuid)
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _find(library: Any, uuid: str) -> NvmlDevice | None:
    with contextlib.suppress(library.NVMLError):
        return NvmlDevice(library, library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    with contextlib.suppress(library.NVMLError):
        instance = library.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
        return NvmlDevice(library, library.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance))
    return None


def reason_words(bits: int) -> list[str]:
    """A mask of NvmlClocksEventReasons in words; a bit that is not known here by its number."""
    known = [word for bit, word in REASONS.items() if bits & bit]
    return known + [f"reason {1 << place:#x}" for place in range(bits.bit_length()) if bits >> place & 1 and 1 << place not in REASONS]


def read_device(device: Device) -> dict[str, Any]:
    """What the GPU says now; fields without an answer are left out.

    `processes` are process numbers as the driver counts them, this process's among them. `power_w`, `utilisation_percent` and
    `processes` of a MIG instance would be those of the whole GPU, so they are left out.
    """
    mig = _is_mig(device)
    reasons = _reasons(device)
    persistence = device.ask("PersistenceMode")
    name = device.ask("Name")
    found = {
        "name": name.decode(errors="replace") if isinstance(name, bytes) else name,
        "sm_clock_mhz": device.ask("ClockInfo", _SM),
        "max_sm_clock_mhz": device.ask("MaxClockInfo", _SM),
        "default_sm_clock_mhz": device.ask("DefaultApplicationsClock", _SM),
        "application_sm_clock_mhz": device.ask("ApplicationsClock", _SM),
        "memory_clock_mhz": device.ask("ClockInfo", _MEMORY),
        "temperature_c": device.ask("Temperature", _CORE_TEMPERATURE),
        "throttle_reasons": reasons,
        "power_w": None if mig else _thousandth(device.ask("PowerUsage")),
        "power_limit_w": _thousandth(device.ask("EnforcedPowerLimit")),
        "persistence": None if persistence is None else bool(persistence),
        "utilisation_percent": None if mig else getattr(device.ask("UtilizationRates"), "gpu", None),
        "processes": None if mig else _processes(device),
        "mig": mig or None,
    }
    return {key: value for key, value in found.items() if value is not None}


def read_clock(device: Device) -> Clock:
    """The SM clock now, and why it is what it is: two or three questions of a few microseconds each."""
    reasons = _reasons(device)
    return Clock(device.ask("ClockInfo", _SM), device.ask("MaxClockInfo", _SM), None if reasons is None else tuple(reasons))


def throttled(clock: Clock) -> str | None:
    """Why the SM clock was too low for a measurement to count, in words; None where it was not, or nothing is known.

    Too low is below THROTTLED of the highest clock, which is what nvbench calls the default one (CUDA's clock rate); NVML's own default,
    that of applications, is a third of it on some GPUs. A clock that somebody set (`nvidia-smi -lgc` or `-ac`) is no throttling: the GPU
    then gives no reason, or a setting. To be read while the GPU is still warm from the launches: an idle one lowers its clock.
    """
    if not clock.mhz or not clock.most_mhz or clock.mhz >= THROTTLED * clock.most_mhz:
        return None
    if clock.reasons is not None and set(clock.reasons) <= _SETTINGS:
        return None
    why = ", ".join(word for word in clock.reasons or () if word not in _SETTINGS) or "the GPU does not say why"
    return f"SM clock {clock.mhz} MHz is below {THROTTLED:.0%} of {clock.most_mhz}: {why}"


def device_state(before: Mapping[str, Any], after: Mapping[str, Any], clocks: Sequence[Clock], own: int) -> dict[str, Any]:
    """Two readings as one record: `after`, with how busy the GPU was `before`, and what became of its clock meanwhile.

    Args:
        clocks: readings in between, right behind launches.
        own: number of this process.
    """
    state = {key: value for key, value in after.items() if key not in ("utilisation_percent", "processes", "throttle_reasons")}
    if known := [clock.mhz for clock in clocks if clock.mhz]:
        state["lowest_sm_clock_mhz"] = min(known)
    reasons = [*(clock.reasons for clock in clocks), before.get("throttle_reasons"), after.get("throttle_reasons")]
    if any(words is not None for words in reasons):
        words = dict.fromkeys(word for words in reasons for word in words or ())
        state["throttle_reasons"] = [word for word in words if word != "idle"]  # it is idle before and after, whatever it does
    if "utilisation_percent" in before:
        state["utilisation_before_percent"] = before["utilisation_percent"]
    if "processes" in after:
        state["other_processes"] = _others(before.get("processes", ()), after["processes"], own)
    return state


def device_remarks(state: Mapping[str, Any]) -> tuple[str, ...]:
    """What makes the GPU a noisy one, in words."""
    found = []
    if others := state.get("other_processes"):
        found.append(f"the GPU is shared with other processes: {', '.join(others)}")
    if state.get("utilisation_before_percent", 0) > BUSY_BEFORE_PERCENT:
        found.append(f"the GPU was {state['utilisation_before_percent']} % busy before the start")
    if reasons := [word for word in state.get("throttle_reasons", ()) if word not in _SETTINGS]:
        found.append(f"the GPU lowered its clock: {', '.join(reasons)}")
    lowest, most = state.get("lowest_sm_clock_mhz"), state.get("max_sm_clock_mhz")
    if lowest and most and lowest < THROTTLED * most:
        found.append(f"the SM clock went down to {lowest} MHz, of {most} MHz")
    if state.get("mig"):
        found.append("the GPU is partitioned (MIG): its clock depends on the other instances, too")
    return tuple(found)


def energy_j(device: Device) -> float | None:
    """Joules that the GPU has drawn since its driver was loaded; None where it does not count them, and for a MIG instance."""
    return None if _is_mig(device) else _thousandth(device.ask("TotalEnergyConsumption"))


def memory_used_bytes(device: Device | None) -> int | None:
    """Bytes of the whole GPU's memory in use; None without an answer."""
    used = getattr(device.ask("MemoryInfo"), "used", None) if device else None
    return None if used is None else int(used)


def _is_mig(device: Device) -> bool:
    mode = device.ask("MigMode")  # [current, pending]
    return bool(mode and mode[0])


def _reasons(device: Device) -> list[str] | None:
    bits = device.ask("CurrentClocksEventReasons")
    if bits is None:  # its name before driver 535
        bits = device.ask("CurrentClocksThrottleReasons")
    return None if bits is None else reason_words(bits)


def _processes(device: Device) -> list[int] | None:
    answers = [device.ask(f"{kind}RunningProcesses") for kind in ("Compute", "Graphics", "MPSCompute")]
    known = [answer for answer in answers if answer is not None]
    return sorted({process.pid for answer in known for process in answer}) if known else None


def _others(before: Iterable[int], after: Iterable[int], own: int) -> list[str]:
    """The processes other than this one, with their names where the numbers are those of this PID namespace."""
    running, earlier = list(after), set(before)
    if own in running:
        return [f"{pid} {name}".strip() for pid in running if pid != own for name in (_process_name(pid),)]
    # A container: the driver counts in another namespace. One of the numbers is this process, which has used the GPU by now: most likely
    # one that is new since the start.
    mine = next((pid for pid in running if pid not in earlier), next(iter(running), None))
    return [str(pid) for pid in running if pid != mine]


def _process_name(pid: int, root: Path = Path("/proc")) -> str:
    try:
        return (root / str(pid) / "comm").read_text().strip()
    except (OSError, ValueError):
        return ""


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1000

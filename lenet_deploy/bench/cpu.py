"""What the CPU was doing between two moments, from /proc and /sys.

Text is parsed by pure functions; a file that is absent, unreadable or of another shape gives None, never an error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lenet_deploy.order_statistics import median

# Stolen time: as wide as the +-0.5 % within which a median's interval is to lie, so more of it could be the whole of a difference.
STEAL = 0.01
# Others' share of the cores: an idle Linux spends 1 to 2 % of them on its own daemons.
OTHERS = 0.05
# Shares are counted in ticks of 10 ms; with fewer than this a single one would be more than 1 %.
MIN_TICKS = 100


@dataclass(frozen=True)
class Ticks:
    """Time of some CPUs since boot, in ticks: doing something, taken by the hypervisor for other guests, and in all."""

    busy: int
    stolen: int
    total: int


@dataclass(frozen=True)
class CpuReading:
    """The CPU at one moment; None is unknown.

    Attributes:
        affinity: CPUs that this process may use.
        own_s: CPU seconds of this process, all threads.
        ticks: of the CPUs of `affinity`.
        load1: load average of the last minute, this process included.
        runnable: threads that run or want to, the reading one included.
        governor: frequency governors of `affinity`, without repetition.
        frequency_mhz: median over `affinity`.
        quota_cpus: the least CPUs' worth of time that a control group allows; None for no quota.
        throttled_periods: how often such a quota stopped this process's group, since it exists.
        cores: physical cores of `affinity`.
        smt: whether any of them has more than one CPU online.
    """

    affinity: tuple[int, ...]
    own_s: float
    ticks: Ticks | None
    load1: float | None
    runnable: int | None
    governor: str | None
    frequency_mhz: float | None
    quota_cpus: float | None
    throttled_periods: int | None
    cores: int | None
    smt: bool | None


def read_cpu(root: Path = Path("/")) -> CpuReading:
    """The CPU now."""
    affinity = tuple(sorted(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)))
    load = parse_load(_text(root / "proc/loadavg"))
    folders = [root / "sys/fs/cgroup" / folder for folder in parse_groups(_text(root / "proc/self/cgroup"))]
    cpus = [root / f"sys/devices/system/cpu/cpu{cpu}" for cpu in affinity]
    governors = dict.fromkeys(filter(None, (_text(cpu / "cpufreq/scaling_governor").strip() for cpu in cpus)))
    siblings = [group for cpu in cpus if (group := parse_cpus(_text(cpu / "topology/thread_siblings_list")))]
    quotas = [quota for folder in folders if (quota := _quota(folder)) is not None]
    counts = [count for folder in folders if (count := parse_throttled(_text(folder / "cpu.stat"))) is not None]
    return CpuReading(
        affinity=affinity,
        own_s=time.process_time(),
        ticks=parse_ticks(_text(root / "proc/stat"), affinity),
        load1=load[0] if load else None,
        runnable=load[1] if load else None,
        governor=", ".join(governors) or None,
        frequency_mhz=_frequency_mhz(root, cpus),
        quota_cpus=min(quotas, default=None),
        throttled_periods=sum(counts) if counts else None,
        cores=len(set(siblings)) if len(siblings) == len(cpus) else None,
        smt=any(len(group) > 1 for group in siblings) if siblings else None,
    )


def cpu_state(before: CpuReading, after: CpuReading, threads: int) -> dict[str, Any]:
    """Two readings as one record of JSON values; what is not known is None.

    `load1` and `runnable` are from the start. `steal_share` and `others_share` are shares, 0 to 1, of the time of the CPUs in `affinity`:
    what the hypervisor gave to other guests, and what processes other than this one used.
    """
    steal = others = None
    if before.ticks and after.ticks and (total := after.ticks.total - before.ticks.total) >= MIN_TICKS:
        own = (after.own_s - before.own_s) * _ticks_per_second()
        steal = min(1.0, max(0.0, (after.ticks.stolen - before.ticks.stolen) / total))
        others = min(1.0, max(0.0, (after.ticks.busy - before.ticks.busy - own) / total))
    throttled = None
    if before.throttled_periods is not None and after.throttled_periods is not None:
        throttled = max(0, after.throttled_periods - before.throttled_periods)
    return {
        "affinity": list(after.affinity),
        "threads": threads,
        "cores": after.cores,
        "smt": after.smt,
        "governor": after.governor,
        "frequency_mhz": after.frequency_mhz,
        "load1": before.load1,
        "runnable": before.runnable,
        "others_share": others,
        "steal_share": steal,
        "quota_cpus": after.quota_cpus,
        "throttled_periods": throttled,
    }


def cpu_remarks(state: Mapping[str, Any]) -> tuple[str, ...]:
    """What of a `cpu_state` makes measurements noisy, in words.

    The load average is no remark: it counts this process too, and the worker before it.
    """
    found = []
    cpus, threads, cores, quota = len(state["affinity"]), state["threads"], state["cores"], state["quota_cpus"]
    if state["others_share"] is not None and state["others_share"] > OTHERS:
        found.append(f"other processes used {state['others_share']:.0%} of the {cpus} CPUs meanwhile")
    if state["steal_share"] is not None and state["steal_share"] > STEAL:
        found.append(f"the hypervisor took {state['steal_share']:.1%} of the CPU time for other guests")
    if state["throttled_periods"]:
        found.append(f"a CPU quota stopped this process's group in {state['throttled_periods']} periods")
    if state["governor"] is not None and state["governor"] != "performance":
        found.append(f"the frequency governor is {state['governor']}, not performance")
    if threads > cpus:
        found.append(f"{threads} threads share {cpus} CPUs")
    elif quota is not None and threads > quota:
        found.append(f"{threads} threads share a quota of {quota:g} CPUs")
    elif cores is not None and threads > cores:
        found.append(f"{threads} threads share {cores} cores (SMT)")
    elif state["smt"]:
        found.append("SMT is on: whatever runs on the other half of a core slows it")
    return tuple(found)


def parse_ticks(text: str, cpus: Iterable[int]) -> Ticks | None:
    """The ticks of `cpus` in /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal (proc(5)); guests are part of user."""
    wanted = {f"cpu{cpu}" for cpu in cpus}
    rows = [line.split() for line in text.splitlines() if line.startswith("cpu")]
    counts = [[int(word) for word in row[1:9]] for row in rows if row[0] in wanted and all(word.isdecimal() for word in row[1:9])]
    counts = [row + [0] * (8 - len(row)) for row in counts if len(row) >= 4]  # kernels before 2.6.11 have fewer
    if not counts:
        return None
    total, idle, stolen = sum(map(sum, counts)), sum(row[3] + row[4] for row in counts), sum(row[7] for row in counts)
    return Ticks(total - idle - stolen, stolen, total)


def parse_load(text: str) -> tuple[float, int] | None:
    """Load average of one minute and runnable threads in /proc/loadavg, e.g. `2.32 2.06 1.36 6/96 4623`."""
    words = text.split()
    try:
        return float(words[0]), int(words[3].partition("/")[0])
    except (IndexError, ValueError):
        return None


def parse_cpus(text: str) -> tuple[int, ...]:
    """The CPUs in a kernel list, e.g. `0-2,8`; empty for anything else."""
    found: list[int] = []
    try:
        for part in text.strip().split(","):
            first, _, last = part.partition("-")
            found.extend(range(int(first), int(last or first) + 1))
    except ValueError:
        return ()
    return tuple(found)


def parse_groups(text: str) -> tuple[str, ...]:
    """Where this process's CPU control groups may be, relative to /sys/fs/cgroup, from the innermost out, by /proc/self/cgroup.

    `0::/a/b` is version 2; `4:cpu,cpuacct:/a/b` is version 1. A quota of an outer group holds for the inner ones as well. Inside a
    container the path may be one of the host's that does not exist here, and the mount point itself is then the container's group.
    """
    found: dict[str, None] = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path.startswith("/") or ".." in PurePosixPath(path).parts:  # `..`: outside of the namespace
            continue
        inner = PurePosixPath(path.lstrip("/"))
        mounts = [""] if (number, controllers) == ("0", "") else ["cpu"] if "cpu" in controllers.split(",") else []
        for mount in mounts:
            found.update(dict.fromkeys(str(mount / folder) for folder in (inner, *inner.parents)))
    return tuple(found)


def parse_quota(text: str) -> float | None:
    """CPUs' worth of time in `cpu.max` of version 2, e.g. `150000 100000` is 1.5; None for `max`."""
    try:
        quota, period = (int(word) for word in text.split())
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


def parse_throttled(text: str) -> int | None:
    """Periods in which a quota stopped the group, in `cpu.stat` of either version."""
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == "nr_throttled" and value.strip().isdecimal():
            return int(value)
    return None


def parse_size(text: str) -> int | None:
    """Bytes in a cache's `size`, e.g. `32768K`."""
    number, unit = text.strip()[:-1], text.strip()[-1:]
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(unit)
    return int(number) * scale if scale and number.isdecimal() else None


def last_level_cache_bytes(root: Path = Path("/")) -> int | None:
    """Size of CPU 0's largest cache; None where the kernel does not say."""
    folder = root / "sys/devices/system/cpu/cpu0/cache"
    return max((size for path in sorted(folder.glob("index*/size")) if (size := parse_size(_text(path)))), default=None)


def _quota(folder: Path) -> float | None:
    """Of version 2, or 1, where a quota of -1 is none."""
    old = f"{_text(folder / 'cpu.cfs_quota_us').strip()} {_text(folder / 'cpu.cfs_period_us').strip()}"
    return parse_quota(_text(folder / "cpu.max")) or parse_quota(old)


def _frequency_mhz(root: Path, cpus: Iterable[Path]) -> float | None:
    """From cpufreq, in kHz there; where a guest has none, from /proc/cpuinfo."""
    known = [int(text) / 1000 for cpu in cpus if (text := _text(cpu / "cpufreq/scaling_cur_freq").strip()).isdecimal()]
    if not known:
        lines = [line.partition(":")[2].strip() for line in _text(root / "proc/cpuinfo").splitlines() if line.startswith("cpu MHz")]
        known = [float(text) for text in lines if text.replace(".", "", 1).isdecimal()]
    return median(known) if known else None


def _ticks_per_second() -> int:
    return os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def _text(path: Path) -> str:
    """The file's text; empty where there is none to read."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""

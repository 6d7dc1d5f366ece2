"""What the machine says about itself: parsed from real samples and odd ones, and nothing it does not say is an error.

No GPU is needed: NVML's answers come from a device, or a library, of our own. What a real one says is for the `gpu` tests.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lenet_deploy.bench import cpu, nvml
from lenet_deploy.bench.machine import Watch

# A virtual machine with two CPUs, kernel 6.x.
STAT = """cpu  1804132 52799 179472 4706206 7342 0 1622 2375 0 0
cpu0 799025 33266 72512 2468484 1975 0 189 1167 0 0
cpu1 1005106 19533 106960 2237721 5366 0 1432 1208 0 0
intr 8439379 0 0 1 17
ctxt 10726285
btime 1795559270
procs_running 6
"""


def test_ticks_are_those_of_the_cpus_asked_for() -> None:
    only = cpu.parse_ticks(STAT, [1])
    assert only == cpu.Ticks(busy=1005106 + 19533 + 106960 + 0 + 1432, stolen=1208, total=3377326)
    both = cpu.parse_ticks(STAT, [0, 1])
    assert both
    assert only
    assert (both.stolen, both.total - only.total) == (1167 + 1208, 799025 + 33266 + 72512 + 2468484 + 1975 + 189 + 1167)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cpu0 10 1 2 100\n", cpu.Ticks(13, 0, 113)),  # before iowait, interrupts and steal were counted
        ("cpu0 10 1 2 100 5 3 4\n", cpu.Ticks(20, 0, 125)),
        ("cpu0 10 1 2 100 5 3 4 7 6 6\n", cpu.Ticks(20, 7, 132)),  # guests are part of user: not counted twice
        ("cpu0 0 0 0 0 0 0 0 0 0 0\n", cpu.Ticks(0, 0, 0)),  # sandboxes without a real /proc
        ("cpu0 1 2\n", None),
        ("cpu0 1 2 x 4\n", None),
        ("cpu 1 2 3 4\ncpu7 1 2 3 4\n", None),
        ("", None),
    ],
)
def test_odd_ticks(text: str, found: cpu.Ticks | None) -> None:
    assert cpu.parse_ticks(text, [0]) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [("2.32 2.06 1.36 6/96 4623\n", (2.32, 6)), ("0.00 0.01 0.05 1/1234 99", (0.0, 1)), ("2.32 2.06", None), ("", None), ("a b c d", None)],
)
def test_load(text: str, found: tuple[float, int] | None) -> None:
    assert cpu.parse_load(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [("0\n", (0,)), ("0,32\n", (0, 32)), ("0-1\n", (0, 1)), ("0-2,8,10-11\n", (0, 1, 2, 8, 10, 11)), ("", ()), ("0-", (0,)), ("x", ())],
)
def test_cpu_lists(text: str, found: tuple[int, ...]) -> None:
    assert cpu.parse_cpus(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0::/\n", (".",)),
        ("0::/user.slice/user-1000.slice\n", ("user.slice/user-1000.slice", "user.slice", ".")),
        ("4:cpu,cpuacct:/docker/1f2e\n0::/system.slice\n", ("cpu/docker/1f2e", "cpu/docker", "cpu", "system.slice", ".")),
        ("2:cpuacct:/\n1:cpu:/\n", ("cpu",)),
        ("3:cpuset:/a\n1:name=systemd:/b\n", ()),
        ("0::/../other\n", ()),  # outside of the container's namespace
        ("nonsense\n", ()),
        ("", ()),
    ],
)
def test_control_groups_from_the_innermost_out(text: str, found: tuple[str, ...]) -> None:
    assert cpu.parse_groups(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [("150000 100000\n", 1.5), ("max 100000\n", None), ("-1 100000", None), ("50000 0", None), ("", None), ("1 2 3", None)],
)
def test_quotas(text: str, found: float | None) -> None:
    assert cpu.parse_quota(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("usage_usec 11\nuser_usec 8\nnr_periods 40\nnr_throttled 7\nthrottled_usec 3100\n", 7),  # version 2
        ("nr_periods 0\nnr_throttled 0\nthrottled_time 0\n", 0),  # version 1
        ("usage_usec 11\n", None),
        ("nr_throttled x\n", None),
        ("", None),
    ],
)
def test_throttled_periods(text: str, found: int | None) -> None:
    assert cpu.parse_throttled(text) == found


@pytest.mark.parametrize(("text", "found"), [("32768K\n", 32 << 20), ("2M", 2 << 20), ("512", None), ("", None), ("K", None)])
def test_cache_sizes(text: str, found: int | None) -> None:
    assert cpu.parse_size(text) == found


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bare machine as its files show it: two cores with two CPUs each, of which this process may use three, under a quota."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    files = {
        "proc/stat": "".join(f"cpu{n} 100 0 0 900 0 0 0 0 0 0\n" for n in range(4)),
        "proc/loadavg": "0.50 0.40 0.30 2/800 1234\n",
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
        "sys/fs/cgroup/job/step/cpu.stat": "usage_usec 5\nnr_throttled 0\n",
        "sys/fs/cgroup/job/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/job/cpu.stat": "usage_usec 9\nnr_throttled 3\n",
        "sys/devices/system/cpu/cpu0/cache/index0/size": "32K\n",
        "sys/devices/system/cpu/cpu0/cache/index3/size": "16384K\n",
    }
    for n in range(4):
        folder = f"sys/devices/system/cpu/cpu{n}"
        files[f"{folder}/topology/thread_siblings_list"] = f"{n % 2},{n % 2 + 2}\n"
        files[f"{folder}/cpufreq/scaling_governor"] = "powersave\n"
        files[f"{folder}/cpufreq/scaling_cur_freq"] = f"{2_000_000 + n * 100_000}\n"
    return write(tmp_path, files)


def test_a_reading_is_of_the_cpus_that_this_process_may_use(host: Path) -> None:
    found = cpu.read_cpu(host)
    assert found == cpu.CpuReading(
        affinity=(0, 1, 2),
        own_s=found.own_s,
        ticks=cpu.Ticks(300, 0, 3000),
        load1=0.5,
        runnable=2,
        governor="powersave",
        frequency_mhz=2100.0,
        quota_cpus=1.5,  # of the outer group: it holds for the inner one, too
        throttled_periods=3,
        cores=2,
        smt=True,
    )
    assert cpu.last_level_cache_bytes(host) == 16 << 20


def test_a_container_of_version_1_has_its_quota_where_its_groups_are_mounted(host: Path) -> None:
    write(host, {"proc/self/cgroup": "5:cpu,cpuacct:/docker/of-the-host\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n"})
    write(host, {"sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n", "sys/fs/cgroup/cpu/cpu.stat": "nr_periods 9\nnr_throttled 4\n"})
    found = cpu.read_cpu(host)
    assert (found.quota_cpus, found.throttled_periods) == (2.0, 4)
    write(host, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"})
    assert cpu.read_cpu(host).quota_cpus is None


def test_a_guest_without_cpufreq_has_the_frequency_of_cpuinfo_and_no_governor(host: Path) -> None:
    for path in [*host.rglob("scaling_cur_freq"), *host.rglob("scaling_governor")]:
        path.unlink()
    write(host, {"proc/cpuinfo": "model name\t: X\ncpu MHz\t\t: 2596.134\n\nmodel name\t: X\ncpu MHz\t\t: 2596.134\n"})
    found = cpu.read_cpu(host)
    assert (found.governor, found.frequency_mhz) == (None, 2596.134)


def test_different_governors_are_all_named(host: Path) -> None:
    write(host, {"sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "performance\n"})
    assert cpu.read_cpu(host).governor == "powersave, performance"


def test_a_machine_that_says_nothing_has_unknown_values_and_no_remarks(tmp_path: Path) -> None:
    watch = Watch(threads=1, root=tmp_path)
    state = watch.state(0)
    assert {key for key, value in state.cpu.items() if value is not None} == {"affinity", "threads"}
    assert (state.gpu, state.remarks, cpu.last_level_cache_bytes(tmp_path)) == ({}, (), None)


def test_files_that_are_no_text_say_nothing(host: Path) -> None:
    (host / "proc/stat").write_bytes(b"cpu0 \xff\xfe")
    (host / "proc/loadavg").unlink()
    (host / "proc/loadavg").mkdir()
    found = cpu.read_cpu(host)
    assert (found.ticks, found.load1) == (None, None)


QUIET = cpu.CpuReading((0, 1), 0.0, cpu.Ticks(0, 0, 0), 0.1, 1, "performance", 3000.0, None, 0, 2, False)


def later(**changes: Any) -> cpu.CpuReading:
    """The quiet machine after ten seconds of two CPUs, one of them used by this process."""
    second = cpu._ticks_per_second()
    usual = {"own_s": 10.0, "ticks": cpu.Ticks(10 * second, 0, 20 * second)}
    return dataclasses.replace(QUIET, **{**usual, **changes})


def ticks(busy: float, stolen: float = 0.0) -> cpu.Ticks:
    """Seconds as ticks, out of twenty."""
    second = cpu._ticks_per_second()
    return cpu.Ticks(round(busy * second), round(stolen * second), 20 * second)


def test_a_quiet_machine_has_no_remarks() -> None:
    state = cpu.cpu_state(QUIET, later(), threads=2)
    assert (state["others_share"], state["steal_share"], state["throttled_periods"]) == (0.0, 0.0, 0)
    assert cpu.cpu_remarks(state) == ()


@pytest.mark.parametrize(
    ("after", "threads", "remark"),
    [
        (later(ticks=ticks(busy=14.0)), 2, "other processes used 20% of the 2 CPUs meanwhile"),
        (later(ticks=ticks(busy=10.0, stolen=0.5)), 2, "the hypervisor took 2.5% of the CPU time for other guests"),
        (later(throttled_periods=4), 2, "a CPU quota stopped this process's group in 4 periods"),
        (later(governor="powersave"), 2, "the frequency governor is powersave, not performance"),
        (later(), 3, "3 threads share 2 CPUs"),
        (later(quota_cpus=1.5), 2, "2 threads share a quota of 1.5 CPUs"),
        (later(cores=1, smt=True), 2, "2 threads share 1 cores (SMT)"),
        (later(smt=True), 2, "SMT is on: whatever runs on the other half of a core slows it"),
    ],
)
def test_each_kind_of_noise_is_said(after: cpu.CpuReading, threads: int, remark: str) -> None:
    assert cpu.cpu_remarks(cpu.cpu_state(QUIET, after, threads)) == (remark,)


@pytest.mark.parametrize(
    "after",
    [
        later(ticks=ticks(busy=10.0 + 20 * cpu.OTHERS)),
        later(ticks=ticks(busy=10.0, stolen=20 * cpu.STEAL)),
        later(governor=None, smt=None, cores=None),
    ],
)
def test_at_the_thresholds_and_where_nothing_is_known_nothing_is_said(after: cpu.CpuReading) -> None:
    assert cpu.cpu_remarks(cpu.cpu_state(QUIET, after, 2)) == ()


def test_shares_are_unknown_of_a_moment_too_short_for_the_ticks() -> None:
    few = dataclasses.replace(QUIET, ticks=cpu.Ticks(cpu.MIN_TICKS - 1, 0, cpu.MIN_TICKS - 1))
    state = cpu.cpu_state(QUIET, few, 1)
    assert (state["others_share"], state["steal_share"]) == (None, None)


def test_counters_that_go_backwards_are_no_negative_shares() -> None:
    before = dataclasses.replace(QUIET, ticks=cpu.Ticks(1000, 50, 0), throttled_periods=9)
    state = cpu.cpu_state(before, later(ticks=ticks(5.0)), 2)
    assert (state["others_share"], state["steal_share"], state["throttled_periods"]) == (0.0, 0.0, 0)


def test_this_machine_is_described_in_json_values() -> None:
    with Watch.over([torch.device("cpu")]) as watch:
        assert (watch.throttled(), watch.energy_j()) == (None, None)
        state = watch.state(3)
    assert (state.process, state.gpu) == (3, {})
    assert state.cpu["affinity"] == list(cpu.read_cpu().affinity)
    assert state.cpu["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(dataclasses.asdict(state)))["cpu"] == state.cpu
    if Path("/proc/loadavg").exists():
        assert state.cpu["load1"] >= 0


class FakeDevice:
    """A GPU that answers from a table; what is not in it is not supported."""

    def __init__(self, answers: dict[Any, Any]) -> None:
        self.answers = answers

    def ask(self, function: str, *arguments: int) -> Any:
        return self.answers.get((function, *arguments) if arguments else function)


def processes(*pids: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in pids]


SM, MEMORY = 1, 2
H100 = {
    "Name": "NVIDIA H100 80GB HBM3",
    ("ClockInfo", SM): 1980,
    ("MaxClockInfo", SM): 1980,
    ("DefaultApplicationsClock", SM): 1980,
    ("ApplicationsClock", SM): 1980,
    ("ClockInfo", MEMORY): 2619,
    ("Temperature", 0): 41,
    "CurrentClocksEventReasons": 0,
    "PowerUsage": 120_500,
    "EnforcedPowerLimit": 700_000,
    "PersistenceMode": 1,
    "UtilizationRates": SimpleNamespace(gpu=0, memory=0),
    "ComputeRunningProcesses": [],
    "GraphicsRunningProcesses": [],
    "TotalEnergyConsumption": 5_000_250,
    "MigMode": [0, 0],
}


def test_a_quiet_gpu_is_described_in_units_and_without_remarks() -> None:
    watch = Watch(1, FakeDevice(H100))
    assert (watch.throttled(), watch.energy_j()) == (None, 5000.25)
    state = watch.state(0)
    assert state.gpu == {
        "name": "NVIDIA H100 80GB HBM3",
        "sm_clock_mhz": 1980,
        "max_sm_clock_mhz": 1980,
        "default_sm_clock_mhz": 1980,
        "application_sm_clock_mhz": 1980,
        "memory_clock_mhz": 2619,
        "temperature_c": 41,
        "power_w": 120.5,
        "power_limit_w": 700.0,
        "persistence": True,
        "lowest_sm_clock_mhz": 1980,
        "throttle_reasons": [],
        "utilisation_before_percent": 0,
        "other_processes": [],
    }
    assert nvml.device_remarks(state.gpu) == ()
    assert json.loads(json.dumps(dataclasses.asdict(state)))["gpu"] == state.gpu


def test_a_gpu_that_answers_nothing_has_no_keys_and_no_remarks() -> None:
    watch = Watch(1, FakeDevice({}))
    assert (watch.throttled(), watch.energy_j()) == (None, None)
    state = watch.state(0)
    assert (state.gpu, nvml.device_remarks(state.gpu)) == ({}, ())


@pytest.mark.parametrize(
    ("clock", "reasons", "flag"),
    [
        (1485, 0x4, None),  # at 75 %
        (1484, 0x4, "SM clock 1484 MHz is below 75% of 1980: software power cap"),
        (600, 0x8 | 0x40, "SM clock 600 MHz is below 75% of 1980: hardware slowdown, hardware thermal slowdown"),
        (345, 0x1, "SM clock 345 MHz is below 75% of 1980: idle"),
        (345, 0x1 | 0x2, "SM clock 345 MHz is below 75% of 1980: idle"),
        (1005, 0x2, None),  # somebody set it
        (1005, 0x0, None),
        (1005, None, "SM clock 1005 MHz is below 75% of 1980: the GPU does not say why"),
        (1005, 0x200, "SM clock 1005 MHz is below 75% of 1980: reason 0x200"),
        (None, 0x4, None),
        (0, 0x4, None),
    ],
)
def test_a_visit_is_flagged_where_the_clock_is_low_and_nobody_set_it(clock: int | None, reasons: int | None, flag: str | None) -> None:
    device = FakeDevice({**H100, ("ClockInfo", SM): clock, "CurrentClocksEventReasons": reasons})
    assert Watch(1, device).throttled() == flag


def test_the_reasons_have_another_name_in_older_drivers() -> None:
    device = FakeDevice({**H100, "CurrentClocksEventReasons": None, "CurrentClocksThrottleReasons": 0x20})
    assert nvml.read_device(device)["throttle_reasons"] == ["software thermal slowdown"]


def test_what_a_gpu_did_between_the_readings_is_in_its_state() -> None:
    device = FakeDevice(dict(H100))
    watch = Watch(1, device)
    device.answers |= {("ClockInfo", SM): 1200, "CurrentClocksEventReasons": 0x4}
    assert watch.throttled() is not None
    device.answers |= {("ClockInfo", SM): 1980, "CurrentClocksEventReasons": 0x1}
    state = watch.state(0)
    assert (state.gpu["sm_clock_mhz"], state.gpu["lowest_sm_clock_mhz"]) == (1980, 1200)
    assert state.gpu["throttle_reasons"] == ["software power cap"]  # and not that it is idle now
    remarks = ("the GPU lowered its clock: software power cap", "the SM clock went down to 1200 MHz, of 1980 MHz")
    assert nvml.device_remarks(state.gpu) == remarks
    assert state.remarks[-2:] == remarks


def test_a_clock_that_somebody_set_is_said_though_nothing_is_flagged() -> None:
    device = FakeDevice({**H100, ("ClockInfo", SM): 1005, "CurrentClocksEventReasons": 0x2})
    watch = Watch(1, device)
    assert watch.throttled() is None
    assert nvml.device_remarks(watch.state(0).gpu) == ("the SM clock went down to 1005 MHz, of 1980 MHz",)


def test_other_processes_on_the_gpu_are_named_and_this_one_is_not() -> None:
    own, parent = os.getpid(), os.getppid()
    device = FakeDevice({**H100, "ComputeRunningProcesses": processes(own, parent), "GraphicsRunningProcesses": processes(parent)})
    found = Watch(1, device).state(0).gpu["other_processes"]
    assert len(found) == 1
    number, _, name = found[0].partition(" ")
    comm = Path(f"/proc/{parent}/comm")
    assert (int(number), name) == (parent, comm.read_text().strip() if comm.exists() else "")
    assert nvml.device_remarks({"other_processes": found}) == (f"the GPU is shared with other processes: {found[0]}",)


@pytest.mark.parametrize(
    ("before", "after", "others"),
    [((), (900001,), []), ((900001,), (900001, 900002), ["900001"]), ((900001, 900002), (900001, 900002), ["900002"]), ((900001,), (), [])],
    ids=["alone", "new since the start", "here since before the start", "gone"],
)
def test_one_process_of_another_numbering_is_this_one(before: tuple[int, ...], after: tuple[int, ...], others: list[str]) -> None:
    device = FakeDevice({**H100, "ComputeRunningProcesses": processes(*before)})
    watch = Watch(1, device)
    device.answers["ComputeRunningProcesses"] = processes(*after)
    assert watch.state(0).gpu["other_processes"] == others


@pytest.mark.parametrize(("percent", "remarks"), [(5, ()), (6, ("the GPU was 6 % busy before the start",))])
def test_a_gpu_that_was_busy_before_the_start_is_said(percent: int, remarks: tuple[str, ...]) -> None:
    device = FakeDevice({**H100, "UtilizationRates": SimpleNamespace(gpu=percent, memory=0)})
    watch = Watch(1, device)
    device.answers["UtilizationRates"] = SimpleNamespace(gpu=100, memory=50)  # by this process
    assert nvml.device_remarks(watch.state(0).gpu) == remarks


def test_a_mig_instance_does_not_claim_what_belongs_to_the_whole_gpu() -> None:
    device = FakeDevice({**H100, "MigMode": [1, 1]})
    watch = Watch(1, device)
    state = watch.state(0)
    assert watch.energy_j() is None
    assert not {"power_w", "utilisation_before_percent", "other_processes"} & state.gpu.keys()
    assert state.gpu["mig"] is True
    assert state.remarks[-1] == "the GPU is partitioned (MIG): its clock depends on the other instances, too"


class FakeError(Exception):
    """What every function of NVML raises."""


def library(known: dict[str, str], answers: dict[str, Any], starts: bool = True) -> SimpleNamespace:
    """NVML with GPUs by UUID. `closed` counts how often it was shut down."""
    found = SimpleNamespace(NVMLError=FakeError, closed=0)

    def start() -> None:
        if not starts:
            raise FakeError("Driver Not Loaded")

    def handle(uuid: str) -> str:
        if uuid not in known:
            raise FakeError("Not Found")
        return known[uuid]

    def parent(instance: str) -> str:
        return f"parent of {instance}"

    def stop() -> None:
        found.closed += 1

    def function(name: str) -> Any:
        def answer(device: str, *arguments: int) -> Any:
            if answers[name] is None:
                raise FakeError("Not Supported")
            return answers[name](device, *arguments)

        return answer

    found.nvmlInit, found.nvmlShutdown = start, stop
    found.nvmlDeviceGetHandleByUUID, found.nvmlDeviceGetDeviceHandleFromMigDeviceHandle = handle, parent
    for name in answers:
        setattr(found, f"nvmlDeviceGet{name}", function(name))
    return found


def test_the_gpu_is_found_by_its_uuid_and_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = library(
        {"GPU-1234": "handle"}, {"Name": lambda device: device.encode(), "ClockInfo": lambda device, kind: 100 + kind, "PowerUsage": None}
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    with nvml.opened_by_uuid("1234") as device:
        assert device is not None
        assert nvml.read_device(device) == {"name": "handle", "sm_clock_mhz": 101, "memory_clock_mhz": 102}  # the rest is not supported
        assert nvml.read_clock(device) == nvml.Clock(101, None, None)
        assert fake.closed == 0
    assert fake.closed == 1


def test_a_mig_instance_is_asked_as_the_gpu_that_it_is_part_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library({"MIG-1234": "instance"}, {"Name": lambda device: device}))
    with nvml.opened_by_uuid("1234") as device:
        assert device is not None
        assert device.ask("Name") == "parent of instance"


@pytest.mark.parametrize(
    "fake",
    [None, library({}, {}, starts=False), library({"GPU-other": "handle"}, {})],
    ids=["no package", "no driver", "no such GPU"],
)
def test_without_nvml_there_is_no_device_and_no_error(fake: SimpleNamespace | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    with nvml.opened_by_uuid("1234") as device:
        assert device is None
    with nvml.opened([torch.device("cpu")]) as device:
        assert device is None


def test_the_real_package_without_a_driver_gives_no_device() -> None:
    pynvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        with nvml.opened_by_uuid("1234") as device:
            assert device is None
    else:
        pynvml.nvmlShutdown()
        pytest.skip("this machine has a driver")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")
def test_a_real_gpu_says_who_it_is_and_counts_its_energy() -> None:
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    device = torch.device("cuda", 0)
    with Watch.over([device]) as watch:
        before = watch.energy_j()
        torch.ones(1 << 20, device=device).sum().item()
        state, after = watch.state(0), watch.energy_j()
    assert state.gpu["name"] == torch.cuda.get_device_name(device)
    assert state.gpu["sm_clock_mhz"] <= state.gpu["max_sm_clock_mhz"]
    assert (before is None and after is None) or (before is not None and after is not None and after >= before)

"""The bench as users call it: real worker processes, real sessions; and what a report derives from raw times."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
import torch

from lenet_deploy import api
from lenet_deploy.bench import coordinator
from lenet_deploy.bench.coordinator import COMMAND, KINDS, Gathered, higher
from lenet_deploy.bench.plan import PROFILES, SCOPES, Plan, find_profile, plan_from_json
from lenet_deploy.bench.results import batch_choices, measurements
from lenet_deploy.bench_records import STOPS, BenchReport, Limit, Measurement, Visit
from lenet_deploy.bundle import Bundle, write_artifact, write_manifest
from lenet_deploy.errors import BadInput, DamagedFile, UnknownName, Unusable
from lenet_deploy.order_statistics import MIN_SAMPLES
from lenet_deploy.sources import artifact_of
from lenet_deploy.variants import VARIANTS

EAGER, ORT = "eager/torch-cpu/fp32", "onnx/ort-cpu/fp32"


@pytest.fixture(scope="module")
def report(bundle: Bundle) -> BenchReport:
    """One real, short benchmark of every core variant, in two processes, with a cold start of each."""
    return api.benchmark(bundle, batch_sizes=(1, 2, 2), rounds=1, processes=2, cold_start=True)


def test_the_benchmark_measures_every_usable_core_variant_in_every_workload(report: BenchReport) -> None:
    usable = [v for v in VARIANTS if v.core and v.runtime.load().probe(v.device).usable]
    assert [(m.variant, m.batch_size, m.scope) for m in report.measurements] == [
        (variant.name, size, scope) for variant in usable for size in (1, 2) for scope in SCOPES
    ]
    assert [skipped.name for skipped in report.skipped] == [v.name for v in VARIANTS if v.core and v not in usable]
    assert all(skipped.reason for skipped in report.skipped)
    assert report.partial is None


def test_every_measurement_is_positive_and_consistent(report: BenchReport, bundle: Bundle) -> None:
    for m in report.measurements:
        artifact = bundle.artifact(next(v.artifact.name for v in VARIANTS if v.name == m.variant))
        assert artifact is not None
        assert (m.size_bytes, m.accuracy) == (artifact.size_bytes, artifact.accuracy[m.variant])
        assert min(m.times_s) > 0
        assert min(m.times_s) <= m.median_s <= max(m.times_s)
        assert [(visit.process, visit.round) for visit in m.visits] == [(0, 0), (1, 0)]
        assert sum(visit.samples for visit in m.visits) == len(m.times_s)
        assert m.throughput_ips == pytest.approx(sum(v.window_images for v in m.visits) / sum(v.window_s for v in m.visits))
        assert all(visit.window_images % m.batch_size == 0 for visit in m.visits)
        assert m.launches_per_block >= 1
        assert m.warmup_launches >= 2, "one process after the other"
        assert m.device.startswith("cuda" if "-cuda/" in m.variant else "cpu")
        assert bool(m.node_providers) == m.variant.startswith("onnx/")
        assert m.stop == "rounds"


def test_each_row_has_its_share_of_a_limit_measured_in_the_same_run(report: BenchReport) -> None:
    assert {limit.device for limit in report.limits} == {m.device for m in report.measurements}
    for m in report.measurements:
        assert m.limit_fraction is not None
        assert m.limit_fraction > 0
        assert m.bound in ("launch", "compute", "memory", "pcie")
        assert set(m.floors_s) >= {"compute", "memory"}
        assert m.overhead_s is not None


def test_each_process_says_what_the_machine_did(report: BenchReport) -> None:
    assert [state.process for state in report.machine] == [0, 1]
    assert all(state.cpu for state in report.machine)


def test_every_variant_has_a_cold_start_that_adds_up(report: BenchReport) -> None:
    assert [cold.variant for cold in report.cold_starts] == list(dict.fromkeys(m.variant for m in report.measurements))
    for cold in report.cold_starts:
        assert 0 < cold.load_s + cold.first_s + cold.import_s <= cold.total_s
        assert cold.steady_s is None or cold.steady_s > 0  # None where the machine is too busy for launches to agree
        assert cold.batch_size == 2
        assert cold.peak_memory_bytes is not None
        assert cold.peak_memory_bytes > 50e6, "torch alone is more"


def test_speed_ups_are_relative_to_the_first_variant_unless_another_is_named(report: BenchReport, bundle: Bundle) -> None:
    assert {each.baseline for each in report.speedups if "-cpu/" in each.variant} == {EAGER}
    assert all(each.pairs == 2 for each in report.speedups)
    assert all(each.ci95 is None for each in report.speedups), "two pairs have no interval"
    named = api.benchmark(bundle, variants=(EAGER, ORT), baseline=ORT, batch_sizes=(1,), scopes=("device",), rounds=6)
    found = {each.variant: each for each in named.speedups}
    assert found[ORT].ratio == 1.0
    assert found[EAGER].ci95 is not None


def test_the_environment_is_that_of_the_workers(report: BenchReport) -> None:
    assert report.environment.threads == torch.get_num_threads()
    assert report.environment.versions["torch"].startswith(torch.__version__.partition("+")[0])


def test_threads_are_those_asked_for(bundle: Bundle) -> None:
    found = api.benchmark(bundle, variants=(EAGER,), batch_sizes=(1,), scopes=("device",), rounds=1, threads=3)
    assert (found.environment.threads, found.options["threads"]) == (3, 3)
    assert torch.get_num_threads() != 3


def test_the_quick_profile_covers_core_variants_only_and_full_all(bundle: Bundle) -> None:
    said: dict[str, set[str]] = {}
    for profile in PROFILES:
        found = api.benchmark(
            bundle, profile=profile.name, batch_sizes=(1,), scopes=("device",), rounds=1, processes=1, cold_start=False, device="cpu"
        )
        said[profile.name] = {m.variant for m in found.measurements}
    assert said["quick"] == {variant.name for variant in VARIANTS if variant.core and variant.device == "cpu"}
    assert said["full"] == {variant.name for variant in VARIANTS if variant.device == "cpu"}
    assert find_profile("full").processes >= 3
    assert find_profile("quick").processes == 1
    assert all(profile.rounds * profile.visit_s >= 0.5 for profile in PROFILES), "the window of launches back to back"


def test_globs_and_one_scope_narrow_the_run_and_progress_is_reported(bundle: Bundle) -> None:
    said: list[tuple[int, int, str]] = []
    found = api.benchmark(
        bundle.path,
        variants=(ORT,),
        batch_sizes=(3,),
        scopes=("e2e", "e2e"),
        rounds=2,
        device="cpu",
        progress=lambda done, total, what: said.append((done, total, what)),
    )
    assert [(m.variant, m.batch_size, m.scope) for m in found.measurements] == [(ORT, 3, "e2e")]
    assert said == [(1, 2, ORT), (2, 2, ORT)]
    assert found.skipped == ()


def test_a_sweep_finds_batch_sizes_and_the_best_of_them(bundle: Bundle) -> None:
    found = api.benchmark(bundle, variants=(ORT,), sweep=True, slo_s=0.02, scopes=("device",), rounds=1)
    sizes = [m.batch_size for m in found.measurements]
    assert sizes == [2**power for power in range(len(sizes))]
    assert len(sizes) >= 2
    choice = found.batches[0]
    assert (choice.variant, choice.scope) == (ORT, "device")
    assert choice.best in sizes


def test_ctrl_c_keeps_what_was_measured(bundle: Bundle) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    found = api.benchmark(bundle, variants=(EAGER,), batch_sizes=(1, 2), scopes=("device",), rounds=50, progress=interrupt)
    assert found.partial is not None
    assert "interrupted after 3 visits" in found.partial
    assert sum(len(m.visits) for m in found.measurements) == 3
    assert {m.stop for m in found.measurements} == {"interrupted"}


def test_ctrl_c_before_anything_was_measured_is_an_interrupt(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Gathered, event: object, process: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Gathered, "take", interrupt)
    with pytest.raises(KeyboardInterrupt):
        api.benchmark(bundle, variants=(EAGER,), batch_sizes=(1,), rounds=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_sizes": (1, 0)}, "batch size is 0"),
        ({"batch_sizes": (1, -8)}, "batch size is -8"),
        ({"rounds": 0}, "rounds is 0"),
        ({"processes": 0}, "processes is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"scopes": ("device", "host")}, r"'host'.*device or e2e"),
        ({"scopes": ()}, "scope"),
        ({"sweep": True, "batch_sizes": (1,)}, "sweep"),
        ({"slo_s": 0.0}, "latency budget is 0 ms"),
        ({"slo_s": float("nan")}, "latency budget"),
        ({"limit_s": -1.0}, "time limit is -1 s"),
        ({"profile": "quik"}, "quick"),
        ({"variants": ("tensorrt/*",)}, "variant 'tensorrt/"),
        ({"baseline": "eager"}, "baseline 'eager'"),
    ],
)
def test_what_makes_no_sense_is_bad_input(bundle: Bundle, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        api.benchmark(bundle, **arguments)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so its variants are measured")
def test_nothing_but_unusable_variants_is_unusable_with_each_reason(bundle: Bundle) -> None:
    with pytest.raises(Unusable, match="onnx/ort-cuda/fp32: "):
        api.benchmark(bundle, variants=("onnx/ort-cuda/fp32",))


# The worker process.


def request(path: Path) -> str:
    plan = Plan(str(path), "cpu", (EAGER,), {EAGER: (1,)}, ("device",), 1, 2, True, 0.01, 0.1, 1.0, 0)
    return json.dumps({"plan": plan.to_json(), "process": 0})


def worker(text: str, folder: Path) -> tuple[int, list[dict[str, object]]]:
    done = subprocess.run(COMMAND, input=text, capture_output=True, text=True, timeout=120, cwd=folder)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_a_worker_sends_events_and_nothing_else_and_ends_with_done(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('a file of the user was imported')")
    code, sent = worker(request(bundle.path), tmp_path)
    kinds = [event["event"] for event in sent]
    assert code == 0
    assert kinds[-1] == "done"
    assert kinds.count("visit") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["torch.py"]


def test_an_error_of_ours_is_an_event(tmp_path: Path) -> None:
    code, sent = worker(request(tmp_path / "absent"), tmp_path)
    assert code == 0
    assert sent[-1]["event"] == "error"
    assert KINDS[int(str(sent[-1]["kind"]))] is BadInput
    assert "absent" in str(sent[-1]["message"])


def test_a_plan_survives_its_journey() -> None:
    plan = Plan("b", "cpu", ("a", "b"), {"a": (1, 2)}, SCOPES, 3, 2, False, 0.1, 0.2, 3.0, 7, 4, True, {"k": "v"}, (("a", 1, "e2e", 9),))
    assert plan_from_json(plan.to_json()) == plan


def test_a_worker_that_dies_is_reported_with_what_it_said(bundle: Bundle) -> None:
    killed = []

    def kill(done: int, total: int, what: str) -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        killed.extend(children)
        for child in children:
            os.kill(int(child), signal.SIGKILL)

    found = api.benchmark(bundle, variants=(EAGER,), batch_sizes=(1,), scopes=("device",), rounds=100, progress=kill)
    assert killed
    assert found.partial is not None
    assert "a measuring process ended with signal 9" in found.partial
    assert [failure.name for failure in found.failed] == ["process 1"]
    (row,) = found.measurements
    assert (row.stop, len(row.visits) < 100) == ("interrupted", True), "what it sent before is kept"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit('no memory')", "exit code 1: no memory"),
        ('import os; os.write(1, b\'{"event": "vis\'); os.kill(os.getpid(), 9)', "signal 9: it said nothing"),
        ("import time; time.sleep(60)", "nothing to say for 0 s: it said nothing"),
    ],
    ids=["an error", "in the middle of a line", "a hang"],
)
def test_a_worker_that_dies_before_it_measured_is_unusable(
    bundle: Bundle, program: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "COMMAND", (sys.executable, "-c", program))
    monkeypatch.setattr(coordinator, "SILENCE_S", 0.4 if "sleep" in program else 60.0)
    with pytest.raises(Unusable, match=f"a measuring process ended with {said}; run the bench again"):
        api.benchmark(bundle, variants=(EAGER,), batch_sizes=(1,))


def test_a_case_that_fails_is_listed_and_the_others_are_measured(bundle: Bundle, tmp_path: Path) -> None:
    # A graph made for one image, as exporters that specialise on their example write it.
    entry = artifact_of(bundle, next(variant for variant in VARIANTS if variant.name == ORT))
    graph = onnx.load_from_string(bundle.read(entry))
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    shutil.copytree(bundle.path, tmp_path / "bundle")
    special = write_artifact(tmp_path / "bundle", entry.name, entry.format, entry.path, graph.SerializeToString(), entry.details)
    artifacts = tuple(special if each.name == entry.name else each for each in bundle.manifest.artifacts)
    write_manifest(tmp_path / "bundle", dataclasses.replace(bundle.manifest, artifacts=artifacts))

    def measure(*variants: str, batch_sizes: tuple[int, ...] = (1, 2)) -> BenchReport:
        return api.benchmark(tmp_path / "bundle", variants=variants, batch_sizes=batch_sizes, scopes=("device",), rounds=1, cold_start=True)

    found = measure(EAGER, ORT)
    assert [(row.variant, row.batch_size) for row in found.measurements] == [(EAGER, 1), (EAGER, 2), (ORT, 1)]
    assert [failure.name for failure in found.failed] == [ORT, ORT]
    assert found.failed[0].reason.startswith(f"batch 2, device: {ORT} does not run at batch 2: ")
    assert found.failed[1].reason.startswith("cold start: ")
    with pytest.raises(DamagedFile, match=f"{ORT}: batch 2, device: {ORT} does not run at batch 2"):
        measure(ORT, batch_sizes=(2,))


def test_the_weakest_reason_of_all_processes_is_why_it_ended() -> None:
    case = {"variant": "v", "batch_size": 1, "scope": "device"}
    visit = {"event": "visit", **case, "round": 0, "times_s": [1.0], "single_times_s": [], "window_images": 1, "window_s": 1.0}
    visit |= {"energy_j": None, "flag": None}

    def stop(*reasons: str | None) -> str:
        found = Gathered()
        for process, reason in enumerate(reasons):
            found.take(visit, process)
            if reason:
                found.take({"event": "stop", **case, "reason": reason}, process)
        return found.times["v", 1, "device"].stop

    assert stop("precise", "precise") == "precise"
    assert stop("time limit", "precise") == "time limit"
    assert stop("precise", None) == "interrupted"


def test_an_unfinished_warm_up_a_short_window_and_a_tail_are_said() -> None:
    assert measurement(3, steady=False).warnings[0] == "not steady when the warm-up ended, after 40 launches"
    assert "images/s from 0.1 s of launches, and 0.5 s are the least to rely on" in measurement(3).warnings
    tail = (Visit(process=0, round=0, samples=3, singles=0, window_images=8, window_s=1.0),)
    assert "launches back to back took 999 times the median each: read images/s" in measurement(3, visits=tail).warnings
    good = (Visit(process=0, round=0, samples=3, singles=0, window_images=8000, window_s=1.0),)
    assert measurement(3, visits=good).warnings == ()


def test_a_worker_ends_when_its_parent_does(bundle: Bundle) -> None:
    program = (
        "import os, sys; from lenet_deploy import api\n"
        f"api.benchmark({str(bundle.path)!r}, variants=({EAGER!r},), batch_sizes=(1,), rounds=1000, progress=lambda *a: os._exit(9))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    pid = None
    while parent.poll() is None:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        pid = next(iter(children.read_text().split()), pid) if children.exists() else pid
        time.sleep(0.02)
    assert parent.returncode == 9
    assert pid is not None
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.05)


# What is derived from raw times.


def measurement(times: int, launches_per_block: int = 1, **changes: object) -> Measurement:
    seconds = tuple(1e-3 + 1e-6 * i for i in range(times))
    visit = Visit(process=0, round=0, samples=times, singles=0, window_images=800, window_s=0.1)
    made = Measurement("v", "cpu", 8, "device", seconds, launches_per_block, (visit,), 40, "rounds", 1, None)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def visited(*groups: tuple[float, ...], flags: tuple[str | None, ...] = ()) -> Measurement:
    """A measurement of one visit a group."""
    whole = (*flags, *(None,) * (len(groups) - len(flags)))
    visits = tuple(
        Visit(process=0, round=i, samples=len(group), singles=0, window_images=len(group), window_s=sum(group), flag=flag)
        for i, (group, flag) in enumerate(zip(groups, whole, strict=True))
    )
    times = tuple(time for group in groups for time in group)
    return Measurement("v", "cpu", 1, "device", times, 1, visits, 40, "rounds", 1, None)


@pytest.mark.parametrize("percent", MIN_SAMPLES)
def test_a_percentile_needs_enough_samples(percent: float) -> None:
    needed = MIN_SAMPLES[percent]
    assert measurement(needed - 1).percentiles_s[f"p{percent:g}"] is None
    value = measurement(needed).percentiles_s[f"p{percent:g}"]
    assert value == pytest.approx(1e-3 + 1e-6 * (needed - 1) * percent / 100)


def test_percentiles_of_blocks_come_from_launches_timed_alone() -> None:
    blocks = measurement(1000, launches_per_block=2)
    assert set(blocks.percentiles_s.values()) == {None}
    assert blocks.median_s == pytest.approx(1e-3 + 1e-6 * 499.5)
    visit = dataclasses.replace(blocks.visits[0], singles=700)
    with_singles = dataclasses.replace(blocks, visits=(visit,), single_times_s=(2e-3,) * 700)
    assert with_singles.percentiles_s["p99"] == 2e-3
    assert with_singles.median_s == blocks.median_s


def test_the_interval_needs_six_visits_and_is_no_narrower_than_theirs() -> None:
    assert visited(*[(1.0,) * 100] * 5).ci95_s is None
    apart = visited(*[(1.0 + 0.1 * i,) * 1000 for i in range(6)])
    assert apart.ci95_s == (1.0, 1.5), "six thousand samples, but six visits"


def test_flagged_visits_stay_in_the_file_and_out_of_the_statistics() -> None:
    found = visited((1.0, 1.0), (9.0, 9.0, 9.0), (2.0, 2.0), flags=(None, "throttled"))
    assert len(found.times_s) == 7
    assert found.flagged == 3
    assert found.kept_s == (1.0, 1.0, 2.0, 2.0)
    assert found.median_s == 1.5
    assert found.throughput_ips == pytest.approx(4 / 6)
    assert "3 samples flagged and left out" in found.warnings
    nothing = visited((1.0,), flags=("throttled",))
    assert nothing.warnings == ("all 1 samples were flagged",)


def test_throughput_is_images_by_wall_clock_and_not_by_the_median() -> None:
    assert measurement(3).throughput_ips == 8000.0


def test_a_launch_whose_fixed_part_is_most_of_it_is_launch_bound() -> None:
    floors = {"compute": 2e-4, "memory": 3e-4}
    assert measurement(3, floors_s=floors, overhead_s=9e-4).bound == "launch"
    assert measurement(3, floors_s=floors, overhead_s=2.9e-4).bound == "memory"
    assert measurement(3, floors_s=floors, overhead_s=3.1e-4).bound == "launch", "on a CPU, longer than any floor"
    waiting = {"overhead_s": 9e-4, "gpu_times_s": (9e-4,)}
    assert measurement(3, floors_s=floors, **waiting).bound == "memory", "the host waits while the GPU computes"
    assert measurement(3, floors_s=floors).limit_fraction == pytest.approx(3e-4 / 1.001e-3)
    assert (measurement(3).bound, measurement(3).limit_fraction) == (None, None)


def test_copies_that_take_as_long_as_the_gpu_computes_bind() -> None:
    gpu = {"gpu_times_s": (1e-4,), "h2d_times_s": (1e-4,), "d2h_times_s": (1e-6,), "floors_s": {"compute": 1e-5}}
    assert measurement(3, scope="e2e", **gpu).bound == "pcie"
    assert measurement(3, scope="device", **gpu).bound == "compute"
    assert measurement(3, scope="e2e", **{**gpu, "h2d_times_s": (9e-5,)}).bound == "compute"


def test_energy_is_by_image_and_of_visits_that_count() -> None:
    visits = [
        Visit(process=0, round=i, samples=1, singles=0, window_images=10, window_s=1.0, energy_j=joules, flag=flag)
        for i, (joules, flag) in enumerate([(20.0, None), (900.0, "throttled"), (40.0, None)])
    ]
    assert measurement(3, visits=tuple(visits)).energy_per_image_j == 3.0
    assert measurement(3).energy_per_image_j is None


def choice(throughputs: dict[int, float], p50: dict[int, float], slo_s: float | None) -> tuple[int, int | None]:
    rows = [
        measurement(
            3,
            batch_size=size,
            times_s=(p50[size],) * 3,
            visits=(Visit(process=0, round=0, samples=3, singles=0, window_images=int(rate), window_s=1.0),),
        )
        for size, rate in throughputs.items()
    ]
    found = batch_choices(rows, slo_s)
    assert [each.statistic for each in found] == ["median"]
    return found[0].best, found[0].within_slo


def test_the_best_batch_is_that_of_the_highest_throughput_and_the_budget_bounds_it() -> None:
    rates, latencies = {1: 100.0, 2: 180.0, 4: 200.0, 8: 199.0}, {1: 0.01, 2: 0.012, 4: 0.02, 8: 0.04}
    assert choice(rates, latencies, None) == (4, None)
    assert choice(rates, latencies, 0.015) == (4, 2)
    assert choice(rates, latencies, 0.001) == (4, None)


def test_the_budget_is_kept_by_p99_where_all_have_it() -> None:
    tail = (1e-3,) * 980 + (5e-2,) * 20
    rows = [measurement(1000, batch_size=size, times_s=tail) for size in (1, 2)]
    found = batch_choices(rows, 0.01)[0]
    assert (found.statistic, found.within_slo) == ("p99", None)


def test_the_limit_is_the_best_of_all_processes_rate_by_rate() -> None:
    one = Limit("cpu", {"fp32": 2.0, "tf32": 1.0}, 5.0, None, {"1": 3.0})
    other = Limit("cpu", {"fp32": 1.0, "bf16": 4.0}, 6.0, 7.0, {"1": 4.0, "2": 1.0})
    best = Limit("cpu", {"fp32": 2.0, "tf32": 1.0, "bf16": 4.0}, 6.0, 7.0, {"1": 4.0, "2": 1.0})
    assert higher(one, None) == one
    assert higher(one, other) == best == higher(other, one)


def test_what_was_not_visited_is_no_measurement() -> None:
    found = Gathered(opened={"v": ("cpu", ())})
    assert measurements(found, [("v", 1, "device")], lambda *asked: {}, {"v": 1}, {}) == ()


def test_every_way_to_stop_is_documented() -> None:
    assert {"precise", "settled", "rounds", "time limit", "interrupted"} == set(STOPS)


def test_an_unknown_profile_is_bad_input_with_the_nearest_name() -> None:
    with pytest.raises(UnknownName, match="quick"):
        find_profile("quik")

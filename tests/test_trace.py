"""A trace says where a launch's time goes: every operator once, the gaps between them, and what the profiler cost."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lenet_deploy.bench import trace as tracing
from lenet_deploy.bench import trace_ort, trace_torch
from lenet_deploy.bench.spans import (
    KERNEL,
    LAUNCH,
    OPERATOR,
    WRAPPER,
    Span,
    by_launch,
    chrome_events,
    from_the_last,
    idle_s,
    interquartile_mean,
    middle_half,
    operator_times,
    self_times,
)
from lenet_deploy.bench.trace import MIN_LAUNCHES, profiled_opener, trace
from lenet_deploy.bench_records import OperatorTime, TraceReport
from lenet_deploy.bundle import Bundle
from lenet_deploy.data import Dataset, fit
from lenet_deploy.devices import computing_on
from lenet_deploy.errors import BadInput, CannotWrite, DamagedFile, Unusable
from lenet_deploy.records import Environment, Preprocessing
from lenet_deploy.report.table import to_text
from lenet_deploy.report.trace import TOP, trace_lines, trace_tables
from lenet_deploy.runtimes import SessionOptions, onnxruntime
from lenet_deploy.runtimes.eager import ModuleSession
from lenet_deploy.sources import bundle_source, bundle_variants
from lenet_deploy.variants import Variant

CPU = torch.device("cpu")
LAUNCHES, BATCH = MIN_LAUNCHES, 3  # fewer are never traced, however slow the machine is
EAGER, SCRIPTED, ORT = "eager/torch-cpu/fp32", "torchscript/torch-cpu/fp32/trace", "onnx/ort-cpu/fp32/ts-exporter"
# What each runtime calls a convolution and a fully connected layer, those that are nested in each other named once.
LAYERS = {
    EAGER: ({"aten::conv2d"}, {"aten::linear"}),
    SCRIPTED: ({"aten::_convolution"}, {"aten::linear"}),
    ORT: ({"Conv"}, {"Gemm", "FusedGemm"}),
}
PLAIN = Preprocessing(1, 4, 0, (0.0,), (1.0,))

each_variant = pytest.mark.parametrize("name", LAYERS)
Traced = Callable[[str], TraceReport]


def span(kind: str, name: str, start: float, end: float, lane: int = 0, node: str | None = None) -> Span:
    return Span(kind, name, start, end, lane, node)


def named(bundle: Bundle, name: str) -> Variant:
    (variant,) = bundle_variants(bundle, (name,))
    return variant


def images_of(digits: Dataset, bundle: Bundle, count: int) -> torch.Tensor:
    return fit(digits.test_images[:count], bundle.metadata.preprocessing)


def run_trace(variant: Variant, bundle: Bundle, digits: Dataset, directory: Path, device: torch.device = CPU) -> TraceReport:
    preprocessing, data = bundle.metadata.preprocessing, bundle_source(bundle).read(variant)
    with computing_on(device):
        return trace(
            variant.name,
            lambda: variant.open_session(data, preprocessing.input_shape),
            profiled_opener(variant, data, preprocessing.input_shape),
            images_of(digits, bundle, BATCH),
            preprocessing,
            directory,
            LAUNCHES,
        )


@pytest.fixture(scope="module")
def traced(tiny_bundle: Bundle, digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """The trace of a variant of the tiny bundle on the CPU, made once."""
    found: dict[str, TraceReport] = {}

    def one(name: str) -> TraceReport:
        if name not in found:
            found[name] = run_trace(named(tiny_bundle, name), tiny_bundle, digits, tmp_path_factory.mktemp("traces") / "new" / "folder")
        return found[name]

    return one


def document(report: TraceReport) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(Path(report.path).read_text())
    return loaded


def complete_events(report: TraceReport) -> list[dict[str, Any]]:
    return [event for event in document(report)["traceEvents"] if event["ph"] == "X"]


def calls(report: TraceReport, names: set[str]) -> float:
    return sum(operator.calls for operator in report.operators if operator.name in names)


@each_variant
def test_the_file_is_a_chrome_trace(name: str, traced: Traced) -> None:
    report = traced(name)
    loaded = document(report)
    assert next(iter(loaded)) == "schema"
    assert loaded["schema"] == "lenet-deploy/trace/1"
    assert loaded["environment"]["cores"] == report.environment.cores
    lanes = {(event["pid"], event["tid"]) for event in complete_events(report)}
    described = {(event["pid"], event["tid"]): event["args"]["name"] for event in loaded["traceEvents"] if event["name"] == "thread_name"}
    assert set(described) == lanes
    assert sorted(described.values()) == ["launches", "operators"]
    (process,) = (event["args"]["name"] for event in loaded["traceEvents"] if event["name"] == "process_name")
    assert process == f"{name}, batch {BATCH}, cpu"
    for event in complete_events(report):
        assert isinstance(event["name"], str)
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert event["cat"] in (LAUNCH, WRAPPER, OPERATOR)


@each_variant
def test_the_file_holds_the_launches_that_were_asked_for_and_no_warm_up(name: str, traced: Traced) -> None:
    report = traced(name)
    launches = [event for event in complete_events(report) if event["cat"] == LAUNCH]
    assert report.launches == len(launches) == LAUNCHES
    assert launches[0]["ts"] == 0
    assert [event["args"]["launch"] for event in launches] == list(range(LAUNCHES))
    assert {event["args"]["launch"] for event in complete_events(report) if event["cat"] == OPERATOR} == set(range(LAUNCHES))


@each_variant
def test_every_operator_lies_in_its_launch(name: str, traced: Traced) -> None:
    events = complete_events(traced(name))
    launches = {event["args"]["launch"]: event for event in events if event["cat"] == LAUNCH}
    slack_us = 2.0  # onnxruntime's whole microseconds
    for event in events:
        launch = launches[event["args"]["launch"]]
        assert launch["ts"] <= event["ts"]
        assert event["ts"] + event["dur"] <= launch["ts"] + launch["dur"] + slack_us


@each_variant
def test_events_of_a_lane_follow_each_other_or_are_nested(name: str, traced: Traced) -> None:
    around: dict[int, list[float]] = {}
    rounding_us = 0.002  # of a start and a length, each written to the nanosecond
    for event in sorted(complete_events(traced(name)), key=lambda event: (event["ts"], -event["dur"])):
        ends = around.setdefault(event["tid"], [])
        while ends and ends[-1] <= event["ts"] + rounding_us:
            ends.pop()
        assert not ends or event["ts"] + event["dur"] <= ends[-1] + rounding_us
        ends.append(event["ts"] + event["dur"])


@each_variant
def test_a_launch_convolves_twice_and_has_three_linear_layers(name: str, traced: Traced) -> None:
    convolutions, linears = LAYERS[name]
    assert calls(traced(name), convolutions) == 2
    assert calls(traced(name), linears) == 3


@each_variant
def test_operators_and_gaps_add_up_to_the_launch(name: str, traced: Traced) -> None:
    report = traced(name)
    assert all(operator.self_s >= 0 for operator in report.operators)
    assert all(0 <= report.share(operator) <= 1 for operator in report.operators)
    assert 0 < report.gap_share < 1
    assert report.gap_share == report.idle_s / report.launch_s
    total = sum(operator.self_s for operator in report.operators) + report.idle_s
    assert total == pytest.approx(report.launch_s, rel=1e-6)
    assert sum(wrapper.self_s for wrapper in report.wrappers) <= report.idle_s * (1 + 1e-6)
    assert list(report.operators) == sorted(report.operators, key=lambda each: -each.self_s)


@pytest.mark.parametrize("name", [EAGER, SCRIPTED])
def test_what_is_inside_an_operator_is_not_counted_for_it_again(name: str, traced: Traced) -> None:
    report = traced(name)
    (outer,) = LAYERS[name][0]
    whole_us = sum(event["dur"] for event in complete_events(report) if event["name"] == outer) / report.launches
    (own,) = (operator.self_s for operator in report.operators if operator.name == outer)
    inside = [operator for operator in report.operators if operator.name == "aten::mkldnn_convolution"]
    assert inside
    assert 1e6 * own < whole_us / 2  # it only passes its arguments on


def test_torchscript_s_interpreter_is_a_wrapper_and_no_operator(traced: Traced) -> None:
    report = traced(SCRIPTED)
    assert [(wrapper.name, wrapper.calls) for wrapper in report.wrappers] == [("forward", 1)]
    assert all("::" in operator.name for operator in report.operators)


def test_every_node_of_onnxruntime_is_there_by_name_with_its_provider(traced: Traced) -> None:
    report = traced(ORT)
    assert all(operator.node and operator.calls == 1 for operator in report.operators)
    assert {wrapper.name for wrapper in report.wrappers} >= {"model_run"}
    nodes = [event for event in complete_events(report) if event["cat"] == OPERATOR]
    assert {event["args"]["node"] for event in nodes} == {operator.node for operator in report.operators}
    assert {event["args"]["provider"] for event in nodes} == {"CPUExecutionProvider"}
    assert {event["args"]["output_type_shape"][0]["float"][0] for event in nodes} == {BATCH}


def test_only_onnxruntime_s_times_carry_its_note(traced: Traced) -> None:
    assert traced(ORT).notes == (trace_ort.NOTE,)
    assert traced(EAGER).notes == traced(SCRIPTED).notes == ()


@each_variant
def test_the_report_says_what_the_profiler_cost_and_where_the_file_is(name: str, traced: Traced) -> None:
    report = traced(name)
    assert report.plain_s > 0
    assert report.slowdown == report.launch_s / report.plain_s
    assert (report.variant, report.device, report.batch_size) == (name, "cpu", BATCH)
    assert report.kernels == ()
    assert (report.gpu_idle_s, report.kernels_per_launch) == (None, None)
    path = Path(report.path)
    assert path.name == f"{name.replace('/', '-')}.batch{BATCH}.trace.json"
    assert list(path.parent.iterdir()) == [path]  # written in one step, nothing is left of it
    assert document(report)["summary"]["launch_s"] == report.launch_s


def test_tracing_writes_nothing_to_the_terminal(
    tiny_bundle: Bundle, digits: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in (EAGER, ORT):
        run_trace(named(tiny_bundle, name), tiny_bundle, digits, tmp_path)
    assert capfd.readouterr() == ("", "")


def session_of(launch: Callable[[torch.Tensor], torch.Tensor]) -> tracing.Opener:
    @contextlib.contextmanager
    def opened() -> Iterator[ModuleSession]:
        yield ModuleSession(launch, (1, 4, 4), CPU)

    return opened


def pixels(count: int) -> torch.Tensor:
    return torch.zeros(count, 1, 4, 4, dtype=torch.uint8)


def test_slow_launches_are_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "LIMIT_S", 0.001)
    monkeypatch.setattr(tracing, "WARMUP_S", 0.01)

    def slow(images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.005)
        return images.relu()

    with computing_on(CPU):
        report = trace("slow", session_of(slow), None, pixels(1), PLAIN, tmp_path)
    assert report.launches == MIN_LAUNCHES
    assert calls(report, {"aten::relu"}) == 1
    assert report.gap_share > 0.5  # asleep


def test_a_launch_that_calls_no_operator_is_all_gap(tmp_path: Path) -> None:
    kept = torch.zeros(1)
    with computing_on(CPU):
        report = trace("idle", session_of(lambda images: kept), None, pixels(1), PLAIN, tmp_path, launches=11)
    assert report.launches == 11
    assert report.operators == ()
    assert report.gap_share == pytest.approx(1.0)


def test_a_variant_that_does_not_take_the_batch_is_damaged_and_says_which(tmp_path: Path) -> None:
    def refuses(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shape mismatch\nat length")

    with computing_on(CPU), pytest.raises(DamagedFile, match="odd/one does not run at batch 2: shape mismatch; see parity"):
        trace("odd/one", session_of(refuses), None, pixels(2), PLAIN, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_folder_s_place_is_said_before_anything_is_opened(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")

    def never() -> contextlib.AbstractContextManager[ModuleSession]:
        raise AssertionError("opened")

    with pytest.raises(CannotWrite, match="taken"):
        trace("any", never, None, pixels(1), PLAIN, taken)
    assert taken.read_text() == "mine"


def test_only_a_runtime_with_a_profile_of_its_own_is_opened_again(tiny_bundle: Bundle) -> None:
    openers = {name: profiled_opener(named(tiny_bundle, name), b"", (1, 20, 20)) for name in LAYERS}
    assert [name for name, opener in openers.items() if opener] == [ORT]


def test_onnxruntime_s_profile_ends_when_it_is_collected(tiny_bundle: Bundle) -> None:
    data = bundle_source(tiny_bundle).read(named(tiny_bundle, ORT))
    with computing_on(CPU), onnxruntime.open_profiled(data, (1, 20, 20), "cpu") as (session, collect):
        session.bind(1)
        for _ in range(4):
            session.launch()
        events = collect()
        session.launch()
    assert sum(event["name"] == "model_run" for event in events) == 4
    assert all(event["cat"] in ("Session", "Node") for event in events)


def test_a_profiled_session_leaves_no_file_where_nobody_collects(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = bundle_source(tiny_bundle).read(named(tiny_bundle, ORT))
    with computing_on(CPU), onnxruntime.open_profiled(data, (1, 20, 20), "cpu") as (session, collect):
        session.bind(1)
        session.launch()
    del session, collect
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_profiled_session_is_refused_as_any_other() -> None:
    with computing_on(CPU), pytest.raises(DamagedFile), onnxruntime.open_profiled(b"no artifact", (1, 20, 20), "cpu"):
        pass
    options = SessionOptions(channels_last=True)
    with computing_on(CPU), pytest.raises(BadInput, match="channels_last"), onnxruntime.open_profiled(b"", (1, 20, 20), "cpu", options):
        pass


# Two launches, of which the second is cut off by a span that belongs to neither.
NESTED = (
    span(LAUNCH, "launch", 0.0, 10.0),
    span(OPERATOR, "outer", 1.0, 6.0, lane=7),
    span(OPERATOR, "inner", 2.0, 5.0, lane=7),
    span(OPERATOR, "innermost", 3.0, 4.0, lane=7),
    span(OPERATOR, "outer", 7.0, 8.0, lane=7),
    span(OPERATOR, "stray", 10.5, 11.0, lane=7),
    span(LAUNCH, "launch", 12.0, 20.0),
    span(OPERATOR, "inner", 12.0, 14.0, lane=7),
)


def test_self_times_leave_out_what_is_inside() -> None:
    own = {(each.name, each.start_s): seconds for each, seconds in self_times(NESTED[1:5])}
    assert own == {("outer", 1.0): 2.0, ("inner", 2.0): 2.0, ("innermost", 3.0): 1.0, ("outer", 7.0): 1.0}


def test_self_times_add_up_to_what_is_covered() -> None:
    assert sum(seconds for _, seconds in self_times(NESTED[1:5])) == 6.0


def test_spans_of_other_threads_and_streams_are_inside_nothing() -> None:
    spans = [span(OPERATOR, "a", 0, 4, lane=1), span(OPERATOR, "b", 1, 2, lane=2), span(KERNEL, "c", 1, 3, lane=1)]
    assert {each.name: seconds for each, seconds in self_times(spans)} == {"a": 4, "b": 1, "c": 2}


def test_a_span_that_outlasts_the_one_around_it_takes_no_more_than_is_there() -> None:
    own = {each.name: seconds for each, seconds in self_times([span(OPERATOR, "a", 0, 4), span(OPERATOR, "b", 3, 5)])}
    assert own == {"a": 3, "b": 2}


def test_spans_belong_to_the_launch_that_they_begin_in() -> None:
    launches = by_launch(reversed(NESTED))
    assert [launch.start_s for launch, _ in launches] == [0.0, 12.0]
    assert [[each.name for each in inside] for _, inside in launches] == [["outer", "inner", "innermost", "outer"], ["inner"]]


def test_operator_times_are_per_launch_and_sorted() -> None:
    assert operator_times(by_launch(NESTED), OPERATOR) == (
        OperatorTime("inner", None, 1.0, 2.0),
        OperatorTime("outer", None, 1.0, 1.5),
        OperatorTime("innermost", None, 0.5, 0.5),
    )


def test_operators_of_one_kind_are_told_apart_by_their_node() -> None:
    spans = (span(LAUNCH, "launch", 0, 4), span(OPERATOR, "Conv", 0, 1, node="first"), span(OPERATOR, "Conv", 1, 3, node="second"))
    assert [(each.node, each.self_s) for each in operator_times(by_launch(spans), OPERATOR)] == [("second", 2.0), ("first", 1.0)]


def test_idle_time_is_what_no_operator_covers() -> None:
    assert idle_s(by_launch(NESTED), OPERATOR) == (10 - 6 + 8 - 2) / 2
    assert idle_s(by_launch(NESTED), KERNEL) == (10 + 8) / 2


def test_kernels_at_once_are_covered_once_and_end_with_the_launch() -> None:
    spans = (span(LAUNCH, "launch", 0, 10), span(KERNEL, "a", 1, 4, 1), span(KERNEL, "b", 2, 6, 2), span(KERNEL, "c", 9, 30, 1))
    assert idle_s(by_launch(spans), KERNEL) == 10 - 5 - 1


def test_one_interrupted_launch_changes_no_time() -> None:
    calm = [span(LAUNCH, "launch", 10.0 * i, 10.0 * i + 5) for i in range(7)]
    interrupted = (span(LAUNCH, "launch", 100.0, 1100.0), span(OPERATOR, "interrupted", 100.0, 1100.0))
    counted = middle_half(by_launch((*calm, *interrupted)))
    assert [(launch.length_s, inside) for launch, inside in counted] == [(5.0, ())] * 4
    assert interquartile_mean([5.0] * 7 + [1000.0]) == 5.0
    assert interquartile_mean([3.0]) == 3.0


def test_what_came_before_the_last_launches_is_left_out() -> None:
    assert from_the_last(NESTED, 1) == NESTED[6:]
    assert from_the_last(reversed(NESTED), 2) == NESTED


def test_chrome_events_have_a_lane_for_launches_one_for_each_thread_and_one_for_each_stream() -> None:
    spans = (
        span(LAUNCH, "launch", 5.0, 5.5),
        span(WRAPPER, "forward", 5.0, 5.4, lane=3),
        span(OPERATOR, "aten::mm", 5.1, 5.2, lane=3, node="first"),
        span(OPERATOR, "aten::mm", 5.1, 5.2, lane=4),
        span(KERNEL, "gemm", 5.2, 5.3, lane=7),
    )
    events = chrome_events(by_launch(spans), "some variant")
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    where = {(event["name"], names[event["tid"]]) for event in events if event["ph"] == "X"}
    assert where == {
        ("launch", "launches"),
        ("forward", "operators 3"),
        ("aten::mm", "operators 3"),
        ("aten::mm", "operators 4"),
        ("gemm", "GPU stream 7"),
    }
    first = next(event for event in events if event["name"] == "aten::mm")
    assert (first["ts"], first["dur"]) == (pytest.approx(1e5), pytest.approx(1e5))  # microseconds from the first launch
    assert first["args"] == {"launch": 0, "node": "first"}


def event(name: str, start: float, end: float, device: str = "CPU", *, children: int = 0, stream: int = 0) -> SimpleNamespace:
    """As torch.autograd.profiler_util.FunctionEvent."""
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        device_type=SimpleNamespace(name=device),
        thread=1,
        device_resource_id=stream,
        cpu_children=[None] * children,
    )


def test_torch_s_events_on_a_gpu_become_kernels_and_its_marks_there_are_dropped() -> None:
    spans = trace_torch.read(
        [
            event("launch", 0, 100, children=2),
            event("forward", 10, 80, children=1),
            event("aten::conv2d", 20, 40, children=1),
            event("cudaLaunchKernel", 25, 35),
            event("cudaStreamSynchronize", 85, 99),
            event("launch", 30, 90, "CUDA", stream=7),
            event("sm90_conv", 50, 70, "CUDA", stream=7),
            event("Memcpy HtoD", 30, 31, "CUDA", stream=9),
        ]
    )
    assert [(each.kind, each.name, each.lane) for each in spans] == [
        (LAUNCH, "launch", 0),
        (WRAPPER, "forward", 1),
        (OPERATOR, "aten::conv2d", 1),
        (OPERATOR, "cudaLaunchKernel", 1),
        (OPERATOR, "cudaStreamSynchronize", 1),
        (KERNEL, "sm90_conv", 7),
        (KERNEL, "Memcpy HtoD", 9),
    ]
    assert spans[-2].start_s == pytest.approx(50e-6)
    ((_, inside),) = by_launch(spans)
    assert len(inside) == 6


def ort_event(name: str, start: int, length: int, cat: str = "Node", op: str = "Conv") -> dict[str, Any]:
    return {"cat": cat, "tid": 5, "ts": start, "dur": length, "ph": "X", "name": name, "args": {"op_name": op, "provider": "P"}}


def ort_run(start: int) -> list[dict[str, Any]]:
    return [
        ort_event("relu_nchwc_kernel_time", start + 2, 10),
        ort_event("gemm_kernel_time", start + 14, 7, op="Gemm"),
        ort_event("gemm_fence_before", start + 13, 1),
        ort_event("model_run", start, 20, "Session"),
    ]


LAUNCHED = (span(LAUNCH, "launch", 7.0, 7.0 + 30e-6), span(LAUNCH, "launch", 7.001, 7.001 + 30e-6))


def test_onnxruntime_s_events_are_moved_into_the_launches_that_they_belong_to() -> None:
    events = [ort_event("session_initialization", 0, 900, "Session"), *ort_run(5000), *ort_run(8000), *ort_run(9000)]
    spans = trace_ort.read(events, LAUNCHED)
    assert [(each.kind, each.name, each.node) for each in spans if each.start_s < 7.0005] == [
        (WRAPPER, "model_run", None),
        (OPERATOR, "Conv", "relu_nchwc"),
        (OPERATOR, "Gemm", "gemm"),
    ]
    launches = by_launch((*LAUNCHED, *spans))
    assert [len(inside) for _, inside in launches] == [3, 3]
    for launch, inside in launches:
        assert all(launch.start_s <= each.start_s and each.end_s <= launch.end_s for each in inside)
    assert [each.self_s for each in operator_times(launches, OPERATOR)] == pytest.approx([10e-6, 7e-6])


def test_a_run_that_was_rounded_down_still_holds_its_last_node() -> None:
    spans = trace_ort.read(ort_run(8000) + ort_run(9000), LAUNCHED)
    run, node = spans[0], next(each for each in spans if each.name == "Gemm")
    assert run.end_s == node.end_s
    assert run.length_s == pytest.approx(21e-6)


def test_a_profile_without_the_launches_is_unusable() -> None:
    with pytest.raises(Unusable, match="shows 1 of 2 launches"):
        trace_ort.read(ort_run(8000), LAUNCHED)


@pytest.mark.parametrize("length", [20e-6, 19e-6, 200e-6])
def test_clocks_are_matched_by_the_launches_also_where_rounding_leaves_no_room(length: float) -> None:
    launches = [span(LAUNCH, "launch", start, start + length) for start in (1.0, 2.0)]
    runs = [(start + 3.5, start + 3.5 + 20e-6) for start in (1.0, 2.0)]
    assert trace_ort.offset_s(runs, launches) == pytest.approx(-3.5 + (length - 20e-6) / 2, abs=1e-9)


SOME = Environment("Linux", "3.11", "Some CPU", 2, 2, None, None, {}, None)
MANY = tuple(OperatorTime(f"op{i}", None, 2.0, 1e-6) for i in range(TOP + 3))


def report_of(operators: tuple[OperatorTime, ...], idle: float, **more: Any) -> TraceReport:
    values: dict[str, Any] = {"wrappers": (), "kernels": (), "gpu_idle_s": None, "notes": (), **more}
    length = sum(each.self_s for each in operators) + idle
    return TraceReport("a/b", "cpu", 1, 50, length, length / 2, operators, idle_s=idle, path="x/y.json", environment=SOME, **values)


def test_the_table_adds_up_to_the_launch_and_sums_the_rest() -> None:
    ((title, table),) = trace_tables(report_of(MANY, 5e-6))
    assert title == "a/b, batch 1, cpu: operators on the host"
    assert table.columns == ("operator", "calls/launch", "time/launch", "share")
    assert [row[0] for row in table.rows[-2:]] == ["3 others", "(no operator ran)"]
    assert table.rows[0] == ("op0", "2", "1.0 us", "5.0%")
    assert table.rows[-2][1:] == ("6", "3.0 us", "15.0%")
    assert sum(float(row[-1].rstrip("%")) for row in table.rows) == pytest.approx(100)


def test_nodes_have_a_column_where_the_runtime_names_them() -> None:
    ((_, table),) = trace_tables(report_of((OperatorTime("Conv", "relu_nchwc", 1.0, 3e-6),), 1e-6))
    assert table.columns[1] == "node"
    assert [row[1] for row in table.rows] == ["relu_nchwc", "-"]


def test_a_gpu_has_a_table_of_its_own_and_gaps_are_its() -> None:
    kernels = (OperatorTime("k" * 200, None, 7.0, 4e-6), OperatorTime("Memcpy HtoD", None, 1.0, 1e-6))
    report = report_of(MANY, 5e-6, kernels=kernels, gpu_idle_s=15e-6)
    assert report.gap_share == pytest.approx(0.75)
    assert report.kernels_per_launch == 7.0
    (_, (title, table)) = trace_tables(report)
    assert title.endswith("kernels on the GPU")
    assert table.rows[-1][0] == "(nothing ran on the GPU)"
    assert max(len(line) for line in to_text(table).splitlines()) < 100
    assert trace_lines(report)[0] == "gaps: 75% of a launch, in which no kernel ran; 7 kernels a launch"


def test_the_lines_name_the_gaps_the_profiler_s_cost_the_notes_and_the_file() -> None:
    wrapped = report_of(MANY, 5e-6, wrappers=(OperatorTime("forward", None, 1.0, 2e-6),), notes=("a note",))
    assert trace_lines(wrapped) == (
        "gaps: 25% of a launch, in which no operator ran",
        "the host's 5.0 us between operators: 2.0 us in forward, 3.0 us outside",
        "a launch took 20.0 us with the profiler on and 10.0 us without it (2.0 times): "
        "the shares say where to look, latencies come from bench",
        "a note",
        "50 launches in x/y.json: open it in https://ui.perfetto.dev or chrome://tracing",
    )
    assert len(trace_lines(report_of(MANY, 5e-6))) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")
@pytest.mark.parametrize("name", ["eager/torch-cuda/fp32", "torchscript/torch-cuda/fp32/trace", "onnx/ort-cuda/fp32/ts-exporter"])
def test_on_a_gpu_kernels_and_their_gaps_are_traced_for_every_runtime(
    name: str, tiny_bundle: Bundle, digits: Dataset, tmp_path: Path
) -> None:
    variant = named(tiny_bundle, name)
    status = variant.runtime.load().probe("cuda")
    if not status.usable:
        pytest.skip(f"{status.name}: {status.reason}; {status.fix}")
    report = run_trace(variant, tiny_bundle, digits, tmp_path, torch.device("cuda", 0))
    assert report.kernels_per_launch is not None
    assert report.kernels_per_launch >= 5  # two convolutions and three products
    assert report.gpu_idle_s is not None
    assert 0 < report.gap_share < 1
    assert sum(kernel.self_s for kernel in report.kernels) <= report.launch_s
    assert report.operators
    assert {each["cat"] for each in complete_events(report)} >= {LAUNCH, OPERATOR, KERNEL}

"""Load through MLPerf LoadGen: the search for the highest rate, the summary, who answers queries, and real runs of all four scenarios."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lenet_deploy import api
from lenet_deploy.bench import scenarios
from lenet_deploy.bench.load import MIN_QUERIES, SCENARIOS, SEEDS, Load, find_scenario, judge, latencies, parse_summary
from lenet_deploy.bench.loadgen import Server, System, load_binding, run_test
from lenet_deploy.bench.scenarios import (
    MAX_HALVINGS,
    MAX_PREPARATIONS,
    MAX_PROBES,
    TOLERANCE,
    Responder,
    highest_valid,
    run_scenario,
)
from lenet_deploy.bench_records import LoadProbe, LoadResult
from lenet_deploy.checkpoint import Checkpoint, to_bytes
from lenet_deploy.data import Dataset, fit, normalise
from lenet_deploy.devices import computing_on
from lenet_deploy.errors import BadInput, DamagedFile, UnknownName, Unusable
from lenet_deploy.exporters import ExportOptions
from lenet_deploy.exporters.onnx import export_torchscript
from lenet_deploy.records import NodePlacement
from lenet_deploy.report.load import load_table, probe_table
from lenet_deploy.report.table import to_text
from lenet_deploy.runtimes import Session, eager, onnxruntime

NAMES = [scenario.name for scenario in SCENARIOS]
CPU = torch.device("cpu")
CLASSES = 10
SHORT_S = 0.3
LONG_S = 60.0  # what an interrupted or failed run would take if it went on
BOUND_S = 0.02

each_scenario = pytest.mark.parametrize("name", NAMES)


# The search for the highest valid rate, over oracles.


def searched(limit: float, start: float, noise: Callable[[], float] = lambda: 1.0) -> tuple[float | None, list[float]]:
    """What is found where rates up to `limit` are valid, and the rates that were asked about."""
    asked: list[float] = []

    def valid(rate: float) -> bool:
        asked.append(rate)
        return rate <= limit * noise()

    return highest_valid(valid, start), asked


@pytest.mark.parametrize("limit", [7.0, 49.0, 50.0, 99.9, 100.0, 101.0, 1234.5, 6400.0])
def test_the_highest_valid_rate_is_found_within_the_tolerance(limit: float) -> None:
    found, asked = searched(limit, 100.0)
    assert found is not None
    assert limit / (1 + TOLERANCE) <= found <= limit
    assert len(set(asked)) <= MAX_PROBES


def test_every_valid_rate_is_asked_about_once_and_every_other_twice() -> None:
    _, asked = searched(777.0, 100.0)
    assert {rate: asked.count(rate) for rate in asked} == {rate: 1 if rate <= 777.0 else 2 for rate in asked}


def test_where_no_rate_is_valid_the_search_soon_gives_up() -> None:
    found, asked = searched(0.0, 100.0)
    assert found is None
    assert sorted(set(asked)) == [100.0 / 2**k for k in reversed(range(MAX_HALVINGS + 1))]


def test_the_lowest_rate_that_is_tried_may_be_the_only_valid_one() -> None:
    lowest = 100.0 / 2**MAX_HALVINGS
    found, _ = searched(lowest, 100.0)
    assert found is not None
    assert lowest <= found <= lowest * (1 + TOLERANCE)


def test_where_every_rate_is_valid_the_search_ends_with_the_highest_it_tried() -> None:
    found, asked = searched(math.inf, 100.0)
    assert found == max(asked) == 100.0 * 2 ** (MAX_PROBES - 1)
    assert len(asked) == MAX_PROBES


def test_one_stall_of_the_machine_does_not_end_the_search() -> None:
    clean, asked = searched(1000.0, 100.0)
    for stalled in range(len(asked)):
        calls = itertools.count()
        found, _ = searched(1000.0, 100.0, lambda calls=calls, stalled=stalled: 0.0 if next(calls) == stalled else 1.0)
        assert found == clean


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_judge_moves_the_result_by_no_more_than_its_noise(seed: int) -> None:
    shuffled = random.Random(seed)
    found, _ = searched(1000.0, 100.0, lambda: shuffled.uniform(0.9, 1.1))
    assert found is not None
    assert 900.0 / (1 + TOLERANCE) <= found <= 1100.0


# LoadGen's summary.

SERVER_SUMMARY = """================================================
MLPerf Results Summary
================================================
SUT name : PyFastSUT
Scenario : Server
Mode     : PerformanceOnly
Completed samples per second    : 19.56
Result is : INVALID
  Performance constraints satisfied : NO
  Min duration satisfied : NO
  Min queries satisfied : NO
  Early stopping satisfied: NO
Recommendations:
 * Reduce target QPS to improve latency.
 * The test exited early, before enough queries were issued.
   See the detailed log for why this may have occurred.
Early Stopping Result:
 * Run unsuccessful.
 * Would need to run at least 7078 more queries,
 with the run being successful if every additional
 query were under latency.

================================================
Additional Stats
================================================
Scheduled samples per second : 531.03
Min latency (ns)                : 50238200
50.00 percentile latency (ns)   : 1298910114
90.00 percentile latency (ns)   : 2267390098
97.00 percentile latency (ns)   : 2461646621
99.00 percentile latency (ns)   : 2511713732
99.90 percentile latency (ns)   : 2611713732

================================================
Test Parameters Used
================================================
target_qps : 500
min_duration (ms): 1000

No warnings encountered during test.

1 ERROR encountered. See detailed log.
"""


def test_the_summary_is_read_in_loadgens_own_words() -> None:
    found = parse_summary(SERVER_SUMMARY)
    assert found["Result is"] == "INVALID"
    assert found["Early stopping satisfied"] == "NO"
    assert found["Scheduled samples per second"] == "531.03"
    assert found["min_duration (ms)"] == "1000"
    assert found["Recommendations"] == (
        "Reduce target QPS to improve latency.; "
        "The test exited early, before enough queries were issued. See the detailed log for why this may have occurred."
    )
    assert found["Early Stopping Result"] == (
        "Run unsuccessful.; Would need to run at least 7078 more queries, "
        "with the run being successful if every additional query were under latency."
    )
    assert not any("=" in key or key.startswith("*") for key in found)


def test_a_percentile_that_too_few_queries_were_issued_for_is_not_claimed() -> None:
    summary = parse_summary(SERVER_SUMMARY)
    assert latencies(summary, 63) == {"p50": 1.298910114, "p90": None, "p97": 2.461646621, "p99": None, "p99.9": None}
    assert latencies(summary, 662)["p99"] == 2.511713732
    assert latencies(summary, 6636)["p99.9"] == 2.611713732


def load(loadgen: str = "Server", **changes: Any) -> Load:
    values = {"duration_s": SHORT_S, "min_queries": 100, "qps": 500.0, "latency_bound_s": BOUND_S, "samples_per_query": 8, "batch_size": 4}
    return Load(loadgen, **{**values, **changes})


def test_an_invalid_result_carries_loadgens_reasons_and_a_valid_one_none() -> None:
    kind = find_scenario("server")
    invalid = judge(kind, "v", "cpu", load(), SERVER_SUMMARY, 52)
    assert (invalid.valid, invalid.metric, invalid.value, invalid.queries) == (False, "qps", 19.56, 52)
    assert invalid.reasons[0] == "Reduce target QPS to improve latency."
    assert len(invalid.reasons) == 4
    assert judge(kind, "v", "cpu", load(), SERVER_SUMMARY.replace("INVALID", "VALID"), 52).reasons == ()


@pytest.mark.parametrize("text", ["", "Scenario : Server\n"])
def test_a_summary_without_a_verdict_is_refused(text: str) -> None:
    with pytest.raises(Unusable, match="no result"):
        parse_summary(text)


def test_a_summary_of_another_loadgen_is_refused_in_words() -> None:
    with pytest.raises(Unusable, match=r"lacks what offline is about .*Samples per second"):
        judge(find_scenario("offline"), "v", "cpu", load(), SERVER_SUMMARY, 1)


@pytest.mark.parametrize("qps", [10.0, 500.0, 20000.0])
def test_a_backlog_that_ends_a_run_is_one_that_no_valid_run_has(qps: float) -> None:
    asked = load(qps=qps, duration_s=5.0, min_queries=MIN_QUERIES)
    run_s = max(5.0, MIN_QUERIES / qps)
    stall_s = asked.max_waiting / qps  # as long as it takes for so many to arrive
    late = (stall_s - BOUND_S) * qps
    assert late > 0.01 * run_s * qps


# Who answers: no LoadGen needed.


class Binding:
    """What of LoadGen's package the answering side uses; it keeps the answers."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, int, int]] = []

    QuerySampleResponse = staticmethod(lambda sample, address, size: (sample, address, size))

    def QuerySamplesComplete(self, responses: Sequence[tuple[int, int, int]]) -> None:  # noqa: N802  # LoadGen's name
        self.answers += responses


class Logits:
    """Answers with known logits, and keeps how many images each launch had."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.launches: list[list[int]] = []
        self.kept: list[torch.Tensor] = []
        self.fail_at = fail_at

    def __call__(self, indices: Sequence[int]) -> torch.Tensor:
        if len(self.launches) == self.fail_at:
            raise RuntimeError("no more memory")
        self.launches.append(list(indices))
        self.kept.append(torch.zeros(len(indices), CLASSES))
        return self.kept[-1]


def test_a_query_is_answered_in_launches_of_at_most_the_batch_size() -> None:
    binding, respond = Binding(), Logits()
    system = System(binding, respond, 4)
    system.issue([100, 101, 102, 103, 104, 105], [7, 6, 5, 4, 3, 2])
    assert respond.launches == [[7, 6, 5, 4], [3, 2]]
    assert [sample for sample, _, _ in binding.answers] == [100, 101, 102, 103, 104, 105]
    rows = [row for logits in respond.kept for row in logits]
    assert [(address, size) for _, address, size in binding.answers] == [(row.data_ptr(), 4 * CLASSES) for row in rows]


def test_what_fails_is_kept_and_every_sample_is_answered_all_the_same() -> None:
    binding, respond = Binding(), Logits(fail_at=1)
    system = System(binding, respond, 2)
    system.issue([1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0])
    system.issue([7], [0])
    assert [sample for sample, _, _ in binding.answers] == [1, 2, 3, 4, 5, 6, 7]
    assert str(system.error) == "no more memory"
    assert len(respond.launches) == 1
    assert system.queries == 2


@pytest.mark.parametrize("wrong", [torch.zeros(3, CLASSES), torch.zeros(0), torch.tensor(1.0)])
def test_scores_that_are_not_one_row_an_image_are_an_error(wrong: torch.Tensor) -> None:
    binding = Binding()
    system = System(binding, lambda indices: wrong, 2)
    system.issue([1, 2], [0, 0])
    assert binding.answers == [(1, 0, 0), (2, 0, 0)]
    assert isinstance(system.error, (ValueError, TypeError))


def served(server: Server, queries: int) -> None:
    """Run the server's thread over queries that are all waiting already."""
    for number in range(queries):
        server.issue([number], [number % 3])
    server.flush()
    server.serve(contextlib.nullcontext)


def test_a_server_answers_what_is_waiting_together_up_to_its_batch_size() -> None:
    binding, respond = Binding(), Logits()
    served(Server(binding, respond, 4), 10)
    assert [len(launch) for launch in respond.launches] == [4, 4, 2]
    assert sum(respond.launches, []) == [number % 3 for number in range(10)]  # noqa: RUF017  # ten
    assert [sample for sample, _, _ in binding.answers] == list(range(10))


def test_a_server_does_not_wait_for_a_batch_to_fill() -> None:
    binding, respond = Binding(), Logits()
    server = Server(binding, respond, 4)
    thread = threading.Thread(target=server.serve, args=(contextlib.nullcontext,))
    thread.start()
    for number in range(3):
        server.issue([number], [0])
        while len(binding.answers) <= number:
            time.sleep(0.001)
    server.flush()
    thread.join()
    assert [len(launch) for launch in respond.launches] == [1, 1, 1]


def test_a_stopped_server_holds_its_queries_until_none_follows_and_answers_each_once() -> None:
    binding, respond = Binding(), Logits(fail_at=1)
    server = Server(binding, respond, 2)
    thread = threading.Thread(target=server.serve, args=(contextlib.nullcontext,))
    for number in range(6):
        server.issue([number], [0])
    thread.start()
    while server.error is None:
        time.sleep(0.001)
    assert [sample for sample, _, _ in binding.answers] == [0, 1]
    server.flush()
    thread.join()
    assert [sample for sample, _, _ in binding.answers] == [0, 1, 2, 3, 4, 5]


def test_a_server_whose_thread_cannot_compute_answers_all_the_same() -> None:
    @contextlib.contextmanager
    def broken() -> Iterator[None]:
        raise RuntimeError("no stream")
        yield

    binding, respond = Binding(), Logits()
    server = Server(binding, respond, 2)
    server.issue([5], [0])
    server.flush()
    server.serve(broken)
    assert binding.answers == [(5, 0, 0)]
    assert str(server.error) == "no stream"
    assert respond.launches == []


# What is asked for.


@pytest.fixture(scope="module")
def network() -> Checkpoint:
    """An untrained lenet5."""
    return api.load("lenet5")


@pytest.fixture(scope="module")
def images(digits: Dataset, network: Checkpoint) -> torch.Tensor:
    """uint8 digits of the model's size."""
    return fit(digits.test_images[:100], network.metadata().preprocessing)


class Known:
    """A session without arithmetic; a launch takes at least `launch_s`, and does `then` with the number of launches so far."""

    device = CPU
    node_providers: tuple[NodePlacement, ...] = ()

    def __init__(self, input_shape: tuple[int, int, int], launch_s: float, then: Callable[[int], object] = lambda count: None) -> None:
        self.shape, self.launch_s, self.then = input_shape, launch_s, then
        self.launches = 0
        self.batch = 0

    def bind(self, batch_size: int) -> torch.Tensor:
        self.batch = batch_size
        return torch.zeros(batch_size, *self.shape)

    def launch(self) -> torch.Tensor:
        time.sleep(self.launch_s)
        self.launches += 1
        self.then(self.launches)
        return torch.zeros(self.batch, CLASSES)


def known(network: Checkpoint, launch_s: float, then: Callable[[int], object] = lambda count: None) -> Known:
    return Known(network.metadata().preprocessing.input_shape, launch_s, then)


def run(network: Checkpoint, images: torch.Tensor, session: Session, name: str, **options: Any) -> LoadResult:
    with computing_on(CPU):
        return run_scenario(session, images, network.metadata().preprocessing, name, **{"variant": "some/variant", **options})


def test_an_unknown_scenario_is_refused_with_the_nearest_names(network: Checkpoint, images: torch.Tensor) -> None:
    with pytest.raises(UnknownName, match="single-stream"):
        run(network, images, known(network, 0.0), "singlestream")


@pytest.mark.parametrize(
    "wrong",
    [
        {"duration_s": 0.0},
        {"duration_s": math.nan},
        {"latency_bound_s": -1.0},
        {"latency_bound_s": math.inf},
        {"batch_size": 0},
        {"samples_per_query": 0},
        {"samples_per_query": 101},
    ],
)
def test_a_number_that_makes_no_sense_is_refused(wrong: dict[str, float], network: Checkpoint, images: torch.Tensor) -> None:
    with pytest.raises(BadInput, match=re.escape(str(next(iter(wrong.values()))))):
        run(network, images, known(network, 0.0), "offline", **wrong)


@each_scenario
def test_where_loadgen_is_absent_the_fix_is_said_before_anything_runs(
    name: str, network: Checkpoint, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    session = known(network, 0.0)
    with pytest.raises(Unusable, match=re.escape("pip install 'lenet-deploy[loadgen]'")):
        run(network, images, session, name)
    assert session.launches == 0


def test_answers_are_the_models_scores_of_the_images_asked_for(network: Checkpoint, images: torch.Tensor) -> None:
    preprocessing = network.metadata().preprocessing
    with computing_on(CPU), eager.open_session(to_bytes(network), preprocessing.input_shape, "cpu") as session:
        responder = Responder(session, images, preprocessing)
        for indices in ([3], [9, 9, 0], [5, 1, 2], [7], [*range(100)]):
            expected = network.module()(normalise(images[indices], preprocessing))
            torch.testing.assert_close(responder(indices), expected, rtol=1e-5, atol=1e-5)


def test_each_answer_is_memory_of_its_own(network: Checkpoint, images: torch.Tensor) -> None:
    preprocessing = network.metadata().preprocessing
    data = export_torchscript(network.module(), network.metadata(), ExportOptions()).data
    with computing_on(CPU), onnxruntime.open_session(data, preprocessing.input_shape, "cpu") as session:
        responder = Responder(session, images, preprocessing)
        first = responder([0, 1])
        kept = first.clone()
        responder([2, 3])
        assert torch.equal(first, kept)


# Real LoadGen.


@pytest.fixture
def loadgen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """The package; and afterwards nothing is left: no output, no file where one works, no temporary folder, no thread."""
    pytest.importorskip("mlperf_loadgen", reason="needs MLPerf LoadGen: pip install 'lenet-deploy[loadgen]'")
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    (here / "audit.config").write_text("*.*.min_query_count = 7\n*.*.max_query_count = 7\n")  # which LoadGen would obey
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in here.iterdir()] == ["audit.config"]
    assert list(temporary.iterdir()) == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("loadgen")] == []


@contextlib.contextmanager
def opened(runtime: str, network: Checkpoint) -> Iterator[Session]:
    shape = network.metadata().preprocessing.input_shape
    if runtime == "eager":
        with eager.open_session(to_bytes(network), shape, "cpu") as session:
            yield session
    else:
        data = export_torchscript(network.module(), network.metadata(), ExportOptions()).data
        with onnxruntime.open_session(data, shape, "cpu") as session:
            yield session


@pytest.mark.usefixtures("loadgen")
@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        ("single-stream", "eager"),
        ("single-stream", "onnxruntime"),
        ("multi-stream", "onnxruntime"),
        ("server", "onnxruntime"),
        ("offline", "eager"),
    ],
)
def test_a_scenario_runs_on_a_real_session(name: str, runtime: str, network: Checkpoint, images: torch.Tensor) -> None:
    said: list[tuple[int, int, str]] = []
    with computing_on(CPU), opened(runtime, network) as session:
        result = run_scenario(
            session,
            images,
            network.metadata().preprocessing,
            name,
            variant="some/variant",
            duration_s=SHORT_S,
            latency_bound_s=BOUND_S,
            progress=lambda *call: said.append(call),
        )
    assert (result.variant, result.device, result.scenario) == ("some/variant", "cpu", name)
    assert result.summary["Scenario"] == find_scenario(name).loadgen
    assert result.summary["Result is"] == ("VALID" if result.valid else "INVALID")
    assert bool(result.reasons) != result.valid
    assert result.value > 0
    assert SEEDS.items() <= result.settings.items()
    assert result.summary["sample_index_rng_seed"] == str(SEEDS["sample_index_rng_seed"])
    assert [done for done, _, _ in said] == sorted(done for done, _, _ in said)
    assert said[-1][0] == said[-1][1]
    assert {what for _, _, what in said} == {"some/variant"}
    assert (result.probes != ()) == (name == "server")


@pytest.mark.usefixtures("loadgen")
@pytest.mark.parametrize(("name", "images_each", "percent"), [("single-stream", 1, "p90"), ("multi-stream", 8, "p99")])
def test_a_stream_is_valid_and_its_figure_is_the_latency_of_its_queries(
    name: str, images_each: int, percent: str, network: Checkpoint, images: torch.Tensor
) -> None:
    session = known(network, 0.001)
    result = run(network, images, session, name, duration_s=SHORT_S)
    assert result.valid
    assert session.batch == images_each == int(result.summary["samples_per_query"])
    assert result.queries >= MIN_QUERIES
    assert session.launches >= result.queries  # and those of the warm-up
    assert result.value == pytest.approx(result.latencies_s[percent])
    assert all(seconds is None or seconds >= 0.001 for seconds in result.latencies_s.values())
    assert result.latencies_s["p99.9"] is None


@pytest.mark.usefixtures("loadgen")
def test_offline_answers_all_images_in_launches_of_the_batch_size(network: Checkpoint, images: torch.Tensor) -> None:
    session = known(network, 0.002)
    result = run(network, images, session, "offline", duration_s=SHORT_S, batch_size=50)
    assert result.valid
    assert result.queries == 1
    assert result.latencies_s == {}
    assert 0 < result.value <= 50 / 0.002
    assert int(result.summary["samples_per_query"]) >= SHORT_S * result.value * 0.99


@pytest.mark.usefixtures("loadgen")
def test_the_server_finds_no_rate_beyond_what_its_batches_allow(network: Checkpoint, images: torch.Tensor) -> None:
    session = known(network, 0.001)
    result = run(network, images, session, "server", duration_s=SHORT_S, latency_bound_s=BOUND_S, batch_size=4)
    assert result.value <= 4 / 0.001
    if result.valid:
        assert result.latencies_s["p99"] is not None
        assert 0.001 <= result.latencies_s["p99"] <= BOUND_S
        assert result.settings["target_qps"] <= max(probe.target_qps for probe in result.probes if probe.valid)
    assert not any(probe.valid for probe in result.probes if probe.target_qps > 2 * 4 / 0.001)


@pytest.mark.usefixtures("loadgen")
def test_no_rate_is_searched_where_one_image_alone_breaks_the_bound(network: Checkpoint, images: torch.Tensor) -> None:
    result = run(network, images, known(network, 0.0015), "server", duration_s=SHORT_S, latency_bound_s=0.0005)
    assert not result.valid
    assert result.probes == ()
    assert result.reasons[0] == "Reduce target QPS to improve latency."


@pytest.mark.usefixtures("loadgen")
def test_a_run_for_which_too_few_queries_were_prepared_is_done_again(
    network: Checkpoint, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenarios, "HEADROOM", 0.4)
    result = run(network, images, known(network, 0.005), "offline", duration_s=SHORT_S)
    assert result.valid
    monkeypatch.setattr(scenarios, "HEADROOM", 0.01)
    result = run(network, images, known(network, 0.005), "offline", duration_s=2.0)
    assert not result.valid
    assert result.summary["Min duration satisfied"] == "NO"
    assert result.settings["expected_qps"] <= 0.01 * 2 ** (MAX_PREPARATIONS - 1) * 64 / 0.005


class Meddler:
    """Does something in the first launch that is LoadGen's."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act
        self.acted = False

    def __call__(self, count: int) -> None:
        if threading.current_thread() is not threading.main_thread() and not self.acted:
            self.acted = True
            self.act()


def failing(error: Exception) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


@pytest.mark.usefixtures("loadgen")
@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (RuntimeError("out of\nmemory"), Unusable, r"not answered \(out of\)"),
        (DamagedFile("a broken graph"), DamagedFile, "^a broken graph$"),
        (MemoryError(), Unusable, "MemoryError"),
    ],
)
@each_scenario
def test_what_fails_in_a_query_surfaces_as_an_error_long_before_the_run_would_end(
    name: str, raised: Exception, expected: type[Exception], words: str, network: Checkpoint, images: torch.Tensor
) -> None:
    session = known(network, 0.005, Meddler(failing(raised)))
    begin = time.monotonic()
    with pytest.raises(expected, match=words):
        run(network, images, session, name, duration_s=LONG_S, batch_size=8)
    assert time.monotonic() - begin < LONG_S


@pytest.mark.usefixtures("loadgen")
@each_scenario
def test_ctrl_c_ends_a_run_long_before_its_time(name: str, network: Checkpoint, images: torch.Tensor) -> None:
    main = threading.main_thread().ident
    assert main is not None
    session = known(network, 0.005, Meddler(lambda: signal.pthread_kill(main, signal.SIGINT)))
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(network, images, session, name, duration_s=LONG_S, batch_size=8)
    assert time.monotonic() - begin < LONG_S


@pytest.mark.usefixtures("loadgen")
def test_loadgen_works_again_after_a_run_that_failed(network: Checkpoint, images: torch.Tensor) -> None:
    with pytest.raises(Unusable):
        run(network, images, known(network, 0.002, Meddler(failing(ValueError()))), "single-stream", duration_s=LONG_S)
    assert run(network, images, known(network, 0.001), "single-stream", duration_s=SHORT_S).valid


@pytest.mark.usefixtures("loadgen")
@each_scenario
def test_a_session_that_does_not_take_the_batch_is_an_error_before_loadgen_starts(
    name: str, network: Checkpoint, images: torch.Tensor
) -> None:
    session = known(network, 0.0, lambda count: failing(RuntimeError("bad shape"))())
    with pytest.raises(Unusable, match=r"some/variant does not answer .*bad shape"):
        run(network, images, session, name)
    assert session.launches == 1


@pytest.mark.usefixtures("loadgen")
def test_an_overloaded_server_is_given_up_before_its_time() -> None:
    def respond(indices: Sequence[int]) -> torch.Tensor:
        time.sleep(0.002)
        return torch.zeros(len(indices), CLASSES)

    asked = load(qps=4000.0, duration_s=5.0, batch_size=1)
    text, queries = run_test(asked, 10, respond, contextlib.nullcontext)
    assert parse_summary(text)["Result is"] == "INVALID"
    assert asked.max_waiting < queries < 4000.0 * 5.0 / 2


@pytest.mark.usefixtures("loadgen")
def test_the_percentiles_that_results_are_named_for_are_loadgens_defaults() -> None:
    settings = load_binding().TestSettings()
    assert settings.single_stream_target_latency_percentile == 0.90
    assert settings.multi_stream_target_latency_percentile == 0.99
    assert settings.server_target_latency_percentile == 0.99


# The tables.

RESULT = LoadResult(
    variant="onnx/ort-cpu/fp32",
    device="cpu",
    scenario="server",
    valid=False,
    metric="qps",
    value=12345.6,
    queries=52,
    latencies_s={"p50": 0.0004, "p90": 0.0021, "p99": None},
    settings={"target_qps": 13000.0, "min_duration_s": 10.0},
    summary={"Result is": "INVALID"},
    reasons=("Reduce target QPS to improve latency.", "Run unsuccessful."),
    probes=(LoadProbe(6500.0, True, 0.0123, 1300), LoadProbe(13000.0, False, None, 52)),
)


def test_the_table_has_the_verdict_the_figure_with_its_unit_and_the_reasons() -> None:
    (row,) = load_table([RESULT]).rows
    assert row[:5] == ("onnx/ort-cpu/fp32", "server", "invalid", "qps", "12,346 queries/s")
    assert row[5:9] == ("400.0 us", "2.100 ms", "-", "-")
    assert row[9:] == ("52", "Reduce target QPS to improve latency.; Run unsuccessful.")


def test_a_run_shorter_than_usual_says_so() -> None:
    short = dataclasses.replace(RESULT, settings={"min_duration_s": 0.5}, reasons=())
    assert load_table([short]).rows[0][-1] == "of 0.5 s, where 10 s are usual"


@pytest.mark.parametrize(
    ("metric", "value", "words"),
    [("latency_p90_s", 0.00035, ("latency p90", "350.0 us")), ("throughput_ips", 25000.4, ("throughput", "25,000 images/s"))],
)
def test_a_figure_is_rendered_in_the_unit_of_its_name(metric: str, value: float, words: tuple[str, str]) -> None:
    (row,) = load_table([dataclasses.replace(RESULT, metric=metric, value=value)]).rows
    assert row[3:5] == words


def test_the_rates_that_were_tried_are_listed_in_order() -> None:
    whole = LoadProbe(13000.0, False, 0.5, 130_000)
    found = dataclasses.replace(RESULT, probes=(*RESULT.probes, whole), settings={"target_qps": 12380.0, "full_runs": 2})
    assert to_text(probe_table(found)).splitlines()[2:] == [
        "short      6,500  valid     12.300 ms    1,300",
        "short     13,000  invalid           -       52",
        "full      13,000  invalid  500.000 ms  130,000",
        "full      12,380  invalid           -       52",
    ]


def test_runs_of_full_length_that_fail_are_listed_and_the_result_is_one_at_a_lower_rate(
    network: Checkpoint, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlperf_loadgen")
    tried: list[tuple[float, float]] = []

    def once(self: object, asked: Load) -> LoadResult:
        tried.append((asked.duration_s, asked.qps))
        whole = [each for each in tried if each[0] == 5.0]
        valid = asked.qps <= 300.0 if asked.duration_s < 5.0 else len(whole) == 3
        return dataclasses.replace(RESULT, valid=valid, probes=(), settings=asked.settings)

    monkeypatch.setattr("lenet_deploy.bench.scenarios._Bench.once", once)
    result = run(network, images, known(network, 0.002), "server", duration_s=5.0, latency_bound_s=BOUND_S)
    assert result.valid
    assert result.settings["full_runs"] == 3
    rates = [qps for duration, qps in tried if duration == 5.0]
    assert [probe.target_qps for probe in result.probes[-2:]] == rates[:2]
    assert [probe.valid for probe in result.probes[-2:]] == [False, False]
    assert [row[0] for row in probe_table(result).rows[-3:]] == ["full"] * 3
    assert rates[0] > rates[1] > rates[2] == result.settings["target_qps"]

"""Two results of bench: the verdicts, on synthetic runs whose truth is known, and what is refused or noted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lenet_deploy.bench import statistics
from lenet_deploy.bench.compare import EXTENT, THRESHOLD_PERCENT, compare
from lenet_deploy.bench_records import BenchReport, ComparisonReport, MachineState, Measurement, Visit
from lenet_deploy.errors import BadInput
from lenet_deploy.records import Environment, Failure
from lenet_deploy.report.comparison import comparison_counts, comparison_lines, comparison_markdown, comparison_table, terminal_table
from lenet_deploy.store import bench_json, comparison_json, read_bench

OLD = Path(__file__).parent / "data" / "bench-1.json"
MACHINE = Environment("Linux-6.1-x86_64", "3.11.7", "A CPU", 2, 2, None, None, {"torch": "2.15.0", "onnx": "1.23.2"}, "a" * 40)
OPTIONS = {"profile": "full", "seed": 0, "baseline": None, "allow_tf32": False, "ort": {}}


@dataclass(frozen=True)
class Noise:
    """What makes the times of one case differ, as standard deviations of their logarithms and shares.

    Attributes:
        process: offset of a process.
        visit: offset of a visit.
        burst: share of visits that something else on the machine slows down, by 10 % on average (exponential).
        launch: spread of the launches of a visit, to the right of its fastest; one in fifty is far out besides (Pareto).
    """

    process: float
    visit: float
    burst: float
    launch: float


# Measured at batch 1 on a machine of two shared cores (eager, TorchScript and ONNX Runtime; 6 processes of 8 visits of 80 ms): processes
# differ by 0.2 to 0.4 %, visits of one process by 0.1, 0.5 and 0.8 % (from the median absolute deviation), 2, 4 and 12 % of visits are more
# than 5 % above the rest, and the launches of a visit have an interquartile range of 1 to 5 % with p99 at 2 to 19 times the median.
MODERATE = Noise(process=0.003, visit=0.006, burst=0.05, launch=0.03)
# The same machine while others compute on it, or a laptop.
HARSH = Noise(process=0.01, visit=0.03, burst=0.10, launch=0.05)
# (processes, visits of each) of the profiles.
QUICK, FULL = (1, 6), (3, 8)


def measurement(
    blocks: Sequence[Sequence[float]],
    processes: int = 1,
    variant: str = "eager/torch-cpu/fp32",
    batch_size: int = 1,
    flag: str | None = None,
    device: str = "cpu",
) -> Measurement:
    """A measurement of the given visits, dealt to processes in turn."""
    visits = tuple(Visit(i % processes, i // processes, len(block), 0, 1000 * batch_size, 1.0, flag=flag) for i, block in enumerate(blocks))
    times = tuple(time for block in blocks for time in block)
    return Measurement(variant, device, batch_size, "device", times, 1, visits, 20, "precise", 1000, None)


def report(*rows: Measurement, **changes: Any) -> BenchReport:
    return dataclasses.replace(BenchReport(rows, (), MACHINE, OPTIONS), **changes)


def steady(time_s: float, visits: int = 8, **given: Any) -> Measurement:
    """Visits within half a percent of each other."""
    return measurement([[time_s * (1 + 0.001 * (i % 5))] * 3 for i in range(visits)], **given)


def simulated(
    generator: np.random.Generator, noise: Noise, layout: tuple[int, int], time_s: float = 1e-4, launches: int = 20
) -> Measurement:
    """One case as a run with this noise would have it."""
    processes, each = layout
    count = processes * each
    offsets = generator.normal(0, noise.process, processes)[np.arange(count) % processes] + generator.normal(0, noise.visit, count)
    offsets += (generator.random(count) < noise.burst) * generator.exponential(0.10, count)
    shape = (count, launches)
    times = np.exp(offsets[:, None] + np.abs(generator.normal(0, noise.launch, shape)))
    times *= 1 + (generator.random(shape) < 0.02) * generator.pareto(1.5, shape)
    return measurement((time_s * times).tolist(), processes)


def verdicts(pairs: Iterable[tuple[Measurement, Measurement]]) -> list[str]:
    return [compare(report(base), report(head)).rows[0].verdict for base, head in pairs]


def only(found: ComparisonReport) -> str:
    (row,) = found.rows
    return row.verdict


@pytest.fixture
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the time of many comparisons; the ends of an interval then have a noise of a few percent of its width."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1_999)


@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize("layout", [QUICK, FULL], ids=["quick", "full"])
def test_of_four_hundred_pairs_without_a_change_at_most_one_percent_is_called_slower(layout: tuple[int, int]) -> None:
    generator = np.random.default_rng(11)
    found = verdicts((simulated(generator, MODERATE, layout), simulated(generator, MODERATE, layout)) for _ in range(400))
    assert found.count("slower") <= 4
    assert found.count("faster") <= 4
    if layout == FULL:
        assert found.count("same") >= 0.95 * 400


@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize("layout", [QUICK, FULL], ids=["quick", "full"])
def test_harsh_noise_makes_the_answer_inconclusive_and_not_wrong(layout: tuple[int, int]) -> None:
    generator = np.random.default_rng(12)
    found = verdicts((simulated(generator, HARSH, layout), simulated(generator, HARSH, layout)) for _ in range(200))
    assert found.count("slower") <= 2
    assert found.count("faster") <= 2
    assert found.count("inconclusive") >= 100


@pytest.mark.usefixtures("fewer_resamples")
def test_a_slowdown_of_five_percent_is_found_in_at_least_95_percent() -> None:
    generator = np.random.default_rng(13)
    found = verdicts((simulated(generator, MODERATE, FULL), simulated(generator, MODERATE, FULL, 1.05e-4)) for _ in range(200))
    assert found.count("slower") >= 0.95 * 200
    assert found.count("same") == found.count("faster") == 0


@pytest.mark.parametrize(
    ("change", "verdict"),
    [(1.10, "slower"), (1.0, "same"), (1.015, "same"), (0.90, "faster"), (1.03, "inconclusive"), (0.97, "inconclusive")],
)
def test_the_verdict_follows_from_where_the_interval_lies(change: float, verdict: str) -> None:
    found = compare(report(steady(1e-3)), report(steady(change * 1e-3)))
    (row,) = found.rows
    assert row.verdict == verdict
    assert row.ratio == pytest.approx(change)
    assert row.ci95 is not None
    assert row.ci95[0] <= change <= row.ci95[1]
    assert (row.base_visits, row.head_visits) == (8, 8)
    assert (row.base_median_s, row.head_median_s) == (pytest.approx(1.002e-3, rel=1e-3), pytest.approx(change * 1.002e-3, rel=1e-3))
    assert (row.reason is None) == (verdict != "inconclusive")


@pytest.mark.parametrize(("there", "back"), [(1.10, "faster"), (1.0, "same"), (0.90, "slower")])
def test_swapping_the_files_turns_the_verdict_round(there: float, back: str) -> None:
    base, head = report(steady(1e-3)), report(steady(there * 1e-3))
    (forth,), (turned,) = compare(base, head).rows, compare(head, base).rows
    assert turned.verdict == back
    assert forth.ratio is not None
    assert turned.ratio == pytest.approx(1 / forth.ratio)


def test_the_threshold_is_what_a_change_must_exceed() -> None:
    base, head = report(steady(1e-3)), report(steady(1.05e-3))
    assert [only(compare(base, head, threshold)) for threshold in (1.0, THRESHOLD_PERCENT, 10.0)] == ["slower", "slower", "same"]


@pytest.mark.parametrize("threshold", [0.0, -3.0, 100.0, float("nan"), float("inf")])
def test_a_threshold_out_of_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(BadInput, match="above 0 and below 100"):
        compare(report(steady(1.0)), report(steady(1.0)), threshold)


def test_the_report_says_slower_before_inconclusive_before_not_slower() -> None:
    cases = {"slower": 1.2, "inconclusive": 1.03, "same": 1.0, "faster": 0.8}
    base = [steady(1.0, variant=name) for name in cases]
    head = [steady(change, variant=name) for name, change in cases.items()]
    assert [row.verdict for row in compare(report(*base), report(*head)).rows] == list(cases)
    said = [compare(report(*base[i:]), report(*head[i:])).verdict for i in range(4)]
    assert said == ["slower", "inconclusive", "not slower", "not slower"]


@pytest.mark.parametrize(("base", "head"), [(5, 8), (8, 5), (1, 1)])
def test_too_few_visits_are_inconclusive_however_large_the_change(base: int, head: int) -> None:
    (row,) = compare(report(steady(1.0, base)), report(steady(2.0, head))).rows
    assert (row.verdict, row.ci95) == ("inconclusive", None)
    assert row.ratio == pytest.approx(2.0, rel=0.01)
    assert row.reason is not None
    for side, count in (("base", base), ("head", head)):
        assert (f"{side} has {count} visit" in row.reason) == (count < 6)


def test_a_measurement_with_every_sample_flagged_is_inconclusive() -> None:
    throttled = steady(1.0, flag="throttled")
    for base, head, side in ((steady(1.0), throttled, "head"), (throttled, steady(1.0), "base")):
        (row,) = compare(report(base), report(head)).rows
        assert (row.verdict, row.ratio, row.ci95) == ("inconclusive", None, None)
        assert row.reason == f"all 24 samples of {side} were flagged"


def test_a_flagged_visit_counts_for_nothing() -> None:
    slow = measurement([[9.0]] * 4, flag="throttled")
    head = dataclasses.replace(steady(1.0), times_s=steady(1.0).times_s + slow.times_s, visits=steady(1.0).visits + slow.visits)
    (row,) = compare(report(steady(1.0)), report(head)).rows
    assert (row.verdict, row.head_visits) == ("same", 8)
    assert "head: 4 samples flagged and left out" in row.warnings


def test_a_measurement_without_visits_is_inconclusive() -> None:
    (row,) = compare(report(steady(1.0)), report(measurement([]))).rows
    assert (row.verdict, row.reason) == ("inconclusive", "head has 0 visits, 6 are needed")


def test_what_only_one_file_has_is_listed_with_the_reason_of_the_other() -> None:
    base = report(steady(1.0, variant="gone"), steady(1.0, variant="kept"), steady(1.0, variant="kept", batch_size=8))
    failed = Failure("gone", "the package is absent")
    head = report(steady(1.0, variant="kept"), steady(1.0, variant="new"), skipped=(failed,))
    found = compare(base, head)
    assert [(row.variant, row.batch_size, row.verdict) for row in found.rows] == [
        ("gone", 1, "only in base"),
        ("kept", 1, "same"),
        ("kept", 8, "only in base"),
        ("new", 1, "only in head"),
    ]
    gone, _, other_batch, new = found.rows
    assert gone.reason == "the other file skipped it: the package is absent"
    assert (gone.base_median_s, gone.head_median_s) == (pytest.approx(1.002, rel=1e-3), None)
    assert other_batch.reason is None
    assert (new.base_visits, new.head_visits) == (0, 8)
    assert found.verdict == "incomplete", "what no longer runs must not pass"
    assert compare(head, report(*head.measurements, *base.measurements[2:])).verdict == "not slower", "what is new may"


def test_files_without_a_case_in_common_are_refused() -> None:
    for base, head in ((report(steady(1.0)), report(steady(1.0, batch_size=2))), (report(), report(steady(1.0))), (report(), report())):
        with pytest.raises(BadInput, match="nothing to compare"):
            compare(base, head)


def test_a_case_that_a_file_holds_twice_is_refused() -> None:
    with pytest.raises(BadInput, match=r"head holds eager/torch-cpu/fp32 at batch 1, scope device, on cpu, twice"):
        compare(report(steady(1.0)), report(steady(1.0), steady(2.0)))


@pytest.mark.parametrize("time", [0.0, -1.0, float("nan"), float("inf"), "1", None])
def test_times_that_are_no_times_are_refused(time: Any) -> None:
    odd = measurement([[1.0]] * 7 + [[time]])
    with pytest.raises(BadInput, match="not numbers above 0"):
        compare(report(odd), report(steady(1.0)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("cpu", "Another CPU"), ("cores", 4), ("threads", 1), ("gpu", "A GPU"), ("driver", "999.1"), ("os", "macOS")],
)
def test_unlike_machines_are_refused_by_the_name_of_what_differs(field: str, value: str | int) -> None:
    other = dataclasses.replace(MACHINE, **{field: value})
    with pytest.raises(BadInput, match=rf"{field} is .* in base, {value} in head.*--across-machines"):
        compare(report(steady(1.0)), report(steady(1.0), environment=other))


@pytest.mark.parametrize(("option", "value"), [("allow_tf32", True), ("ort", {"k": "v"}), ("an_option_of_tomorrow", 2)])
def test_options_that_decide_times_must_agree(option: str, value: object) -> None:
    base = report(steady(1.0), options={**OPTIONS, "an_option_of_tomorrow": 1})
    head = report(steady(1.0), options={**base.options, option: value})
    with pytest.raises(BadInput, match=f"{option} is "):
        compare(base, head)


@pytest.mark.parametrize("option", EXTENT)
def test_options_that_only_say_how_much_was_measured_may_differ(option: str) -> None:
    base, head = (report(steady(1.0), options={**OPTIONS, option: value}) for value in (1, 2))
    assert only(compare(base, head)) == "same"


def test_versions_commits_and_kernels_may_differ_and_are_noted() -> None:
    other = dataclasses.replace(
        MACHINE, os="Linux-6.9-x86_64", python="3.12.1", versions={"torch": "2.16.0", "numpy": "2.4.6"}, commit="b" * 40
    )
    found = compare(report(steady(1.0)), report(steady(1.0), environment=other))
    assert only(found) == "same"
    for said in (
        "os is Linux-6.1-x86_64 in base, Linux-6.9-x86_64 in head",
        "python is 3.11.7 in base, 3.12.1 in head",
        f"commit is {'a' * 40} in base, {'b' * 40} in head",
        "torch is 2.15.0 in base, 2.16.0 in head",
        "onnx is 1.23.2 in base, none in head",
        "numpy is none in base, 2.4.6 in head",
    ):
        assert said in found.notes


def test_what_weakens_a_file_is_noted() -> None:
    state = MachineState(0, {}, {}, ("load 3.1 on 2 cores",))
    head = report(steady(1.0), partial="interrupted in round 2", machine=(state, dataclasses.replace(state, process=1)), options={})
    notes = compare(report(steady(1.0, processes=2)), head).notes
    assert "head is partial: interrupted in round 2" in notes
    assert notes.count("head was measured on a noisy machine: load 3.1 on 2 cores") == 1
    assert "option allow_tf32 is not in head, so that it may have been another" in notes
    assert [note.partition(" is from one process")[0] for note in notes if "one process" in note] == ["head"]


def relative(scale: float, eager: float, ort: float, **changes: Any) -> BenchReport:
    """Two variants of a machine that is `scale` times as slow and gets slower all the while."""

    def drifting(time_s: float, variant: str) -> Measurement:
        return measurement([[scale * time_s * 1.2**i * (1 + 0.001 * (i % 3))] * 3 for i in range(8)], variant=variant)

    return report(drifting(eager, "eager"), drifting(ort, "ort"), **changes)


ELSEWHERE = dataclasses.replace(MACHINE, cpu="Another CPU", cores=64)


def test_across_machines_only_ratios_to_the_baseline_are_compared() -> None:
    base, head = relative(1.0, 2.0, 1.0), relative(5.0, 2.0, 1.0, environment=ELSEWHERE)
    found = compare(base, head, across_machines=True)
    (row,) = found.rows
    assert (row.variant, row.verdict, row.ratio) == ("ort", "same", pytest.approx(1.0))
    assert found.baselines == {"cpu": "eager"}
    assert found.notes[:3] == (
        "on cpu, times are relative to eager in the same file",
        "cpu is A CPU in base, Another CPU in head",
        "cores is 2 in base, 64 in head",
    )


@pytest.mark.parametrize(("ort", "verdict"), [(1.1, "slower"), (0.9, "faster")])
def test_across_machines_a_variant_that_lost_against_its_baseline_is_slower(ort: float, verdict: str) -> None:
    (row,) = compare(relative(1.0, 2.0, 1.0), relative(0.2, 2.0, ort, environment=ELSEWHERE), across_machines=True).rows
    assert (row.verdict, row.ratio) == (verdict, pytest.approx(ort))


def test_across_machines_the_baseline_is_the_one_both_were_measured_against() -> None:
    named = {**OPTIONS, "baseline": "ort"}
    both = compare(relative(1.0, 2.0, 1.0, options=named), relative(3.0, 2.0, 1.0, options=named), across_machines=True)
    assert (both.baselines, [row.variant for row in both.rows]) == ({"cpu": "ort"}, ["eager"])
    one = compare(relative(1.0, 2.0, 1.0, options=named), relative(3.0, 2.0, 1.0), across_machines=True)
    assert one.baselines == {"cpu": "eager"}


def test_across_machines_a_case_without_the_baseline_is_inconclusive() -> None:
    lone = steady(1.0, variant="ort", batch_size=8)
    found = compare(report(steady(2.0), lone), report(steady(2.0), lone), across_machines=True)
    (row,) = found.rows
    assert row.verdict == "inconclusive"
    assert row.reason is not None
    assert row.reason.startswith("eager/torch-cpu/fp32, the baseline, was not measured")


def test_across_machines_each_device_has_its_own_baseline() -> None:
    rows = [steady(1.0, variant=f"{name}-{device}", device=device) for device in ("cpu", "cuda:0") for name in ("eager", "ort")]
    found = compare(report(*rows), report(*rows), across_machines=True)
    assert found.baselines == {"cpu": "eager-cpu", "cuda:0": "eager-cuda:0"}
    assert [(row.variant, row.verdict) for row in found.rows] == [("ort-cpu", "same"), ("ort-cuda:0", "same")]


def test_across_machines_a_baseline_alone_is_nothing_to_compare() -> None:
    with pytest.raises(BadInput, match="beside the baseline"):
        compare(report(steady(1.0)), report(steady(1.0)), across_machines=True)


def test_across_machines_visits_without_the_baselines_do_not_count() -> None:
    short = report(steady(2.0, 4), steady(1.0, 8, variant="ort"))
    (row,) = compare(short, report(steady(2.0), steady(1.0, variant="ort")), across_machines=True).rows
    assert (row.verdict, row.base_visits, row.reason) == ("inconclusive", 4, "base has 4 visits, 6 are needed")


def test_a_file_of_version_1_is_read_and_inconclusive_since_it_has_no_visits() -> None:
    old = read_bench(OLD)
    new = report(*(steady(2e-4, variant=each.variant) for each in old.measurements), environment=old.environment)
    found = compare(old, new)
    assert len(found.rows) == 2
    assert {row.verdict for row in found.rows} == {"inconclusive"}
    assert {row.reason for row in found.rows} == {"base has 1 visit, 6 are needed"}
    assert all(row.ratio is not None for row in found.rows)


def test_a_report_compares_the_same_after_a_trip_through_its_file(tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    base, head = (report(simulated(generator, MODERATE, FULL)) for _ in range(2))
    paths = [tmp_path / name for name in ("base.json", "head.json")]
    for path, each in zip(paths, (base, head), strict=True):
        path.write_text(bench_json(each))
    assert compare(read_bench(paths[0]), read_bench(paths[1])) == compare(base, head)


def test_the_json_holds_every_row_both_environments_and_the_verdict() -> None:
    found = compare(report(steady(1.0), steady(1.0, variant="gone")), report(steady(1.2)))
    document = json.loads(comparison_json(found))
    assert document["schema"] == "lenet-deploy/comparison/1"
    assert (document["verdict"], document["threshold_percent"], document["across_machines"]) == ("slower", 3.0, False)
    assert (document["base_environment"], document["environment"]) == (dataclasses.asdict(MACHINE), dataclasses.asdict(MACHINE))
    slower, gone = document["rows"]
    assert set(slower) >= {
        "variant",
        "device",
        "batch_size",
        "scope",
        "verdict",
        "ratio",
        "ci95",
        "base_median_s",
        "head_median_s",
        "reason",
    }
    assert slower["ci95"][0] > 1.03
    assert (gone["verdict"], gone["ratio"], gone["ci95"]) == ("only in base", None, None)


def test_the_table_has_a_row_a_case_and_the_markdown_says_the_verdict_first() -> None:
    base = report(steady(1e-3), steady(1e-3, variant="gone"), steady(1e-3, 3, variant="short"))
    found = compare(base, report(steady(1.2e-3), steady(1e-3, variant="short")))
    table = comparison_table(found)
    assert [row[0] for row in table.rows] == ["eager/torch-cpu/fp32", "gone", "short"]
    assert dict(zip(table.columns, table.rows[0], strict=True)) == {
        "variant": "eager/torch-cpu/fp32",
        "device": "cpu",
        "batch": "1",
        "scope": "device",
        "base": "1.002 ms",
        "head": "1.202 ms",
        "ratio": "1.200",
        "95 % interval": table.rows[0][7],
        "verdict": "slower",
        "remarks": "",
    }
    assert table.rows[1][5:8] == ("-", "-", "-")
    assert table.rows[2][9] == "base has 3 visits, 6 are needed"
    assert comparison_counts(found) == "1 slower, 1 inconclusive, 1 only in base"
    text = comparison_markdown(found)
    assert text.startswith("## Compared with base: slower\n\n1 slower, 1 inconclusive, 1 only in base; changes of up to 3 %")
    assert "| slower |" in text
    assert "remarks" not in terminal_table(found).columns
    assert comparison_lines(found) == ("base has 3 visits, 6 are needed: short (1 device)",)


def test_markdown_shows_a_files_words_as_they_are() -> None:
    hostile = report(steady(1.0), partial="<img src=x>\n# a heading")
    text = comparison_markdown(compare(report(steady(1.0)), hostile))
    assert "&lt;img src=x&gt; # a heading" in text
    assert "\n# a heading" not in text

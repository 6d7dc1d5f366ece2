"""Tables are aligned, escaped and say what the records hold, also where a record holds nothing."""

from __future__ import annotations

import dataclasses

import pytest

from lenet_deploy.bench_records import BatchChoice, BenchReport, ColdStart, Limit, MachineState, Measurement, Speedup, Visit
from lenet_deploy.models import MODELS
from lenet_deploy.records import (
    AccuracyRow,
    Artifact,
    Environment,
    Failure,
    LayerError,
    ParityReport,
    ParityResult,
    Prediction,
    RuntimeStatus,
)
from lenet_deploy.report.bench import bench_markdown, bench_notes, bench_table, interval, terminal_table, warning_lines
from lenet_deploy.report.table import Table, remark_lines, to_markdown, to_text, without
from lenet_deploy.report.tables import (
    accuracy_table,
    artifact_table,
    class_table,
    class_title,
    doctor_table,
    environment_line,
    layer_error_table,
    layer_error_tables,
    layer_table,
    parity_table,
    prediction_table,
)

ENVIRONMENT = Environment("Linux", "3.11.7", "Some CPU", 2, 2, None, None, {"torch": "2.15.0", "onnxruntime-gpu": "1.31.1"}, None)
FRUIT = Table(("fruit", "count", "note"), (("apple", "1,200", ""), ("fig", "-", "ripe"), ("pear", "7", "-")))


def columns_of(table: Table) -> dict[str, tuple[str, ...]]:
    return {name: tuple(row[i] for row in table.rows) for i, name in enumerate(table.columns)}


def test_text_pads_words_to_the_left_and_numbers_to_the_right() -> None:
    assert to_text(FRUIT).splitlines() == [
        "fruit  count  note",
        "-----  -----  ----",
        "apple  1,200",
        "fig        -  ripe",
        "pear       7  -",
    ]


def test_text_has_no_trailing_blanks_and_ends_without_a_newline() -> None:
    text = to_text(FRUIT)
    assert all(line == line.rstrip() for line in text.splitlines())
    assert not text.endswith("\n")


def test_text_of_a_table_without_rows_is_its_headings() -> None:
    assert to_text(Table(("a", "bcd"), ())) == "a  bcd\n-  ---"


def test_markdown_marks_columns_of_numbers() -> None:
    assert to_markdown(FRUIT).splitlines() == [
        "| fruit | count | note |",
        "| --- | ---: | --- |",
        "| apple | 1,200 |  |",
        "| fig | - | ripe |",
        "| pear | 7 | - |",
    ]


def test_markdown_escapes_what_would_end_a_cell() -> None:
    lines = to_markdown(Table(("a",), (("x|y",), ("p\nq",)))).splitlines()
    assert lines[2] == "| x\\|y |"
    assert len(lines) == 4


def test_a_line_break_in_a_cell_does_not_break_the_text_table() -> None:
    assert len(to_text(Table(("a", "b"), (("p\nq", "1"),))).splitlines()) == 3


@pytest.mark.parametrize(
    ("cells", "right"),
    [
        (("1", "2.5"), True),
        (("-3", "+4"), True),
        (("1.0 us", "2.0 ms"), True),
        (("1.0 us - 2.0 us", "-"), True),
        (("12/16", "100.00%"), True),
        (("1", "one"), False),
        (("-", "-"), False),
        (("", ""), False),
        (("6 x 28 x 28", "10"), False),
    ],
)
def test_a_column_is_numeric_when_every_filled_cell_starts_as_a_number(cells: tuple[str, ...], right: bool) -> None:
    rule = to_markdown(Table(("heading",), tuple((cell,) for cell in cells))).splitlines()[1]
    assert rule == ("| ---: |" if right else "| --- |")


def test_a_table_without_some_columns_keeps_the_others() -> None:
    assert without(FRUIT, "count") == Table(("fruit", "note"), (("apple", ""), ("fig", "ripe"), ("pear", "-")))


def test_remarks_that_differ_in_numbers_alone_are_one_line_with_their_rows_and_the_range() -> None:
    rows = [
        ("fp32/a", "1 device", ("noisy: 11% of the median", "drift: +1,018.5%")),
        ("fp32/a", "8 device", ("noisy: 25% of the median",)),
        ("b", "8 device", ("noisy: 8% of the median",)),
        ("b", "9 device", ("rare",)),
    ]
    assert remark_lines(rows) == (
        "noisy: 8% to 25% of the median: fp32/a (1 device, 8 device); b (8 device)",
        "drift: +1,018.5%: fp32/a (1 device)",
        "rare: b (9 device)",
    )
    assert remark_lines(rows[:1] + rows[:1])[0] == "noisy: 11% of the median: all 2 rows"
    assert remark_lines([]) == remark_lines([("a", "1 device", ())]) == ()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_layer_table_has_input_layers_and_their_sums(model: object) -> None:
    config = next(each for each in MODELS if each is model).defaults
    layers = config.layers()
    table = columns_of(layer_table((config.in_channels, config.image_size, config.image_size), layers))
    assert table["layer"] == ("input", *(layer.name for layer in layers), "total")
    assert table["output"][0] == f"{config.in_channels} x 32 x 32"
    assert table["parameters"][-1] == f"{sum(layer.parameters for layer in layers):,}"
    assert table["MACs"][-1] == f"{sum(layer.macs for layer in layers):,}"
    assert table["weight bytes"][-1] == f"{sum(layer.parameter_bytes for layer in layers):,}"
    assert table["output bytes"][-1] == f"{sum(layer.output_bytes for layer in layers):,}"


def test_the_layer_table_has_a_dash_where_a_layer_has_no_window() -> None:
    layers = MODELS[0].defaults.layers()
    table = columns_of(layer_table((3, 32, 32), layers))
    row = table["kind"].index("linear")
    assert [table[name][row] for name in ("kernel", "stride", "padding")] == ["-", "-", "-"]
    assert [table[name][1] for name in ("kernel", "stride", "padding")] == ["5", "1", "0"]


def test_the_artifact_table_shortens_digests_and_groups_digits() -> None:
    artifact = Artifact("onnx-fp32", "onnx", "model.onnx", "ab" * 32, 1234567, "unverified")
    assert artifact_table((artifact,)).rows == (("onnx-fp32", "model.onnx", "1,234,567", "ab" * 6, "unverified"),)


def passed(variant: str, error: float, used: float, agreement: float = 1.0, inputs: str = "digits") -> ParityResult:
    return ParityResult(variant, "pass", None, inputs, 1, error, error / 2, used, agreement)


def parity_rows(*results: ParityResult) -> tuple[tuple[str, ...], ...]:
    table = parity_table(ParityReport(results, (), ENVIRONMENT))
    assert table.columns == ("variant", "status", "checks", "max abs error", "budget used", "top-1", "diverges at", "reason")
    return table.rows


def test_the_parity_table_shows_each_variant_once_at_its_worst() -> None:
    assert parity_rows(passed("a", 1e-6, 0.1), passed("a", 3e-6, 0.25, 0.5), passed("b", 2e-6, 0.05)) == (
        ("a", "pass", "2/2", "3.00e-06", "0.25", "50.00%", "-", ""),
        ("b", "pass", "1/1", "2.00e-06", "0.05", "100.00%", "-", ""),
    )


def test_the_error_shown_is_that_of_the_first_input_set_whose_scores_are_like_each_other() -> None:
    (row,) = parity_rows(passed("a", 1e-6, 0.1), passed("a", 0.5, 0.3, inputs="large"))
    assert row[3:5] == ("1.00e-06", "0.3")


def test_checks_against_other_runs_do_not_stand_for_the_error_or_the_agreement_with_the_oracle() -> None:
    apart = ParityResult("a", "pass", None, "digits", 3, 7.0, 7.0, 0.9, 0.25, check="consistency")
    (row,) = parity_rows(passed("a", 1e-6, 0.1), apart)
    assert row == ("a", "pass", "2/2", "1.00e-06", "0.9", "100.00%", "-", "")


def test_the_parity_table_says_where_and_why_a_variant_failed_and_in_which_layer() -> None:
    bad = ParityResult("a", "fail", "image 0: too far", "normal", 3, 0.5, 0.25, 900.0, 0.0, first_divergent_layer="conv2")
    later = dataclasses.replace(bad, reason="and again", first_divergent_layer="fc1", batch_size=64)
    (row,) = parity_rows(passed("a", 1e-6, 0.1), bad, later)
    assert row == ("a", "fail", "1/3", "1.00e-06", "900", "0.00%", "conv2", "normal, batch 3: image 0: too far")


def test_the_parity_table_shows_dashes_for_what_is_unknown() -> None:
    results = (
        ParityResult("nan", "fail", "1 of 10 outputs are NaN", "normal", 1),
        ParityResult("unopened", "fail", "the artifact cannot be opened"),
        ParityResult("away", "skipped", "no GPU"),
        ParityResult("weights", "fail", "1 wrong in its tensors", "weights read back", check="weights", first_divergent_layer="fc2"),
    )
    assert parity_rows(*results) == (
        ("nan", "fail", "0/1", "-", "-", "-", "-", "normal, batch 1: 1 of 10 outputs are NaN"),
        ("unopened", "fail", "0/1", "-", "-", "-", "-", "the artifact cannot be opened"),
        ("away", "skipped", "-", "-", "-", "-", "-", "no GPU"),
        ("weights", "fail", "0/1", "-", "-", "-", "fc2", "weights read back: 1 wrong in its tensors"),
    )


def test_an_input_set_that_was_skipped_is_no_check_and_a_wrong_file_of_a_variant_that_cannot_run_is_a_failure() -> None:
    skipped = ParityResult("a", "skipped", "values beyond fp16", "large")
    assert parity_rows(passed("a", 1e-6, 0.1), skipped)[0][1:3] == ("pass", "1/1")
    wrong = ParityResult("b", "fail", "1 wrong in its tensors", "weights read back", check="weights")
    assert parity_rows(wrong, ParityResult("b", "skipped", "no GPU"))[0][1:3] == ("fail", "0/1")


LAYERS = (LayerError("graph", "conv1", "relu.2", 1e-6, 0.25, True), LayerError("graph", "conv2", "relu.5", None, None, False))


def test_the_layer_error_table_has_a_row_a_layer_and_dashes_for_what_cannot_be_compared() -> None:
    table = layer_error_table(LAYERS)
    assert table.columns == ("graph", "layer", "tensor", "max abs error", "budget used", "status")
    assert table.rows == (("graph", "conv1", "relu.2", "1.00e-06", "0.25", "pass"), ("graph", "conv2", "relu.5", "-", "-", "fail"))


def test_the_layer_error_tables_are_the_first_of_each_variant_under_its_name_and_inputs() -> None:
    plain = passed("a", 1e-6, 0.1)
    first, second = dataclasses.replace(plain, inputs="normal", layers=LAYERS), dataclasses.replace(plain, layers=LAYERS[:1])
    tables = layer_error_tables(ParityReport((plain, first, second, passed("b", 1.0, 0.1)), (), ENVIRONMENT))
    assert tables == (("a, normal", layer_error_table(LAYERS)),)


def measurement(times_s: tuple[float, ...], visits: int = 1) -> Measurement:
    share = len(times_s) // visits
    stretches = tuple(Visit(process=0, round=i, samples=share, singles=0, window_images=12345, window_s=1.0) for i in range(visits))
    return Measurement("eager/torch-cpu/fp32", "cpu", 8, "device", times_s, 1, stretches, 40, "precise", 248000, None)


def bench_row(times_s: tuple[float, ...], visits: int = 1, speedup: Speedup | None = None) -> dict[str, str]:
    found = (measurement(times_s, visits),)
    table = bench_table(BenchReport(found, (Failure("other", "no GPU"),), ENVIRONMENT, speedups=(speedup,) if speedup else ()))
    assert len(table.rows) == 1
    return dict(zip(table.columns, table.rows[0], strict=True))


def test_the_bench_table_shows_dashes_where_there_are_too_few_samples() -> None:
    row = bench_row((0.001,) * 5)
    assert (row["95 % interval"], row["p90"], row["p99"], row["speed-up"], row["limit"], row["bound"]) == ("-",) * 6
    assert (row["batch"], row["scope"], row["images/s"], row["warnings"]) == ("8", "device", "12,345", "")


def test_the_bench_table_shows_intervals_percentiles_and_warnings_where_there_are_enough() -> None:
    row = bench_row(tuple(i * 1e-5 for i in range(1, 701)), visits=7)
    assert row["median"] == "3.505 ms"
    assert row["p90"] == "6.301 ms"
    assert row["p99"] == "6.930 ms"
    low, high = row["95 % interval"].split(" - ")
    assert (low, high) == ("505.0 us", "6.505 ms"), "the visits' medians reach that far"
    assert "noisy" in row["warnings"]
    assert "drift" in row["warnings"]


def test_the_bench_table_shows_speed_ups_and_the_share_of_the_limit() -> None:
    name = "eager/torch-cpu/fp32"
    assert bench_row((1e-3,) * 6, 6, Speedup(name, name, 8, "device", 1.0, (1.0, 1.0), 6))["speed-up"] == "1 (baseline)"
    assert bench_row((1e-3,) * 6, 6, Speedup(name, "other", 8, "device", 1.5, (1.25, 2.0), 6))["speed-up"] == "1.50 (1.25 - 2.00)"
    assert bench_row((1e-3,) * 6, 6, Speedup(name, "other", 8, "device", 1.5, None, 2))["speed-up"] == "~1.50"
    limited = dataclasses.replace(measurement((1e-3,)), floors_s={"compute": 2e-4, "memory": 1e-4}, overhead_s=1e-5)
    row = dict(zip((t := bench_table(BenchReport((limited,), (), ENVIRONMENT))).columns, t.rows[0], strict=True))
    assert (row["limit"], row["bound"]) == ("20.0%", "compute")


def test_the_bench_table_has_a_row_also_where_every_sample_was_flagged() -> None:
    gone = dataclasses.replace(measurement((1e-3,)), visits=(dataclasses.replace(measurement((1e-3,)).visits[0], flag="throttled"),))
    row = bench_table(BenchReport((gone,), (), ENVIRONMENT)).rows[0]
    assert row[3] == "-"
    assert row[-1] == "all 1 samples were flagged"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (2.5e-7, "0.2 us"),
        (4.56e-5, "45.6 us"),
        (9.994e-4, "999.4 us"),
        (1e-3, "1.000 ms"),
        (0.25, "250.000 ms"),
        (2.0, "2.00 s"),
    ],
)
def test_times_are_in_the_unit_that_fits_them(seconds: float, shown: str) -> None:
    assert bench_row((seconds,))["median"] == shown


def test_the_bench_table_joins_its_warnings() -> None:
    assert bench_row((1.0, 1.0, 2.0, 3.0))["warnings"].startswith("grossly noisy: interquartile range is ")


WHOLE = BenchReport(
    (measurement((1e-3,)),),
    (Failure("other", "no GPU"),),
    ENVIRONMENT,
    options={"slo_s": 0.002},
    limits=(Limit("cpu", {"fp32": 8e10}, 1.2e10),),
    machine=(MachineState(0, {}, {}, ("busy",)), MachineState(1, {}, {}, ("busy", "steal"))),
    cold_starts=(ColdStart("v", 1.5, 0.1, 0.001, 0.01, 1.8, 8, 3 * 2**20),),
    batches=(BatchChoice("v", "device", 64, 8, "p99"),),
    partial="interrupted after 1 visits",
)


def test_a_bench_is_followed_by_its_cold_starts_batches_limits_and_what_makes_it_less_than_it_seems() -> None:
    text = "\n".join(bench_notes(WHOLE))
    assert "80.0 GFLOP/s" in text
    assert "best within 2 ms" in text
    assert "3 MiB" in text
    assert text.index("partial: interrupted after 1 visits") < text.index("noisy machine: busy") < text.index("noisy machine: steal")
    assert text.count("busy") == 1
    assert text.endswith(environment_line(ENVIRONMENT))
    assert bench_notes(BenchReport((), (), ENVIRONMENT)) == ("", environment_line(ENVIRONMENT))


def many(count: int, noisy: int, **changes: object) -> BenchReport:
    """A report of so many rows, of which some are noisy."""
    quiet, loud = measurement((1e-3,) * 12, 6), measurement((1e-3, 1.5e-3) * 6, 6)
    rows = tuple(dataclasses.replace(loud if i < noisy else quiet, batch_size=i + 1) for i in range(count))
    return dataclasses.replace(BenchReport(rows, (), ENVIRONMENT), **changes)  # type: ignore[arg-type]


def test_the_terminal_has_the_warnings_below_a_narrow_table() -> None:
    found = many(3, 2)
    assert "warnings" not in terminal_table(found).columns
    assert all(len(line) <= 120 for line in to_text(terminal_table(found)).splitlines())
    (line,) = warning_lines(found)
    assert line.startswith("grossly noisy: interquartile range is ")
    assert line.endswith(": eager/torch-cpu/fp32 (1 device, 2 device)")
    assert line in bench_notes(found)
    assert "grossly noisy" in bench_markdown(found)


def test_a_speed_up_without_an_interval_is_explained_below_the_table() -> None:
    name = "eager/torch-cpu/fp32"
    rough = many(1, 0, speedups=(Speedup(name, "other", 1, "device", 1.5, None, 2),))
    assert "~: too few visits for an interval" in bench_notes(rough)


def test_an_interval_names_a_unit_that_both_ends_share_once() -> None:
    assert [interval(each) for each in ((2e-4, 3e-4), (9e-4, 1e-3), None)] == ["200.0 - 300.0 us", "900.0 us - 1.000 ms", "-"]


def test_a_bench_in_markdown_has_the_same_and_what_was_skipped() -> None:
    text = bench_markdown(WHOLE)
    assert text.startswith("| variant | batch |")
    for part in ("**Best batch sizes**", "- noisy machine: steal", "- skipped: `other`: no GPU", environment_line(ENVIRONMENT)):
        assert part in text
    assert text.endswith("\n")


def test_the_doctor_table_says_yes_or_no_and_the_fix() -> None:
    statuses = (RuntimeStatus("eager-cpu", True, "2 threads"), RuntimeStatus("eager-cuda", False, "no GPU", "get one"))
    assert doctor_table(statuses).rows == (("eager-cpu", "yes", "2 threads", ""), ("eager-cuda", "no", "no GPU", "get one"))


def test_the_accuracy_table_has_percents_and_their_interval() -> None:
    assert accuracy_table((AccuracyRow("v", 15, 148),)).rows == (("v", "10.14", "6.24 - 16.05", "148"),)


def test_the_class_table_is_the_first_variants_and_says_who_answers_otherwise() -> None:
    first = AccuracyRow("a", 5, 8, ((3, 0, 0), (1, 2, 0), (1, 1, 0)), ("0", "1", "2"))
    other = dataclasses.replace(first, variant="c", confusion=((3, 0, 0), (1, 2, 0), (2, 0, 0)))
    table = class_table((first, other))
    assert table.columns == ("class", "images", "precision %", "recall %")
    assert table.rows == (("0", "3", "60.00", "100.00"), ("1", "3", "66.67", "66.67"), ("2", "2", "-", "0.00"))
    assert class_title((first,)) == "Classes"
    assert class_title((first, dataclasses.replace(first, variant="b"))) == "Classes, the same by every variant"
    assert class_title((first, other)) == "Classes, by a; c answered otherwise, see --json"


def test_the_prediction_table_ranks_the_labels_of_each_image() -> None:
    predictions = (Prediction("a.png", "v", (("3", 0.75), ("8", 0.2))), Prediction("b.png", "v", (("1", 1.0),)))
    assert prediction_table(predictions).rows == (
        ("a.png", "1", "3", "0.7500"),
        ("a.png", "2", "8", "0.2000"),
        ("b.png", "1", "1", "1.0000"),
    )


def test_the_environment_line_names_machine_and_versions() -> None:
    assert environment_line(ENVIRONMENT) == "Some CPU, 2 cores, 2 threads; no GPU; Python 3.11.7; torch 2.15.0, onnxruntime-gpu 1.31.1"
    bare = dataclasses.replace(ENVIRONMENT, threads=None, gpu="Some GPU", versions={"torch": "2.15.0"})
    assert environment_line(bare) == "Some CPU, 2 cores; Some GPU; Python 3.11.7; torch 2.15.0"

"""The Markdown of a parity run answers in order: what came of it, where it failed, which layer, and on which machine."""

from __future__ import annotations

import dataclasses

import pytest
from markdown_it import MarkdownIt

from lenet_deploy.records import Decisions, Environment, LayerError, ParityReport, ParityResult
from lenet_deploy.report.summary import MAX_CHARACTERS, parity_markdown
from lenet_deploy.report.table import to_markdown
from lenet_deploy.report.tables import environment_line, parity_table

ENVIRONMENT = Environment("Linux", "3.11.7", "Some CPU", 2, 2, None, None, {"torch": "2.15.0"}, None)
LAYERS = (LayerError("graph", "conv1", "/c1/Conv", 1e-6, 0.25, True), LayerError("graph", "conv2", "/c2/Conv", None, None, False))
GOOD = ParityResult("onnx/ort-cpu/fp32", "pass", None, "digits", 64, 1e-6, 5e-7, 0.1, 1.0)
BAD = dataclasses.replace(GOOD, status="fail", reason="image 3: too far", first_divergent_layer="conv2", layers=LAYERS)
AWAY = ParityResult("onnx/ort-cuda/fp32", "skipped", "no GPU")
DECISIONS = Decisions(1000, 2, 3, 990, 987, 4, 1)


def report(*results: ParityResult, notes: tuple[str, ...] = (), required: tuple[str, ...] = ()) -> ParityReport:
    return ParityReport(results, notes, ENVIRONMENT, required=required)


def sections(text: str) -> dict[str, str]:
    """What stands under each heading, without the line about the machine at the end."""
    parts = text[: text.index("\n\nJudged on")].split("\n\n#")
    titled = (part.lstrip("#").lstrip().partition("\n") for part in parts)
    return {title: body.strip() for title, _, body in titled}


def shown(text: str) -> str:
    """The HTML that a reader of CommonMark and its tables sees."""
    return MarkdownIt("commonmark").enable("table").render(text)


def test_a_pass_is_a_heading_a_count_the_table_and_the_machine() -> None:
    passed = report(GOOD)
    assert parity_markdown(passed).split("\n\n") == [
        "## Parity: pass",
        "1 variant: 1 passed, 0 failed, 0 skipped.",
        to_markdown(parity_table(passed)),
        f"Judged on {environment_line(ENVIRONMENT)}.\n",
    ]


def test_a_failure_says_variant_inputs_batch_reason_and_layer() -> None:
    text = parity_markdown(report(BAD, AWAY))
    assert text.startswith("## Parity: fail\n\n2 variants: 0 passed, 1 failed, 1 skipped.\n")
    assert sections(text)["Failures"] == "- `onnx/ort-cpu/fp32`, digits, batch 64: image 3: too far. First divergent layer: `conv2`."


def test_a_failure_of_the_whole_variant_has_neither_inputs_nor_layer() -> None:
    text = parity_markdown(report(ParityResult("a", "fail", "the artifact cannot be opened")))
    assert sections(text)["Failures"] == "- `a`: the artifact cannot be opened."


def test_every_failure_is_listed() -> None:
    text = parity_markdown(report(BAD, dataclasses.replace(BAD, batch_size=1), GOOD))
    assert [line.count("batch") for line in sections(text)["Failures"].splitlines()] == [1, 1]


def test_layers_are_a_table_that_is_folded_away() -> None:
    body = sections(parity_markdown(report(BAD)))["Layers"]
    lines = body.split("\n")
    assert lines[:3] == ["<details>", "<summary>onnx/ort-cpu/fp32, digits</summary>", ""]
    assert "| graph | conv1 | /c1/Conv | 1.00e-06 | 0.25 | pass |" in lines
    assert "| graph | conv2 | /c2/Conv | - | - | fail |" in lines
    assert "\n\n</details>" in body


def test_layers_of_a_pass_are_shown_too_behind_those_of_failures() -> None:
    body = sections(parity_markdown(report(dataclasses.replace(GOOD, variant="good", layers=LAYERS), BAD)))["Layers"]
    assert body.index("<summary>onnx/ort-cpu/fp32") < body.index("<summary>good")


def test_decisions_have_accuracies_with_intervals_flips_and_the_test() -> None:
    body = sections(parity_markdown(report(dataclasses.replace(GOOD, check="decisions", decisions=DECISIONS))))["Decisions"]
    row = [cell.strip() for cell in body.splitlines()[2].strip("|").split("|")]
    low, high = DECISIONS.variant_ci95
    assert row[:3] == ["onnx/ort-cpu/fp32", "digits", "1,000"]
    assert row[3].startswith("99.00 (98.")
    assert row[4:] == [f"98.70 ({low:.2f} - {high:.2f})", "2", "3", "0.375"]


def test_what_was_skipped_is_listed_with_its_reason() -> None:
    partly = ParityResult("int8", "skipped", "scales by the whole batch", "digits", check="consistency")
    assert sections(parity_markdown(report(GOOD, AWAY, partly)))["Skipped"].splitlines() == [
        "- `onnx/ort-cuda/fp32`: no GPU",
        "- `int8`, digits: scales by the whole batch",
    ]


def test_a_required_variant_that_was_not_judged_is_in_the_heading() -> None:
    text = parity_markdown(report(GOOD, AWAY, required=(AWAY.variant,)))
    assert text.startswith("## Parity: pass, but not all that is required was judged\n")
    assert sections(text)["Required, but not judged"] == "- `onnx/ort-cuda/fp32`: no GPU"


@pytest.mark.parametrize("results", [(), (AWAY,)], ids=["no results", "all skipped"])
def test_a_run_that_judged_nothing_says_so(results: tuple[ParityResult, ...]) -> None:
    assert parity_markdown(report(*results)).startswith("## Parity: fail\n\nNothing was judged")


def test_a_section_without_content_is_left_out() -> None:
    assert list(sections(parity_markdown(report(GOOD)))) == ["Parity: pass"]


def test_notes_are_kept() -> None:
    assert sections(parity_markdown(report(GOOD, notes=("images are from digits",))))["Notes"] == "- images are from digits"


@pytest.mark.parametrize(
    "text", ["<img src=x>", "a*b*c", "[x](y)", "`code`", "_all_", "p|q", "&lt;", "back\\slash", "~~gone~~"], ids=lambda text: repr(text)
)
def test_a_reason_is_shown_as_it_is(text: str) -> None:
    failed = dataclasses.replace(BAD, reason=text)
    html = shown(parity_markdown(report(failed)))
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"batch 64: {plain}. First" in html  # in the list
    assert f"batch 64: {plain}</td>" in html  # in the table


def test_a_reason_of_several_lines_stays_one_item() -> None:
    text = parity_markdown(report(dataclasses.replace(BAD, reason="one\n\n## two\n- three")))
    assert sections(text)["Failures"].startswith("- `onnx/ort-cpu/fp32`, digits, batch 64: one  ## two - three.")


def test_a_name_with_backticks_stays_one_code_span() -> None:
    assert "<li><code>a`b`</code>, digits" in shown(parity_markdown(report(dataclasses.replace(BAD, variant="a`b`"))))


def test_the_text_fits_a_comment_and_says_what_it_left_out() -> None:
    many = tuple(dataclasses.replace(GOOD, inputs=f"set {i}", layers=LAYERS * 20) for i in range(100))
    text = parity_markdown(report(*many, BAD))
    kept = text.count("<details>")
    assert MAX_CHARACTERS * 0.9 < len(text) <= MAX_CHARACTERS + 100
    assert text.count("</details>") == kept < 101
    assert f"{101 - kept} more tables of layers would not fit here" in text
    assert "<summary>onnx/ort-cpu/fp32, digits</summary>" in text  # the failure is not what was left out

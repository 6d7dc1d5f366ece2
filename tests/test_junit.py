"""JUnit XML is valid, groups what belongs together, and never shows a failed run as a good one."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import xmlschema
from hypothesis import given
from hypothesis import strategies as st

from lenet_deploy.records import Environment, ParityReport, ParityResult
from lenet_deploy.report.junit import parity_junit

SCHEMA = xmlschema.XMLSchema(Path(__file__).parent / "data" / "junit.xsd")
ENVIRONMENT = Environment("Linux", "3.11.7", "Some CPU", 2, 2, None, None, {"torch": "2.15.0"}, "abc123")
AWAY = ParityResult("away", "skipped", "no GPU")
RESULTS = (
    ParityResult("a", "pass", None, "weights", check="weights"),
    ParityResult("a", "pass", None, "digits", 1),
    ParityResult("a", "fail", "image 3: too far", "digits", 64, first_divergent_layer="conv2"),
    ParityResult("a", "fail", "image 5: its scores differ", "digits", 64, check="consistency"),
    ParityResult("a", "pass", None, "normal", 1),
    ParityResult("a", "skipped", "scales by the whole batch", "normal", check="consistency"),
    ParityResult("a", "skipped", "values beyond float16", "huge"),
    ParityResult("unopened", "fail", "the artifact cannot be opened"),
    AWAY,
)
REPORT = ParityReport(RESULTS, ("images are from digits",), ENVIRONMENT, {"torch.cudnn.conv": "ieee"})


def read(report: ParityReport) -> ET.Element:
    text = parity_junit(report)
    SCHEMA.validate(text)
    return ET.fromstring(text.encode())


def only(*results: ParityResult) -> ET.Element:
    return read(ParityReport(results, (), ENVIRONMENT))


def case(root: ET.Element, variant: str, inputs: str) -> ET.Element:
    found = root.findall(f"testsuite/testcase[@classname='{variant}'][@name='{inputs}']")
    assert len(found) == 1
    return found[0]


def outcome(element: ET.Element) -> ET.Element:
    assert len(element) == 1
    return element[0]


def test_a_suite_is_a_variant_and_a_case_its_input_set_whatever_the_batch_size() -> None:
    suites = {suite.get("name"): [each.get("name") for each in suite.findall("testcase")] for suite in read(REPORT)}
    assert suites == {"a": ["weights", "digits", "normal", "huge"], "unopened": ["whole variant"], "away": ["whole variant"]}


def test_a_failure_says_everything_that_failed_in_its_group() -> None:
    failure = outcome(case(read(REPORT), "a", "digits"))
    assert failure.tag == "failure"
    assert failure.get("message") == "outputs, batch 64: image 3: too far; first divergent layer: conv2 (and 1 more)"
    assert failure.get("type") == "outputs, consistency"
    assert (failure.text or "").splitlines() == [
        "outputs, batch 64: image 3: too far; first divergent layer: conv2",
        "consistency, batch 64: image 5: its scores differ",
    ]


def test_a_failure_of_a_whole_variant_has_neither_batch_nor_layer() -> None:
    assert outcome(case(read(REPORT), "unopened", "whole variant")).get("message") == "outputs: the artifact cannot be opened"


def test_a_pass_has_no_outcome_even_where_something_of_it_was_skipped() -> None:
    root = read(REPORT)
    assert len(case(root, "a", "weights")) == len(case(root, "a", "normal")) == 0


def test_what_was_skipped_beside_a_pass_is_said_in_the_output_with_the_notes() -> None:
    assert (read(REPORT).findtext("testsuite[@name='a']/system-out") or "").splitlines() == [
        "note: images are from digits",
        "skipped: normal: consistency: scales by the whole batch",
    ]


def test_a_group_is_skipped_where_nothing_in_it_was_judged() -> None:
    root = read(REPORT)
    assert (outcome(case(root, "a", "huge")).tag, outcome(case(root, "a", "huge")).get("message")) == ("skipped", "values beyond float16")
    assert outcome(case(root, "away", "whole variant")).get("message") == "no GPU"


def test_each_reason_for_skipping_is_said_once() -> None:
    skipped = ParityResult("a", "skipped", "one", "digits")
    root = only(skipped, skipped, dataclasses.replace(skipped, reason="two"), ParityResult("b", "pass", None, "digits", 1))
    assert outcome(case(root, "a", "digits")).get("message") == "one; two"


def test_counts_are_those_of_the_cases() -> None:
    names = ("tests", "failures", "errors", "skipped", "time")
    counts = {suite.get("name"): tuple(suite.get(name) for name in names) for suite in read(REPORT)}
    assert counts == {"a": ("4", "1", "0", "1", "0"), "unopened": ("1", "1", "0", "0", "0"), "away": ("1", "0", "0", "1", "0")}


def test_a_required_variant_that_was_not_judged_is_an_error_and_no_skip() -> None:
    report = dataclasses.replace(REPORT, required=("a", "away"))
    root = read(report)
    error = outcome(case(root, "away", "whole variant"))
    assert (error.tag, error.get("type"), error.get("message")) == ("error", "required", "away is required: no GPU")
    suite = root.find("testsuite[@name='away']")
    assert suite is not None
    assert (suite.get("errors"), suite.get("skipped")) == ("1", "0")
    assert outcome(case(root, "a", "huge")).tag == "skipped"  # the variant itself ran


@pytest.mark.parametrize("results", [(), (AWAY,)], ids=["no results", "all skipped"])
def test_a_run_that_judged_nothing_does_not_look_like_a_pass(results: tuple[ParityResult, ...]) -> None:
    failure = outcome(case(only(*results), "parity", "verdict"))
    assert failure.tag == "failure"
    assert "nothing was judged" in str(failure.get("message"))


def test_a_good_run_has_no_suite_beyond_its_variants() -> None:
    root = only(ParityResult("a", "pass", None, "digits", 1), AWAY)
    assert [suite.get("name") for suite in root] == ["a", "away"]
    assert root.find(".//failure") is None


def test_the_machine_and_what_float32_meant_are_properties() -> None:
    properties = {each.get("name"): each.get("value") for each in read(REPORT).iterfind("testsuite[@name='a']/properties/property")}
    assert properties["cpu"] == "Some CPU"
    assert properties["version.torch"] == "2.15.0"
    assert properties["float32.torch.cudnn.conv"] == "ieee"
    assert "gpu" not in properties


def test_the_time_is_written_in_utc_and_only_where_it_is_known() -> None:
    moment = datetime(2026, 1, 2, 1, 30, 5, 999, tzinfo=timezone(timedelta(hours=2)))
    text = parity_junit(REPORT, moment, "build-7")
    SCHEMA.validate(text)
    suite = ET.fromstring(text.encode())[0]
    assert (suite.get("timestamp"), suite.get("hostname")) == ("2026-01-01T23:30:05", "build-7")
    assert read(REPORT)[0].get("timestamp") is None


def test_the_same_report_gives_the_same_text() -> None:
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    assert parity_junit(REPORT, moment) == parity_junit(REPORT, moment)


def test_markup_in_a_reason_is_text() -> None:
    reason = "expected <b> & 'c' \"d\" ]]>"
    failure = outcome(case(only(ParityResult("a", "fail", reason, "digits", 1)), "a", "digits"))
    assert failure.text == f"outputs, batch 1: {reason}" == failure.get("message")


@pytest.mark.parametrize(
    ("character", "shown"),
    [("\x1b", "\\x1b"), ("\x00", "\\x00"), ("\ud800", "\\ud800"), ("\ufffe", "\\ufffe"), ("é\U0001f600", "é\U0001f600")],
)
def test_what_xml_cannot_hold_is_shown_as_an_escape(character: str, shown: str) -> None:
    failure = outcome(case(only(ParityResult("a", "fail", f"<{character}>", "digits", 1)), "a", "digits"))
    assert failure.text == f"outputs, batch 1: <{shown}>" == failure.get("message")


@given(st.text(st.characters(), min_size=1), st.text(st.characters()))
def test_any_text_at_all_gives_a_document_that_can_be_read(inputs: str, reason: str) -> None:
    report = ParityReport((ParityResult("a", "fail", reason, f"set {inputs}", 1),), (reason,), ENVIRONMENT)
    text = parity_junit(report)
    SCHEMA.validate(text)
    assert ET.fromstring(text.encode()).find("testsuite/testcase/failure") is not None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('failures="1"', ""),
        ('tests="4"', 'tests="four"'),
        ('skipped="1"', 'skipped="-1"'),
        ('time="0"', 'time="1e-3"'),
        ('name="digits"', 'name="weights"'),
        ('type="outputs, consistency"', ""),
        ("<system-err />", ""),
        ("<system-err />", "<system-err /><testcase/>"),
        ("testcase", "test"),
        ('hostname="localhost"', 'hostname="localhost" timestamp="2026-01-02T00:00:00Z"'),
        ('name="a"', 'name=""'),
    ],
)
def test_the_schema_refuses_a_document_that_is_wrong(old: str, new: str) -> None:
    text = parity_junit(REPORT)
    assert old in text
    assert not SCHEMA.is_valid(text.replace(old, new))

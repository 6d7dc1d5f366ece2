"""A parity run as JUnit XML, which CI servers show test by test."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from lenet_deploy.records import Environment, ParityReport, ParityResult

WHOLE = "whole variant"  # the name of a test case about no input set in particular

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, production 2 (Char)

# Parity takes no times, and readers that demand the attribute take zero for it.
_NO_TIME = "0"


def parity_junit(report: ParityReport, timestamp: datetime | None = None, hostname: str = "localhost") -> str:
    """One test suite a variant, one test case an input set of it, whatever the batch size.

    A case fails where one of its results failed, and is skipped where all of them were; where the variant is required, that is an error.
    A report that fails although no result did, since nothing was judged, has a suite of its own that says so: who reads only this file
    must not take it for a pass.

    Args:
        timestamp: when it ran, with its time zone; left out when None, though the schema of Ant's own reports requires it.
        hostname: where it ran.

    The document is valid by the Jenkins xUnit plugin's junit-10.xsd; with a `timestamp` also by Ant's (windyroad's JUnit.xsd).
    """
    by_variant: dict[str, dict[str, list[ParityResult]]] = {}
    for result in report.results:
        by_variant.setdefault(result.variant, {}).setdefault(result.inputs or WHOLE, []).append(result)
    if report.verdict == "fail" and all(result.status != "fail" for result in report.results):
        nothing = ParityResult("parity", "fail", "nothing was judged, so nothing is known to be equal", check="verdict")
        by_variant["parity"] = {"verdict": [nothing]}
    root = ET.Element("testsuites")
    for number, (variant, cases) in enumerate(by_variant.items()):
        root.append(_suite(number, variant, cases, report, timestamp, hostname))
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _suite(
    number: int,
    variant: str,
    cases: dict[str, list[ParityResult]],
    report: ParityReport,
    timestamp: datetime | None,
    hostname: str,
) -> ET.Element:
    elements = [_case(variant, inputs, results, report.missing) for inputs, results in cases.items()]
    suite = _element(
        "testsuite",
        name=variant,
        package="parity",
        id=str(number),
        hostname=hostname,
        tests=str(len(elements)),
        failures=str(_count(elements, "failure")),
        errors=str(_count(elements, "error")),
        skipped=str(_count(elements, "skipped")),
        time=_NO_TIME,
    )
    if timestamp is not None:
        suite.set("timestamp", timestamp.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="seconds"))
    properties = ET.SubElement(suite, "properties")
    properties.extend(_element("property", name=name, value=value) for name, value in _properties(report))
    suite.extend(elements)
    left_out = [
        f"{inputs}: {_line(result)}"
        for inputs, results in cases.items()
        for result in results
        if result.status == "skipped" and any(other.status != "skipped" for other in results)
    ]
    _text(ET.SubElement(suite, "system-out"), (*(f"note: {note}" for note in report.notes), *(f"skipped: {line}" for line in left_out)))
    ET.SubElement(suite, "system-err")
    return suite


def _case(variant: str, inputs: str, results: Sequence[ParityResult], missing: Sequence[ParityResult]) -> ET.Element:
    case = _element("testcase", classname=variant, name=inputs, time=_NO_TIME)
    failed = [result for result in results if result.status == "fail"]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        kinds = ", ".join(dict.fromkeys(result.check for result in failed))
        failure = _element("failure", message=_line(failed[0]) + more, type=kinds)
        _text(failure, map(_line, failed))
        case.append(failure)
    elif all(result.status == "skipped" for result in results):
        reason = "; ".join(dict.fromkeys(result.reason or "no reason was given" for result in results))
        if any(result in missing for result in results):
            case.append(_element("error", message=f"{variant} is required: {reason}", type="required"))
        else:
            case.append(_element("skipped", message=reason))
    return case


def _line(result: ParityResult) -> str:
    batch = f", batch {result.batch_size}" if result.batch_size is not None else ""
    layer = f"; first divergent layer: {result.first_divergent_layer}" if result.first_divergent_layer else ""
    return f"{result.check}{batch}: {result.reason or 'no reason was given'}{layer}"


def _properties(report: ParityReport) -> Iterable[tuple[str, str]]:
    environment: Environment = report.environment
    known = {
        "os": environment.os,
        "python": environment.python,
        "cpu": environment.cpu,
        "gpu": environment.gpu,
        "driver": environment.driver,
        "commit": environment.commit,
    }
    yield from ((name, value) for name, value in known.items() if value is not None)
    yield from ((f"version.{name}", value) for name, value in environment.versions.items())
    yield from ((f"float32.{name}", value) for name, value in report.float32.items())


def _count(cases: Iterable[ET.Element], outcome: str) -> int:
    return sum(case.find(outcome) is not None for case in cases)


def _element(tag: str, **attributes: str) -> ET.Element:
    return ET.Element(tag, {name: _printable(value) for name, value in attributes.items()})


def _text(element: ET.Element, lines: Iterable[str]) -> None:
    element.text = "\n".join(map(_printable, lines))


def _printable(text: str) -> str:
    """What XML 1.0 cannot hold, not even escaped, as Python would escape it."""
    return _FORBIDDEN.sub(lambda found: ascii(found.group())[1:-1], text)

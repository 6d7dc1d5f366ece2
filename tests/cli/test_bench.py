"""What `lenet-deploy bench` says beside its table, and how it ends: with results that are given, not measured."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lenet_deploy.cli import build, interrupts
from lenet_deploy.cli.errors import run

from lenet_deploy import api
from lenet_deploy.bench_records import BenchReport, Measurement, Visit
from lenet_deploy.records import Environment, Failure

MACHINE = Environment("Linux", "3.11.7", "A CPU", 2, 1, None, None, {}, None)
PARTIAL = "interrupted after 6 visits"
Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """`lenet-deploy bench ARGS...` in this process and an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lenet-deploy", "bench", *arguments])
        code = run(build())
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def interrupted() -> Any:
    """Ctrl-C was pressed."""
    interrupts._interrupted.set()
    yield
    interrupts._interrupted.clear()


def given(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Have `api.benchmark` return a report of one row, with these changes."""
    visits = tuple(Visit(0, i, 3, 0, 3, 1.0) for i in range(6))
    row = Measurement("a/variant", "cpu", 1, "device", (1e-3,) * 18, 1, visits, 20, "precise", 1, None)
    report = dataclasses.replace(BenchReport((row,), (), MACHINE), **changes)
    monkeypatch.setattr(api, "benchmark", lambda *arguments, **options: report)


FAILED = (Failure("b/variant", "batch 1, device: it does not run"),)


def test_a_case_that_failed_is_code_3_after_the_table(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, failed=FAILED)
    code, out, err = bench("bundle")
    assert (code, err) == (3, "error: b/variant: batch 1, device: it does not run\n")
    assert "a/variant" in out


def test_json_to_standard_output_is_all_there_is_on_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, skipped=(Failure("c/variant", "no such device"),))
    code, out, err = bench("bundle", "--json", "-")
    document = json.loads(out)
    assert (code, next(iter(document))) == (0, "schema")
    assert [each["variant"] for each in document["measurements"]] == ["a/variant"]
    assert err == "skipped: c/variant: no such device\n"


@pytest.mark.usefixtures("interrupted")
@pytest.mark.parametrize("failed", [(), FAILED])
def test_an_interrupted_run_is_code_130_and_partial_whatever_failed_before(
    failed: tuple[Failure, ...], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, failed=failed, partial=PARTIAL)
    code, out, err = bench("bundle", "--json", "bench.json")
    assert code == 130
    assert f"partial: {PARTIAL}" in out
    assert f"partial: {PARTIAL}" in err
    assert "error:" not in err
    assert PARTIAL in Path("bench.json").read_text()

"""`lenet-deploy compare`: exit codes, what goes where, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lenet_deploy.cli import build
from lenet_deploy.cli.errors import run

from lenet_deploy.bench_records import BenchReport, Measurement, Visit
from lenet_deploy.records import Environment, ParityReport
from lenet_deploy.store import bench_json, parity_json

MACHINE = Environment("Linux-6.1-x86_64", "3.11.7", "A CPU", 2, 2, None, None, {"torch": "2.15.0"}, None)
OLD = Path(__file__).parent.parent / "data" / "bench-1.json"

Compare = Callable[..., tuple[int, str, str]]


def bench(environment: Environment = MACHINE, visits: int = 8, **times_s: float) -> str:
    """A result of bench with these variants and median times."""
    made = tuple(Visit(0, i, 3, 0, 3, 1.0) for i in range(visits))
    rows = tuple(
        Measurement(
            name, "cpu", 1, "device", tuple(time * (1 + 0.001 * (i % 5)) for i in range(3 * visits)), 1, made, 20, "precise", 1, None
        )
        for name, time in times_s.items()
    )
    return bench_json(BenchReport(rows, (), environment))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with results to compare and things that are none."""
    monkeypatch.chdir(tmp_path)
    whole = bench(eager=1e-3, ort=1e-4)
    files = {
        "base.json": whole,
        "slower.json": bench(eager=1e-3, ort=1.2e-4),
        "faster.json": bench(eager=1e-3, ort=0.8e-4),
        "short.json": bench(eager=1e-3, ort=1e-4, visits=3),
        "both.json": bench(eager=1.2e-3, ort=1.031e-4),
        "elsewhere.json": bench(dataclasses.replace(MACHINE, cpu="Another CPU"), eager=2e-3, ort=2e-4),
        "another.json": bench(other=1e-3),
        "fewer.json": bench(eager=1e-3),
        "parity.json": parity_json(ParityReport((), (), MACHINE)),
        "truncated.json": whole[: len(whole) // 2],
        "text.json": "no JSON at all",
        "list.json": "[]",
        "hollow.json": json.dumps({"schema": "lenet-deploy/bench/2"}),
        "negative.json": bench(eager=-1e-3, ort=1e-4),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def compare(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Compare:
    """`lenet-deploy compare ARGS...` in this process: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lenet-deploy", "compare", *arguments])
        code = run(build())
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_nothing_slower_exits_0_with_a_row_a_case_and_a_verdict(compare: Compare) -> None:
    for head, verdict in (("base.json", "2 same"), ("faster.json", "1 same, 1 faster")):
        code, out, err = compare("base.json", head)
        assert code == 0
        assert [line.split()[0] for line in out.splitlines()[2:4]] == ["eager", "ort"]
        assert out.splitlines()[-1] == f"verdict: not slower ({verdict})"
        assert "error" not in err


def test_a_slower_case_exits_1_and_is_named(compare: Compare) -> None:
    code, out, err = compare("base.json", "slower.json")
    assert code == 1
    assert "verdict: slower (1 slower, 1 same)" in out
    assert err.splitlines()[-1] == "error: slower by more than 3 %: ort (batch 1, device)"


def test_an_inconclusive_case_exits_4_and_says_how_to_find_out(compare: Compare) -> None:
    code, out, err = compare("base.json", "short.json")
    assert code == 4
    assert "head has 3 visits, 6 are needed" in out
    assert err.splitlines()[-1].startswith("error: inconclusive: eager (batch 1, device), ort (batch 1, device); measure longer")


def test_slower_outweighs_inconclusive(compare: Compare) -> None:
    code, out, _ = compare("base.json", "both.json")
    assert (code, out.splitlines()[-1]) == (1, "verdict: slower (1 slower, 1 inconclusive)")


def test_the_threshold_is_3_percent_unless_said_otherwise(compare: Compare) -> None:
    assert compare("base.json", "slower.json", "--threshold", "30")[0] == 0
    assert compare("base.json", "slower.json", "--threshold", "3")[1] == compare("base.json", "slower.json")[1]


def test_a_long_list_of_slower_cases_is_cut_in_the_message_and_not_in_the_table(compare: Compare, folder: Path) -> None:
    names = [f"variant{i}" for i in range(9)]
    for name, time in (("many.json", 1e-3), ("worse.json", 2e-3)):
        (folder / name).write_text(bench(**dict.fromkeys(names, time)))
    code, out, err = compare("many.json", "worse.json")
    assert code == 1
    assert all(name in out for name in names)
    assert err.splitlines()[-1].endswith("variant2 (batch 1, device) and 6 more")


def test_results_go_to_standard_output_and_to_files_and_notes_to_standard_error(compare: Compare, folder: Path) -> None:
    code, out, err = compare("base.json", "slower.json", "--json", "out.json", "--markdown", "out.md")
    document = json.loads((folder / "out.json").read_text())
    assert (code, document["schema"], document["verdict"]) == (1, "lenet-deploy/comparison/1", "slower")
    assert [row["verdict"] for row in document["rows"]] == ["same", "slower"]
    assert (folder / "out.md").read_text().startswith("## Compared with base: slower")
    assert "note: base is from one process" in err
    assert "note:" not in out
    assert "note:" not in compare("base.json", "slower.json", "--quiet")[2]


def test_json_on_standard_output_is_alone_there(compare: Compare) -> None:
    code, out, _ = compare("base.json", "slower.json", "--json", "-")
    assert (code, json.loads(out)["verdict"]) == (1, "slower")


def test_unlike_machines_exit_2_unless_ratios_are_asked_for(compare: Compare) -> None:
    code, out, err = compare("base.json", "elsewhere.json")
    assert (code, out) == (2, "")
    assert "cpu is A CPU in base, Another CPU in head" in err
    assert "--across-machines" in err
    code, out, err = compare("base.json", "elsewhere.json", "--across-machines")
    assert (code, out.splitlines()[-1]) == (0, "verdict: not slower (1 same)")
    assert "note: on cpu, times are relative to eager in the same file" in err


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("absent.json", "absent.json: no such file"),
        (".", ".: a folder"),
        ("truncated.json", "truncated.json: not valid JSON"),
        ("text.json", "text.json: not valid JSON"),
        ("list.json", "list.json: not a result of lenet-deploy bench"),
        ("parity.json", "parity.json: schema is 'lenet-deploy/parity/1'"),
        ("hollow.json", "hollow.json: not what bench wrote: it has no environment"),
        ("negative.json", "not numbers above 0"),
        ("another.json", "nothing to compare"),
    ],
)
def test_a_file_that_is_no_result_exits_2_on_either_side(compare: Compare, file: str, message: str) -> None:
    for pair in ((file, "base.json"), ("base.json", file)):
        code, out, err = compare(*pair)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert message in err
        assert "Traceback" not in err


@pytest.mark.parametrize("threshold", ["0", "-1", "100", "nan", "inf"])
def test_a_threshold_out_of_range_exits_2(compare: Compare, threshold: str) -> None:
    code, _, err = compare("base.json", "base.json", "--threshold", threshold)
    assert code == 2
    assert "above 0 and below 100" in err


def test_a_threshold_that_is_no_number_or_a_file_too_few_is_a_usage_error(compare: Compare) -> None:
    assert compare("base.json", "base.json", "--threshold", "much")[0] == 2
    assert compare("base.json")[0] == 2


def test_an_output_that_cannot_be_written_exits_5(compare: Compare) -> None:
    code, out, err = compare("base.json", "base.json", "--json", "absent/out.json")
    assert (code, out) == (5, "")
    assert "cannot be written" in err


def test_a_case_that_head_lacks_does_not_pass_and_is_named(compare: Compare) -> None:
    code, out, err = compare("base.json", "fewer.json")
    assert code == 4
    assert "verdict: incomplete" in out
    assert "not measured in fewer.json: ort (batch 1, device)" in err
    assert compare("fewer.json", "base.json")[0] == 0


def test_a_file_against_itself_is_said(compare: Compare) -> None:
    assert "both files are the same result" in compare("base.json", "base.json")[2]


def test_a_result_of_version_1_is_read_and_inconclusive(compare: Compare) -> None:
    code, out, _ = compare(str(OLD), str(OLD))
    assert code == 4
    assert out.count("base has 1 visit, 6 are needed; head has 1 visit, 6 are needed: all 2 rows") == 1


def test_the_installed_command_compares_and_exits_as_documented(cli: Any, folder: Path) -> None:
    done = cli("compare", "base.json", "slower.json", cwd=folder)
    assert done.returncode == 1
    assert "verdict: slower" in done.stdout
    assert "Traceback" not in done.stderr

"""Markdown files are replaced whole, and GitHub's summary of a step is added to."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from lenet_deploy.cli.errors import EXIT_CODES
from lenet_deploy.cli.output import emit, write_markdown

from lenet_deploy.errors import CannotWrite
from lenet_deploy.report.table import Table, to_markdown

TABLE = Table(("fruit",), (("fig",),))


@pytest.fixture
def summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that GitHub names, already written to by somebody else."""
    path = tmp_path / "summary.md"
    path.write_text("# Theirs")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    return path


def test_a_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    path = tmp_path / "report.md"
    path.write_text("old")
    write_markdown(path, "new\n")
    assert path.read_text() == "new\n"


def test_the_summary_of_a_step_is_added_to(summary: Path) -> None:
    write_markdown(summary, "# Ours\n")
    write_markdown(summary, "# And more\n")
    assert summary.read_text() == "# Theirs\n\n# Ours\n\n\n# And more\n"


def test_an_empty_summary_begins_with_the_text(summary: Path) -> None:
    summary.write_text("")
    write_markdown(summary, "# Ours\n")
    assert summary.read_text() == "# Ours\n"


def test_an_absent_summary_is_made(summary: Path) -> None:
    summary.unlink()
    write_markdown(summary, "# Ours\n")
    assert summary.read_text() == "# Ours\n"


def test_the_summary_is_known_by_another_name_too(summary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = summary.parent / "link.md"
    link.symlink_to(summary)
    monkeypatch.chdir(summary.parent)
    for name in (Path("summary.md"), link):
        write_markdown(name, "x")
    assert summary.read_text() == "# Theirs\n\nx\n\nx"


@pytest.mark.parametrize("value", ["", "elsewhere.md"])
def test_another_file_is_replaced_whatever_the_summary_is(value: str, summary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", value)
    write_markdown(summary, "new")
    assert summary.read_text() == "new"


def test_a_refused_addition_leaves_the_summary_as_it_was(summary: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # refused in the middle, as a full disk does
    try:
        with pytest.raises(CannotWrite, match=r"summary\.md: cannot be written \(File too large\)"):
            write_markdown(summary, "x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert summary.read_text() == "# Theirs"


def test_a_summary_that_cannot_be_opened_is_an_error_with_code_5(summary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary.parent))
    with pytest.raises(CannotWrite) as caught:
        write_markdown(summary.parent, "x")
    assert next(code for kind, code in EXIT_CODES if isinstance(caught.value, kind)) == 5


def test_emit_writes_the_table_or_what_is_given_in_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    emit(TABLE, str, None, tmp_path / "table.md")
    emit(TABLE, str, None, tmp_path / "own.md", "a line", markdown=lambda: "# Own\n")
    assert (tmp_path / "table.md").read_text() == to_markdown(TABLE) + "\n"
    assert (tmp_path / "own.md").read_text() == "# Own\n"
    assert capsys.readouterr().out.endswith("fig\na line\n")


def test_emit_makes_no_markdown_that_nobody_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    emit(TABLE, str, None, None, markdown=lambda: pytest.fail("it was made"))
    assert "fig" in capsys.readouterr().out


def test_emit_adds_to_the_summary_of_a_step(summary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    emit(TABLE, str, None, summary)
    assert summary.read_text() == f"# Theirs\n\n{to_markdown(TABLE)}\n"
    assert capsys.readouterr().out

"""The GitHub action and its example are valid, and the action's script passes on what it is given and what came of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lenet_deploy.cli.parity import parity
from ruamel.yaml import YAML
from typer import Typer
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
ACTION, EXAMPLE = ROOT / "action.yml", ROOT / "examples" / "github-parity.yml"
SCHEMAS = {ACTION: "vendor.github-actions", EXAMPLE: "vendor.github-workflows"}
each_file = pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
# A stub in place of the program: it records its arguments, one a line, and ends with the code it is told to.
STUB = '#!/bin/sh\nfor argument; do printf "%s\\n" "$argument"; done >"$RECORD"\nexit "$STUB_CODE"\n'
NASTY = "$(touch x) `touch x` \"; touch x; ' a  b"


def load(path: Path) -> Any:
    return YAML(typ="safe").load(path)


def validate(path: Path, schema: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def step(number: int) -> dict[str, Any]:
    found: dict[str, Any] = load(ACTION)["runs"]["steps"][number]
    return found


def input_of(value: str) -> str:
    """The input that `${{ inputs.NAME }}` is, and nothing beside it."""
    found = re.fullmatch(r"\$\{\{ inputs\.([a-z-]+) \}\}", value)
    assert found, value
    return found[1]


class Outcome:
    """How the action's script ended, and what it left."""

    def __init__(self, done: subprocess.CompletedProcess[str], folder: Path) -> None:
        record, output = folder / "record", folder / "output"
        self.code, self.err = done.returncode, done.stderr
        self.arguments = record.read_text().splitlines() if record.exists() else None
        self.output = output.read_text()
        self.litter = sorted(path.name for path in (folder / "work").iterdir())


Script = Callable[..., Outcome]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Run the action's last step as GitHub does: its inputs or their defaults in the environment, in an empty folder."""

    def run(code: int = 0, **given: str) -> Outcome:
        for name in ("work", "bin"):
            (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / "bin" / "lenet-deploy").write_text(STUB)
        (tmp_path / "bin" / "lenet-deploy").chmod(0o755)
        (tmp_path / "output").write_text("")
        action, parity_step = load(ACTION), step(-1)
        inputs = {name: each.get("default", "") for name, each in action["inputs"].items()} | {"bundle": "bundle"} | given
        (tmp_path / "script").write_text(parity_step["run"])
        env = {
            **{name: inputs[input_of(value)] for name, value in parity_step["env"].items()},
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "GITHUB_OUTPUT": str(tmp_path / "output"),
            "GITHUB_STEP_SUMMARY": "/summary.md",
            "RECORD": str(tmp_path / "record"),
            "STUB_CODE": str(code),
        }
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(tmp_path / "script")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "work", env=env, timeout=60)
        return Outcome(done, tmp_path)

    return run


@each_file
def test_a_file_is_what_github_takes(path: Path) -> None:
    done = validate(path, SCHEMAS[path])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (ACTION, "using: composite", "using: composed"),
        (ACTION, "      shell: bash\n", ""),
        (ACTION, "    required: true", "    required: maybe"),
        (EXAMPLE, "    runs-on: ubuntu-latest\n", ""),
        (EXAMPLE, "jobs:", "job:"),
        (EXAMPLE, "contents: read", "contents: rewrite"),
    ],
)
def test_a_broken_copy_is_refused(path: Path, old: str, new: str, tmp_path: Path) -> None:
    text = path.read_text()
    assert old in text
    copy = tmp_path / path.name
    copy.write_text(text.replace(old, new))
    done = validate(copy, SCHEMAS[path])
    assert done.returncode == 1, done.stdout + done.stderr


def test_no_input_is_written_into_a_script() -> None:
    for each in load(ACTION)["runs"]["steps"]:
        assert "${{" not in each.get("run", "")


def test_every_input_is_used_and_every_one_used_is_declared() -> None:
    action = load(ACTION)
    used = set(re.findall(r"inputs\.([a-z-]+)", ACTION.read_text()))
    assert used == set(action["inputs"])
    assert [name for name, each in action["inputs"].items() if each.get("required")] == ["bundle"]
    assert all(isinstance(each.get("default", ""), str) for each in action["inputs"].values())


def test_the_output_is_that_of_the_last_step() -> None:
    assert load(ACTION)["outputs"]["verdict"]["value"] == "${{ steps." + step(-1)["id"] + ".outputs.verdict }}"


def test_the_example_passes_inputs_that_the_action_has() -> None:
    (used,) = (each for each in load(EXAMPLE)["jobs"]["parity"]["steps"] if each.get("uses") == "./")
    assert set(used["with"]) <= set(load(ACTION)["inputs"])
    assert "bundle" in used["with"]


def test_the_defaults_judge_everything_and_add_to_the_summary(script: Script) -> None:
    assert script().arguments == ["parity", "--device=auto", "--markdown=/summary.md", "--", "bundle"]


def test_every_input_reaches_the_program_as_one_argument(script: Script) -> None:
    given = {name: f"{name} {NASTY}" for name in ("bundle", "variants", "data", "batch", "device", "require", "junit", "json")}
    outcome = script(drill="true", **given)
    options = [f"--{name}={given[name]}" for name in ("variants", "data", "batch", "device", "require", "junit", "json")]
    assert outcome.arguments == ["parity", *options, "--markdown=/summary.md", "--drill", "--", given["bundle"]]
    assert outcome.litter == []


def test_a_bundle_that_looks_like_an_option_is_still_the_bundle(script: Script) -> None:
    assert (script(bundle="--help").arguments or [])[-2:] == ["--", "--help"]


def test_the_program_takes_every_option_that_the_script_knows() -> None:
    application = Typer()
    application.command()(parity)
    shown = CliRunner().invoke(application, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    options = re.findall(r"option (--[a-z-]+)|\((--[a-z-]+)\)", step(-1)["run"])
    assert len(options) == 9
    for option in (first or second for first, second in options):
        assert re.search(rf"{option}\b", shown), option


def test_the_summary_is_left_alone_where_it_is_not_wanted(script: Script) -> None:
    assert script(summary="false").arguments == ["parity", "--device=auto", "--", "bundle"]


def test_empty_switches_are_the_defaults(script: Script) -> None:
    assert script(summary="", drill="").arguments == script().arguments


@pytest.mark.parametrize("name", ["summary", "drill"])
def test_a_switch_that_is_neither_true_nor_false_is_bad_usage(name: str, script: Script) -> None:
    outcome = script(**{name: "yes"})
    assert outcome.code == 2
    assert f"{name} is 'yes'; it is true or false" in outcome.err
    assert outcome.arguments is None


@pytest.mark.parametrize(
    ("code", "verdict"), [(0, "pass"), (1, "fail"), (2, "error"), (3, "error"), (4, "error"), (5, "error"), (70, "error"), (130, "error")]
)
def test_the_exit_code_is_passed_on_and_the_verdict_put_out(code: int, verdict: str, script: Script) -> None:
    outcome = script(code)
    assert outcome.code == code
    assert outcome.output == f"verdict={verdict}\n"


def test_the_install_step_installs_the_action_s_own_checkout(tmp_path: Path) -> None:
    install = step(1)
    assert install["if"] == "inputs.install != 'false'"
    assert install["env"] == {"ACTION_PATH": "${{ github.action_path }}"}
    stub = tmp_path / "python"  # a stub in place of the interpreter, since a real installation takes GB: it prints its arguments
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "ACTION_PATH": "/some checkout"}
    done = subprocess.run(["bash", "-e", "-c", install["run"]], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout.splitlines() == ["-m", "pip", "install", "--disable-pip-version-check", "/some checkout"]

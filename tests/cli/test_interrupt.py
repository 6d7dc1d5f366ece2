"""Ctrl-C and closed pipes: code 130 and a clean disk, or a quiet end; never a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lenet_deploy.cli import build, errors

from lenet_deploy.bundle import Bundle, open_bundle
from lenet_deploy.variants import ARTIFACTS

# A process started in the background may inherit that SIGINT is ignored; a user's terminal never does that.
AS_FROM_A_TERMINAL = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from lenet_deploy.cli import app
app()
"""
# Exports again and again, each time with a SIGINT at a random moment, and reports what became of it as JSON.
EXPORTS_WITH_INTERRUPTS = """
import json, os, random, shutil, signal, sys, threading, time
from pathlib import Path
import torch
from lenet_deploy import api
from lenet_deploy.cli import interrupts
from lenet_deploy.parity import check
from lenet_deploy.sources import load

interrupts.take_interrupts()  # as the command line does: torch swallows some interrupts
torch.set_num_threads(1)
api.INPUTS, check.BATCH_SIZES = 4, (1, 3)  # most of the time is then the exporters', which swallow
root, chance = Path(sys.argv[1]), random.Random(0)
checkpoint = load("lenet5", settings={"in_channels": "1", "image_size": "16"})
for trial in range(-2, int(sys.argv[2])):  # the first two warm up and take the time
    start = time.perf_counter()
    timer = threading.Timer(chance.uniform(0, 0.8) * usual if trial >= 0 else 3600, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    interrupts._interrupted.clear()
    timer.start()
    try:
        api.export(checkpoint, root / "bundle", device="cpu", progress=lambda *step: interrupts.raise_if_interrupted())
        interrupts.raise_if_interrupted()
        usual = time.perf_counter() - start
        if trial < 0:
            timer.cancel()
        timer.join()
        time.sleep(0.1)  # where the signal came after the export
        end = "not interrupted"
    except KeyboardInterrupt:
        end = "interrupted"
    if trial >= 0:
        print(json.dumps([end, sorted(path.name for path in root.rglob("*"))]), flush=True)
    shutil.rmtree(root / "bundle", ignore_errors=True)
"""
PATIENCE_S = 120
INTERRUPTS = 6


@contextlib.contextmanager
def started(folder: Path, *arguments: str | Path, stderr: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """`lenet-deploy ARGS...` at work in `folder`, killed at the end should it still be."""
    command = [sys.executable, "-c", AS_FROM_A_TERMINAL, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # quicker where the cores are shared with other work
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Until the condition holds; fails where the process ends first."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, "it ended before it could be interrupted"
        assert time.monotonic() < end, "it did not come so far in time"
        time.sleep(0.01)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def said(text: str) -> list[str]:
    """What standard error says beside the progress."""
    return [line for line in text.splitlines() if not line.startswith("Epoch: ")]


@pytest.mark.parametrize("place", ["new", "earlier"])
def test_an_interrupted_training_says_how_to_go_on_and_keeps_earlier_results(place: str, tmp_path: Path) -> None:
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "checkpoint.safetensors").write_text("of an earlier run")
    before = content(tmp_path)
    with started(tmp_path, "train", "--epochs", "1000", "--set", "in_channels=1", "--device", "cpu", "--out", place) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("Epoch: 1,")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, err
    assert out == ""
    assert re.fullmatch(rf"{place}: epoch \d+ of 1000 is done; add --resume to go on\ninterrupted; .*", "\n".join(said(err)))
    after = content(tmp_path)
    assert after.pop(f"{place}/last.ckpt")
    assert after == before


@pytest.mark.parametrize("wait_s", [0.0, 0.8])
def test_an_interrupted_export_leaves_the_old_bundle_and_no_staging_folder(wait_s: float, bundle: Bundle, tmp_path: Path) -> None:
    target = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    before = content(tmp_path)
    with started(tmp_path, "export", "lenet5", "--out", target, "--force", "--device", "cpu", "--quiet") as process:
        wait_for(lambda: list(tmp_path.glob(".bundle.staging-*/checkpoint.safetensors")), process)
        time.sleep(wait_s)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, err
    assert out == ""
    assert len(said(err)) == 1
    assert "interrupted" in said(err)[0]
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert open_bundle(target).manifest == bundle.manifest


def test_an_export_interrupted_at_any_moment_publishes_nothing_or_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", EXPORTS_WITH_INTERRUPTS, str(tmp_path), str(INTERRUPTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    whole = sorted(["bundle", "manifest.json", *(spec.path for spec in ARTIFACTS)])
    assert len(ends) == INTERRUPTS
    assert {end for end, _ in ends} == {"interrupted"}, "torch swallows some interrupts: they must not get lost in it"
    assert all(left in ([], whole) for _, left in ends)
    assert [] in [left for _, left in ends]
    assert done.stderr == ""


def test_an_interrupted_bench_keeps_what_was_measured_and_says_that_it_is_partial(bundle: Bundle, tmp_path: Path) -> None:
    terminal, theirs = pty.openpty()  # the progress bar, which appears only on a terminal, tells when it is at work
    arguments = ("--rounds", "100000", "--batch", "1", "--device", "cpu", "--json", "bench.json", "--markdown", "bench.md")
    with started(tmp_path, "bench", bundle.path, *arguments, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while b"torch-cpu" not in shown:
            shown += os.read(terminal, 65536)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        table = process.stdout.read()
        rest = read_to_end(terminal)
        process.wait(timeout=PATIENCE_S)
    os.close(terminal)
    assert process.returncode == 130
    assert b"partial: interrupted after " in rest
    assert b"Traceback" not in shown + rest
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["partial"].startswith("interrupted after ")
    assert document["measurements"]
    assert {each["stop"] for each in document["measurements"]} == {"interrupted"}
    assert "partial: interrupted after " in table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.md"]


def test_a_bench_interrupted_before_its_first_visit_writes_nothing(bundle: Bundle, tmp_path: Path) -> None:
    with started(tmp_path, "bench", bundle.path, "--batch", "1", "--device", "cpu", "--json", "bench.json") as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_for(lambda: children.read_text().split(), process)  # the worker is being started
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (130, "")
    assert len(said(err)) == 1
    assert "interrupted" in said(err)[0]
    assert list(tmp_path.iterdir()) == []


def read_to_end(terminal: int) -> bytes:
    found = b""
    with contextlib.suppress(OSError):  # Linux says EIO once the other end is closed
        while chunk := os.read(terminal, 65536):
            found += chunk
    return found


@pytest.mark.parametrize("arguments", [("inspect",), ("inspect", "--json", "-"), ("train", "--help")], ids=" ".join)
def test_a_reader_that_went_away_is_no_error(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "lenet_deploy.cli", *arguments]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_head_takes_the_first_line_without_complaint() -> None:
    line = f"{sys.executable} -m lenet_deploy.cli inspect lenet5-wide | head -1"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout.startswith("layer ")
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


@pytest.mark.parametrize("wait_s", [0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4])
@pytest.mark.parametrize("arguments", [("--help",), ("bench", "absent"), ("compare", "absent", "absent")], ids=lambda words: words[0])
def test_an_interrupt_while_modules_are_imported_is_no_traceback(wait_s: float, arguments: tuple[str, ...], tmp_path: Path) -> None:
    # Counted from where Python and the library stand, before which nothing of the command line's can be there.
    program = AS_FROM_A_TERMINAL.replace("app()", "import os; os.write(1, b'.'); app()")
    command = [sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == "."
        time.sleep(wait_s)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in err, err
    if process.returncode not in (0, 2):  # it was quicker
        assert process.returncode in (130, -signal.SIGINT)


def test_an_interrupt_while_an_error_is_said_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At that very moment: the signal's handler raises from within the print."""

    def interrupted(message: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(errors, "_say", interrupted)
    monkeypatch.setattr(sys, "argv", ["lenet-deploy", "compare", "absent", "absent"])
    assert errors.run(build()) == 130
    assert capsys.readouterr().err == "interrupted; nothing is half-written\n"

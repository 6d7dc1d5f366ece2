"""Publishing in one step: killed at any moment, out of space or in the way, a reader finds the old folder or the new one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lenet_deploy import api
from lenet_deploy.atomic import publish, staging_folder
from lenet_deploy.bundle import Bundle, open_bundle
from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.errors import BadInput, CannotWrite
from lenet_deploy.sources import bundle_checkpoint, load
from lenet_deploy.store import write_file

KILLS = 12

# Publishes under an audit hook that kills the process at its N-th file system call, for every N; reports each end as JSON.
KILLED_AT_EVERY_STEP = """
import json, os, signal, sys
from pathlib import Path
from lenet_deploy.atomic import publish, staging_folder
from lenet_deploy.store import write_file

target = Path(sys.argv[1])
ROOMS = ("open", "os", "shutil", "tempfile", "fcntl", "ctypes")

def content():
    return {path.name: path.read_text() for path in sorted(target.iterdir())}

def publication(text, last_step):
    steps = 0
    def hook(event, arguments):
        nonlocal steps
        if event.partition(".")[0] in ROOMS:
            steps += 1
            if steps == last_step:
                os.kill(os.getpid(), signal.SIGKILL)
    if last_step:
        sys.addaudithook(hook)
    with staging_folder(target) as staging:
        for name in ("one", "two"):
            write_file(staging / name, text.encode())
        publish(staging, target, target.exists())

publication("old", None)
for step in range(1, 1000):
    child = os.fork()
    if child == 0:
        publication("new", step)
        os._exit(0)
    survived = os.waitpid(child, 0)[1] == 0
    left = len(list(target.parent.glob(".*")))
    found = content()
    publication("old", None)
    print(json.dumps({"survived": survived, "found": found, "left": left, "cleaned": list(target.parent.glob(".*")) == []}), flush=True)
    if survived:
        break
"""

# Imports torch once, then forks a child for each line of its input; the child exports two checkpoints in turn until it is killed.
EXPORTS_UNTIL_KILLED = """
import itertools, os, sys
import torch
from lenet_deploy import api
from lenet_deploy.parity import check
from lenet_deploy.sources import load

torch.set_num_threads(1)
api.INPUTS, check.BATCH_SIZES = 4, (1, 3)  # an export takes a fraction of a second, so that kills hit all of its steps
target = sys.argv[1]
twins = [load("lenet5", settings={"in_channels": "1", "image_size": "16"}, seed=seed) for seed in (0, 1)]
for twin in twins:
    api.export(twin, target, formats=["torchscript"], device="cpu", force=True)
print(*(twin.metadata().weights_sha256 for twin in twins), flush=True)
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        for twin in itertools.cycle(twins):
            api.export(twin, target, formats=["torchscript"], device="cpu", force=True)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""

# Runs the command line once for each limit on the size of a file, as a disk that fills up; prints the exit codes.
WITH_LIMITED_FILES = """
import json, resource, sys
import torch
from lenet_deploy.cli import build
from lenet_deploy.cli.errors import run

torch.set_num_threads(1)
limits, codes = json.loads(sys.argv.pop(1)), []
for limit in limits:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    codes.append(run(build()))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps(codes))
"""


def python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def folder_of(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / "file").write_text(text)
    return path


def test_a_publication_killed_at_any_step_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    done = subprocess.run(python(KILLED_AT_EVERY_STEP, tmp_path / "target"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    states = [end["found"] for end in ends]
    old, new = ({"one": text, "two": text} for text in ("old", "new"))
    assert all(state in (old, new) for state in states)
    assert states.index(new) > 20, "it was killed many times before the swap"
    assert states[states.index(new) :].count(new) == len(states) - states.index(new) > 2, "and some times after it"
    assert any(end["left"] for end in ends), "a kill leaves a staging folder behind"
    assert all(end["cleaned"] for end in ends), "which the next publication removes"
    assert [end["survived"] for end in ends] == [False] * (len(ends) - 1) + [True]


def test_an_export_killed_at_random_moments_leaves_one_bundle_or_the_other(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    found = []
    with subprocess.Popen(
        python(EXPORTS_UNTIL_KILLED, target), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as exporter:
        assert exporter.stdin is not None
        assert exporter.stdout is not None
        digests = set(exporter.stdout.readline().split())
        chance = random.Random(0)
        for _ in range(KILLS):
            exporter.stdin.write("\n")
            child = int(exporter.stdout.readline())
            time.sleep(chance.uniform(0, 0.7))
            os.kill(child, signal.SIGKILL)
            assert exporter.stdout.readline() == "gone\n"
            opened = open_bundle(target)
            assert [opened.read(artifact) for artifact in opened.manifest.artifacts]
            assert bundle_checkpoint(opened).metadata() == opened.metadata
            found.append(opened.metadata.weights_sha256)
        exporter.stdin.close()
        assert exporter.wait(timeout=30) == 0
    assert len(digests) == 2
    assert set(found) <= digests
    api.export(load("lenet5", settings={"in_channels": "1", "image_size": "16"}), target, formats=["torchscript"], device="cpu", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_full_disk_stops_an_export_with_code_5_and_changes_nothing(bundle: Bundle, tmp_path: Path) -> None:
    target = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    before = content(tmp_path)
    checkpoint_size = (target / "checkpoint.safetensors").stat().st_size
    limits = [0, 1000, checkpoint_size + 1, checkpoint_size + 1500]  # in the checkpoint at once, in its middle, in an artifact after it
    command = ("export", target / "checkpoint.safetensors", "--to", "torchscript", "--device", "cpu", "--out", target, "--force", "--quiet")
    done = subprocess.run(python(WITH_LIMITED_FILES, limits, *command), capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout) == [5] * len(limits), done.stderr
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    messages = done.stderr.splitlines()
    assert len(messages) == len(limits)
    assert all(message.startswith("error:") and "File too large" in message and "nothing was changed" in message for message in messages)


def test_a_full_disk_stops_a_training_with_code_5_and_keeps_the_old_results(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_text("old")
    (tmp_path / "metrics.json").write_text("old")
    before = content(tmp_path)
    command = ("train", "--epochs", "1", "--set", "in_channels=1", "--set", "channels=2,3", "--device", "cpu", "--out", tmp_path, "--quiet")
    done = subprocess.run(python(WITH_LIMITED_FILES, [5000], *command), capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout) == [5], done.stderr
    assert content(tmp_path) == before


def test_publishing_a_first_folder_moves_it_into_place(tmp_path: Path) -> None:
    with staging_folder(tmp_path / "target") as staging:
        write_file(staging / "file", b"new")
        publish(staging, tmp_path / "target", replace=False)
        assert not staging.exists()
    assert content(tmp_path) == {"target/file": b"new"}


def test_publishing_over_a_folder_swaps_and_then_removes_the_old_one(tmp_path: Path) -> None:
    target = folder_of(tmp_path / "target", "old")
    with staging_folder(target) as staging:
        write_file(staging / "file", b"new")
        publish(staging, target, replace=True)
        assert content(staging) == {"file": b"old"}
    assert content(tmp_path) == {"target/file": b"new"}


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_publishing_without_leave_to_replace_never_replaces(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("old")
    elif kind == "dangling link":
        target.symlink_to(tmp_path / "absent")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "file").write_text("old")
    before = (target.is_symlink(), target.is_dir(), content(tmp_path))
    with staging_folder(target) as staging:
        write_file(staging / "file", b"new")
        with pytest.raises(CannotWrite, match="target"):
            publish(staging, target, replace=False)
        assert content(staging) == {"file": b"new"}
    assert (target.is_symlink(), target.is_dir(), content(tmp_path)) == before


def test_what_another_process_put_there_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with staging_folder(target) as staging:
        write_file(staging / "file", b"new")
        folder_of(target, "other")
        with pytest.raises(CannotWrite):
            publish(staging, target, replace=False)
    assert content(tmp_path) == {"target/file": b"other"}


def test_a_staging_folder_is_removed_whatever_happens(tmp_path: Path) -> None:
    def interrupted() -> None:
        with staging_folder(tmp_path / "target") as staging:
            write_file(staging / "file", b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["target", "b[1]", "*", "a b", ".hidden"])
def test_an_abandoned_staging_folder_is_removed_and_nothing_else(name: str, tmp_path: Path) -> None:
    abandoned = folder_of(tmp_path / f".{name}.staging-dead", "half")
    mine = folder_of(tmp_path / f"{name}.staging-of-mine", "precious")
    others = folder_of(tmp_path / ".other.staging-dead", "of another target")
    with staging_folder(tmp_path / name):
        assert not abandoned.exists()
        assert mine.exists()
        assert others.exists()


def test_a_staging_folder_at_work_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with staging_folder(target) as first:
        write_file(first / "file", b"first")
        with staging_folder(target) as second:
            assert first != second
            assert content(first) == {"file": b"first"}
        assert not second.exists()
        publish(first, target, replace=False)
    assert content(tmp_path) == {"target/file": b"first"}


def test_a_staging_folder_of_another_process_at_work_is_left_alone(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from lenet_deploy.atomic import staging_folder
with staging_folder(Path(sys.argv[1])) as staging:
    print(staging, flush=True)
    sys.stdin.readline()
"""
    with subprocess.Popen(python(script, tmp_path / "target"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        with staging_folder(tmp_path / "target"):
            assert theirs.is_dir()
        other.kill()
        other.wait()
        assert theirs.is_dir()
        with staging_folder(tmp_path / "target"):
            assert not theirs.exists()


@pytest.mark.parametrize(
    "place", ["file/bundle", "file/deep/bundle", "/proc/lenet-deploy/bundle", "x" * 300], ids=["below a file", "deep below", "proc", "long"]
)
def test_an_impossible_place_cannot_be_written(place: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CannotWrite, match=r"cannot be written"):
        api.export(checkpoint, tmp_path / place, formats=["torchscript"], device="cpu")
    assert content(tmp_path) == {"file": b"in the way"}


def test_the_working_folder_itself_is_no_place_for_a_bundle(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((BadInput, CannotWrite)):
        api.export(tiny, ".", formats=["torchscript"], device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_writing_a_file_replaces_it_whole_with_the_usual_permissions(tmp_path: Path) -> None:
    path = tmp_path / "file"
    before = os.umask(0o027)
    try:
        write_file(path, b"old" * 1000)
        write_file(path, b"new")
    finally:
        os.umask(before)
    assert content(tmp_path) == {"file": b"new"}
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "place", ["folder", "file/deeper", "absent/file", "x" * 300], ids=["folder", "below a file", "absent folder", "long"]
)
def test_a_failed_write_changes_nothing(place: str, tmp_path: Path) -> None:
    folder_of(tmp_path / "folder", "old")
    (tmp_path / "file").write_text("old")
    with pytest.raises(CannotWrite):
        write_file(tmp_path / place, b"new")
    assert content(tmp_path) == {"folder/file": b"old", "file": b"old"}


def test_a_write_that_fails_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
from lenet_deploy.errors import CannotWrite
from lenet_deploy.store import write_file
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
try:
    write_file(Path(sys.argv[1]), bytes(1000))
except CannotWrite as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
    (tmp_path / "file").write_text("old")
    done = subprocess.run(python(script, tmp_path / "file"), capture_output=True, text=True, timeout=60)
    assert "File too large" in done.stdout
    assert content(tmp_path) == {"file": b"old"}

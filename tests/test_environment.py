"""The environment is this machine's, this process's and this commit's."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from inspect import unwrap  # looks behind a cache
from pathlib import Path

import pytest
import torch

from lenet_deploy import environment

ROOT = Path(__file__).resolve().parent.parent


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def test_versions_are_those_installed_and_absent_packages_are_left_out() -> None:
    expected = {name: version for name in environment.PACKAGES if (version := installed(name))}
    assert environment.versions() == expected
    assert {"lenet-deploy", "torch", "onnx", "numpy", "safetensors"} <= expected.keys()
    assert environment.capture().versions == expected


def test_an_absent_package_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-distribution"))
    assert environment.versions() == {"torch": metadata.version("torch")}


def test_the_machine_is_named() -> None:
    captured = environment.capture()
    assert captured.os == platform.platform()
    assert captured.python == platform.python_version()
    assert captured.cpu.strip()
    if Path("/proc/cpuinfo").exists() and "model name" in Path("/proc/cpuinfo").read_text():
        assert captured.cpu in Path("/proc/cpuinfo").read_text()


def test_a_machine_without_cpuinfo_still_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", absent)
    assert unwrap(environment._cpu_name)() == (platform.processor() or platform.machine())
    assert unwrap(environment._driver)() is None


@pytest.mark.parametrize(
    "text",
    [  # the proprietary module's file and the open one's
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.03  Tue Jul  1 05:12:30 UTC 2026\nGCC version:  gcc version 13.3.0\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release Build  (root@host)\n",
    ],
    ids=["proprietary", "open"],
)
def test_the_drivers_version_is_read_from_its_own_file(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert unwrap(environment._driver)() == "580.159.03"


def test_cores_are_those_this_process_may_use() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert environment.capture().cores == cores


def test_gpu_is_device_zero_or_none() -> None:
    expected = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    assert environment.capture().gpu == expected


def test_threads_are_torchs_at_the_time_of_asking() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (before + 1, before):
            torch.set_num_threads(threads)
            assert environment.capture().threads == threads
    finally:
        torch.set_num_threads(before)


def test_capturing_does_not_load_torch_and_says_so(tmp_path: Path) -> None:
    program = (
        "import sys; from lenet_deploy import environment; found = environment.capture(); "
        "print(found.threads, found.gpu, 'torch' in sys.modules, found.versions['torch'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.stdout, done.stderr) == (f"None None False {metadata.version('torch')}\n", "")


def test_threads_are_known_once_torch_is_loaded_even_if_asked_before(tmp_path: Path) -> None:
    program = (
        "from lenet_deploy import environment; environment.capture(); import torch; "
        "print(environment.capture().threads == torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_the_commit_is_the_checkouts_head() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and a git checkout: an unpacked source tree has no commit")
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=30)
    assert unwrap(environment._commit)() == (head.stdout.strip() if head.returncode == 0 else None)


def test_a_tree_without_git_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "lenet_deploy" / "environment.py"))
    assert unwrap(environment._commit)() is None


def test_a_git_that_is_missing_or_fails_gives_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()  # an empty one: git says it is no repository
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "lenet_deploy" / "environment.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert unwrap(environment._commit)() is None
    monkeypatch.setenv("PATH", "")
    assert unwrap(environment._commit)() is None

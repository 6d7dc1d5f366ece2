"""What several tests share: a trained checkpoint, a published bundle, the real data sets, and the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lenet_deploy import api, data, train
from lenet_deploy.bundle import Bundle
from lenet_deploy.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("LENET_DEPLOY_SHARED", ROOT.parent / "shared"))
SMALL = {"in_channels": "1", "image_size": "28", "padding": "2"}

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the golden file and the real data sets."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: the golden file and the real data sets are kept beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    """The embedded digits."""
    return data.load_dataset("digits")


@pytest.fixture(scope="session")
def checkpoint(digits: data.Dataset) -> Checkpoint:
    """lenet5 trained for three epochs on the embedded digits."""
    return train.train(train.TrainConfig("lenet5", SMALL, epochs=3, device="cpu"), digits)


@pytest.fixture(scope="session")
def bundle(checkpoint: Checkpoint, digits: data.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of every artifact; tests that damage one copy it first."""
    return api.export(checkpoint, tmp_path_factory.mktemp("published") / "bundle", dataset=digits).bundle


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run `lenet-deploy ARGS...` as a real process and return it, output captured as text."""

    def run(*arguments: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lenet_deploy.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})}, timeout=300)

    return run

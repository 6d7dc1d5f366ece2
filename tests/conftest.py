"""What several tests share: trained checkpoints, bundles whole and faulty, parity's report, the real data sets, and the command line."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

from lenet_deploy import api, data, environment, pairing, train
from lenet_deploy.bundle import Bundle, open_bundle, write_artifact, write_manifest
from lenet_deploy.checkpoint import Checkpoint, to_bytes
from lenet_deploy.devices import computing_on
from lenet_deploy.exporters import ExportOptions
from lenet_deploy.exporters.onnx import export_torchscript
from lenet_deploy.exporters.tensors import record
from lenet_deploy.exporters.torchscript import export_trace
from lenet_deploy.models import find_model
from lenet_deploy.parity import check, inputs
from lenet_deploy.parity.check import Trial
from lenet_deploy.records import Manifest, ParityReport
from lenet_deploy.variants import CHECKPOINT, ONNX_TS, TRACE, ArtifactSpec

ROOT = Path(__file__).resolve().parent.parent
IDX = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}  # torchvision's folders
SHARED = Path(os.environ.get("LENET_DEPLOY_SHARED", ROOT.parent / "shared"))
SMALL = {"in_channels": "1", "image_size": "28", "padding": "2"}

# The smallest network in which every layer can be told from its neighbours; its channels are no multiple of any block of ORT's layouts.
TINY = {"in_channels": "1", "image_size": "20", "channels": "6,10", "hidden": "24,16"}

# The same examples every time, however long one takes: this machine may be busy.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
T = TypeVar("T")


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], T]], T]:
    """What a function makes, made by the first process of this test run that asks for that name; the others read it.

    The function takes a path of its own, which stays.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], T]) -> T:
        stored = shared / f"{name}.pickle"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not stored.exists():
                stored.write_bytes(pickle.dumps(make(shared / name)))
        found: T = pickle.loads(stored.read_bytes())
        return found

    return made


@pytest.fixture(scope="session", autouse=True)
def oracles() -> Iterator[None]:
    """The input sets of a checkpoint, with the oracle's scores, are computed once: they do not change, and most tests ask for the same."""
    known: dict[object, tuple[inputs.InputSet, ...]] = {}
    compute = inputs.input_sets

    def remembered(checkpoint: Checkpoint, dataset: data.Dataset, count: int) -> tuple[inputs.InputSet, ...]:
        images = hashlib.sha256(dataset.test_images.numpy().tobytes() + dataset.test_labels.numpy().tobytes()).digest()
        key = (repr(checkpoint.metadata()), dataset.name, images, count, inputs.MAX_PIXELS)
        if key not in known:
            known[key] = compute(checkpoint, dataset, count)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "input_sets", remembered)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the golden file and the real data sets."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: the golden file and the real data sets are kept beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def idx_root(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --data-dir with the official `.gz` files of MNIST and Fashion-MNIST, never unpacked."""
    root = tmp_path_factory.mktemp("idx")
    for name, folder in IDX.items():
        if not (shared / "data" / name).is_dir():
            pytest.skip(f"{shared / 'data' / name} is absent: the real data sets are kept beside the checkout")
        (root / folder).mkdir()
        shutil.copytree(shared / "data" / name, root / folder / "raw", copy_function=shutil.copyfile)
        (root / folder / "raw").chmod(0o755)
    return root


@pytest.fixture(scope="session")
def cifar10_root(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --data-dir with CIFAR-10 as `cifar10.npz`, made of its lossless sheets."""
    script = shared / "data/cifar10/to_npz.py"
    if not script.is_file():
        pytest.skip(f"{script} is absent: the real data sets are kept beside the checkout")
    root = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(script), str(root / "cifar10.npz")], check=True)
    return root


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several threads wait for each other at each of thousands of tiny steps, for minutes where other processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    """The embedded digits."""
    return data.load_dataset("digits")


@pytest.fixture(scope="session")
def checkpoint(digits: data.Dataset, once: Callable[..., Checkpoint]) -> Checkpoint:
    """lenet5 trained for three epochs on the embedded digits; the same one in every process, whose seconds are in it, too."""
    return once("checkpoint", lambda path: train.train(train.TrainConfig("lenet5", SMALL, epochs=3, device="cpu"), digits))


def fewer(patch: pytest.MonkeyPatch) -> None:
    """Sixteen generated images of each kind and two batch sizes, where users get 256 and six."""
    patch.setattr(api, "INPUTS", 16)
    patch.setattr(pairing, "INPUTS", 16)
    patch.setattr(check, "BATCH_SIZES", (1, 3))


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity of little in every test, but for the session's `report` and real processes."""
    fewer(monkeypatch)


@pytest.fixture(scope="session")
def bundle(checkpoint: Checkpoint, digits: data.Dataset, once: Callable[..., Path]) -> Bundle:
    """A bundle of every artifact; tests that damage one copy it first."""

    def export(path: Path) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            fewer(patch)  # `report` has what users get
            return api.export(checkpoint, path, dataset=digits).bundle.path

    return open_bundle(once("bundle", export))


@pytest.fixture(scope="session")
def report(bundle: Bundle, once: Callable[..., ParityReport]) -> ParityReport:
    """Parity of the whole bundle on the CPU, with the batch sizes and checks that users get, and every layer."""
    return once("report", lambda path: api.check_parity(bundle, device="cpu", drill=True))


@pytest.fixture(scope="session")
def tiny(digits: data.Dataset) -> Checkpoint:
    """A small lenet5, trained for a little: what most faults are put into."""
    return train.train(train.TrainConfig("lenet5", TINY, epochs=4, device="cpu"), digits)


@pytest.fixture(scope="session")
def few(digits: data.Dataset) -> data.Dataset:
    """The digits with forty test images."""
    return dataclasses.replace(digits, test_images=digits.test_images[:40], test_labels=digits.test_labels[:40])


@pytest.fixture(scope="session")
def trial(tiny: Checkpoint, few: data.Dataset) -> Trial:
    """What the tiny network's variants are put through: three batch sizes, sixteen generated images of each kind."""
    with computing_on(torch.device("cpu")):
        sets = inputs.input_sets(tiny, few, 16)
    return Trial(sets, (1, 2, 7), tiny)


@pytest.fixture(scope="session")
def tiny_bundle(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny network as TorchScript and ONNX by their quicker exporters; published without the parity check, which is on trial."""
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    folder.mkdir()
    artifacts = [write_artifact(folder, CHECKPOINT.name, CHECKPOINT.format, CHECKPOINT.path, to_bytes(tiny))]
    for spec in (TRACE, ONNX_TS):
        assert spec.exporter
        assert spec.reader
        exported = spec.exporter()(tiny.module(), tiny.metadata(), ExportOptions())
        tensors = record(tiny.weights, spec.reader()(exported.data), find_model(tiny.model).factors)
        details = {**exported.details, "tensors": list(tensors)}
        artifacts.append(write_artifact(folder, spec.name, spec.format, spec.path, exported.data, details))
    manifest = Manifest(tiny.metadata(), tuple(artifacts), environment.versions(), tiny.dataset, environment.capture())
    write_manifest(folder, manifest)
    return Bundle(folder, manifest)


@pytest.fixture(scope="session")
def faulty() -> Callable[[ArtifactSpec, Checkpoint, nn.Module], bytes]:
    """The bytes of an artifact whose module is not the checkpoint's, by the quicker exporter of its format."""

    def export(spec: ArtifactSpec, checkpoint: Checkpoint, module: nn.Module) -> bytes:
        exporter = export_torchscript if spec.format == "onnx" else export_trace
        return exporter(module.eval(), checkpoint.metadata(), ExportOptions()).data

    return export


@pytest.fixture(scope="session")
def vouched() -> Callable[[Bundle, Path, ArtifactSpec, bytes], Bundle]:
    """A copy of a bundle in which one artifact has other bytes that the manifest vouches for."""

    def rebuild(bundle: Bundle, folder: Path, spec: ArtifactSpec, content: bytes) -> Bundle:
        folder.mkdir()
        artifacts = [
            write_artifact(
                folder, each.name, each.format, each.path, content if each.name == spec.name else bundle.read(each), each.details
            )
            for each in bundle.manifest.artifacts
        ]
        write_manifest(folder, dataclasses.replace(bundle.manifest, artifacts=tuple(artifacts)))
        return open_bundle(folder)

    return rebuild


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run `lenet-deploy ARGS...` as a real process and return it, output captured as text."""

    def run(*arguments: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lenet_deploy.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})}, timeout=300)

    return run

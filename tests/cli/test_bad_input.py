"""Bad input: the documented exit code, one message that says what, where and what to do, and nothing changed on disk."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from lenet_deploy.cli import build
from lenet_deploy.cli.errors import run

from lenet_deploy.bundle import Bundle, open_bundle, write_manifest
from lenet_deploy.checkpoint import Checkpoint, to_bytes
from lenet_deploy.store import sha256

MESSAGE_LINES = 4  # the sentence and three lines of code that save a state_dict
Snapshot = dict[str, bytes | None]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    def message(self) -> str:
        """The one error message, after the notes that a command may have written before it."""
        assert "Traceback" not in self.err
        lines = self.err.splitlines()
        starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
        assert len(starts) == 1, self.err
        assert len(lines) - starts[0] <= MESSAGE_LINES, self.err
        return "\n".join(lines[starts[0] :])


Lenet = Callable[..., Outcome]


class Payload:
    """Writes a file into the working folder when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return (os.system, ("touch executed",))


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def torch_saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def npz(**changes: np.ndarray) -> bytes:
    images, labels = np.zeros((4, 8, 8), np.uint8), np.arange(4, dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **{"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels, **changes})
    return buffer.getvalue()


@pytest.fixture(scope="module")
def damaged(bundle: Bundle, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each thing that can be wrong."""
    from PIL import Image

    root = tmp_path_factory.mktemp("damaged")
    shutil.copytree(bundle.path, root / "bundle")
    shutil.copytree(bundle.path, root / "altered-bundle")
    shutil.copytree(bundle.path, root / "empty-manifest")
    shutil.copytree(bundle.path, root / "escaping-bundle")
    for path in (root / "altered-bundle").iterdir():
        if path.name != "manifest.json":
            path.write_bytes(flipped(path.read_bytes(), path.stat().st_size // 2))
    (root / "empty-manifest" / "manifest.json").write_bytes(b"")
    escaping = [dataclasses.replace(artifact, path=f"../bundle/{artifact.path}") for artifact in bundle.manifest.artifacts]
    write_manifest(root / "escaping-bundle", dataclasses.replace(bundle.manifest, artifacts=tuple(escaping)))
    (root / "folder").mkdir()
    (root / "folder" / "notes.txt").write_text("precious")
    (root / "folder.npz").mkdir()
    (root / "folder.png").mkdir()

    whole = to_bytes(checkpoint)
    payload = Payload()
    files = {
        "notes.txt": b"precious",
        "whole.safetensors": whole,
        "empty.safetensors": b"",
        "truncated.safetensors": whole[:-9],
        "flipped.safetensors": flipped(whole, len(whole) - 50),
        "foreign.safetensors": b"a text that calls itself a checkpoint",
        "misfit.pt": torch_saved({"conv1.weight": torch.zeros(3)}),
        "payload.pt": torch_saved({**checkpoint.weights, "fc3.bias": payload}),
        "payload.pth": pickle.dumps(payload, 4),
        "module.pt": torch_saved(checkpoint.module()),
        "foreign.onnx": b"a text that calls itself a graph",
        "truncated.onnx": (bundle.path / "model.onnx").read_bytes()[:-99],
        "truncated.trace.pt": (bundle.path / "model.trace.pt").read_bytes()[:-99],
        "empty.npz": b"",
        "truncated.npz": npz()[:-40],
        "flipped.npz": flipped(npz(), 150),
        "foreign.npz": b"PK\x03\x04 no archive",
        "incomplete.npz": torch_saved({}),
        "float.npz": npz(test_images=np.zeros((4, 8, 8))),
        "uneven.npz": npz(train_labels=np.zeros(3, np.uint8)),
        "eleven.npz": npz(test_labels=np.full(4, 10, np.uint8)),
        "text.png": b"no image",
        "empty.png": b"",
        "page.jpg": b"<html></html>",
    }
    for name, content in files.items():
        (root / name).write_bytes(content)
    Image.linear_gradient("L").save(root / "image.png")
    Image.linear_gradient("L").save(root / "image.gif")
    (root / "truncated.png").write_bytes((root / "image.png").read_bytes()[:-60])
    return root


def snapshot(root: Path) -> Snapshot:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))}


@pytest.fixture(scope="module")
def before(damaged: Path) -> Snapshot:
    return snapshot(damaged)


@pytest.fixture
def lenet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damaged: Path, before: Snapshot) -> Lenet:
    """`lenet-deploy ARGS...` in this process, in the folder of damaged things, which must stay as it is."""
    monkeypatch.chdir(damaged)

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["lenet-deploy", *arguments])
        capsys.readouterr()
        code = run(build())
        printed = capsys.readouterr()
        after = snapshot(damaged)
        changed = sorted({name for name, _ in before.items() ^ after.items()})
        for name in changed:  # so that one defect does not fail every later test
            shutil.rmtree(damaged / name, ignore_errors=True)
            (damaged / name).unlink(missing_ok=True)
        assert changed == []
        return Outcome(code, printed.out, printed.err)

    return call


UNKNOWN = [
    ("inspect lenet6", "unknown model 'lenet6'", "lenet5"),
    ("train --model lenet-5", "unknown model 'lenet-5'", "lenet5"),
    ("train --model lenet-5 --out new", "unknown model 'lenet-5'", "lenet5"),
    ("export lenet5-wid", "unknown model 'lenet5-wid'", "lenet5-wide"),
    ("export whole.pt --model lenet5", "whole.pt", "no such file"),
    ("export misfit.pt --model lenet51998", "unknown model 'lenet51998'", "lenet5-1998"),
    ("evaluate lenet5-1989", "unknown model 'lenet5-1989'", "lenet5-1998"),
    ("predict lenet4 image.png", "unknown model 'lenet4'", "lenet5"),
    ("export lenet5 --to onxx", "unknown format 'onxx'", "onnx"),
    ("export lenet5 --to torchscript,torch-script", "unknown format 'torch-script'", "torchscript"),
    ("export lenet5 --precision fp33", "unknown precision 'fp33'", "fp32"),
    ("parity bundle --variants onnx/ort-cpu/fp23", "unknown variant 'onnx/ort-cpu/fp23'", "onnx/ort-cpu/fp32"),
    ("parity bundle --require onnx/ort-cpu/fp23", "unknown variant 'onnx/ort-cpu/fp23'", "onnx/ort-cpu/fp32"),
    ("parity bundle --require eager/*,tensorflow/*", "unknown variant 'tensorflow/*'", "eager/torch-cpu/fp32"),
    ("parity bundle --variants eager/*,tensorflow/*", "unknown variant 'tensorflow/*'", "eager/torch-cpu/fp32"),
    ("bench bundle --variants eager/torch-gpu/fp32", "unknown variant 'eager/torch-gpu/fp32'", "eager/torch-cpu/fp32"),
    ("predict bundle image.png --variant eager/torch-cpu", "unknown variant 'eager/torch-cpu'", "eager/torch-cpu/fp32"),
    ("parity lenet5-mnist", "nothing stands there yet", "lenet-deploy export lenet5-mnist"),
    ("bench lenet5", "nothing stands there yet", "lenet-deploy export lenet5"),
    ("train --data minst", "unknown data set 'minst'", "mnist"),
    ("evaluate bundle --data cifar", "unknown data set 'cifar'", "cifar10"),
    ("parity bundle --data digit", "unknown data set 'digit'", "digits"),
    ("export lenet5 --data fashion", "unknown data set 'fashion'", "fashion-mnist"),
    ("bench bundle --profile quik", "unknown profile 'quik'", "quick"),
    ("bench bundle --scope devise", "unknown scope 'devise'", "device"),
    ("bench bundle --scope device,host", "unknown scope 'host'", "e2e"),
    *((f"{command} --device tpu", "unknown device 'tpu'", "cuda") for command in ("train", "train --out new", "demo", "demo --out new")),
    *((f"{command} bundle --device gpu", "unknown device 'gpu'", "cuda") for command in ("evaluate", "parity", "bench")),
    ("export lenet5 --device cuda:", "unknown device 'cuda:'", "cuda:N"),
    ("predict bundle image.png --device cpu:0", "unknown device 'cpu:0'", "cpu"),
]

VALUES = [
    ("inspect lenet5 --set channels", "'channels'", "KEY=VALUE"),
    ("export lenet5 --set =3", "'=3'", "KEY=VALUE"),
    ("train --set pooling=", "'pooling='", "KEY=VALUE"),
    ("inspect lenet5 --set chanels=8,16", "unknown config key 'chanels'", "channels"),
    ("train --set chanels=8,16 --out new", "unknown config key 'chanels'", "channels"),
    ("inspect lenet5 --set channels=8", "channels = 8", "two numbers"),
    ("inspect lenet5 --set channels=a,b", "channels = 'a,b'", "whole numbers"),
    ("inspect lenet5 --set pooling=mean", "pooling = 'mean'", "avg, max"),
    ("inspect lenet5 --set in_channels=2", "in_channels = 2", "1, 3"),
    ("inspect lenet5 --set hidden=1,99999", "hidden = 99999", "1024"),
    ("inspect lenet5 --set image_size=31", "layer pool1", "(27 + 2*0 - 2)/2 + 1 = 13.5"),
    ("export lenet5 --set image_size=30", "layer pool2", "(9 + 2*0 - 2)/2 + 1 = 4.5"),
    ("train --set image_size=3", "layer conv1", "does not fit"),
    ("train --set image_size=31 --out new", "layer pool1", "13.5"),
    ("inspect lenet5-1998 --set classes=12", "lenet5-1998 has classes = 10", "use lenet5"),
    ("inspect bundle --set channels=8,16", "bundle", "own model and config"),
    ("inspect whole.safetensors --set channels=8,16", "whole.safetensors", "own model and config"),
    ("export whole.safetensors --model lenet5", "whole.safetensors", "own model and config"),
    ("parity bundle --batch 0", "batch size is 0", "at least 1"),
    ("parity bundle --batch 4,-1", "batch size is -1", "at least 1"),
    ("bench bundle --batch -8", "batch size is -8", "at least 1"),
    ("bench bundle --batch eight", "'eight'", "whole numbers"),
    ("bench bundle --batch 1.5", "'1.5'", "whole numbers"),
    ("parity bundle --batch 1,,2", "'1,,2'", "empty part"),
    ("parity bundle --require eager/*,,onnx/*", "'eager/*,,onnx/*'", "empty part"),
    ("parity bundle --variants eager/* --require onnx/ort-cpu/fp32", "onnx/ort-cpu/fp32 is required but not selected", "widen"),
    ("parity bundle --device cpu --require eager/torch-cuda/fp32", "eager/torch-cuda/fp32 is required but not selected", "widen"),
    ("bench bundle --rounds 0", "rounds is 0", "at least 1"),
    ("bench bundle --rounds -2", "rounds is -2", "at least 1"),
    ("bench bundle --processes 0", "processes is 0", "at least 1"),
    ("bench bundle --threads 0", "threads is 0", "from 1 to"),
    ("bench bundle --input-shape 1,28", "--input-shape 1,28", "channels, height and width"),
    ("bench bundle --input-shape 0,28,28", "input shape is 0,28,28", "at least 1"),
    ("bench bundle --input-shape 3,28,28", "the input shape asked for is 3 x 28 x 28", "leave that out"),
    ("parity bundle --tolerance 1e-5", "--tolerance cannot be used with one bundle", "leave it out"),
    ("parity bundle bundle --drill --require *", "--require, --drill cannot be used with two files", "leave them out"),
    ("parity bundle whole.safetensors --tolerance 1e-5", "a tolerance of its own", "leave the tolerance out"),
    ("bench bundle --slo-ms 0", "latency budget is 0 ms", "above 0"),
    ("bench bundle --ort-option intra", "--ort-option 'intra'", "KEY=VALUE"),
    ("bench bundle --ort-option no_such=1 --variants onnx/ort-cpu/fp32 --batch 1", "no_such", "option"),
    ("bench bundle --baseline eager", "unknown baseline 'eager'", "eager/torch-cpu/fp32"),
    ("bench bundle --scenario offlin", "unknown scenario 'offlin'", "offline"),
    ("bench bundle --latency-bound-ms 5", "--latency-bound-ms", "leave it out"),
    ("bench bundle --trace traces --json x.json", "--json cannot be used with --trace", "leave it out"),
    ("bench bundle --trace traces --seed 1", "--seed cannot be used with --trace", "leave it out"),
    ("bench bundle --scenario offline --latency-bound-ms 1", "--latency-bound-ms cannot be used with --scenario offline", "leave it out"),
    ("bench bundle --scenario single-stream --batch 8", "--batch cannot be used with --scenario single-stream", "leave it out"),
    ("bench bundle --scenario offline --batch 8,16", "--batch 8,16", "one number"),
    ("bench bundle --rounds 2 --limit 3", "--limit cannot be used with --rounds", "leave it out"),
    ("bench bundle --threads 1 --ort-option intra_op_num_threads=2", "--threads and --ort-option", "leave one out"),
    ("bench bundle --variants onnx/ort-cpu/fp32 --baseline eager/torch-cpu/fp32", "is not among the variants", "widen --variants"),
    ("bench bundle --json x.out --markdown x.out", "two results would go to x.out", "name two files"),
    ("bench bundle --markdown -", "standard output for --json alone", "name a file"),
    ("bench bundle --scenario offline --rounds 3", "--rounds cannot be used with --scenario", "leave it out"),
    ("train --epochs 0", "epochs is 0", "at least 1"),
    ("train --batch-size 0", "batch-size is 0", "at least 1"),
    ("train --batch-size -64", "batch-size is -64", "at least 1"),
    ("train --lr nan", "lr is nan", "positive"),
    ("train --lr 0", "lr is 0", "positive"),
    ("train --lr -0.1", "lr is -0.1", "positive"),
    ("train --lr inf", "lr is inf", "positive"),
    ("train --seed 99999999999999999999", "seed", "99999999999999999999"),
    ("export lenet5 --seed 99999999999999999999", "seed", "99999999999999999999"),
    ("predict bundle image.png --top 0", "top is 0", "at least 1"),
    ("predict bundle image.png --top -1", "top is -1", "at least 1"),
]

FILES = [
    ("inspect absent.safetensors", "absent.safetensors", "no such file"),
    ("export absent/checkpoint.safetensors", "absent/checkpoint.safetensors", "no such file"),
    ("parity absent", "absent/manifest.json", "no such file"),
    ("bench absent", "absent/manifest.json", "no such file"),
    ("predict bundle absent.png", "absent.png", "no such file"),
    ("predict bundle image.png absent.png", "absent.png", "no such file"),
    ("train --data absent.npz", "absent.npz", "no such file"),
    ("evaluate absent.onnx", "absent.onnx", "no such file"),
    ("train --data mnist --data-dir folder", "folder/MNIST/raw", "--download"),
    ("train --data cifar10 --data-dir absent", "absent/cifar-10-batches-py", "--download"),
    ("inspect folder", "folder: not a bundle", "lenet-deploy export"),
    ("evaluate folder", "folder: not a bundle", "lenet-deploy export"),
    ("parity folder", "folder: not a bundle", "lenet-deploy export"),
    ("bench folder", "folder: not a bundle", "lenet-deploy export"),
    ("parity image.png", "image.png: one file", "OTHER"),
    ("bench image.png", "image.png", "error"),
    ("bench foreign.onnx", "foreign.onnx: not a readable ONNX file", "error"),
    ("parity bundle/model.onnx truncated.onnx", "truncated.onnx: not a readable ONNX file", "error"),
    ("parity bundle/model.onnx absent.onnx", "absent.onnx", "no such file"),
    ("predict bundle folder.png", "folder.png", "a folder"),
    ("train --data folder.npz", "folder.npz", "a folder"),
    ("inspect notes.txt/deeper", "notes.txt/deeper", "error"),
    ("inspect " + "x" * 3000, "xxx", "error"),
    ("predict bundle " + "x" * 3000, "xxx", "cannot be read"),
    ("inspect empty.safetensors", "empty.safetensors", "empty"),
    ("inspect truncated.safetensors", "truncated.safetensors", "truncated"),
    ("export flipped.safetensors", "flipped.safetensors", "digest"),
    ("evaluate foreign.safetensors", "foreign.safetensors", "another kind"),
    ("export misfit.pt", "misfit.pt", "0 convolutions"),
    ("export payload.pt", "payload.pt", "would run code"),
    ("predict payload.pth image.png", "payload.pth", "error"),
    ("inspect module.pt", "module.pt", "model.state_dict()"),
    ("export bundle/model.trace.pt", "model.trace.pt", "TorchScript"),
    ("export bundle/model.onnx", "model.onnx", "error"),
    ("predict foreign.onnx image.png", "foreign.onnx", "ONNX"),
    ("inspect truncated.onnx", "truncated.onnx", "ONNX"),
    ("evaluate truncated.trace.pt", "truncated.trace.pt", "error"),
    ("inspect image.png", "image.png", "error"),
    ("train --data empty.npz", "empty.npz", "error"),
    ("train --data truncated.npz", "truncated.npz", "truncated"),
    ("train --data flipped.npz", "flipped.npz", "altered"),
    ("train --data foreign.npz", "foreign.npz", "truncated"),
    ("train --data incomplete.npz", "incomplete.npz", "train_images"),
    ("evaluate bundle --data float.npz", "float.npz: test_images is float64", "uint8"),
    ("parity bundle --data uneven.npz", "uneven.npz: train_labels", "one whole number"),
    ("evaluate bundle --data eleven.npz", "eleven.npz has 11 classes", "10"),
    ("predict bundle text.png", "text.png: not a readable PNG or JPEG", "error"),
    ("predict bundle empty.png", "empty.png: not a readable PNG or JPEG", "error"),
    ("predict bundle page.jpg", "page.jpg: not a readable PNG or JPEG", "error"),
    ("predict bundle image.gif", "image.gif: not a readable PNG or JPEG", "error"),
    ("predict bundle truncated.png", "truncated.png: not a readable PNG or JPEG", "error"),
    ("predict bundle image.png bundle/model.onnx", "model.onnx: not a readable PNG or JPEG", "error"),
]

ALTERED = "its sha256 is not the one in manifest.json"
TAMPERED = [
    *((f"{command} altered-bundle", ALTERED, "checkpoint.safetensors") for command in ("parity", "evaluate")),
    ("bench altered-bundle", ALTERED, "export the bundle again"),
    ("predict altered-bundle image.png --variant onnx/ort-cpu/fp32", ALTERED, "model.onnx"),
    ("predict altered-bundle/model.script.pt image.png", ALTERED, "model.script.pt"),
    ("export altered-bundle", ALTERED, "checkpoint.safetensors"),
    ("export altered-bundle/checkpoint.safetensors", "checkpoint.safetensors", "digest"),
    *((f"{command} empty-manifest", "empty-manifest/manifest.json", "JSON") for command in ("parity", "bench", "evaluate", "inspect")),
    *((f"{command} escaping-bundle", "../bundle/checkpoint", "leaves the bundle") for command in ("parity", "bench", "evaluate", "export")),
]

PLACES = [
    ("export lenet5 --out notes.txt", "notes.txt: a file", "another --out"),
    ("export lenet5 --out notes.txt --force", "notes.txt: a file", "another --out"),
    ("export lenet5 --out folder", "folder: exists and is not a bundle", "another --out"),
    ("export lenet5 --out folder --force", "folder: exists and is not a bundle", "another --out"),
    ("export lenet5 --out empty-manifest --force", "empty-manifest: exists and is not a bundle", "another --out"),
    ("export lenet5 --out bundle", "bundle: exists already", "--force"),
]


@pytest.mark.parametrize(("arguments", "what", "hint"), [*UNKNOWN, *VALUES, *FILES, *TAMPERED, *PLACES], ids=lambda text: text[:60])
def test_bad_input_is_one_message_and_code_2(arguments: str, what: str, hint: str, lenet: Lenet) -> None:
    done = lenet(*arguments.split())
    assert done.code == 2, done.err
    assert what in done.message()
    assert hint in done.message()
    assert done.out == ""


UNWRITABLE = [
    "export lenet5 --to torchscript --device cpu --out notes.txt/deeper",
    "export lenet5 --to torchscript --device cpu --out notes.txt/deeper/still",
    "train --out notes.txt",
    "train --out notes.txt/deeper",
    "demo --out notes.txt",
    "inspect --json absent/inspect.json",
    "inspect --json folder",
    "parity bundle --variants eager/torch-cpu/* --batch 1 --json notes.txt/parity.json",
    "parity bundle --variants eager/torch-cpu/* --batch 1 --markdown absent/parity.md",
    "parity bundle --variants eager/torch-cpu/* --batch 1 --junit absent/parity.xml",
    "parity bundle --variants eager/torch-cpu/* --batch 1 --junit folder",
    "bench bundle --rounds 1 --json absent/bench.json",
    "bench bundle --rounds 1 --markdown folder",
]


@pytest.mark.parametrize("arguments", UNWRITABLE)
def test_a_place_that_cannot_be_written_is_one_message_and_code_5(arguments: str, lenet: Lenet) -> None:
    done = lenet(*arguments.split())
    assert done.code == 5, done.err
    assert arguments.split()[-1].split("/")[0] in done.message()
    assert "cannot be written" in done.message()


COMPUTES = [
    *("train", "train --out new", "demo", "demo --out new", "export lenet5"),
    *("evaluate bundle", "parity bundle", "bench bundle", "predict bundle image.png"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU, and there is one")
@pytest.mark.parametrize("arguments", COMPUTES)
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_a_gpu_is_code_3_with_the_reason(arguments: str, device: str, lenet: Lenet) -> None:
    done = lenet(*arguments.split(), "--device", device)
    assert done.code == 3, done.err
    assert f"device {device} cannot be used" in done.message()


USAGE = [
    ("train --epochs many", "--epochs"),
    ("train --lr fast", "--lr"),
    ("bench bundle --rounds two", "--rounds"),
    ("predict bundle image.png --top few", "--top"),
    ("export --fore", "--force"),
    ("predict", "what"),
    ("predict bundle", "images"),
    ("parity", "bundle"),
    ("inspect lenet5 lenet5-wide", "lenet5-wide"),
    ("exprot", "export"),
]


@pytest.mark.parametrize(("arguments", "what"), USAGE)
def test_wrong_usage_is_code_2_and_names_the_word(arguments: str, what: str, lenet: Lenet) -> None:
    done = lenet(*arguments.split())
    assert done.code == 2, done.err
    assert what in done.err
    assert "Usage:" in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_a_payload_does_not_run(lenet: Lenet, damaged: Path) -> None:
    for name in ("payload.pt", "payload.pth"):
        assert lenet("inspect", name).code == 2
    assert not (damaged / "executed").exists()


def test_wrong_content_under_the_right_digest_is_a_parity_mismatch_and_code_1(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = open_bundle(shutil.copytree(bundle.path, tmp_path / "bundle"))
    content = b"not a graph"
    (copy.path / "model.onnx").write_bytes(content)
    artifacts = [
        dataclasses.replace(each, sha256=sha256(content), size_bytes=len(content)) if each.path == "model.onnx" else each
        for each in copy.manifest.artifacts
    ]
    write_manifest(copy.path, dataclasses.replace(copy.manifest, artifacts=tuple(artifacts)))
    monkeypatch.setattr(sys, "argv", ["lenet-deploy", "parity", str(copy.path), "--batch", "1", "--variants", "*/fp32", "--device", "cpu"])
    code = run(build())
    printed = capsys.readouterr()
    assert code == 1
    assert printed.err == "error: parity failed: onnx/ort-cpu/fp32\n"
    assert "verdict: fail" in printed.out
    assert "its tensors cannot be read back" in printed.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for variants that no GPU here can run, and one can")
def test_parity_that_judges_nothing_is_code_1(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lenet-deploy", "parity", str(bundle.path), "--variants", "*cuda*"])
    assert run(build()) == 1
    assert "every variant was skipped" in capsys.readouterr().err


def test_a_traceback_is_shown_on_request_only(lenet: Lenet, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" not in lenet("inspect", "lenet6").err
    monkeypatch.setenv("LENET_DEPLOY_DEBUG", "1")
    done = lenet("inspect", "lenet6")
    assert done.code == 2
    assert "Traceback (most recent call last)" in done.err
    assert done.err.splitlines()[-1].startswith("error: unknown model 'lenet6'")


@pytest.mark.parametrize("options", [(), ("--json", "-")], ids=["table", "json"])
def test_a_full_disk_under_standard_output_is_code_5(options: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "lenet_deploy.cli", "inspect", *options]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) <= MESSAGE_LINES


def test_a_closed_standard_output_is_no_internal_error(tmp_path: Path) -> None:
    line = f"exec {sys.executable} -m lenet_deploy.cli inspect --json layers.json >&-"
    done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "layers.json").exists()

"""`lenet-deploy train`: what it prints and writes, its options and recipes, and how a run is taken up again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lenet_deploy.cli import build
from lenet_deploy.cli.errors import run

from lenet_deploy.checkpoint import load
from lenet_deploy.recipes import TrainConfig, config_from_toml, find_recipe
from lenet_deploy.resume import from_bytes

SMALL = ("--set", "in_channels=1", "--set", "channels=2,3", "--set", "hidden=8,6", "--device", "cpu")
FILES = ["checkpoint.safetensors", "confusion.png", "curves.png", "last.ckpt", "metrics.json", "mistakes.png"]
PNG = b"\x89PNG\r\n\x1a\n"

Lenet = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lenet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Lenet:
    """`lenet-deploy train ARGS...` in this process and in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lenet-deploy", "train", *map(str, arguments)])
        capsys.readouterr()
        code = run(build())
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    assert next(iter(found.items())) == ("schema", "lenet-deploy/metrics/1")
    assert found["environment"]["python"]
    return found


def test_train_writes_its_files_and_says_where(lenet: Lenet, tmp_path: Path) -> None:
    code, out, err = lenet("--model", "lenet5", "--data", "digits", "--epochs", "2", *SMALL, "--out", "run/one")
    assert code == 0, err
    folder = tmp_path / "run/one"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert all((folder / name).read_bytes().startswith(PNG) for name in FILES if name.endswith(".png"))
    found = metrics(folder)
    assert [epoch["epoch"] for epoch in found["epochs"]] == [1, 2]
    assert found["epochs"][0].keys() == {"epoch", "loss", "lr", "accuracy", "images_per_s", "seconds"}
    assert load(folder / "checkpoint.safetensors").dataset == "digits"
    assert f"{found['epochs'][-1]['accuracy']:.2f} %" in out
    assert "run/one/checkpoint.safetensors" in out


def test_progress_is_one_line_an_epoch_on_standard_error_and_quiet_silences_it(lenet: Lenet) -> None:
    arguments = ("--epochs", "2", "--recipe", "lecture", *SMALL, "--out", "run")
    loud, quiet = lenet(*arguments), lenet(*arguments, "--quiet")
    assert [line.split(", Loss")[0] for line in loud[2].splitlines()] == ["Epoch: 1, LR: 0.001000", "Epoch: 2, LR: 0.001000"]
    assert "Epoch" not in loud[1]
    assert (quiet[0], quiet[2]) == (0, "")
    assert quiet[1] == loud[1]


def test_a_terminal_has_a_bar_in_place_of_the_lines(tmp_path: Path) -> None:
    """A real terminal behind standard error; what came is all that was drawn on it, control sequences and all."""
    pty = pytest.importorskip("pty", reason="there are no pseudo-terminals here")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lenet_deploy.cli", "train", "--epochs", "3", *SMALL, "--out", "run"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        drawn = b""
        with contextlib.suppress(OSError), os.fdopen(ours, "rb", buffering=0) as terminal:  # EIO: the other end is closed
            while piece := terminal.read(1 << 16):
                drawn += piece
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, drawn
    shown = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", drawn)
    assert re.search(rb"Epoch: 3, LR: [\d.]+, Loss: [\d.]+, accuracy: [\d.]+ %, [\d,]+ images/s \S+ 3/3", shown), shown
    assert drawn.endswith((b"\x1b[2K", b"\x1b[?25h")), "the bar is taken away in the end"
    assert out.startswith(b"run/checkpoint.safetensors: ")


def test_the_same_seed_trains_the_same_checkpoint(lenet: Lenet, tmp_path: Path) -> None:
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        assert lenet("--epochs", "1", "--seed", seed, *SMALL, "--quiet", "--out", name)[0] == 0
    a, b, c = (load(tmp_path / name / "checkpoint.safetensors").metadata().weights_sha256 for name in "abc")
    assert a == b != c


EACH_FIELD = {
    "model": "lenet5-wide",
    "epochs": 3,
    "batch_size": 96,
    "optimizer": "sgd",
    "lr": 0.25,
    "momentum": 0.5,
    "weight_decay": 0.125,
    "schedule": "multistep",
    "milestones": (1, 2),
    "gamma": 0.75,
    "warmup": 0.5,
    "label_smoothing": 0.0625,
    "crop": 3,
    "flip": True,
    "precision": "bf16",
    "channels_last": True,
    "compile": True,
    "seed": 9,
    "device": "cpu",
}


def test_every_field_of_a_config_is_an_option(lenet: Lenet) -> None:
    assert EACH_FIELD.keys() == {field.name for field in dataclasses.fields(TrainConfig)} - {"settings", "recipe"}
    arguments = []
    for name, value in EACH_FIELD.items():
        said = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        arguments += [f"--{name.replace('_', '-')}"] + ([] if value is True else [said])
    code, out, err = lenet(*arguments, "--set", "pooling=max", "--print-config")
    assert (code, err) == (0, "")
    assert config_from_toml(out, "printed") == TrainConfig(recipe="fast", settings={"pooling": "max"}, **EACH_FIELD)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["fast", "lecture"])
def test_a_printed_config_trains_what_its_recipe_trains(recipe: str, lenet: Lenet, tmp_path: Path) -> None:
    common = ("--recipe", recipe, "--epochs", "1", "--seed", "5", *SMALL)
    printed = lenet(*common, "--print-config")[1]
    assert not list(tmp_path.iterdir()), "printing trains nothing"
    (tmp_path / "mine.toml").write_text(printed)
    assert lenet(*common, "--out", "a", "--quiet")[0] == 0
    assert lenet("--config", "mine.toml", "--out", "b", "--quiet")[0] == 0
    a, b = (load(tmp_path / name / "checkpoint.safetensors").metadata().weights_sha256 for name in "ab")
    assert a == b


def test_a_recipe_depends_on_the_data(lenet: Lenet) -> None:
    printed = lenet("--data", "cifar10", "--print-config")[1]
    assert config_from_toml(printed, "printed") == find_recipe("fast").config("lenet5", "cifar10")


def test_a_config_file_and_a_recipe_are_one_too_many(lenet: Lenet, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("epochs = 1")
    code, _, err = lenet("--config", "mine.toml", "--recipe", "lecture")
    assert code == 2
    assert "--recipe" in err
    assert "--config" in err


def test_an_unfinished_run_is_not_overwritten_and_goes_on_only_when_told(lenet: Lenet, tmp_path: Path) -> None:
    common = ("--epochs", "3", *SMALL, "--quiet", "--out")
    assert lenet(*common, "whole")[0] == 0
    assert lenet(*common, "run")[0] == 0
    wanted = load(tmp_path / "whole" / "checkpoint.safetensors").metadata().weights_sha256
    stopped = stop_after(tmp_path / "run", 1)
    code, _, err = lenet(*common, "run")
    assert code == 2
    assert "a run stopped there after epoch 1 of 3; add --resume to go on, or --no-resume to begin anew" in err
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == stopped
    assert lenet("--resume", "--quiet", "--out", "run")[0] == 0, "the run's own config is that of its state"
    assert load(tmp_path / "run" / "checkpoint.safetensors").metadata().weights_sha256 == wanted
    assert [epoch["epoch"] for epoch in metrics(tmp_path / "run")["epochs"]] == [1, 2, 3]
    assert lenet("--resume", "--quiet", "--out", "run")[0] == 0, "a finished run is finished"


def test_another_config_is_refused_on_resume_and_nothing_is_resumed_from_nothing(lenet: Lenet, tmp_path: Path) -> None:
    assert lenet("--epochs", "2", *SMALL, "--quiet", "--out", "run")[0] == 0
    stop_after(tmp_path / "run", 1)
    code, _, err = lenet("--resume", "--lr", "0.5", "--out", "run")
    assert code == 2
    assert "lr was 0.003 and is 0.5" in err
    code, _, err = lenet("--resume", "--out", "nowhere")
    assert code == 2
    assert "nowhere: there is no last.ckpt to resume from" in err
    assert not (tmp_path / "nowhere").exists()


def test_a_diverging_run_keeps_the_checkpoint_of_its_last_good_epoch(lenet: Lenet, tmp_path: Path) -> None:
    # A cycle whose first epoch is gentle and whose peak is not.
    steep = ("--optimizer", "sgd", "--momentum", "0", "--schedule", "one-cycle", "--warmup", "0.9", "--lr", "1e4", "--epochs", "400")
    code, out, err = lenet(*steep, "--batch-size", "1437", *SMALL, "--out", "run")
    assert (code, out) == (1, "")
    assert "training diverged: the loss of epoch" in err
    assert "run/checkpoint.safetensors is that of epoch" in err
    kept = load(tmp_path / "run" / "checkpoint.safetensors")
    done = metrics(tmp_path / "run")["epochs"]
    assert kept.provenance["epochs_done"] == len(done) > 0
    assert kept.provenance["test_accuracy"] == done[-1]["accuracy"]
    assert all(torch.isfinite(tensor).all() for tensor in kept.weights.values())


def test_tensorboard_holds_every_epoch(lenet: Lenet, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is an extra")
    assert lenet("--epochs", "3", *SMALL, "--quiet", "--out", "run", "--tensorboard")[0] == 0
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    told = metrics(tmp_path / "run")["epochs"]
    for name in ("loss", "lr", "accuracy", "images_per_s"):
        assert [event.value for event in events.Scalars(name)] == pytest.approx([epoch[name] for epoch in told])


@pytest.mark.parametrize("package", ["matplotlib", "tensorboard"])
def test_an_absent_extra_is_named(package: str, lenet: Lenet, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = lenet("--epochs", "1", *SMALL, "--out", "run", *(("--tensorboard",) if package == "tensorboard" else ()))
    extra = {"matplotlib": "plots", "tensorboard": "tensorboard"}[package]
    assert f"pip install 'lenet-deploy[{extra}]'" in err
    assert code == {"matplotlib": 0, "tensorboard": 3}[package]


def stop_after(folder: Path, epochs: int) -> bytes:
    """Make a finished run one that was stopped: the state is made anew by training again up to there."""
    from lenet_deploy.data import load_dataset
    from lenet_deploy.resume import TrainState, to_bytes
    from lenet_deploy.train import train

    config = from_bytes((folder / "last.ckpt").read_bytes(), "last").config
    states: list[TrainState] = []
    train(config, load_dataset("digits"), on_state=states.append)
    data = to_bytes(states[epochs])
    (folder / "last.ckpt").write_bytes(data)
    (folder / "checkpoint.safetensors").unlink()
    return data


def test_two_processes_have_the_loss_curve_of_one(tmp_path: Path) -> None:
    """torchrun and gloo; the same images in the same batches, so that the sums differ by the order of additions alone."""
    arguments = ["train", "--epochs", "3", "--batch-size", "128", "--crop", "1", "--flip", *SMALL, "--set", "classes=12"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = [sys.executable, "-m", "lenet_deploy.cli"]
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lenet_deploy.cli"]
    for name, command in (("one", alone), ("two", together)):
        done = subprocess.run(
            [*command, *arguments, "--out", name], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert [line.split(",")[0] for line in done.stderr.splitlines() if line.startswith("Epoch")] == [f"Epoch: {i}" for i in (1, 2, 3)]
        assert done.stdout.count("checkpoint.safetensors") == 1, "one process speaks"
    one, two = (metrics(tmp_path / name)["epochs"] for name in ("one", "two"))
    assert [epoch["loss"] for epoch in two] == pytest.approx([epoch["loss"] for epoch in one], rel=1e-4)
    assert [epoch["accuracy"] for epoch in two] == pytest.approx([epoch["accuracy"] for epoch in one], abs=0.6), "two of 360 images"
    first, second = (load(tmp_path / name / "checkpoint.safetensors") for name in ("one", "two"))
    assert second.provenance["processes"] == 2
    for name, weight in first.weights.items():
        torch.testing.assert_close(second.weights[name], weight, rtol=0, atol=1e-3)

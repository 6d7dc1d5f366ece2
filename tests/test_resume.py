"""A training run that stops and goes on: the same bits, whatever stopped it; and what its file refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.process
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from lenet_deploy import resume
from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.data import Dataset
from lenet_deploy.errors import BadInput, DamagedFile, GateFailed
from lenet_deploy.recipes import TrainConfig
from lenet_deploy.records import EpochStats
from lenet_deploy.resume import TrainState, from_bytes, to_bytes
from lenet_deploy.train import train

CONFIG = TrainConfig("lenet5", {"channels": "4,8", "hidden": "16,12"}, epochs=4, batch_size=32, crop=2, flip=True, device="cpu")
KILLS = 20


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small(digits: Dataset) -> Dataset:
    parts = {part: getattr(digits, part)[:200] for part in ("train_images", "train_labels", "test_images", "test_labels")}
    return dataclasses.replace(digits, **parts)


def states_of(config: TrainConfig, dataset: Dataset) -> tuple[Checkpoint, list[bytes]]:
    kept: list[bytes] = []
    return train(config, dataset, on_state=lambda state: kept.append(to_bytes(state))), kept


def same(one: Checkpoint, other: Checkpoint) -> bool:
    return all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights) and one.weights.keys() == other.weights.keys()


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_run_goes_on_from_any_epoch_to_the_same_bits(optimizer: str, small: Dataset) -> None:
    config = dataclasses.replace(CONFIG, optimizer=optimizer, lr=0.01, weight_decay=0.01)
    whole, kept = states_of(config, small)
    assert len(kept) == config.epochs + 1
    for data in kept:
        seen: list[EpochStats] = []
        state = from_bytes(data, "memory")
        assert same(train(config, small, seen.append, state=state), whole)
        assert len(seen) == config.epochs - len(state.history)


def test_the_history_comes_back_with_the_state(small: Dataset) -> None:
    whole, kept = states_of(CONFIG, small)
    state = from_bytes(kept[2], "memory")
    assert [stats.epoch for stats in state.history] == [1, 2]
    assert (state.finished, from_bytes(kept[-1], "memory").finished) == (False, True)
    assert whole.provenance["test_accuracy"] == from_bytes(kept[-1], "memory").history[-1].accuracy


def test_another_config_or_other_data_are_refused_by_name(small: Dataset, digits: Dataset) -> None:
    state = from_bytes(states_of(CONFIG, small)[1][1], "memory")
    with pytest.raises(BadInput, match=r"the run to resume was another: epochs was 4 and is 5; lr was 0\.003 and is 0\.1"):
        train(dataclasses.replace(CONFIG, epochs=5, lr=0.1), small, state=state)
    with pytest.raises(BadInput, match="trained on other data"):
        train(CONFIG, digits, state=state)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_state_is_damaged(share: float, small: Dataset) -> None:
    data = states_of(CONFIG, small)[1][1]
    with pytest.raises(DamagedFile, match="here: "):
        from_bytes(data[: int(share * len(data))], "here")


def test_a_flipped_bit_in_a_state_is_found(small: Dataset) -> None:
    data = bytearray(states_of(CONFIG, small)[1][1])
    chance = random.Random(0)
    for place in [chance.randrange(len(data)) for _ in range(40)]:
        data[place] ^= 1
        with pytest.raises((DamagedFile, BadInput)):
            from_bytes(bytes(data), "here")
        data[place] ^= 1
    assert from_bytes(bytes(data), "here")


def test_a_checkpoint_is_no_state(small: Dataset) -> None:
    from lenet_deploy.checkpoint import to_bytes as checkpoint_bytes

    with pytest.raises(DamagedFile, match="not the state of a training run"):
        from_bytes(checkpoint_bytes(states_of(CONFIG, small)[0]), "here")


def test_the_last_good_state_survives_a_loss_that_is_no_number(small: Dataset) -> None:
    kept: list[TrainState] = []
    with pytest.raises(GateFailed, match="diverged"):
        train(dataclasses.replace(CONFIG, lr=1e20), small, on_state=kept.append)
    assert len(kept) == 1
    assert all(torch.isfinite(tensor).all() for tensor in kept[-1].part("model").values())


def test_what_two_states_hold_is_named_by_its_part(small: Dataset) -> None:
    state = from_bytes(states_of(CONFIG, small)[1][-1], "memory")
    assert {name.partition(".")[0] for name in state.tensors} == {"model", "optimizer", "generator"}
    assert state.part("model").keys() == states_of(CONFIG, small)[0].weights.keys()
    assert json.loads(json.dumps(dataclasses.asdict(state.config)))["milestones"] == []
    assert resume.SCHEMA.endswith("/1")


TRAIN = ("train", *("--set", "channels=4,8", "--set", "image_size=16"), "--epochs", "6", "--batch-size", "256", "--device", "cpu")
# Each process of ours is forked from one that has imported what it takes, so that it is at work in milliseconds; nothing else is shared.
PROCESSES = multiprocessing.get_context("forkserver")
IMPORTED = ("torch", "torch._dynamo", "lenet_deploy.cli.train", "lenet_deploy.train", "lenet_deploy.resume")


def command_line(folder: Path, arguments: tuple[str, ...], largest_file: int | None) -> None:
    """`lenet-deploy ARGS...` in `folder`, in a process of its own; past `largest_file` bytes the disk is full."""
    from lenet_deploy.cli import app, interrupts

    interrupts.take_interrupts()  # as `app` does first of all
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # as where the extra is not installed: pictures take longer than these runs
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    for name, number in (("out.txt", 1), ("err.txt", 2)):
        with Path(name).open("w") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["lenet-deploy", *arguments]
    try:
        Path("at-work").touch()
        app()
    except KeyboardInterrupt:
        sys.exit(interrupts.INTERRUPTED)


def start(folder: Path, *arguments: str, largest_file: int | None = None) -> multiprocessing.process.BaseProcess:
    """The command line at work."""
    PROCESSES.set_forkserver_preload(list(IMPORTED))
    process = PROCESSES.Process(target=command_line, args=(folder, (*TRAIN, "--out", "run", *arguments), largest_file))
    process.start()
    return process


def ended(process: multiprocessing.process.BaseProcess) -> int | None:
    process.join(timeout=300)
    return process.exitcode


def weights(folder: Path) -> bytes:
    """The tensors in the run's checkpoint, without the header, in which times stand."""
    data = (folder / "run" / "checkpoint.safetensors").read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert ended(start(folder)) == 0, (folder / "err.txt").read_text()
    return folder


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(whole: Path, tmp_path: Path) -> None:
    """SIGKILL or SIGINT at random moments of real processes, each run going on where the one before was stopped."""
    began = time.monotonic()
    assert ended(start(whole, "--no-resume")) == 0
    usual = time.monotonic() - began
    chance, kills, trial = random.Random(1), 0, 0
    while kills < KILLS:
        folder = tmp_path / f"trial-{trial}"
        folder.mkdir()
        trial += 1
        while True:
            resumed = (folder / "run" / "last.ckpt").exists()
            process = start(folder, *(("--resume",) if resumed else ()))
            if kills < KILLS:
                while not (folder / "at-work").exists():
                    time.sleep(0.001)
                time.sleep(chance.uniform(0.0, 1.0) * usual)
                with contextlib.suppress(ProcessLookupError):  # it has ended already
                    os.kill(process.pid or 0, chance.choice((signal.SIGKILL, signal.SIGINT)))
            code = ended(process)
            (folder / "at-work").unlink()
            if code == 0:
                break
            assert code in (-signal.SIGKILL, -signal.SIGINT, 130), (folder / "err.txt").read_text()
            kills += 1
        assert weights(folder) == weights(whole), f"after {kills} kills"
        assert not [path for path in (folder / "run").iterdir() if path.name.startswith(".")], "nothing half-written is left"


def test_a_full_disk_stops_a_run_that_then_goes_on_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    assert ended(start(tmp_path, largest_file=4096)) == 5
    assert "run/last.ckpt: cannot be written" in (tmp_path / "err.txt").read_text()
    process = start(tmp_path)
    while not (tmp_path / "run" / "last.ckpt").exists():
        time.sleep(0.01)
    process.kill()
    ended(process)
    before = (tmp_path / "run" / "last.ckpt").read_bytes()
    assert ended(start(tmp_path, "--resume", largest_file=4096)) == 5
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before
    assert ended(start(tmp_path, "--resume")) == 0
    assert weights(tmp_path) == weights(whole)

"""Training: repeatable, observable, recorded, and refused where it cannot work."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lenet_deploy import checkpoint as checkpoints
from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.data import Dataset, fit, load_npz, normalise
from lenet_deploy.errors import BadInput, GateFailed, InvalidConfig, UnknownName, Unusable
from lenet_deploy.models import MODELS, Model, initialise
from lenet_deploy.models.config import LeNet5Config
from lenet_deploy.records import EpochStats
from lenet_deploy.train import EVALUATION_BATCH, TrainConfig, correct_top1, fitted_settings, train

CHANCE = 10.0  # percent, with ten classes
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)


pytestmark = pytest.mark.usefixtures("one_thread")


def quickly(model: str = "lenet5", settings: dict[str, str] | None = None, **changes: Any) -> TrainConfig:
    """One epoch on the CPU."""
    return TrainConfig(model, settings or {}, **{"epochs": 1, "device": "cpu", **changes})


def equal(one: Checkpoint, other: Checkpoint) -> bool:
    return one.weights.keys() == other.weights.keys() and all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def made_up(shape: tuple[int, ...], classes: int) -> Dataset:
    """Noise whose brightness says its class, as a `.npz` file would hold it."""
    generator = np.random.default_rng(0)
    labels = np.arange(shape[0]) % classes
    levels = (labels * 255 // (classes - 1)).reshape(-1, *(1 for _ in shape[1:]))
    images = np.clip(levels + generator.integers(-9, 10, shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return load_npz(buffer.getvalue(), "made-up.npz")


def few(digits: Dataset) -> Dataset:
    """The first 320 images of each split, for what does not need to learn them: five steps an epoch."""
    parts = {part: getattr(digits, part)[:320] for part in ("train_images", "train_labels", "test_images", "test_labels")}
    return dataclasses.replace(digits, **parts)


@each_model
def test_the_same_seed_gives_bit_identical_weights_and_another_seed_others(model: Model, digits: Dataset) -> None:
    first, again, other = (train(quickly(model.name, seed=seed), few(digits)) for seed in (3, 3, 4))
    assert equal(first, again)
    assert not equal(first, other)


def test_several_threads_are_repeatable_too(digits: Dataset) -> None:
    torch.set_num_threads(2)
    assert equal(train(quickly(), few(digits)), train(quickly(), few(digits)))


def test_training_does_not_depend_on_the_global_random_state_nor_changes_it(digits: Dataset) -> None:
    torch.manual_seed(1)
    first, state = train(quickly(), few(digits)), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert equal(train(quickly(), few(digits)), first)


@each_model
def test_each_model_learns_the_digits(model: Model, digits: Dataset) -> None:
    seen: list[EpochStats] = []
    checkpoint = train(quickly(model.name, epochs=2), digits, seen.append)
    assert seen[-1].accuracy > 5 * CHANCE
    assert seen[-1].loss < seen[0].loss
    assert checkpoint.model == model.name


def test_every_epoch_is_reported_with_its_statistics(digits: Dataset) -> None:
    seen: list[EpochStats] = []
    checkpoint = train(quickly(epochs=3, lr=0.003), digits, seen.append)
    assert [stats.epoch for stats in seen] == [1, 2, 3]
    assert [stats.loss for stats in seen] == sorted((stats.loss for stats in seen), reverse=True)
    assert all(0 < stats.lr <= 0.003 and stats.images_per_s > 0 and math.isfinite(stats.loss) for stats in seen)
    assert seen[-1].lr < seen[0].lr / 100  # annealed at the end
    assert seen[-1].accuracy == checkpoint.provenance["test_accuracy"]


def test_the_accuracy_reported_is_that_of_the_weights_returned(checkpoint: Checkpoint, digits: Dataset) -> None:
    images = normalise(fit(digits.test_images, checkpoint.preprocessing), checkpoint.preprocessing)
    with torch.no_grad():
        right = (checkpoint.module()(images).argmax(dim=1) == digits.test_labels).double().mean()
    assert 100 * float(right) == pytest.approx(checkpoint.provenance["test_accuracy"])


def test_counting_hits_covers_every_image_of_several_batches_and_leaves_eval_mode(checkpoint: Checkpoint, digits: Dataset) -> None:
    module = checkpoint.module()
    images, labels = fit(digits.test_images, checkpoint.preprocessing), digits.test_labels
    once = correct_top1(module, images, labels, checkpoint.preprocessing)
    times = EVALUATION_BATCH // len(images) + 2
    module.train()
    assert correct_top1(module, images.repeat(times, 1, 1, 1), labels.repeat(times), checkpoint.preprocessing) == once * times
    assert not module.training


def test_provenance_says_how_the_weights_came_to_be(digits: Dataset) -> None:
    config = quickly("lenet5", {"channels": "4,8"}, batch_size=100, lr=0.002, seed=5)
    provenance = train(config, few(digits)).provenance
    expected = {"dataset": "digits", "train_images": 320, "epochs": 1, "batch_size": 100, "lr": 0.002, "seed": 5, "device": "cpu"}
    assert {key: provenance[key] for key in expected} == expected
    assert provenance["settings"] == {"channels": "4,8"}
    assert provenance["source"] == "lenet-deploy train"
    assert torch.__version__.startswith(provenance["versions"]["torch"])
    assert json.loads(json.dumps(provenance)) == provenance


def test_a_trained_checkpoint_survives_its_file(checkpoint: Checkpoint) -> None:
    loaded = checkpoints.from_bytes(checkpoints.to_bytes(checkpoint), "memory")
    assert equal(loaded, checkpoint)
    assert (loaded.metadata(), loaded.provenance) == (checkpoint.metadata(), checkpoint.provenance)


def test_returned_weights_are_plain_tensors_on_the_cpu(checkpoint: Checkpoint) -> None:
    assert all(not tensor.requires_grad and tensor.device.type == "cpu" for tensor in checkpoint.weights.values())
    assert {tensor.dtype for tensor in checkpoint.weights.values()} == {torch.float32}


def test_training_is_silent(digits: Dataset, capfd: pytest.CaptureFixture[str]) -> None:
    train(quickly(), few(digits))
    assert tuple(capfd.readouterr()) == ("", "")


def test_channels_and_classes_come_from_the_data_where_they_are_not_set(digits: Dataset) -> None:
    assert train(quickly(), few(digits)).config == LeNet5Config(in_channels=1)
    assert train(quickly("lenet5", {"in_channels": "3"}), few(digits)).config == LeNet5Config()
    assert fitted_settings("lenet5", made_up((8, 8, 8, 3), 4), {}) == {"classes": "4"}
    assert fitted_settings("lenet5-1998", made_up((8, 8, 8, 3), 4), {}) == {}


@pytest.mark.parametrize("shape", [(60, 12, 12), (60, 30, 20, 3)], ids=["grey", "rgb"])
def test_a_npz_of_ones_own_trains(shape: tuple[int, ...]) -> None:
    dataset = made_up(shape, 3)
    checkpoint = train(quickly(epochs=8, batch_size=10), dataset)
    assert checkpoint.config == LeNet5Config(in_channels=dataset.train_images.shape[1], classes=3)
    assert checkpoint.labels == ("0", "1", "2")
    assert checkpoint.provenance["test_accuracy"] > 60


def test_a_model_with_more_classes_than_the_data_numbers_the_rest() -> None:
    checkpoint = train(quickly("lenet5", {"classes": "5"}), made_up((12, 8, 8), 3))
    assert checkpoint.labels == ("0", "1", "2", "3", "4")
    assert checkpoint.config.classes == 5


def test_data_with_more_classes_than_the_model_is_refused(digits: Dataset) -> None:
    with pytest.raises(BadInput, match="digits has 10 classes and lenet5 4; set classes"):
        train(quickly("lenet5", {"classes": "4"}), digits)
    with pytest.raises(BadInput, match=r"made-up\.npz has 12 classes and lenet5-1998 10"):
        train(quickly("lenet5-1998"), made_up((24, 8, 8), 12))


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_any_batch_size_works_also_one_larger_than_the_data(batch_size: int) -> None:
    dataset = made_up((20, 8, 8), 2)
    checkpoint = train(quickly(epochs=2, batch_size=batch_size), dataset)
    start = initialise("lenet5", checkpoint.config).state_dict()
    assert all(not torch.equal(checkpoint.weights[name], start[name]) for name in start)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(({"epochs": epochs}, f"epochs is {epochs}") for epochs in (0, -1)),
        *(({"batch_size": size}, f"batch-size is {size}") for size in (0, -64)),
        *(({"lr": lr}, "lr is ") for lr in (0.0, -0.1, math.nan, math.inf)),
    ],
)
def test_numbers_that_make_no_training_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        TrainConfig(**changes)


@pytest.mark.parametrize("changes", [{"seed": 2**64}, {"seed": -(2**64)}, {"batch_size": 10**20}, {"lr": 1e300}])
def test_numbers_too_large_for_torch_are_one_clear_error(changes: dict[str, Any]) -> None:
    with pytest.raises((BadInput, GateFailed), match=next(iter(changes)).replace("_", ".")):
        train(quickly(**changes), made_up((20, 8, 8), 2))


def test_a_diverging_training_is_a_failed_gate_that_names_the_learning_rate(digits: Dataset) -> None:
    seen: list[EpochStats] = []
    with pytest.raises(GateFailed, match=r"diverged.*epoch 1 is nan.*--lr \(it was 1e\+30\)"):
        train(quickly(lr=1e30), few(digits), seen.append)
    assert seen == []


def test_unknown_models_settings_and_devices_are_refused(digits: Dataset) -> None:
    with pytest.raises(UnknownName, match="lenet6"):
        train(quickly("lenet6"), digits)
    with pytest.raises(UnknownName, match="colour"):
        train(quickly("lenet5", {"colour": "1"}), digits)
    with pytest.raises(InvalidConfig, match="pool1"):
        train(quickly("lenet5", {"image_size": "29"}), digits)
    with pytest.raises(BadInput, match="'tpu'"):
        train(quickly(device="tpu"), digits)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_unusable_and_says_what_to_do(digits: Dataset) -> None:
    for device in ("cuda", "cuda:0"):
        with pytest.raises(Unusable, match=f"device {device} cannot be used: .+; .+"):
            train(quickly(device=device), digits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_training_on_the_gpu_gives_a_checkpoint_on_the_cpu(digits: Dataset, tmp_path: Path) -> None:
    checkpoint = train(quickly(epochs=3, device="cuda"), digits)
    assert checkpoint.provenance["device"] == "cuda:0"
    assert checkpoint.provenance["test_accuracy"] > 5 * CHANCE
    assert {tensor.device.type for tensor in checkpoint.weights.values()} == {"cpu"}

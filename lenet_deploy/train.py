"""TrainConfig -> checkpoint: one readable function over tensors that live on the device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import nn
from torch.nn import functional

from lenet_deploy import environment
from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.data import Dataset, fit, normalise, preprocessing_for
from lenet_deploy.devices import parse_device
from lenet_deploy.errors import BadInput, GateFailed
from lenet_deploy.models import Model, check_seed, find_model, initialise
from lenet_deploy.models.config import ModelConfig
from lenet_deploy.records import EpochStats, Preprocessing

EVALUATION_BATCH = 1024
LARGEST_FLOAT32 = 3.4028234e38


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run.

    Attributes:
        model: registered name.
        settings: `KEY=VALUE` config settings, as on the command line.
        epochs: passes over the training split, at least 1.
        batch_size: images a step, at least 1.
        lr: peak learning rate of Adam, warmed up and annealed by one cycle.
        seed: of the initial weights and of the order of images; the same seed gives the same weights on the CPU.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
    """

    model: str = "lenet5"
    settings: Mapping[str, str] = field(default_factory=dict)
    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.003
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("batch-size", self.batch_size)):
            if not 1 <= value < 2**31:
                raise BadInput(f"{name} is {value}; it must be at least 1 and below 2^31")
        check_seed(self.seed)
        if not 0 < self.lr <= LARGEST_FLOAT32:
            raise BadInput(f"lr is {self.lr}; it must be a positive float32 number")


def fitted_settings(model: str, dataset: Dataset, settings: Mapping[str, str]) -> dict[str, str]:
    """`settings` with the channels and classes that `dataset` has, where they are not set and the model can vary them."""
    found = {"in_channels": str(dataset.train_images.shape[1]), "classes": str(len(dataset.labels))}
    defaults = find_model(model).defaults
    differing = {key: value for key, value in found.items() if value != str(getattr(defaults, key))}
    return {**differing, **settings} if hasattr(defaults, "channels") else dict(settings)


def resolve(config: TrainConfig, dataset: Dataset) -> tuple[Model, ModelConfig, torch.device]:
    """The model, its configuration for `dataset`, and the device; raises what `train` raises of them, before any work."""
    entry = find_model(config.model)
    model_config = entry.configured(fitted_settings(config.model, dataset, config.settings))
    if len(dataset.labels) > model_config.classes:
        raise BadInput(f"{dataset.name} has {len(dataset.labels)} classes and {config.model} {model_config.classes}; set classes")
    return entry, model_config, parse_device(config.device)


def train(config: TrainConfig, dataset: Dataset, on_epoch: Callable[[EpochStats], None] = lambda stats: None) -> Checkpoint:
    """Train a model and return its checkpoint.

    Args:
        config: what to train and how.
        dataset: uint8 images; made the model's size and channels here, and moved to the device whole.
        on_epoch: called after each epoch.

    Raises:
        UnknownName, InvalidConfig: the model or its settings.
        BadInput: the data set has more classes than the model.
        GateFailed: the loss is NaN or infinite.
        Unusable: the device does not work here.
    """
    entry, model_config, device = resolve(config, dataset)
    preprocessing = preprocessing_for(dataset, model_config.in_channels, model_config.image_size, entry.pixel_range)

    images, labels = fit(dataset.train_images, preprocessing).to(device), dataset.train_labels.to(device)
    test_images, test_labels = fit(dataset.test_images, preprocessing).to(device), dataset.test_labels.to(device)
    module = initialise(config.model, model_config, config.seed).to(device)

    steps = math.ceil(len(images) / config.batch_size)
    optimizer = torch.optim.Adam(module.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.epochs * steps)
    shuffle = torch.Generator().manual_seed(config.seed)

    accuracy = 0.0
    for epoch in range(1, config.epochs + 1):
        module.train()
        start = time.perf_counter()
        total_loss = torch.zeros((), device=device)
        for picked in torch.randperm(len(images), generator=shuffle).to(device).split(config.batch_size):
            scores = module(normalise(images[picked], preprocessing))
            loss = functional.cross_entropy(scores, labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.detach() * len(picked)
        mean_loss = float(total_loss) / len(images)  # waits for the device, so the time below is the whole epoch's
        seconds = time.perf_counter() - start
        if not math.isfinite(mean_loss):
            raise GateFailed(f"training diverged: the loss of epoch {epoch} is {mean_loss}; use a smaller --lr (it was {config.lr:g})")
        accuracy = 100.0 * correct_top1(module, test_images, test_labels, preprocessing) / len(test_images)
        on_epoch(EpochStats(epoch, mean_loss, float(schedule.get_last_lr()[0]), accuracy, len(images) / seconds))

    provenance = {
        "source": "lenet-deploy train",
        "dataset": dataset.name,
        "test_accuracy": accuracy,
        "train_images": len(images),
        **{key: value for key, value in asdict(config).items() if key != "model"},
        "device": str(device),
        "versions": environment.versions(),
    }
    labels_known = dataset.labels + tuple(map(str, range(len(dataset.labels), model_config.classes)))
    weights = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
    return Checkpoint(config.model, model_config, preprocessing, labels_known, provenance, weights)


def correct_top1(module: nn.Module, images: torch.Tensor, labels: torch.Tensor, preprocessing: Preprocessing) -> int:
    """How many uint8 images (N, C, H, W) get their label as the top class; leaves the module in eval mode."""
    module.eval()
    with torch.no_grad():
        hits = [
            (module(normalise(batch, preprocessing)).argmax(dim=1) == truth).sum()
            for batch, truth in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)
        ]
    return int(torch.stack(hits).sum())

"""TrainConfig -> checkpoint: one readable function over tensors that live on the device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime

import torch
from torch import Tensor, nn
from torch.nn import functional

from lenet_deploy import environment
from lenet_deploy.checkpoint import Checkpoint, copied
from lenet_deploy.data import Dataset, fingerprint, fit, normalise, preprocessing_for
from lenet_deploy.devices import parse_device
from lenet_deploy.errors import BadInput, GateFailed, Unusable, first_line
from lenet_deploy.models import Model, find_model, initialise
from lenet_deploy.models.config import ModelConfig
from lenet_deploy.parallel import ALONE, Team
from lenet_deploy.recipes import TrainConfig
from lenet_deploy.records import EpochStats, Preprocessing
from lenet_deploy.resume import TrainState, optimizer_tensors, restore_optimizer

__all__ = ["TrainConfig", "as_checkpoint", "correct_top1", "fitted_settings", "resolve", "train"]

EVALUATION_BATCH = 1024
DIVERGED = 10.0  # times the mean loss of the first epoch: no schedule recovers from there


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


def train(
    config: TrainConfig,
    dataset: Dataset,
    on_epoch: Callable[[EpochStats], None] = lambda stats: None,
    *,
    state: TrainState | None = None,
    on_state: Callable[[TrainState], None] = lambda state: None,
    team: Team = ALONE,
) -> Checkpoint:
    """Train a model and return its checkpoint.

    Args:
        config: what to train and how.
        dataset: uint8 images; made the model's size and channels here, and moved to the device whole.
        on_epoch: called after each epoch.
        state: where an earlier run with this config and these data stopped; it goes on from there, on the CPU to the same bits.
        on_state: called before the first epoch and after each one, before `on_epoch`, with all that it takes to go on from there.
        team: of processes that train together, each with its share of every batch.

    Raises:
        UnknownName, InvalidConfig: the model or its settings.
        BadInput: the data set has more classes than the model; or `state` is of another config or other data.
        GateFailed: the loss is NaN or infinite, or far above where it began; `on_state` had the last good state.
        Unusable: the device does not work here, or torch.compile has no compiler.
    """
    entry, model_config, device = resolve(config, dataset)
    preprocessing = preprocessing_for(dataset, model_config.in_channels, model_config.image_size, entry.pixel_range)
    data_sha256 = fingerprint(dataset)
    if state is not None:
        state.check_fits(config, data_sha256)

    batches = Batches(fit(dataset.train_images, preprocessing).to(device), dataset.train_labels.to(device), config.crop)
    test_images, test_labels = fit(dataset.test_images, preprocessing).to(device), dataset.test_labels.to(device)
    module = initialise(config.model, model_config, config.seed).to(device)
    if config.channels_last:
        module = module.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(config, module)
    draws = torch.Generator().manual_seed(config.seed)
    history: list[EpochStats] = []
    if state is not None:
        module.load_state_dict(state.part("model"))
        restore_optimizer(optimizer, state.part("optimizer"))
        draws.set_state(state.tensors["generator"])
        history = list(state.history)
    loss_of, whole_batch = make_loss(config, module, preprocessing, team)
    steps = math.ceil(len(batches) / config.batch_size)

    def standing() -> TrainState:
        model = {f"model.{name}": tensor for name, tensor in copied(module.state_dict()).items()}
        tensors = {**model, **optimizer_tensors(optimizer), "generator": draws.get_state()}
        return TrainState(config, data_sha256, tuple(history), tensors)

    if state is None:
        state = standing()
        on_state(state)
    for epoch in range(len(history) + 1, config.epochs + 1):
        module.train()
        start = time.perf_counter()
        total_loss = torch.zeros((), device=device)
        for step, (images, labels, count) in enumerate(batches.epoch(config, draws, team), (epoch - 1) * steps):
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(step, steps)
            # The mean over the whole batch: each process has its share of the sum, and their gradients are averaged.
            loss = (whole_batch if count == config.batch_size else loss_of)(images, labels) * (team.size / count)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.detach() * (count / team.size)
        mean_loss = team.total(total_loss) / len(batches)  # waits for the device, so the time below is the whole epoch's
        seconds = time.perf_counter() - start
        if not mean_loss <= DIVERGED * (history[0].loss if history else math.inf) or math.isinf(mean_loss):
            raise GateFailed(f"training diverged: the loss of epoch {epoch} is {mean_loss}; use a smaller --lr (it was {config.lr:g})")
        hits = correct_top1(module, team.share(test_images), team.share(test_labels), preprocessing)
        accuracy = 100.0 * team.total(torch.tensor(hits, device=device)) / len(test_images)
        lr = float(optimizer.param_groups[0]["lr"])
        history.append(EpochStats(epoch, mean_loss, lr, accuracy, len(batches) / seconds, seconds))
        state = standing()
        on_state(state)
        on_epoch(history[-1])

    return as_checkpoint(state, dataset, team.size)


def as_checkpoint(state: TrainState, dataset: Dataset, processes: int = 1) -> Checkpoint:
    """The checkpoint of a run as it stands in `state`, after at least one epoch, with how it came to be."""
    config, last = state.config, state.history[-1]
    entry, model_config, device = resolve(config, dataset)
    values = {**asdict(config), "milestones": list(config.milestones)}
    provenance = {
        "source": "lenet-deploy train",
        "dataset": dataset.name,
        "data_sha256": state.data_sha256,
        "test_accuracy": last.accuracy,
        "test_images": len(dataset.test_images),
        "train_images": len(dataset.train_images),
        "train_s": sum(stats.seconds for stats in state.history),
        **{key: value for key, value in values.items() if key != "model"},
        "epochs_done": last.epoch,
        "device": str(device),
        "processes": processes,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": environment.versions(),
    }
    labels = dataset.labels + tuple(map(str, range(len(dataset.labels), model_config.classes)))
    preprocessing = preprocessing_for(dataset, model_config.in_channels, model_config.image_size, entry.pixel_range)
    return Checkpoint(config.model, model_config, preprocessing, labels, provenance, state.part("model"))


class Batches:
    """A training split on its device, and the batches of an epoch.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        crop: pixels that images are shifted by at most.
    """

    def __init__(self, images: Tensor, labels: Tensor, crop: int) -> None:
        side = images.shape[-1]
        # Every shifted image is a view of the padded one: (N, C, 2 crop + 1, 2 crop + 1, H, W).
        self._shifted = functional.pad(images, (crop,) * 4).unfold(2, side, 1).unfold(3, side, 1) if crop else None
        self._images, self._labels, self._crop = images, labels, crop

    def __len__(self) -> int:
        return len(self._labels)

    def epoch(self, config: TrainConfig, draws: torch.Generator, team: Team) -> Iterator[tuple[Tensor, Tensor, int]]:
        """This process's share of each batch, in random order: images, labels, and the images of the whole batch.

        All that is random is drawn here from `draws`, alike in every process and on every device.
        """
        count, device = len(self), self._labels.device
        order = torch.randperm(count, generator=draws).to(device)
        shifts = torch.randint(2 * self._crop + 1, (2, count), generator=draws).to(device) if self._crop else None
        mirrored = torch.randint(2, (count,), generator=draws).bool().to(device) if config.flip else None
        for start in range(0, count, config.batch_size):
            places = slice(start, start + config.batch_size)
            picked = team.share(order[places])
            if shifts is None or self._shifted is None:
                images = self._images.index_select(0, picked)  # six times as fast as self._images[picked]
            else:
                down, right = team.share(shifts[0, places]), team.share(shifts[1, places])
                images = self._shifted[picked, :, down, right]
            if mirrored is not None:
                images = torch.where(team.share(mirrored[places])[:, None, None, None], images.flip(3), images)
            yield images, self._labels[picked], len(order[places])


class Loss(nn.Module):
    """From uint8 images and labels to the sum of the loss over them: what is compiled, and what processes share."""

    def __init__(self, module: nn.Module, preprocessing: Preprocessing, config: TrainConfig) -> None:
        super().__init__()
        self.module = module
        self._preprocessing, self._config = preprocessing, config

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        pixels = normalise(images, self._preprocessing)
        if self._config.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._config.precision == "bf16"):
            scores = self.module(pixels)
        return functional.cross_entropy(scores.float(), labels, label_smoothing=self._config.label_smoothing, reduction="sum")


def make_loss(
    config: TrainConfig, module: nn.Module, preprocessing: Preprocessing, team: Team
) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """The loss of any batch, and of a whole one, which is compiled where the config asks for it: each size would be compiled anew."""
    loss: nn.Module = team.together(Loss(module, preprocessing, config))
    if not config.compile:
        return loss, loss
    from torch._dynamo.exc import TorchDynamoException

    compiled = torch.compile(loss, dynamic=False)

    def whole(images: Tensor, labels: Tensor) -> Tensor:
        try:
            found: Tensor = compiled(images, labels)
        except TorchDynamoException as error:
            raise Unusable(
                f"torch.compile does not work here ({first_line(error)}); install a C++ compiler, or train with --no-compile"
            ) from error
        return found

    return loss, whole


def make_optimizer(config: TrainConfig, module: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a config; `weight_decay` is for weights, whose names say so, and not for biases and coefficients."""
    named = list(module.named_parameters())
    decayed = [parameter for name, parameter in named if name.endswith("weight")]
    others = [parameter for name, parameter in named if not name.endswith("weight")]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.optimizer == "sgd":
        nesterov = config.momentum > 0
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, fused=True)


def correct_top1(module: nn.Module, images: Tensor, labels: Tensor, preprocessing: Preprocessing) -> int:
    """How many uint8 images (N, C, H, W) get their label as the top class; leaves the module in eval mode."""
    module.eval()
    with torch.no_grad():
        hits = [
            (module(normalise(batch, preprocessing)).argmax(dim=1) == truth).sum()
            for batch, truth in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)
        ]
    return int(torch.stack(hits).sum()) if hits else 0

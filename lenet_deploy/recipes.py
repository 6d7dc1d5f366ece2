"""How to train: a TrainConfig holds everything that decides a run, a recipe is a name for one. No torch here."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from lenet_deploy.errors import BadInput, UnknownName
from lenet_deploy.models import check_seed

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "multistep", "one-cycle")
PRECISIONS = ("fp32", "bf16")
LARGEST_FLOAT32 = 3.4028234e38
MAX_CROP = 8  # pixels: beyond a quarter of a 32x32 image the object is gone

ONE_CYCLE_START = 0.04  # of the peak learning rate, where a cycle begins (torch's OneCycleLR: 1/25)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run.

    Attributes:
        model: registered name.
        settings: `KEY=VALUE` config settings, as on the command line.
        recipe: where the values come from; a name for the reader, it decides nothing.
        epochs: passes over the training split, at least 1.
        batch_size: images a step, over all processes, at least 1.
        optimizer: one of OPTIMIZERS.
        lr: peak learning rate.
        momentum: of SGD, with Nesterov's correction; Adam has its own.
        weight_decay: of weights, not of biases; decoupled in AdamW.
        schedule: one of SCHEDULES: `constant`; `multistep` multiplies by `gamma` at each of `milestones`; `one-cycle` rises for the share
            `warmup` of all steps and then falls to nothing along a cosine.
        milestones: epochs done, increasing.
        gamma: above 0, at most 1.
        warmup: share of all steps, from 0 to below 1.
        label_smoothing: share of the target spread over all classes, from 0 to below 1.
        crop: images are shifted by up to so many pixels either way, black coming in.
        flip: every other image is mirrored, by chance.
        precision: `fp32`, or `bf16` for autocast.
        channels_last: memory format of images and weights.
        compile: the forward and backward pass by torch.compile; needs a C++ compiler on the CPU.
        seed: of the initial weights and of the order of images; the same seed gives the same weights on the CPU.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
    """

    model: str = "lenet5"
    settings: Mapping[str, str] = field(default_factory=dict)
    recipe: str = "custom"
    epochs: int = 20
    batch_size: int = 64
    optimizer: str = "adam"
    lr: float = 0.003
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "one-cycle"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.5
    warmup: float = 0.3
    label_smoothing: float = 0.0
    crop: int = 0
    flip: bool = False
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("batch-size", self.batch_size)):
            if not 1 <= value < 2**31:
                raise BadInput(f"{name} is {value}; it must be at least 1 and below 2^31")
        check_seed(self.seed)
        if not 0 < self.lr <= LARGEST_FLOAT32:
            raise BadInput(f"lr is {self.lr}; it must be a positive float32 number")
        for name, choice, allowed in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
            ("precision", self.precision, PRECISIONS),
        ):
            if choice not in allowed:
                raise BadInput(f"{name} is {choice!r}; it must be one of {', '.join(allowed)}")
        for name, share in (("momentum", self.momentum), ("warmup", self.warmup), ("label-smoothing", self.label_smoothing)):
            if not 0 <= share < 1:
                raise BadInput(f"{name} is {share}; it must be from 0 to below 1")
        if not 0 <= self.weight_decay < math.inf:
            raise BadInput(f"weight-decay is {self.weight_decay}; it must be a number from 0")
        if not 0 < self.gamma <= 1:
            raise BadInput(f"gamma is {self.gamma}; it must be above 0 and at most 1")
        if not 0 <= self.crop <= MAX_CROP:
            raise BadInput(f"crop is {self.crop}; it must be from 0 to {MAX_CROP} pixels")
        if list(self.milestones) != sorted(set(self.milestones)) or (self.milestones and self.milestones[0] < 1):
            raise BadInput(f"milestones are {', '.join(map(str, self.milestones))}; they must be epochs from 1, increasing")

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of one step, counted from 0 over the whole run."""
        if self.schedule == "multistep":
            epoch = step // steps_per_epoch
            return self.lr * self.gamma ** sum(milestone <= epoch for milestone in self.milestones)
        if self.schedule == "one-cycle":
            total = self.epochs * steps_per_epoch
            rising = self.warmup * total
            if step < rising:
                return self.lr * (ONE_CYCLE_START + (1 - ONE_CYCLE_START) * step / rising)
            return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))
        return self.lr

    def to_toml(self) -> str:
        """The values as a TOML document, which `config_from_toml` reads."""
        values = dataclasses.asdict(self)
        table = values.pop("settings")
        lines = [f"{name} = {_toml(value)}" for name, value in values.items()]
        if table:
            lines += ["", "[settings]", *(f"{name} = {_toml(value)}" for name, value in table.items())]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Recipe:
    """A named way to train: what differs from TrainConfig's defaults, for all data and for some.

    Attributes:
        values: fields of TrainConfig.
        by_data: further ones by name of the data set.
        by_model: further ones by (model, data set).
    """

    name: str
    summary: str
    values: Mapping[str, Any]
    by_data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    by_model: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)

    def config(self, model: str, data: str, **given: Any) -> TrainConfig:
        """The configuration for a model and a data set; `given` fields go before the recipe's. Raises BadInput."""
        found = {**self.values, **self.by_data.get(data, {}), **self.by_model.get((model, data), {}), **given}
        return TrainConfig(**{"model": model, "recipe": self.name, **found})


RECIPES: tuple[Recipe, ...] = (
    # Chosen on 5,000 or 10,000 images held out of training; at most a tenth of the lecture's time. benchmarks/results/training.md
    Recipe(
        "fast",
        "this project's own: at least the lecture's accuracy in at most a tenth of its time",
        {"epochs": 18, "batch_size": 128, "optimizer": "adam", "lr": 0.003, "schedule": "one-cycle", "warmup": 0.2},
        by_data={
            "digits": {"epochs": 20, "batch_size": 64},  # 1,437 images: more steps count for more than large ones
            "mnist": {"crop": 2},
            "fashion-mnist": {"crop": 1, "flip": True},
            "cifar10": {"batch_size": 256, "lr": 0.004, "crop": 1, "flip": True},
        },
        # Four times the weights learn for longer. Smaller batches than lenet5's were worth 1.5 points.
        by_model={
            ("lenet5-wide", "cifar10"): {
                "epochs": 64,
                "batch_size": 128,
                "optimizer": "adamw",
                "lr": 0.003,
                "weight_decay": 0.1,
                "label_smoothing": 0.1,
                "crop": 2,
                "channels_last": True,
            }
        },
    ),
    Recipe(
        "lecture",
        "Adam at 0.001, halved after 75 and 150 of 200 epochs, no augmentation",
        {
            "epochs": 200,
            "batch_size": 128,
            "optimizer": "adam",
            "lr": 0.001,
            "schedule": "multistep",
            "milestones": (75, 150),
            "gamma": 0.5,
        },
    ),
)


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; raises UnknownName with the nearest ones."""
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    raise UnknownName("recipe", name, (recipe.name for recipe in RECIPES))


def config_from_values(values: Mapping[str, Any], where: str) -> TrainConfig:
    """A configuration from values as TOML and JSON hold them; raises BadInput for an unknown key or a value of the wrong type."""
    hints = get_type_hints(TrainConfig)
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise BadInput(f"{where}: {UnknownName('setting', name, hints)}")
        if name == "milestones" and isinstance(value, list) and all(type(each) is int for each in value):
            value = tuple(value)
        if hints[name] is float and type(value) is int:
            value = float(value)
        wanted = tuple if name == "milestones" else dict if name == "settings" else hints[name]
        if type(value) is not wanted:
            raise BadInput(f"{where}: {name} = {value!r} is no {wanted.__name__}")
        found[name] = value
    return TrainConfig(**found)


def config_from_toml(text: str, where: str) -> TrainConfig:
    """The configuration that a TOML document holds; what it leaves out is the default. Raises BadInput."""
    import tomllib

    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{where}: not TOML ({error})") from None
    return config_from_values(values, where)


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return json.dumps(value) if isinstance(value, (str, bool)) else repr(value)

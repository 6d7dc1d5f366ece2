"""The architectures: MODELS is the one list of them, plain data until a model is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lenet_deploy.errors import BadInput, UnknownName
from lenet_deploy.models.config import SQUASH_SLOPE, SUBSAMPLED_PIXELS, LeNet5Config, LeNet1998Config, configure, from_values

if TYPE_CHECKING:
    from torch import nn

    from lenet_deploy.models.config import ModelConfig


def _lenet5(config: Any) -> nn.Module:
    from lenet_deploy.models.lenet5 import LeNet5

    return LeNet5(config)


def _lenet1998(config: Any) -> nn.Module:
    from lenet_deploy.models.lenet5_1998 import LeNet1998

    return LeNet1998(config)


@dataclass(frozen=True)
class Model:
    """One registered architecture.

    Attributes:
        name: what users type.
        summary: one line for help and tables.
        defaults: its configuration when nothing is set.
        build: turns a configuration into an untrained module.
        pixel_range: what normalisation maps black and white to.
        factors: constants that its forward multiplies with weights or with what is linear in them, so exporters may fold them.
    """

    name: str
    summary: str
    defaults: LeNet5Config | LeNet1998Config
    build: Callable[[Any], nn.Module]
    pixel_range: tuple[float, float] = (0.0, 1.0)
    factors: tuple[float, ...] = ()

    def configured(self, settings: Mapping[str, str]) -> LeNet5Config | LeNet1998Config:
        """The defaults with `KEY=VALUE` settings applied; raises UnknownName or InvalidConfig."""
        return configure(self.defaults, settings)

    def config_from(self, values: Mapping[str, Any]) -> LeNet5Config | LeNet1998Config:
        """The configuration stored as JSON values; raises UnknownName or InvalidConfig."""
        return from_values(self.defaults, values)


MODELS: tuple[Model, ...] = (
    Model("lenet5", "the lecture's LeNet-5: ReLU, average pooling, 62,006 parameters", LeNet5Config(), _lenet5),
    Model(
        "lenet5-wide",
        "32 and 64 channels, max pooling, 256,830 parameters",
        LeNet5Config(channels=(32, 64), pooling="max"),
        _lenet5,
        pixel_range=(-2.0, 2.0),  # roughly zero mean and unit variance on photographs: 4 points more on CIFAR-10 (training.md)
    ),
    Model(
        "lenet5-1998",
        "as published: trainable subsampling, C3 table, RBF output, 60,000 parameters",
        LeNet1998Config(),
        _lenet1998,
        pixel_range=(-0.1, 1.175),  # the paper's background and foreground, which give roughly zero mean and unit variance
        factors=(SUBSAMPLED_PIXELS, SQUASH_SLOPE),
    ),
)


def find_model(name: str) -> Model:
    """The registered model of that name; raises UnknownName with the nearest ones."""
    for model in MODELS:
        if model.name == name:
            return model
    raise UnknownName("model", name, (model.name for model in MODELS))


def check_seed(seed: int) -> None:
    """Refuse, with BadInput, a seed that torch's generators do not take."""
    if not 0 <= seed < 2**63:
        raise BadInput(f"seed is {seed}; it must be from 0 to 2^63 - 1")


def initialise(name: str, config: ModelConfig, seed: int = 0) -> nn.Module:
    """Build a freshly initialised model in eval mode; the same seed gives the same weights, global RNG untouched.

    Raises:
        BadInput: a seed that torch's generators do not take.
    """
    import torch

    check_seed(seed)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return find_model(name).build(config).eval()

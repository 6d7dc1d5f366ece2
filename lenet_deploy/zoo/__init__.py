"""Trained weights that come with the package. ZOO is the one list of them; each has its file and its card beside this one."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from lenet_deploy.errors import UnknownName

if TYPE_CHECKING:
    from lenet_deploy.checkpoint import Checkpoint


@dataclass(frozen=True)
class Trained:
    """One entry: which model was trained on which data, by the recipe `fast` of both.

    Attributes:
        name: what users type.
        model: registered name.
        dataset: registered name.
    """

    name: str
    model: str
    dataset: str

    @property
    def file(self) -> str:
        """Name of its checkpoint in the package."""
        return f"{self.name}.safetensors"


ZOO: tuple[Trained, ...] = (
    Trained("lenet5-mnist", "lenet5", "mnist"),
    Trained("lenet5-1998-mnist", "lenet5-1998", "mnist"),
    Trained("lenet5-fashion-mnist", "lenet5", "fashion-mnist"),
    Trained("lenet5-cifar10", "lenet5", "cifar10"),
    Trained("lenet5-wide-cifar10", "lenet5-wide", "cifar10"),
)
DEFAULT = ZOO[0].name  # what `export` exports when nothing is named


def names() -> tuple[str, ...]:
    """What users can type."""
    return tuple(trained.name for trained in ZOO)


def load(name: str) -> Checkpoint:
    """The checkpoint of that name; raises UnknownName with the nearest ones."""
    from lenet_deploy import checkpoint

    for trained in ZOO:
        if trained.name == name:
            data = resources.files(__name__).joinpath(trained.file).read_bytes()
            return checkpoint.from_bytes(data, f"{trained.file} of the zoo")
    raise UnknownName("zoo name", name, names())

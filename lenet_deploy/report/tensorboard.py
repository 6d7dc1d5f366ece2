"""Training as TensorBoard events; the package is an extra."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from lenet_deploy.errors import Unusable
from lenet_deploy.records import EpochStats


@contextlib.contextmanager
def event_writer(folder: Path | None) -> Iterator[Callable[[EpochStats], None]]:
    """What takes each epoch into the events in `folder`; nothing for None.

    Raises:
        Unusable: the package is not installed.
    """
    if folder is None:
        yield lambda stats: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise Unusable(
            f"TensorBoard events need a package that does not import ({error}); pip install 'lenet-deploy[tensorboard]'"
        ) from None
    with SummaryWriter(folder / "tensorboard") as writer:

        def write(stats: EpochStats) -> None:
            for name in ("loss", "lr", "accuracy", "images_per_s"):
                writer.add_scalar(name, getattr(stats, name), stats.epoch)

        yield write

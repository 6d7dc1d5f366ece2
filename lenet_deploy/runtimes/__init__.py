"""The one contract between a runtime and everything that uses it.

A runtime opens an artifact's bytes as a session; a session binds an input buffer, launches, and hands back its output.
Runtimes never time themselves and never move data behind the caller's back: the clock, the synchronisation and the
copies belong to the caller, the same for every runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from lenet_deploy.records import NodePlacement, RuntimeStatus
    from lenet_deploy.runtimes.traces import Trace


class Session(Protocol):
    """An artifact opened on a device."""

    @property
    def device(self) -> torch.device:
        """Where inputs are bound and outputs appear."""

    @property
    def node_providers(self) -> tuple[NodePlacement, ...]:
        """The execution provider of each node; empty where the runtime has only one."""

    def bind(self, batch_size: int) -> torch.Tensor:
        """Return the input buffer for `batch_size` images: float32 (batch_size, C, H, W) on `device`.

        The caller writes into it; it stays bound until the next `bind`.
        """

    def launch(self) -> torch.Tensor:
        """Start inference on the bound input, on torch's current stream, and return the output tensor on `device`.

        float32 (batch_size, ...). On CUDA it is ready once that stream is synchronised. It may be overwritten by the
        next launch, so a caller who keeps it copies it.
        """


class Runtime(Protocol):
    """What executes artifacts of one kind."""

    def probe(self, device: str) -> RuntimeStatus:
        """Whether it works on `cpu` or `cuda` here, tried and not guessed, with the reason and the fix."""

    def open_session(self, data: bytes, input_shape: tuple[int, int, int], device: str) -> AbstractContextManager[Session]:
        """Open verified artifact bytes on `cpu`, `cuda` or `cuda:N`, inside `devices.computing_on`.

        Raises:
            Unusable: the device or runtime does not work here, or the session would run elsewhere than asked.
            DamagedFile: the bytes are not an artifact of this kind.
        """

    def open_traces(self, data: bytes, input_shape: tuple[int, int, int], device: str) -> AbstractContextManager[Mapping[str, Trace]]:
        """Open the same bytes to look inside: a `Trace` for each form of the graph that the runtime can show, the one that runs first.

        Raises:
            Unusable: as `open_session`; or this runtime hides its intermediate tensors.
            DamagedFile: as `open_session`.
        """

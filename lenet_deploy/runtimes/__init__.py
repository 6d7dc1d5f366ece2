"""The one contract between a runtime and everything that uses it.

A runtime opens an artifact's bytes as a session; a session binds an input buffer, launches, and hands back its output.
Runtimes never time themselves and never move data behind the caller's back: the clock, the synchronisation and the
copies belong to the caller, the same for every runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Protocol

from lenet_deploy.errors import BadInput

if TYPE_CHECKING:
    import torch

    from lenet_deploy.records import NodePlacement, RuntimeStatus
    from lenet_deploy.runtimes.traces import Trace


@dataclass(frozen=True)
class SessionOptions:
    """How a session runs, beside its file and device.

    Attributes:
        channels_last: weights and input in torch's channels-last memory format.
        cuda_graph: a launch is recorded once a batch size and then replayed, which costs the host one call whatever it holds.
        ort: ONNX Runtime's own options as text, by name (see `runtimes/ort_options.py`).
    """

    channels_last: bool = False
    cuda_graph: bool = False
    ort: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def given(self) -> str:
        """ONNX Runtime's options as they were given."""
        return ", ".join(f"{name}={value}" for name, value in self.ort.items())

    def check(self, device: str, *supported: str) -> None:
        """Raise BadInput for an option that is set and that a runtime without it would ignore.

        Args:
            device: `cpu`, `cuda` or `cuda:N`.
            supported: the options that the runtime has.
        """
        for option in fields(self):
            if getattr(self, option.name) and option.name not in supported:
                raise BadInput(f"this runtime has no option {option.name}; it has {', '.join(supported) or 'none'}")
        if self.cuda_graph and device == "cpu":
            raise BadInput("cuda_graph needs a CUDA device, and this session is on the CPU; leave it out or choose another device")


PLAIN = SessionOptions()


class Session(Protocol):
    """An artifact opened on a device."""

    @property
    def device(self) -> torch.device:
        """Where inputs are bound and outputs appear."""

    @property
    def node_providers(self) -> tuple[NodePlacement, ...]:
        """The execution provider of each node; empty where the runtime has only one."""

    @property
    def settle_s(self) -> float:
        """Seconds for which its idle threads may keep cores busy after its last launch."""

    def bind(self, batch_size: int) -> torch.Tensor:
        """Return the input buffer for `batch_size` images: float32 (batch_size, C, H, W) on `device`.

        The caller writes into it; it stays bound until the next `bind`. Its strides are the session's own choice, and it may be the
        buffer of an earlier `bind` to the same size, with what was written there.
        """

    def launch(self) -> torch.Tensor:
        """Start inference on the bound input, on torch's current stream, and return the output tensor on `device`.

        float32 (batch_size, ...). On CUDA it is ready once that stream is synchronised. It may be overwritten by the
        next launch, so a caller who keeps it copies it. With `cuda_graph` the first launch of a batch size records the graph.
        """


class Runtime(Protocol):
    """What executes artifacts of one kind."""

    def probe(self, device: str) -> RuntimeStatus:
        """Whether it works on `cpu` or `cuda` here, tried and not guessed, with the reason and the fix."""

    def open_session(
        self, data: bytes, input_shape: tuple[int, int, int], device: str, options: SessionOptions = PLAIN
    ) -> AbstractContextManager[Session]:
        """Open verified artifact bytes on `cpu`, `cuda` or `cuda:N`, inside `devices.computing_on`.

        Raises:
            BadInput: an option that this runtime does not have or does not take.
            Unusable: the device or runtime does not work here, or the session would run elsewhere than asked.
            DamagedFile: the bytes are not an artifact of this kind.
        """

    def open_traces(
        self, data: bytes, input_shape: tuple[int, int, int], device: str, options: SessionOptions = PLAIN
    ) -> AbstractContextManager[Mapping[str, Trace]]:
        """Open the same bytes to look inside: a `Trace` for each form of the graph that the runtime can show, the one that runs first.

        A CUDA graph replays what the session would launch, so with `cuda_graph` the same is shown, launched one by one.

        Raises:
            BadInput: as `open_session`.
            Unusable: as `open_session`; or this runtime hides its intermediate tensors.
            DamagedFile: as `open_session`.
        """

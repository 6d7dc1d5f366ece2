"""What one launch is, in each scope: how it starts, and how the caller waits for it. The same for every runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lenet_deploy.data import fit, load_dataset, normalise_into
from lenet_deploy.devices import synchronise
from lenet_deploy.records import PlainInput

if TYPE_CHECKING:
    import torch

    from lenet_deploy.records import ImageInput
    from lenet_deploy.runtimes import Session


GPU_CLOCK_HZ = 2e9  # about the highest of any GPU; a slower one is held for longer, which does no harm


class Stream(Protocol):
    """The stream that a GPU's work runs on, as far as the clock needs it."""

    def event(self) -> Event:
        """An event recorded now, behind everything started so far."""

    def synchronise(self) -> None:
        """Wait until everything started so far is done."""

    def hold(self, seconds: float) -> None:
        """Keep the GPU busy for about so long, so that what is started meanwhile runs without gaps behind it."""


class Event(Protocol):
    """A point on a stream."""

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds of the GPU's own clock from this event to another, both of which it has passed."""

    def synchronize(self) -> None:
        """Wait until the GPU has passed it."""


@dataclass(frozen=True)
class Work:
    """One case, bound and ready.

    Attributes:
        start: begins a launch; on the CPU it is complete when this returns.
        finish: waits for everything started; None on the CPU.
        compute: the model alone, on what lies on the device.
        copies: the copies to and from the GPU alone, by `h2d` and `d2h`; empty on the CPU and in the scope `device`.
    """

    start: Callable[[], object]
    finish: Callable[[], None] | None
    compute: Callable[[], object]
    copies: Mapping[str, Callable[[], object]] = field(default_factory=dict)

    @property
    def launch(self) -> Callable[[], object]:
        """A complete launch."""
        start, finish = self.start, self.finish
        if finish is None:
            return start

        def launch() -> None:
            start()
            finish()

        return launch


class CudaStream:
    """torch's current stream, on which ONNX Runtime runs, too (see `devices.computing_on`)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def event(self) -> Event:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def synchronise(self) -> None:
        synchronise(self._device)

    def hold(self, seconds: float) -> None:
        import torch

        torch.cuda._sleep(int(seconds * GPU_CLOCK_HZ))  # torch's own tests hold a stream with it; there is no public way


def bench_images(count: int, preprocessing: ImageInput) -> torch.Tensor:
    """Real uint8 images for the clock, in host memory: the values do not matter to it, denormals and constants would."""
    import torch

    images = load_dataset("digits").test_images
    chosen = images[torch.arange(count) % len(images)]
    if not isinstance(preprocessing, PlainInput):
        return fit(chosen, preprocessing)
    channels, height, width = preprocessing.input_shape
    scaled = torch.nn.functional.interpolate(chosen.float(), (height, width), mode="bilinear").round().to(torch.uint8)
    return scaled.expand(-1, channels, -1, -1).contiguous()


def stream_of(device: torch.device) -> Stream | None:
    """The stream of a CUDA device, None for the CPU: there a launch is complete when it returns."""
    return CudaStream(device) if device.type == "cuda" else None


def bind(session: Session, images: torch.Tensor, scope: str, preprocessing: ImageInput, stream: Stream | None) -> Work:
    """Bind a session to a workload.

    Args:
        images: uint8 (N, C, H, W) in host memory.
        scope: `device`: the input is on the device already, and the output stays there. `e2e`: from `images` to the scores in host
            memory, through pinned memory on CUDA.
        stream: what `session` runs on; None where it is synchronous.
    """
    import torch

    buffer, device = session.bind(len(images)), session.device
    finish = stream.synchronise if stream else None
    if scope == "device":
        normalise_into(buffer, images.to(device), preprocessing)
        return Work(session.launch, finish, session.launch)
    host = images.pin_memory() if device.type == "cuda" else images
    # The shape of the scores is known after a launch, which also makes a runtime refuse a batch that it cannot run before any is timed.
    normalise_into(buffer, host.to(device), preprocessing)
    scores = session.launch()
    out = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=device.type == "cuda")

    def start() -> torch.Tensor:
        normalise_into(buffer, host.to(device, non_blocking=True), preprocessing)
        return out.copy_(session.launch(), non_blocking=True)

    copies = {"h2d": lambda: host.to(device, non_blocking=True), "d2h": lambda: out.copy_(scores, non_blocking=True)} if stream else {}
    return Work(start, finish, session.launch, copies)

"""ONNX files, run by ONNX Runtime with IO binding; on CUDA on torch's current stream, and nowhere but where asked."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lenet_deploy.devices import computing_on, parse_device, probe_torch, tf32_allowed
from lenet_deploy.errors import BadInput, DamagedFile, Misplaced, Unusable, first_line
from lenet_deploy.quiet import captured_stderr
from lenet_deploy.records import NodePlacement, RuntimeStatus
from lenet_deploy.runtimes import PLAIN, SessionOptions
from lenet_deploy.runtimes.ort_options import apply
from lenet_deploy.runtimes.traces import Tap, Trace

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
FATAL = 4  # ORT's log severity: only what ends the process; every real failure also raises


@dataclass(frozen=True, eq=False)
class _Bound:
    """One batch size's buffers, and what ORT is told of them."""

    input: torch.Tensor
    output: torch.Tensor
    binding: Any
    run_options: Any


class OrtSession:
    """An ORT InferenceSession as a Session (see `lenet_deploy.runtimes`).

    With `cuda_graph` ORT warms up and records within the first run of a `gpu_graph_id` and later replays it, without a look at what is
    bound. So the id is the batch size, whose buffers are kept. Before microsoft/onnxruntime#28686 a replay waits for the GPU.
    """

    settle_s = 0.052  # its threads spin for up to 50 ms

    def __init__(self, session: Any, input_shape: tuple[int, int, int], device: torch.device, options: SessionOptions = PLAIN) -> None:
        self.device = device
        self.node_providers = _placement(session)
        self._session = session
        self._shape = input_shape
        self._input_name = session.get_inputs()[0].name
        output = session.get_outputs()[0]
        self._output_name, self._output_shape = output.name, output.shape[1:]
        self._cuda_graph = options.cuda_graph
        self._recorded: dict[int, _Bound] = {}
        self._bound: _Bound | None = None

    def bind(self, batch_size: int) -> torch.Tensor:
        self._bound = self._recorded.get(batch_size) or self._new(batch_size)
        if self._cuda_graph:
            self._recorded[batch_size] = self._bound
        return self._bound.input

    def launch(self) -> torch.Tensor:
        assert self._bound is not None, "bind comes before launch"
        self._session.run_with_iobinding(self._bound.binding, self._bound.run_options)
        return self._bound.output

    def _new(self, batch_size: int) -> _Bound:
        import onnxruntime

        run_options = onnxruntime.RunOptions()
        if self.device.type == "cuda":
            # The caller synchronises torch's stream, which this session runs on; without this every run waits for the GPU.
            run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        # 0 is ORT's own, -1 records nothing. Without an entry ORT's Python binding raises and catches an exception at every run, for
        # which 36 us of 67 were measured at batch 1 (1.31.1).
        run_options.add_run_config_entry("gpu_graph_id", str(batch_size) if self._cuda_graph else "-1")
        images = torch.zeros(batch_size, *self._shape, device=self.device)
        scores = torch.empty(batch_size, *self._output_shape, device=self.device)
        binding = self._session.io_binding()
        binding.bind_input(self._input_name, **self._buffer(images))
        binding.bind_output(self._output_name, **self._buffer(scores))
        return _Bound(images, scores, binding, run_options)

    def _buffer(self, tensor: torch.Tensor) -> dict[str, Any]:
        import numpy as np

        return {
            "device_type": self.device.type,
            "device_id": self.device.index or 0,
            "element_type": np.float32,
            "shape": tuple(tensor.shape),
            "buffer_ptr": tensor.data_ptr(),
        }


def probe(device: str) -> RuntimeStatus:
    """See `Runtime.probe`; opens a one-node graph on the device."""
    name = f"onnxruntime-{device}"
    if device == "cuda" and not (torch_status := probe_torch(name, device)).usable:
        return torch_status  # no GPU, or no torch to hand it buffers: what onnxruntime lacks besides does not matter yet
    installed = _installed(device)
    if not installed.usable:
        return installed
    target = torch.device(device, 0) if device == "cuda" else torch.device(device)
    try:
        with computing_on(target):
            _create(_one_node_graph(), target)
    except (Unusable, DamagedFile) as error:
        return RuntimeStatus(name, False, str(error), "pip install 'onnxruntime-gpu[cuda,cudnn]' (its CUDA major must be torch's)")
    return installed


@contextlib.contextmanager
def open_session(data: bytes, input_shape: tuple[int, int, int], device: str, options: SessionOptions = PLAIN) -> Iterator[OrtSession]:
    """Open an ONNX file; see `Runtime.open_session`."""
    options.check(device, "cuda_graph", "ort")
    target = parse_device(device)
    installed = _installed(target.type)
    if not installed.usable:
        raise Unusable(f"{installed.reason}; {installed.fix}")
    session = _create(data, target, options=options)
    _check_signature(session)
    yield OrtSession(session, input_shape, target, options)


def _installed(device: str) -> RuntimeStatus:
    """Whether an onnxruntime with the provider of `device` is installed; says nothing of whether it works."""
    name, provider = f"onnxruntime-{device}", PROVIDERS[device]
    try:
        import onnxruntime
    except ImportError as error:
        return RuntimeStatus(name, False, f"onnxruntime does not import ({error})", "pip install onnxruntime-gpu")
    if provider not in onnxruntime.get_available_providers():
        # The CPU package installed over the GPU one hides it, so both go before the right one comes.
        fix = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu[cuda,cudnn]'"
        return RuntimeStatus(name, False, f"this onnxruntime {onnxruntime.__version__} is a build without {provider}", fix)
    return RuntimeStatus(name, True, f"onnxruntime {onnxruntime.__version__}, {provider}")


@contextlib.contextmanager
def open_traces(
    data: bytes, input_shape: tuple[int, int, int], device: str, options: SessionOptions = PLAIN
) -> Iterator[Mapping[str, Trace]]:
    """See `Runtime.open_traces`."""
    from lenet_deploy.runtimes.onnx_taps import every_tensor

    options.check(device, "cuda_graph", "ort")
    target = parse_device(device)
    one_by_one = replace(options, cuda_graph=False)  # a graph needs bound buffers, and runs come with arrays here

    def trace(model: bytes) -> Trace:
        tapped = every_tensor(model)
        session = _create(tapped.model, target, optimise=False, options=one_by_one)

        def run(images: torch.Tensor) -> tuple[Tap, ...]:
            values = session.run([output.name for output in session.get_outputs()], {session.get_inputs()[0].name: images.numpy()})
            return tapped.taps(images, {output.name: value for output, value in zip(session.get_outputs(), values, strict=True)})

        return run

    # Outputs marked before optimisation would undo the fusions, so the optimised graph is saved first and marked then.
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "optimised.onnx"
        _create(data, target, save_to=saved, options=one_by_one)
        optimised = saved.read_bytes()
    yield {"optimised": trace(optimised), "unoptimised": trace(data)}


def _create(
    data: bytes,
    device: torch.device,
    optimise: bool = True,
    save_to: Path | None = None,
    profile_to: Path | None = None,
    options: SessionOptions = PLAIN,
) -> Any:
    """An InferenceSession that runs wholly on `device`, or an error: ORT's own habit is to fall back to the CPU."""
    import onnxruntime

    wanted = PROVIDERS[device.type]
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = FATAL
    settings.intra_op_num_threads = torch.get_num_threads()  # the same number for every runtime on the CPU
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    apply(settings, options.ort)
    if not optimise:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save_to:
        settings.optimized_model_filepath = str(save_to)
    if profile_to:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile_to)
    provider_options: dict[str, str] = {}
    with captured_stderr() as said, contextlib.redirect_stdout(io.StringIO()):  # its Python layer prints, too
        if device.type == "cuda":
            onnxruntime.preload_dlls()
            settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            provider_options = {
                "device_id": str(device.index or 0),
                "use_tf32": str(int(tf32_allowed())),
                "user_compute_stream": str(torch.cuda.current_stream(device).cuda_stream),
                "enable_cuda_graph": str(int(options.cuda_graph)),
            }
        try:
            session = onnxruntime.InferenceSession(data, settings, providers=[(wanted, provider_options)], enable_fallback=0)
        except Exception as error:  # ORT's exceptions share no base class of their own
            reason = first_line(error)
            if options.ort:
                _create(data, device, optimise, options=replace(options, ort={}))  # raises where they are not at fault
                raise BadInput(f"onnxruntime opens this file without {options.given}, and not with it ({reason}); leave it out") from None
            if device.type == "cpu":
                raise DamagedFile(f"not an ONNX file that this onnxruntime runs ({reason})") from None
            _create(data, torch.device("cpu"))  # raises DamagedFile where the bytes are at fault and not the device
            settings.add_session_config_entry("session.disable_cpu_ep_fallback", "0")  # once more, to see which nodes it is about
            try:
                session = onnxruntime.InferenceSession(data, settings, providers=[(wanted, provider_options)], enable_fallback=0)
            except Exception:
                session = None
            if session is not None:
                _check_placement(session, wanted)
            raise Unusable(f"{wanted} cannot run this graph whole: {cause(said()) or reason}; see lenet-deploy doctor") from None
    _check_placement(session, wanted)
    return session


def _check_placement(session: Any, wanted: str) -> None:
    """Raise Unusable where the provider did not load, Misplaced where it did and some nodes are not its own."""
    if session.get_providers()[0] != wanted:
        raise Unusable(f"onnxruntime would run everything on {session.get_providers()[0]} instead of {wanted}; see lenet-deploy doctor")
    placement = _placement(session)
    strays = sorted({f"{node.node} on {node.provider}" for node in placement if node.provider != wanted})
    if strays:
        raise Misplaced(f"onnxruntime would run {len(strays)} nodes elsewhere than on {wanted}: {', '.join(strays)}", placement)


def cause(said: str) -> str | None:
    """What ORT wrote of a provider that did not load: the missing library, where it names one.

    The exception only says that nodes fell back; the reason goes to standard error.
    """
    missing = re.search(r"error: (\S+\.so[.\d]*): cannot open shared object file", said)
    return f"{missing[1]} is not found" if missing else None


def _check_signature(session: Any) -> None:
    """Raise DamagedFile where a graph does not take one batch of images and give one batch of scores."""
    images, scores = session.get_inputs(), session.get_outputs()
    if len(images) != 1 or len(scores) != 1 or not all(isinstance(side, int) for side in scores[0].shape[1:]):
        raise DamagedFile("an ONNX graph that does not take one batch of images and give one batch of scores of known size")


def _placement(session: Any) -> tuple[NodePlacement, ...]:
    return tuple(
        NodePlacement(node.name or node.op_type, part.ep_name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    )


def _one_node_graph() -> bytes:
    from onnx import TensorProto, helper

    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1])
    graph = helper.make_graph([helper.make_node("Relu", ["image"], ["logits"])], "probe", [image], [logits])
    data: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()
    return data


@contextlib.contextmanager
def open_profiled(
    data: bytes, input_shape: tuple[int, int, int], device: str, options: SessionOptions = PLAIN
) -> Iterator[tuple[OrtSession, Callable[[], list[dict[str, Any]]]]]:
    """Open an ONNX file as `open_session` does, with ORT's profile on from the start.

    Yields:
        The session, and a function that ends the profile and returns its events: Chrome's format, times in whole microseconds since the
        session was opened. Call it once, after the last launch.

    Raises:
        BadInput, Unusable, DamagedFile: as `open_session`.
    """
    options.check(device, "cuda_graph", "ort")
    target = parse_device(device)
    installed = _installed(target.type)
    if not installed.usable:
        raise Unusable(f"{installed.reason}; {installed.fix}")
    # ORT keeps the profile in memory and writes it at the end, or into the void where nobody asked for it.
    with tempfile.TemporaryDirectory() as folder:
        session = _create(data, target, profile_to=Path(folder) / "profile", options=options)
        _check_signature(session)

        def collect() -> list[dict[str, Any]]:
            events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
            return events

        yield OrtSession(session, input_shape, target, options), collect

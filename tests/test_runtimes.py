"""Every runtime keeps the Session contract, refuses what it cannot run, and is silent."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lenet_deploy import api, devices, sources
from lenet_deploy.bundle import Bundle
from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.data import Dataset, fit, normalise
from lenet_deploy.devices import computing_on, float32_precision, float32_state, parse_device, tf32_allowed
from lenet_deploy.errors import BadInput, DamagedFile, Misplaced, UnknownName, Unusable
from lenet_deploy.parity.check import run_batch
from lenet_deploy.parity.judge import judge
from lenet_deploy.records import NodePlacement
from lenet_deploy.runtimes import PLAIN, Session, SessionOptions, eager, onnxruntime
from lenet_deploy.runtimes.eager import GraphSession, Module, Recording, record_graph
from lenet_deploy.runtimes.ort_options import ATTRIBUTES, RESERVED
from lenet_deploy.sources import artifact_of
from lenet_deploy.variants import DEVICES, RUNTIMES, VARIANTS, RuntimeEntry, Variant

CPU = torch.device("cpu")
ON_CPU = [variant for variant in VARIANTS if variant.device == "cpu"]
ON_CUDA = [variant for variant in VARIANTS if variant.device == "cuda"]
ORT_ON_CPU = [variant for variant in ON_CPU if variant.runtime.name == "onnxruntime"]

each_on_cpu = pytest.mark.parametrize("variant", ON_CPU, ids=lambda variant: variant.name)
each_runtime = pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.name)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so nothing is refused for the lack of one")


@pytest.fixture
def images(digits: Dataset, bundle: Bundle) -> torch.Tensor:
    """Eight real digits, ready for the model."""
    return normalise(fit(digits.test_images[:8], bundle.metadata.preprocessing), bundle.metadata.preprocessing)


def artifact_bytes(bundle: Bundle, variant: Variant) -> bytes:
    return bundle.read(artifact_of(bundle, variant))


def agrees(output: torch.Tensor, checkpoint: Checkpoint, images: torch.Tensor) -> bool:
    return judge(output, checkpoint.module().double()(images.double()).detach(), "fp32").passed


@each_on_cpu
def test_a_session_computes_what_eager_computes(variant: Variant, bundle: Bundle, checkpoint: Checkpoint, images: torch.Tensor) -> None:
    with computing_on(CPU), variant.open_session(artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape) as session:
        buffer = session.bind(len(images))
        assert (buffer.shape, buffer.dtype, buffer.device) == (images.shape, torch.float32, CPU)
        buffer.copy_(images)
        output = session.launch()
        assert (output.shape, output.dtype, output.device) == ((len(images), 10), torch.float32, CPU)
        assert session.device == CPU
        assert agrees(output.clone(), checkpoint, images)


@each_on_cpu
def test_the_bound_buffer_serves_launch_after_launch(
    variant: Variant, bundle: Bundle, checkpoint: Checkpoint, images: torch.Tensor
) -> None:
    first, second = images[:4], images[4:]
    with computing_on(CPU), variant.open_session(artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape) as session:
        buffer = session.bind(4)
        outputs = []
        for batch in (first, second, first):
            buffer.copy_(batch)
            outputs.append(session.launch().clone())
    assert agrees(outputs[0], checkpoint, first)
    assert agrees(outputs[1], checkpoint, second)
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


@each_on_cpu
def test_a_session_takes_another_batch_size_when_bound_again(
    variant: Variant, bundle: Bundle, checkpoint: Checkpoint, images: torch.Tensor
) -> None:
    with computing_on(CPU), variant.open_session(artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape) as session:
        for size in (1, 7, 2, 8):
            assert agrees(run_batch(session, images[:size]), checkpoint, images[:size])


@each_on_cpu
def test_outputs_that_run_batch_hands_out_survive_the_next_launch(variant: Variant, bundle: Bundle, images: torch.Tensor) -> None:
    with computing_on(CPU), variant.open_session(artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape) as session:
        kept = run_batch(session, images[:2])
        before = kept.clone()
        run_batch(session, images[2:4])
    assert torch.equal(kept, before)


@pytest.mark.parametrize("variant", ORT_ON_CPU, ids=lambda variant: variant.name)
def test_onnxruntime_records_the_provider_of_every_node(variant: Variant, bundle: Bundle) -> None:
    import onnx

    data = artifact_bytes(bundle, variant)
    nodes = [node.name for node in onnx.load_from_string(data).graph.node if node.op_type != "Constant"]
    with computing_on(CPU), variant.open_session(data, bundle.metadata.preprocessing.input_shape) as session:
        placed = session.node_providers
    assert sorted(node.node for node in placed) == sorted(nodes)
    assert {node.provider for node in placed} == {"CPUExecutionProvider"}


@pytest.mark.parametrize("variant", [v for v in ON_CPU if v not in ORT_ON_CPU], ids=lambda variant: variant.name)
def test_torch_runtimes_have_no_node_placement(variant: Variant, bundle: Bundle) -> None:
    with computing_on(CPU), variant.open_session(artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape) as session:
        assert session.node_providers == ()


def test_onnxruntime_gets_as_many_threads_as_torch(bundle: Bundle) -> None:
    count, variant = torch.get_num_threads() + 1, ORT_ON_CPU[0]
    with (
        devices.threads(count),
        variant.open_session(artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape) as session,
    ):
        assert settings_of(session).intra_op_num_threads == count


def test_threads_are_set_inside_and_restored() -> None:
    before = torch.get_num_threads()
    with devices.threads(before + 2):
        assert torch.get_num_threads() == before + 2
        with devices.threads(None):
            assert torch.get_num_threads() == before + 2
        with devices.threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before


def test_threads_are_restored_after_an_exception() -> None:
    before = torch.get_num_threads()
    with contextlib.suppress(KeyError), devices.threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("count", [0, -1, devices.MAX_THREADS + 1, 10**12])
def test_a_number_of_threads_that_none_can_have_is_bad_input_and_changes_nothing(count: int) -> None:
    before = torch.get_num_threads()
    for use in (devices.threads(count), sources.computing("cpu", threads=count)):
        with pytest.raises(BadInput, match=f"threads is {count}; it must be from 1"), use:
            pass
    assert torch.get_num_threads() == before


def test_more_threads_than_cores_are_allowed() -> None:
    devices.check_threads(devices.MAX_THREADS)
    devices.check_threads(None)


def test_a_runs_threads_are_torchs_and_onnxruntimes(bundle: Bundle) -> None:
    count, source = torch.get_num_threads() + 1, sources.bundle_source(bundle)
    with sources.computing("cpu", threads=count), sources.open_session(source, ORT_ON_CPU[0], "cpu") as session:
        assert torch.get_num_threads() == settings_of(session).intra_op_num_threads == count


# Options.


def settings_of(session: Session) -> Any:
    """ONNX Runtime's own view of a session's options."""
    return session._session.get_session_options()  # type: ignore[attr-defined]


def test_channels_last_holds_weights_and_input_in_that_format(bundle: Bundle) -> None:
    (variant,) = (v for v in ON_CPU if v.options.channels_last)
    _, height, width = shape = bundle.metadata.preprocessing.input_shape
    with computing_on(CPU), variant.open_session(artifact_bytes(bundle, variant), shape) as session:
        buffer = session.bind(3)
        # One channel reads the same in both formats; the strides say which one torch takes it for.
        assert buffer.stride() == (height * width, 1, width, 1)
        assert not buffer.any()
        weights = [p for p in session._module.parameters() if p.ndim == 4]  # type: ignore[attr-defined]
        assert [p.is_contiguous(memory_format=torch.channels_last) for p in weights] == [True] * len(weights)
        assert not all(p.is_contiguous() for p in weights)


def test_the_format_reaches_the_layers_and_the_traces_show_it(bundle: Bundle, images: torch.Tensor) -> None:
    strides = {}
    for variant in (v for v in ON_CPU if v.runtime.name == "eager"):
        data, shape = artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape
        with computing_on(CPU), variant.open_traces(data, shape) as traces:
            taps = traces["module"](images)
        assert torch.equal(taps[0].value, images)
        strides[variant.options.channels_last] = next(tap.value.stride()[1] for tap in taps if tap.op == "conv")
    assert strides[True] == 1 < strides[False]


@pytest.mark.parametrize("variant", ON_CPU, ids=lambda variant: variant.name)
def test_an_option_that_a_runtime_does_not_have_is_refused(variant: Variant, bundle: Bundle) -> None:
    supported = {"eager": {"channels_last"}, "torchscript": set(), "onnxruntime": {"ort"}}[variant.runtime.name]
    every: Mapping[str, Any] = {"channels_last": True, "ort": {"a.b": "1"}}
    for name in every.keys() - supported:
        other = dataclasses.replace(variant, options=SessionOptions(**{name: every[name]}))
        with pytest.raises(BadInput, match=f"has no option {name}"):
            opened(other, artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape)
        with pytest.raises(BadInput, match=f"has no option {name}"), other.open_traces(b"", (1, 1, 1)):
            pass


@each_on_cpu
def test_a_cuda_graph_on_the_cpu_is_refused(variant: Variant, bundle: Bundle) -> None:
    other = dataclasses.replace(variant, options=SessionOptions(cuda_graph=True))
    with pytest.raises(BadInput, match="cuda_graph needs a CUDA device"):
        opened(other, artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape)


class Recorder:
    """What `record_graph` does, without the GPU that it needs: the graph is a function that computes into the recorded output."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.replayed: list[int] = []

    def __call__(self, module: Module, images: torch.Tensor) -> Recording:
        self.recorded.append(len(images))
        output = torch.full_like(module(images), torch.nan)  # a graph that is recorded has not run yet

        def replay() -> None:
            self.replayed.append(len(images))
            output.copy_(module(images))

        return replay, output


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def graphed(recorder: Recorder, checkpoint: Checkpoint) -> Iterator[GraphSession]:
    with computing_on(CPU):
        yield GraphSession(checkpoint.module(), checkpoint.preprocessing.input_shape, CPU, PLAIN, recorder)


def test_a_graph_is_recorded_at_the_first_launch_of_a_batch_size_and_replayed_at_each(graphed: GraphSession, recorder: Recorder) -> None:
    for size in (2, 3, 2):
        graphed.bind(size)
    assert recorder.recorded == []
    for size in (2, 3, 2, 2):
        graphed.bind(size)
        graphed.launch()
    assert (recorder.recorded, recorder.replayed) == ([2, 3], [2, 3, 2, 2])


def test_a_graphs_addresses_stay_and_what_is_written_there_is_computed(
    graphed: GraphSession, checkpoint: Checkpoint, images: torch.Tensor
) -> None:
    addresses = set()
    for first in (0, 4, 2):
        buffer = graphed.bind(3)
        buffer.copy_(images[first : first + 3])
        output = graphed.launch()
        addresses.add((buffer.data_ptr(), output.data_ptr()))
        assert agrees(output.clone(), checkpoint, images[first : first + 3])
        assert agrees(run_batch(graphed, images[:2]), checkpoint, images[:2])
    assert len(addresses) == 1


def test_a_recording_comes_after_the_warm_up_and_is_made_on_torchs_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    # What torch.cuda does here needs a GPU, so stand-ins keep the order of events; tests/test_gpu.py has the real ones.
    events: list[object] = []

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    @contextlib.contextmanager
    def capturing(graph: Graph, stream: object) -> Iterator[None]:
        events.append(("begin", stream))
        yield
        events.append("end")

    def module(images: torch.Tensor) -> torch.Tensor:
        events.append("launch")
        return images + 1

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    replay, output = record_graph(module, torch.zeros(2))
    assert events == ["launch"] * eager.WARMUP_LAUNCHES + [("begin", "stream of cpu"), "launch", "end"]
    replay()
    assert events[-1] == "replay"
    assert output.tolist() == [1, 1]


def test_onnxruntime_keeps_a_batch_sizes_buffers_for_its_graph(bundle: Bundle, checkpoint: Checkpoint, images: torch.Tensor) -> None:
    # The CPU records nothing; the addresses and the name of the graph are what can be seen here.
    data, shape = artifact_bytes(bundle, ORT_ON_CPU[0]), bundle.metadata.preprocessing.input_shape
    addresses = set()
    with computing_on(CPU):
        session = onnxruntime.OrtSession(onnxruntime._create(data, CPU), shape, CPU, SessionOptions(cuda_graph=True))
        for first in (0, 4, 2):
            for size in (3, 2):
                buffer = session.bind(size)
                buffer.copy_(images[first : first + size])
                output = session.launch()
                assert session._bound is not None
                graph = session._bound.run_options.get_run_config_entry("gpu_graph_id")
                addresses.add((size, graph, buffer.data_ptr(), output.data_ptr()))
                assert agrees(output.clone(), checkpoint, images[first : first + size])
    assert sorted((size, graph) for size, graph, *_ in addresses) == [(2, "2"), (3, "3")]


def with_options(bundle: Bundle, ort: Mapping[str, str]) -> contextlib.AbstractContextManager[Session]:
    variant = ORT_ON_CPU[0].with_ort(ort)
    return variant.open_session(artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("intra_op_num_threads", "3", "3"),
        ("inter_op_num_threads", "2", "2"),
        ("graph_optimization_level", "ORT_ENABLE_BASIC", "GraphOptimizationLevel.ORT_ENABLE_BASIC"),
        ("execution_mode", "ORT_PARALLEL", "ExecutionMode.ORT_PARALLEL"),
        ("execution_order", "PRIORITY_BASED", "ExecutionOrder.PRIORITY_BASED"),
        ("enable_cpu_mem_arena", "0", "False"),
        ("enable_mem_pattern", "false", "False"),
        ("enable_mem_reuse", "False", "False"),
        ("use_deterministic_compute", "1", "True"),
    ],
)
def test_an_attribute_of_onnxruntimes_session_options_is_set(
    name: str, value: str, shown: str, bundle: Bundle, checkpoint: Checkpoint, images: torch.Tensor
) -> None:
    with computing_on(CPU), with_options(bundle, {name: value}) as session:
        assert str(getattr(settings_of(session), name)) == shown
        assert agrees(run_batch(session, images), checkpoint, images)


def test_a_session_configuration_entry_reaches_onnxruntime_beside_our_own(bundle: Bundle) -> None:
    with with_options(bundle, {"session.intra_op.allow_spinning": "0"}) as session:
        assert settings_of(session).get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert session.node_providers


def test_sources_pass_onnxruntimes_options_to_its_variants_alone(bundle: Bundle) -> None:
    source, ort = sources.bundle_source(bundle), {"enable_mem_pattern": "0"}
    for variant in ON_CPU:
        with sources.open_session(source, variant, "cpu", ort) as session:
            assert variant not in ORT_ON_CPU or not settings_of(session).enable_mem_pattern


def test_the_traces_are_of_the_graph_that_the_options_make(bundle: Bundle, images: torch.Tensor) -> None:
    variant = ORT_ON_CPU[0].with_ort({"graph_optimization_level": "ORT_DISABLE_ALL"})
    with computing_on(CPU), variant.open_traces(artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape) as traces:
        names = {graph: [tap.name for tap in trace(images)] for graph, trace in traces.items()}
    assert names["optimised"] == names["unoptimised"]


@pytest.mark.parametrize(
    "name", ["", "intra_op_num_thread", "log_severity_level", "optimized_model_filepath", "enable_profiling", "__doc__"]
)
def test_another_attribute_is_unknown_and_named(name: str, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=f"unknown onnxruntime session option {name!r}; "), with_options(bundle, {name: f"{tmp_path}/x"}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_attribute_is_answered_with_the_nearest(bundle: Bundle) -> None:
    with pytest.raises(UnknownName, match="did you mean intra_op_num_threads"), with_options(bundle, {"intra_op_num_thread": "1"}):
        pass


@pytest.mark.parametrize("name", ATTRIBUTES)
@pytest.mark.parametrize("value", ["", "much", "-1", "1.5", "²", "99999999999999999999"])
def test_a_value_that_an_attribute_does_not_take_is_bad_input(name: str, value: str, bundle: Bundle) -> None:
    with pytest.raises(BadInput, match=f"onnxruntime's {name} is '{value}'; it must be "), with_options(bundle, {name: value}):
        pass


@pytest.mark.parametrize("name", RESERVED)
def test_an_entry_that_proves_the_placement_is_not_the_callers_to_set(name: str, bundle: Bundle) -> None:
    with pytest.raises(BadInput, match=f"{name} is set by lenet-deploy"), with_options(bundle, {name: "0"}):
        pass


def test_an_entry_that_onnxruntime_refuses_is_bad_input(bundle: Bundle) -> None:
    with pytest.raises(BadInput, match=r"onnxruntime does not take a\.a\.") as caught, with_options(bundle, {"a." * 600: "1"}):
        pass
    assert len(str(caught.value)) < 300


def test_options_that_keep_a_good_file_from_opening_are_to_blame_and_the_file_is_not(bundle: Bundle) -> None:
    ort = {"session.dynamic_block_base": "wide"}
    with pytest.raises(BadInput, match=r"without session\.dynamic_block_base=wide, and not with it") as caught:
        opened(ORT_ON_CPU[0].with_ort(ort), artifact_bytes(bundle, ORT_ON_CPU[0]), bundle.metadata.preprocessing.input_shape)
    assert not isinstance(caught.value, DamagedFile)
    with pytest.raises(DamagedFile):
        opened(ORT_ON_CPU[0].with_ort(ort), b"damaged", bundle.metadata.preprocessing.input_shape)


def test_options_good_and_bad_write_nothing(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    with with_options(bundle, {"session.intra_op.allow_spinning": "0", "execution_mode": "ORT_PARALLEL", "no.such": "entry"}) as session:
        run_batch(session, torch.zeros(2, *bundle.metadata.preprocessing.input_shape))
    with pytest.raises(BadInput), with_options(bundle, {"session.dynamic_block_base": "wide"}):
        pass
    assert capfd.readouterr() == ("", "")


def opened(variant: Variant, data: bytes, shape: tuple[int, int, int]) -> Session:
    with variant.open_session(data, shape) as session:
        return session


@each_on_cpu
@pytest.mark.parametrize("keep", [0.99, 0.5, 0.01])
def test_a_truncated_artifact_is_a_damaged_file(variant: Variant, bundle: Bundle, keep: float) -> None:
    data = artifact_bytes(bundle, variant)
    with pytest.raises(DamagedFile):
        opened(variant, data[: int(keep * len(data))], bundle.metadata.preprocessing.input_shape)


@each_on_cpu
@pytest.mark.parametrize("data", [b"", b"\n", b"hello", bytes(4096), b"\x13\x37\xff\x80" * 1024, b"PK\x03\x04" + bytes(100)])
def test_foreign_bytes_are_a_damaged_file(variant: Variant, bundle: Bundle, data: bytes) -> None:
    with pytest.raises(DamagedFile) as caught:
        opened(variant, data, bundle.metadata.preprocessing.input_shape)
    assert len(str(caught.value).splitlines()) == 1


@each_on_cpu
def test_an_artifact_of_another_format_is_a_damaged_file(variant: Variant, bundle: Bundle) -> None:
    others = [other for other in ON_CPU if other.artifact.format != variant.artifact.format]
    assert others
    for other in others:
        with pytest.raises(DamagedFile):
            opened(variant, artifact_bytes(bundle, other), bundle.metadata.preprocessing.input_shape)


def test_an_onnx_graph_without_inputs_is_a_damaged_file() -> None:
    from onnx import TensorProto, helper

    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [2, 10])
    constant = helper.make_node("Constant", [], ["logits"], value=helper.make_tensor("scores", TensorProto.FLOAT, [2, 10], [0.0] * 20))
    graph = helper.make_graph([constant], "constant", [], [logits])
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()
    with pytest.raises(DamagedFile):
        opened(ORT_ON_CPU[0], data, (1, 32, 32))


@without_gpu
@pytest.mark.parametrize("variant", ON_CUDA, ids=lambda variant: variant.name)
def test_a_cuda_variant_without_a_gpu_is_unusable_and_says_the_fix(variant: Variant, bundle: Bundle) -> None:
    with pytest.raises(Unusable, match=r"device cuda cannot be used: .*; (run on|pip install|install) "):
        opened(variant, artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape)


@without_gpu
def test_onnxruntime_that_falls_back_to_the_cpu_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    # Asking a machine without a GPU for the CUDA provider is the real fallback: ORT itself would go on quietly on the CPU.
    monkeypatch.setitem(onnxruntime.PROVIDERS, "cpu", "CUDAExecutionProvider")
    with pytest.raises(Unusable, match="CUDAExecutionProvider"):
        opened(ORT_ON_CPU[0], artifact_bytes(bundle, ORT_ON_CPU[0]), bundle.metadata.preprocessing.input_shape)


def test_a_single_node_elsewhere_than_asked_is_refused_by_name(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    placement = onnxruntime._placement
    stray = NodePlacement("node_shape", "SomeOtherExecutionProvider")
    monkeypatch.setattr(onnxruntime, "_placement", lambda session: (*placement(session), stray))
    with pytest.raises(
        Misplaced, match="1 nodes elsewhere than on CPUExecutionProvider: node_shape on SomeOtherExecutionProvider"
    ) as caught:
        opened(ORT_ON_CPU[0], artifact_bytes(bundle, ORT_ON_CPU[0]), bundle.metadata.preprocessing.input_shape)
    assert caught.value.placement[-1] == stray
    assert {node.provider for node in caught.value.placement[:-1]} == {"CPUExecutionProvider"}


@without_gpu
def test_a_provider_that_did_not_load_is_unusable_and_not_misplaced(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    # What does not work here at all says nothing of the graph, so it is skipped and not failed.
    monkeypatch.setitem(onnxruntime.PROVIDERS, "cpu", "CUDAExecutionProvider")
    with pytest.raises(Unusable) as caught:
        opened(ORT_ON_CPU[0], artifact_bytes(bundle, ORT_ON_CPU[0]), bundle.metadata.preprocessing.input_shape)
    assert not isinstance(caught.value, Misplaced)


def test_an_onnxruntime_build_without_the_provider_is_unusable_and_says_the_fix(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(onnxruntime.PROVIDERS, "cpu", "AbsentExecutionProvider")
    with pytest.raises(Unusable, match="build without AbsentExecutionProvider; pip "):
        opened(ORT_ON_CPU[0], artifact_bytes(bundle, ORT_ON_CPU[0]), bundle.metadata.preprocessing.input_shape)
    status = onnxruntime.probe("cpu")
    assert not status.usable
    assert "AbsentExecutionProvider" in status.reason
    assert (status.fix or "").startswith("pip ")


def test_an_onnxruntime_that_does_not_import_is_unusable_and_says_the_fix(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Unusable, match=r"does not import .*; pip install"):
        opened(ORT_ON_CPU[0], artifact_bytes(bundle, ORT_ON_CPU[0]), bundle.metadata.preprocessing.input_shape)
    status = onnxruntime.probe("cpu")
    assert not status.usable
    assert (status.fix or "").startswith("pip install")


@each_runtime
def test_every_runtime_is_usable_on_the_cpu(runtime: RuntimeEntry) -> None:
    status = runtime.load().probe("cpu")
    assert status.usable
    assert status.name == f"{runtime.name}-cpu"
    assert status.reason
    assert status.fix is None


@without_gpu
@each_runtime
def test_every_runtime_says_why_cuda_is_unusable_and_what_to_do(runtime: RuntimeEntry) -> None:
    status = runtime.load().probe("cuda")
    assert not status.usable
    assert status.name == f"{runtime.name}-cuda"
    assert status.reason
    assert status.fix


def test_probing_leaves_the_precision_settings_alone() -> None:
    knobs = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [knob.fp32_precision for knob in knobs]
    api.doctor()
    assert [knob.fp32_precision for knob in knobs] == before


@pytest.mark.parametrize("word", ["", "gpu", "CPU", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "cuda:0:1", "cuda 0", "autos"])
def test_other_device_words_are_bad_input(word: str) -> None:
    with pytest.raises(BadInput, match="use auto, cpu, cuda or cuda:N"):
        parse_device(word)


def test_cpu_is_the_cpu_and_auto_is_a_device_that_works() -> None:
    assert parse_device("cpu") == CPU
    assert parse_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@without_gpu
@pytest.mark.parametrize("word", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_without_a_gpu_is_unusable(word: str) -> None:
    with pytest.raises(Unusable, match=f"device {word} cannot be used"):
        parse_device(word)


def test_a_torch_built_without_cuda_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    status = devices.probe_torch("eager-cuda", "cuda")
    assert (status.usable, status.reason) == (False, "this torch is a build without CUDA")
    assert (status.fix or "").startswith("pip install torch")


ON_GPU = ("torch.cuda.matmul", "torch.cudnn.conv", "onnxruntime.cuda")
SWITCHES = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)


def settings() -> list[str]:
    return [switch.fp32_precision for switch in SWITCHES]


@pytest.fixture
def unusual() -> Iterator[list[str]]:
    """Every switch on something that neither mode leaves it on."""
    before = settings()
    try:
        for switch, value in zip(SWITCHES, ("tf32", "tf32", "bf16", "bf16"), strict=True):
            switch.fp32_precision = value
        yield settings()
    finally:
        for switch, value in zip(SWITCHES, before, strict=True):
            switch.fp32_precision = value


def test_float32_precision_pins_every_switch_and_restores_it(unusual: list[str]) -> None:
    assert unusual == ["tf32", "tf32", "bf16", "bf16"]
    with float32_precision():
        assert settings() == ["ieee"] * 4
        assert not tf32_allowed()
    assert settings() == unusual


def test_tf32_is_allowed_on_the_gpu_alone_and_restored(unusual: list[str]) -> None:
    with float32_precision(allow_tf32=True):
        assert settings() == ["tf32", "tf32", "ieee", "ieee"]
        assert tf32_allowed()
    assert settings() == unusual


def test_strict_float32_inside_tf32_is_strict_and_gives_it_back() -> None:
    before = settings()
    with float32_precision(allow_tf32=True):
        with float32_precision():
            assert settings() == ["ieee"] * 4
        assert tf32_allowed()
    assert settings() == before


def fail_inside(allow_tf32: bool) -> None:
    with float32_precision(allow_tf32):
        raise KeyError("inside")


@pytest.mark.parametrize("allow_tf32", [False, True])
def test_float32_precision_restores_after_an_exception(allow_tf32: bool, unusual: list[str]) -> None:
    with pytest.raises(KeyError, match="inside"):
        fail_inside(allow_tf32)
    assert settings() == unusual


@pytest.mark.parametrize("allow_tf32", [False, True])
def test_float32_state_names_every_switch_and_what_it_is_on(allow_tf32: bool) -> None:
    with computing_on(CPU, allow_tf32):
        state = float32_state()
    names = {"torch.cuda.matmul", "torch.cudnn.conv", "torch.mkldnn.matmul", "torch.mkldnn.conv", "onnxruntime.cuda"}
    assert state.keys() == names
    assert state == {name: "tf32" if allow_tf32 and name in ON_GPU else "ieee" for name in names}


def test_the_cpus_products_are_float32_whatever_was_set_before(unusual: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    image, weight = torch.randn(2, 8, 16, 16, generator=generator), torch.randn(8, 8, 5, 5, generator=generator)
    exact = torch.conv2d(image.double(), weight.double()).flatten(1)
    with float32_precision():
        judged = judge(torch.conv2d(image, weight).flatten(1), exact, "fp32")
    assert (judged.passed, judged.reason) == (True, None)


def test_computing_on_the_cpu_records_no_gradients() -> None:
    weight = torch.ones(2, requires_grad=True)
    with computing_on(CPU):
        assert not (weight * 2).requires_grad
    assert (weight * 2).requires_grad


def test_opening_and_probing_write_nothing(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    for runtime in RUNTIMES:
        for device in DEVICES:
            runtime.load().probe(device)
    for variant in ON_CPU:
        opened(variant, artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape)
        with pytest.raises(DamagedFile):
            opened(variant, b"damaged", bundle.metadata.preprocessing.input_shape)
    assert capfd.readouterr() == ("", "")


def test_a_fresh_process_that_probes_and_runs_everything_writes_nothing(bundle: Bundle, tmp_path: Path) -> None:
    program = (
        "import sys; from lenet_deploy import api; api.INPUTS = 16; api.doctor(); "
        "assert api.check_parity(sys.argv[1], batch_sizes=(1, 7)).verdict == 'pass'"
    )
    done = subprocess.run([sys.executable, "-c", program, str(bundle.path)], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

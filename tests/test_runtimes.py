"""Every runtime keeps the Session contract, refuses what it cannot run, and is silent."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lenet_deploy import api, devices
from lenet_deploy.bundle import Bundle
from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.data import Dataset, fit, normalise
from lenet_deploy.devices import computing_on, float32_precision, float32_state, parse_device, tf32_allowed
from lenet_deploy.errors import BadInput, DamagedFile, Misplaced, Unusable
from lenet_deploy.parity.check import run_batch
from lenet_deploy.parity.judge import judge
from lenet_deploy.records import NodePlacement
from lenet_deploy.runtimes import Session, onnxruntime
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
    before = torch.get_num_threads()
    variant = ORT_ON_CPU[0]
    try:
        torch.set_num_threads(before + 1)
        with computing_on(CPU), variant.open_session(artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape) as session:
            assert session._session.get_session_options().intra_op_num_threads == before + 1
    finally:
        torch.set_num_threads(before)


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
    program = "import sys; from lenet_deploy import api; api.doctor(); assert api.check_parity(sys.argv[1]).verdict == 'pass'"
    done = subprocess.run([sys.executable, "-c", program, str(bundle.path)], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

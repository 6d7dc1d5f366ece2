"""What only a GPU can show: placement, streams, precision and parity of the CUDA variants."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest
import torch

from lenet_deploy import api
from lenet_deploy.bench.plan import SCOPES
from lenet_deploy.bundle import Bundle
from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.data import Dataset, fit, normalise
from lenet_deploy.devices import computing_on, float32_precision, parse_device, synchronise
from lenet_deploy.errors import DamagedFile, Misplaced, Unusable
from lenet_deploy.parity.check import BATCH_SIZES, run_batch
from lenet_deploy.parity.judge import judge
from lenet_deploy.records import CHECKS
from lenet_deploy.runtimes import onnxruntime
from lenet_deploy.sources import artifact_of
from lenet_deploy.train import TrainConfig, train
from lenet_deploy.variants import ONNXRUNTIME, RUNTIMES, VARIANTS, Variant

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use"),
]

CUDA = torch.device("cuda", 0)
ON_CUDA = [variant for variant in VARIANTS if variant.device == "cuda"]
each_on_cuda = pytest.mark.parametrize("variant", ON_CUDA, ids=lambda variant: variant.name)
each_ort_on_cuda = pytest.mark.parametrize(
    "variant", [variant for variant in ON_CUDA if variant.runtime.name == "onnxruntime"], ids=lambda variant: variant.name
)
each_graph = pytest.mark.parametrize(
    "variant", [variant for variant in ON_CUDA if variant.options.cuda_graph], ids=lambda variant: variant.name
)
SLEEP_CYCLES = 400_000_000  # 0.2 s at 2 GHz: far longer than a launch takes to return


def skip_where_unusable(variant: Variant) -> None:
    status = variant.runtime.load().probe("cuda")
    if not status.usable:
        pytest.skip(f"{status.name}: {status.reason}; {status.fix}")


def artifact_bytes(bundle: Bundle, variant: Variant) -> bytes:
    return bundle.read(artifact_of(bundle, variant))


@pytest.fixture
def images(digits: Dataset, bundle: Bundle) -> torch.Tensor:
    """Eight real digits, ready for the model, in host memory."""
    return normalise(fit(digits.test_images[:8], bundle.metadata.preprocessing), bundle.metadata.preprocessing)


def agrees(output: torch.Tensor, checkpoint: Checkpoint, images: torch.Tensor) -> bool:
    return judge(output.cpu(), checkpoint.module().double()(images.double()).detach(), "fp32").passed


@each_on_cuda
def test_a_cuda_variant_passes_parity_at_every_batch_size(variant: Variant, bundle: Bundle) -> None:
    skip_where_unusable(variant)
    report = api.check_parity(bundle, variants=(variant.name,), device="cuda", require=(variant.name,), drill=True)
    assert {result.status for result in report.results} == {"pass"}
    assert {result.batch_size for result in report.results if result.check == "outputs"} == set(BATCH_SIZES)
    assert {result.check for result in report.results} >= set(CHECKS) - {"placement", "weights"}
    assert set(report.float32.values()) == {"ieee"}
    layers = next(result.layers for result in report.results if result.layers)
    assert layers
    assert all(error.passed for error in layers)
    assert (report.verdict, report.missing) == ("pass", ())


@each_on_cuda
def test_a_cuda_variant_passes_with_tf32_allowed_and_the_report_says_so(variant: Variant, bundle: Bundle) -> None:
    skip_where_unusable(variant)
    report = api.check_parity(bundle, variants=(variant.name,), batch_sizes=(1, 64), device="cuda", allow_tf32=True)
    assert {result.status for result in report.results} == {"pass"}
    assert report.float32["torch.cudnn.conv"] == report.float32["torch.cuda.matmul"] == report.float32["onnxruntime.cuda"] == "tf32"


@each_on_cuda
def test_a_cuda_session_has_its_buffers_on_the_gpu_and_takes_new_batch_sizes(
    variant: Variant, bundle: Bundle, checkpoint: Checkpoint, images: torch.Tensor
) -> None:
    skip_where_unusable(variant)
    with computing_on(CUDA), variant.open_session(artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape) as session:
        assert session.device == CUDA
        for size in (1, 8, 3):
            buffer = session.bind(size)
            buffer.copy_(images[:size])
            output = session.launch()
            synchronise(CUDA)
            assert (buffer.device, output.device) == (CUDA, CUDA)
            assert agrees(output, checkpoint, images[:size])


@each_on_cuda
def test_a_launch_sees_what_was_queued_on_torchs_stream_before_it(
    variant: Variant, bundle: Bundle, checkpoint: Checkpoint, images: torch.Tensor
) -> None:
    skip_where_unusable(variant)
    with computing_on(CUDA), variant.open_session(artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape) as session:
        buffer, resident = session.bind(len(images)), images.to(CUDA)
        for _ in range(5):
            session.launch()
        synchronise(CUDA)
        torch.cuda._sleep(SLEEP_CYCLES)
        buffer.copy_(resident)
        output = session.launch()
        still_busy = not torch.cuda.current_stream(CUDA).query()
        synchronise(CUDA)
        # Before microsoft/onnxruntime#28686 each replay of ONNX Runtime's waits for the GPU.
        assert still_busy or (variant.options.cuda_graph and variant.runtime == ONNXRUNTIME), "launch waited for the GPU"
        assert agrees(output, checkpoint, images)


@each_graph
def test_a_replay_computes_what_is_in_the_buffer_and_every_batch_size_keeps_its_own(
    variant: Variant, bundle: Bundle, checkpoint: Checkpoint, images: torch.Tensor
) -> None:
    skip_where_unusable(variant)
    addresses = set()
    with computing_on(CUDA), variant.open_session(artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape) as session:
        for first in (0, 4, 2, 1):
            for size in (3, 1, 4):
                batch = images[first : first + size]
                buffer = session.bind(size)
                buffer.copy_(batch)
                output = session.launch()
                addresses.add((size, buffer.data_ptr(), output.data_ptr()))
                synchronise(CUDA)
                assert agrees(output, checkpoint, batch)
    assert len(addresses) == 3


@each_graph
def test_after_the_first_launch_a_graph_is_all_that_is_launched(variant: Variant, bundle: Bundle) -> None:
    skip_where_unusable(variant)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with computing_on(CUDA), variant.open_session(artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape) as session:
        session.bind(2)
        session.launch()
        synchronise(CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(3):
                session.launch()
            synchronise(CUDA)
    calls = [event.name for event in profile.events() if event.name.startswith(("cuda", "cu"))]
    if not calls:
        pytest.skip("the profiler sees no calls of CUDA on this machine")
    assert sum("GraphLaunch" in call for call in calls) == 3
    assert not any("LaunchKernel" in call for call in calls)


def test_onnxruntime_is_told_of_the_graph_only_where_it_is_asked_for(bundle: Bundle) -> None:
    told = {}
    for variant in (v for v in ON_CUDA if v.runtime == ONNXRUNTIME):
        skip_where_unusable(variant)
        with (
            computing_on(CUDA),
            variant.open_session(artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape) as session,
        ):
            told[variant] = session._session.get_provider_options()["CUDAExecutionProvider"]["enable_cuda_graph"]  # type: ignore[attr-defined]
    assert told == {variant: str(int(variant.options.cuda_graph)) for variant in told}


def test_a_graph_of_several_sessions_at_once_leaves_each_its_own(bundle: Bundle, checkpoint: Checkpoint, images: torch.Tensor) -> None:
    # A bench holds every session open and visits them in turn.
    with contextlib.ExitStack() as stack:
        stack.enter_context(computing_on(CUDA))
        shape = bundle.metadata.preprocessing.input_shape
        usable = [v for v in ON_CUDA if v.runtime.load().probe("cuda").usable]
        sessions = [stack.enter_context(v.open_session(artifact_bytes(bundle, v), shape)) for v in usable]
        for batch in (images[:4], images[4:], images[2:4], images[1:5]):
            for session in sessions:
                assert agrees(run_batch(session, batch), checkpoint, batch)


def test_channels_last_holds_its_input_in_that_format(bundle: Bundle) -> None:
    (variant,) = (v for v in ON_CUDA if v.options.channels_last)
    _, height, width = shape = bundle.metadata.preprocessing.input_shape
    with computing_on(CUDA), variant.open_session(artifact_bytes(bundle, variant), shape) as session:
        assert session.bind(3).stride() == (height * width, 1, width, 1)


@each_ort_on_cuda
def test_onnxruntime_places_every_node_on_the_gpu(variant: Variant, bundle: Bundle) -> None:
    skip_where_unusable(variant)
    with computing_on(CUDA), variant.open_session(artifact_bytes(bundle, variant), bundle.metadata.preprocessing.input_shape) as session:
        assert session.node_providers
        assert {node.provider for node in session.node_providers} == {"CUDAExecutionProvider"}


@each_ort_on_cuda
def test_onnxruntime_refuses_a_graph_that_the_gpu_cannot_run_whole(variant: Variant) -> None:
    from onnx import TensorProto, helper

    skip_where_unusable(variant)
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 4, 4])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1])
    # Det has a kernel for the CPU only.
    graph = helper.make_graph([helper.make_node("Det", ["image"], ["logits"])], "determinant", [image], [logits])
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()
    with computing_on(CUDA), pytest.raises(Misplaced) as caught, variant.open_session(data, (1, 4, 4)):
        pass
    assert "CPUExecutionProvider" in {node.provider for node in caught.value.placement}


@each_on_cuda
@pytest.mark.parametrize("data", [b"", b"no artifact"], ids=["empty", "foreign"])
def test_damaged_bytes_are_a_damaged_file_on_the_gpu_too(variant: Variant, data: bytes, bundle: Bundle) -> None:
    skip_where_unusable(variant)
    shape = bundle.metadata.preprocessing.input_shape
    with computing_on(CUDA), pytest.raises(DamagedFile), variant.open_session(data, shape):
        pass


def test_eager_and_torchscript_are_usable_and_onnxruntime_is_or_says_why() -> None:
    statuses = {status.name: status for status in api.doctor()}
    assert statuses["eager-cuda"].usable
    assert statuses["torchscript-cuda"].usable
    ort = statuses["onnxruntime-cuda"]
    assert ort.usable or (ort.reason and ort.fix)


def test_variants_whose_runtime_doctor_calls_unusable_are_skipped_with_a_reason_and_the_others_pass(bundle: Bundle) -> None:
    usable = {runtime.name: runtime.load().probe("cuda").usable for runtime in RUNTIMES}
    report = api.check_parity(bundle, batch_sizes=(2,), device="cuda")
    status = {result.variant: result.status for result in report.results}
    assert status == {variant.name: "pass" if usable[variant.runtime.name] else "skipped" for variant in ON_CUDA}
    assert all(result.reason for result in report.results if result.status == "skipped")


def test_the_gpu_by_number_is_the_gpu(bundle: Bundle) -> None:
    assert parse_device("cuda") == parse_device("cuda:0") == parse_device("auto") == CUDA
    report = api.check_parity(bundle, variants=("eager/*/fp32",), batch_sizes=(3,), device="cuda:0")
    assert {result.variant for result in report.results} == {"eager/torch-cuda/fp32"}
    assert {result.status for result in report.results} == {"pass"}


def test_a_gpu_that_is_not_there_is_unusable() -> None:
    with pytest.raises(Unusable, match=f"this machine has {torch.cuda.device_count()} CUDA devices"):
        parse_device(f"cuda:{torch.cuda.device_count()}")


def test_the_benchmark_measures_every_usable_cuda_variant_in_both_scopes(bundle: Bundle) -> None:
    report = api.benchmark(bundle, batch_sizes=(1, 8), rounds=1, device="cuda")
    usable = [variant.name for variant in ON_CUDA if variant.core and variant.runtime.load().probe("cuda").usable]
    assert [(m.variant, m.batch_size, m.scope) for m in report.measurements] == [
        (name, size, scope) for name in usable for size in (1, 8) for scope in SCOPES
    ]
    for m in report.measurements:
        assert m.device == "cuda:0"
        assert min(m.times_s) > 0
        assert m.throughput_ips > 0
        assert m.accuracy is not None
    assert report.environment.gpu == torch.cuda.get_device_name(0)


def test_device_scope_waits_for_the_gpu(bundle: Bundle) -> None:
    # Launching costs the same at any batch size: a clock that stops when launch returns would see no difference.
    report = api.benchmark(bundle, variants=("eager/torch-cuda/fp32",), batch_sizes=(1, 65536), scopes=("device",), rounds=1)
    one, many = report.measurements
    assert many.median_s > 2 * one.median_s
    assert many.throughput_ips > one.throughput_ips


def relative_budget_used(output: torch.Tensor, exact: torch.Tensor) -> float:
    """Share of the float32 budget that the worst row used."""
    judged = judge(output.flatten(1).cpu(), exact.flatten(1), "fp32")
    assert judged.budget_used is not None
    return judged.budget_used


def test_float32_precision_keeps_convolutions_and_products_within_float32_and_tf32_would_not() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(4, 64, 32, 32, generator=generator)
    weight = torch.randn(64, 64, 3, 3, generator=generator)
    left, right = torch.randn(256, 512, generator=generator), torch.randn(512, 256, generator=generator)
    convolved = torch.conv2d(image.double(), weight.double())
    multiplied = left.double() @ right.double()

    def used() -> tuple[float, float]:
        return (
            relative_budget_used(torch.conv2d(image.to(CUDA), weight.to(CUDA)), convolved),
            relative_budget_used(left.to(CUDA) @ right.to(CUDA), multiplied),
        )

    knobs = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [knob.fp32_precision for knob in knobs]
    try:
        for knob in knobs:
            knob.fp32_precision = "tf32"
        with float32_precision():
            strict = used()
        loose = used()
    finally:
        for knob, value in zip(knobs, before, strict=True):
            knob.fp32_precision = value
    assert all(share < 1.0 for share in strict)
    if torch.cuda.get_device_capability(0) >= (8, 0):  # older ones have no TF32
        assert all(share > 1.0 for share in loose)


def test_probing_leaves_the_current_stream_and_precision_alone() -> None:
    stream = torch.cuda.current_stream(CUDA)
    precision = torch.backends.cudnn.conv.fp32_precision
    api.doctor()
    assert torch.cuda.current_stream(CUDA) == stream
    assert torch.backends.cudnn.conv.fp32_precision == precision


def test_computing_on_the_gpu_uses_a_stream_of_its_own_and_gives_the_old_one_back() -> None:
    before = torch.cuda.current_stream(CUDA)
    with computing_on(CUDA):
        assert torch.cuda.current_stream(CUDA) != torch.cuda.default_stream(CUDA)
    assert torch.cuda.current_stream(CUDA) == before


def test_training_on_the_gpu_learns_and_returns_weights_on_the_cpu(digits: Dataset) -> None:
    seen: list[float] = []
    config = TrainConfig("lenet5", {"in_channels": "1", "image_size": "28", "padding": "2"}, epochs=3, device="cuda")
    checkpoint = train(config, digits, lambda stats: seen.append(stats.loss))
    assert all(math.isfinite(loss) for loss in seen)
    assert seen[-1] < seen[0]
    assert {tensor.device.type for tensor in checkpoint.weights.values()} == {"cpu"}
    assert checkpoint.provenance["device"] == "cuda:0"


@each_on_cuda
def test_evaluate_on_the_gpu_agrees_with_the_cpu(variant: Variant, bundle: Bundle, digits: Dataset) -> None:
    skip_where_unusable(variant)
    few = dataclasses.replace(digits, test_images=digits.test_images[:64], test_labels=digits.test_labels[:64])
    on_gpu = {row.variant: row.correct for row in api.evaluate(bundle.path, few, device="cuda").rows}
    (on_cpu,) = {row.correct for row in api.evaluate(bundle.path, few, device="cpu").rows}
    assert on_gpu[variant.name] == on_cpu


def test_opening_on_the_gpu_writes_nothing(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    onnxruntime.probe("cuda")
    for variant in ON_CUDA:
        if variant.runtime.load().probe("cuda").usable:
            data = artifact_bytes(bundle, variant)
            with computing_on(CUDA), variant.open_session(data, bundle.metadata.preprocessing.input_shape) as session:
                run_batch(session, torch.zeros(2, *bundle.metadata.preprocessing.input_shape))
    assert capfd.readouterr() == ("", "")

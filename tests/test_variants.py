"""The registry is consistent, complete and loadable; selections are by format, precision and glob."""

from __future__ import annotations

import inspect
import itertools
import re

import pytest

from lenet_deploy.errors import BadInput, UnknownName
from lenet_deploy.runtimes import PLAIN, Runtime, SessionOptions
from lenet_deploy.variants import (
    ARTIFACTS,
    CHECKPOINT,
    DEVICES,
    FORMATS,
    ONNXRUNTIME,
    PRECISIONS,
    RUNTIMES,
    VARIANTS,
    ArtifactSpec,
    RuntimeEntry,
    Variant,
    select_artifacts,
    select_variants,
    with_ort_options,
)

NAME = re.compile(r"(?P<format>[a-z0-9-]+)/[a-z0-9-]+-(?P<device>cpu|cuda)/(?P<precision>[a-z0-9]+)(?P<options>(/[a-z0-9-]+)*)")

each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
each_artifact = pytest.mark.parametrize("spec", ARTIFACTS, ids=lambda spec: spec.name)
each_runtime = pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.name)


def test_names_and_paths_are_unique() -> None:
    for values in (
        [variant.name for variant in VARIANTS],
        [spec.name for spec in ARTIFACTS],
        [spec.path for spec in ARTIFACTS],
        [runtime.name for runtime in RUNTIMES],
    ):
        assert len(values) == len(set(values))


@each_variant
def test_a_name_is_format_runtime_device_precision_and_option(variant: Variant) -> None:
    match = NAME.fullmatch(variant.name)
    assert match is not None
    assert match["format"] == ("eager" if variant.artifact is CHECKPOINT else variant.artifact.format)
    assert match["device"] == variant.device
    assert match["precision"] == variant.precision == variant.artifact.precision


@each_artifact
def test_an_artifacts_path_is_a_plain_file_name(spec: ArtifactSpec) -> None:
    assert re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)+", spec.path)
    assert spec.path != "manifest.json"


def test_derived_tuples_hold_what_the_variants_hold_and_no_more() -> None:
    assert set(ARTIFACTS) == {variant.artifact for variant in VARIANTS}
    assert set(RUNTIMES) == {variant.runtime for variant in VARIANTS}
    assert set(DEVICES) == {variant.device for variant in VARIANTS} == {"cpu", "cuda"}
    assert set(PRECISIONS) == {variant.precision for variant in VARIANTS}
    assert set(FORMATS) == {variant.artifact.format for variant in VARIANTS if variant.artifact is not CHECKPOINT}


def test_this_issues_runtimes_and_formats_are_there() -> None:
    assert {"eager", "torchscript", "onnxruntime"} <= {runtime.name for runtime in RUNTIMES}
    assert {"torchscript", "onnx"} <= set(FORMATS)


def test_every_runtime_stands_on_every_device() -> None:
    pairs = {(variant.runtime, variant.device) for variant in VARIANTS}
    assert pairs == set(itertools.product(RUNTIMES, DEVICES))


def test_eager_torchscript_and_onnx_in_fp32_are_core_on_each_device() -> None:
    core = {(v.runtime.name, v.device) for v in VARIANTS if v.core}
    assert core >= set(itertools.product(("eager", "torchscript", "onnxruntime"), DEVICES))
    for v in VARIANTS:
        if v.precision == "fp32" and v.runtime.name in ("eager", "torchscript", "onnxruntime"):
            assert v.core == (v.options == PLAIN)


def test_channels_last_and_cuda_graphs_stand_beside_the_plain_variants() -> None:
    optional = {v.name: v.options for v in VARIANTS if v.options != PLAIN}
    graph, last = SessionOptions(cuda_graph=True), SessionOptions(channels_last=True)
    assert optional == {
        "eager/torch-cpu/fp32/channels-last": last,
        "eager/torch-cuda/fp32/channels-last": last,
        "eager/torch-cuda/fp32/cuda-graph": graph,
        "torchscript/torch-cuda/fp32/trace/cuda-graph": graph,
        "onnx/ort-cuda/fp32/cuda-graph": graph,
    }


@each_variant
def test_an_options_name_says_what_its_sessions_do_and_the_plain_variant_of_the_same_file_comes_first(variant: Variant) -> None:
    match = NAME.fullmatch(variant.name)
    assert match is not None
    named = match["options"].split("/")
    assert variant.options == SessionOptions(channels_last="channels-last" in named, cuda_graph="cuda-graph" in named)
    same = [v for v in VARIANTS if (v.artifact, v.runtime, v.device) == (variant.artifact, variant.runtime, variant.device)]
    assert same[0].options == PLAIN


def test_cuda_graphs_are_for_cuda_alone() -> None:
    assert {v.device for v in VARIANTS if v.options.cuda_graph} == {"cuda"}


def test_a_variant_with_options_can_be_a_key() -> None:
    assert len(set(VARIANTS)) == len(VARIANTS)
    assert len({variant.with_ort({"a.b": "1"}) for variant in VARIANTS}) == len(VARIANTS)


def test_onnxruntimes_options_reach_its_variants_and_no_other() -> None:
    ort = {"session.intra_op.allow_spinning": "0"}
    changed = with_ort_options(VARIANTS, ort)
    assert [v.name for v in changed] == [v.name for v in VARIANTS]
    for before, after in zip(VARIANTS, changed, strict=True):
        assert after.options.ort == (ort if before.runtime == ONNXRUNTIME else {})
        assert (after.options.cuda_graph, after.options.channels_last) == (before.options.cuda_graph, before.options.channels_last)
    assert all(v.options.ort == {} for v in VARIANTS)


def test_later_options_of_onnxruntime_take_the_place_of_earlier_ones() -> None:
    variant = next(v for v in VARIANTS if v.runtime == ONNXRUNTIME)
    assert variant.with_ort({"a.b": "1", "c.d": "2"}).with_ort({"a.b": "3"}).options.ort == {"a.b": "3", "c.d": "2"}


def test_onnxruntimes_options_for_torch_alone_are_refused_and_none_are_fine() -> None:
    torchs = [v for v in VARIANTS if v.runtime != ONNXRUNTIME]
    with pytest.raises(BadInput, match=r"^execution_mode: options of onnxruntime, which runs none of eager/"):
        with_ort_options(torchs, {"execution_mode": "ORT_PARALLEL"})
    assert with_ort_options(torchs, {}) == tuple(torchs)


@each_runtime
def test_a_runtime_loads_and_has_the_protocols_functions(runtime: RuntimeEntry) -> None:
    loaded = runtime.load()
    for name in ("probe", "open_session", "open_traces"):
        asked = [parameter for parameter in inspect.signature(getattr(Runtime, name)).parameters if parameter != "self"]
        assert list(inspect.signature(getattr(loaded, name)).parameters) == asked


@each_artifact
def test_an_exporter_loads_and_only_the_checkpoint_has_none(spec: ArtifactSpec) -> None:
    if spec.exporter is None:
        assert spec is CHECKPOINT
    else:
        assert list(inspect.signature(spec.exporter()).parameters) == ["module", "metadata", "options"]


def test_artifacts_are_selected_by_format_and_precision_in_registry_order() -> None:
    assert select_artifacts(("onnx",), ("fp32",)) == tuple(s for s in ARTIFACTS if s.format == "onnx" and s.precision == "fp32")
    assert select_artifacts(reversed(FORMATS), PRECISIONS) == tuple(spec for spec in ARTIFACTS if spec.exporter)


def test_all_means_every_format_and_precision() -> None:
    assert select_artifacts(("all",), ("fp32",)) == tuple(spec for spec in ARTIFACTS if spec.exporter)


def test_the_checkpoint_is_never_selected_for_export() -> None:
    with pytest.raises(UnknownName, match="unknown format 'checkpoint'"):
        select_artifacts(("checkpoint",), ("fp32",))
    assert CHECKPOINT not in select_artifacts(("all",), ("fp32",))


@pytest.mark.parametrize(
    ("formats", "precisions", "message"),
    [
        (("onxx",), ("fp32",), "unknown format 'onxx'; did you mean onnx?"),
        (("onnx", "torchscipt"), ("fp32",), "unknown format 'torchscipt'; did you mean torchscript?"),
        (("onnx",), ("fp23",), "unknown precision 'fp23'; did you mean fp32"),
    ],
)
def test_an_unknown_format_or_precision_is_answered_with_the_nearest(
    formats: tuple[str, ...], precisions: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UnknownName, match=re.escape(message)):
        select_artifacts(formats, precisions)


@each_variant
def test_a_variants_own_name_selects_it_alone(variant: Variant) -> None:
    assert select_variants((variant.name,)) == (variant,)


def test_globs_select_in_registry_order_and_each_variant_once() -> None:
    assert select_variants(("*",)) == VARIANTS
    assert select_variants(("onnx/*", "*", "eager/*")) == VARIANTS
    assert select_variants(("*-cpu/*",)) == tuple(variant for variant in VARIANTS if variant.device == "cpu")
    assert select_variants(("*/trac?",)) == tuple(variant for variant in VARIANTS if variant.name.endswith("/trace"))


def test_globs_are_exact_about_case() -> None:
    with pytest.raises(UnknownName):
        select_variants(("ONNX/*",))


def test_a_glob_that_matches_nothing_is_refused_even_beside_one_that_does() -> None:
    with pytest.raises(UnknownName, match=r"did you mean .*onnx/ort-cpu/fp32"):
        select_variants(("*", "onnx/ort-cpu/fp33"))


def test_a_variant_outside_the_given_ones_is_refused() -> None:
    with pytest.raises(UnknownName):
        select_variants((VARIANTS[1].name,), among=VARIANTS[:1])

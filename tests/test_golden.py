"""The golden convolutions: each one exported by the project's own exporters and executed by every runtime, exactly."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lenet_deploy.devices import computing_on, parse_device
from lenet_deploy.exporters import ExportOptions
from lenet_deploy.models.layers import output_size
from lenet_deploy.parity.check import run_batch
from lenet_deploy.records import ArtifactMetadata, Preprocessing
from lenet_deploy.runtimes.eager import ModuleSession
from lenet_deploy.variants import ARTIFACTS, DEVICES, VARIANTS, ArtifactSpec, Variant

EXPORTABLE = tuple(spec for spec in ARTIFACTS if spec.exporter and spec.precision == "fp32")
BATCHES = (1, 3)


def on_its_device(name: str, device: str, value: object) -> Any:
    return pytest.param(value, id=name, marks=[pytest.mark.gpu] if device == "cuda" else [])


RUNNING = [on_its_device(variant.name, variant.device, variant) for variant in VARIANTS if variant.artifact in EXPORTABLE]


class Example:
    """One golden example as tensors: a batch of one image, the filters, the integers that must come out."""

    def __init__(self, values: dict[str, Any]) -> None:
        image, expected = torch.tensor(values["input"]).float(), torch.tensor(values["output"]).float()
        filters = torch.tensor(values["filters"] if "filters" in values else [[values["filter"]]]).float()
        self.image = image.reshape(1, -1, *image.shape[-2:])
        self.expected = expected.reshape(1, -1, *expected.shape[-2:])
        self.filters, self.stride, self.padding = filters, values["stride"], values["padding"]

    def module(self) -> nn.Module:
        """A convolution without bias that holds the filters."""
        out_channels, in_channels, kernel, _ = self.filters.shape
        layer = nn.Conv2d(in_channels, out_channels, kernel, self.stride, self.padding, bias=False)
        layer.weight = nn.Parameter(self.filters)
        return layer.eval()

    @property
    def metadata(self) -> ArtifactMetadata:
        channels, size = self.image.shape[1:3]
        preprocessing = Preprocessing(channels, size, 0, (0.0,) * channels, (1.0,) * channels)
        return ArtifactMetadata("golden", {}, preprocessing, (), "")


@pytest.fixture(scope="module")
def examples(shared: Path) -> list[Example]:
    return [Example(values) for values in json.loads((shared / "golden/lenet5.json").read_text())["conv_examples"]]


@pytest.fixture(scope="module")
def exported(examples: list[Example]) -> Callable[[ArtifactSpec, int], bytes]:
    """The bytes of one artifact of one example, exported once."""

    @functools.cache
    def export(spec: ArtifactSpec, number: int) -> bytes:
        assert spec.exporter is not None
        return spec.exporter()(examples[number].module(), examples[number].metadata, ExportOptions()).data

    return export


def test_the_golden_file_holds_examples_and_the_formula(examples: list[Example], shared: Path) -> None:
    assert len(examples) == 5
    assert json.loads((shared / "golden/lenet5.json").read_text())["output_size"].startswith("OH = (H + 2P - FH) / S + 1")


def test_the_formula_gives_the_golden_output_sides(examples: list[Example]) -> None:
    for example in examples:
        side = output_size("golden", example.image.shape[2], example.filters.shape[2], example.stride, example.padding)
        assert example.expected.shape[2:] == (side, side)


def test_there_are_as_many_output_channels_as_filters(examples: list[Example]) -> None:
    several = examples[-1]
    assert (len(several.filters), several.image.shape[1]) == (2, 3)
    assert all(example.expected.shape[1] == len(example.filters) for example in examples)


@pytest.mark.parametrize("device", [on_its_device(device, device, device) for device in DEVICES])
def test_eager_computes_the_integers(device: str, examples: list[Example]) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    target = parse_device(device)
    with computing_on(target):
        for example in examples:
            session = ModuleSession(example.module().to(target), example.metadata.preprocessing.input_shape, target)
            for batch in BATCHES:
                found = run_batch(session, example.image.repeat(batch, 1, 1, 1))
                assert torch.equal(found, example.expected.repeat(batch, 1, 1, 1))


@pytest.mark.parametrize("variant", RUNNING)
def test_every_exported_variant_computes_the_integers(
    variant: Variant, examples: list[Example], exported: Callable[[ArtifactSpec, int], bytes]
) -> None:
    status = variant.runtime.load().probe(variant.device)
    if variant.device == "cuda" and not status.usable:
        pytest.skip(status.reason)
    for number, example in enumerate(examples):
        data = exported(variant.artifact, number)  # outside inference mode, as the project exports
        with computing_on(parse_device(variant.device)), variant.open_session(data, example.metadata.preprocessing.input_shape) as session:
            for batch in BATCHES:
                found = run_batch(session, example.image.repeat(batch, 1, 1, 1))
                assert torch.equal(found, example.expected.repeat(batch, 1, 1, 1))


def test_every_exportable_artifact_is_executed_by_a_runtime_on_the_cpu() -> None:
    executed = {variant.artifact for variant in VARIANTS if variant.device == "cpu"}
    assert EXPORTABLE
    assert set(EXPORTABLE) <= executed

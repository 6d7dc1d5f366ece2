"""Every command on its happy path: what it prints, where, and which files it leaves."""

from __future__ import annotations

import importlib
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import onnx
import pytest
import torch
from lenet_deploy.cli import COMMANDS, build
from lenet_deploy.cli.errors import run

from lenet_deploy import __version__, api, zoo
from lenet_deploy.bundle import Bundle, open_bundle
from lenet_deploy.checkpoint import Checkpoint, load, to_bytes
from lenet_deploy.data import Dataset, fit, normalise
from lenet_deploy.errors import GateFailed
from lenet_deploy.models import MODELS
from lenet_deploy.variants import ARTIFACTS, DEVICES, RUNTIMES, TRACE, VARIANTS
from lenet_deploy.zoo import DEFAULT

CPU_VARIANTS = [variant.name for variant in VARIANTS if variant.device == "cpu"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # two threads wait for each other four times as long where the cores are shared with other work
QUICK = ("--batch", "1", "--scope", "device", "--rounds", "1")
SMALL = ("--set", "in_channels=1", "--set", "channels=2,3", "--set", "hidden=8,6")


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Standard output as one JSON document that starts with its schema."""
        found: dict[str, Any] = json.loads(self.out)
        assert next(iter(found)) == "schema"
        assert "environment" in found
        return found


Run = Callable[..., Outcome]


@pytest.fixture
def lenet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """`lenet-deploy ARGS...` in this process and in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["lenet-deploy", *map(str, arguments)])
        capsys.readouterr()
        code = run(build())
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return call


def stored(path: Path, kind: str) -> dict[str, Any]:
    """A JSON file that the command wrote."""
    document: dict[str, Any] = json.loads(path.read_text())
    assert next(iter(document.items())) == ("schema", f"lenet-deploy/{kind}/{2 if kind == 'bench' else 1}")
    assert document["environment"]["python"]
    return document


def test_train_and_export_name_their_folders_after_the_model(lenet: Run, tmp_path: Path) -> None:
    assert lenet("train", "--epochs", "1", "--device", "cpu", *SMALL, "--quiet").code == 0
    assert lenet("export", "lenet5", *SMALL, "--to", "torchscript", "--device", "cpu", "--quiet").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lenet5", "lenet5-digits"]


def test_export_publishes_says_what_is_exported_and_prints_both_tables(lenet: Run, tmp_path: Path) -> None:
    done = lenet("export", "lenet5", *SMALL, "--out", "bundle", "--device", "cpu", "--seed", "4")
    assert done.code == 0
    assert done.err == "lenet5: freshly initialised from seed 4\n", "and no noise of third parties"
    opened = open_bundle(tmp_path / "bundle")
    assert [artifact.name for artifact in opened.manifest.artifacts] == [spec.name for spec in ARTIFACTS]
    assert all(f"{name}  " in done.out for name in CPU_VARIANTS)
    assert all(f"{artifact.path}  " in done.out for artifact in opened.manifest.artifacts)
    assert done.out.endswith("published bundle\n")


def test_export_of_nothing_named_is_a_trained_network_of_the_zoo(lenet: Run, tmp_path: Path) -> None:
    done = lenet("export", "--to", "torchscript", "--device", "cpu", "--quiet")
    assert done.code == 0, done.err
    published = open_bundle(tmp_path / DEFAULT)
    assert published.metadata == zoo.load(DEFAULT).metadata()
    assert done.out.endswith(f"published {DEFAULT}\n")
    told = lenet("evaluate", DEFAULT, "--device", "cpu")
    assert (told.code, told.err) == (0, f"{DEFAULT}: the model of that name, not what stands in this folder; for that say ./{DEFAULT}\n")


def test_zoo_lists_what_comes_with_the_package_and_prints_cards(lenet: Run) -> None:
    listed = lenet("zoo")
    assert (listed.code, listed.err) == (0, "")
    assert [line.split()[0] for line in listed.out.splitlines()[2:]] == list(zoo.names())
    entries = lenet("zoo", "--json", "-").document["entries"]
    assert [entry["name"] for entry in entries] == list(zoo.names())
    assert all(entry["ci95"][0] < entry["accuracy"] < entry["ci95"][1] for entry in entries)
    card = lenet("zoo", DEFAULT)
    assert card.code == 0
    assert card.out.startswith(f"# {DEFAULT}\n")
    assert "Command: `lenet-deploy train" in card.out
    wrong = lenet("zoo", "lenet5-mnits")
    assert (wrong.code, wrong.out) == (2, "")
    assert f"did you mean {DEFAULT}" in wrong.err


def test_export_to_one_format_holds_that_format_and_the_checkpoint(lenet: Run, tmp_path: Path) -> None:
    assert lenet("export", "lenet5", *SMALL, "--to", "torchscript", "--out", "bundle", "--device", "cpu", "--quiet").code == 0
    names = [artifact.name for artifact in open_bundle(tmp_path / "bundle").manifest.artifacts]
    assert names == ["checkpoint", "torchscript-trace-fp32", "torchscript-script-fp32"]


@pytest.mark.parametrize(("to", "formats"), [((), ("torchscript", "onnx")), (("--to", "all"), ("all",)), (("--to", "onnx"), ("onnx",))])
def test_export_asks_for_the_formats_of_its_option(
    to: tuple[str, ...], formats: tuple[str, ...], lenet: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def export(*arguments: object, formats: tuple[str, ...], **options: object) -> None:
        asked.append(formats)
        raise GateFailed("as asked")

    monkeypatch.setattr(api, "export", export)
    assert lenet("export", "lenet5", *SMALL, *to, "--quiet").err == "error: as asked\n"
    assert asked == [formats]


def test_export_takes_a_checkpoint_and_a_foreign_state_dict(lenet: Run, tiny: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_bytes(to_bytes(tiny))
    torch.save(dict(tiny.weights), tmp_path / "foreign.pt")
    options = ("--to", "torchscript", "--device", "cpu", "--quiet")
    config = ("in_channels=1", "image_size=20", "channels=6,10", "hidden=24,16")
    settings = ("--model", "lenet5", *(word for each in config for word in ("--set", each)))
    assert lenet("export", "mine.safetensors", *options, "--out", "a").code == 0
    assert lenet("export", "foreign.pt", *settings, *options, "--out", "b").code == 0
    digests = {open_bundle(tmp_path / name).metadata.weights_sha256 for name in "ab"}
    assert digests == {tiny.metadata().weights_sha256}


def test_export_replaces_a_bundle_by_force(lenet: Run, tmp_path: Path) -> None:
    arguments = ("export", "lenet5", *SMALL, "--to", "torchscript", "--device", "cpu", "--quiet", "--out", "bundle")
    assert [lenet(*arguments).code, lenet(*arguments).code, lenet(*arguments, "--force", "--seed", "1").code] == [0, 2, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


PARITY_KEYS = {
    "variant",
    "status",
    "reason",
    "inputs",
    "batch_size",
    "max_abs_error",
    "rmse",
    "budget_used",
    "top1_agreement",
    "first_divergent_layer",
    "node_providers",
    "check",
    "decisions",
    "layers",
}
TINY_VARIANTS = [
    "eager/torch-cpu/fp32",
    "torchscript/torch-cpu/fp32/trace",
    "onnx/ort-cpu/fp32/ts-exporter",
    "eager/torch-cpu/fp32/channels-last",
]


def test_parity_prints_a_table_and_writes_json_and_markdown(lenet: Run, bundle: Bundle, tmp_path: Path) -> None:
    done = lenet("parity", bundle.path, "--device", "cpu", "--batch", "1,3", "--json", "parity.json", "--markdown", "parity.md")
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith("verdict: pass\n")
    assert all(f"\n{name} " in done.out for name in CPU_VARIANTS)
    document = stored(tmp_path / "parity.json", "parity")
    assert document["verdict"] == "pass"
    assert set(document["float32"].values()) == {"ieee"}
    assert all(result.keys() >= PARITY_KEYS for result in document["results"])
    assert {result["variant"] for result in document["results"]} == set(CPU_VARIANTS)
    assert {(result["status"], result["batch_size"]) for result in document["results"]} == {("pass", None), ("pass", 1), ("pass", 3)}
    outputs = [result for result in document["results"] if result["check"] == "outputs"]
    assert all(0 <= result["budget_used"] <= 1 and result["top1_agreement"] == 1 for result in outputs)
    decided = [result["decisions"] for result in document["results"] if result["decisions"]]
    assert [(each["images"], each["true_flips"]) for each in decided] == [(360, 0)] * len(CPU_VARIANTS)
    markdown = (tmp_path / "parity.md").read_text()
    assert markdown.startswith("## Parity: pass\n")
    rows = [line for line in markdown.splitlines() if line.startswith("| ") and any(f"| {name} |" in line for name in CPU_VARIANTS)]
    assert len(rows) >= len(CPU_VARIANTS)


def test_parity_json_to_standard_output_is_all_there_is_on_it(lenet: Run, tiny_bundle: Bundle) -> None:
    done = lenet("parity", tiny_bundle.path, "--variants", "eager/torch-cpu/fp32,onnx/ort-cpu/*", "--batch", "2", "--json", "-")
    assert (done.code, done.err) == (0, "")
    assert {result["variant"] for result in done.document["results"]} == {TINY_VARIANTS[0], TINY_VARIANTS[2]}


def test_parity_writes_its_results_as_junit_and_says_where_it_judged(lenet: Run, tiny_bundle: Bundle, tmp_path: Path) -> None:
    done = lenet("parity", tiny_bundle.path, "--device", "cpu", "--batch", "2", "--junit", "parity.xml", "--json", "-")
    assert (done.code, done.err) == (0, "")
    suites = ElementTree.parse(tmp_path / "parity.xml").getroot()
    assert [suite.get("name") for suite in suites] == TINY_VARIANTS
    cases = {(case.get("classname"), case.get("name")) for case in suites.iter("testcase")}
    assert cases == {(result["variant"], result["inputs"]) for result in done.document["results"]}
    assert {suite.get(count) for suite in suites for count in ("failures", "errors", "skipped")} == {"0"}


def test_a_drill_prints_the_layers_of_every_variant_and_without_it_none_are(lenet: Run, tiny_bundle: Bundle) -> None:
    arguments = ("parity", tiny_bundle.path, "--device", "cpu", "--batch", "2")
    drilled, plain = lenet(*arguments, "--drill"), lenet(*arguments)
    assert (drilled.code, plain.code) == (0, 0)
    for name in TINY_VARIANTS:
        title = f"\n{name}, digits test split\n"
        assert title in drilled.out
        assert title not in plain.out
        table = drilled.out.split(title)[1].split("\n\n")[0].splitlines()
        assert table[0].startswith("graph ")
        layers = [line.split()[1] for line in table[2:]]
        assert layers[:9] == ["input", "conv1", "pool1", "conv2", "pool2", "fc1", "fc2", "fc3", "output"]
        assert {line.split()[-1] for line in table[2:]} == {"pass"}
    assert drilled.out.endswith("verdict: pass\n")


def test_allowing_tf32_is_recorded(lenet: Run, tiny_bundle: Bundle) -> None:
    done = lenet("parity", tiny_bundle.path, "--variants", "eager/*cpu*", "--batch", "1", "--allow-tf32", "--json", "-")
    assert done.code == 0
    assert done.document["float32"]["onnxruntime.cuda"] == done.document["float32"]["torch.cudnn.conv"] == "tf32"
    strict = lenet("parity", tiny_bundle.path, "--variants", "eager/*cpu*", "--batch", "1", "--json", "-")
    assert set(strict.document["float32"].values()) == {"ieee"}


def test_a_required_variant_that_ran_changes_nothing(lenet: Run, tiny_bundle: Bundle) -> None:
    done = lenet("parity", tiny_bundle.path, "--batch", "1", "--device", "cpu", "--require", "onnx/*cpu*,eager/*cpu*")
    assert (done.code, done.err) == (0, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="requires what no GPU here can run, and one can")
def test_a_required_variant_that_cannot_run_is_code_3_after_everything_is_printed_and_written(
    lenet: Run, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    arguments = ("--require", "eager/torch-cuda/*", "--variants", "eager/*", "--batch", "1")
    done = lenet("parity", tiny_bundle.path, *arguments, "--json", "p.json", "--junit", "p.xml", "--markdown", "p.md")
    assert done.code == 3
    assert done.err.startswith("error: eager/torch-cuda/fp32 is required: device cuda cannot be used")
    assert "Traceback" not in done.err
    assert done.out.endswith("verdict: pass\n")
    assert stored(tmp_path / "p.json", "parity")["verdict"] == "pass"
    assert 'errors="1"' in (tmp_path / "p.xml").read_text()
    assert (tmp_path / "p.md").read_text().startswith("## Parity: pass, but not all that is required was judged")


@pytest.mark.skipif(torch.cuda.is_available(), reason="requires what no GPU here can run, and one can")
def test_a_mismatch_is_code_1_also_where_a_required_variant_is_missing(lenet: Run, spoilt: Bundle) -> None:
    done = lenet("parity", spoilt.path, "--require", "*cuda*", "--batch", "1")
    assert (done.code, done.err) == (1, "error: parity failed: torchscript/torch-cpu/fp32/trace\n")


@pytest.fixture
def spoilt(tiny_bundle: Bundle, tiny: Checkpoint, faulty: Any, vouched: Any, tmp_path: Path) -> Bundle:
    """A bundle whose TorchScript pools otherwise, under the digest that its manifest vouches for."""
    module = tiny.module()
    module.pool = torch.nn.MaxPool2d(2)
    found: Bundle = vouched(tiny_bundle, tmp_path / "spoilt", TRACE, faulty(TRACE, tiny, module))
    return found


def test_a_mismatch_is_code_1_and_every_file_says_where(lenet: Run, spoilt: Bundle, tmp_path: Path) -> None:
    done = lenet("parity", spoilt.path, "--device", "cpu", "--batch", "3", "--json", "p.json", "--junit", "p.xml", "--markdown", "p.md")
    assert (done.code, done.err) == (1, "error: parity failed: torchscript/torch-cpu/fp32/trace\n")
    assert done.out.endswith("verdict: fail\n")
    row = next(line for line in done.out.splitlines() if line.startswith("torchscript/torch-cpu/fp32/trace "))
    assert " fail " in row
    assert " pool1 " in row
    assert "begins at pool1" in row
    document = stored(tmp_path / "p.json", "parity")
    wrong = [result for result in document["results"] if result["status"] == "fail"]
    assert document["verdict"] == "fail"
    assert {result["variant"] for result in wrong} == {"torchscript/torch-cpu/fp32/trace"}
    assert wrong[0]["first_divergent_layer"] == "pool1"
    assert next(layer["layer"] for layer in wrong[0]["layers"] if not layer["passed"]) == "pool1"
    junit = ElementTree.parse(tmp_path / "p.xml").getroot()
    assert {case.get("classname") for case in junit.iter("testcase") if case.find("failure") is not None} == {wrong[0]["variant"]}
    markdown = (tmp_path / "p.md").read_text()
    assert markdown.startswith("## Parity: fail\n")
    assert "pool1" in markdown
    assert "\ntorchscript/torch-cpu/fp32/trace, digits test split\n" not in done.out, "layers are printed for a drill alone"


@pytest.mark.skipif(torch.cuda.is_available(), reason="skips variants for want of a GPU, and there is one")
def test_variants_that_cannot_run_here_are_listed_as_skipped_with_the_reason(lenet: Run, bundle: Bundle) -> None:
    parity = lenet("parity", bundle.path, "--batch", "1", "--variants", "eager/*,*cuda*", "--json", "-")
    bench = lenet("bench", bundle.path, "--variants", "eager/torch-cpu/fp32,*cuda*", *QUICK, "--json", "-")
    evaluate = lenet("evaluate", bundle.path, "--json", "-")
    skipped = [result for result in parity.document["results"] if result["status"] == "skipped"]
    on_cuda = {variant.name for variant in VARIANTS if variant.device == "cuda"}
    assert (parity.code, bench.code, evaluate.code) == (0, 0, 0)
    assert {result["variant"] for result in skipped} == on_cuda
    assert {each["variant"] for each in bench.document["skipped"]} == {each["variant"] for each in evaluate.document["skipped"]} == on_cuda
    assert all("nvidia-smi" in result["reason"] or "install" in result["reason"] for result in skipped)
    for done in (bench, evaluate):
        lines = [line for line in done.err.splitlines() if line.startswith("skipped: ")]
        assert len(lines) == len({each["reason"] for each in done.document["skipped"]}), "one line a reason"
        assert all(name in "".join(lines) for name in on_cuda)
    assert lenet("evaluate", bundle.path, "--quiet").err == ""


BENCH_KEYS = {
    "variant",
    "device",
    "batch_size",
    "scope",
    "times_s",
    "median_s",
    "ci95_s",
    "p90_s",
    "p99_s",
    "throughput_ips",
    "warnings",
    "limit_fraction",
    "launches_per_block",
    "size_bytes",
    "accuracy",
    "node_providers",
}


def test_bench_measures_what_was_asked_for_and_keeps_the_raw_times(lenet: Run, bundle: Bundle, tmp_path: Path) -> None:
    arguments = (
        "--variants",
        "eager/torch-cpu/fp32,onnx/ort-cpu/fp32",
        "--batch",
        "1,2",
        "--scope",
        "device,e2e",
        "--rounds",
        "1",
        "--device",
        "cpu",
    )
    done = lenet("bench", bundle.path, *arguments, "--json", "bench.json", "--markdown", "bench.md")
    assert (done.code, done.err) == (0, "")
    document = stored(tmp_path / "bench.json", "bench")
    assert document["skipped"] == []
    assert all(each.keys() >= BENCH_KEYS for each in document["measurements"])
    cases = {(each["variant"], each["batch_size"], each["scope"]) for each in document["measurements"]}
    names = ("eager/torch-cpu/fp32", "onnx/ort-cpu/fp32")
    assert cases == {(name, batch, scope) for name in names for batch in (1, 2) for scope in ("device", "e2e")}
    for each in document["measurements"]:
        assert min(each["times_s"]) <= each["median_s"] <= max(each["times_s"])
        assert each["throughput_ips"] > 0
        assert 50 < each["accuracy"] <= 100
    assert "images/s" in done.out.splitlines()[0]
    assert (tmp_path / "bench.md").read_text().startswith("| variant | batch |")


def test_bench_sweeps_and_names_the_best_batch_within_the_budget(lenet: Run, bundle: Bundle) -> None:
    arguments = ("--variants", "onnx/ort-cpu/fp32", "--batch", "auto", "--slo-ms", "50", "--scope", "device", "--rounds", "1")
    done = lenet("bench", bundle.path, *arguments)
    assert (done.code, done.err) == (0, "")
    assert "best within 50 ms" in done.out


def test_bench_traces_the_operators_into_a_folder(lenet: Run, bundle: Bundle, tmp_path: Path) -> None:
    done = lenet("bench", bundle.path, "--trace", "traces", "--variants", "onnx/ort-cpu/fp32,eager/torch-cpu/fp32", "--batch", "2")
    assert (done.code, done.err) == (0, "")
    names = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert names == ["eager-torch-cpu-fp32.batch2.trace.json", "onnx-ort-cpu-fp32.batch2.trace.json"]
    assert all(json.loads((tmp_path / "traces" / name).read_text())["traceEvents"] for name in names)
    assert "aten::" in done.out
    assert "Conv" in done.out
    assert "gaps: " in done.out


def test_bench_puts_loadgens_verdict_into_the_result(lenet: Run, bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("mlperf_loadgen", reason="LoadGen is an optional extra: pip install 'lenet-deploy[loadgen]'")
    arguments = ("--scenario", "offline", "--duration", "0.2", "--variants", "eager/torch-cpu/fp32", "--json", "load.json")
    done = lenet("bench", bundle.path, *arguments)
    assert (done.code, done.err) == (0, "")
    (load,) = stored(tmp_path / "load.json", "bench")["loads"]
    assert (load["variant"], load["scenario"], load["metric"]) == ("eager/torch-cpu/fp32", "offline", "throughput_ips")
    assert load["summary"]["Result is"] in ("VALID", "INVALID")
    assert "offline" in done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["load.json"]


def test_evaluate_takes_a_bundle_a_checkpoint_an_artifact_and_a_name(lenet: Run, bundle: Bundle, checkpoint: Checkpoint) -> None:
    rows = {}
    for what in (bundle.path, bundle.path / "checkpoint.safetensors", bundle.path / "model.onnx"):
        done = lenet("evaluate", what, "--data", "digits", "--device", "cpu", "--json", "-")
        assert done.code == 0
        assert done.document["schema"] == "lenet-deploy/evaluate/1"
        rows[what.name] = done.document["rows"]
    assert [row["variant"] for row in rows["bundle"]] == CPU_VARIANTS
    assert [row["variant"] for row in rows["model.onnx"]] == ["onnx/ort-cpu/fp32"]
    for row in (row for each in rows.values() for row in each):
        assert row["accuracy"] == pytest.approx(checkpoint.provenance["test_accuracy"], abs=0.6)
        assert row["ci95"][0] < row["accuracy"] < row["ci95"][1]
        assert row["images"] == 360


def test_evaluate_prints_the_variants_first_and_the_classes_once(lenet: Run, tiny_bundle: Bundle, tmp_path: Path) -> None:
    done = lenet("evaluate", tiny_bundle.path, "--device", "cpu", "--markdown", "e.md", "--json", "e.json")
    assert done.code == 0
    tables = done.out.split("\n\n")
    assert len(tables) == 2
    assert tables[0].splitlines()[2].startswith("eager/torch-cpu/fp32 ")
    assert tables[1].startswith("Classes, the same by every variant\nclass  images  precision %  recall %")
    assert len(tables[1].splitlines()) == 13
    assert "| class | images | precision % | recall % |" in Path("e.md").read_text()
    row = json.loads(Path("e.json").read_text())["rows"][0]
    assert [each["label"] for each in row["classes"]] == [str(digit) for digit in range(10)]
    for i, each in enumerate(row["classes"]):
        assert each["recall"] == pytest.approx(100 * row["confusion"][i][i] / sum(row["confusion"][i]))


def test_two_files_are_compared_and_the_verdict_is_the_exit_code(lenet: Run, tiny_bundle: Bundle, tmp_path: Path) -> None:
    from lenet_deploy.exporters.onnx import METADATA_KEY

    model = onnx.load(tiny_bundle.path / "model.ts.onnx")
    del model.metadata_props[:]  # as somebody else would have exported it
    assert METADATA_KEY not in str(model)
    onnx.save(model, "theirs.onnx")
    bias = next(each for each in model.graph.initializer if each.name == "fc3.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save(model, "wrong.onnx")
    trace, places = tiny_bundle.path / "model.trace.pt", ("--json", "p.json", "--junit", "p.xml", "--markdown", "p.md")
    done = lenet("parity", trace, "theirs.onnx", "--device", "cpu", "--batch", "1,2", *places)
    assert (done.code, done.out.splitlines()[-1]) == (0, "verdict: pass")
    assert "neither is known to be right" in done.err
    document = json.loads(Path("p.json").read_text())
    assert (document["schema"], document["verdict"]) == ("lenet-deploy/parity/1", "pass")
    assert {each["variant"] for each in document["results"]} == {"onnx/ort-cpu/fp32"}
    assert ElementTree.parse("p.xml").getroot().find("testsuite") is not None
    assert "## Parity: pass" in Path("p.md").read_text()
    done = lenet("parity", trace, "wrong.onnx", "--device", "cpu", "--batch", "2")
    assert done.code == 1
    assert "parity failed: onnx/ort-cpu/fp32" in done.err
    done = lenet("parity", tiny_bundle.path, "wrong.onnx", "--device", "cpu", "--batch", "2", "--json", "-")
    assert (done.code, done.document["verdict"]) == (1, "fail")


def test_evaluate_takes_a_data_set_of_your_own(lenet: Run, bundle: Bundle, digits: Dataset, tmp_path: Path) -> None:
    import numpy as np

    arrays = {name: getattr(digits, name)[:40].numpy().squeeze() for name in ("train_images", "train_labels", "test_images", "test_labels")}
    np.savez(tmp_path / "own.npz", **arrays)
    done = lenet("evaluate", bundle.path / "model.trace.pt", "--data", "own.npz", "--device", "cpu", "--json", "-")
    assert done.code == 0
    assert [row["images"] for row in done.document["rows"]] == [40]


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_fresh_model_is_said_to_be_fresh_and_its_seed_decides(command: str, lenet: Run, digits: Dataset) -> None:
    save(digits.test_images[0], Path("digit.png"))
    arguments = (command, "lenet5", *(["digit.png"] if command == "predict" else []), "--device", "cpu")
    first, other = (lenet(*arguments, "--seed", seed, "--json", "-") for seed in (0, 1))
    assert (first.code, other.code) == (0, 0)
    assert "freshly initialised from seed 0" in first.err
    assert "freshly initialised from seed 1" in other.err
    part = "rows" if command == "evaluate" else "predictions"
    assert first.document[part] != other.document[part], "the seed decides the weights"
    assert lenet(*arguments, "--quiet").err == ""


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_inspect_prints_the_layer_table_of_every_model(model: Any, lenet: Run) -> None:
    done = lenet("inspect", model.name)
    assert (done.code, done.err) == (0, "")
    assert all(f"\n{layer.name} " in done.out for layer in model.defaults.layers())
    document = lenet("inspect", model.name, "--json", "-").document
    total = sum(layer["parameters"] for layer in document["layers"])
    assert f"{total:,}" in model.summary
    assert f"{total:,}" in next(line for line in done.out.splitlines() if line.startswith("total"))


def test_inspect_defaults_to_lenet5_and_applies_settings(lenet: Run) -> None:
    done = lenet("inspect", "--set", "channels=8,16", "--set", "pooling=max", "--json", "-")
    assert done.code == 0
    assert done.document["model"] == "lenet5"
    assert done.document["config"]["channels"] == [8, 16]
    assert [layer["kind"] for layer in done.document["layers"]][:3] == ["conv", "max pool", "conv"]


def test_inspect_reads_a_checkpoint_a_bundle_an_artifact_and_a_copy_of_one(
    lenet: Run, bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "mine.safetensors").write_bytes(to_bytes(checkpoint))
    shutil.copy(bundle.path / "model.onnx", tmp_path / "copy.onnx")
    for what in (Path("mine.safetensors"), bundle.path, bundle.path / "model.trace.pt", Path("copy.onnx")):
        done = lenet("inspect", what, "--json", "-")
        assert (done.code, done.err) == (0, "")
        assert done.document["config"]["image_size"] == 28
        assert done.document["layers"][0]["output"] == [6, 28, 28]


def save(image: torch.Tensor, path: Path, side: int | None = None, mode: str = "L") -> None:
    """One uint8 (1, H, W) image as a file."""
    from PIL import Image

    picture = Image.fromarray(image[0].numpy())
    if side:
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    picture.convert(mode).save(path)


def test_predict_on_a_png_is_the_model_on_that_image(lenet: Run, checkpoint: Checkpoint, bundle: Bundle, digits: Dataset) -> None:
    for number in range(5):
        save(digits.test_images[number], Path(f"{number}.png"))
    done = lenet("predict", bundle.path, *(f"{number}.png" for number in range(5)), "--device", "cpu", "--json", "-")
    assert done.code == 0
    spec = checkpoint.preprocessing
    with torch.no_grad():
        scores = checkpoint.module()(normalise(fit(digits.test_images[:5], spec), spec))
    shares, winners = scores.softmax(dim=1).max(dim=1)
    predictions = done.document["predictions"]
    assert [prediction["image"] for prediction in predictions] == [f"{number}.png" for number in range(5)]
    assert [prediction["top"][0][0] for prediction in predictions] == [str(int(winner)) for winner in winners]
    assert [prediction["top"][0][1] for prediction in predictions] == pytest.approx(shares.tolist(), rel=1e-4)


@pytest.mark.parametrize(("suffix", "mode"), [("png", "L"), ("png", "RGB"), ("png", "RGBA"), ("png", "1"), ("jpg", "L"), ("jpeg", "RGB")])
def test_predict_takes_png_and_jpeg_of_any_size_and_mode(suffix: str, mode: str, lenet: Run, bundle: Bundle, digits: Dataset) -> None:
    save(digits.test_images[0], Path(f"digit.{suffix}"), 120, mode)
    done = lenet("predict", bundle.path, f"digit.{suffix}", "--device", "cpu", "--top", "4")
    assert (done.code, done.err) == (0, "")
    rows = [line.split() for line in done.out.splitlines() if line.startswith("digit.")]
    assert [row[1] for row in rows] == ["1", "2", "3", "4"]
    assert rows[0][2] == str(int(digits.test_labels[0]))
    assert "variant: eager/torch-cpu/fp32" in done.out


def test_predict_runs_the_variant_that_is_named(lenet: Run, bundle: Bundle, digits: Dataset) -> None:
    save(digits.test_images[0], Path("digit.png"))
    done = lenet("predict", bundle.path, "digit.png", "--variant", "onnx/ort-cpu/fp32", "--json", "-")
    assert done.code == 0
    assert [prediction["variant"] for prediction in done.document["predictions"]] == ["onnx/ort-cpu/fp32"]


def test_predict_gives_all_labels_where_top_is_more_than_there_are(lenet: Run, bundle: Bundle, digits: Dataset) -> None:
    save(digits.test_images[0], Path("digit.png"))
    done = lenet("predict", bundle.path, "digit.png", "--top", "99", "--device", "cpu", "--json", "-")
    [prediction] = done.document["predictions"]
    assert sorted(label for label, _ in prediction["top"]) == list("0123456789")
    assert sum(share for _, share in prediction["top"]) == pytest.approx(1)


def test_doctor_says_of_every_runtime_whether_it_works_and_why_not(lenet: Run) -> None:
    done = lenet("doctor", "--json", "-")
    assert (done.code, done.err) == (0, "")
    assert done.document["schema"] == "lenet-deploy/doctor/1"
    runtimes = done.document["runtimes"]
    assert [each["name"] for each in runtimes] == [f"{runtime.name}-{device}" for device in DEVICES for runtime in RUNTIMES]
    assert all(each.keys() == {"name", "usable", "reason", "fix"} and each["reason"] for each in runtimes)
    assert all(each["usable"] for each in runtimes if each["name"].endswith("-cpu"))
    assert all(each["usable"] or each["fix"] for each in runtimes)
    table = lenet("doctor")
    assert table.code == 0
    assert all(f"\n{each['name']} " in table.out for each in runtimes)


def test_version_is_printed(lenet: Run) -> None:
    assert lenet("--version") == Outcome(0, f"lenet-deploy {__version__}\n", "")


def test_a_bare_call_shows_the_help(lenet: Run) -> None:
    done = lenet()
    assert done.code in (0, 2)
    assert all(command in done.out + done.err for command in COMMANDS)


HELP = """
import contextlib, io, json, sys
from lenet_deploy.cli import COMMANDS, build
from lenet_deploy.cli.errors import run

pages = {}
for command in ("", *COMMANDS):
    sys.argv = ["lenet-deploy", *([command] if command else []), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as page:
        code = run(build())
    pages[command] = [code, page.getvalue()]
heavy = sorted({"torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "numpy", "PIL", "safetensors"} & set(sys.modules))
print(json.dumps([pages, heavy]))
"""


def test_help_of_every_command_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    pages, heavy = json.loads(done.stdout)
    assert heavy == []
    assert {code for code, _ in pages.values()} == {0}
    for command in COMMANDS:
        function = getattr(importlib.import_module(f"lenet_deploy.cli.{command}"), command)
        assert (function.__doc__ or "").splitlines()[0].split(":")[0][:30] in pages[command][1]
        assert command in pages[""][1]


def test_importing_the_library_imports_nothing_heavy() -> None:
    script = "import sys, lenet_deploy; print(sorted({'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_device_stands_on_every_command_that_computes(lenet: Run) -> None:
    for command in ("demo", "train", "evaluate", "export", "parity", "bench", "predict"):
        assert "--device" in lenet(command, "--help").out


def test_the_module_runs_as_the_command_does(cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    done = cli("inspect", "lenet5", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "62,006" in done.stdout
    assert "\x1b" not in done.stdout, "no colours where no terminal is"


def test_no_color_is_honoured_on_a_terminal(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parent.parent / "data" / "bench-1.json", tmp_path / "bench.json")

    def verdict(**environment: str) -> bytes:
        master, slave = pty.openpty()
        command = [sys.executable, "-m", "lenet_deploy.cli", "compare", "bench.json", "bench.json"]
        plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
        subprocess.run(
            command, cwd=tmp_path, stdout=slave, stderr=subprocess.PIPE, env={**plain, "TERM": "xterm", **environment}, timeout=120
        )
        os.close(slave)
        printed = b""
        while chunk := read(master):
            printed += chunk
        os.close(master)
        return printed

    def read(master: int) -> bytes:
        try:
            return os.read(master, 65536)
        except OSError:  # Linux says EIO where the other end is closed
            return b""

    assert b"verdict: \x1b[" in verdict()
    assert b"verdict: inconclusive" in verdict(NO_COLOR="1")


def test_paritys_verdict_is_coloured_on_a_terminal(lenet: Run, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    done = lenet("parity", tiny_bundle.path, "--variants", "eager/torch-cpu/fp32", "--batch", "1")
    assert (done.code, done.err) == (0, "")
    assert "verdict: \x1b[32m" in done.out


def test_the_demo_goes_the_whole_way_and_replaces_an_earlier_one(
    cli: Callable[..., subprocess.CompletedProcess[str]], bundle: Bundle, tmp_path: Path
) -> None:
    out = tmp_path / "lenet-deploy-demo"
    shutil.copytree(bundle.path, out / "bundle")
    (out / "metrics.json").write_text("of an earlier run")
    done = cli("demo", "--device", "cpu", cwd=tmp_path, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert sorted(path.name for path in out.iterdir()) == [
        *("bench.json", "bundle", "checkpoint.safetensors", "confusion.png", "curves.png"),
        *("last.ckpt", "metrics.json", "mistakes.png", "parity.json"),
    ]
    assert stored(out / "parity.json", "parity")["verdict"] == "pass"
    assert {each["variant"] for each in stored(out / "bench.json", "bench")["measurements"]} == {
        variant.name for variant in VARIANTS if variant.device == "cpu" and variant.core
    }
    assert stored(out / "metrics.json", "metrics")["epochs"][-1]["accuracy"] > 90
    published = open_bundle(out / "bundle")
    assert published.metadata == load(out / "checkpoint.safetensors").metadata() != bundle.metadata
    assert {artifact.status for artifact in published.manifest.artifacts} == {"verified"}
    for title in ("Accuracy on 360 digits", "Artifacts", "Parity with the float64 oracle: pass", "Latency and throughput", "Files", "Next"):
        assert title in done.stdout
    unexpected = [line for line in done.stderr.splitlines() if not line.startswith(("Epoch: ", "1/4 ", "2/4 ", "4/4 "))]
    assert unexpected == []

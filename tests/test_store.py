"""JSON has the keys that scripts read, and files are written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lenet_deploy import store
from lenet_deploy.bench_records import (
    BatchChoice,
    BenchReport,
    ColdStart,
    Limit,
    LoadProbe,
    LoadResult,
    MachineState,
    Measurement,
    Speedup,
    Visit,
)
from lenet_deploy.bundle import Bundle
from lenet_deploy.environment import capture
from lenet_deploy.errors import BadInput, CannotWrite, DamagedFile
from lenet_deploy.records import (
    AccuracyReport,
    AccuracyRow,
    Decisions,
    Environment,
    EpochStats,
    Failure,
    LayerError,
    NodePlacement,
    ParityReport,
    ParityResult,
    RuntimeStatus,
)

ENVIRONMENT = Environment("Linux", "3.11.7", "Some CPU", 2, 2, None, None, {"torch": "2.15.0"}, "0" * 40)
NODE = NodePlacement("node_conv2d", "CPUExecutionProvider")
DECISIONS = Decisions(200, 1, 2, 180, 178, 2, 0)
PARITY = ParityReport(
    (
        ParityResult("a", "pass", None, "digits", 1, 1e-6, 5e-7, 0.1, 1.0, None, (NODE,)),
        ParityResult("b", "fail", "NaN", "digits", 1),
        ParityResult("c", "skipped", "no GPU"),
        ParityResult(
            *("d", "fail", "2 of 200 images get another class", "digits", 64, None, None, None, 0.99, "conv2"),
            check="decisions",
            mean_abs_error=1e-7,
            max_rel_error=1e-4,
            mean_rel_error=1e-6,
            cosine=0.5,
            ulp_quantiles={"p50": 1.0, "p99": 4.0, "max": 30.0},
            decisions=DECISIONS,
            layers=(LayerError("optimised", "conv2", "relu_1", None, None, False),),
        ),
    ),
    ("a note",),
    ENVIRONMENT,
    {"torch.cudnn.conv": "tf32"},
    ("c",),
)
VISITS = tuple(Visit(process=i // 4, round=i % 4, samples=100, singles=0, window_images=800, window_s=0.1) for i in range(7))
BLOCKS = Visit(process=0, round=0, samples=3, singles=1, window_images=12, window_s=0.1, energy_j=1.5, flag=None)
BENCH = BenchReport(
    measurements=(
        Measurement(
            *("a", "cpu", 8, "device", tuple(1e-3 + 1e-6 * (i % 100) for i in range(700)), 1, VISITS, 40, "precise", 1234, 97.5),
            overhead_s=1e-4,
            floors_s={"compute": 1e-4, "memory": 1e-5},
            node_providers=(NODE,),
        ),
        Measurement(
            *("b", "cuda:0", 1, "e2e", (1e-3, 1e-3, 3e-3), 4, (BLOCKS,), 40, "rounds", 1234, None),
            single_times_s=(2e-3,),
            gpu_times_s=(1e-4,),
            enqueue_times_s=(1e-5,),
            h2d_times_s=(1e-6,),
            d2h_times_s=(2e-6,),
        ),
    ),
    skipped=(Failure("c", "no GPU"),),
    environment=ENVIRONMENT,
    options={"profile": "quick", "threads": None},
    limits=(Limit("cpu", {"fp32": 1e11}, 1e10, None, {"262144": 2e10}),),
    machine=(MachineState(0, {"load1": 0.5}, {}, ("steal",)),),
    cold_starts=(ColdStart("a", 1.0, 0.1, 0.01, 0.02, 1.2, 8, 500_000_000),),
    speedups=(Speedup("a", "a", 8, "device", 1.0, (1.0, 1.0), 7), Speedup("b", "a", 8, "device", 2.0, None, 1)),
    batches=(BatchChoice("a", "device", 8, None, "median"),),
    loads=(
        LoadResult(
            *("a", "cpu", "server", False, "qps", 1000.0, 50, {"p99": 0.01, "p99.9": None}, {"duration_s": 1.0}, {"Result is": "INVALID"}),
            reasons=("too few",),
            probes=(LoadProbe(500.0, True, 0.01, 700),),
        ),
    ),
    partial="interrupted",
)
STATUSES = (RuntimeStatus("eager-cpu", True, "2 threads"), RuntimeStatus("eager-cuda", False, "no GPU", "get one"))
ROWS = (AccuracyRow("a", 3, 4, ((3, 0), (1, 0)), ("cat", "dog")),)
EPOCHS = (EpochStats(1, 2.3, 0.003, 97.5, 12345.6),)

DOCUMENTS: dict[str, Callable[[], str]] = {
    "parity": lambda: store.parity_json(PARITY),
    "bench": lambda: store.bench_json(BENCH),
    "doctor": lambda: store.doctor_json(STATUSES, ENVIRONMENT),
    "evaluate": lambda: store.evaluate_json(AccuracyReport(ROWS, (Failure("eager/torch-cuda/fp32", "no GPU"),), ENVIRONMENT)),
    "metrics": lambda: store.metrics_json(EPOCHS, {"lr": 0.003}, ENVIRONMENT),
}
each_kind = pytest.mark.parametrize("kind", DOCUMENTS)

# The keys that scripts read, from shared/cli.md.
RESULT_KEYS = {
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
    "mean_abs_error",
    "max_rel_error",
    "mean_rel_error",
    "cosine",
    "ulp_quantiles",
    "decisions",
    "layers",
}
MEASUREMENT_KEYS = {
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
ARTIFACT_KEYS = {"name", "format", "path", "sha256", "size_bytes", "status", "accuracy"}


VERSIONS = {"bench": 2}  # of the schemas that have changed since


def document(kind: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(DOCUMENTS[kind]())
    return parsed


@each_kind
def test_every_document_starts_with_its_schema_and_holds_its_environment(kind: str) -> None:
    found = document(kind)
    assert next(iter(found)) == "schema"
    assert found["schema"] == f"lenet-deploy/{kind}/{VERSIONS.get(kind, 1)}"
    assert found["environment"] == dataclasses.asdict(ENVIRONMENT)
    assert DOCUMENTS[kind]().endswith("}\n")


def test_the_manifest_starts_with_its_schema_and_has_the_documented_keys(bundle: Bundle) -> None:
    found = json.loads((bundle.path / "manifest.json").read_text())
    assert next(iter(found)) == "schema"
    assert found["schema"] == "lenet-deploy/manifest/1"
    assert found.keys() >= {"artifacts", "model", "weights_sha256", "input", "labels", "versions", "environment"}
    assert found["environment"] == dataclasses.asdict(bundle.manifest.environment)
    for artifact in found["artifacts"]:
        assert artifact.keys() >= ARTIFACT_KEYS
        content = (bundle.path / artifact["path"]).read_bytes()
        assert (artifact["sha256"], artifact["size_bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
        assert artifact["status"] == "verified"


def test_parity_has_the_documented_keys() -> None:
    found = document("parity")
    assert found["verdict"] == "fail"
    assert all(result.keys() >= RESULT_KEYS for result in found["results"])
    good, nan, skipped, _ = found["results"]
    assert (found["notes"], found["float32"]) == (["a note"], {"torch.cudnn.conv": "tf32"})
    assert (good["check"], good["decisions"], good["layers"]) == ("outputs", None, [])
    assert good["node_providers"] == [{"node": NODE.node, "provider": NODE.provider}]
    assert (nan["max_abs_error"], nan["budget_used"], nan["top1_agreement"]) == (None, None, None)
    assert (skipped["status"], skipped["reason"], skipped["inputs"], skipped["batch_size"]) == ("skipped", "no GPU", None, None)


def test_parity_derives_what_decisions_say_and_holds_the_layers() -> None:
    decided = document("parity")["results"][3]
    assert (decided["check"], decided["first_divergent_layer"], decided["cosine"]) == ("decisions", "conv2", 0.5)
    assert decided["ulp_quantiles"] == {"p50": 1.0, "p99": 4.0, "max": 30.0}
    assert decided["decisions"] == {
        **dataclasses.asdict(DECISIONS),
        "oracle_accuracy": 90.0,
        "oracle_ci95": list(DECISIONS.oracle_ci95),
        "variant_accuracy": 89.0,
        "variant_ci95": list(DECISIONS.variant_ci95),
        "mcnemar_p": 0.5,
    }
    assert decided["layers"] == [
        {"graph": "optimised", "layer": "conv2", "tensor": "relu_1", "max_abs_error": None, "budget_used": None, "passed": False}
    ]


def test_a_real_report_is_stored_whole(report: ParityReport) -> None:
    found = json.loads(store.parity_json(report))
    assert found["verdict"] == "pass"
    assert len(found["results"]) == len(report.results)
    assert all(each.keys() == RESULT_KEYS for each in found["results"])
    assert sum(len(each["layers"]) for each in found["results"]) == sum(len(each.layers) for each in report.results) > 0
    assert found["float32"] == dict(report.float32)


def test_bench_has_the_documented_keys_and_the_raw_times() -> None:
    found = document("bench")
    assert all(measurement.keys() >= MEASUREMENT_KEYS for measurement in found["measurements"])
    single, blocks = found["measurements"]
    assert tuple(single["times_s"]) == BENCH.measurements[0].times_s
    assert single["median_s"] == pytest.approx(1e-3 + 1e-6 * 49.5)
    assert (single["limit_fraction"], single["bound"]) == (pytest.approx(1e-4 / 1.0495e-3), "compute")
    assert single["ci95_s"][0] <= single["median_s"] <= single["ci95_s"][1]
    assert single["missing"] == {"p99.9_s": "700 launches were timed alone, 6636 are needed"}
    assert single["p90_s"] < single["p99_s"]
    assert single["throughput_ips"] == pytest.approx(8000.0)
    assert (single["accuracy"], single["warnings"]) == (97.5, list(BENCH.measurements[0].warnings))
    assert (blocks["ci95_s"], blocks["p90_s"], blocks["p99_s"], blocks["accuracy"]) == (None, None, None, None)
    assert blocks["warnings"] == list(BENCH.measurements[1].warnings) != []
    assert found["skipped"] == [{"variant": "c", "reason": "no GPU"}]
    assert found["partial"] == "interrupted"


def test_a_bench_comes_back_from_its_json(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(store.bench_json(BENCH))
    assert store.read_bench(path) == BENCH


def test_a_bench_of_version_1_still_loads() -> None:
    found = store.read_bench(Path(__file__).parent / "data" / "bench-1.json")
    assert found.measurements
    for each in found.measurements:
        assert len(each.visits) == 1
        assert each.throughput_ips > 0
        assert each.ci95_s is None, "one visit has no interval"


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ('"times_s": [', '"times_s": [0.5, ', r"measurements\[0\]: its visits and its times do not agree"),
        ('"measurements"', '"measured"', "it has no measurements"),
        ('"launches_per_block"', '"launches"', r"measurements\[0\] does not hold what it should"),
        ('"cpu": "Some CPU"', '"processor": "Some CPU"', "environment does not hold what it should"),
        ('"ci95": [', '"ci96": [', r"speedups\[0\] has no ci95"),
    ],
)
def test_a_bench_that_is_not_what_it_says_is_damaged(old: str, new: str, where: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    text = store.bench_json(BENCH)
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(DamagedFile, match=rf"bench\.json: not what bench wrote: {where}; "):
        store.read_bench(path)


def test_a_measurement_of_flagged_samples_alone_has_no_statistics() -> None:
    flagged = dataclasses.replace(BLOCKS, flag="throttled")
    report = dataclasses.replace(BENCH, measurements=(dataclasses.replace(BENCH.measurements[1], visits=(flagged,)),))
    (row,) = json.loads(store.bench_json(report))["measurements"]
    assert (row["median_s"], row["ci95_s"], row["throughput_ips"], row["limit_fraction"], row["flagged"]) == (None, None, None, None, 3)
    assert row["times_s"] == [1e-3, 1e-3, 3e-3]


def test_doctor_has_the_documented_keys() -> None:
    assert document("doctor")["runtimes"] == [
        {"name": "eager-cpu", "usable": True, "reason": "2 threads", "fix": None},
        {"name": "eager-cuda", "usable": False, "reason": "no GPU", "fix": "get one"},
    ]


def test_evaluate_has_the_documented_keys() -> None:
    (row,) = document("evaluate")["rows"]
    assert (row["variant"], row["images"], row["accuracy"]) == ("a", 4, 75.0)
    assert row["ci95"] == pytest.approx([30.06, 95.44], abs=0.01)
    assert row["confusion"] == [[3, 0], [1, 0]]
    cat, dog = row["classes"]
    assert cat == {"label": "cat", "images": 3, "predicted": 4, "correct": 3, "precision": 75.0, "recall": 100.0}
    assert (dog["label"], dog["images"], dog["precision"], dog["recall"]) == ("dog", 1, None, 0.0), "nothing was taken for it"


def test_metrics_has_every_epoch() -> None:
    found = document("metrics")
    assert found["epochs"] == [dataclasses.asdict(EPOCHS[0])]
    assert found["settings"] == {"lr": 0.003}


def test_a_captured_environment_survives_the_round_trip() -> None:
    found = json.loads(store.dump("anything", 1, capture(), {}))
    assert Environment(**found["environment"]) == capture()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_never_reach_a_file(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        store.dump("parity", 1, ENVIRONMENT, {"value": value})


@each_kind
def test_documents_hold_no_nan_or_infinity(kind: str) -> None:
    def refuse(word: str) -> float:
        raise AssertionError(word)

    assert json.loads(DOCUMENTS[kind](), parse_constant=refuse)


@each_kind
def test_parse_reads_what_dump_wrote(kind: str) -> None:
    assert store.parse(DOCUMENTS[kind]().encode(), kind, VERSIONS.get(kind, 1), Path("file.json")) == document(kind)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"schema": "lenet-deploy/parity/1"', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"{}", "not a result of lenet-deploy parity"),
        (b"[]", "not a result of lenet-deploy parity"),
        (b"null", "not a result of lenet-deploy parity"),
        (b"1", "not a result of lenet-deploy parity"),
        (b'{"schema": 1}', "schema is 1"),
        (b'{"schema": "lenet-deploy/parity/2"}', "'lenet-deploy/parity/2', this version reads 'lenet-deploy/parity/1'"),
        (b'{"schema": "lenet-deploy/bench/1"}', "'lenet-deploy/bench/1'"),
    ],
    ids=lambda value: value[:40] if isinstance(value, bytes) else None,
)
def test_parse_refuses_what_is_not_its_schema_and_names_the_file(text: bytes, message: str) -> None:
    with pytest.raises(DamagedFile) as caught:
        store.parse(text, "parity", 1, Path("some/file.json"))
    assert message in str(caught.value)
    assert str(caught.value).startswith("some/file.json: ")


def test_sha256_is_the_standard_digest() -> None:
    assert store.sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_read_file_reads_and_refuses_what_is_absent_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\x00\x01")
    assert store.read_file(tmp_path / "file", "a thing") == b"\x00\x01"
    with pytest.raises(BadInput, match="no such file; a thing was expected"):
        store.read_file(tmp_path / "absent", "a thing")
    with pytest.raises(BadInput, match="a folder, where a thing is expected"):
        store.read_file(tmp_path, "a thing")


@pytest.mark.parametrize("name", ["nul\0byte", "x" * 300, "file/below"])
def test_read_file_refuses_impossible_paths(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BadInput):
        store.read_file(tmp_path / name, "a thing")


def test_write_file_creates_and_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    for data in (b"first", b"second, longer", b""):
        store.write_file(path, data)
        assert path.read_bytes() == data
        assert list(tmp_path.iterdir()) == [path]


def test_a_reader_of_the_old_file_keeps_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    store.write_file(path, b"old")
    with path.open("rb") as reader:
        store.write_file(path, b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_the_umasks(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        store.write_file(tmp_path / "result.json", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "result.json").stat().st_mode) == mode


def test_umask_is_read_without_being_changed() -> None:
    before = os.umask(0o031)
    try:
        assert (store.umask(), store.umask()) == (0o031, 0o031)
    finally:
        os.umask(before)


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """A process that may write no file longer than 4 KiB: the system refuses in the middle of a write, as a full disk does.

    Around the write alone: pytest's own output may be a longer file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_write_refused_in_the_middle_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    store.write_file(path, b"old")
    with small_files(), pytest.raises(CannotWrite, match=r"result\.json: cannot be written \(File too large\)"):
        store.write_file(path, bytes(100_000))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_refused_first_write_leaves_nothing(tmp_path: Path) -> None:
    with small_files(), pytest.raises(CannotWrite):
        store.write_file(tmp_path / "result.json", bytes(100_000))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_or_a_missing_one_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "absent" / "file", tmp_path / "folder" / ("x" * 300)):
        with pytest.raises(CannotWrite, match="cannot be written"):
            store.write_file(path, b"x")
    assert [each.name for each in tmp_path.rglob("*")] == ["folder"]


def test_a_pipe_or_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        store.write_file(pipe, b"to the reader")
        assert stat.S_ISFIFO(pipe.stat().st_mode)
        assert os.read(reader, 100) == b"to the reader"
    finally:
        os.close(reader)


def test_a_file_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to("real")
    store.write_file(link, b"new")
    assert link.is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_make_folder_makes_parents_and_refuses_a_file_in_the_way(tmp_path: Path) -> None:
    store.make_folder(tmp_path / "a" / "b")
    store.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CannotWrite):
            store.make_folder(path)
    assert (tmp_path / "file").read_bytes() == b"x"

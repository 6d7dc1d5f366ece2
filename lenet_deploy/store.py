"""Bytes and records to disk and back: whole files or nothing, JSON with a schema."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lenet_deploy import order_statistics
from lenet_deploy.bench_records import (
    BatchChoice,
    BenchReport,
    ColdStart,
    ComparisonReport,
    Limit,
    LoadProbe,
    LoadResult,
    MachineState,
    Measurement,
    Speedup,
    Visit,
)
from lenet_deploy.errors import BadInput, CannotWrite, DamagedFile, first_line
from lenet_deploy.records import (
    AccuracyReport,
    Decisions,
    Environment,
    EpochStats,
    Failure,
    Manifest,
    NodePlacement,
    ParityReport,
    RuntimeStatus,
)

Made = TypeVar("Made")

BENCH = 2  # version of the bench schema
UNFINISHED = ".unfinished"  # how the name of a file ends while it is written


def sha256(data: bytes) -> str:
    """Hex digest of `data`."""
    return hashlib.sha256(data).hexdigest()


def read_file(path: Path, what: str) -> bytes:
    """The bytes of a regular file.

    Raises:
        BadInput: it is absent, a folder, or not readable.
    """
    try:
        if path.is_dir():
            raise BadInput(f"{path}: a folder, where {what} is expected; name the file inside it")
        return path.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; {what} was expected there") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise BadInput(f"{path}: cannot be read ({_reason(error)}); check the path and its permissions") from error


def check_zip(data: bytes, where: str, what: str) -> None:
    """Compare every member of a zip archive with its checksum, which numpy and torch leave unread.

    Raises:
        DamagedFile: a member is altered, or it is no zip archive.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            altered = archive.testzip()
    except Exception as error:  # damaged bytes make zipfile and zlib fail in every way there is
        raise DamagedFile(f"{where}: not a readable {what} ({first_line(error)}); it is truncated, altered or of another kind") from None
    if altered is not None:
        raise DamagedFile(f"{where}: {altered} does not match its checksum; the file was altered, get a fresh copy")


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        CannotWrite: the system refused, or a file stands there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step: a reader, a crash or a full disk sees the old file or the new one.

    Raises:
        CannotWrite: the system refused; `path` is as it was.

    A link stays and its target is replaced; a pipe or device is written to.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(data)
            return
        path = path.resolve()
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~umask())  # mkstemp makes private files; results are shared as usual
        Path(name).replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        Path(name).unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder that nobody else writes to."""
    for left in folder.glob(f".*{UNFINISHED}"):
        left.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> CannotWrite:
    """The error for a refused write, with the system's reason."""
    return CannotWrite(f"{path}: cannot be written ({_reason(error)}); free space or choose another place; nothing was changed")


def dump(kind: str, version: int, environment: Environment, body: Mapping[str, Any]) -> str:
    """JSON text that starts with its schema and holds its environment."""
    document = {"schema": f"lenet-deploy/{kind}/{version}", **body, "environment": dataclasses.asdict(environment)}
    return _numbers_in_rows(json.dumps(document, indent=2, allow_nan=False)) + "\n"


# A string in JSON holds no line break, so that this matches lists alone.
_NUMBERS = re.compile(r"\[\n\s*(-?[\d.eE+-]+(?:,\n\s*-?[\d.eE+-]+)*)\n\s*\]")


def _numbers_in_rows(text: str) -> str:
    """JSON with each list of numbers on one line: raw times are many."""
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)


def digest(document: Mapping[str, Any]) -> str:
    """Hex digest of JSON values, whatever their layout in a file."""
    return sha256(json.dumps(document, sort_keys=True).encode())


def parse(text: bytes, kind: str, version: int, where: Path, also: tuple[int, ...] = ()) -> dict[str, Any]:
    """The document behind `text`, its schema checked; `also` are older versions that the caller reads.

    Raises:
        DamagedFile: not JSON, or another schema.
    """
    try:
        document = json.loads(text)
    except RecursionError:
        raise DamagedFile(f"{where}: not valid JSON (nested too deeply); it is of another kind") from None
    except ValueError as error:
        raise DamagedFile(f"{where}: not valid JSON ({error}); it is truncated or of another kind") from None
    schema = f"lenet-deploy/{kind}/{version}"
    found = document.get("schema") if isinstance(document, dict) else None
    if found is None:
        what = "a bundle's manifest" if kind == "manifest" else f"a result of lenet-deploy {kind}"
        raise DamagedFile(f"{where}: not {what}; it names no schema, where {schema!r} is expected")
    if found not in {schema, *(f"lenet-deploy/{kind}/{older}" for older in also)}:
        raise DamagedFile(f"{where}: schema is {found!r}, this version reads {schema!r}")
    assert isinstance(document, dict)
    return document


def parity_json(report: ParityReport) -> str:
    """`parity` JSON, schema version 1."""
    results = [{**dataclasses.asdict(result), "decisions": _decisions(result.decisions)} for result in report.results]
    body = {"verdict": report.verdict, "notes": report.notes, "float32": dict(report.float32), "results": results}
    return dump("parity", 1, report.environment, body)


def bench_json(report: BenchReport) -> str:
    """`bench` JSON, schema version 2: raw times beside the statistics derived from them."""
    body = {
        "partial": report.partial,
        "options": dict(report.options),
        "measurements": [_measurement(measurement) for measurement in report.measurements],
        "skipped": _failures(report.skipped),
        "failed": _failures(report.failed),
        "speedups": [dataclasses.asdict(each) for each in report.speedups],
        "batches": [dataclasses.asdict(each) for each in report.batches],
        "limits": [dataclasses.asdict(each) for each in report.limits],
        "cold_starts": [dataclasses.asdict(each) for each in report.cold_starts],
        "machine": [dataclasses.asdict(each) for each in report.machine],
        "loads": [dataclasses.asdict(each) for each in report.loads],
    }
    return dump("bench", BENCH, report.environment, body)


def comparison_json(report: ComparisonReport) -> str:
    """`comparison` JSON, schema version 1; `environment` is that of head."""
    body = {
        "verdict": report.verdict,
        "threshold_percent": report.threshold_percent,
        "across_machines": report.across_machines,
        "baselines": dict(report.baselines),
        "rows": [dataclasses.asdict(row) for row in report.rows],
        "notes": report.notes,
        "base_environment": dataclasses.asdict(report.base_environment),
    }
    return dump("comparison", 1, report.head_environment, body)


def read_bench(path: Path) -> BenchReport:
    """The report in a `bench` JSON, of this version or an older one.

    Raises:
        BadInput: no such file.
        DamagedFile: not a `bench` JSON, or one that does not hold what its schema says.
    """
    document = parse(read_file(path, "a result of bench"), "bench", BENCH, path, also=(1,))

    def rows(name: str, read: Callable[[Any], Made], needed: bool = False) -> tuple[Made, ...]:
        if not needed and name not in document:
            return ()
        with _reading(path, ""):
            found = list(document[name])
        made = []
        for number, each in enumerate(found):
            with _reading(path, f"{name}[{number}]"):
                made.append(read(each))
        return tuple(made)

    with _reading(path, ""):
        captured = document["environment"]
    with _reading(path, "environment"):
        environment = Environment(**captured)
    with _reading(path, "options"):
        options = dict(document.get("options", {}))
    return BenchReport(
        measurements=rows("measurements", _read_measurement, needed=True),
        skipped=rows("skipped", _read_failure, needed=True),
        environment=environment,
        failed=rows("failed", _read_failure),
        options=options,
        limits=rows("limits", lambda each: Limit(**each)),
        machine=rows("machine", lambda each: MachineState(**{**each, "remarks": tuple(each["remarks"])})),
        cold_starts=rows("cold_starts", lambda each: ColdStart(**each)),
        speedups=rows("speedups", lambda each: Speedup(**{**each, "ci95": each["ci95"] and tuple(each["ci95"])})),
        batches=rows("batches", lambda each: BatchChoice(**each)),
        loads=rows("loads", _read_load),
        partial=document.get("partial"),
    )


@contextlib.contextmanager
def _reading(path: Path, part: str) -> Iterator[None]:
    """Say which part of a file is not what bench writes; raises DamagedFile."""
    try:
        yield
        return
    except KeyError as error:
        why = f"{part or 'it'} has no {error.args[0]}"
    except ValueError as error:  # of our own
        why = f"{part}: {first_line(error)}"
    except (TypeError, AttributeError):
        why = f"{part or 'a part'} does not hold what it should"
    raise DamagedFile(f"{path}: not what bench wrote: {why}; it was altered, get a fresh copy")


def doctor_json(statuses: tuple[RuntimeStatus, ...], environment: Environment) -> str:
    """`doctor` JSON, schema version 1."""
    return dump("doctor", 1, environment, {"runtimes": [dataclasses.asdict(status) for status in statuses]})


def evaluate_json(report: AccuracyReport) -> str:
    """`evaluate` JSON, schema version 1: the counts beside what is derived from them."""
    rows = [
        {
            "variant": row.variant,
            "accuracy": row.accuracy,
            "ci95": row.ci95,
            "images": row.images,
            "classes": [{**dataclasses.asdict(each), "precision": each.precision, "recall": each.recall} for each in row.classes],
            "confusion": row.confusion,
        }
        for row in report.rows
    ]
    return dump("evaluate", 1, report.environment, {"rows": rows, "skipped": _failures(report.skipped)})


def zoo_json(entries: Sequence[Mapping[str, Any]], environment: Environment) -> str:
    """`zoo` JSON, schema version 1."""
    return dump("zoo", 1, environment, {"entries": list(entries)})


def metrics_json(epochs: tuple[EpochStats, ...], settings: Mapping[str, Any], environment: Environment) -> str:
    """Training `metrics.json`, schema version 1."""
    return dump("metrics", 1, environment, {"settings": settings, "epochs": [dataclasses.asdict(epoch) for epoch in epochs]})


def manifest_json(manifest: Manifest) -> str:
    """A bundle's `manifest.json`, schema version 1."""
    metadata = dataclasses.asdict(manifest.metadata)
    preprocessing = metadata.pop("preprocessing")
    body = {
        "model": metadata["model"],
        "config": metadata["config"],
        "weights_sha256": metadata["weights_sha256"],
        "input": {"name": "image", "dtype": "float32", "layout": "NCHW", **preprocessing},
        "output": {"name": "logits", "dtype": "float32"},
        "labels": metadata["labels"],
        "dataset": manifest.dataset,
        "versions": dict(manifest.versions),
        "artifacts": [dataclasses.asdict(artifact) for artifact in manifest.artifacts],
    }
    document = json.loads(dump("manifest", 1, manifest.environment, body))
    return json.dumps({**document, "digest": digest(document)}, indent=2) + "\n"


def _failures(failures: Iterable[Failure]) -> list[dict[str, str]]:
    return [{"variant": failure.name, "reason": failure.reason} for failure in failures]


def _read_failure(document: Mapping[str, str]) -> Failure:
    return Failure(document["variant"], document["reason"])


def _decisions(decisions: Decisions | None) -> dict[str, Any] | None:
    if decisions is None:
        return None
    return {
        **dataclasses.asdict(decisions),
        "oracle_accuracy": decisions.oracle_accuracy,
        "oracle_ci95": decisions.oracle_ci95,
        "variant_accuracy": decisions.variant_accuracy,
        "variant_ci95": decisions.variant_ci95,
        "mcnemar_p": decisions.mcnemar_p,
    }


def _measurement(measurement: Measurement) -> dict[str, Any]:
    percentiles = {f"{name}_s": value for name, value in measurement.percentiles_s.items()}
    needed = {f"p{percent:g}_s": count for percent, count in order_statistics.MIN_SAMPLES.items()}
    singles = len(measurement.kept_singles_s)
    measured = bool(measurement.kept_s)
    return {
        **dataclasses.asdict(measurement),
        "median_s": measurement.median_s if measured else None,
        "ci95_s": measurement.ci95_s if measured else None,
        **percentiles,
        "missing": {
            name: f"{singles} launches were timed alone, {needed[name]} are needed" for name, value in percentiles.items() if value is None
        },
        "throughput_ips": measurement.throughput_ips if measured else None,
        "window_images": sum(visit.window_images for visit in measurement.visits),
        "window_s": sum(visit.window_s for visit in measurement.visits),
        "flagged": measurement.flagged,
        "energy_per_image_j": measurement.energy_per_image_j,
        "limit_fraction": measurement.limit_fraction if measured else None,
        "bound": measurement.bound if measured else None,
        "warnings": measurement.warnings,
    }


_MEASURED = tuple(field.name for field in dataclasses.fields(Measurement))


def _read_measurement(document: Mapping[str, Any]) -> Measurement:
    """Only the raw fields are read; what is derived from them is derived again."""
    known = {name: document[name] for name in _MEASURED if name in document}
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    # Version 1 did not say where one visit ended.
    whole = {
        "process": 0,
        "round": 0,
        "samples": len(known["times_s"]),
        "singles": 0,
        "window_images": document["window_images"],
        "window_s": document["window_s"],
    }
    visits = tuple(Visit(**each) for each in document.get("visits", (whole,)))
    if sum(visit.samples for visit in visits) != len(known["times_s"]):
        raise ValueError("its visits and its times do not agree")
    nodes = tuple(NodePlacement(**each) for each in document.get("node_providers", ()))
    return Measurement(**{"stop": "rounds", **known, "visits": visits, "node_providers": nodes})


def _read_load(document: Mapping[str, Any]) -> LoadResult:
    probes = tuple(LoadProbe(**each) for each in document["probes"])
    return LoadResult(**{**document, "reasons": tuple(document["reasons"]), "probes": probes})


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def umask() -> int:
    """The process's file mode mask; reading it means setting it for a moment."""
    mask = os.umask(0)
    os.umask(mask)
    return mask

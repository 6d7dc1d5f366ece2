"""The power of parity: injected faults found, located and missed, and healthy exports failed.

    python benchmarks/parity_power.py [--seeds 5] [--clean 500] [--quick] [--json FILE] [--markdown FILE] [--polygraphy DIR]

Every fault of `faults.py` is put into a copy of a healthy bundle whose manifest vouches for the faulty file, and judged by
`api.check_parity`; beside it by `torch.testing.assert_close`, `torch.allclose` and Polygraphy, each with its defaults. Polygraphy comes
from `pip install --no-deps --target DIR polygraphy`. Exits with 1 where a fault beyond rounding was missed, a healthy export failed, or
less than 95 % of the faults found were found in the right layer.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from random import Random

import torch
from faults import EQUIVALENTS, FORMATS, KINDS, MANTISSA, Fault, Kind, Subject, make_subjects, recorded, write_bundle

from lenet_deploy import api, environment, train
from lenet_deploy.bundle import MANIFEST, open_bundle, write_manifest
from lenet_deploy.checkpoint import Checkpoint, fresh, weights_sha256
from lenet_deploy.data import Dataset, fit, load_dataset, normalise
from lenet_deploy.devices import computing_on
from lenet_deploy.errors import BadInput, LenetDeployError, first_line
from lenet_deploy.exporters import ExportFailed
from lenet_deploy.models import find_model
from lenet_deploy.parity import inputs
from lenet_deploy.parity.check import run_batch
from lenet_deploy.records import ParityReport
from lenet_deploy.report.table import Table, to_markdown
from lenet_deploy.report.tables import environment_line
from lenet_deploy.store import dump, sha256, write_file
from lenet_deploy.variants import ONNX, ONNX_TS, VARIANTS, ArtifactSpec, Variant

EPSILON = 2.0**-23
COMPARED = 64  # real images that assert_close and allclose see
RIGHT_LAYER_SHARE = 0.95
POLYGRAPHY_SAMPLE = 20  # clean bundles
PROCESSES = 2
REMEMBERED = 8  # checkpoints whose input sets are kept: a little more than there are subjects
BATCH_SIZES = (1, 2, 3, 64)  # of the faulty artifacts; the default ones would take three times as long
SIDES, QUICK_SIDES = (16, 20, 24, 28, 32), (16,)
QUICK_IMAGES, QUICK_CLEAN, QUICK_BITS, QUICK_BATCH_SIZES = 64, 28, (0, 12, 22), (1, 64)
CPU = torch.device("cpu")
THREADS = 1  # of torch and ONNX Runtime: more spin more than they help at these sizes, and Polygraphy wants a core


@dataclass(frozen=True)
class Settings:
    """What one run does.

    Attributes:
        seeds: injections of each kind in each family of formats.
        clean: healthy variants judged.
        batch_sizes: of the faulty ones.
        polygraphy: where it is installed; None leaves it out.
    """

    seeds: int
    clean: int
    quick: bool
    batch_sizes: tuple[int, ...]
    polygraphy: Path | None


@dataclass(frozen=True)
class Injection:
    """One fault in one artifact, and who found it.

    Attributes:
        layers: acceptable names; empty where no layer can be named.
        checks: those of parity's checks that failed; `refused` for BadInput.
        named: the first divergent layers that the failed checks name, in the order of the report.
        effect: largest difference from the healthy artifact on the real images, in epsilons of an image's largest score; None where it
            does not run or is not finite.
        rounding: eager's own error against float64, in the same unit.
        above_rounding: None where the artifact itself is healthy.
        assert_close, allclose, polygraphy: whether each found it; None where it was not run.
        error: what check_parity raised and should not have.
    """

    kind: str
    subject: str
    artifact: str
    seed: int
    where: str
    layers: tuple[str, ...]
    checks: tuple[str, ...]
    named: tuple[str, ...]
    effect: float | None
    rounding: float
    above_rounding: bool | None
    assert_close: bool | None
    allclose: bool | None
    polygraphy: bool | None = None
    error: str | None = None
    reason: str | None = None

    @property
    def caught(self) -> bool:
        """Whether parity found it."""
        return bool(self.checks)

    @property
    def by_scores(self) -> bool:
        """Whether a check other than that of the weights found it."""
        return bool(set(self.checks) - {"weights"})

    @property
    def located(self) -> bool:
        """Whether the first layer named, which is what the report shows, is a right one."""
        return bool(self.named) and self.named[0] in self.layers

    @property
    def only_located(self) -> bool:
        """Whether no failed check names a wrong layer either: rounding hides a fault's beginning in some input sets."""
        return bool(self.named) and set(self.named) <= set(self.layers)

    @property
    def missed(self) -> bool:
        """Not found, although it is no rounding."""
        return not self.caught and self.above_rounding is not False


@dataclass(frozen=True)
class Clean:
    """One healthy variant, judged at all its batch sizes.

    Attributes:
        kind: `fresh export`, or the name of an edit that changes nothing.
        failed: what failed; empty for a pass.
        assert_close, allclose, polygraphy: whether each called it faulty; None where it was not run.
    """

    kind: str
    subject: str
    artifact: str
    batch_sizes: tuple[int, ...]
    failed: tuple[str, ...]
    assert_close: bool | None = None
    allclose: bool | None = None
    polygraphy: bool | None = None


class Scores:
    """What a subject's oracle, eager mode and healthy artifacts say of the real images."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._healthy: dict[str, torch.Tensor | None] = {}

    @cached_property
    def images(self) -> torch.Tensor:
        spec = self.subject.checkpoint.preprocessing
        return normalise(fit(self.subject.dataset.test_images, spec), spec)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.subject.checkpoint.preprocessing.input_shape

    @cached_property
    def eager(self) -> torch.Tensor:
        with computing_on(CPU):
            scores: torch.Tensor = self.subject.checkpoint.module()(self.images)
        return scores

    @cached_property
    def peak(self) -> torch.Tensor:
        return self._oracle.abs().amax(dim=1, keepdim=True)

    @cached_property
    def rounding(self) -> float:
        return self._in_epsilons(self.eager.double() - self._oracle)

    @cached_property
    def _oracle(self) -> torch.Tensor:
        with computing_on(CPU):
            scores: torch.Tensor = self.subject.checkpoint.module().double()(self.images.double())
        return scores

    def of(self, spec: ArtifactSpec, data: bytes) -> torch.Tensor | None:
        """Scores of an artifact in batches of 64; None where it does not run."""
        try:
            with computing_on(CPU), variant_of(spec).open_session(data, self.shape) as session:
                return torch.cat([run_batch(session, batch) for batch in self.images.split(COMPARED)])
        except Exception:  # whatever a runtime raises for what it cannot open or run
            return None

    def effect(self, spec: ArtifactSpec, scores: torch.Tensor | None) -> float | None:
        """How far the scores are from the healthy artifact's; None where that is no number."""
        if spec.name not in self._healthy:
            self._healthy[spec.name] = self.of(spec, self.subject.read(spec))
        healthy = self._healthy[spec.name]
        assert healthy is not None
        if scores is None or scores.shape != healthy.shape or not scores.isfinite().all():
            return None
        return self._in_epsilons(scores.double() - healthy.double())

    def _in_epsilons(self, difference: torch.Tensor) -> float:
        return float((difference.abs() / (EPSILON * self.peak)).max())


def variant_of(spec: ArtifactSpec) -> Variant:
    """The variant that runs an artifact on the CPU."""
    return next(variant for variant in VARIANTS if variant.artifact is spec and variant.device == "cpu")


# Faults.


def faulty_bundle(subject: Subject, spec: ArtifactSpec, fault: Fault, data: bytes, folder: Path) -> Path:
    """A copy of the healthy bundle in which one file is replaced, and the manifest vouches for it.

    What else the manifest records of the file stays as the healthy export wrote it, unless it is the export that went wrong: then
    the weights are found where that export put them, since a program that numbers its constants otherwise is no wrong weight.
    """
    shutil.copytree(subject.bundle.path, folder)
    if fault.replaces == "manifest":
        (folder / MANIFEST).write_bytes(data)
        return folder
    (folder / spec.path).write_bytes(data)
    manifest = subject.bundle.manifest
    healthy = subject.bundle.artifact(spec.name)
    assert healthy is not None
    details = dict(healthy.details)
    if fault.exported:
        with contextlib.suppress(ExportFailed):
            details["tensors"] = list(recorded(subject.checkpoint, spec, data))
    vouched = dataclasses.replace(healthy, sha256=sha256(data), size_bytes=len(data), details=details)
    artifacts = tuple(vouched if entry is healthy else entry for entry in manifest.artifacts)
    write_manifest(folder, dataclasses.replace(manifest, artifacts=artifacts))
    return folder


def inject(kind: Kind, scores: Scores, spec: ArtifactSpec, seed: int, folder: Path, sizes: tuple[int, ...]) -> Injection:
    """One fault, judged by parity and by torch's two comparisons; the faulty bundle is left in `folder`."""
    subject = scores.subject
    fault = kind.fault(subject, seed)
    data = fault.inject(subject, spec)
    checks, named, error, reason = judged(faulty_bundle(subject, spec, fault, data, folder), spec, sizes, subject.dataset)
    what = (kind.name, subject.name, spec.name, seed, fault.where, fault.layers, checks, named)
    if fault.replaces == "manifest":
        return Injection(*what, 0.0, scores.rounding, None, None, None, error=error, reason=reason)
    found = scores.of(spec, data)
    effect = scores.effect(spec, found)
    return Injection(
        *what,
        effect,
        scores.rounding,
        effect is None or effect > scores.rounding,
        not closes(found, scores.eager),
        not within(found, scores.eager),
        error=error,
        reason=reason,
    )


def judged(
    bundle: Path, spec: ArtifactSpec, sizes: tuple[int, ...], dataset: Dataset
) -> tuple[tuple[str, ...], tuple[str, ...], str | None, str | None]:
    """The checks that fail, the layers they name, what was raised against the contract, and the first reason."""
    try:
        report = api.check_parity(bundle, variants=(variant_of(spec).name,), batch_sizes=sizes, device="cpu", dataset=dataset)
    except BadInput as error:
        return ("refused",), (), None, first_line(error)
    except Exception as error:  # a crash is no verdict: the fault counts as missed
        return (), (), f"{type(error).__name__}: {first_line(error)}", None
    failed = [result for result in report.results if result.status == "fail"]
    checks = tuple(dict.fromkeys(result.check for result in failed))
    named = tuple(dict.fromkeys(result.first_divergent_layer for result in failed if result.first_divergent_layer))
    return checks, named, None, failed[0].reason if failed else None


def closes(scores: torch.Tensor | None, eager: torch.Tensor) -> bool:
    """`torch.testing.assert_close` with its defaults for float32 on the first real images."""
    try:
        assert scores is not None
        torch.testing.assert_close(scores[:COMPARED], eager[:COMPARED])
    except AssertionError:
        return False
    return True


def within(scores: torch.Tensor | None, eager: torch.Tensor) -> bool:
    """`torch.allclose` with 1e-5 on the first real images."""
    if scores is None or scores.shape != eager.shape:
        return False
    return torch.allclose(scores[:COMPARED], eager[:COMPARED], rtol=1e-5, atol=1e-5)


def planned(kinds: Iterable[Kind], settings: Settings) -> Iterator[tuple[Kind, str, ArtifactSpec, int]]:
    """Kind, subject, artifact and seed of each injection; a quick run has one a kind, and takes the families of formats in turn."""
    for number, kind in enumerate(kinds):
        for seed in range(settings.seeds):
            subject = kind.subjects[(seed + (number if settings.quick else 0)) % len(kind.subjects)]
            if settings.quick:
                yield kind, subject, kind.formats[number % len(kind.formats)][0], seed
                continue
            for family in kind.formats:
                yield kind, subject, family[(seed + number) % len(family)], seed


# Polygraphy.


class Polygraphy:
    """Its command line with defaults throughout: the healthy file's inputs and outputs saved, another file compared with them."""

    def __init__(self, folder: Path | None, work: Path) -> None:
        self.used = folder is not None
        self._command = [sys.executable, str((folder or Path()) / "bin" / "polygraphy"), "run"]
        self._environment = {**os.environ, "PYTHONPATH": str(folder)}
        self._work = work
        self._pool = ThreadPoolExecutor(PROCESSES)
        self._golden: dict[str, Future[Path]] = {}

    def finds(self, healthy: Path, candidate: Path) -> Future[bool] | None:
        """Whether it calls `candidate` different from `healthy`; None without Polygraphy."""
        if not self.used:
            return None
        key = str(healthy)
        if key not in self._golden:
            self._golden[key] = self._pool.submit(self._saved, healthy, self._work / str(len(self._golden)))
        return self._pool.submit(self._differs, self._golden[key], candidate)

    def _saved(self, healthy: Path, stem: Path) -> Path:
        options = ("--save-inputs", f"{stem}.in.json", "--save-outputs", f"{stem}.out.json")
        if self._run(healthy, *options):
            raise RuntimeError(f"polygraphy does not run {healthy}; see {' '.join(self._command)}")
        return stem

    def _differs(self, golden: Future[Path], candidate: Path) -> bool:
        stem = golden.result()
        return self._run(candidate, "--load-inputs", f"{stem}.in.json", "--load-outputs", f"{stem}.out.json") != 0

    def _run(self, model: Path, *options: str) -> int:
        command = [*self._command, str(model), "--onnxrt", *options]
        return subprocess.run(command, env=self._environment, capture_output=True, check=False).returncode


def injections(settings: Settings, kinds: Iterable[Kind], subjects: dict[str, Scores], rival: Polygraphy, work: Path) -> list[Injection]:
    """Every injection, Polygraphy's verdicts included."""
    found: list[tuple[Injection, Future[bool] | None]] = []
    for kind, name, spec, seed in planned(kinds, settings):
        folder = work / f"{len(found)}"
        injection = inject(kind, subjects[name], spec, seed, folder, settings.batch_sizes)
        compared = spec.format == "onnx" and injection.above_rounding is not None
        verdict = rival.finds(subjects[name].subject.bundle.path / spec.path, folder / spec.path) if compared else None
        if verdict is None:
            shutil.rmtree(folder)
        found.append((injection, verdict))
    return [dataclasses.replace(each, polygraphy=verdict.result() if verdict else None) for each, verdict in found]


# Healthy variants.


def equivalent_edits(settings: Settings, subjects: dict[str, Scores], rival: Polygraphy, work: Path) -> list[Clean]:
    """Edits that change nothing, each injected as a fault would be."""
    return [
        Clean(
            each.kind,
            each.subject,
            each.artifact,
            settings.batch_sizes,
            (*each.checks, *filter(None, (each.error, each.reason))),
            each.assert_close,
            each.allclose,
            each.polygraphy,
        )
        for each in injections(settings, EQUIVALENTS, subjects, rival, work)
    ]


def drawn_checkpoint(rng: Random, digits: Dataset, sides: Sequence[int]) -> Checkpoint:
    """A model of any of the three kinds, varied where it can be, with random weights or trained for an epoch.

    `sides`: of the images with their padding; multiples of four leave no remainder in any layer.
    """
    model = rng.choice(("lenet5", "lenet5", "lenet5-wide", "lenet5-1998"))
    settings: dict[str, str] = {}
    if model != "lenet5-1998":
        side, padding = rng.choice(sides), rng.choice((0, 2))
        settings = {
            "in_channels": rng.choice("13"),
            "image_size": str(side - 2 * padding),
            "padding": str(padding),
            "pooling": rng.choice(("avg", "max")),
            "activation": rng.choice(("relu", "tanh")),
        }
    if model == "lenet5":
        settings["channels"] = f"{rng.randint(1, 12)},{rng.randint(1, 24)}"
        settings["hidden"] = f"{rng.randint(8, 128)},{rng.randint(8, 96)}"
    if rng.random() < 0.3:
        return train.train(train.TrainConfig(model, settings, epochs=1, seed=rng.randrange(2**31), device="cpu"), digits)
    return fresh(find_model(model), settings, rng.randrange(2**31))


def healthy_exports(
    settings: Settings, digits: Dataset, images: Dataset, subjects: dict[str, Scores], rival: Polygraphy, work: Path
) -> list[Clean]:
    """The subjects and newly exported bundles of drawn models, judged at drawn batch sizes.

    Polygraphy compares one exporter's file with the other's, in a sample of them.
    """
    found: list[tuple[Clean, Future[bool] | None]] = []
    bundles = math.ceil(settings.clean / len(FORMATS))
    healthy = [scores.subject for scores in subjects.values()]
    for number in range(bundles):
        rng = Random(f"clean {number}")
        subject = healthy[number] if number < len(healthy) else _drawn_subject(number, rng, settings.quick, digits, images, work)
        sampled = rival.used and number % max(1, bundles // POLYGRAPHY_SAMPLE) == 0
        folder = subject.bundle.path
        for clean in judged_clean(subject, tuple(sorted((rng.randint(1, 31), rng.randint(32, 128))))):
            compared = sampled and clean.artifact == ONNX_TS.name
            found.append((clean, rival.finds(folder / ONNX.path, folder / ONNX_TS.path) if compared else None))
        if subject not in healthy and not sampled:
            shutil.rmtree(folder)
    return [dataclasses.replace(each, polygraphy=verdict.result() if verdict else None) for each, verdict in found]


def _drawn_subject(number: int, rng: Random, quick: bool, digits: Dataset, images: Dataset, work: Path) -> Subject:
    checkpoint = drawn_checkpoint(rng, digits, QUICK_SIDES if quick else SIDES)
    return Subject(f"{checkpoint.model} {number}", checkpoint, write_bundle(checkpoint, work / f"clean-{number}"), images)


def judged_clean(subject: Subject, sizes: tuple[int, ...]) -> Iterator[Clean]:
    """Each variant of a healthy bundle."""
    scores = Scores(subject)
    names = tuple(variant_of(spec).name for spec in FORMATS)
    report: ParityReport | None = None
    crashed = ""
    try:
        report = api.check_parity(
            open_bundle(subject.bundle.path), variants=names, batch_sizes=sizes, device="cpu", dataset=subject.dataset
        )
    except LenetDeployError as error:
        crashed = first_line(error)
    for spec in FORMATS:
        rows = [row for row in report.results if row.variant == variant_of(spec).name] if report else []
        failed = tuple(f"{row.check}, {row.inputs}, batch {row.batch_size}: {row.reason}" for row in rows if row.status == "fail")
        run = scores.of(spec, subject.read(spec))
        alarms = not closes(run, scores.eager), not within(run, scores.eager)
        yield Clean("fresh export", subject.name, spec.name, sizes, failed if rows else (crashed or "not judged",), *alarms)


# Tables.


def grouped(found: Iterable[Injection]) -> dict[str, list[Injection]]:
    """Injections by kind; the bits of the mantissa are one kind."""
    groups: dict[str, list[Injection]] = collections.defaultdict(list)
    for each in found:
        groups["mantissa bit of a weight (by bit below)" if each.kind.startswith("mantissa") else each.kind].append(each)
    return groups


def power_table(found: Sequence[Injection]) -> Table:
    """One row a kind, and their sum."""
    columns = ("kind", "formats", "injected", "caught", "at the right layer", "effect above rounding")
    rows = [(name, _formats(group), *_counts(group)) for name, group in grouped(found).items()]
    return Table((*columns, "assert_close", "allclose 1e-5", "Polygraphy"), (*rows, ("total", "", *_counts(found))))


def _formats(group: Iterable[Injection]) -> str:
    counts = collections.Counter(each.artifact.removesuffix("-fp32").removeprefix("torchscript-") for each in group)
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _counts(group: Sequence[Injection]) -> tuple[str, ...]:
    return (
        str(len(group)),
        str(sum(each.caught for each in group)),
        _of([each.located for each in _expected(group)]),
        _of([each.above_rounding for each in group]),
        _of([each.assert_close for each in group]),
        _of([each.allclose for each in group]),
        _of([each.polygraphy for each in group]),
    )


def _of(verdicts: Sequence[bool | None]) -> str:
    known = [verdict for verdict in verdicts if verdict is not None]
    return f"{sum(known)} of {len(known)}" if known else "-"


def mantissa_table(found: Sequence[Injection]) -> Table:
    """One row a bit, 0 the lowest."""
    groups = {kind.name: [each for each in found if each.kind == kind.name] for kind in MANTISSA}
    rows = tuple(
        (
            name.removeprefix("mantissa bit "),
            str(len(group)),
            str(sum("weights" in each.checks for each in group)),
            str(sum(each.by_scores for each in group)),
            *_counts(group)[3:],
        )
        for name, group in groups.items()
        if group
    )
    columns = ("bit", "injected", "by the weights", "by the scores alone", "effect above rounding")
    return Table((*columns, "assert_close", "allclose 1e-5", "Polygraphy"), rows)


def alarm_table(runs: Sequence[Clean]) -> Table:
    """One row a kind of healthy variant."""
    rows = []
    for kind in dict.fromkeys(run.kind for run in runs):
        group = [run for run in runs if run.kind == kind]
        others = [_of([getattr(run, name) for run in group]) for name in ("assert_close", "allclose", "polygraphy")]
        rows.append((kind, str(len(group)), str(sum(bool(run.failed) for run in group)), *others))
    return Table(("healthy variants", "runs", "false alarms", "assert_close", "allclose 1e-5", "Polygraphy"), tuple(rows))


@contextlib.contextmanager
def remembered_oracles() -> Iterator[None]:
    """Compute the input sets of each checkpoint once: no fault touches it, and they are half the time of a check."""
    compute, known = inputs.input_sets, {}

    def remember(checkpoint: Checkpoint, dataset: Dataset, count: int) -> tuple[inputs.InputSet, ...]:
        key = (weights_sha256(checkpoint.weights), dataset.name, count)
        if key not in known:
            known[key] = compute(checkpoint, dataset, count)
            if len(known) > REMEMBERED:
                del known[next(iter(known))]
        return known[key]

    inputs.input_sets = remember
    try:
        yield
    finally:
        inputs.input_sets = compute


def located_share(found: Iterable[Injection]) -> float:
    """Share of the faults found, and that have a layer, that were found there."""
    return _share([each.located for each in _expected(found)])


def _expected(found: Iterable[Injection]) -> list[Injection]:
    return [each for each in found if each.caught and each.layers]


def _share(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts) if verdicts else 1.0


def verdict(found: Sequence[Injection], runs: Sequence[Clean]) -> tuple[str, ...]:
    """What makes the run fail; nothing where it passes."""
    wrong = [f"missed: {_described(each)}" for each in found if each.missed]
    wrong += [f"false alarm: {run.kind}, {run.subject}, {run.artifact}: {run.failed[0]}" for run in runs if run.failed]
    share = located_share(found)
    if share < RIGHT_LAYER_SHARE:
        wrong.append(f"{share:.1%} of the faults found are at the right layer; {RIGHT_LAYER_SHARE:.0%} are asked for")
    return tuple(wrong)


def _described(each: Injection) -> str:
    return f"{each.kind}, {each.subject}, {each.artifact}, seed {each.seed}, {each.where}{f' ({each.error})' if each.error else ''}"


def rendered(found: Sequence[Injection], runs: Sequence[Clean], settings: Settings, wall_s: float) -> str:
    """The whole report in Markdown."""
    misplaced = [each for each in _expected(found) if not each.located]
    listed = [f"- {_described(each)}: named {', '.join(each.named) or 'nothing'}, not {' or '.join(each.layers)}" for each in misplaced]
    parts = [
        f"{environment_line(environment.capture())}; {wall_s:.0f} s. Polygraphy: {_version(settings.polygraphy)}.",
        to_markdown(power_table(found)),
        "At the right layer: of the faults caught, by the first failed check that names a layer. Not counted, since no layer "
        "computes them: a frozen batch, which does not run, and a foreign manifest, which is refused. Polygraphy: ONNX files only.",
        to_markdown(mantissa_table(found)),
        to_markdown(alarm_table(runs)),
        "A run is one variant judged on every input set at all its batch sizes. Polygraphy compares the two ONNX exporters' files there.",
        f"Right layer: {located_share(found):.1%} by the first failed check that names one, which is what the report shows; "
        f"{_share([each.only_located for each in _expected(found)]):.1%} where every failed check that names one is right.",
        *(["Not at the right layer:", "\n".join(listed)] if listed else []),
        *(f"**{problem}**" for problem in verdict(found, runs)),
    ]
    return "\n\n".join(parts) + "\n"


def _version(folder: Path | None) -> str:
    """Of the Polygraphy installed in a folder."""
    if folder is None:
        return "not run"
    return next((each.version for each in metadata.distributions(path=[str(folder)]) if each.name == "polygraphy"), "of unknown version")


def parsed(arguments: Sequence[str]) -> tuple[Settings, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="injections of each kind in ONNX and in TorchScript")
    parser.add_argument("--clean", type=int, default=500, help="healthy variants to judge")
    parser.add_argument("--quick", action="store_true", help="one injection a kind, few healthy variants, no Polygraphy")
    parser.add_argument("--polygraphy", type=Path, metavar="DIR", help="where Polygraphy is installed")
    parser.add_argument("--no-polygraphy", action="store_true", help="leave Polygraphy out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every injection and every healthy run")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write what is printed")
    options = parser.parse_args(arguments)
    rival = None if options.quick or options.no_polygraphy else options.polygraphy
    if options.quick:
        return Settings(1, QUICK_CLEAN, True, QUICK_BATCH_SIZES, None), options
    return Settings(options.seeds, options.clean, False, BATCH_SIZES, rival), options


def main(arguments: Sequence[str]) -> int:
    """Run it all; returns the exit code."""
    settings, options = parsed(arguments)
    start = time.perf_counter()
    digits = load_dataset("digits")
    images = digits
    if settings.quick:
        images = dataclasses.replace(digits, test_images=digits.test_images[:QUICK_IMAGES], test_labels=digits.test_labels[:QUICK_IMAGES])
    mantissa = tuple(MANTISSA[bit] for bit in QUICK_BITS) if settings.quick else MANTISSA
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        subjects = {key: Scores(subject) for key, subject in make_subjects(work / "healthy", images, settings.quick).items()}
        rival = Polygraphy(settings.polygraphy, work)
        with remembered_oracles():
            found = injections(settings, (*mantissa, *KINDS), subjects, rival, work / "faulty")
            edited = equivalent_edits(settings, subjects, rival, work / "equivalent")
            runs = healthy_exports(settings, digits, images, subjects, rival, work) + edited
    wall_s = time.perf_counter() - start
    text = rendered(found, runs, settings, wall_s)
    print(text)
    if options.markdown:
        write_file(options.markdown, text.encode())
    if options.json:
        body = {
            "seeds": settings.seeds,
            "wall_s": wall_s,
            "right_layer_share": located_share(found),
            "problems": verdict(found, runs),
            "injections": [{**dataclasses.asdict(each), "caught": each.caught, "located": each.located} for each in found],
            "clean": [dataclasses.asdict(run) for run in runs],
        }
        document = dump("parity-power", 1, environment.capture(), body).replace(f"{work}/", "")  # the folder is gone by now
        write_file(options.json, document.encode())
    return 1 if verdict(found, runs) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

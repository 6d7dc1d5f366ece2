"""For test suites of your own: one assertion that a bundle, or whatever a model exports to, still computes its function."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lenet_deploy import api
from lenet_deploy.records import ParityReport, ParityResult

if TYPE_CHECKING:
    from lenet_deploy.bundle import Bundle
    from lenet_deploy.checkpoint import Checkpoint
    from lenet_deploy.data import Dataset

SHOWN = 5  # failures of a variant in the message


def assert_parity(
    model_or_bundle: str | Path | Checkpoint | Bundle,
    *,
    variants: Iterable[str] = ("*",),
    require: Iterable[str] = (),
    batch_sizes: Sequence[int] | None = None,
    device: str = "auto",
    dataset: Dataset | None = None,
    allow_tf32: bool = False,
    formats: Iterable[str] = ("torchscript", "onnx"),
) -> ParityReport:
    """Assert that every variant computes the same function as the float64 oracle of its own weights, and return the report.

    Args:
        model_or_bundle: a bundle or its folder; or a checkpoint, its file, or a registered model's name, which is exported to a
            temporary folder first, to `formats`.
        variants, require, batch_sizes, device, dataset, allow_tf32: as in `check_parity`.

    Raises:
        AssertionError: a variant failed, nothing was judged, or a required variant could not run; the message says which and where.
        BadInput: as `check_parity` and `load`; what is wrong with the question is no mismatch.
    """
    from lenet_deploy.bundle import Bundle

    def check(bundle: str | Path | Bundle) -> ParityReport:
        return api.check_parity(
            bundle,
            variants=variants,
            batch_sizes=batch_sizes,
            device=device,
            dataset=dataset,
            require=require,
            allow_tf32=allow_tf32,
        )

    if isinstance(model_or_bundle, Bundle) or (isinstance(model_or_bundle, (str, Path)) and Path(model_or_bundle).is_dir()):
        report = check(model_or_bundle)
    else:
        with tempfile.TemporaryDirectory() as folder:
            try:
                exported = api.export(model_or_bundle, Path(folder) / "bundle", formats=formats, device=device, dataset=dataset)
            except api.ParityFailed as error:
                raise AssertionError(failure_message(error.report)) from None
            if exported.left_out:  # raised and not asserted, so that python -O leaves the gate standing
                raise AssertionError("; ".join(f"{each.name} could not be exported: {each.reason}" for each in exported.left_out))
            report = check(exported.bundle)
    if report.verdict != "pass" or report.missing:
        raise AssertionError(failure_message(report))
    return report


def failure_message(report: ParityReport) -> str:
    """What failed, the worst of each variant first, one line each."""
    lines = ["parity failed"]
    for name in dict.fromkeys(result.variant for result in report.results if result.status == "fail"):
        failed = sorted((r for r in report.results if r.variant == name and r.status == "fail"), key=_badness, reverse=True)
        lines += [_line(result) for result in failed[:SHOWN]]
        if len(failed) > SHOWN:
            lines.append(f"  {name}: {len(failed) - SHOWN} more")
    lines += [f"  {result.variant} is required and was skipped: {result.reason}" for result in report.missing]
    if len(lines) == 1:
        lines += [f"  {result.variant} was skipped: {result.reason}" for result in report.not_run]
    return "\n".join(lines)


def _badness(result: ParityResult) -> float:
    return float("inf") if result.budget_used is None else result.budget_used


def _line(result: ParityResult) -> str:
    where = f"{result.inputs}, batch {result.batch_size}" if result.batch_size else result.inputs or result.check
    return f"  {result.variant} [{result.check}] {where}: {result.reason}"

"""`lenet-deploy parity`."""

from __future__ import annotations

from lenet_deploy.errors import GateFailed

from .options import (
    Batches,
    BundlePath,
    DataDir,
    Device,
    Download,
    Json,
    Markdown,
    OptionalData,
    Quiet,
    Variants,
    dataset,
    numbers,
    words,
)
from .output import emit, note, progress, verdict


def parity(
    bundle: BundlePath,
    variants: Variants = None,
    data: OptionalData = None,
    batch: Batches = None,
    data_dir: DataDir = None,
    download: Download = False,
    device: Device = "auto",
    json: Json = None,
    markdown: Markdown = None,
    quiet: Quiet = False,
) -> None:
    """Judge every variant of a bundle against the float64 oracle; exit 1 on a mismatch."""
    from lenet_deploy import api
    from lenet_deploy.report.tables import parity_table
    from lenet_deploy.store import parity_json

    with progress(quiet) as show:
        report = api.check_parity(
            bundle,
            variants=words(variants) if variants else ("*",),
            batch_sizes=numbers(batch),
            device=device,
            dataset=dataset(data, data_dir, download),
            progress=show,
        )
    for remark in report.notes:
        note(f"note: {remark}", quiet)
    good = report.verdict == "pass"
    emit(parity_table(report), lambda: parity_json(report), json, markdown, f"verdict: {verdict(report.verdict, good)}")
    if not good:
        failed = sorted({result.variant for result in report.results if result.status == "fail"})
        raise GateFailed(f"parity failed: {', '.join(failed)}" if failed else "parity judged nothing: every variant was skipped")

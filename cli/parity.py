"""`lenet-deploy parity`."""

from __future__ import annotations

import socket
from datetime import UTC, datetime

from lenet_deploy.errors import GateFailed, Unusable

from .options import (
    AllowTf32,
    Batches,
    BundlePath,
    DataDir,
    Device,
    Download,
    Drill,
    Json,
    Junit,
    Markdown,
    OptionalData,
    Quiet,
    Require,
    Variants,
    dataset,
    numbers,
    words,
)
from .output import check_outputs, emit, note, progress, verdict


def parity(
    bundle: BundlePath,
    variants: Variants = None,
    require: Require = None,
    data: OptionalData = None,
    batch: Batches = None,
    drill: Drill = False,
    allow_tf32: AllowTf32 = False,
    data_dir: DataDir = None,
    download: Download = False,
    device: Device = "auto",
    json: Json = None,
    junit: Junit = None,
    markdown: Markdown = None,
    quiet: Quiet = False,
) -> None:
    """Judge every variant of a bundle against the float64 oracle; exit 1 on a mismatch."""
    check_outputs(json, markdown, junit)
    from lenet_deploy import api
    from lenet_deploy.report.junit import parity_junit
    from lenet_deploy.report.summary import parity_markdown
    from lenet_deploy.report.table import to_text
    from lenet_deploy.report.tables import layer_error_tables, parity_table
    from lenet_deploy.store import parity_json, write_file

    with progress(quiet) as show:
        report = api.check_parity(
            bundle,
            variants=words(variants) if variants else ("*",),
            batch_sizes=numbers(batch),
            device=device,
            dataset=dataset(data, data_dir, download),
            require=words(require) if require else (),
            drill=drill,
            allow_tf32=allow_tf32,
            progress=show,
        )
    for remark in report.notes:
        note(f"note: {remark}", quiet)
    if junit:
        write_file(junit, parity_junit(report, datetime.now(UTC), socket.gethostname()).encode())
    good = report.verdict == "pass"
    emit(
        parity_table(report),
        lambda: parity_json(report),
        json,
        markdown,
        *(f"\n{title}\n{to_text(table)}\n" for title, table in layer_error_tables(report) if drill),
        f"verdict: {verdict(report.verdict, good)}",
        markdown=lambda: parity_markdown(report),
    )
    if not good:
        failed = sorted({result.variant for result in report.results if result.status == "fail"})
        raise GateFailed(f"parity failed: {', '.join(failed)}" if failed else "parity judged nothing: every variant was skipped")
    if report.missing:
        raise Unusable("; ".join(f"{result.variant} is required: {result.reason}" for result in report.missing))

"""`lenet-deploy parity`."""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from lenet_deploy.errors import BadInput, GateFailed, Unusable
from lenet_deploy.parity.judge import PAIR_TOLERANCE

from .options import (
    AllowTf32,
    Batches,
    DataDir,
    Device,
    Download,
    Drill,
    InputShape,
    Json,
    Judged,
    Junit,
    Markdown,
    OptionalData,
    Other,
    Quiet,
    Require,
    Variants,
    dataset,
    input_shape,
    numbers,
    refuse,
    words,
)
from .output import check_outputs, emit, note, progress, verdict

TOLERANCE = f"Share of an image's largest score that two files may differ by. Default: {PAIR_TOLERANCE:.2g}."


def parity(
    bundle: Judged,
    other: Other = None,
    variants: Variants = None,
    require: Require = None,
    data: OptionalData = None,
    batch: Batches = None,
    drill: Drill = False,
    allow_tf32: AllowTf32 = False,
    tolerance: Annotated[float | None, typer.Option(metavar="X", help=TOLERANCE)] = None,
    shape: InputShape = None,
    data_dir: DataDir = None,
    download: Download = False,
    device: Device = "auto",
    json: Json = None,
    junit: Junit = None,
    markdown: Markdown = None,
    quiet: Quiet = False,
) -> None:
    """Judge every variant of a bundle against the float64 oracle, or one file against another; exit 1 on a mismatch."""
    check_outputs(json, markdown, junit)
    from lenet_deploy import api
    from lenet_deploy.report.junit import parity_junit
    from lenet_deploy.report.summary import parity_markdown
    from lenet_deploy.report.table import to_text
    from lenet_deploy.report.tables import layer_error_tables, parity_table
    from lenet_deploy.store import parity_json, write_file

    if other is None:
        refuse("one bundle", {"--tolerance": tolerance, "--input-shape": shape})
        if bundle.is_file():
            raise BadInput(f"{bundle}: one file, and parity judges a bundle or two files: lenet-deploy parity {bundle} OTHER")
    else:
        switches = {"--drill": drill or None, "--allow-tf32": allow_tf32 or None}
        refuse("two files", {"--variants": variants, "--require": require, **switches})
    with progress(quiet) as show:
        shared: dict[str, Any] = {
            "batch_sizes": numbers(batch),
            "device": device,
            "dataset": dataset(data, data_dir, download),
            "progress": show,
        }
        if other is not None:
            report = api.check_pair(bundle, other, input_shape=input_shape(shape), tolerance=tolerance, **shared)
        else:
            report = api.check_parity(
                bundle,
                variants=words(variants) if variants else ("*",),
                require=words(require) if require else (),
                drill=drill,
                allow_tf32=allow_tf32,
                **shared,
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

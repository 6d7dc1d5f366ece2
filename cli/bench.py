"""`lenet-deploy bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Batches, BundlePath, Device, Json, Markdown, Quiet, Variants, numbers, words
from .output import emit, note_skipped, progress


def bench(
    bundle: BundlePath,
    variants: Variants = None,
    batch: Batches = None,
    scope: Annotated[
        str, typer.Option(metavar="S,...", help="device (inputs resident there), e2e (uint8 on the host to logits).")
    ] = "device,e2e",
    rounds: Annotated[int | None, typer.Option(help="Times every case is visited. Default: the profile's.")] = None,
    profile: Annotated[str, typer.Option(help="quick (core variants) or full (all).")] = "quick",
    device: Device = "auto",
    json: Json = None,
    markdown: Markdown = None,
    quiet: Quiet = False,
) -> None:
    """Measure latency and throughput of every variant that runs here, interleaved, by one clock."""
    from lenet_deploy import api
    from lenet_deploy.report.tables import bench_table, environment_line
    from lenet_deploy.store import bench_json

    with progress(quiet) as show:
        report = api.benchmark(
            bundle,
            variants=words(variants) if variants else None,
            batch_sizes=numbers(batch),
            scopes=words(scope),
            rounds=rounds,
            profile=profile,
            device=device,
            progress=show,
        )
    note_skipped(report.skipped, quiet)
    emit(bench_table(report), lambda: bench_json(report), json, markdown, environment_line(report.environment))

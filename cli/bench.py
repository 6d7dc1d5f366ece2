"""`lenet-deploy bench`: measurements by default; with --scenario the load, with --trace the operators."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lenet_deploy.errors import BadInput, Inconclusive, Unusable

from .interrupts import INTERRUPTED, was_interrupted
from .options import (
    AllowTf32,
    Device,
    InputShape,
    Json,
    Markdown,
    Measurable,
    Quiet,
    Variants,
    input_shape,
    numbers,
    refuse,
    settings,
    words,
)
from .output import check_outputs, emit, note, note_skipped, progress, show


def bench(
    what: Measurable,
    variants: Variants = None,
    batch: Annotated[
        str | None, typer.Option(metavar="N,...|auto", help="Batch sizes; auto doubles until throughput stops growing.")
    ] = None,
    slo_ms: Annotated[float | None, typer.Option(metavar="MS", help="Latency budget: name the best batch size within it.")] = None,
    scope: Annotated[
        str | None, typer.Option(metavar="S,...", help="device (inputs resident there), e2e (uint8 on the host to logits). Default: both.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Visits of every case in each process. Default: until precise.")] = None,
    processes: Annotated[int | None, typer.Option(help="Fresh worker processes. Default: the profile's.")] = None,
    limit: Annotated[float | None, typer.Option(metavar="S", help="Seconds after which no round begins. Default: the profile's.")] = None,
    profile: Annotated[str, typer.Option(help="quick (core variants, 1 process) or full (all, 3).")] = "quick",
    baseline: Annotated[str | None, typer.Option(metavar="VARIANT", help="What speed-ups are relative to. Default: the first.")] = None,
    cold_start: Annotated[
        bool | None, typer.Option("--cold-start/--no-cold-start", help="First answer in a fresh process. Default: in full.")
    ] = None,
    scenario: Annotated[
        str | None, typer.Option(metavar="NAME", help="Instead, MLPerf LoadGen: single-stream, multi-stream, server or offline.")
    ] = None,
    latency_bound_ms: Annotated[float | None, typer.Option(metavar="MS", help="What 99 % have to keep in server. Default: 15.")] = None,
    duration: Annotated[float | None, typer.Option(metavar="S", help="Least seconds of a scenario's load. Default: 10.")] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Instead, the operators: a Chrome trace in DIR and a table of each variant.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Intra-op threads of torch and ONNX Runtime. Default: torch's.")] = None,
    allow_tf32: AllowTf32 = False,
    ort_option: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Session option for ONNX Runtime. Repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the order of visits. Default: 0.")] = None,
    shape: InputShape = None,
    device: Device = "auto",
    json: Json = None,
    markdown: Markdown = None,
    quiet: Quiet = False,
) -> None:
    """Measure latency and throughput of every variant of a bundle or file that runs here, interleaved, by one clock."""
    check_outputs(json, markdown)
    options = settings(ort_option, "--ort-option")
    if threads is not None and "intra_op_num_threads" in options:
        raise BadInput("--threads and --ort-option intra_op_num_threads contradict each other; leave one out")
    if any(key.startswith("session.") for key in options):
        note("note: ONNX Runtime does not check keys that begin with session.; a mistyped one has no effect", quiet)
    shared: dict[str, Any] = {
        "variants": None if variants is None else words(variants),
        "profile": profile,
        "threads": threads,
        "allow_tf32": allow_tf32,
        "ort_options": options,
        "input_shape": input_shape(shape),
        "device": device,
    }
    # What goes with measurements alone, and what with a scenario alone: nothing given is silently without effect.
    timing = {
        "--slo-ms": slo_ms,
        "--scope": scope,
        "--rounds": rounds,
        "--processes": processes,
        "--limit": limit,
        "--baseline": baseline,
        "--cold-start": cold_start,
        "--batch auto": True if batch == "auto" else None,
        "--seed": seed,
    }
    load = {"--latency-bound-ms": latency_bound_ms, "--duration": duration}
    if trace is not None:
        refuse("--trace", {**timing, **load, "--scenario": scenario, "--json": json, "--markdown": markdown})
        _trace(what, trace, numbers(batch), shared, quiet)
        return
    if scenario:
        refuse("--scenario", timing)
        if scenario != "server":
            refuse(f"--scenario {scenario}", {"--latency-bound-ms": latency_bound_ms})
        if scenario.endswith("-stream"):
            refuse(f"--scenario {scenario}, whose queries are one launch each", {"--batch": batch})
        sizes = numbers(batch) or (None,)
        if len(sizes) > 1:
            raise BadInput(f"--batch {batch}: --scenario takes one number, the most images in a launch")
        _load(what, scenario, sizes[0], duration, latency_bound_ms, shared, json, markdown, quiet)
        return
    refuse("a bench without --scenario", load)
    if rounds is not None:
        refuse("--rounds, which says how much is measured", {"--limit": limit})
    from lenet_deploy import api
    from lenet_deploy.report.bench import bench_markdown, bench_notes, terminal_table
    from lenet_deploy.store import bench_json

    sweep = batch == "auto"
    with progress(quiet) as advance:
        report = api.benchmark(
            what,
            batch_sizes=None if sweep else numbers(batch),
            sweep=sweep,
            slo_s=None if slo_ms is None else slo_ms / 1e3,
            scopes=words(scope or "device,e2e"),
            rounds=rounds,
            processes=processes,
            limit_s=limit,
            baseline=baseline,
            cold_start=cold_start,
            seed=seed or 0,
            progress=advance,
            **shared,
        )
    note_skipped(report.skipped, quiet)
    emit(terminal_table(report), lambda: bench_json(report), json, markdown, *bench_notes(report), markdown=lambda: bench_markdown(report))
    if report.failed and not was_interrupted():
        raise Unusable("; ".join(f"{failure.name}: {failure.reason}" for failure in report.failed))
    if report.partial:
        note(f"partial: {report.partial}")
        raise typer.Exit(INTERRUPTED)
    if slo_ms is not None and not any(each.within_slo for each in report.batches):
        note(f"no batch size keeps {slo_ms:g} ms", quiet)


def _load(
    what: Path,
    scenario: str,
    batch_size: int | None,
    duration: float | None,
    latency_bound_ms: float | None,
    shared: dict[str, Any],
    json: str | None,
    markdown: Path | None,
    quiet: bool,
) -> None:
    from lenet_deploy import api
    from lenet_deploy.report.load import load_table, probe_table
    from lenet_deploy.report.table import to_text
    from lenet_deploy.report.tables import environment_line
    from lenet_deploy.store import bench_json

    with progress(quiet) as advance:
        report = api.load_test(
            what,
            scenario,
            duration_s=duration,
            latency_bound_s=None if latency_bound_ms is None else latency_bound_ms / 1e3,
            batch_size=batch_size,
            progress=advance,
            **shared,
        )
    note_skipped(report.skipped, quiet)
    probes = (f"\n{result.variant}: rates tried\n{to_text(probe_table(result))}" for result in report.loads if result.probes)
    emit(load_table(report.loads), lambda: bench_json(report), json, markdown, *probes, "", environment_line(report.environment))
    if report.partial:
        note(f"partial: {report.partial}")
        raise typer.Exit(INTERRUPTED)
    invalid = [result.variant for result in report.loads if not result.valid]
    if invalid:
        raise Inconclusive(
            f"LoadGen calls the run of {', '.join(invalid)} invalid, so its figures hold for nothing; the reason is in the table"
        )


def _trace(what: Path, directory: Path, sizes: tuple[int, ...] | None, shared: dict[str, Any], quiet: bool) -> None:
    from lenet_deploy import api
    from lenet_deploy.report.table import to_text
    from lenet_deploy.report.trace import trace_lines, trace_tables

    with progress(quiet) as advance:
        traces, skipped = api.trace(what, directory, batch_sizes=sizes, progress=advance, **shared)
    note_skipped(skipped, quiet)
    for each in traces:
        show(*(f"{title}\n{to_text(table)}\n" for title, table in trace_tables(each)), *trace_lines(each), "")

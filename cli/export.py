"""`lenet-deploy export`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lenet_deploy.models.config import ACTIVATIONS, POOLINGS
from lenet_deploy.sources import known_names
from lenet_deploy.variants import FORMATS, PRECISIONS
from lenet_deploy.zoo import DEFAULT

from .options import DataDir, Device, Download, OptionalData, Quiet, Seed, Set, What, dataset, decimals, settings, words
from .output import emit, note, progress


def export(
    what: What = DEFAULT,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT,...", help=f"{', '.join(FORMATS)}, or all.")] = "torchscript,onnx",
    precision: Annotated[str, typer.Option(metavar="P,...", help=f"{', '.join(PRECISIONS)}.")] = "fp32",
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 18,
    out: Annotated[Path | None, typer.Option(help="The bundle's folder. Default: ./NAME")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that stands there.")] = False,
    model: Annotated[str | None, typer.Option(help="Which model foreign weights are. Default: by their tensors.")] = None,
    set_: Set = None,
    pooling: Annotated[str | None, typer.Option(help=f"{', '.join(POOLINGS)}, which foreign weights do not say.")] = None,
    activation: Annotated[str | None, typer.Option(help=f"{', '.join(ACTIVATIONS)}, which foreign weights do not say.")] = None,
    mean: Annotated[
        str | None, typer.Option(metavar="X,...", help="Of pixels from 0 to 1, for foreign weights; one, or one a channel.")
    ] = None,
    std: Annotated[str | None, typer.Option(metavar="X,...", help="Likewise: the input is (pixel - mean) / std.")] = None,
    border: Annotated[
        int | None, typer.Option(help="Black pixels that fill foreign weights' input, where small images are not scaled.")
    ] = None,
    probe: Annotated[
        str | None, typer.Option(metavar="D", help="Find out on these images what of the foregoing is not given; exit 4 where unclear.")
    ] = None,
    seed: Seed = 0,
    data: OptionalData = None,
    data_dir: DataDir = None,
    download: Download = False,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Export a model into a bundle that is published only if every artifact computes the same function."""
    from lenet_deploy import api
    from lenet_deploy.report.table import to_text
    from lenet_deploy.report.tables import artifact_table, parity_table

    probed_on = dataset(probe, data_dir, download) if probe is not None else None
    images = dataset(data, data_dir, download) if data is not None or probed_on is None else probed_on
    with progress(quiet) as show:
        loading = partial(api.load, what, seed=seed) if probed_on is None else partial(api.probe, what, probed_on, progress=show)
        checkpoint = loading(
            model=model,
            settings=settings(set_),
            pooling=pooling,
            activation=activation,
            mean=decimals(mean, "--mean"),
            std=decimals(std, "--std"),
            border=border,
        )
    told = checkpoint.provenance
    trained = f", {told['test_accuracy']:.2f} % on the test split of {told['dataset']}" if "test_accuracy" in told else ""
    note(f"{what}: {told.get('source', 'a checkpoint')}{trained}", quiet)
    for line in checkpoint.origin:
        note(line, quiet)
    with progress(quiet) as show:
        try:
            report = api.export(
                checkpoint,
                out or Path(_default_name(what)),
                formats=words(to),
                precisions=words(precision),
                opset=opset,
                force=force,
                device=device,
                dataset=images,
                progress=show,
            )
        except api.ParityFailed as error:
            typer.echo(to_text(parity_table(error.report)))
            raise
    for failure in report.left_out:
        note(f"left out: {failure.name}: {failure.reason}")
    for remark in report.parity.notes:
        note(f"note: {remark}", quiet)
    typer.echo(to_text(parity_table(report.parity)))
    typer.echo("")
    emit(artifact_table(report.bundle.manifest.artifacts), str, None, None, f"published {report.bundle.path}")


def _default_name(what: str) -> str:
    """The model's name; for a file its own, or its folder's where it is called `checkpoint`, with `-bundle` to keep it apart."""
    path = Path(what)
    if not path.exists() or what in known_names():
        return path.name
    stem = path.resolve().parent.name if path.stem == "checkpoint" else path.stem
    return f"{stem}-bundle"

"""`lenet-deploy demo`: the whole path on the embedded digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Quiet
from .output import note, progress, verdict
from .train import run_training

# LeNet-5 on grey digits of 28x28 surrounded by two pixels: conv1 then sees what it would see in a 32x32 image.
SETTINGS = {"in_channels": "1", "image_size": "28", "padding": "2"}
BATCH_SIZES = (1, 64)


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results; an earlier demo there is replaced.")] = Path("lenet-deploy-demo"),
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Train LeNet-5 on the embedded digits, export it, prove the exports equal, and measure them: under a minute."""
    from lenet_deploy import api
    from lenet_deploy.data import load_dataset
    from lenet_deploy.recipes import find_recipe
    from lenet_deploy.report.bench import terminal_table, warning_lines
    from lenet_deploy.report.table import to_text
    from lenet_deploy.report.tables import accuracy_table, artifact_table, environment_line, parity_table
    from lenet_deploy.store import bench_json, make_folder, parity_json, write_file
    from lenet_deploy.train import resolve

    digits = load_dataset("digits")
    config = find_recipe("fast").config("lenet5", "digits", settings=SETTINGS, device=device)
    resolve(config, digits)  # whatever is wrong is said before a folder is made
    make_folder(out)
    note("1/4 train lenet5 on the embedded digits", quiet)
    checkpoint, path, _ = run_training(config, digits, out, quiet)
    with progress(quiet) as show:
        note("2/4 export to TorchScript and ONNX, 3/4 prove every export equal to the float64 oracle", quiet)
        exported = api.export(checkpoint, out / "bundle", force=True, device=device, dataset=digits, progress=show)
        note("4/4 measure every variant that runs here", quiet)
        bench = api.benchmark(exported.bundle, batch_sizes=BATCH_SIZES, device=device, progress=show)
    write_file(out / "parity.json", parity_json(exported.parity).encode())
    write_file(out / "bench.json", bench_json(bench).encode())

    sections = (
        (f"Accuracy on {len(digits.test_images)} digits that training never saw", accuracy_table(exported.accuracies)),
        ("Artifacts", artifact_table(exported.bundle.manifest.artifacts)),
        (f"Parity with the float64 oracle: {verdict(exported.parity.verdict, True)}", parity_table(exported.parity)),
        ("Latency and throughput", terminal_table(bench)),
    )
    for title, table in sections:
        typer.echo(f"\n{title}\n{to_text(table)}")
    for line in warning_lines(bench):
        typer.echo(line)
    typer.echo(f"\n{environment_line(bench.environment)}")
    typer.echo(f"\nFiles\n  {path}\n  {exported.bundle.path}/\n  {out / 'parity.json'}\n  {out / 'bench.json'}\n  {out / 'metrics.json'}")
    typer.echo(f"Next\n  lenet-deploy parity {exported.bundle.path}\n  lenet-deploy bench {exported.bundle.path} --profile full")

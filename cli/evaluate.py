"""`lenet-deploy evaluate`."""

from __future__ import annotations

from .options import Data, DataDir, Device, Download, Json, Markdown, Quiet, Seed, What
from .output import check_outputs, emit, note_if_fresh, note_skipped


def evaluate(
    what: What,
    data: Data = "digits",
    data_dir: DataDir = None,
    download: Download = False,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = None,
    markdown: Markdown = None,
    quiet: Quiet = False,
) -> None:
    """Accuracy on the test split, and of each class: of a checkpoint, of one artifact, or of every variant of a bundle."""
    check_outputs(json, markdown)
    from lenet_deploy import api
    from lenet_deploy.data import load_dataset
    from lenet_deploy.report.table import to_markdown, to_text
    from lenet_deploy.report.tables import accuracy_table, class_table, class_title
    from lenet_deploy.store import evaluate_json

    note_if_fresh(what, seed, quiet)
    report = api.evaluate(what, load_dataset(data, data_dir, download), seed=seed, device=device)
    note_skipped(report.skipped, quiet)
    table, title, classes = accuracy_table(report.rows), class_title(report.rows), class_table(report.rows)
    emit(
        table,
        lambda: evaluate_json(report),
        json,
        markdown,
        f"\n{title}\n{to_text(classes)}",
        markdown=lambda: f"{to_markdown(table)}\n\n**{title}**\n\n{to_markdown(classes)}\n",
    )

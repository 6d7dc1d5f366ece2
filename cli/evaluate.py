"""`lenet-deploy evaluate`."""

from __future__ import annotations

from .options import Data, DataDir, Device, Download, Json, What
from .output import emit, note_if_fresh


def evaluate(
    what: What,
    data: Data = "digits",
    data_dir: DataDir = None,
    download: Download = False,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Accuracy on the test split: of a checkpoint, of one artifact, or of every variant of a bundle."""
    from lenet_deploy import api, environment
    from lenet_deploy.data import load_dataset
    from lenet_deploy.report.tables import accuracy_table
    from lenet_deploy.store import evaluate_json

    note_if_fresh(what)
    rows = api.evaluate(what, load_dataset(data, data_dir, download), device=device)
    emit(accuracy_table(rows), lambda: evaluate_json(rows, environment.capture()), json)

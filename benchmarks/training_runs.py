"""Finished training runs as one table and one JSON file: python benchmarks/training_runs.py RUN... [--json FILE].

Each RUN is a folder that `lenet-deploy train` wrote. Runs that differ by their seed alone are one row: mean and range of the accuracy after
the last epoch, and the median of the seconds spent in training steps. The JSON holds every run whole: how it came to be, and each epoch.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import groupby
from pathlib import Path
from typing import Any

from lenet_deploy.checkpoint import load
from lenet_deploy.report.table import Table, to_markdown

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("runs", type=Path, nargs="+")
parser.add_argument("--json", type=Path)
arguments = parser.parse_args()


def described(folder: Path) -> dict[str, Any]:
    """What a run says of itself."""
    checkpoint = load(folder / "checkpoint.safetensors")
    metrics = json.loads((folder / "metrics.json").read_text())
    told = dict(checkpoint.provenance)
    return {
        "model": checkpoint.model,
        **told,
        "weights_sha256": checkpoint.metadata().weights_sha256,
        "environment": metrics["environment"],
        "epochs_each": metrics["epochs"],
    }


def kind(run: dict[str, Any]) -> tuple[str, ...]:
    """What runs of one row have in common."""
    options = ("compile", "channels_last")
    said = " ".join(f"--{name.replace('_', '-')}" for name in options if run[name])
    return run["model"], run["dataset"], run["recipe"], said, str(run["epochs"])


runs = sorted(map(described, arguments.runs), key=lambda run: (*kind(run), run["seed"]))
rows = []
for (model, data, recipe, options, epochs), found in groupby(runs, kind):
    group = list(found)
    accuracies = [run["test_accuracy"] for run in group]
    best = statistics.mean(max(epoch["accuracy"] for epoch in run["epochs_each"]) for run in group)
    rows.append(
        (
            f"`lenet-deploy train --model {model} --data {data} --recipe {recipe}{' ' + options if options else ''}`",
            epochs,
            ", ".join(str(run["seed"]) for run in group),
            f"{statistics.mean(accuracies):.2f} %",
            f"{min(accuracies):.2f} to {max(accuracies):.2f} %",
            f"{best:.2f} %",
            f"{statistics.median(run['train_s'] for run in group):,.0f} s",
        )
    )
print(to_markdown(Table(("command", "epochs", "seeds", "accuracy", "range", "best epoch", "seconds"), tuple(rows))))
if arguments.json:
    arguments.json.write_text(json.dumps(runs, indent=1) + "\n")

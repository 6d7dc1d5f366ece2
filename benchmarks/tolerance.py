"""How far healthy variants are from the float64 oracle: python benchmarks/tolerance.py [SEEDS] [JSON].

The constants of `lenet_deploy/parity/judge.py` come from this. For each model, config and seed, fresh and trained, and each input set of
`parity`: the `factor` that an image's scores needed, |v - o| / (epsilon * condition * max|o|), and the `ratio`,
(RMSE(v) - epsilon * condition * RMS(o)) / RMSE(eager), over the float32 variants on the CPU at several batch sizes. For TF32 (emulated:
operands rounded to 10 bits), fp16 and bf16 the only healthy variant at hand is torch's eager mode on the CPU; their `ratio` compares
batches of different size. Prints a Markdown table: maximum and quantiles over all images.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

import torch

from lenet_deploy import api, data, environment, train
from lenet_deploy.checkpoint import Checkpoint, to_bytes
from lenet_deploy.devices import computing_on
from lenet_deploy.exporters import ExportOptions
from lenet_deploy.parity.check import run_batch
from lenet_deploy.parity.inputs import EAGER, InputSet, input_sets
from lenet_deploy.parity.judge import TOLERANCES, within_range
from lenet_deploy.report.tables import environment_line
from lenet_deploy.variants import VARIANTS, Variant

SEEDS = int(sys.argv[1]) if len(sys.argv) > 1 else 5
BATCHES = (1, 7, 64, 512)
SAMPLE = 256  # images of each set
HALF_SAMPLE = 64  # of them in the formats that the CPU emulates slowly
CONFIGS = (
    ("lenet5", {"in_channels": "1", "image_size": "28", "padding": "2"}),
    ("lenet5", {}),
    ("lenet5", {"pooling": "max", "activation": "tanh"}),
    ("lenet5", {"activation": "sigmoid"}),
    ("lenet5", {"in_channels": "1", "channels": "4,8", "hidden": "32,16", "image_size": "28"}),
    ("lenet5-wide", {}),
    ("lenet5-1998", {}),
)
ON_CPU = [variant for variant in VARIANTS if variant.device == "cpu"]
DIGITS = data.load_dataset("digits")

Needed = dict[tuple[str, str], list[torch.Tensor]]


def shares(scores: torch.Tensor, inputs: InputSet, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The `factor` and the `ratio` that each image needed."""
    count = len(scores)
    oracle, condition = inputs.oracle[:count], inputs.condition(precision)[:count]
    epsilon = TOLERANCES[precision].epsilon
    error = (scores.double() - oracle).abs()
    eager = inputs.eager_rmse(precision)
    assert eager is not None
    factor = error.amax(dim=1) / (epsilon * condition * oracle.abs().amax(dim=1))
    beyond = error.square().mean(dim=1).sqrt() - epsilon * condition * oracle.square().mean(dim=1).sqrt()
    return factor, torch.where(beyond > 0, beyond / eager[:count], 0.0)


def artifact(variant: Variant, checkpoint: Checkpoint) -> bytes:
    """The file that a variant runs, freshly exported."""
    load = variant.artifact.exporter
    return load()(checkpoint.module(), checkpoint.metadata(), ExportOptions()).data if load else to_bytes(checkpoint)


def measure(checkpoint: Checkpoint, needed: Needed) -> None:
    """Add one checkpoint's shares, by precision and input set."""
    sets = input_sets(checkpoint, DIGITS, SAMPLE)
    artifacts = [(variant, artifact(variant, checkpoint)) for variant in ON_CPU]
    with computing_on(torch.device("cpu")), contextlib.ExitStack() as stack:
        for variant, made in artifacts:
            session = stack.enter_context(variant.open_session(made, checkpoint.preprocessing.input_shape))
            for inputs in sets:
                for size in BATCHES:
                    images = inputs.images[: 16 if size == 1 else SAMPLE]
                    add(needed, torch.cat([run_batch(session, batch) for batch in images.split(size)]), inputs, "fp32")
        for precision in ("tf32", "fp16", "bf16"):
            run = EAGER[precision](checkpoint.module())
            for inputs in sets:
                if within_range(precision, inputs.peak, inputs.smallest, float(inputs.condition(precision).max())):
                    continue  # parity leaves this set out for this format, too
                for size in (1, HALF_SAMPLE):
                    images = inputs.images[: 8 if size == 1 else HALF_SAMPLE]
                    add(needed, torch.cat([run(batch) for batch in images.split(size)]), inputs, precision)


def add(needed: Needed, scores: torch.Tensor, inputs: InputSet, precision: str) -> None:
    """File the shares of one run."""
    name = "real images" if inputs.labels is not None else inputs.name
    factor, ratio = shares(scores, inputs, precision)
    needed.setdefault((precision, name), []).append(torch.stack([factor, ratio]))


def checkpoints() -> list[Checkpoint]:
    """Fresh ones of every config and seed, and one trained of every config."""
    fresh = [api.load(name, settings=settings, seed=seed) for name, settings in CONFIGS for seed in range(SEEDS)]
    trained = [
        train.train(train.TrainConfig(name, dict(settings), epochs=3, device="cpu", seed=seed), DIGITS)
        for name, settings in CONFIGS
        for seed in range(max(1, SEEDS // 3))
    ]
    return fresh + trained


start = time.perf_counter()
needed: Needed = {}
cases = checkpoints()
for case in cases:
    measure(case, needed)

rows = []
for (precision, name), found in needed.items():
    every = torch.cat(found, dim=1)
    factor, ratio = every
    rows.append(
        {
            "precision": precision,
            "inputs": name,
            "images": every.shape[1],
            "factor_median": float(factor.median()),
            "factor_p999": float(factor.sort().values[int(0.999 * (len(factor) - 1))]),
            "factor_max": float(factor.max()),
            "ratio_max": float(ratio.max()),
        }
    )
print(
    "| precision | inputs | images | factor, median | factor, 99.9 % | factor, max | ratio, max |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
)
for row in rows:
    print(
        f"| {row['precision']} | {row['inputs']} | {row['images']:,} | {row['factor_median']:.2f} | {row['factor_p999']:.2f} "
        f"| {row['factor_max']:.2f} | {row['ratio_max']:.2f} |"
    )
captured = environment.capture()
print(f"\n{len(cases)} checkpoints, {time.perf_counter() - start:.0f} s; {environment_line(captured)}")
if len(sys.argv) > 2:
    Path(sys.argv[2]).write_text(
        json.dumps({"rows": rows, "checkpoints": len(cases), "environment": environment_line(captured)}, indent=2) + "\n"
    )

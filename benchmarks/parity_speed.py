"""How long a parity run takes, beside Polygraphy on as many images: python benchmarks/parity_speed.py DATA_DIR [--polygraphy DIR] [RUNS].

Exports `lenet5` (grey, 28x28) once, then times whole processes in turn:

- `lenet-deploy parity BUNDLE --data mnist --variants '*cpu*'`: 5 variants, every check, the 10,000 images of MNIST's test split
- `polygraphy run model.onnx --onnxrt` on as many images as that run sent through all its variants, in batches of 1,024
- the same on the 10,000 images alone

DATA_DIR holds torchvision's MNIST files. `--polygraphy DIR` is where `pip install --no-deps --target DIR polygraphy` put it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lenet_deploy import api, data, environment, train
from lenet_deploy.parity import check
from lenet_deploy.report.tables import environment_line

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("data_dir", type=Path)
parser.add_argument("runs", type=int, nargs="?", default=3)
parser.add_argument("--polygraphy", type=Path)
arguments = parser.parse_args()

LOADER = """
import numpy
def load_data():
    for start in range(0, {count}, 1024):
        yield {{"image": numpy.random.default_rng(start).random((min(1024, {count} - start), 1, 28, 28), dtype=numpy.float32)}}
"""


def images_launched(bundle: Path, mnist: data.Dataset) -> int:
    """Images that one parity run sends through its sessions, all variants and checks together."""
    counted, launch = 0, check.run_batch

    def counting(session: check.Session, images: torch.Tensor) -> torch.Tensor:
        nonlocal counted
        counted += len(images)
        return launch(session, images)

    check.run_batch = counting
    try:
        assert api.check_parity(bundle, device="cpu", dataset=mnist).verdict == "pass"
    finally:
        check.run_batch = launch
    return counted


def wall_s(command: list[str], **env: str) -> float:
    """Seconds of one process that ends well."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **env})
    return time.perf_counter() - start


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    mnist = data.load_dataset("mnist", arguments.data_dir)
    settings = {"in_channels": "1", "image_size": "28", "padding": "2"}
    checkpoint = train.train(train.TrainConfig("lenet5", settings, epochs=1, device="cpu"), mnist)
    bundle = api.export(checkpoint, folder / "bundle", dataset=mnist, device="cpu").bundle.path
    count = images_launched(bundle, mnist)
    cli = [sys.executable, "-m", "lenet_deploy.cli", "parity", str(bundle), "--variants", "*cpu*", "--data", "mnist"]
    cases = {f"`lenet-deploy parity`, 5 variants, {count:,} images": ([*cli, "--data-dir", str(arguments.data_dir)], {})}
    for images in (count, len(mnist.test_images)) if arguments.polygraphy else ():
        loader = folder / f"loader{images}.py"
        loader.write_text(LOADER.format(count=images))
        program = "from polygraphy.tools import main; main()"
        polygraphy = [sys.executable, "-c", program, "run", str(bundle / "model.onnx"), "--onnxrt", "--data-loader-script", str(loader)]
        cases[f"`polygraphy run --onnxrt`, 1 variant, {images:,} images"] = (polygraphy, {"PYTHONPATH": str(arguments.polygraphy)})
    times: dict[str, list[float]] = {case: [] for case in cases}
    for run in range(arguments.runs + 1):
        for case, (command, env) in cases.items():
            seconds = wall_s(command, **env)
            if run:  # the first round fills the file cache
                times[case].append(seconds)

ours = statistics.median(next(iter(times.values())))
print(f"| whole process | median of {arguments.runs} | worst | time of parity / this |\n| --- | ---: | ---: | ---: |")
for case, values in times.items():
    print(f"| {case} | {statistics.median(values):.1f} s | {max(values):.1f} s | {ours / statistics.median(values):.2f} |")
print(f"\n{environment_line(environment.capture())}")

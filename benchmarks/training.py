"""How fast training is, beside the lecture's loop: python benchmarks/training.py DATA [--data-dir DIR] [--model M] [--rounds N].

The lecture's loop is what most people write: a Dataset whose images go through `ToTensor` one by one, a `DataLoader` with batches of 128,
Adam. Beside it `lenet_deploy.train.train` with the same optimiser and the same batches, then with each thing the field offers, then with
larger batches and as the recipe `fast` has it. All in one process and in turn, round after round, each visit on the same images; the first
epoch of a visit warms up (and compiles), the second is counted. Compilation is the first visit's excess, with an empty cache.

Every row computes the same training in float32 unless its name says otherwise. The share of the peak is of what the same threads reach in a
large matrix product; a training image takes three times the operations of an inference, less the gradient of the first layer's input.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # before torch: compilation is measured, not looked up

import torch
from torch.utils.data import DataLoader
from torchvision import transforms

from lenet_deploy import data, environment
from lenet_deploy.bench.roofline import measure_limit
from lenet_deploy.models import initialise
from lenet_deploy.recipes import TrainConfig, find_recipe
from lenet_deploy.records import EpochStats
from lenet_deploy.report.table import Table, to_markdown
from lenet_deploy.report.tables import environment_line
from lenet_deploy.train import resolve, train

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("data")
parser.add_argument("--data-dir", type=Path)
parser.add_argument("--model", default="lenet5")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--images", type=int, default=12_800)
arguments = parser.parse_args()


class Images(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """As torchvision's data sets: a PIL image a sample, and a transform."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images.permute(0, 2, 3, 1).squeeze(3).numpy(), labels.tolist()
        self.transform = transforms.ToTensor()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def lecture_epochs(config: TrainConfig, dataset: data.Dataset, workers: int) -> list[float]:
    """Seconds of each epoch of the lecture's loop."""
    model_config = resolve(config, dataset)[1]
    module = initialise(config.model, model_config, config.seed)
    loader = DataLoader(
        Images(dataset.train_images, dataset.train_labels),
        batch_size=128,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    optimizer, criterion, seconds = torch.optim.Adam(module.parameters(), lr=0.001), torch.nn.CrossEntropyLoss(), []
    for _ in range(config.epochs):
        start, total = time.perf_counter(), 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = criterion(module(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(images)
        seconds.append(time.perf_counter() - start)
    return seconds


def our_epochs(config: TrainConfig, dataset: data.Dataset) -> list[float]:
    """Seconds of each epoch of ours, the evaluation after it left out as in the lecture's."""
    seen: list[EpochStats] = []
    train(config, dataset, seen.append)
    return [stats.seconds for stats in seen]


def convolution_epochs(config: TrainConfig, dataset: data.Dataset) -> list[float]:
    """Seconds that each epoch's convolutions take alone, with the gradients that training needs: no loop over them can be faster."""
    model_config = resolve(config, dataset)[1]
    module = initialise(config.model, model_config).to(memory_format=torch.channels_last)
    side, work = model_config.image_size, []
    images = torch.rand(config.batch_size, model_config.in_channels, side, side).contiguous(memory_format=torch.channels_last)

    def note(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        work.append((layer, inputs[0].detach().requires_grad_(len(work) > 0), torch.rand_like(output)))

    hooks = [layer.register_forward_hook(note) for layer in module.modules() if isinstance(layer, torch.nn.Conv2d)]
    module(images)
    for hook in hooks:
        hook.remove()
    seconds = []
    for _ in range(config.epochs):
        start = time.perf_counter()
        for _ in range(len(dataset.train_images) // config.batch_size):
            for layer, values, gradient in work:
                layer(values).backward(gradient)
        seconds.append(time.perf_counter() - start)
    return seconds


whole = data.load_dataset(arguments.data, arguments.data_dir)
part = dataclasses.replace(
    whole,
    train_images=whole.train_images[: arguments.images],
    train_labels=whole.train_labels[: arguments.images],
    test_images=whole.test_images[:100],
    test_labels=whole.test_labels[:100],
)
lecture = find_recipe("lecture").config(arguments.model, whole.name, epochs=2, device="cpu")
fast = find_recipe("fast").config(arguments.model, whole.name, epochs=2, device="cpu")
LOOPS = {"the lecture's loop, no workers": 0, "the lecture's loop, 2 workers": 2}
OURS = {
    "ours, recipe lecture": lecture,
    "ours, recipe lecture, channels last": dataclasses.replace(lecture, channels_last=True),
    "ours, recipe lecture, bf16 autocast": dataclasses.replace(lecture, precision="bf16"),
    "ours, recipe lecture, compiled": dataclasses.replace(lecture, compile=True),
    "ours, recipe lecture, compiled, channels last": dataclasses.replace(lecture, compile=True, channels_last=True),
    "ours, recipe lecture, compiled, bf16, channels last": dataclasses.replace(lecture, compile=True, channels_last=True, precision="bf16"),
    f"ours, recipe fast (batch {fast.batch_size})": fast,
    f"ours, recipe fast (batch {fast.batch_size}), compiled, channels last": dataclasses.replace(fast, compile=True, channels_last=True),
}
ALONE = "the convolutions alone, channels last"
rates: dict[str, list[float]] = {name: [] for name in (*LOOPS, *OURS, ALONE)}
compile_s: dict[str, float] = {}
for visit in range(arguments.rounds):
    for name in rates:
        torch._dynamo.reset()
        start = time.perf_counter()
        if name == ALONE:
            first, counted = convolution_epochs(lecture, part)
        else:
            first, counted = lecture_epochs(lecture, part, LOOPS[name]) if name in LOOPS else our_epochs(OURS[name], part)
        if visit == 0 and name in OURS and OURS[name].compile:
            compile_s[name] = first - counted
        rates[name].append(arguments.images / counted)
        print(f"round {visit + 1}, {name}: {rates[name][-1]:,.0f} images/s", flush=True)

layers = resolve(lecture, part)[1].layers()
operations = 2 * (3 * sum(layer.macs for layer in layers) - layers[0].macs)
peak = measure_limit(torch.device("cpu"), ()).flops["fp32"]
slowest = statistics.median(rates["the lecture's loop, no workers"])
rows = []
for name, found in rates.items():
    rate = statistics.median(found)
    spread = f"{min(found):,.0f} to {max(found):,.0f}"
    compiled = f"{compile_s[name]:.0f} s" if name in compile_s else ""
    rows.append((name, f"{rate:,.0f}", spread, f"{rate / slowest:.1f}x", f"{rate * operations / peak:.0%}", compiled))
print()
print(to_markdown(Table(("loop", "images/s", "of rounds", "ratio", "of peak", "compilation"), tuple(rows))))
print(
    f"\n{arguments.model}, {whole.name}, {arguments.images:,} images a visit, {arguments.rounds} rounds, {torch.get_num_threads()} threads,"
)
print(f"{operations / 1e6:.2f} million operations an image, peak {peak / 1e9:.0f} GFLOP/s. {environment_line(environment.capture())}")

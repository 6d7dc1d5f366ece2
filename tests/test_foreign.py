"""Weights that others trained: recognised under any names and in any wrapping, refused by name where they are no LeNet-5, never run."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lenet_deploy import load
from lenet_deploy.checkpoint import from_bytes, to_bytes
from lenet_deploy.errors import BadInput, DamagedFile
from lenet_deploy.models.config import LeNet5Config

Act, Pool = type[nn.Module], type[nn.MaxPool2d] | type[nn.AvgPool2d]


def sequential(act: Act = nn.ReLU, pool: Pool = nn.AvgPool2d, side: int = 5, pad: int = 2, bias: bool = True, of: int = 1) -> nn.Sequential:
    """A LeNet-5 as one nn.Sequential, whose tensors are 0.weight, 3.weight, 7.weight ..."""
    return nn.Sequential(
        nn.Conv2d(of, 6, 5, padding=pad, bias=bias), act(), pool(2), nn.Conv2d(6, 16, 5, bias=bias), act(), pool(2), nn.Flatten(),
        nn.Linear(16 * side * side, 120), act(), nn.Linear(120, 84), act(), nn.Linear(84, 10),
    )  # fmt: skip


class FeaturesAndClassifier(nn.Module):
    """C5 among the convolutions, as `features` and `classifier`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(16, 120, 5),
            nn.Tanh(),
        )
        self.classifier = nn.Sequential(nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.features(x).flatten(1))
        return scores


class Block(nn.Module):
    """A convolution with what follows it."""

    def __init__(self, taken: int, given: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(taken, given, 5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(torch.relu(self.conv(x)), 2)


class Blocks(nn.Module):
    """Named c1, c2, c3 (a convolution), f4, f5; defined from the last to the first, so that the order of the file says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(84, 7)
        self.f4 = nn.Linear(120, 84)
        self.c3 = nn.Conv2d(16, 120, 5)
        self.c2, self.c1 = Block(6, 16), Block(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.output(torch.relu(self.f4(torch.relu(self.c3(self.c2(self.c1(x)))).flatten(1))))
        return scores


class Tutorial(nn.Module):
    """Two convolutions and three linear layers with one pooling, for colour photographs."""

    def __init__(self, channels: tuple[int, int] = (6, 16), hidden: tuple[int, int] = (120, 84)) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, channels[0], 5), nn.Conv2d(*channels, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(channels[1] * 25, hidden[0]), nn.Linear(*hidden), nn.Linear(hidden[1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x))).flatten(1)
        scores: Tensor = self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))
        return scores


def made(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return build().eval()


Case = tuple[Callable[[], nn.Module], tuple[int, int, int], dict[str, Any]]
MODULES: dict[str, Case] = {
    "sequential, sigmoid, padded": (lambda: sequential(nn.Sigmoid), (1, 28, 28), {"activation": "sigmoid"}),
    "sequential, 28x28 not padded": (lambda: sequential(side=4, pad=0), (1, 28, 28), {}),
    "sequential, 32x32": (lambda: sequential(pad=0, pool=nn.MaxPool2d), (1, 32, 32), {"pooling": "max", "settings": {"padding": "0"}}),
    "sequential, 32x32 padded": (lambda: sequential(side=6, of=3), (3, 32, 32), {}),
    "sequential, 64x64": (lambda: sequential(side=13, pad=0), (1, 64, 64), {}),
    "sequential, 40x40": (lambda: sequential(side=7, pad=0), (1, 40, 40), {"settings": {"image_size": "40"}}),
    "sequential, convolutions without bias": (lambda: sequential(bias=False), (1, 28, 28), {}),
    "features and classifier": (FeaturesAndClassifier, (1, 32, 32), {"activation": "tanh", "settings": {"image_size": "32"}}),
    "blocks in reverse": (Blocks, (3, 32, 32), {"pooling": "max"}),
    "tutorial": (Tutorial, (3, 32, 32), {"pooling": "max"}),
    "wide tutorial": (lambda: Tutorial((32, 64)), (3, 32, 32), {}),  # lenet5-wide has these channels and max pooling
    "equal hidden sizes": (lambda: Tutorial(hidden=(10, 10)), (3, 32, 32), {"pooling": "max"}),
}
TUTORIAL: Case = MODULES["tutorial"]


def saved(value: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def arrays(tensors: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: tensor.numpy() for name, tensor in tensors.items()})
    return buffer.getvalue()


def answers_as(original: nn.Module, data: bytes, case: Case, tmp_path: Path, rtol: float = 0.0) -> tuple[str, ...]:
    """Check that what `data` loads as computes what `original` does, and return what was said of it."""
    _, shape, arguments = case
    path = tmp_path / "weights.pt"
    path.write_bytes(data)
    loaded = load(path, **arguments)
    assert loaded.preprocessing.input_shape == shape
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(loaded.module()(images), original(images), rtol=rtol, atol=rtol)
    assert from_bytes(to_bytes(loaded), "again").origin == loaded.origin, "what was inferred travels with the weights"
    return loaded.origin


@pytest.mark.parametrize("name", MODULES)
def test_a_module_under_other_names_computes_the_same(name: str, tmp_path: Path) -> None:
    original = made(MODULES[name][0])
    rounding = 1e-6 if any(isinstance(part, nn.Conv2d) and part.out_channels == 120 for part in original.modules()) else 0.0
    answers_as(original, saved(original.state_dict()), MODULES[name], tmp_path, rounding)
    answers_as(original, safetensors.torch.save(dict(original.state_dict())), MODULES[name], tmp_path, rounding)


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


WRAPPED: dict[str, Callable[[dict[str, Tensor]], bytes]] = {
    "legacy": lambda tensors: saved(tensors, zipped=False),
    "lightning": lambda tensors: saved({"epoch": 3, "state_dict": renamed("model.{}".format)(tensors), "hyper_parameters": {"lr": 0.1}}),
    "data parallel": lambda tensors: saved(OrderedDict(renamed("module.{}".format)(tensors))),
    "compiled data parallel": lambda tensors: saved(renamed("_orig_mod.module.{}".format)(tensors)),
    "training run": lambda tensors: saved({"model": tensors, "optimizer": {"state": {}, "param_groups": []}, "ema": None, "epoch": 4}),
    "net in model": lambda tensors: saved({"model": {"net": tensors}}),
    "npz": arrays,
    "npz by numbers": lambda tensors: arrays({f"arr_{number}": tensor for number, tensor in enumerate(tensors.values())}),
    "short names": lambda tensors: arrays(renamed(lambda name: name.replace(".weight", "_W").replace(".bias", "_b"))(tensors)),
    "biases first": lambda tensors: saved(dict(sorted(tensors.items(), key=lambda item: item[1].ndim))),
}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_a_wrapping_is_peeled(wrapping: str, tmp_path: Path) -> None:
    original = made(Tutorial)
    origin = answers_as(original, WRAPPED[wrapping](dict(original.state_dict())), TUTORIAL, tmp_path)
    if wrapping == "training run":
        assert "inferred: the weights under model; left aside: optimizer, ema, epoch" in origin


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_numbers_are_converted_and_said_so(dtype: torch.dtype, tmp_path: Path) -> None:
    original = made(Tutorial).to(dtype)
    data = saved(original.state_dict())
    origin = answers_as(original.float(), data, TUTORIAL, tmp_path)
    assert any(str(dtype).removeprefix("torch.") in line and "conv1.weight" in line for line in origin)


def test_what_is_inferred_and_what_is_assumed_is_said(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(sequential().state_dict(), path)
    loaded = load(path)
    assert loaded.config == LeNet5Config(in_channels=1, image_size=28, padding=2)
    assert loaded.origin == (
        "inferred: channels 6,16, hidden 120,84, 10 classes, 1 input channel, by the shapes",
        "inferred: layers conv1 = 0.weight, conv2 = 3.weight, fc1 = 7.weight, fc2 = 9.weight, fc3 = 11.weight",
        "assumed: pooling avg",
        "assumed: activation relu",
        "assumed: image_size 28",
        "assumed: padding 2",
        "assumed: pixels from 0 to 1",
    )
    told = load(path, pooling="max", activation="tanh", mean=0.1307, std=[0.3081], settings={"image_size": "32"}, border=2)
    assert [line for line in told.origin if line.startswith("assumed")] == []
    assert (told.config.pooling, told.config.activation) == ("max", "tanh")  # type: ignore[union-attr]
    assert (told.preprocessing.mean, told.preprocessing.std) == ((0.1307,), (0.3081,))
    assert (told.preprocessing.resize, told.preprocessing.padding) == (28, 2)


@settings(max_examples=25, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    hidden=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    classes=st.integers(2, 12),
    in_channels=st.sampled_from([1, 3]),
    side=st.sampled_from([1, 2, 3, 4, 5, 6, 9, 10]),
    seed=st.integers(0, 2**16),
)
def test_tensors_in_any_order_are_put_right_or_refused_as_ambiguous(
    channels: tuple[int, int], hidden: tuple[int, int], classes: int, in_channels: int, side: int, seed: int
) -> None:
    sizes = [in_channels, *channels, *hidden, classes]
    shapes = [
        (sizes[1], in_channels, 5, 5),
        (sizes[2], sizes[1], 5, 5),
        (hidden[0], sizes[2] * side**2),
        hidden[::-1],
        (classes, hidden[1]),
    ]
    noise = torch.Generator().manual_seed(seed)
    layers = {f"{name}.{part}": torch.randn(shape if part == "weight" else shape[:1], generator=noise)
              for name, shape in zip("vqxaz", shapes, strict=True) for part in ("weight", "bias")}  # fmt: skip
    names = list(layers)
    shuffled = {names[index]: layers[names[index]] for index in torch.randperm(len(names), generator=noise)}
    try:
        found = from_bytes(saved(shuffled), "a file")
    except DamagedFile as error:
        assert "could each be the other" in str(error)
        return
    for name, layer in zip("vqxaz", ("conv1", "conv2", "fc1", "fc2", "fc3"), strict=True):
        assert torch.equal(found.weights[f"{layer}.weight"], layers[f"{name}.weight"])
        assert torch.equal(found.weights[f"{layer}.bias"], layers[f"{name}.bias"])


def tutorial(**changes: Tensor | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor | None] = {**made(Tutorial).state_dict(), **{name.replace("__", "."): new for name, new in changes.items()}}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def swapped_layout() -> dict[str, Tensor]:
    return {name: tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor for name, tensor in tutorial().items()}


def ambiguous() -> dict[str, Tensor]:
    tensors = made(lambda: Tutorial(hidden=(10, 10))).state_dict()
    return {name.replace("fc2", "middle").replace("fc3", "last"): tensor for name, tensor in tensors.items()}


class Normalised(nn.Sequential):
    """Batch normalisation after the first convolution."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 6, 5), nn.BatchNorm2d(6), *list(sequential(of=3).children())[1:])


REFUSED: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "batch normalisation": (lambda: Normalised().state_dict(), r"1\.running_mean is of a batch normalisation.*fuse_conv_bn_eval"),
    "a normalisation without statistics": (lambda: tutorial(norm__weight=torch.ones(6), norm__bias=torch.ones(6)), r"norm\.weight.*unexp"),
    "group normalisation in place of biases": (
        lambda: tutorial(conv1__bias=None, conv2__bias=None, norm__weight=torch.ones(6), norm__bias=torch.ones(6)),
        r"norm\.weight \(6,\)",
    ),
    "another convolution": (lambda: tutorial(conv3__weight=torch.ones(16, 16, 5, 5)), r"3 convolutions and 3 linear.*conv3\.weight \(16"),
    "another linear layer": (lambda: tutorial(fc4__weight=torch.ones(10, 10)), r"2 convolutions and 4 linear.*fc4\.weight \(10, 10\)"),
    "3x3 kernels": (lambda: tutorial(conv2__weight=torch.ones(16, 6, 3, 3)), r"conv2\.weight \(16, 6, 3, 3\).*5x5"),
    "TensorFlow's layout": (swapped_layout, r"conv1\.weight \(5, 5, 3, 6\).*permute TensorFlow's layout"),
    "NaN": (lambda: tutorial(fc1__bias=torch.full((120,), float("nan"))), r"fc1\.bias holds NaN"),
    "beyond float32": (lambda: tutorial(fc1__bias=torch.full((120,), 1e300, dtype=torch.float64)), r"fc1\.bias holds NaN or infinity"),
    "whole numbers": (lambda: tutorial(fc1__bias=torch.ones(120, dtype=torch.int8)), r"fc1\.bias \(120,\).*int8"),
    "complex numbers": (lambda: tutorial(fc1__bias=torch.ones(120, dtype=torch.complex64)), r"fc1\.bias \(120,\).*complex64"),
    "an empty tensor": (lambda: tutorial(fc1__bias=torch.ones(0)), r"fc1\.bias \(0,\).*empty"),
    "a scalar": (lambda: tutorial(fc1__bias=torch.tensor(1.0)), r"fc1\.bias \(\)"),
    "a sparse tensor": (lambda: tutorial(fc1__weight=torch.ones(120, 400).to_sparse()), r"fc1\.weight is not a plain dense tensor"),
    "one number as a thousand million": (lambda: tutorial(fc1__weight=torch.ones(1).expand(10**9)), r"fc1\.weight \(10{9},\).*at most"),
    "a bias of another length": (lambda: tutorial(fc1__bias=torch.ones(84)), r"fc1\.bias \(84,\).*unexpected"),
    "one bias missing": (lambda: tutorial(fc1__bias=None), r"missing fc1\.bias, where fc2\.weight has a bias"),
    "one layer missing": (lambda: tutorial(fc1__weight=None, fc1__bias=None), r"2 convolutions and 2 linear"),
    "layers that do not chain": (lambda: tutorial(fc2__weight=torch.ones(84, 100)), r"no order of its layers.*fc2\.weight \(84, 100\)"),
    "four channels": (lambda: tutorial(conv1__weight=torch.ones(6, 4, 5, 5)), r"from 1 or 3 channels on.*conv1\.weight \(6, 4"),
    "equal layers without numbers": (ambiguous, r"middle\.weight and last\.weight could each be the other.*number their names"),
    "one class": (lambda: tutorial(fc3__weight=torch.ones(1, 84), fc3__bias=torch.ones(1)), r"classes = 1 is not"),
    "both convolutions padded": (lambda: sequential(side=7).state_dict(), r"7x7.*28x28.*both convolutions are padded.*image_size=40"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_lenet5_is_refused_by_name(what: str) -> None:
    build, words = REFUSED[what]
    with pytest.raises(BadInput, match=words) as caught:
        from_bytes(saved(build()), "some.file")
    assert str(caught.value).startswith("some.file: ")


def huge_header() -> bytes:
    header = b'{"conv1.weight":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4000000000000000000]}}'
    return len(header).to_bytes(8, "little") + header + bytes(64)


def huge_array() -> bytes:
    """A `.npz` whose array promises 4 TB."""
    import zipfile

    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("conv1.npy", head.getvalue() + bytes(64))
    return buffer.getvalue()


def bomb() -> bytes:
    """An archive of which few bytes unpack to many."""
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open("conv1.npy", "w") as member:
        for _ in range(33):
            member.write(bytes(10**6))
    return buffer.getvalue()


@pytest.mark.parametrize("data", [huge_header(), huge_header()[:40], huge_array(), saved(tutorial())[:-200], arrays(tutorial())[:5000]])
def test_a_file_that_promises_more_than_it_holds_is_damaged(data: bytes) -> None:
    with pytest.raises(DamagedFile, match=r"^some\.file: "):
        from_bytes(data, "some.file")


def test_an_archive_that_unpacks_to_more_than_any_lenet5_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lenet_deploy.state_dicts.MAX_BYTES", 32 * 10**6)
    with pytest.raises(DamagedFile, match="unpacks to more than 32,000,000 bytes"):
        from_bytes(bomb(), "some.file")


class Payload(nn.Module):
    """A module that runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        super().__init__()
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: {"model": module, "epoch": 1}], ids=["alone", "in a dict"])
def test_a_whole_module_is_refused_with_the_code_that_saves_its_weights_and_nothing_runs(wrap: Any, tmp_path: Path) -> None:
    path, marker = tmp_path / "module.pt", tmp_path / "marker"
    for value in (Payload(marker), Tutorial()):
        torch.save(wrap(value), path)
        with pytest.raises(DamagedFile) as caught:
            load(path)
        assert str(caught.value).splitlines()[1:] == [
            "  import torch",
            "  model = torch.load('module.pt', weights_only=False)  # and ['model'] or the like, if that gives a dict",
            "  torch.save(model.state_dict(), 'weights.pt')",
        ]
    assert not marker.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pooling": "median"}, "pooling = 'median' is not one of avg, max"),
        ({"activation": "gelu"}, "activation = 'gelu' is not one of relu, tanh, sigmoid"),
        ({"pooling": "max", "settings": {"pooling": "max"}}, "pooling is given twice"),
        ({"mean": 0.5}, "--mean and --std go together"),
        ({"mean": 33.3, "std": 78.6}, "mean 33.3 is beyond pixels from 0 to 1; divide by 255"),
        ({"mean": 0.1, "std": 78.6}, "std 78.6 is not above 0 and at most 2"),
        ({"mean": float("nan"), "std": 1}, "mean nan"),
        ({"mean": 0.5, "std": 0}, "std 0 is not above 0"),
        ({"mean": (0.5, 0.5), "std": 0.5}, "mean 0.5,0.5 is 2 numbers, for 3 channels"),
        ({"mean": (), "std": 0.5}, "mean  is 0 numbers"),
        ({"border": 16}, "border is 16"),
        ({"border": -1}, "border is -1"),
        ({"settings": {"channels": "8,16"}}, "--set channels contradicts the shapes"),
        ({"settings": {"image_size": "36"}}, "--set image_size or padding contradicts the shapes"),
        ({"settings": {"image_size": "31"}}, "layer pool1"),
        ({"settings": {"depth": "3"}}, "unknown config key 'depth'"),
        ({"model": "lenet5-1998"}, "do not fit lenet5-1998: missing c1.bias"),
    ],
)
def test_what_is_said_wrongly_is_refused(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(tutorial(), path)
    with pytest.raises(BadInput) as caught:
        load(path, **arguments)
    assert words in str(caught.value)


@pytest.mark.parametrize("arguments", [{"pooling": "max"}, {"activation": "tanh"}, {"mean": 0.5, "std": 0.5}, {"border": 2}])
def test_what_would_have_no_effect_is_refused(arguments: dict[str, Any], tmp_path: Path) -> None:
    torch.save(tutorial(), tmp_path / "weights.pt")
    (tmp_path / "own.safetensors").write_bytes(to_bytes(load(tmp_path / "weights.pt")))
    with pytest.raises(BadInput, match=r"carries its own model and config; leave out .*--pooling.*--mean"):
        load(tmp_path / "own.safetensors", **arguments)
    if not {"pooling", "activation"} & arguments.keys():
        with pytest.raises(BadInput, match="for weights that others trained"):
            load("lenet5", **arguments)

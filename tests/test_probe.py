"""What shapes cannot say is found on labelled images, or said to be unclear; and how the command line says it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from lenet_deploy.cli import build
from lenet_deploy.cli.errors import run

from lenet_deploy import train
from lenet_deploy.checkpoint import Checkpoint, load, recognise, to_bytes
from lenet_deploy.data import Dataset
from lenet_deploy.errors import BadInput, Inconclusive
from lenet_deploy.models import initialise
from lenet_deploy.models.config import ACTIVATIONS, POOLINGS, LeNet5Config
from lenet_deploy.probing import FIRST, Reading, probe, race, readings, usual_scalings, verdict
from lenet_deploy.records import Preprocessing

TRAINED = {"in_channels": "1", "image_size": "20", "channels": "6,10", "hidden": "24,16", "pooling": "max", "activation": "tanh"}
NAMES = {"conv1": "0", "conv2": "3", "fc1": "7", "fc2": "9", "fc3": "11"}


@pytest.fixture(scope="module")
def theirs(digits: Dataset) -> Checkpoint:
    """A small network with tanh and max pooling, trained on the digits with pixels from 0 to 1."""
    return train.train(train.TrainConfig("lenet5", TRAINED, epochs=8, device="cpu"), digits)


@pytest.fixture(scope="module")
def weights(theirs: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bare tensors under other names."""
    path = tmp_path_factory.mktemp("theirs") / "weights.pt"
    torch.save({NAMES[name.partition(".")[0]] + "." + name.partition(".")[2]: tensor for name, tensor in theirs.weights.items()}, path)
    return path


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    path = tmp_path / "untrained.pt"
    torch.save(initialise("lenet5", LeNet5Config(in_channels=1, image_size=20, channels=(6, 10), hidden=(24, 16)), 5).state_dict(), path)
    return path


def test_the_probe_finds_what_the_weights_were_trained_with(theirs: Checkpoint, weights: Path, digits: Dataset) -> None:
    steps: list[tuple[int, int]] = []
    found = probe(weights, digits, progress=lambda done, total, what: steps.append((done, total)))
    assert found.config == theirs.config
    assert found.preprocessing == dataclasses.replace(theirs.preprocessing, mean=(0.0,), std=(1.0,))
    assert [line.partition(":")[0] for line in found.origin] == ["inferred", "inferred", "probed"], "nothing is assumed"
    assert "probed: --pooling max --activation tanh --mean 0 --std 1: right on 9" in found.origin[-1]
    assert "training images of digits; next best --pooling" in found.origin[-1]
    assert steps[:24] == [(done, 24) for done in range(24)]
    assert probe(weights, digits).provenance == found.provenance, "the same every time"


def test_what_is_given_is_left_alone(weights: Path, digits: Dataset) -> None:
    found = probe(weights, digits, pooling="max", mean=0.0, std=1.0)
    assert "probed: --activation tanh: right on" in found.origin[-1]
    with pytest.raises(BadInput, match="nothing is open"):
        probe(weights, digits, pooling="max", activation="tanh", mean=0.0, std=1.0)


def test_weights_that_learned_nothing_have_no_lucky_winner(untrained: Path, digits: Dataset) -> None:
    with pytest.raises(
        Inconclusive, match=r"untrained\.pt, on training images of digits: none of 24 .* is clearly right on 4\d %.*the best,"
    ):
        probe(untrained, digits)


def test_the_test_split_is_not_looked_at(weights: Path, digits: Dataset) -> None:
    hidden = dataclasses.replace(digits, test_images=torch.zeros_like(digits.test_images), test_labels=torch.zeros_like(digits.test_labels))
    assert probe(weights, hidden).provenance == probe(weights, digits).provenance


def test_every_open_combination_is_tried_the_default_first(weights: Path, digits: Dataset) -> None:
    adopted = recognise(weights)
    found = readings(adopted, digits, None)
    assert len({(reading.config, reading.preprocessing) for reading in found}) == len(found) == len(POOLINGS) * len(ACTIVATIONS) * 4
    assumed = load(weights)
    assert (found[0].config, found[0].preprocessing) == (assumed.config, assumed.preprocessing)


def test_images_of_28_pixels_leave_three_ways_into_32(tmp_path: Path, digits: Dataset) -> None:
    torch.save(initialise("lenet5", LeNet5Config(in_channels=1, image_size=28, padding=2)).state_dict(), tmp_path / "weights.pt")
    pixels = torch.zeros(40, 1, 28, 28, dtype=torch.uint8)
    large = dataclasses.replace(digits, train_images=pixels, train_labels=torch.zeros(40, dtype=torch.int64))
    found = readings(recognise(tmp_path / "weights.pt", settings={"pooling": "avg", "activation": "relu"}), large, None)
    ways = {(reading.config.image_size, reading.preprocessing.padding, reading.preprocessing.resize) for reading in found}
    assert ways == {(28, 0, 28), (32, 0, 32), (32, 2, 28)}
    assert any("--set image_size=32 --set padding=0 --border 2" in str(reading) for reading in found)


def test_the_usual_scalings_hold_the_training_splits_own(digits: Dataset) -> None:
    own = usual_scalings(digits, 3)[1]
    pixels = digits.train_images.double() / 255
    assert own == ((round(float(pixels.mean()), 4),) * 3, (round(float(pixels.std(correction=0)), 4),) * 3)


TRUTH = torch.arange(1000) % 10


SCATTERED = torch.randperm(1000, generator=torch.Generator().manual_seed(0))


def wrong_on(count: int, start: int = 0) -> torch.Tensor:
    """Answers of which `count` are wrong, scattered over the images; with a larger count they are wrong on the same ones and on others."""
    places, answers = SCATTERED[start : start + count], TRUTH.clone()
    answers[places] = (answers[places] + 1) % 10
    return answers


def reading(word: str) -> Reading:
    return Reading(LeNet5Config(), Preprocessing(3, 32, 0, (0.0,), (1.0,)), (f"--pooling {word}", "--mean 0 --std 1"))


def raced(*answers: torch.Tensor) -> tuple[tuple[str, ...], list[int]]:
    """The verdict over readings with these answers, and how many images each saw."""

    def of(indices: Sequence[int], part: slice) -> Iterator[tuple[int, torch.Tensor]]:
        return ((index, answers[index][part]) for index in indices)

    best, scores = race(of, TRUTH, len(answers))
    lines = verdict([reading(str(index)) for index in range(len(answers))], scores, best, TRUTH, "a file", "digits")
    return lines, [len(scores[index].answers) for index in range(len(answers))]


def test_what_is_clearly_beaten_sees_no_more_images() -> None:
    lines, seen = raced(wrong_on(400), wrong_on(30), wrong_on(39))
    assert seen == [FIRST, 1000, 1000]
    assert lines[0].startswith("--pooling 1 --mean 0 --std 1: right on 97.00 % of 1,000 training images of digits; next best --pooling 2")


def test_of_equal_answers_the_first_is_taken_and_the_others_are_named() -> None:
    lines, _ = raced(wrong_on(400), wrong_on(30), wrong_on(30))
    assert lines[0].startswith("--pooling 1 ")
    assert lines[0].endswith("; the same answers by --pooling 2 --mean 0 --std 1")


@pytest.mark.parametrize(
    "rival", [wrong_on(30, start=900), wrong_on(33), wrong_on(29)], ids=["as often right", "little worse", "little better"]
)
def test_two_that_are_nearly_as_good_are_no_clear_winner(rival: torch.Tensor) -> None:
    with pytest.raises(
        Inconclusive, match=r"^a file, on .*digits: no clear winner among 3 .* \(p = .*; 0\.02 would decide\); say --pooling"
    ) as caught:
        raced(wrong_on(400), wrong_on(30), rival)
    choices = str(caught.value).rpartition("; say ")[2]
    assert sorted(choices.split(" or ")) == ["--pooling 1", "--pooling 2"], "only what differs"


@pytest.mark.parametrize("what", ["lenet5", "own.safetensors", "."])
def test_a_probe_of_what_says_all_of_it_is_refused(
    what: str, theirs: Checkpoint, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.safetensors").write_bytes(to_bytes(theirs))
    with pytest.raises(BadInput, match=r"leave out --probe|leave it out"):
        probe(what, digits)


def test_a_data_set_with_more_classes_is_refused(weights: Path, digits: Dataset) -> None:
    with pytest.raises(BadInput, match=r"digits has 11 classes and .* 10"):
        probe(weights, dataclasses.replace(digits, labels=(*digits.labels, "ten")))


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lenet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """`lenet-deploy ARGS...` in this process and in an empty folder: exit code, output, and what else was said."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lenet-deploy", *map(str, arguments)])
        capsys.readouterr()
        code = run(build())
        return (code, *capsys.readouterr())

    return call


def test_export_says_what_it_found_and_the_bundle_keeps_it(lenet: Run, weights: Path, digits: Dataset) -> None:
    export = ("export", weights, "--to", "torchscript", "--device", "cpu", "--out")
    code, _, err = lenet(*export, "probed", "--probe", "digits")
    said = err.splitlines()[1:]
    assert (code, [line.partition(":")[0] for line in said]) == (0, ["inferred", "inferred", "probed"])
    code, out, _ = lenet("inspect", "probed")
    assert (code, out.splitlines()[-3:]) == (0, said)
    code, _, err = lenet(*export, "told", "--pooling", "max", "--activation", "tanh", "--mean", "0", "--std", "1", "--quiet")
    assert (code, err) == (0, "")
    bundles = [load(Path(name) / "checkpoint.safetensors") for name in ("probed", "told")]
    assert bundles[0].metadata() == bundles[1].metadata()


def test_export_ends_with_4_where_the_images_do_not_tell(lenet: Run, untrained: Path, tmp_path: Path) -> None:
    code, out, err = lenet("export", untrained, "--probe", "digits", "--out", "bundle")
    assert (code, out) == (4, "")
    assert err.startswith("error: ")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("lenet5", "--probe", "digits"), "leave it out"),
        (("lenet5", "--mean", "0.5", "--std", "0.5"), "for weights that others trained"),
        (("own.safetensors", "--pooling", "max"), "carries its own"),
        (("own.safetensors", "--probe", "digits"), "carries its own"),
        (("weights.pt", "--mean", "half", "--std", "1"), "--mean 'half' is not one number"),
        (("weights.pt", "--mean", "0.5,", "--std", "1"), "empty part"),
        (("weights.pt", "--probe", "digit"), "unknown data set 'digit'"),
        (("weights.pt", "--data-dir", "data"), "go with --data"),
    ],
)
def test_what_export_cannot_use_is_bad_input(
    arguments: tuple[str, ...], words: str, lenet: Run, weights: Path, theirs: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "own.safetensors").write_bytes(to_bytes(theirs))
    (tmp_path / "weights.pt").write_bytes(weights.read_bytes())
    code, out, err = lenet("export", *arguments, "--out", "bundle")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err

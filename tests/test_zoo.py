"""The weights that come with the package: they are what their cards say, by running them."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources

import pytest

from lenet_deploy import zoo
from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.data import Dataset, fingerprint, load_dataset
from lenet_deploy.errors import BadInput, UnknownName
from lenet_deploy.evaluation import evaluate
from lenet_deploy.recipes import find_recipe
from lenet_deploy.report.zoo import accuracy_of, card, zoo_table
from lenet_deploy.sources import load
from lenet_deploy.zoo import ZOO, Trained

each = pytest.mark.parametrize("trained", ZOO, ids=lambda trained: trained.name)


@each
def test_the_file_and_its_card_agree(trained: Trained) -> None:
    checkpoint = zoo.load(trained.name)
    assert (checkpoint.model, checkpoint.dataset) == (trained.model, trained.dataset)
    folder = resources.files("lenet_deploy.zoo")
    assert folder.joinpath(f"{trained.name}.md").read_text() == card(trained.name, checkpoint)


@each
def test_the_recipe_on_the_card_is_still_what_it_was(trained: Trained) -> None:
    told = zoo.load(trained.name).provenance
    config = asdict(find_recipe(told["recipe"]).config(trained.model, trained.dataset, seed=told["seed"]))
    deciding = config.keys() - {"model", "device"}
    assert {key: told[key] for key in deciding} == {key: config[key] for key in deciding} | {"milestones": list(config["milestones"])}


@each
def test_the_accuracy_on_the_card_is_measured_again(trained: Trained, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("cifar10_root" if trained.dataset == "cifar10" else "idx_root")
    dataset: Dataset = load_dataset(trained.dataset, folder)
    checkpoint = zoo.load(trained.name)
    assert fingerprint(dataset) == checkpoint.provenance["data_sha256"]
    row = evaluate(trained.name, dataset, device="cpu").rows[0]
    accuracy, low, high = accuracy_of(checkpoint)
    assert row.images == checkpoint.provenance["test_images"]
    assert row.accuracy == pytest.approx(accuracy, abs=0.03), "another machine rounds otherwise, which may turn three images of 10,000"
    assert low < row.accuracy < high


def test_names_are_neither_models_nor_each_other() -> None:
    from lenet_deploy.models import MODELS

    names = [*zoo.names(), *(model.name for model in MODELS)]
    assert len(set(names)) == len(names)
    assert zoo.DEFAULT in zoo.names()


def test_a_name_loads_as_a_file_does_and_cannot_be_changed() -> None:
    found: Checkpoint = load("lenet5-mnist")
    assert found.metadata() == zoo.load("lenet5-mnist").metadata()
    with pytest.raises(BadInput, match="leave out --model, --set"):
        load("lenet5-mnist", settings={"pooling": "max"})


def test_a_mistyped_name_offers_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean lenet5-mnist"):
        zoo.load("lenet5-mnits")
    with pytest.raises(UnknownName, match=r"did you mean .*lenet5-cifar10"):
        load("lenet5-cifar")


def test_the_list_has_a_row_a_name() -> None:
    table = zoo_table([(name, zoo.load(name)) for name in zoo.names()])
    assert [row[0] for row in table.rows] == list(zoo.names())
    assert all(row[3].endswith(" %") for row in table.rows)


def test_labels_are_the_classes_names() -> None:
    assert zoo.load("lenet5-cifar10").labels[3] == "cat"
    assert zoo.load("lenet5-fashion-mnist").labels[9] == "ankle boot"
    assert json.dumps(dict(zoo.load("lenet5-mnist").provenance)), "plain values"

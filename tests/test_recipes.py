"""TrainConfig, recipes, schedules, and their TOML."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from lenet_deploy.errors import BadInput, UnknownName
from lenet_deploy.recipes import RECIPES, TrainConfig, config_from_toml, config_from_values, find_recipe

LECTURE = find_recipe("lecture").config("lenet5", "mnist")


def test_the_lectures_recipe_is_the_lectures() -> None:
    expected = {"optimizer": "adam", "lr": 0.001, "schedule": "multistep", "milestones": (75, 150), "gamma": 0.5, "epochs": 200}
    assert {name: getattr(LECTURE, name) for name in expected} == expected
    assert (LECTURE.crop, LECTURE.flip, LECTURE.label_smoothing, LECTURE.weight_decay) == (0, False, 0.0, 0.0)


def test_multistep_follows_torchs_scheduler() -> None:
    steps = 3
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=LECTURE.lr)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(LECTURE.milestones), LECTURE.gamma)
    for epoch in range(LECTURE.epochs):
        assert LECTURE.lr_at(epoch * steps, steps) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_one_cycle_rises_to_the_peak_and_falls_to_nearly_nothing() -> None:
    config = TrainConfig(epochs=10, schedule="one-cycle", warmup=0.3, lr=0.01)
    rates = [config.lr_at(step, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.01 * 0.04)
    assert rates[30] == max(rates) == pytest.approx(0.01)
    assert all(one < other for one, other in itertools.pairwise(rates[:31]))
    assert all(one > other for one, other in itertools.pairwise(rates[30:]))
    assert 0 < rates[-1] < 0.01 / 100


def test_a_cycle_without_warm_up_begins_at_the_peak() -> None:
    assert TrainConfig(warmup=0.0, lr=0.01).lr_at(0, 10) == pytest.approx(0.01)


def test_constant_is_constant() -> None:
    assert {TrainConfig(schedule="constant", lr=0.5).lr_at(step, 7) for step in range(100)} == {0.5}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("data", ["digits", "mnist", "fashion-mnist", "cifar10", "my"])
def test_every_recipe_survives_its_toml(recipe: Any, data: str) -> None:
    config = recipe.config("lenet5-wide", data, settings={"classes": "4"}, seed=3)
    assert config_from_toml(config.to_toml(), "here") == config
    assert config.recipe == recipe.name


def test_what_is_given_goes_before_the_recipe() -> None:
    assert find_recipe("lecture").config("lenet5", "mnist", epochs=3).epochs == 3


def test_what_toml_leaves_out_is_the_default() -> None:
    assert config_from_toml("epochs = 3\nlr = 1\n", "here") == TrainConfig(epochs=3, lr=1.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochs", "here: not TOML"),
        ("epoch = 3", "unknown setting 'epoch'; did you mean epochs"),
        ("epochs = 'three'", "epochs = 'three' is no int"),
        ("epochs = true", "epochs = True is no int"),
        ("flip = 1", "flip = 1 is no bool"),
        ("milestones = ['a']", "milestones = .* is no tuple"),
        ("settings = 3", "settings = 3 is no dict"),
    ],
)
def test_wrong_toml_is_one_message(text: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        config_from_toml(text, "here")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": "lion"}, "optimizer is 'lion'; it must be one of adam"),
        ({"schedule": "step"}, "schedule is 'step'"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"warmup": -0.1}, "warmup is -0.1"),
        ({"label_smoothing": 1.0}, "label-smoothing is 1.0"),
        ({"weight_decay": -1.0}, "weight-decay is -1.0"),
        ({"weight_decay": float("nan")}, "weight-decay is nan"),
        ({"gamma": 0.0}, "gamma is 0.0"),
        ({"crop": 9}, "crop is 9"),
        ({"crop": -1}, "crop is -1"),
        ({"milestones": (150, 75)}, "milestones are 150, 75"),
        ({"milestones": (0,)}, "milestones are 0"),
    ],
)
def test_values_that_make_no_training_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        TrainConfig(**changes)


def test_an_unknown_recipe_offers_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean lecture"):
        find_recipe("lectur")


def test_values_read_from_json_are_the_same_config() -> None:
    values = dataclasses.asdict(LECTURE)
    assert config_from_values({**values, "milestones": list(values["milestones"])}, "here") == LECTURE

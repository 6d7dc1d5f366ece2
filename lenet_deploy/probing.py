"""What the shapes of foreign weights cannot say, found out on labelled images: every combination is scored, the clear winner taken.

How sure a winner has to be is in docs/decisions/0011-foreign-checkpoints.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lenet_deploy.errors import BadInput, Inconclusive
from lenet_deploy.models import find_model
from lenet_deploy.order_statistics import mcnemar_exact, wilson_ci95
from lenet_deploy.records import Preprocessing
from lenet_deploy.sources import existing, known_names, pixels_of, said

if TYPE_CHECKING:
    import torch

    from lenet_deploy.checkpoint import Checkpoint
    from lenet_deploy.data import Dataset
    from lenet_deploy.foreign import Adopted, Pixels
    from lenet_deploy.models.config import ModelConfig

SAMPLE = 5000  # images at most, of the training split: the test split stays unseen, so that evaluate on it means something later
SEED = 0  # of the sample
FIRST = 500  # of it every combination sees; those that are clearly beaten on these see no more
BATCH = 64  # images, few enough that what a convolution makes of them stays in the caches
SURE = 0.05  # chance, over all comparisons with the best, that one as good as it is called beaten
LEARNED = 1 / 3  # of the way from the share of the commonest class to 1, which the best has to pass: random weights were seen to reach 0.2

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Reading:
    """One way to use the weights.

    Attributes:
        options: what says so on the command line, one for each thing that was open.
    """

    config: ModelConfig
    preprocessing: Preprocessing
    options: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.options)


@dataclass(frozen=True, eq=False)
class Score:
    """What a reading answered.

    Attributes:
        answers: int64 (N,), the top class of the first N images of the sample.
        correct: of them.
        p: McNemar's exact test against the best reading on the same images.
    """

    answers: torch.Tensor
    correct: int
    p: float = 1.0

    def __str__(self) -> str:
        return f"{100 * self.correct / len(self.answers):.2f} % of {len(self.answers):,}"


def probe(
    what: str | Path,
    dataset: Dataset,
    *,
    model: str | None = None,
    settings: Mapping[str, str] | None = None,
    pooling: str | None = None,
    activation: str | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    border: int | None = None,
    progress: Progress = lambda done, total, what: None,
) -> Checkpoint:
    """Foreign weights with the pooling, activation, image size and normalisation by which they are right most often.

    Args:
        what: a file, as in `load`; so are the other arguments, each of which leaves less open.
        dataset: what the weights were trained on. Up to SAMPLE images of its training split are used, and none of its test split.
        progress: called with combinations tried, their number, and what is at work.

    Raises:
        BadInput: as `load`; or nothing is open, or the data set has more classes than the weights.
        Inconclusive: no combination is clearly better than every other that answers differently, or none is much better than chance.
    """
    from lenet_deploy import checkpoint

    given, pixels = said(settings, pooling, activation), pixels_of(mean, std, border)
    if str(what) in known_names() or existing(what).is_dir():
        raise BadInput(f"{what}: --probe is for a file of weights that others trained; leave it out")
    path = existing(what)
    adopted = checkpoint.recognise(path, model, given)
    classes = adopted.configs[0].classes
    if len(dataset.labels) > classes:
        raise BadInput(f"{dataset.name} has {len(dataset.labels)} classes and {path} {classes}; probe on the data set it was trained on")
    found = readings(adopted, dataset, pixels)
    if len(found) == 1:
        raise BadInput(f"{path}: nothing is open that images could tell; leave out --probe")
    images, truth = sample(dataset)
    best, scores = race(answering(adopted, found, images, progress), truth, len(found))
    lines = verdict(found, scores, best, truth, str(path), dataset.name)
    winner = found[best]
    loaded = checkpoint.foreign_checkpoint(dataclasses.replace(adopted, configs=(winner.config,)))
    provenance = {**loaded.provenance, "assumed": [], "probed": list(lines)}
    labels = dataset.labels if len(dataset.labels) == classes else loaded.labels
    return dataclasses.replace(loaded, preprocessing=winner.preprocessing, labels=labels, provenance=provenance)


def readings(adopted: Adopted, dataset: Dataset, pixels: Pixels | None) -> tuple[Reading, ...]:
    """Every combination of what is open, what `load` would assume first."""
    from lenet_deploy.data import make_preprocessing, preprocessing_for
    from lenet_deploy.foreign import Pixels, listed

    given, range_ = pixels or Pixels(), find_model(adopted.model).pixel_range
    channels = adopted.configs[0].in_channels
    own = make_preprocessing(1, adopted.configs[0].image_size, range_)
    usual = dict.fromkeys(((own.mean, own.std), *usual_scalings(dataset, channels)))
    scalings = [given] if given.mean else [dataclasses.replace(given, mean=mean, std=std) for mean, std in usual]
    found = []
    for config in adopted.configs:
        plain = make_preprocessing(channels, config.image_size, range_)
        fitting = preprocessing_for(dataset, channels, config.image_size, range_).padding
        borders = (0,) if not fitting else (0, fitting)
        for border in borders if given.border is None else (given.border,):
            for scaling in scalings:
                options = [f"--{key} {getattr(config, key)}" for key in ("pooling", "activation") if key in adopted.left_open]
                if "image_size" in adopted.left_open:
                    options.append(" ".join(f"--set {key}={getattr(config, key)}" for key in ("image_size", "padding")))
                if given.border is None:
                    options.append(f"--border {border}")
                if not given.mean and scaling.mean and scaling.std:
                    options.append(f"--mean {listed(scaling.mean)} --std {listed(scaling.std)}")
                preprocessing = dataclasses.replace(scaling, border=border).applied(plain)
                found.append(Reading(config, preprocessing, tuple(options)))
    several = [len(set(column)) > 1 for column in zip(*(reading.options for reading in found), strict=True)]
    return tuple(dataclasses.replace(reading, options=tuple(itertools.compress(reading.options, several))) for reading in found)


def usual_scalings(dataset: Dataset, channels: int) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]:
    """Means and standard deviations that people normalise by, per channel.

    Pixels from 0 to 1, as torchvision's ToTensor leaves them; by the training split's own to four digits, as tutorials have them; 0.5 and
    0.5, which makes them -1 to 1; and from 0 to 255, as files have them.
    """
    import torch

    from lenet_deploy.data import fit

    side = max(dataset.train_images.shape[2:])
    images = fit(dataset.train_images, Preprocessing(channels, side, 0, (0.0,), (1.0,)))
    values = torch.arange(256, dtype=torch.float64) / 255
    moments = []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = float(share @ values)
        moments.append((round(mean, 4), round(math.sqrt(float(share @ (values - mean).square())), 4)))
    own = tuple(mean for mean, _ in moments), tuple(max(std, 1e-4) for _, std in moments)
    return ((0.0,), (1.0,)), own, ((0.5,), (0.5,)), ((0.0,), (1 / 255,))


def sample(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (N, C, H, W) and labels int64 (N,) of the training split, in an order that is always the same."""
    import torch

    order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(SEED))[:SAMPLE]
    return dataset.train_images[order], dataset.train_labels[order]


Answering = Callable[[Sequence[int], slice], Iterator[tuple[int, "torch.Tensor"]]]


def answering(adopted: Adopted, found: Sequence[Reading], images: torch.Tensor, progress: Progress) -> Answering:
    """What gives the top classes, int64, of some images by some of the readings, each kind of input made once."""
    import torch

    from lenet_deploy.data import fit, normalise
    from lenet_deploy.models import initialise

    modules = {}
    for config in adopted.configs:
        modules[config] = initialise(adopted.model, config)
        modules[config].load_state_dict(dict(adopted.weights))

    def answers(indices: Sequence[int], part: slice) -> Iterator[tuple[int, torch.Tensor]]:
        done = 0
        for preprocessing in dict.fromkeys(found[index].preprocessing for index in indices):
            pixels = normalise(fit(images[part], preprocessing), preprocessing)
            for index in (index for index in indices if found[index].preprocessing == preprocessing):
                progress(done, len(indices), f"probe: {found[index]}")
                with torch.inference_mode():
                    yield index, torch.cat([modules[found[index].config](batch).argmax(dim=1) for batch in pixels.split(BATCH)])
                done += 1

    return answers


def race(answers: Answering, truth: torch.Tensor, count: int) -> tuple[int, dict[int, Score]]:
    """The best reading and every reading's score; a reading that is clearly beaten sees no more images.

    Args:
        truth: int64 (N,).
        count: of readings. Of equals the first is the best.
    """
    import torch

    scores: dict[int, Score] = {}
    running, best = list(range(count)), 0
    for part in (slice(0, FIRST), slice(FIRST, len(truth))):
        if not len(truth[part]):
            break
        for index, more in answers(running, part):
            seen = torch.cat([scores[index].answers, more]) if index in scores else more
            scores[index] = Score(seen, int((seen == truth[: len(seen)]).sum()))
        best = max(running, key=lambda index: (scores[index].correct, -index))
        right = scores[best].answers == truth[: len(scores[best].answers)]
        for index in running:
            hits = scores[index].answers == truth[: len(right)]
            p = mcnemar_exact(int((right & ~hits).sum()), int((hits & ~right).sum()))
            scores[index] = dataclasses.replace(scores[index], p=p)
        running = [index for index in running if scores[index].p > SURE / count]
    return best, scores


def verdict(
    found: Sequence[Reading], scores: Mapping[int, Score], best: int, truth: torch.Tensor, where: str, dataset: str
) -> tuple[str, ...]:
    """What there is to say of the winner, one line each.

    Raises:
        Inconclusive: it is not clearly better than another that answers differently, or not much better than chance.
    """
    import torch

    score, winner = scores[best], found[best]
    heading = f"{where}, on training images of {dataset}"
    chance = int(truth.bincount().max()) / len(truth)
    needed = chance + LEARNED * (1 - chance)
    if wilson_ci95(score.correct, len(truth))[0] < needed:
        raise Inconclusive(
            f"{heading}: none of {len(found)} combinations is clearly right on {100 * needed:.0f} % of them, as trained weights would be; "
            f"the best, {winner}, is on {score}; probe on the data set that they were trained on"
        )
    same = [index for index in scores if index != best and torch.equal(scores[index].answers, score.answers)]
    others = [index for index in scores if index not in (best, *same)]
    second = max(others, key=lambda index: (scores[index].p, scores[index].correct, -index), default=None)
    if second is not None and scores[second].p > SURE / len(found):
        rival, p, enough = found[second], scores[second].p, SURE / len(found)
        differing = [index for index, pair in enumerate(zip(winner.options, rival.options, strict=True)) if len(set(pair)) > 1]
        choices = " or ".join(" ".join(reading.options[index] for index in differing) for reading in (winner, rival))
        raise Inconclusive(
            f"{heading}: no clear winner among {len(found)} combinations: {winner} is right on {score}, {rival} on {scores[second]} "
            f"(p = {p:.2g}; {enough:.1g} would decide); say {choices}"
        )
    next_best = f"; next best {found[second]}: {scores[second]} (p = {scores[second].p:.1g})" if second is not None else ""
    alike = f"; the same answers by {', '.join(str(found[index]) for index in same)}" if same else ""
    return (f"{winner}: right on {score} training images of {dataset}{next_best}{alike}",)

"""Options that several commands share, and how their text is parsed. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lenet_deploy.errors import BadInput
from lenet_deploy.models import MODELS

if TYPE_CHECKING:
    from lenet_deploy.data import Dataset

MODEL_NAMES = ", ".join(model.name for model in MODELS)

What = Annotated[str, typer.Argument(help="A model name, a name of the zoo, a checkpoint, a bundle folder or an artifact file.")]
Judged = Annotated[Path, typer.Argument(help="A bundle folder; with OTHER any artifact, checkpoint or bundle.", show_default=False)]
Other = Annotated[Path | None, typer.Argument(help="A file to judge against the first, whoever exported it.", show_default=False)]
Measurable = Annotated[Path, typer.Argument(help="A bundle folder, a checkpoint, or an artifact file of any origin.", show_default=False)]
InputShape = Annotated[
    str | None, typer.Option("--input-shape", metavar="C,H,W", help="Images that a file of another origin takes, where it does not say.")
]
Data = Annotated[str, typer.Option("--data", help="digits (embedded), mnist, fashion-mnist, cifar10, or FILE.npz.")]
OptionalData = Annotated[
    str | None, typer.Option("--data", help="Real images: a data set name or FILE.npz. Default: the one trained on, else digits.")
]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder of torchvision's data files. Default: ./data")]
Download = Annotated[bool, typer.Option("--download/--no-download", help="Fetch missing data files.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the weights and of the order of images.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the model's config, as in --set channels=8,16. Repeatable.")
]
Variants = Annotated[str | None, typer.Option("--variants", metavar="GLOB,...", help="Variants by name, as in 'onnx/*,eager/*'.")]
Require = Annotated[
    str | None, typer.Option("--require", metavar="GLOB,...", help="Variants that have to be judged: exit 3 where one cannot run here.")
]
Drill = Annotated[bool, typer.Option("--drill", help="Compare every layer of every variant; without it, of those that fail.")]
AllowTf32 = Annotated[
    bool, typer.Option("--allow-tf32", help="Let float32 products on CUDA be TF32, in torch and ONNX Runtime, and judge them as such.")
]
Junit = Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write the results as JUnit XML.")]
Batches = Annotated[str | None, typer.Option("--batch", metavar="N,...", help="Batch sizes.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the results as JSON; - is standard output.")]
Markdown = Annotated[
    Path | None, typer.Option("--markdown", metavar="FILE", help="Write the results as Markdown; appends where it is $GITHUB_STEP_SUMMARY.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")]


def words(text: str) -> tuple[str, ...]:
    """The parts of `a,b`; raises BadInput for an empty part."""
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise BadInput(f"{text!r} has an empty part; separate with single commas")
    return parts


def numbers(text: str | None) -> tuple[int, ...] | None:
    """The whole numbers of `1,8,64`, or None for None; raises BadInput."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in words(text))
    except ValueError:
        raise BadInput(f"{text!r} is not whole numbers separated by commas") from None


def input_shape(text: str | None) -> tuple[int, int, int] | None:
    """The three whole numbers of `C,H,W`, or None for None; raises BadInput."""
    found = numbers(text)
    if found is None:
        return None
    if len(found) != 3:
        raise BadInput(f"--input-shape {text}: it takes channels, height and width, as in 1,28,28")
    return (found[0], found[1], found[2])


def refuse(what: str, options: Mapping[str, object]) -> None:
    """Raise BadInput for the options that were given, by name, since they would have no effect with `what`."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise BadInput(f"{', '.join(given)} cannot be used with {what}; leave {'them' if len(given) > 1 else 'it'} out")


def decimals(text: str | None, option: str) -> tuple[float, ...] | None:
    """The numbers of `0.5,0.5,0.5`, or None for None; raises BadInput."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in words(text))
    except ValueError:
        raise BadInput(f"{option} {text!r} is not one number, or one a channel separated by commas") from None


def settings(given: list[str] | None, option: str = "--set") -> dict[str, str]:
    """`KEY=VALUE` options by key; raises BadInput."""
    found = {}
    for pair in given or ():
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise BadInput(f"{option} {pair!r} is not KEY=VALUE")
        found[key] = value
    return found


def dataset(name: str | None, data_dir: Path | None, download: bool) -> Dataset | None:
    """The data set of that name, or None for None; raises BadInput."""
    if name is None and (data_dir or download):
        raise BadInput("--data-dir and --download go with --data; say which data set is meant")
    if name is None:
        return None
    from lenet_deploy.data import load_dataset

    return load_dataset(name, data_dir, download)

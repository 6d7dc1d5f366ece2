"""`lenet-deploy train`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lenet_deploy.errors import BadInput, GateFailed
from lenet_deploy.recipes import OPTIMIZERS, PRECISIONS, RECIPES, SCHEDULES, TrainConfig, config_from_toml, find_recipe

from .options import MODEL_NAMES, Data, DataDir, Download, Quiet, Set, numbers, settings
from .output import note, progress

if TYPE_CHECKING:
    from lenet_deploy.checkpoint import Checkpoint
    from lenet_deploy.data import Dataset
    from lenet_deploy.parallel import Team
    from lenet_deploy.records import EpochStats
    from lenet_deploy.resume import TrainState

LAST = "last.ckpt"
RECIPE_NAMES = " or ".join(recipe.name for recipe in RECIPES)


def _field(help: str) -> Any:
    return typer.Option(help=f"{help} Default: the recipe's.", show_default=False)


def train(
    model: Annotated[str | None, typer.Option(help=f"One of {MODEL_NAMES}. Default: lenet5.")] = None,
    data: Data = "digits",
    recipe: Annotated[str | None, typer.Option(help=f"{RECIPE_NAMES}: what the options below do not say. Default: fast.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Instead of a recipe, what --print-config printed.")] = None,
    epochs: Annotated[int | None, _field("Passes over the training images.")] = None,
    batch_size: Annotated[int | None, _field("Images a step, over all processes.")] = None,
    optimizer: Annotated[str | None, _field(f"{', '.join(OPTIMIZERS)}.")] = None,
    lr: Annotated[float | None, _field("Peak learning rate.")] = None,
    momentum: Annotated[float | None, _field("Of SGD.")] = None,
    weight_decay: Annotated[float | None, _field("Of weights.")] = None,
    schedule: Annotated[str | None, _field(f"{', '.join(SCHEDULES)}.")] = None,
    milestones: Annotated[str | None, _field("Epochs after which multistep multiplies by gamma, as in 75,150.")] = None,
    gamma: Annotated[float | None, _field("Of multistep.")] = None,
    warmup: Annotated[float | None, _field("Share of the steps in which one-cycle rises.")] = None,
    label_smoothing: Annotated[float | None, _field("Share of the target spread over all classes.")] = None,
    crop: Annotated[int | None, _field("Pixels that images are shifted by at most.")] = None,
    flip: Annotated[bool | None, typer.Option("--flip/--no-flip", help="Mirror every other image. Default: the recipe's.")] = None,
    precision: Annotated[str | None, _field(f"{' or '.join(PRECISIONS)} (autocast).")] = None,
    channels_last: Annotated[
        bool | None, typer.Option("--channels-last/--no-channels-last", help="Memory format. Default: the recipe's.")
    ] = None,
    compile: Annotated[bool | None, typer.Option("--compile/--no-compile", help="By torch.compile. Default: the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the weights and of the order of images. Default: 0.")] = None,
    set_: Set = None,
    data_dir: DataDir = None,
    download: Download = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N. Default: auto.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results. Default: ./MODEL-DATA")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume/--no-resume", help="Go on where the run in the folder stopped; or begin anew there.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events into the folder, too.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the configuration as TOML and train nothing.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train a model and write checkpoint.safetensors and metrics.json, and last.ckpt to resume from."""
    given: dict[str, Any] = {
        "model": model,
        "settings": settings(set_) or None,
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "milestones": numbers(milestones),
        "gamma": gamma,
        "warmup": warmup,
        "label_smoothing": label_smoothing,
        "crop": crop,
        "flip": flip,
        "precision": precision,
        "channels_last": channels_last,
        "compile": compile,
        "seed": seed,
        "device": device,
    }
    said = {name: value for name, value in given.items() if value is not None}
    wanted = _config(config, recipe, data, said)
    if print_config:
        typer.echo(wanted.to_toml(), nl=False)
        return
    folder = out or Path(f"{wanted.model}-{Path(data).stem}")
    state = _state(folder, resume)
    if state is not None and recipe is None and config is None:
        wanted = dataclasses.replace(state.config, **said)
    from lenet_deploy.data import load_dataset
    from lenet_deploy.parallel import joined, own_device
    from lenet_deploy.store import make_folder, sweep
    from lenet_deploy.train import resolve

    dataset = load_dataset(data, data_dir, download)
    wanted = dataclasses.replace(wanted, device=own_device(wanted.device))
    device_found = resolve(wanted, dataset)[2]  # whatever is wrong is said before a folder is made
    if state is not None:
        from lenet_deploy.data import fingerprint

        state.check_fits(wanted, fingerprint(dataset))
        note(f"{folder}: goes on after epoch {len(state.history)} of {wanted.epochs}", quiet)
    made = not folder.exists()
    make_folder(folder)  # a place that cannot be written is found before the training, not after
    sweep(folder)
    try:
        with joined(device_found) as team:
            path, accuracy = run_training(wanted, dataset, folder, quiet or team.rank > 0, state, tensorboard, team)[1:]
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    if team.rank == 0:
        typer.echo(f"{path}: {accuracy:.2f} % of {len(dataset.test_images):,} test images of {dataset.name}")


def _config(path: Path | None, recipe: str | None, data: str, said: dict[str, Any]) -> TrainConfig:
    if path is None:
        return find_recipe(recipe or "fast").config(**{"model": "lenet5", "data": Path(data).stem, **said})
    if recipe is not None:
        raise BadInput("--config holds all that --recipe would say; give one of the two")
    from lenet_deploy.store import read_file

    try:
        text = read_file(path, "a configuration as --print-config prints it").decode()
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not TOML (not UTF-8 text)") from None
    return dataclasses.replace(config_from_toml(text, str(path)), **said)


def _state(folder: Path, resume: bool | None) -> TrainState | None:
    """The state to go on from. Raises BadInput where an unfinished run would be lost, and where there is none to resume."""
    from lenet_deploy.resume import from_bytes
    from lenet_deploy.store import read_file

    path = folder / LAST
    if resume is False or (resume is None and not path.exists()):
        return None
    if not path.exists():
        raise BadInput(f"{folder}: there is no {LAST} to resume from; leave out --resume to begin")
    state = from_bytes(read_file(path, "the state of a training run"), str(path))
    if resume is None:
        if state.finished:
            return None
        stopped = f"a run stopped there after epoch {len(state.history)} of {state.config.epochs}"
        raise BadInput(f"{folder}: {stopped}; add --resume to go on, or --no-resume to begin anew")
    return state


def run_training(
    config: TrainConfig,
    dataset: Dataset,
    folder: Path,
    quiet: bool,
    state: TrainState | None = None,
    tensorboard: bool = False,
    team: Team | None = None,
) -> tuple[Checkpoint, Path, float]:
    """Train with progress and write the results into an existing folder; returns checkpoint, its path and the test accuracy.

    The state of every epoch is in `last.ckpt` before the next begins. Of a team the first process writes.
    """
    from lenet_deploy import checkpoint, environment, resume
    from lenet_deploy.parallel import ALONE
    from lenet_deploy.report.plots import write_plots
    from lenet_deploy.report.tensorboard import event_writer
    from lenet_deploy.store import metrics_json, write_file
    from lenet_deploy.train import as_checkpoint
    from lenet_deploy.train import train as run

    team = team or ALONE
    checkpoint_path, last = folder / "checkpoint.safetensors", state
    live = sys.stderr.isatty()

    def keep(now: TrainState) -> None:
        nonlocal last
        last = now
        if team.rank == 0:
            write_file(folder / LAST, resume.to_bytes(now))

    def write_results(trained: Checkpoint) -> None:
        assert last is not None, "a run begins with its state"
        metrics = metrics_json(last.history, dataclasses.asdict(config), environment.capture())
        write_file(checkpoint_path, checkpoint.to_bytes(trained))
        write_file(folder / "metrics.json", metrics.encode())
        for remark in write_plots(folder, last.history, trained, dataset):
            note(remark, quiet)

    with progress(quiet) as show, event_writer(folder if tensorboard and team.rank == 0 else None) as events:

        def report(stats: EpochStats) -> None:
            line = f"Epoch: {stats.epoch}, LR: {stats.lr:.6f}, Loss: {stats.loss:.4f}"
            line += f", accuracy: {stats.accuracy:.2f} %, {stats.images_per_s:,.0f} images/s"
            show(stats.epoch, config.epochs, line)
            note(line, quiet or live)  # on a terminal the bar shows it
            events(stats)

        try:
            trained = run(config, dataset, report, state=state, on_state=keep, team=team)
        except GateFailed as error:
            if last is None or not last.history:
                raise
            if team.rank == 0:
                write_results(as_checkpoint(last, dataset, team.size))
            raise GateFailed(f"{error}; {checkpoint_path} is that of epoch {len(last.history)}, before it") from None
        except KeyboardInterrupt:
            if last is not None and last.history:
                note(f"{folder}: epoch {len(last.history)} of {config.epochs} is done; add --resume to go on", quiet)
            raise
    if team.rank == 0:
        write_results(trained)
    return trained, checkpoint_path, trained.provenance["test_accuracy"]

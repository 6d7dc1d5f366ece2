"""What a WHAT argument names, and on which device its variants run. Shared by every public function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lenet_deploy import zoo
from lenet_deploy.errors import BadInput, DamagedFile, UnknownName, first_line
from lenet_deploy.models import MODELS, find_model
from lenet_deploy.records import Artifact, ArtifactMetadata, ImageInput, PlainInput
from lenet_deploy.runtimes import PLAIN
from lenet_deploy.variants import CHECKPOINT, DEVICES, VARIANTS, Variant, select_variants

if TYPE_CHECKING:
    from lenet_deploy.bundle import Bundle
    from lenet_deploy.checkpoint import Checkpoint
    from lenet_deploy.data import Dataset
    from lenet_deploy.foreign import Pixels
    from lenet_deploy.runtimes import Session


@dataclass(frozen=True)
class Source:
    """What a WHAT argument turned out to be, and the bytes of what can be run.

    Attributes:
        described: one line for the user.
        metadata: None of a file that was exported elsewhere, which only `open_path` takes.
        variants: what can run it.
        read: verified bytes of an artifact.
        input: how an image becomes its input.
        batch_size: the only one that it takes; None where it takes any.
        accuracies: percent on the test split by variant, where a manifest knows them.
    """

    described: str
    metadata: ArtifactMetadata | None
    variants: tuple[Variant, ...]
    read: Callable[[Variant], bytes]
    input: ImageInput
    batch_size: int | None = None
    accuracies: Mapping[str, float] = field(default_factory=dict)

    @property
    def known(self) -> ArtifactMetadata:
        """The metadata of a source that `open_source` opened."""
        assert self.metadata is not None, "open_source refuses what carries none"
        return self.metadata

    def origin(self) -> tuple[str, ...]:
        """What was inferred and assumed of weights that others trained; empty where there is no checkpoint in it to say."""
        from lenet_deploy import checkpoint

        held = next((variant for variant in self.variants if variant.artifact == CHECKPOINT), None)
        return checkpoint.from_bytes(self.read(held), self.described).origin if held else ()


def known_names() -> tuple[str, ...]:
    """What WHAT can be without being a path: models, and the trained ones of the zoo."""
    return (*(entry.name for entry in MODELS), *zoo.names())


def load(
    what: str | Path,
    *,
    model: str | None = None,
    settings: Mapping[str, str] | None = None,
    seed: int = 0,
    pooling: str | None = None,
    activation: str | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    border: int | None = None,
) -> Checkpoint:
    """A checkpoint from a registered model name, a name of the zoo, a checkpoint file, a bundle folder, or weights that others trained.

    Args:
        what: name or path. A registered name gives freshly initialised weights. Foreign weights are a LeNet-5 under any names, in
            safetensors, as a state_dict or in a `.npz`; `Checkpoint.origin` says what was inferred and what was assumed.
        model: which registered model's defaults are assumed for foreign weights; None goes by their tensors.
        settings: `KEY=VALUE` config settings, for a name or foreign weights.
        seed: of freshly initialised weights.
        pooling, activation: what shapes do not say; the same as in `settings`.
        mean, std: of pixels from 0 to 1, for foreign weights; one number for all channels, or one a channel.
        border: black pixels on each side that fill the input of foreign weights, in place of scaling the image up.

    Raises:
        BadInput: nothing of that name, or a config, file or digest that is wrong (see its subclasses); or an argument without effect.
    """
    from lenet_deploy import checkpoint
    from lenet_deploy.bundle import open_bundle

    given, pixels = said(settings, pooling, activation), pixels_of(mean, std, border)
    if str(what) in (entry.name for entry in MODELS):
        if pixels or model:
            raise BadInput(f"{what}: --model, --mean, --std and --border are for weights that others trained; leave them out")
        return checkpoint.fresh(find_model(str(what)), given, seed)
    if str(what) in zoo.names():
        if given or model or pixels:
            raise BadInput(f"{what}: it is trained, with its own model and config; leave out {checkpoint.CARRIED}")
        return zoo.load(str(what))
    path = existing(what)
    if path.is_dir():
        if given or model or pixels:
            raise BadInput(f"{path}: a bundle carries its own model and config; leave out {checkpoint.CARRIED}")
        return bundle_checkpoint(open_bundle(path))
    return checkpoint.load(path, model, given, pixels)


def said(settings: Mapping[str, str] | None, pooling: str | None, activation: str | None) -> dict[str, str]:
    """The settings with pooling and activation among them; raises BadInput where one is said twice."""
    named = {key: value for key, value in (("pooling", pooling), ("activation", activation)) if value is not None}
    twice = named.keys() & (settings or {}).keys()
    if twice:
        raise BadInput(f"{', '.join(sorted(twice))} is given twice, by --set and by its own option; leave one out")
    return {**(settings or {}), **named}


def pixels_of(mean: float | Sequence[float] | None, std: float | Sequence[float] | None, border: int | None) -> Pixels | None:
    """What is said of the input, or None where nothing is; raises BadInput for numbers that cannot be meant."""
    if mean is None and std is None and border is None:
        return None
    from lenet_deploy.foreign import Pixels

    many = [None if each is None else (float(each),) if isinstance(each, (int, float)) else tuple(map(float, each)) for each in (mean, std)]
    return Pixels(many[0], many[1], border)


def open_source(what: str | Path, *, settings: Mapping[str, str] | None = None, seed: int = 0) -> Source:
    """Whatever WHAT names, ready to run: a model name, a name of the zoo, a checkpoint, a bundle, or one artifact file.

    An artifact inside a bundle is verified against the bundle's manifest; one on its own is used by its own metadata.

    Raises:
        BadInput: nothing of that name, or a file that is damaged or of another kind.
    """
    from lenet_deploy.bundle import open_bundle

    if str(what) in known_names():
        return _checkpoint_source(what, load(what, settings=settings, seed=seed))
    path = _path(what)
    source = bundle_source(open_bundle(path)) if path.is_dir() else _artifact_source(path)
    if source is None:
        return _checkpoint_source(what, load(what, settings=settings, seed=seed))
    if settings:
        raise BadInput(f"{path}: it carries its own model and config, so --set has nothing to change")
    return source


def open_path(what: str | Path, input_shape: tuple[int, int, int] | None = None) -> Source:
    """A bundle folder or one file, ready to run: a checkpoint, an artifact of ours, or one that was exported elsewhere.

    Args:
        input_shape: (C, H, W) of the images that a file of another origin takes, where it does not say.

    Raises:
        BadInput: as `open_source`; or a file of another origin that takes something else than images, or images of unknown size.
    """
    from lenet_deploy.bundle import open_bundle

    path = ready(what)
    if input_shape and min(input_shape) < 1:
        raise BadInput(f"the input shape is {','.join(map(str, input_shape))}; channels, height and width must be at least 1")
    source = _artifact_source(path, foreign=True, asked=input_shape) if path.is_file() else bundle_source(open_bundle(path))
    source = source or _checkpoint_source(path, load(path))
    taken = source.input.input_shape
    if input_shape not in (None, taken):
        sides = [" x ".join(map(str, shape)) for shape in (taken, input_shape or ())]
        raise BadInput(f"{path}: it takes images of {sides[0]}, and the input shape asked for is {sides[1]}; leave that out")
    return source


def parity_dataset(checkpoint: Checkpoint, data_dir: Path | None = None) -> Dataset:
    """The data set a checkpoint was trained on where it is at hand, else the embedded digits."""
    from lenet_deploy.data import DATASETS, load_dataset

    if checkpoint.dataset in [source.name for source in DATASETS]:
        with contextlib.suppress(BadInput):
            return load_dataset(str(checkpoint.dataset), data_dir)
    return load_dataset("digits")


def bundle_checkpoint(bundle: Bundle) -> Checkpoint:
    """The checkpoint inside a bundle; raises DamagedFile where it is not what the manifest describes."""
    from lenet_deploy import checkpoint

    entry = bundle.artifact(CHECKPOINT.name)
    if entry is None:
        raise DamagedFile(f"{bundle.path}: its manifest lists no {CHECKPOINT.name}; export the bundle again")
    found = checkpoint.from_bytes(bundle.read(entry), str(bundle.path / entry.path))
    if found.metadata() != bundle.metadata:
        raise DamagedFile(f"{bundle.path}: its manifest describes other weights, labels or preprocessing than its checkpoint")
    return found


def bundle_variants(bundle: Bundle, globs: Iterable[str]) -> tuple[Variant, ...]:
    """The variants that run an artifact of the bundle and match; raises UnknownName."""
    held = {artifact.name for artifact in bundle.manifest.artifacts}
    return select_variants(globs, (variant for variant in VARIANTS if variant.artifact.name in held))


def artifact_of(bundle: Bundle, variant: Variant) -> Artifact:
    """The bundle's entry of the file that a variant runs."""
    artifact = bundle.artifact(variant.artifact.name)
    assert artifact is not None, "variants are selected from the bundle's artifacts"
    return artifact


def bundle_source(bundle: Bundle, only: Artifact | None = None) -> Source:
    """What can be run of a bundle, or of one artifact in it, which plain variants run; bytes are verified when read."""
    held = [artifact.name for artifact in ((only,) if only else bundle.manifest.artifacts)]
    runs = tuple(v for v in VARIANTS if v.artifact.name in held and (only is None or v.options == PLAIN))
    where = f"{bundle.path / only.path}" if only else f"{bundle.path} (bundle)"
    accuracies = {name: percent for artifact in bundle.manifest.artifacts for name, percent in artifact.accuracy.items()}

    def read(variant: Variant) -> bytes:
        return bundle.read(artifact_of(bundle, variant))

    return Source(where, bundle.metadata, runs, read, bundle.metadata.preprocessing, accuracies=accuracies)


def existing(what: str | Path) -> Path:
    """WHAT as a path; a bare word that names no file is most likely a mistyped model, which UnknownName says."""
    path = _path(what)
    if not path.exists() and path.name == str(what) and not path.suffix:
        raise UnknownName("model", str(what), known_names())
    return path


def ready(what: str | Path) -> Path:
    """WHAT as a path; raises BadInput for the name of a model that has not been exported here."""
    if str(what) in known_names() and not Path(what).exists():
        raise BadInput(f"{what}: nothing stands there yet; make its bundle first: lenet-deploy export {what}")
    return _path(what)


def _path(what: str | Path) -> Path:
    """WHAT as a path that the system can at least be asked about; raises BadInput."""
    try:
        Path(what).exists()
    except (OSError, ValueError) as error:  # too long, or characters that no file name has
        raise BadInput(f"{str(what)[:80]!r} names no file ({first_line(error)})") from None
    return Path(what)


def _checkpoint_source(what: str | Path, loaded: Checkpoint) -> Source:
    from lenet_deploy import checkpoint

    data = checkpoint.to_bytes(loaded)
    described = f"{what} ({loaded.provenance.get('source', 'checkpoint')})"
    return Source(described, loaded.metadata(), _plain(CHECKPOINT.format), lambda variant: data, loaded.preprocessing)


def _plain(format: str) -> tuple[Variant, ...]:
    """For a file on its own the first variant of its format on each device, which is plain: it has one precision, and one exporter."""
    per_device = {variant.device: variant for variant in reversed(VARIANTS) if variant.artifact.format == format}
    return tuple(per_device[device] for device in DEVICES)


def _artifact_source(path: Path, foreign: bool = False, asked: tuple[int, int, int] | None = None) -> Source | None:
    """A file as an artifact: of the bundle that it lies in, else on its own; None where it is no artifact."""
    from lenet_deploy.bundle import MANIFEST, open_bundle
    from lenet_deploy.checkpoint import is_torchscript
    from lenet_deploy.store import read_file

    if not path.is_file():
        return None
    if (path.parent / MANIFEST).is_file():
        bundle = open_bundle(path.parent)
        listed = next((each for each in bundle.manifest.artifacts if each.path == path.name), None)
        if listed is not None:
            return bundle_source(bundle, listed)
    data = read_file(path, "a model")
    if path.suffix == ".onnx" or is_torchscript(data):
        return _bare_source(path, data, "onnx" if path.suffix == ".onnx" else "torchscript", foreign, asked)
    return None


def _bare_source(path: Path, data: bytes, kind: str, foreign: bool, asked: tuple[int, int, int] | None) -> Source:
    from lenet_deploy.checkpoint import metadata_from_json
    from lenet_deploy.exporters import onnx, torchscript
    from lenet_deploy.exporters.signature import embedded, read_onnx, read_torchscript

    described, variants = f"{path} (on its own)", _plain(kind)
    values = (onnx if kind == "onnx" else torchscript).read_metadata(data, str(path))
    metadata = None if values is None else metadata_from_json(values, str(path))
    whole = embedded(path, data) if kind == "onnx" else data
    if metadata is not None:
        return Source(described, metadata, variants, lambda variant: whole, metadata.preprocessing)
    if not foreign:
        raise DamagedFile(
            f"{path}: it carries no lenet-deploy metadata, so its labels and preprocessing are not known; export it with lenet-deploy"
        )
    found = (read_onnx if kind == "onnx" else read_torchscript)(path, data, asked)
    return Source(described, None, variants, lambda variant: whole, PlainInput(found.input_shape), found.batch_size)


def open_session(
    source: Source, variant: Variant, device: str, ort: Mapping[str, str] | None = None
) -> contextlib.AbstractContextManager[Session]:
    """A session of one variant of `source` on the device asked for (`auto` leaves the variant's own), inside `computing`.

    Args:
        ort: session options for a variant that ONNX Runtime runs; see `with_ort_options` for what else to do with them.
    """
    return variant.with_ort(ort or {}).open_session(source.read(variant), source.input.input_shape, device_of(variant, device))


def on_device(variants: Iterable[Variant], device: str) -> tuple[Variant, ...]:
    """Those of the device asked for; `auto` keeps all. Raises BadInput where none is of that device."""
    from lenet_deploy.devices import parse_device

    found = tuple(variants)
    if device != "auto":
        kind = parse_device(device).type
        chosen = tuple(variant for variant in found if variant.device == kind)
        if not chosen:
            raise BadInput(f"none of {', '.join(variant.name for variant in found)} runs on {kind}; choose other variants or --device")
        return chosen
    return found


def device_of(variant: Variant, device: str) -> str | None:
    """`cuda:N` as asked for, for the variants on CUDA; None leaves the variant's own."""
    return device if device.startswith("cuda") and variant.device == "cuda" else None


@contextlib.contextmanager
def computing(device: str, allow_tf32: bool = False, threads: int | None = None) -> Iterator[None]:
    """The one torch state, stream and number of threads that all sessions of a run share; raises as `parse_device` and `threads`."""
    from lenet_deploy import devices

    with devices.threads(threads), devices.computing_on(devices.parse_device(device), allow_tf32):
        yield

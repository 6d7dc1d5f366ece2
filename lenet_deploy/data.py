"""Data sets as uint8 tensors, and the one way an image becomes a model's input."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from lenet_deploy.errors import BadInput, DamagedFile, UnknownName, first_line
from lenet_deploy.records import ImageInput, Preprocessing
from lenet_deploy.store import check_zip, read_file

if TYPE_CHECKING:
    import numpy as np

# An image at most this many pixels smaller than the input is surrounded with black instead of being scaled:
# the 1998 paper puts its 28x28 digits into 32x32, and a scaled digit has other strokes.
MAX_PADDING = 4

DIGITS = tuple("0123456789")
FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, split for training and testing.

    Attributes:
        name: as typed, or the file it came from.
        labels: class names in the order of the label numbers.
        train_images: uint8 (N, C, H, W), C 1 or 3, in the source's own size; test_images alike.
        train_labels: int64 (N,); test_labels alike.
    """

    name: str
    labels: tuple[str, ...]
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


@dataclass(frozen=True)
class DataSource:
    """One named data set: plain data until it is loaded."""

    name: str
    summary: str
    labels: tuple[str, ...]
    load: Callable[[Path | None, bool], Dataset]


def load_dataset(name: str, data_dir: Path | None = None, download: bool = False) -> Dataset:
    """Load a registered data set, or a `.npz` file of your own.

    Args:
        name: a name in DATASETS, or a path that ends in `.npz`.
        data_dir: where torchvision keeps its files, or a `NAME.npz` lies; `./data` when None.
        download: fetch what is missing.

    Raises:
        UnknownName: neither a data set nor an existing `.npz`.
        BadInput: the files are missing; the message says what was looked for, where, and the two ways to get it.
        DamagedFile: the files are there and wrong.
    """
    for source in DATASETS:
        if source.name == name:
            packed = (data_dir or Path("data")) / f"{name}.npz"
            if packed.is_file():
                return load_npz(read_file(packed, "a .npz data set"), name, source.labels)
            return source.load(data_dir, download)
    if name.endswith(".npz"):
        return load_npz(read_file(Path(name), "a .npz data set"), name)
    raise UnknownName("data set", name, (*(source.name for source in DATASETS), "FILE.npz"))


def load_npz(data: bytes, name: str, labels: tuple[str, ...] | None = None) -> Dataset:
    """A data set from `.npz` bytes: images uint8 (N, H, W) or (N, H, W, C), labels integers (N,), `train_` and `test_`.

    Raises:
        DamagedFile: truncated, altered, missing arrays, or arrays that do not fit each other.
    """
    import numpy as np

    check_zip(data, name, ".npz")
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            for key in ("train_images", "train_labels", "test_images", "test_labels"):
                arrays[key] = file[key]
    except KeyError as error:
        raise DamagedFile(f"{name}: {error.args[0]}; it needs train_images, train_labels, test_images, test_labels") from None
    except Exception as error:  # damaged bytes make zipfile, zlib and numpy's header parser fail in every way there is
        raise DamagedFile(f"{name}: not a readable .npz ({first_line(error)}); it is truncated, altered or of another kind") from None
    return _assembled(name, labels, arrays)


def fingerprint(dataset: Dataset) -> str:
    """Digest of the images and labels of both splits, whatever file they came from."""
    hasher = hashlib.sha256()
    for tensor in (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels):
        hasher.update(f"{tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.contiguous().numpy().data)
    return hasher.hexdigest()


def preprocessing_for(dataset: Dataset, channels: int, size: int, pixel_range: tuple[float, float]) -> Preprocessing:
    """How `dataset`'s images become a `size` x `size` input whose black and white map to `pixel_range`."""
    side = max(dataset.train_images.shape[2:])
    missing = size - side
    padding = missing // 2 if 0 < missing <= MAX_PADDING and missing % 2 == 0 else 0
    return make_preprocessing(channels, size, pixel_range, padding)


def make_preprocessing(channels: int, size: int, pixel_range: tuple[float, float], padding: int = 0) -> Preprocessing:
    """The record for a `size` x `size` input, `padding` of which is a black border on each side."""
    black, white = pixel_range
    mean, std = -black / (white - black), 1 / (white - black)
    return Preprocessing(channels, size - 2 * padding, padding, (mean + 0.0,) * channels, (std,) * channels)


def fit(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Make images the model's size and channels: uint8 (N, C, H, W) to uint8 (N, channels, size, size).

    Scaling is bilinear with antialiasing and keeps the aspect ratio; what is left over is black.
    Colour becomes grey by the ITU-R 601 weights (as Pillow's mode L), grey becomes colour by repeating.
    """
    if images.shape[1] != preprocessing.channels:
        images = _grey(images) if preprocessing.channels == 1 else images.expand(-1, 3, -1, -1)
    height, width = images.shape[2:]
    scale = preprocessing.resize / max(height, width)
    if scale != 1:
        side = (max(1, round(height * scale)), max(1, round(width * scale)))
        scaled = functional.interpolate(images.float(), side, mode="bilinear", antialias=True)
        images = scaled.round().clamp(0, 255).to(torch.uint8)
    height, width = images.shape[2:]
    left, top = (preprocessing.size - width) // 2, (preprocessing.size - height) // 2
    border = (left, preprocessing.size - width - left, top, preprocessing.size - height - top)
    return functional.pad(images, border).contiguous() if any(border) else images.contiguous()


def normalise(images: torch.Tensor, preprocessing: ImageInput) -> torch.Tensor:
    """uint8 (N, C, H, W) to float32 of the same shape, `(pixel / 255 - mean) / std`, on the images' device."""
    return normalise_into(torch.empty(images.shape, dtype=torch.float32, device=images.device), images, preprocessing)


def normalise_into(out: torch.Tensor, images: torch.Tensor, preprocessing: ImageInput) -> torch.Tensor:
    """As `normalise`, written into `out`, an existing float32 tensor on the images' device."""
    if len(set(preprocessing.mean)) == len(set(preprocessing.std)) == 1:  # one affine map for all channels: plain scalars
        scale, shift = 1 / (255 * preprocessing.std[0]), -preprocessing.mean[0] / preprocessing.std[0]
        return out.copy_(images).mul_(scale).add_(shift)
    std = torch.tensor(preprocessing.std, device=out.device).reshape(-1, 1, 1)
    mean = torch.tensor(preprocessing.mean, device=out.device).reshape(-1, 1, 1)
    return out.copy_(images).mul_(1 / (255 * std)).sub_(mean / std)


def load_image(path: Path, preprocessing: Preprocessing, invert: bool = False) -> torch.Tensor:
    """One PNG or JPEG of any size and mode as uint8 (1, channels, size, size).

    EXIF rotation is applied, transparency is laid on black, 16-bit grey is scaled to 8 bits.

    Args:
        invert: swap dark and light, for dark strokes on paper where the data set has light ones on black.

    Raises:
        BadInput: the path cannot be read.
        DamagedFile: not an image, truncated, or too large to be meant.
    """
    import numpy as np
    from PIL import Image, ImageOps

    data = read_file(path, "a PNG or JPEG image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF data, which does not concern the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
            image.load()
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # damaged bytes make Pillow's decoders fail in every way there is
        raise DamagedFile(f"{path}: not a readable PNG or JPEG ({first_line(error)})") from None
    if image.mode.startswith("I"):
        deep = np.array(image).astype(np.uint32)
        deep[deep == image.info.get("transparency", -1)] = 0
        image = Image.fromarray((deep >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    pixels = np.array(image.convert("L" if preprocessing.channels == 1 else "RGB"))
    if invert:
        pixels = 255 - pixels
    return fit(_channels_first(torch.from_numpy(pixels)[None]), preprocessing)


def _digits(data_dir: Path | None, download: bool) -> Dataset:
    from importlib import resources

    data = resources.files("lenet_deploy").joinpath("digits.npz").read_bytes()
    return load_npz(data, "digits", DIGITS)


def _mnist(data_dir: Path | None, download: bool) -> Dataset:
    return _idx("mnist", _vision("mnist").MNIST, DIGITS, data_dir, download)


def _fashion(data_dir: Path | None, download: bool) -> Dataset:
    return _idx("fashion-mnist", _vision("fashion-mnist").FashionMNIST, FASHION, data_dir, download)


def _idx(name: str, kind: Any, labels: tuple[str, ...], data_dir: Path | None, download: bool) -> Dataset:
    """MNIST or Fashion-MNIST; torchvision unpacks the four `.gz` files itself where they lie already."""
    root = data_dir or Path("data")
    from torchvision.datasets.utils import check_integrity

    raw = root / kind.__name__ / "raw"
    # Whole by their checksums, so that torchvision unpacks them and fetches nothing.
    packed = all(check_integrity(raw / Path(url).name, md5) for url, md5 in kind.resources)
    train, test = _both_splits(kind, name, root, raw, download or packed)
    return _assembled(name, labels, _arrays(train.data.numpy(), train.targets.numpy(), test.data.numpy(), test.targets.numpy()))


def _cifar10(data_dir: Path | None, download: bool) -> Dataset:
    import numpy as np

    name, root = "cifar10", data_dir or Path("data")
    train, test = _both_splits(_vision(name).CIFAR10, name, root, root / "cifar-10-batches-py", download)
    return _assembled(name, CIFAR10, _arrays(train.data, np.asarray(train.targets), test.data, np.asarray(test.targets)))


def _arrays(*arrays: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays under the names that a `.npz` has."""
    return dict(zip(("train_images", "train_labels", "test_images", "test_labels"), arrays, strict=True))


def _vision(name: str) -> Any:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise BadInput(f"{name} needs torchvision, which does not import here ({error}); install the one for this torch") from None
    return datasets


def _both_splits(kind: Any, name: str, root: Path, place: Path, download: bool) -> tuple[Any, Any]:
    try:
        return kind(root, train=True, download=download), kind(root, train=False, download=download)
    except Exception as error:  # damaged files make torchvision's readers fail in every way there is, assertions among them
        raise BadInput(
            f"{name}: its files were looked for in {place} and not found whole ({first_line(error)}); "
            f"put them there (--data-dir names the folder above), or add --download"
        ) from None


DATASETS: tuple[DataSource, ...] = (
    DataSource("digits", "1,797 scanned digits of 8x8, embedded", DIGITS, _digits),
    DataSource("mnist", "70,000 digits of 28x28, through torchvision", DIGITS, _mnist),
    DataSource("fashion-mnist", "70,000 articles of clothing of 28x28, through torchvision", FASHION, _fashion),
    DataSource("cifar10", "60,000 colour photographs of 32x32, through torchvision", CIFAR10, _cifar10),
)


def _assembled(name: str, labels: tuple[str, ...] | None, arrays: dict[str, np.ndarray[Any, Any]]) -> Dataset:
    """A Dataset from arrays that fit each other; `labels` None numbers the classes. Raises DamagedFile."""
    train_images, train_labels = _checked(name, "train", arrays)
    test_images, test_labels = _checked(name, "test", arrays)
    if train_images.shape[1] != test_images.shape[1]:
        raise DamagedFile(f"{name}: train has {train_images.shape[1]} channels and test {test_images.shape[1]}; make them equal")
    highest = int(max(train_labels.max(), test_labels.max()))
    labels = labels or tuple(map(str, range(highest + 1)))
    if highest >= len(labels):
        raise DamagedFile(f"{name}: label {highest} has no name among {len(labels)}")
    return Dataset(name, labels, train_images, train_labels, test_images, test_labels)


def _checked(name: str, split: str, arrays: dict[str, np.ndarray[Any, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    if isinstance(images, bytes) or isinstance(labels, bytes):
        raise DamagedFile(f"{name}: its members are no numpy arrays; write it with numpy.savez")
    shape_fits = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
    if images.dtype != "uint8" or not shape_fits or not images.size:
        raise DamagedFile(
            f"{name}: {split}_images is {images.dtype} {images.shape}; it must be uint8, (N, H, W) or (N, H, W, C) with C 1 or 3"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DamagedFile(f"{name}: {split}_labels is {labels.dtype} {labels.shape}; it must be one whole number for each of the images")
    if int(labels.min()) < 0 or int(labels.max()) > 9999:
        raise DamagedFile(f"{name}: {split}_labels holds {labels.min()} to {labels.max()}; classes are numbered from 0")
    return _channels_first(torch.from_numpy(images)), torch.from_numpy(labels.astype("int64"))


def _channels_first(images: torch.Tensor) -> torch.Tensor:
    """(N, H, W) or (N, H, W, C) to (N, C, H, W)."""
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


def _grey(images: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).reshape(1, 3, 1, 1)
    return (images.float() * weights).sum(dim=1, keepdim=True).round().to(torch.uint8)

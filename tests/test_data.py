"""Data sets and images: the real ones whole, one's own checked, and nothing damaged ever used."""

from __future__ import annotations

import gzip
import importlib.util
import io
import pickle
import random
import socketserver
import threading
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lenet_deploy import data
from lenet_deploy.data import Dataset, fit, load_dataset, load_image, load_npz, normalise, normalise_into, preprocessing_for
from lenet_deploy.errors import BadInput, DamagedFile, UnknownName
from lenet_deploy.models import MODELS
from lenet_deploy.records import Preprocessing

GREY = Preprocessing(1, 32, 0, (0.0,), (1.0,))
RGB = Preprocessing(3, 32, 0, (0.0,) * 3, (1.0,) * 3)
PARTS = ("train_images", "train_labels", "test_images", "test_labels")

Arrays = dict[str, np.ndarray[Any, Any]]

IDX_PARTS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def arrays(**changes: Any) -> Arrays:
    """Five small training images and three for testing, with `changes`."""
    generator = np.random.default_rng(0)
    small: Arrays = {
        "train_images": generator.integers(0, 256, (5, 6, 5), dtype=np.uint8),
        "train_labels": np.array([0, 1, 2, 0, 1]),
        "test_images": generator.integers(0, 256, (3, 6, 5), dtype=np.uint8),
        "test_labels": np.array([2, 1, 0]),
    }
    return {key: value for key, value in {**small, **changes}.items() if value is not None}


def packed(values: Arrays, save: Callable[..., None] = np.savez) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **values)
    return buffer.getvalue()


def same(one: Dataset, other: Dataset) -> bool:
    return one.labels == other.labels and all(torch.equal(getattr(one, part), getattr(other, part)) for part in PARTS)


def statistics(images: torch.Tensor) -> list[float]:
    """Mean of each channel, black 0 and white 1."""
    return (images.double().mean(dim=(0, 2, 3)) / 255).tolist()


# The embedded digits


def test_the_embedded_digits_are_1797_scans_of_8x8(digits: Dataset) -> None:
    assert (digits.train_images.shape, digits.test_images.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert digits.labels == tuple("0123456789")
    assert digits.train_images.dtype == digits.test_images.dtype == torch.uint8
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64
    assert (int(digits.train_images.min()), int(digits.train_images.max())) == (0, 255)


def test_the_split_of_the_digits_is_stratified(digits: Dataset) -> None:
    train, test = digits.train_labels.bincount(minlength=10), digits.test_labels.bincount(minlength=10)
    share = test / (train + test)
    assert torch.allclose(share, torch.full((10,), 0.2), atol=0.005)


def test_the_digits_are_those_of_scikit_learn(digits: Dataset) -> None:
    script = Path(__file__).resolve().parent.parent / "scripts/make_digits.py"
    spec = importlib.util.spec_from_file_location("make_digits", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert same(digits, load_npz(packed(module.digits()), "rebuilt", data.DIGITS))


# MNIST, Fashion-MNIST, CIFAR-10


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """What is asked of the network, where a proxy of our own answers with silence."""
    asked: list[bytes] = []

    class Proxy(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked.append(self.request.recv(200))

    with socketserver.TCPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_address[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(urllib.request, "_opener", None)  # urllib remembers the proxies of its first request
        yield asked
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "labels", "mean", "first"),
    [("mnist", data.DIGITS, 0.1307, (5, 7)), ("fashion-mnist", data.FASHION, 0.2860, (9, 9))],
    ids=["mnist", "fashion-mnist"],
)
def test_official_gz_files_load_without_network_or_noise(
    name: str, labels: tuple[str, ...], mean: float, first: tuple[int, int], idx_root: Path, requests: list[bytes], capfd: Any
) -> None:
    loaded = load_dataset(name, idx_root)
    assert (loaded.name, loaded.labels) == (name, labels)
    assert (loaded.train_images.shape, loaded.test_images.shape) == ((60_000, 1, 28, 28), (10_000, 1, 28, 28))
    assert statistics(loaded.train_images) == pytest.approx([mean], abs=1e-4)
    assert (int(loaded.train_labels[0]), int(loaded.test_labels[0])) == first
    assert loaded.test_labels.bincount().tolist() == [1000] * 10 or name == "mnist"
    assert loaded.train_labels.dtype == torch.int64
    assert same(loaded, load_dataset(name, idx_root))
    assert tuple(capfd.readouterr()) == ("", "")
    assert requests == []


def test_cifar10_loads_from_the_npz_of_its_sheets(cifar10_root: Path) -> None:
    loaded = load_dataset(str(cifar10_root / "cifar10.npz"))
    assert (loaded.train_images.shape, loaded.test_images.shape) == ((50_000, 3, 32, 32), (10_000, 3, 32, 32))
    assert loaded.train_labels.bincount().tolist() == [5000] * 10
    assert loaded.test_labels.bincount().tolist() == [1000] * 10
    assert statistics(loaded.train_images) == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
    assert data.CIFAR10[int(loaded.train_labels[0])] == "frog"


@pytest.mark.parametrize("name", [source.name for source in data.DATASETS if source.name != "digits"])
def test_missing_data_says_what_was_looked_for_and_where_and_the_two_ways_to_get_it(name: str, tmp_path: Path, requests: Any) -> None:
    with pytest.raises(BadInput) as refusal:
        load_dataset(name, tmp_path)
    assert all(word in str(refusal.value) for word in (name, str(tmp_path), "--data-dir", "--download"))
    assert requests == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [source.name for source in data.DATASETS if source.name != "digits"])
def test_a_download_that_fails_is_one_error(name: str, tmp_path: Path, requests: list[bytes]) -> None:
    with pytest.raises(BadInput, match=f"^{name}: "):
        load_dataset(name, tmp_path, download=True)
    assert requests != []


def test_a_damaged_gz_is_refused_and_neither_fetched_nor_replaced_unasked(tmp_path: Path, requests: list[bytes]) -> None:
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    files = {raw / f"{part}-ubyte.gz": gzip.compress(part.encode())[:-3] for part in IDX_PARTS}
    for path, content in files.items():
        path.write_bytes(content)
    with pytest.raises(BadInput, match=r"mnist: .*--data-dir.*--download"):
        load_dataset("mnist", tmp_path)
    assert requests == []
    assert {path: path.read_bytes() for path in files} == files


def idx(values: np.ndarray[Any, Any], kind: int = 8) -> bytes:
    """Bytes of an unpacked IDX file: zeros, the element type, the dimensions, then the values."""
    return bytes([0, 0, kind, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape) + values.tobytes()


def test_damaged_unpacked_files_are_refused_and_whole_ones_load(tmp_path: Path, requests: list[bytes]) -> None:
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    images, labels = np.arange(4 * 28 * 28, dtype=np.uint8).reshape(4, 28, 28), np.array([3, 1, 4, 1], dtype=np.uint8)
    for part in IDX_PARTS:
        (raw / f"{part}-ubyte").write_bytes(idx(images if "images" in part else labels))
    assert load_dataset("mnist", tmp_path).train_labels.tolist() == [3, 1, 4, 1]
    for part in IDX_PARTS[:2]:
        path = raw / f"{part}-ubyte"
        good = path.read_bytes()
        bad = [good[:length] for length in (0, 1, 3, 4, 7, 8, len(good) - 1)]
        bad += [good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :] for place in range(8) for bit in range(8)]
        bad += [b"not an idx file", idx(images.astype(np.int8), 9), idx(labels[:3])]
        for content in bad:
            path.write_bytes(content)
            with pytest.raises(BadInput, match=r"^mnist: "):
                load_dataset("mnist", tmp_path)
        path.write_bytes(good)
    assert requests == []


def test_an_unknown_data_set_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(UnknownName, match="unknown data set 'mnst'; did you mean mnist"):
        load_dataset("mnst")
    with pytest.raises(UnknownName, match=r"FILE\.npz"):
        load_dataset("some/folder")


# A `.npz` of your own


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_a_npz_of_a_data_sets_name_in_its_folder_is_that_data_set(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.npz").write_bytes(packed(arrays()))
    loaded = load_dataset(name, tmp_path)
    assert (loaded.name, len(loaded.labels), len(loaded.train_images)) == (name, 10, 5)
    (tmp_path / f"{name}.npz").write_bytes(packed(arrays(train_labels=np.array([0, 1, 2, 0, 10]))))
    with pytest.raises(DamagedFile, match=f"{name}: label 10 has no name among 10"):
        load_dataset(name, tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("tail", [(), (1,), (3,)])
def test_grey_and_colour_npz_files_load_channels_first(save: Callable[..., None], tail: tuple[int, ...], tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (5, 6, 7, *tail), dtype=np.uint8)
    (tmp_path / "own.npz").write_bytes(packed(arrays(train_images=images, test_images=images[:3]), save))
    loaded = load_dataset(str(tmp_path / "own.npz"))
    assert loaded.train_images.shape == (5, *(tail or (1,)), 6, 7)
    assert np.array_equal(loaded.train_images.permute(0, 2, 3, 1).numpy(), images.reshape(5, 6, 7, -1))
    assert (loaded.labels, loaded.train_labels.tolist()) == (("0", "1", "2"), [0, 1, 2, 0, 1])


@pytest.mark.parametrize("dtype", ["uint8", "int32", ">i4", "uint64"])
def test_labels_may_be_any_whole_numbers(dtype: str) -> None:
    loaded = load_npz(packed(arrays(train_labels=np.array([4, 0, 1, 2, 3], dtype=dtype))), "own")
    assert loaded.train_labels.tolist() == [4, 0, 1, 2, 3]
    assert (loaded.train_labels.dtype, len(loaded.labels)) == (torch.int64, 5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(({part: None}, [part, "it needs"]) for part in PARTS),
        ({"train_images": np.zeros((5, 6, 5))}, ["train_images", "float64", "uint8"]),
        ({"train_images": np.zeros((5, 6, 5), np.int8)}, ["train_images", "int8"]),
        ({"train_images": np.zeros((5, 30), np.uint8)}, ["train_images", "(5, 30)"]),
        ({"train_images": np.zeros((5, 6, 5, 2), np.uint8)}, ["(5, 6, 5, 2)", "C 1 or 3"]),
        ({"train_images": np.zeros((5, 3, 6, 5), np.uint8)}, ["(5, 3, 6, 5)", "(N, H, W, C)"]),
        ({"train_images": np.uint8(3)}, ["train_images", "()"]),
        ({"test_images": np.zeros((3, 0, 5), np.uint8)}, ["test_images", "(3, 0, 5)"]),
        ({"test_images": np.zeros((0, 6, 5), np.uint8), "test_labels": np.zeros(0, int)}, ["test_images", "(0, 6, 5)"]),
        ({"test_labels": np.array([0, 1])}, ["test_labels", "(2,)"]),
        ({"test_labels": np.array([[0], [1], [2]])}, ["test_labels", "(3, 1)"]),
        ({"test_labels": np.array([0.0, 1.0, 2.0])}, ["test_labels", "float64"]),
        ({"test_labels": np.array(["a", "b", "c"])}, ["test_labels", "<U1"]),
        ({"test_labels": np.array([True, False, True])}, ["test_labels", "bool"]),
        ({"test_labels": np.array([0, -1, 2])}, ["test_labels", "-1", "numbered from 0"]),
        ({"test_labels": np.array([0, 1, 2**63], np.uint64)}, ["test_labels", str(2**63)]),
        ({"test_images": np.zeros((3, 6, 5, 3), np.uint8)}, ["1 channels", "test 3"]),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(DamagedFile) as refusal:
        load_npz(packed(arrays(**changes)), "own.npz")
    assert str(refusal.value).startswith("own.npz: ")
    assert [word for word in words if word not in str(refusal.value)] == []


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_truncated_npz_is_refused_at_every_length(save: Callable[..., None]) -> None:
    whole = packed(arrays(), save)
    for length in (*range(0, len(whole), 13), len(whole) - 1):
        with pytest.raises(DamagedFile, match=r"^own\.npz: "):
            load_npz(whole[:length], "own.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_bit_flipped_npz_is_refused_or_is_still_the_same_data(save: Callable[..., None]) -> None:
    whole = packed(arrays(), save)
    original, refused = load_npz(whole, "own.npz"), 0
    for place in range(len(whole)):
        flipped = whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
        try:
            assert same(load_npz(flipped, "own.npz"), original)
        except DamagedFile:
            refused += 1
    assert refused > len(whole) / 2


def test_a_flipped_shape_that_reads_only_part_of_an_array_is_refused() -> None:
    images = np.random.default_rng(2).integers(0, 256, (200, 28, 28), dtype=np.uint8)
    whole = packed(arrays(train_images=images, train_labels=np.arange(200) % 3, test_images=images[:3]))
    flipped = whole.replace(b"(200, 28, 28)", b"(200, 28, 20)")  # one bit: 8 is 0x38, 0 is 0x30
    assert flipped != whole
    with pytest.raises(DamagedFile):
        load_npz(flipped, "own.npz")


FOREIGN = {
    "nothing": b"",
    "two bytes": b"PK",
    "text": b"hello",
    "zeros": bytes(500),
    "pickle": pickle.dumps([1, 2]),
    "start of an array": b"\x93NUMPY",
    "noise": random.Random(0).randbytes(900),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_bytes_are_no_npz(what: str, tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    path.write_bytes(FOREIGN[what])
    with pytest.raises(DamagedFile, match=r"own\.npz: not a readable \.npz"):
        load_dataset(str(path))


def test_other_zip_files_and_a_bare_array_are_no_npz() -> None:
    bare, other = io.BytesIO(), io.BytesIO()
    np.save(bare, np.zeros((3, 4, 4), np.uint8))
    with zipfile.ZipFile(other, "w") as archive:
        for part in PARTS:
            archive.writestr(f"{part}.npy", b"no array")
    for content in (bare.getvalue(), other.getvalue()):
        with pytest.raises(DamagedFile):
            load_npz(content, "own.npz")


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_object_arrays_and_pickles_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    for content in (packed(arrays(train_labels=np.array([trap] * 5, dtype=object))), pickle.dumps(trap)):
        with pytest.raises(DamagedFile):
            load_npz(content, "own.npz")
    assert not trap.path.exists()
    pickle.loads(pickle.dumps(trap))
    assert trap.path.exists()


def test_an_absent_npz_and_a_folder_are_refused_by_path(tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    for name in ("absent.npz", "folder.npz"):
        with pytest.raises(BadInput, match=name):
            load_dataset(str(tmp_path / name))


# Making images the model's input


def test_a_28_pixel_digit_gets_a_border_in_a_32_pixel_input() -> None:
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    fitted = fit(images, Preprocessing(1, 28, 2, (0.0,), (1.0,)))
    assert fitted.shape == (2, 1, 32, 32)
    assert torch.equal(fitted[:, :, 2:30, 2:30], images)
    assert int(fitted.sum()) == int(images.sum())


@pytest.mark.parametrize(("height", "width", "inside"), [(10, 40, (8, 32)), (40, 10, (32, 8)), (64, 32, (32, 16)), (20, 3000, (1, 32))])
def test_scaling_keeps_the_aspect_ratio_and_leaves_the_rest_black(height: int, width: int, inside: tuple[int, int]) -> None:
    fitted = fit(torch.full((1, 1, height, width), 255, dtype=torch.uint8), GREY)[0, 0]
    top, left = (32 - inside[0]) // 2, (32 - inside[1]) // 2
    expected = torch.zeros(32, 32, dtype=torch.uint8)
    expected[top : top + inside[0], left : left + inside[1]] = 255
    assert torch.equal(fitted, expected)


@pytest.mark.parametrize("side", [1, 8, 28, 32, 100])
def test_a_plain_image_of_any_size_stays_plain(side: int) -> None:
    fitted = fit(torch.full((3, 1, side, side), 77, dtype=torch.uint8), RGB)
    assert fitted.shape == (3, 3, 32, 32)
    assert fitted.dtype == torch.uint8
    assert (fitted == 77).all()


def test_an_image_that_fits_is_not_touched() -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(fit(images, RGB), images)


def test_grey_becomes_colour_by_repeating_and_colour_becomes_grey_as_in_pillow() -> None:
    colour = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    by_pillow = torch.from_numpy(np.array(Image.fromarray(colour[0].permute(1, 2, 0).numpy()).convert("L")))
    grey = fit(colour, GREY)
    assert (grey[0, 0].int() - by_pillow.int()).abs().max() <= 1
    assert torch.equal(fit(grey, RGB), grey.repeat(1, 3, 1, 1))


@pytest.mark.parametrize(("mean", "std"), [((0.1,), (0.3,)), ((0.5,) * 3, (0.25,) * 3), ((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))])
def test_normalise_is_pixel_over_255_minus_mean_over_std(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    preprocessing = Preprocessing(len(mean), 16, 0, mean, std)
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, len(mean), 1, 1)
    shape = (1, len(mean), 1, 1)
    expected = (pixels.double() / 255 - torch.tensor(mean).double().reshape(shape)) / torch.tensor(std).double().reshape(shape)
    found = normalise(pixels, preprocessing)
    assert (found.dtype, found.shape) == (torch.float32, pixels.shape)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    buffer = torch.full(pixels.shape, 9.0)
    assert normalise_into(buffer, pixels, preprocessing) is buffer
    assert torch.equal(buffer, found)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_black_and_white_map_to_the_models_pixel_range(model: Any, digits: Dataset) -> None:
    preprocessing = preprocessing_for(digits, 1, 32, model.pixel_range)
    ends = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)
    assert normalise(ends, preprocessing).flatten().tolist() == pytest.approx(list(model.pixel_range), abs=1e-6)


@pytest.mark.parametrize(
    ("side", "size", "resize", "padding"),
    [
        (28, 32, 28, 2),
        (30, 32, 30, 1),
        *((side, 32, 32, 0) for side in (8, 26, 31, 32, 64)),
        *((side, 28, 28, 0) for side in (8, 28, 32)),
    ],
)
def test_a_slightly_smaller_image_is_padded_and_every_other_resized(side: int, size: int, resize: int, padding: int) -> None:
    images, labels = torch.zeros(1, 1, side, side, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    dataset = Dataset("made up", ("0",), images, labels, images, labels)
    found = preprocessing_for(dataset, 3, size, (0.0, 1.0))
    assert (found.resize, found.padding) == (resize, padding)
    assert found.input_shape == (3, size, size)
    assert fit(images, found).shape == (1, 3, size, size)


# Image files


def written(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.fixture
def gradient() -> np.ndarray[Any, Any]:
    """A 32 x 32 grey image without symmetry."""
    rows, columns = np.mgrid[0:32, 0:32]
    return (7 * rows + columns // 2).astype(np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("preprocessing", [GREY, RGB], ids=["grey", "rgb"])
def test_png_files_of_every_mode_give_their_pixels(mode: str, preprocessing: Preprocessing, gradient: Any, tmp_path: Path) -> None:
    expected = np.where(gradient > 100, 255, 0).astype(np.uint8) if mode == "1" else gradient
    image = Image.fromarray(expected.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(expected).convert(mode)
    assert image.mode == mode
    found = load_image(written(tmp_path / "image.png", image), preprocessing)
    assert (found.dtype, found.shape) == (torch.uint8, (1, *preprocessing.input_shape))
    assert all(np.array_equal(channel.numpy(), expected) for channel in found[0])


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_files_of_every_mode_give_their_pixels(mode: str, gradient: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "image.jpg", Image.fromarray(gradient).convert("RGB").convert(mode), quality=95)
    for preprocessing in (GREY, RGB):
        found = load_image(path, preprocessing)[0].numpy().astype(int)
        assert np.abs(found - gradient).max() <= 12


def test_colours_come_in_the_order_red_green_blue(tmp_path: Path) -> None:
    found = load_image(written(tmp_path / "image.png", Image.new("RGB", (32, 32), (10, 20, 30))), RGB)
    assert found[0, :, 5, 5].tolist() == [10, 20, 30]


TURNS: dict[int, Callable[[Any], Any]] = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(np.transpose(pixels), 2),
    8: lambda pixels: np.rot90(pixels, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_rotation_is_applied(orientation: int, gradient: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    png = load_image(written(tmp_path / "image.png", Image.fromarray(gradient), exif=exif), GREY)[0, 0].numpy()
    jpeg = load_image(written(tmp_path / "image.jpg", Image.fromarray(gradient), exif=exif, quality=95), GREY)[0, 0].numpy()
    assert np.array_equal(png, TURNS[orientation](gradient))
    assert np.abs(jpeg.astype(int) - TURNS[orientation](gradient)).max() <= 12


@pytest.mark.parametrize(("size", "rows", "columns"), [((1, 1), 32, 32), ((3000, 20), 1, 32), ((20, 3000), 32, 1), ((700, 500), 23, 32)])
def test_images_of_any_size_are_scaled_to_fit(size: tuple[int, int], rows: int, columns: int, tmp_path: Path) -> None:
    found = load_image(written(tmp_path / "image.png", Image.new("L", size, 200)), GREY)[0, 0]
    assert (int((found == 200).any(dim=1).sum()), int((found == 200).any(dim=0).sum())) == (rows, columns)
    assert int((found == 200).sum()) == rows * columns == int((found > 0).sum())


def test_transparency_is_laid_on_black(tmp_path: Path) -> None:
    half, clear = Image.new("LA", (32, 32), (200, 128)), Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    assert load_image(written(tmp_path / "half.png", half), GREY).unique().tolist() == [100]
    assert load_image(written(tmp_path / "clear.png", clear), RGB).unique().tolist() == [0]


@pytest.mark.parametrize(("mode", "colour", "key"), [("P", 5, 5), ("L", 200, 200), ("I;16", 50_000, 50_000), ("RGB", (1, 2, 3), (1, 2, 3))])
def test_a_transparent_colour_is_laid_on_black(mode: str, colour: Any, key: Any, tmp_path: Path) -> None:
    image = Image.new(mode, (32, 32), colour)
    if mode == "P":
        image.putpalette([255] * 768)
    assert load_image(written(tmp_path / "opaque.png", image), GREY).any()
    assert not load_image(written(tmp_path / "clear.png", image, transparency=key), GREY).any()


@pytest.mark.parametrize("preprocessing", [GREY, RGB], ids=["grey", "rgb"])
def test_invert_swaps_dark_and_light(preprocessing: Preprocessing, gradient: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "image.png", Image.fromarray(gradient))
    assert torch.equal(load_image(path, preprocessing, invert=True), 255 - load_image(path, preprocessing))


def test_the_border_of_an_inverted_image_is_black(tmp_path: Path) -> None:
    path = written(tmp_path / "image.png", Image.new("L", (32, 8), 0))
    assert load_image(path, GREY, invert=True)[0, 0, :, 0].unique().tolist() == [0, 255]
    assert not load_image(path, GREY, invert=True)[0, 0, 0].any()


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(side: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (side, side, 3), dtype=np.uint8))


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG whose header, checksum and all, says that it is larger."""
    png = encoded(noise(), "PNG")
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


NO_IMAGES = {
    "nothing": b"",
    "text": b"hello, I am text",
    "zeros": bytes(1000),
    "a PNG's signature": b"\x89PNG\r\n\x1a\n",
    "a JPEG's first bytes": b"\xff\xd8\xff\xe0",
    "a PNG without rows": png_claiming(5, 0),
    "a bomb": png_claiming(60_000, 60_000),
    "a smaller bomb": png_claiming(12_000, 12_000),
    **{kind: encoded(noise(), kind) for kind in ("GIF", "BMP", "TIFF")},
}


@pytest.mark.parametrize("what", NO_IMAGES)
def test_files_that_are_no_png_or_jpeg_and_decompression_bombs_are_refused(what: str, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(NO_IMAGES[what])
    with pytest.raises(DamagedFile, match=r"image\.png: "):
        load_image(tmp_path / "image.png", RGB)


def test_a_jpeg_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    jpeg = encoded(noise(), "JPEG")
    size = jpeg.index(b"\xff\xc0") + 5
    (tmp_path / "image.jpg").write_bytes(jpeg[:size] + b"\xff\xff\xff\xff" + jpeg[size + 4 :])
    with pytest.raises(DamagedFile, match=r"image\.jpg: .*pixels"):
        load_image(tmp_path / "image.jpg", RGB)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_truncated_image_is_refused_at_every_length(format: str, tmp_path: Path) -> None:
    whole = encoded(noise(), format)
    ending = 20 if format == "PNG" else 2  # all pixels are there
    for length in range(0, len(whole) - ending, 7):
        (tmp_path / "image").write_bytes(whole[:length])
        with pytest.raises(DamagedFile):
            load_image(tmp_path / "image", RGB)


# Two entries, orientation 6 and a resolution of 72: (tag, type, count, value) each, big-endian.
EXIF = bytes.fromhex("4d4d002a 00000008 0002  0112 0003 00000001 00060000  011a 0005 00000001 00000026  00000000  00000048 00000001")


def test_damaged_exif_never_raises_anything_else_nor_warns(tmp_path: Path) -> None:
    damaged = [EXIF[:length] for length in range(len(EXIF))]
    damaged += [EXIF[:place] + bytes([value]) + EXIF[place + 1 :] for place in range(len(EXIF)) for value in (1, 2, 7, 13)]
    outcomes = set()
    for kind in ("JPEG", "PNG"):
        for block in damaged:
            (tmp_path / "image").write_bytes(encoded(noise(4), kind, exif=b"Exif\0\0" + block))
            try:
                outcomes.add(load_image(tmp_path / "image", RGB).shape)
            except DamagedFile:
                outcomes.add(None)
    assert (1, 3, 32, 32) in outcomes


def test_an_absent_image_and_a_folder_are_refused_by_path(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.png", tmp_path):
        with pytest.raises(BadInput, match=str(path)):
            load_image(path, GREY)

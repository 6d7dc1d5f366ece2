"""The wheel is complete, imports are where they belong, and nothing of this machine is in the tree."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import lenet_deploy
from lenet_deploy import zoo

ROOT = Path(__file__).resolve().parent.parent
LIBRARY, COMMANDS = ROOT / "lenet_deploy", ROOT / "cli"
SOURCES = sorted(LIBRARY.rglob("*.py"))
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))

PUBLIC = [
    "BadInput",
    "BenchReport",
    "CannotWrite",
    "Environment",
    "ExportReport",
    "Failure",
    "GateFailed",
    "Inconclusive",
    "LenetDeployError",
    "Measurement",
    "ParityFailed",
    "ParityReport",
    "ParityResult",
    "Unusable",
    "__version__",
    "benchmark",
    "check_pair",
    "check_parity",
    "export",
    "load",
    "probe",
]
HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "onnxscript", "torchvision", "safetensors", "PIL")
# Heavy or optional packages and the only files that may import them, even inside a function.
LARGEST_WHEEL_BYTES = 5_000_000
HOMES = {
    "onnx": {"exporters/onnx.py", "exporters/signature.py", "runtimes/onnx_taps.py", "runtimes/onnxruntime.py"},
    "onnxruntime": {"runtimes/onnxruntime.py"},
    "torchvision": {"data.py"},
    "PIL": {"data.py"},
    "safetensors": {"checkpoint.py", "resume.py"},
    "matplotlib": {"report/plots.py"},
    "tensorboard": set(),  # by torch.utils.tensorboard alone
    "onnxscript": set(),
    "sklearn": set(),
    "pynvml": {"bench/nvml.py"},
    "mlperf_loadgen": {"bench/loadgen.py"},
    "scipy": {"bench/statistics.py"},
    "rich": set(),
    "typer": set(),
    "cli": set(),
}


def modules() -> dict[str, str]:
    """Path inside the wheel of every Python file, and the module's name."""
    library = {str(path.relative_to(ROOT)) for path in SOURCES}
    commands = {f"lenet_deploy/cli/{path.relative_to(COMMANDS)}" for path in COMMANDS.rglob("*.py")}
    return {path: path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in sorted(library | commands)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network from a copy, so that the tree stays clean."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for folder in (LIBRARY, COMMANDS):
        shutil.copytree(folder, copy / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, copy)
    done = subprocess.run([sys.executable, "-m", "pip", *build], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content as pip installs it, without its dependencies."""
    target = tmp_path_factory.mktemp("installed")
    install = ("install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", target, wheel)
    done = subprocess.run([sys.executable, "-m", "pip", *install], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def run_isolated(program: str, *arguments: str | Path) -> str:
    """Standard output of a program that sees neither this directory nor PYTHON* variables."""
    done = subprocess.run([sys.executable, "-I", "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    weights = {f"lenet_deploy/zoo/{name}.{suffix}" for name in zoo.names() for suffix in ("safetensors", "md")}
    assert names == {*modules(), "lenet_deploy/digits.npz", "lenet_deploy/py.typed", *weights}
    assert wheel.stat().st_size < LARGEST_WHEEL_BYTES


def test_the_wheel_is_pure_and_carries_licence_and_entry_point(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "lenet-deploy = lenet_deploy.cli:app" in entry_points


def test_every_module_of_the_installed_wheel_imports_from_there(installed: Path) -> None:
    names = [name for name in modules().values() if not name.endswith(".__main__")]  # which runs the command line
    program = (
        "import importlib, json, sys; target, names = sys.argv[1], json.loads(sys.argv[2]); sys.path.insert(0, target); "
        "print(json.dumps([importlib.import_module(name).__file__ for name in names]))"
    )
    files = json.loads(run_isolated(program, installed, json.dumps(names)))
    assert len(files) == len(names)
    assert all(Path(file).is_relative_to(installed) for file in files)


def test_the_installed_wheel_answers_on_its_own(installed: Path) -> None:
    program = (
        "import runpy, sys; sys.path.insert(0, sys.argv[1]); sys.argv[:] = ['lenet-deploy', '--version']; "
        "runpy.run_module('lenet_deploy.cli', run_name='__main__')"
    )
    assert run_isolated(program, installed) == f"lenet-deploy {lenet_deploy.__version__}\n"


def test_the_installed_wheel_finds_its_trained_weights(installed: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from lenet_deploy import zoo; print(*(zoo.load(name).model for name in zoo.names()))"
    )
    assert run_isolated(program, installed).split() == [trained.model for trained in zoo.ZOO]


def test_the_installed_wheel_finds_its_digits(installed: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from lenet_deploy import data; "
        "found = data.load_dataset('digits'); print(len(found.train_images) + len(found.test_images))"
    )
    assert run_isolated(program, installed) == "1797\n"


def test_the_public_names_are_these() -> None:
    assert lenet_deploy.__all__ == PUBLIC


@pytest.mark.parametrize("name", [name for name in PUBLIC if not name.startswith("__")])
def test_every_public_name_is_documented_and_typed(name: str) -> None:
    public = getattr(lenet_deploy, name)
    assert public.__doc__
    assert not public.__doc__.startswith(f"{name}(")  # what dataclasses write where nobody wrote anything
    if inspect.isfunction(public):
        signature = inspect.signature(public)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert lenet_deploy.__version__ == project["version"] == metadata.version("lenet-deploy")


def test_the_package_and_its_public_names_load_nothing_heavy() -> None:
    program = (
        "import sys, lenet_deploy; [getattr(lenet_deploy, name) for name in lenet_deploy.__all__]; "
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = ast.literal_eval(run_isolated(program))
    assert "lenet_deploy" in loaded
    assert not set(HEAVY) & set(loaded)


def test_registries_and_api_import_where_no_dependency_is_installed() -> None:
    program = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from lenet_deploy import api, environment, models, records, sources, store, variants
from lenet_deploy.report import table, tables
print(len(variants.VARIANTS), len(models.MODELS))
"""
    from lenet_deploy.models import MODELS
    from lenet_deploy.variants import VARIANTS

    assert run_isolated(program, *HEAVY, "rich", "typer", "click") == f"{len(VARIANTS)} {len(MODELS)}\n"


def test_training_and_eager_work_without_the_packages_that_only_exports_and_pictures_need() -> None:
    program = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))  # None: as where it is not installed
from lenet_deploy import load
from lenet_deploy.data import load_dataset
from lenet_deploy.runtimes import eager, torchscript
from lenet_deploy.train import TrainConfig
print(load("lenet5").model, len(load_dataset("digits").labels), eager.probe("cpu").usable, torchscript.probe("cpu").usable)
"""
    absent = ("onnxruntime", "onnx", "onnxscript", "torchvision", "PIL", "rich", "typer")
    assert run_isolated(program, *absent) == "lenet5 10 True True\n"


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of every absolute import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with its dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("package", HOMES)
def test_a_heavy_package_is_imported_only_in_its_own_files(package: str) -> None:
    found = {str(path.relative_to(LIBRARY)) for path in SOURCES if package in imports(ast.parse(path.read_text()))}
    assert found == HOMES[package]


@each_source
def test_the_library_never_prints_and_never_exits(source: Path) -> None:
    tree = ast.parse(source.read_text())
    called = {name for name, _ in calls(tree)}
    assert not called & {"print", "exit", "quit", "sys.exit", "os._exit", "sys.stdout.write", "sys.stderr.write", "SystemExit"}
    raised = {ast.unparse(node.exc) for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc}
    assert "SystemExit" not in raised


@pytest.mark.parametrize("source", [*SOURCES, *sorted(COMMANDS.rglob("*.py"))], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_unpickler_reads_weights_only(source: Path) -> None:
    tree = ast.parse(source.read_text())
    for name, call in calls(tree):
        assert name not in {"pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec"}
        if name == "torch.load":
            assert [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "weights_only"] == ["True"]
        if name in {"np.load", "numpy.load"}:
            assert [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "allow_pickle"] == ["False"]


@pytest.mark.parametrize("source", sorted(COMMANDS.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_import_siblings_relatively_and_never_as_cli(source: Path) -> None:
    found = list(imports(ast.parse(source.read_text())))
    assert "cli" not in found
    assert "lenet_deploy.cli" not in source.read_text().replace("`python -m lenet_deploy.cli`", "")
    assert source.parent == COMMANDS  # it stays flat: subfolders would need packages of their own


def test_constraints_are_exact_versions_without_addresses() -> None:
    constraints = ROOT / "constraints.txt"
    if not constraints.exists():
        pytest.skip("constraints.txt is not written yet")
    lines = [line for line in constraints.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*( ?; ?[^;#@/]+)?", line)] == []


def tracked() -> list[Path]:
    """What git tracks or would track."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and a git checkout: an unpacked source tree has no list of tracked files")
    listing = ("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    done = subprocess.run(["git", "-C", ROOT, *listing], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        pytest.skip(f"git does not list this checkout: {done.stderr.strip()}")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


# Put together here, so that this file does not hold them.
FORBIDDEN = {
    "a path of the machine it was made on": re.compile(rb"(?<![\w.:/])/" + rb"(work|root|home/\w+|Users/\w+)/"),
    "the address of a package index": re.compile(rb"https?://[^\s\"'`)>]+/simple\b|--(extra-)?index" + rb"-url[ =]+\S*://"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_tracked_file_holds_anything_of_one_machine(what: str) -> None:
    files = tracked()
    found = {str(path.relative_to(ROOT)): match[0] for path in files if (match := FORBIDDEN[what].search(path.read_bytes()))}
    assert found == {}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"see /" + b"work/main", "a path of the machine it was made on"),
        (b'"/' + b'root/.cache"', "a path of the machine it was made on"),
        (b"pip --index" + b"-url https://host/x", "the address of a package index"),
        (b"https://host/" + b"simple/", "the address of a package index"),
    ],
)
def test_the_patterns_find_what_they_look_for(text: bytes, what: str) -> None:
    assert FORBIDDEN[what].search(text)

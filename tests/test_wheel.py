"""What a user installs: the wheel and the sdist, each in an environment of its own without a compiler."""

import ctypes
import email
import math
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import scikit_build_core
import torch
from filelock import FileLock

pytest.importorskip("logitless._native", reason="built without the extension (LOGITLESS_NO_NATIVE)")
from logitless import _native

pytestmark = pytest.mark.slow  # environments are made and packages built, once for all workers
ROOT = Path(__file__).parents[1]

LOSS = """
import shutil, sys
for tool in ("cc", "c++", "gcc", "g++", "clang", "cmake", "ninja", "make"):
    assert shutil.which(tool) is None, f"{tool} is there"
import torch, logitless as ll, logitless.functional as F
assert ll.__file__.startswith(sys.prefix), ll.__file__

torch.manual_seed(1)
logits = (3 * torch.randn(7, 1000)).requires_grad_()
target = torch.randint(1000, (7,))
exact = torch.nn.functional.cross_entropy(logits.double(), target)
(expected,) = torch.autograd.grad(exact, logits)
loss = F.cross_entropy(logits, target)
(gradient,) = torch.autograd.grad(loss, logits)
assert abs(loss.item() - exact.item()) <= 2**-23 * exact.item(), (loss, exact)
torch.testing.assert_close(gradient, expected, atol=2**-23, rtol=1e-5)

hidden, weight = torch.randn(65, 32), torch.randn(1000, 32)
words = torch.randint(1000, (65,))
exact = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, words)
lazy = F.cross_entropy(ll.linear(hidden, weight), words)
assert abs(lazy.item() - exact.item()) <= 1e-6 * exact.item(), (lazy, exact)
status = ll.backends()["cpu"]
"""


@dataclass(frozen=True)
class Distributions:
    wheel: Path
    sdist: Path


@dataclass(frozen=True)
class Environment:
    """A virtual environment with torch and what the tests have installed, except logitless."""

    python: Path

    def install(self, distribution: Path, *options: str, **variables: str) -> None:
        # Without --no-deps: what the metadata asks for beyond what is there would be an error.
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--no-index", *options]
        done = subprocess.run(
            [*pip, str(distribution)], env=self._variables(**variables), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, code: str, **variables: str) -> str:
        done = subprocess.run(
            [str(self.python), "-W", "error", "-c", code],
            env=self._variables(**variables),
            cwd=self.python.parent,  # not the tree, from which logitless could be imported
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _variables(self, **variables: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LOGITLESS_", "PYTHON"))}
        return {**kept, "PATH": str(self.python.parent), **variables}


def _made_once(folder: Path) -> Iterator[bool]:
    """Yield whether the folder is there; whoever comes first makes it while the other workers wait."""
    with FileLock(f"{folder}.lock"):
        yield folder.exists()


def _shared(factory: pytest.TempPathFactory, worker: str) -> Path:
    base = factory.getbasetemp()
    return base if worker == "master" else base.parent  # of all workers of this run


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Distributions:
    out = _shared(tmp_path_factory, worker_id) / "dist"
    for done in _made_once(out):
        if not done:
            command = [sys.executable, str(ROOT / "tools" / "wheel.py"), "--from-tree", str(out)]
            built = subprocess.run(command, capture_output=True, text=True, check=False)
            assert built.returncode == 0, built.stdout + built.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return Distributions(wheel, sdist)


def _environment(folder: Path) -> Environment:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    asked = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = Path(
        subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    )
    others = folder / "others"
    others.mkdir()
    here = [Path(module.__file__).parents[1] for module in (torch, scikit_build_core)]
    for package in (package for site_packages in here for package in site_packages.iterdir()):
        if "logitless" not in package.name and package.suffix != ".pth" and not (others / package.name).exists():
            (others / package.name).symlink_to(package)
    (packages / "others.pth").write_text(f"{others}\n")
    return Environment(python)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory, worker_id: str, distributions: Distributions) -> Environment:
    folder = _shared(tmp_path_factory, worker_id) / "wheel-environment"
    for done in _made_once(folder):
        if not done:
            _environment(folder).install(distributions.wheel)
    return Environment(folder / "bin" / "python")


def test_one_wheel_serves_every_python(distributions: Distributions) -> None:
    _, _, python, abi, platforms = distributions.wheel.stem.split("-")
    assert (python, abi) == ("cp311", "abi3")
    assert "manylinux_2_28_x86_64" in platforms.split(".")
    names = set(zipfile.ZipFile(distributions.wheel).namelist())
    assert {"logitless/_native.abi3.so", "logitless/_native.pyi", "logitless/py.typed"} <= names
    assert not [name for name in names if "libgomp" in name or name.startswith(("csrc", "tests", "benchmarks"))]


def test_metadata(distributions: Distributions) -> None:
    archive = zipfile.ZipFile(distributions.wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    needed = [text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text]
    assert needed == ["torch>=2.9"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Programming Language :: Python :: 3.11" in metadata.get_all("Classifier")
    assert metadata["License-Expression"] == "Apache-2.0"


def test_sdist_holds_what_it_is_built_from(distributions: Distributions) -> None:
    with tarfile.open(distributions.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources <= names
    assert {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "src/logitless/_native.pyi"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".whl"))]


@pytest.mark.parametrize("isa", _native.native_info()["compiled"])
def test_loss_of_the_wheel(installed: Environment, isa: str) -> None:
    if isa not in _native.native_info()["supported"]:
        pytest.skip(f"this processor has no {isa}")
    code = LOSS + "assert status.available, status\nprint(ll.explain(F.cross_entropy, logits, target).backend, status)"
    said = installed.run(code, LOGITLESS_ISA=isa)
    assert said.startswith("cpu "), said
    assert f"isa {isa}" in said, said


def test_one_openmp_runtime(installed: Environment) -> None:
    """Two would each start a thread a core, and neither would know of `torch.set_num_threads`."""
    code = """
import pathlib, logitless, logitless.functional as F, torch
torch.set_num_threads(2)
F.cross_entropy(torch.zeros(512, 1000), torch.zeros(512, dtype=torch.int64))
for path in {line.split()[-1] for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if "omp" in line}:
    print(path)
"""
    (path,) = installed.run(code).split()
    assert Path(path).is_relative_to(Path(torch.__file__).resolve().parent), path


def test_sdist_without_a_compiler(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str, distributions: Distributions
) -> None:
    folder = _shared(tmp_path_factory, worker_id) / "sdist-environment"
    environment = _environment(folder)
    # The build backend is among the packages that the environment sees.
    environment.install(distributions.sdist, "--no-build-isolation", LOGITLESS_NO_NATIVE="1")
    said = environment.run(LOSS + "print(status.available, status.detail)")
    assert said.startswith("False this installation has no compiled kernels"), said


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="csrc/older_systems.cpp")
def test_the_older_exp_gives_the_same_numbers() -> None:
    """The wheel calls the version of exp that older systems have too; elsewhere they may be one."""
    libm, libc = ctypes.CDLL("libm.so.6"), ctypes.CDLL(None)
    libc.dlvsym.restype = ctypes.c_void_p
    libc.dlvsym.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)
    found = [libc.dlvsym(libm._handle, b"exp", version) for version in (b"GLIBC_2.2.5", b"GLIBC_2.29")]
    if None in found:
        pytest.skip("a system older than glibc 2.29 has one exp")
    older, newer = (ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)(address) for address in found)
    points = torch.linspace(-760, 720, 10007, dtype=torch.float64).tolist()
    points += [0.0, -0.0, 2**-60, -(2**-60), 709.782712893384, 709.7827128933841, math.inf, -math.inf]
    assert [older(x) for x in points] == [newer(x) for x in points]
    assert math.isnan(older(math.nan))


def _later_pythons() -> list[str]:
    """Python 3.12 and later on PATH or in a folder beside this one, as version managers lay them."""
    found = [shutil.which(f"python3.{minor}") for minor in range(12, 20)]
    found += [str(path) for path in sorted(Path(sys.base_prefix).parent.glob("*/bin/python3"))]
    asked = "import sys; raise SystemExit(not (3, 12) <= sys.version_info[:2])"
    return [
        python
        for python in found
        if python and subprocess.run([python, "-c", asked], capture_output=True, check=False).returncode == 0
    ]


CALL = """
import ctypes, importlib.util, sys
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
logits, target = (ctypes.c_float * 3)(), (ctypes.c_int64 * 1)(1)
address = ctypes.addressof
rows = (0, 1, address(logits), 1, 3, 1, 3, 1, 3)
nll, highest, log_sum = (ctypes.c_float * 1)(), (ctypes.c_float * 1)(), (ctypes.c_double * 1)()
statistics = (address(nll), 0, address(highest), address(log_sum), *[0] * 6)
bad = native.row_stats(*rows, address(target), -100, 0, 0, 0, 0, 0, *statistics)
gradient = (ctypes.c_float * 3)()
scales = (1.0, 0.0, -1.0, 0.0, 0.0, 0.0)
native.row_grad(
    *rows, address(gradient), 3, 1, 3, address(target), -100, 0, 0, 0, 0, 0, 0, address(highest), address(log_sum),
    0, 0, *scales, *[0] * 5
)
print(bad, f"{nll[0]:.6f}", *(f"{element:.6f}" for element in gradient))
"""


def test_the_extension_loads_into_later_pythons(distributions: Distributions, tmp_path: Path) -> None:
    """The same file, in every Python that is here; torch is not, so the rows are an array of ctypes."""
    extension = zipfile.ZipFile(distributions.wheel).extract("logitless/_native.abi3.so", tmp_path)
    pythons = _later_pythons()
    if not pythons:
        pytest.skip("no later Python is installed")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(Path(torch.__file__).parent / "lib")}  # where libgomp is
    for python in pythons:
        command = [python, "-c", CALL, extension]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.stdout == "-1 1.098612 0.333333 -0.666667 0.333333\n", (python, done.stdout, done.stderr)

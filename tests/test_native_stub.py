"""`_native.pyi` says what the extension takes: the same functions, with the same parameters of the same types in the
same order. Most parameters are numbers told apart by their place alone, so a stub that is wrong misleads every caller.
"""

import ast
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("logitless._native", reason="built without the extension (LOGITLESS_NO_NATIVE)")
from logitless import _native

STUB_FILE = Path(__file__).parents[1] / "src" / "logitless" / "_native.pyi"
STUB = ast.parse(STUB_FILE.read_text())
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}

# What the extension's own type says of the stub's, which is finer: an _Operand is a tuple or None.
TYPES = {"_Operand": "object", "NativeInfo": "object"}


def _coarse(annotation: ast.expr | None) -> str:
    assert annotation is not None
    written = ast.unparse(annotation)
    return TYPES.get(written, written.partition("[")[0])


def test_stubtest(tmp_path: Path) -> None:
    """mypy compares the two: names of functions and parameters, their order and kinds, and the constants."""
    # By themselves, in a folder of their own: as a part of the package mypy would read all of torch for them.
    extension = Path(_native.__file__)
    (tmp_path / extension.name).symlink_to(extension)
    shutil.copy(STUB_FILE, tmp_path)
    libraries = str(Path(torch.__file__).parent / "lib")  # where libgomp is
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "MYPYPATH": str(tmp_path), "LD_LIBRARY_PATH": libraries}
    command = [sys.executable, "-m", "mypy.stubtest", "_native"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_same_names() -> None:
    there = {name for name in dir(_native) if not name.startswith("__")}
    constants = {
        node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert there == set(FUNCTIONS) | constants
    assert all(isinstance(getattr(_native, name), int) for name in constants)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_signature(name: str) -> None:
    stub, function = FUNCTIONS[name], getattr(_native, name)
    parameters = [*stub.args.posonlyargs, *stub.args.args, *stub.args.kwonlyargs]
    assert parameters == stub.args.posonlyargs, "every argument comes by position"
    assert [parameter.arg for parameter in parameters] == list(inspect.signature(function).parameters)
    taken, _, given = function.__doc__.rpartition(") -> ")
    types = [part for part in taken.removeprefix("(").split(", ") if part]
    assert types == [_coarse(parameter.annotation) for parameter in parameters]
    returned = _coarse(stub.returns)
    assert given == returned or (given == "object" and returned in ("tuple", "object")), (given, returned)


def test_a_wrong_call_says_what_is_wrong() -> None:
    with pytest.raises(TypeError, match="product_serves: expected 1 positional arguments, got 2"):
        _native.product_serves(0, 1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="product_serves: dtype: expected int, got 'x'"):
        _native.product_serves("x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pool_block: shape: expected tuple, got 3"):
        _native.pool_block(0, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="product_serves: dtype: expected int, got 4294967296"):
        _native.product_serves(2**32)
    with pytest.raises(ValueError, match="no such dtype"):
        _native.pool_block(9, (3,))
    with pytest.raises(RuntimeError, match="expected one of avx512, avx2, portable"):
        _native.select_isa("none")

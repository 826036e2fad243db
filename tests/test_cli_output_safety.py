"""Outputs harm nothing: no input is overwritten, devices and links stay what they are, one failure costs one output."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from logitless.cli.outputs import Outputs
from models import TEXT, save_two_and_text
from test_cli_compare import command


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_two_and_text(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, with models and a text, which is the current one."""
    shutil.copytree(saved, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def contents(folder: Path) -> dict[str, tuple[str, int, str]]:
    """Return kind, mode and digest (or target) of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        if path.is_symlink():
            inside = os.readlink(path)
        else:
            inside = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(folder))] = (stat.filemode(state.st_mode), state.st_ino, inside)
    return found


def _prepared(folder: Path) -> None:
    """Make what the cases below need: links, a socket, GGUF files whole and in parts."""
    (folder / "link").symlink_to("text.txt")
    os.link(folder / "text.txt", folder / "hard.jsonl")
    (folder / "whole.gguf").write_bytes(b"GGUF" + bytes(100))
    (folder / "gguf-link").symlink_to("whole.gguf")
    for part in (1, 2):
        (folder / f"split-{part:05d}-of-00002.gguf").write_bytes(b"GGUF" + bytes([part] * 100))
    (folder / "blob").write_bytes(b"weights")
    (folder / "base" / "linked.safetensors").symlink_to("../blob")
    (folder / "loop").symlink_to("loop")
    (folder / "empty").mkdir()
    (folder / "out.json").write_text("old")
    (folder / "same.json").symlink_to("out.json")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")


COMPARE = ("compare", "base", "other", "--text", "text.txt")
GGUF = ("compare", "whole.gguf", "base", "--text", "text.txt")
SPLIT = ("compare", "base", "split-00001-of-00002.gguf", "--text", "text.txt")
# What is given, and what the one line must say.
REFUSED: list[tuple[tuple[str, ...], str]] = [
    ((*COMPARE, "--json", "text.txt"), "--json text.txt is an input"),
    ((*COMPARE, "--json", "./base/../text.txt"), "is an input"),
    ((*COMPARE, "--json", "link"), "--json link is an input"),
    ((*COMPARE, "--html", "hard.jsonl"), "--html hard.jsonl is an input"),
    ((*COMPARE, "--out", "hard.jsonl"), "--out hard.jsonl is an input"),
    ((*COMPARE, "--json", "base/config.json"), "lies in the model directory base"),
    ((*COMPARE, "--html", "other/model.safetensors"), "lies in the model directory other"),
    ((*COMPARE, "--json", "base/new.json"), "lies in the model directory base"),
    ((*COMPARE, "--json", "base"), "lies in the model directory base"),
    ((*COMPARE, "--json", "blob"), "--json blob is an input, base"),
    ((*GGUF, "--json", "whole.gguf"), "--json whole.gguf is an input"),
    ((*GGUF, "--json", "gguf-link"), "--json gguf-link is an input"),
    ((*SPLIT, "--html", "split-00002-of-00002.gguf"), "is an input"),
    ((*COMPARE, "--json", "empty"), "cannot write empty: it is a directory"),
    ((*COMPARE, "--json", "missing/out.json"), "cannot write missing/out.json: No such file or directory"),
    ((*COMPARE, "--json", "text.txt/out.json"), "cannot write text.txt/out.json: Not a directory"),
    ((*COMPARE, "--json", "loop"), "cannot write loop"),
    ((*COMPARE, "--json", "socket"), "cannot write socket: it is a socket"),
    ((*COMPARE, "--json", "n" * 300), "File name too long"),
    ((*COMPARE, "--json", "out.json", "--html", "out.json"), "two outputs are the same file: out.json"),
    ((*COMPARE, "--json", "out.json", "--html", "same.json"), "two outputs are the same file: same.json"),
    ((*COMPARE, "--json", "-", "--html", "-"), "two outputs are the same file: -"),
    ((*COMPARE, "--out", "rows.txt"), "rows go to a .csv, a .parquet or a .jsonl file"),
    ((*COMPARE, "--out", "rows"), "rows go to a .csv, a .parquet or a .jsonl file"),
    ((*COMPARE, "--text", "no [red]such[/red]\nfile"), "cannot read text no [red]such[/red]\\nfile"),
    ((*COMPARE, "--window", "0"), "--window"),
    ((*COMPARE, "--window", "many"), "--window"),
    ((*COMPARE, "--max-tokens", "0"), "--max-tokens"),
    ((*COMPARE, "--jsn", "out.json"), "No such option: --jsn"),
    (("compare", "base", "other"), "--text"),
    (("compare", "base", "--text", "text.txt"), "candidates"),
    (("campare", "base"), "No such command 'campare'"),
    (("score", "base", "--text", "text.txt", "--json", "text.txt"), "is an input"),
    (("score", "base", "--text", "text.txt", "--out", "hard.jsonl"), "is an input"),
]


@pytest.mark.parametrize(("arguments", "line"), REFUSED, ids=[" ".join(given)[:60] for given, _ in REFUSED])
def test_what_cannot_be_written_or_read_is_one_line_and_changes_nothing(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    line: str,
) -> None:
    from logitless.cli import comparison, score

    for module in (comparison, score):
        monkeypatch.setattr(module, "load_model", lambda name: pytest.fail("a model was loaded"))
    _prepared(place)
    before = contents(place)
    assert command(monkeypatch, *arguments) == 2
    assert contents(place) == before
    output, error = capfd.readouterr()
    assert output == ""
    lines = error.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("logitless: ")
    assert line in lines[0]


def test_the_demo_does_not_overwrite_its_model(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from logitless.cli.demo import packaged_model

    before = packaged_model().stat()
    assert command(monkeypatch, "demo", "--json", packaged_model(), "--html", "/dev/null") == 2
    assert packaged_model().stat() == before
    assert "is an input" in capfd.readouterr().err


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def compare(*options: object) -> int:
        return command(monkeypatch, "compare", "base", "other", "--text", "text.txt", "--window", 64, *options)

    return compare


def test_a_device_and_a_fifo_are_written_to_and_stay(place: Path, run: Callable[..., int]) -> None:
    os.mkfifo("fifo")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((place / "fifo").read_bytes()))
    reader.start()
    before = os.stat("/dev/null")
    assert run("--json", "fifo", "--html", "/dev/null", "--out", "/dev/null") == 0
    reader.join()
    assert json.loads(read[0])["schema"]["name"] == "logitless.comparison"
    assert stat.S_ISFIFO(os.lstat("fifo").st_mode)
    assert (os.stat("/dev/null").st_mode, os.stat("/dev/null").st_rdev) == (before.st_mode, before.st_rdev)


def test_a_link_stays_a_link_and_its_target_is_written(place: Path, run: Callable[..., int]) -> None:
    (place / "store").mkdir()
    (place / "old.json").symlink_to("store/target.json")
    (place / "new.html").symlink_to("store/new.html")
    (place / "store" / "target.json").write_text("old")
    assert run("--json", "old.json", "--html", "new.html") == 0
    assert (place / "old.json").is_symlink()
    assert (place / "new.html").is_symlink()
    assert json.loads((place / "store" / "target.json").read_text())["candidates"]
    assert (place / "store" / "new.html").read_text("utf-8").startswith("<!doctype html>")
    assert sorted(os.listdir("store")) == ["new.html", "target.json"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o755])
def test_the_mode_of_a_file_is_kept(place: Path, run: Callable[..., int], mode: int) -> None:
    (place / "out.json").write_text("old")
    (place / "out.json").chmod(mode)
    assert run("--json", "out.json") == 0
    assert stat.S_IMODE((place / "out.json").stat().st_mode) == mode
    assert json.loads((place / "out.json").read_text())


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser writes files of others and could give them away")
def test_the_owner_of_a_file_is_kept(place: Path, run: Callable[..., int]) -> None:
    (place / "out.json").write_text("old")
    os.chown(place / "out.json", 65534, 65533)
    assert run("--json", "out.json") == 0
    state = (place / "out.json").stat()
    assert (state.st_uid, state.st_gid) == (65534, 65533)


def test_a_new_file_has_the_mode_of_the_umask(place: Path, run: Callable[..., int]) -> None:
    before = os.umask(0o027)
    try:
        assert run("--json", "out.json") == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((place / "out.json").stat().st_mode) == 0o640


def test_standard_output_takes_one_output_and_the_tables_make_room(
    run: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("--json", "-", "--html", "page.html") == 0
    output, error = capfd.readouterr()
    assert json.loads(output)["schema"]["name"] == "logitless.comparison"
    assert "Divergence from p = base" in error
    assert run("--json", "out.json") == 0
    assert "Divergence from p = base" in capfd.readouterr().out
    assert run("--out", "-") == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert {row["candidate"] for row in rows} == {"other"}


def test_tables_come_before_files(
    place: Path, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    printed: list[str] = []
    write = Outputs.write

    def noting(self: Outputs, option: str, fill: Any) -> None:
        printed.append(capfd.readouterr().out)
        write(self, option, fill)

    monkeypatch.setattr(Outputs, "write", noting)
    assert run("--json", "out.json") == 0
    assert "Divergence from p = base" in printed[0]


@pytest.mark.parametrize("failing", ["--json", "--out", "--html"])
def test_an_output_that_fails_costs_no_other(
    place: Path, run: Callable[..., int], capfd: pytest.CaptureFixture[str], failing: str
) -> None:
    names = {"--json": "out.json", "--out": "rows.jsonl", "--html": "page.html"} | {failing: "/dev/full"}
    assert run(*(part for pair in names.items() for part in pair)) == 1
    output, error = capfd.readouterr()
    assert "Divergence from p = base" in output
    assert f"logitless: {failing} /dev/full was not written: No space left on device\n" in error
    assert "Traceback" not in error
    left = sorted(set(os.listdir(place)) - {"base", "other", "text.txt"})
    assert left == sorted(set(names.values()) - {"/dev/full"})
    for name in left:
        assert f"wrote {name}\n" in error
        assert (place / name).stat().st_size > 1000


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_rows_of_a_comparison_hold_every_candidate_and_token(
    place: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    out = place / f"rows.{suffix}"
    given = ("base", "other", "base:int4", "--text", "text.txt", "--window", 64, "--out", out, "--json", "sum.json")
    assert command(monkeypatch, "compare", *given) == 0
    if suffix == "parquet":
        rows = pyarrow.parquet.read_table(out).to_pylist()
    elif suffix == "jsonl":
        rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    else:
        with out.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    count = len(TEXT.encode()) - 1
    assert [row["candidate"] for row in rows] == ["other"] * count + ["int4"] * count
    assert "".join(row["token"] for row in rows[:count]) == TEXT[1:]
    results = json.loads((place / "sum.json").read_text())
    for number, candidate in enumerate(results["candidates"]):
        part = rows[number * count : (number + 1) * count]
        for column, mean in (
            ("kl", candidate["overall"]["pair"]["kl_base_candidate"]["mean"]),
            ("js", candidate["overall"]["pair"]["js"]["mean"]),
            ("nll_candidate", candidate["overall"]["candidate"]["cross_entropy"]),
            ("cosine", candidate["overall"]["pair"]["mean_hidden_cosine"]),
        ):
            assert sum(float(row[column]) for row in part) / count == pytest.approx(mean, rel=1e-12)


def test_score_writes_csv(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(monkeypatch, "score", "base", "--text", "text.txt", "--window", 64, "--out", "rows.csv") == 0
    with (place / "rows.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "window", "position", "token_id", "token", "nll", "entropy", "rank", "lse"]
    assert "".join(row["token"] for row in rows) == TEXT[1:]


@pytest.fixture
def odd_names(place: Path) -> Iterator[list[bytes]]:
    names = [b"[bold]text[red].txt", b"caf\xe9 \x1b[31mred\n.txt", b"\xf0\x9f\x98\x80 :smile:.txt"]
    for name in names:
        Path(os.fsdecode(name)).write_text(TEXT, "utf-8")
    yield names
    for name in names:
        os.unlink(name)


def test_odd_names_of_files_are_shown_on_one_line_and_whole(
    place: Path, odd_names: list[bytes], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("base").rename("[bold]model[red]")
    options = [part for name in odd_names for part in ("--text", os.fsdecode(name))]
    outputs = ("--json", "out.json", "--html", "[red]page.html", "--out", "rows.csv", "--window", 64)
    assert command(monkeypatch, "compare", "[bold]model[red]", "other", *options, *outputs) == 0
    output, error = capfd.readouterr()
    told = json.loads((place / "out.json").read_text("utf-8"))
    names = ["[bold]text[red].txt", "caf\\xe9 \\x1b[31mred\\n.txt", "😀 :smile:.txt"]
    assert [text["name"] for text in told["plan"]["texts"]] == names
    assert told["base"]["label"] == "[bold]model[red]"
    assert "[bold]model[red]" in output
    assert "😀 :smile:.txt" in output
    assert "\x1b[31m" not in output + error
    assert "loading [bold]model[red]" in error
    assert "wrote [red]page.html" in error


def test_models_of_one_name_are_told_apart(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("a", "b"):
        shutil.copytree("other", f"{folder}/model")
    given = ("base", "a/model", "b/model", "--text", "text.txt", "--window", 64, "--json", "out.json")
    assert command(monkeypatch, "compare", *given) == 0
    told = json.loads((place / "out.json").read_text())
    assert [candidate["label"] for candidate in told["candidates"]] == ["a/model", "b/model"]


def test_the_version_is_printed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert command(monkeypatch, "--version") == 0
    assert capfd.readouterr().out == f"logitless {version('logitless')}\n"


def test_a_file_system_that_tells_last_that_it_is_full_costs_no_old_file(place: Path, run: Callable[..., int]) -> None:
    (place / "out.json").write_text("old")

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run("--json", "out.json") == 1
    assert (place / "out.json").read_text() == "old"
    assert not [name for name in os.listdir(place) if name.startswith(".logitless")]

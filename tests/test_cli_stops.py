"""Runs that are stopped, whose reader leaves or whose disk is full: what is left, and what is printed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from models import TEXT, save_two_and_text

RUN = "from logitless.cli import main; main()"
PATIENCE = 120  # seconds for a step of a process on a busy machine


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_two_and_text(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def signals_are_not_ignored() -> Iterator[None]:
    """A shell's job in the background ignores SIGINT, and so would all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def place(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "place")
    return tmp_path / "place"


def started(place: Path, *options: str, before: tuple[str, ...] = (), **streams: int) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-c", RUN, "compare", "base", "other", "--text", "text.txt", "--window", "64"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen([*command, *options], cwd=place, text=True, **pipes)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, error = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in (error or "")
    return process.returncode, output, error


def left(place: Path) -> list[str]:
    return sorted(set(os.listdir(place)) - {"base", "other", "text.txt", "fifo"})


def wait_for(path: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_between_two_outputs_leaves_the_first_and_no_temporary_file(
    place: Path, number: signal.Signals
) -> None:
    os.mkfifo(place / "fifo")  # nobody reads it: the report waits, with the numbers written
    process = started(place, "--json", "out.json", "--html", "fifo")
    wait_for(place / "out.json")
    time.sleep(0.3)
    process.send_signal(number)
    status, output, error = ended(process)
    assert status == -number
    assert error.splitlines()[-2:] == ["wrote out.json", f"logitless: stopped by {number.name}"]
    assert "Divergence from p = base" in output
    assert left(place) == ["out.json"]
    assert json.loads((place / "out.json").read_text())["candidates"]


def test_a_signal_during_the_work_leaves_nothing(place: Path) -> None:
    os.mkfifo(place / "fifo")
    process = started(place, "--text", "fifo", "--json", "out.json", "--html", "page.html")
    with (place / "fifo").open("w"):  # opens when the run reads its texts, and keeps it waiting there
        process.send_signal(signal.SIGHUP)
        status, output, error = ended(process)
    assert (status, output, error) == (-signal.SIGHUP, "", "logitless: stopped by SIGHUP\n")
    assert left(place) == []


def test_timeout_reports_that_it_was_its_signal(place: Path) -> None:
    os.mkfifo(place / "fifo")
    (place / "out.json").write_text("old")
    process = started(place, "--text", "fifo", "--json", "out.json", before=("timeout", "600"))
    with (place / "fifo").open("w"):
        process.send_signal(signal.SIGALRM)  # the alarm by which `timeout` learns that its time is over
        status, _, error = ended(process)
    assert (status, error) == (124, "logitless: stopped by SIGTERM\n")
    assert left(place) == ["out.json"]
    assert (place / "out.json").read_text() == "old"


def test_a_signal_that_is_ignored_stays_ignored(place: Path) -> None:
    os.mkfifo(place / "fifo")
    process = started(place, "--text", "fifo", "--json", "out.json", before=("nohup",), stdin=subprocess.DEVNULL)
    with (place / "fifo").open("w") as text:
        process.send_signal(signal.SIGHUP)
        text.write(TEXT)
    assert ended(process)[0] == 0
    assert left(place) == ["out.json"]


HALFWAY = """
import sys, time
from pathlib import Path
from logitless.cli.outputs import Outputs

def fill(file):
    file.write(b"half")
    file.flush()
    print("half", flush=True)
    time.sleep(600)

Outputs({"--json": Path("out.json")}).write("--json", fill)
"""


def test_kill_leaves_the_old_file_and_one_temporary_file_of_the_documented_name(place: Path) -> None:
    (place / "out.json").write_text("old")
    process = subprocess.Popen([sys.executable, "-c", HALFWAY], cwd=place, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.kill()
    process.communicate()
    temporary, out = left(place)
    assert (out, (place / "out.json").read_text()) == ("out.json", "old")
    assert temporary.startswith(".logitless-")
    assert temporary.endswith(".tmp")
    documented = (Path(__file__).parent.parent / "docs" / "command-line.md").read_text("utf-8")
    assert "`.logitless-*.tmp`" in documented


def test_kill_during_the_work_leaves_nothing(place: Path) -> None:
    os.mkfifo(place / "fifo")
    process = started(place, "--text", "fifo", "--json", "out.json", "--html", "page.html")
    with (place / "fifo").open("w"):
        process.kill()
        process.communicate()
    assert left(place) == []


def test_a_reader_that_leaves_costs_no_result(place: Path) -> None:
    """As `logitless compare ... 2>&1 | head -2` in a shell, with every write after the second line refused."""
    reading, writing = os.pipe()
    process = started(place, "--json", "out.json", "--html", "page.html", stdout=writing, stderr=writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = [pipe.readline(), pipe.readline()]
    process.communicate(timeout=PATIENCE)
    assert all(lines)
    assert "Traceback" not in "".join(lines)
    assert process.returncode == -signal.SIGPIPE
    assert left(place) == ["out.json", "page.html"]
    assert json.loads((place / "out.json").read_text())["candidates"]


def test_head_takes_two_lines(place: Path) -> None:
    given = f'{sys.executable} -c "{RUN}" compare base other --text text.txt --window 64 --json out.json | head -2'
    done = subprocess.run(
        ["bash", "-c", given], cwd=place, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert len(done.stdout.splitlines()) == 2
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.stderr.endswith("wrote out.json\n")
    assert left(place) == ["out.json"]


def test_tables_on_a_full_disk_cost_no_file(place: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = started(place, "--json", "out.json", stdout=full.fileno())
        status, _, error = ended(process)
    assert status == 1
    assert error.splitlines()[-2:] == [
        "wrote out.json",
        "logitless: standard output was not written: No space left on device",
    ]
    assert "Exception ignored" not in error
    assert left(place) == ["out.json"]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[tuple[Path, str, tuple[str, ...]]]:
    """A folder in which the numbers have room and the report has not, what is said of it, and how to run there.

    It is a full file system where this user may mount one, else any folder under a limit of a file's size.
    """
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder))
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        yield folder, os.strerror(errno.EFBIG), ("prlimit", "--fsize=200000", "--")
        return
    try:
        yield folder, os.strerror(errno.ENOSPC), ()
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_costs_the_outputs_that_do_not_fit(place: Path, small: tuple[Path, str, tuple[str, ...]]) -> None:
    folder, reason, before = small
    (folder / "page.html").write_text("old")
    (folder / "page.html").chmod(0o640)
    options = ("--html", f"{folder}/page.html", "--json", f"{folder}/out.json", "--out", f"{folder}/rows.csv")
    status, output, error = ended(started(place, *options, before=before))
    assert status == 1
    assert "Divergence from p = base" in output
    assert f"logitless: --html {folder}/page.html was not written: {reason}\n" in error
    assert sorted(os.listdir(folder)) == ["out.json", "page.html", "rows.csv"]
    assert (folder / "page.html").read_text() == "old"
    assert json.loads((folder / "out.json").read_text())["candidates"]
    assert left(place) == []

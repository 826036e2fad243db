"""A server that runs cases in children of a process that imported torch once: a case that crashes or hangs ends alone.

`python tests/forked.py MODULE` reads names of functions of MODULE's `CASES`, one a line, and answers each with a line:
`""` where the case held, else what went wrong.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

HANG_SECONDS = 120.0


class ForkServer:
    """Runs cases by name; made once a test module, since torch takes seconds to import."""

    def __init__(self, module: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, name: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        return str(json.loads(answer)) if answer else "the server itself died"

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=HANG_SECONDS)
        self.process.stdout.close()


def in_child(case: Any) -> str:
    """Call the case in a child; give what went wrong, or an empty text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os.dup2(2, 1)  # what the case prints is no answer
        try:
            case()
            code = 0
        except BaseException:
            os.write(writer, traceback.format_exc()[-3000:].encode())
            code = 1
        os._exit(code)
    os.close(writer)
    said = b""
    hung = False
    while True:
        ready, _, _ = select.select([reader], [], [], HANG_SECONDS)
        if not ready:
            hung = True
            os.kill(pid, signal.SIGKILL)
            break
        data = os.read(reader, 1 << 16)
        if not data:
            break
        said += data
    os.close(reader)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if hung:
        return f"hangs for {HANG_SECONDS} s"
    if code < 0:
        return f"ends the process with {signal.Signals(-code).name}"
    return said.decode() if code else ""


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    cases = importlib.import_module(sys.argv[1]).CASES
    for line in sys.stdin:
        sys.stdout.write(json.dumps(in_child(cases[line.strip()])) + "\n")
        sys.stdout.flush()

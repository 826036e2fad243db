"""`import logitless` costs little beside `import torch`, counted in modules: seconds depend on the machine."""

import json
import subprocess
import sys

CODE = """
import sys, json
import torch
before = set(sys.modules)
import logitless
print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))
"""


def test_import_adds_its_own_modules_alone() -> None:
    """Nothing of the extras, and nothing of torch that torch itself leaves for later, such as its compiler."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, added = json.loads(done.stdout)
    assert [name for name in added if name.partition(".")[0] != "logitless"] == []
    assert not [name for name in added if name.startswith(("logitless.cli", "logitless._bench", "logitless._verify"))]
    assert len(added) < len(before) / 10

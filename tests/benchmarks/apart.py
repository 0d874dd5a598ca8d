"""A case of a benchmark in a process of its own, whose memory and threads are its own."""

import json
import subprocess
import sys

import pytest


def told_by(script, *words):
    """What a script prints last, as JSON.

    Skips where the script says so."""
    told = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    if "SKIPPED" in told.stdout:
        pytest.skip(told.stdout.strip())
    assert told.returncode == 0, told.stderr[-2000:]
    return json.loads(told.stdout.splitlines()[-1])

"""What `ppl-lm fit` writes on a terminal, into a pipe, and where colours are not wanted."""

import os
import re
import subprocess
import sys

import pytest

pty = pytest.importorskip("pty", reason="needs a POSIX terminal")

COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7]|38;[\d;]+)m")
FIT = [sys.executable, "-W", "ignore", "-m", "ppl_lm", "fit", "tilted", "--max-steps", "3", "--particles", "8",
       "--num-samples", "128", "--max-new-tokens", "8", "--output-dir"]  # fmt: skip


def on_a_terminal(folder, **environment) -> str:
    """Everything that is written to a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(
        [*FIT, str(folder)], stdin=theirs, stdout=theirs, stderr=theirs, env=env | environment, close_fds=True
    )
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's word for the end
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert process.wait() == 0
    return b"".join(parts).decode()


def test_a_terminal_has_a_live_bar_and_colours(tmp_path):
    said = on_a_terminal(tmp_path / "run")
    assert "ELBO" in said and "━" in said and "\x1b[?25l" in said, "the bar, and the cursor hidden while it moves"
    assert said.rindex("\x1b[?25h") > said.rindex("\x1b[?25l"), "the cursor is shown again"
    assert COLOUR.search(said)


@pytest.mark.slow
def test_no_color_is_obeyed(tmp_path):
    said = on_a_terminal(tmp_path / "run", NO_COLOR="1")
    assert not COLOUR.search(said) and "KL(guide ‖ posterior)" in said


def test_a_pipe_gets_plain_lines(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    ran = subprocess.run([*FIT, str(tmp_path / "run")], capture_output=True, text=True, env=env, check=True)
    assert "\x1b" not in ran.stdout + ran.stderr and "\r" not in ran.stdout
    assert "fitted after 3 steps" in ran.stdout and "KL(guide ‖ posterior)" in ran.stdout

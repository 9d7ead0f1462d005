"""The completion in real zsh and fish, which must be installed: `make shells`."""

from __future__ import annotations

import os
import pty
import select
import sys
import time
from pathlib import Path

import pytest
from test_completion import shell

LINES = [
    ("alignkit show esrl_r", ["esrl_released"]),
    ("alignkit train +algo=dpo_", ["+algo=dpo_pcrm"]),
    ("alignkit train +algo=grpo algo.kl_in=l", ["algo.kl_in=loss"]),
    ("alignkit train +algo=grpo algo.cl", ["algo.clip="]),
    ("alignkit evaluate runs/e", ["runs/esrl-s0-1"]),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "runs" / "esrl-s0-1").mkdir(parents=True)
    (tmp_path / "runs" / "esrl-s0-1" / "config.yaml").write_text("", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(("line", "wanted"), [*LINES, ("alignkit comp", ["compare", "completion"])])
def test_fish(line: str, wanted: list[str], folder: Path) -> None:
    out = shell("fish", "--no-config", "-c", f"alignkit completion fish | source; complete -C {line!r}", cwd=folder)
    assert out.split() == wanted


@pytest.mark.parametrize(("line", "wanted"), LINES)
def test_zsh(line: str, wanted: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys typed at a terminal: after the tab key the line shows more than was typed."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(folder)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "dumb"
        os.execvp("zsh", ["zsh", "-f", "-i"])
    try:
        _type(terminal, "PS1='>'; source <(alignkit completion zsh); print -r -- rea'dy'\n", "ready")
        os.write(terminal, f"{line}\t".encode())
        _read(terminal, wanted[0])
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(terminal)


def _type(terminal: int, keys: str, until: str) -> None:
    os.write(terminal, keys.encode())
    _read(terminal, until)


def _read(terminal: int, until: str, seconds: float = 30) -> None:
    """Wait until the terminal has shown a text.

    Raises:
        AssertionError: it has not within that time; with what it has shown.
    """
    shown, end = "", time.monotonic() + seconds
    while until not in shown:
        assert time.monotonic() < end and select.select([terminal], [], [], end - time.monotonic())[0], shown
        shown += os.read(terminal, 4096).decode(errors="replace")

"""``make smoke``: every method that resumes is killed twice in real processes and ends where an unbroken run does."""

from __future__ import annotations

from pathlib import Path

import pytest
from verifying import METHODS, verified, words_of


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.mark.parametrize("name", METHODS)
def test_killed_twice_it_ends_where_an_unbroken_run_does(made: Path, name: str) -> None:
    done = verified(*words_of(name, made))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK: the same to the last bit" in done.stdout

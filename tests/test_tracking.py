"""wandb: a real offline run, the same id after a resume, and no run lost to it."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import SMALL_SEQ2SEQ, SMALL_SFT, lines, train

from alignkit.tracking import _mode


def offline_records(run: Path) -> list[tuple[str, dict[str, str]]]:
    """(file, key → JSON value) of every logged step in the offline files that wandb left."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in logged(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = {(i.key or "/".join(i.nested_key)): i.value_json for i in record.history.item}
                found.append((file.name, items))
    return found


def records_of(run: Path, expected: int) -> list[tuple[str, dict[str, str]]]:
    """The records, once as many as expected are there: wandb's own process may still be writing."""
    deadline = time.monotonic() + 30
    while len(offline_records(run)) < expected and time.monotonic() < deadline:
        time.sleep(0.2)
    return offline_records(run)


def logged(raw: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: blocks of 32 KiB, chunks of (checksum, length, kind), after wandb's header."""
    assert raw[:4] == b":W&B"
    place, whole = 7, b""
    while place + 7 <= len(raw):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", raw[place + 4 : place + 7])
        whole += raw[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            yield whole
            whole = b""


def test_an_offline_run_holds_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    _, run = train(tmp_path, *SMALL_SFT, *SMALL_SEQ2SEQ, "run.wandb=offline")
    records = records_of(run, 6)
    assert [float(items["loss"]) for _, items in records] == pytest.approx(
        [m["loss"] for m in lines(run / "metrics.jsonl")]
    )
    assert len({name for name, _ in records}) == 1


def test_a_resumed_run_goes_on_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignkit.errors import Stopped
    from alignkit.run import Run

    words = [*SMALL_SFT, *SMALL_SEQ2SEQ, "run.wandb=offline"]
    end_step = Run.end_step

    def stop(self: Run, done: int, *rest: object) -> None:
        self.stop_asked = done == 2
        end_step(self, done, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as m:
        m.setattr(Run, "end_step", stop)
        with pytest.raises(Stopped):
            train(tmp_path, *words)
    _, run = train(tmp_path, *words)
    records = records_of(run, 6)
    assert [int(items["_step"]) for _, items in records] == [1, 2, 3, 4, 5, 6]
    assert len({name for name, _ in records}) == 1


def test_auto_never_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _mode("auto") == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    assert _mode("auto") == "online"
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert _mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert _mode("auto") == "disabled"
    assert _mode("offline") == "offline"


def test_an_unreachable_wandb_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    tried = []

    def refuse(**kwargs: object) -> None:
        tried.append(kwargs["mode"])
        raise wandb.errors.CommError("no route")

    monkeypatch.setattr(wandb, "init", refuse)
    result, run = train(tmp_path, *SMALL_SFT, *SMALL_SEQ2SEQ, "run.wandb=online")
    assert result["status"] == "finished"
    assert tried == ["online", "offline"]
    assert "wandb (online) is not available" in capsys.readouterr().err
    assert (run / "metrics.jsonl").exists()

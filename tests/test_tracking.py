"""wandb: a real offline run, the same id after a resume, and no run lost to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import SMALL_SEQ2SEQ, SMALL_SFT, train

from alignkit.tracking import _mode


def offline_records(run: Path) -> list[tuple[str, dict[str, str]]]:
    """(run id, step → …) of every record in the offline files that wandb left."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    found = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        store = DataStore()
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = {(i.key or "/".join(i.nested_key)): i.value_json for i in record.history.item}
                found.append((file.name, items))
    return found


def test_an_offline_run_holds_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    _, run = train(tmp_path, *SMALL_SFT, *SMALL_SEQ2SEQ, "run.wandb=offline")
    records = offline_records(run)
    assert len(records) == 6
    assert all("loss" in items for _, items in records)
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

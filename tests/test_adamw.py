"""AdamW's state in the processor's memory, and in files that any number of processes read."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from group import filled, shared_model, spawned
from hypothesis import given
from hypothesis import strategies as st
from running import SMALL_RL, SMALL_RUN, SMALL_SEQ2SEQ, command, composed, lines, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from alignkit import adamw


def weights() -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in ((3, 4), (5,), (2, 2))]


def test_offloaded_is_adamw() -> None:
    """Ten steps at changing rates, one weight without a gradient in some: bit for bit AdamW's, on copies of its own."""
    plain, there = weights(), weights()
    groups = [{"params": plain[:2]}, {"params": plain[2:]}], [{"params": there[:2]}, {"params": there[2:]}]
    settings = {"lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 0.1, "fused": True}
    one, other = torch.optim.AdamW(groups[0], **settings), adamw.Offloaded(groups[1], **settings)
    g = torch.Generator().manual_seed(2)
    for step in range(10):
        for i, (p, q) in enumerate(zip(plain, there, strict=True)):
            grad = None if i == 1 and step % 3 else torch.randn(p.shape, generator=g)
            p.grad, q.grad = grad, None if grad is None else grad.clone()
        for optimizer in (one, other):
            for group, rate in zip(optimizer.param_groups, (1e-2 / (step + 1), 1e-3), strict=True):
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert all(torch.equal(p, q) for p, q in zip(plain, there, strict=True))
    assert not torch.equal(plain[1], weights()[1])
    assert not other.state  # nothing beside the weights where they are
    state = other.state_dict()
    torch.testing.assert_close(state, one.state_dict(), rtol=0, atol=0)
    again = adamw.Offloaded([{"params": there[:2]}, {"params": there[2:]}], **settings)
    again.load_state_dict(copy.deepcopy(state))
    for optimizer in (other, again):
        for p in there:
            p.grad = torch.ones_like(p)
        before = [p.detach().clone() for p in there]
        optimizer.step()
        after = [p.detach().clone() for p in there]
        with torch.no_grad():
            for p, x in zip(there, before, strict=True):
                p.copy_(x)
        if optimizer is other:
            wanted = after
    assert all(torch.equal(x, y) for x, y in zip(wanted, after, strict=True))


RL = [
    "+algo=ppo",
    "data=rnnlg",
    "reward=chrf",
    *SMALL_SEQ2SEQ,
    *SMALL_RL,
    "algo.steps=4",
    "algo.lr=1e-2",
    "run.save_every=2",
]


@pytest.mark.parametrize(
    "words", [RL, ["+algo=sft", "data=rnnlg", *SMALL_SEQ2SEQ, *SMALL_RUN, "algo.steps=4", "run.save_every=2"]], ids=["ppo", "sft"]
)  # fmt: skip
def test_a_run_is_the_same_wherever_its_optimizer_lies(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when it goes on from a checkpoint that was written with the other setting."""
    plain, folder = train(tmp_path / "plain", *words)
    _, there = train(tmp_path / "there", *words, "run.offload=true")
    assert plain["steps"] == 4
    wanted = load_file(folder / "final" / "model.safetensors")
    found = load_file(there / "final" / "model.safetensors")
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[k], found[k]) for k in wanted)
    assert lines(folder / "metrics.jsonl")[-1]["loss"] == lines(there / "metrics.jsonl")[-1]["loss"]
    (there / "result.json").unlink()
    last = max(there.glob("checkpoint-*[0-9]"), key=lambda p: int(p.name.rpartition("-")[2]))
    assert last.name == "checkpoint-4" and (there / "checkpoint-2").exists()
    for gone in last.rglob("*"):
        if gone.is_file():
            gone.unlink()
    capsys.readouterr()
    _, again = train(tmp_path / "there", *words)
    assert "goes on after step 2 of 4" in capsys.readouterr().err
    found = load_file(again / "final" / "model.safetensors")
    assert all(torch.equal(wanted[k], found[k]) for k in wanted)


@given(rows=st.lists(st.integers(0, 3), min_size=1, max_size=5), data=st.data())
def test_rows_in_several_files_are_found(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int], data: st.DataObject
) -> None:
    total = sum(rows)
    whole = torch.arange(2.0 * total).view(total, 2)
    folder = tmp_path_factory.mktemp("rows")
    for i, part in enumerate(whole.split(rows)):
        save_file({"0.exp_avg": part.contiguous()}, folder / f"moments-{i}.safetensors")
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    files = [safe_open(file, "pt") for file in sorted(folder.iterdir())]
    assert torch.equal(adamw._rows(files, "0.exp_avg", slice(start, stop)), whole[start:stop])


def test_what_processes_that_share_layers_have_written_one_process_reads(tmp_path: Path) -> None:
    """Three ranks, whose parts are uneven: together their files hold each moment once; they read them back, and so does one process,
    which has stepped on the same gradients."""
    found = spawned(3, tmp_path)
    assert all(one["read_back"] for one in found)
    model = shared_model()
    trained = list(model.parameters())
    one = torch.optim.AdamW(trained, lr=0.1)
    for i, p in enumerate(trained):
        p.grad = filled(i, p.shape)
    one.step()
    other = torch.optim.AdamW(trained, lr=0.1)
    adamw.load(other, None, tmp_path)
    torch.testing.assert_close(other.state_dict(), one.state_dict(), rtol=0, atol=0)
    files = sorted(tmp_path.glob("moments-*"))
    assert [f.name for f in files] == [f"moments-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    held = [sum(x.numel() for x in load_file(file).values()) for file in files]
    layers = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    assert sum(held) == 2 * layers and max(held) <= 0.4 * sum(held)
    rest = torch.load(tmp_path / "optimizer.pt", weights_only=True)["state"]
    assert sum(x.numel() for held in rest.values() for name, x in held.items() if name != "step") == 2 * (
        sum(p.numel() for p in trained) - layers
    )


def test_moments_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    spawned(2, tmp_path)
    for file, said in (
        ("moments-00002-of-00002.safetensors", "^moments-00002.*missing"),
        ("moments-00001-of-00002.safetensors", "not whole"),
    ):
        (tmp_path / file).unlink()
        with pytest.raises(ValueError, match=said):
            adamw.load(torch.optim.AdamW(shared_model().parameters()), None, tmp_path)


@pytest.mark.parametrize("file", ["moments-00002-of-00002.safetensors", "optimizer.pt", "run.json"])
def test_a_damaged_checkpoint_says_what_to_delete(tmp_path: Path, file: str) -> None:
    """And once it is deleted, the command goes on from the one before."""
    words = [*RL, f"run.root={tmp_path}", "run.processes=2", "run.shard=true"]
    folder = Path(composed(words).run.dir)
    done = command("train", *words)
    assert done.returncode == 0, done.stderr
    (folder / "result.json").unlink()
    damaged = folder / "checkpoint-4" / "state" / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    done = command("train", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"error: {folder}/checkpoint-4 is damaged" in done.stderr
    assert "Delete it to go on from the one before" in done.stderr and done.stderr.count("error:") == 1
    shutil.rmtree(folder / "checkpoint-4")
    done = command("train", *words)
    assert done.returncode == 0 and "goes on after step 2 of 4" in done.stderr

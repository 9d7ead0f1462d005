"""The pref stage through the real ``train``, every method by listing: what it learns, resume, its references, bad pairs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ANSWERS, WORDS
from hydra.utils import instantiate
from running import SMALL_CAUSAL, SMALL_RUN, SMALL_SEQ2SEQ, composed, lines, train
from safetensors.torch import load_file
from test_invariance import _merged

from alignkit.algos._pref import Pref, right
from alignkit.config import check, conf_dir
from alignkit.data import Data
from alignkit.errors import Stopped, UserError
from alignkit.run import Run

NAMES = sorted(p.stem for p in (conf_dir() / "algo").glob("*.yaml") if not p.stem.startswith("_"))
METHODS = [name for name in NAMES if _merged(name)["stage"] == "pref"]
QUICK = [*SMALL_RUN, "algo.batch_size=8", "algo.steps=6", "algo.warmup=0", "evaluate.every=0", "evaluate.test=false"]
BUNDLED = ["model=tiny_arithmetic"]  # a start that has weights
SHORT = {"t_reg": {"better": "{prompt} {response} +", "worse": "{prompt} {response} -"}}  # for models of 64 positions


def method(name: str, **settings: object) -> Pref:
    return instantiate({**_merged(name)["algo"], **SHORT.get(name, {}), **settings})


@pytest.fixture
def pairs() -> list[dict[str, Any]]:
    """Six prompts, each with its own answer before another's, of different lengths."""
    return [
        {"id": i, "prompt": w, "chosen": ANSWERS[i], "rejected": ANSWERS[(i + 2) % 6], "references": []}
        for i, w in enumerate(WORDS)
    ]


def judged(algo: Pref, policy, rows, start=None):
    """The pairs with what the stage asks of the start model."""
    start = start or policy
    batch = policy.pairs(algo.prepare(rows, ("chosen", "rejected")))
    with torch.no_grad():
        answers = {q.name: q.answer(start, batch) for q in algo.questions()}
        return batch.with_(extra={"ref_logprob": (start.forward(batch) * batch.mask).sum(1), **answers})


def whole(algo: Pref, policy, batch):
    with torch.no_grad():
        return algo.whole(policy, batch, torch.Generator())


def gradient(algo: Pref, policy, parts) -> torch.Tensor:
    policy.model.zero_grad(set_to_none=True)
    count = 0.0
    for part in parts:
        loss = algo.loss(policy, part)
        loss.total.backward()
        count += loss.count
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]) / count


def test_methods_are_found() -> None:
    assert {"dpo", "ipo", "simpo", "orpo", "cpo", "kto", "t_reg"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_do_not_change_the_gradient(name: str, policy, pairs) -> None:
    policy.model.double()
    policy.compute = torch.float64
    algo = method(name)
    batch = whole(algo, policy, judged(algo, policy, pairs))
    once, parts = gradient(algo, policy, [batch]), batch.split(1)
    assert len(parts) == 6
    scale = float(once.abs().max())  # log-probabilities are float32 whatever the model is
    torch.testing.assert_close(gradient(algo, policy, parts) / scale, once / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_few_steps_rank_the_pairs_as_given(name: str, policy, pairs) -> None:
    """Both architectures; the margin grows and every training pair ends up ranked right."""
    start = copy.copy(policy)
    start.model = copy.deepcopy(policy.model)
    algo = method(name)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.01)
    batch = judged(algo, policy, pairs, start)
    with torch.no_grad():
        before = algo.margins(algo.pairs(policy, batch))
    for _ in range(25):
        optimizer.zero_grad()
        (algo.loss(policy, whole(algo, policy, batch)).total / 6).backward()
        optimizer.step()
    with torch.no_grad():
        after = algo.margins(algo.pairs(policy, batch))
    assert (after > before).all()
    assert right(after).tolist() == [1.0] * 6


@pytest.mark.parametrize("name", METHODS)
def test_chosen_and_rejected_changed_over_turn_the_margin(name: str, policy, pairs) -> None:
    algo = method(name)
    batch = judged(algo, policy, pairs)
    batch.extra["ref_logprob"] = batch.extra["ref_logprob"] + torch.linspace(-1, 1, 12)
    index = torch.arange(12).view(-1, 2).flip(1).flatten()
    with torch.no_grad():
        one, other = (algo.margins(algo.pairs(policy, b)) for b in (batch, batch.take(index)))
    torch.testing.assert_close(one, -other, atol=1e-4, rtol=1e-4)
    assert float(one.abs().max()) > 0.01


def test_pairs_share_a_group_and_the_chosen_response_comes_first(policy, pairs) -> None:
    batch = policy.pairs(pairs, max_tokens=3)
    assert batch.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert all(batch.rows[i] is pairs[i // 2] for i in range(12))
    assert batch.responses[:2] == [pairs[0]["chosen"], pairs[0]["rejected"]]
    assert int(batch.lengths.max()) == 3


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("small", [SMALL_SEQ2SEQ, SMALL_CAUSAL], ids=["seq2seq", "causal"])
def test_a_stopped_run_ends_where_an_unbroken_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, small: list[str]
) -> None:
    words = [f"+algo={name}", *small, *QUICK, "run.save_every=1"]
    whole, _ = train(tmp_path / "whole", *words)
    end_step = Run.end_step
    with monkeypatch.context() as patch:

        def stop(self: Run, done: int, *rest: object) -> None:
            self.stop_asked = done == 3
            end_step(self, done, *rest)  # type: ignore[arg-type]

        patch.setattr(Run, "end_step", stop)
        with pytest.raises(Stopped):
            train(tmp_path / "broken", *words)
    broken, _ = train(tmp_path / "broken", *words)
    assert broken["resumes"] == 1
    assert broken["weights_sha256"] == whole["weights_sha256"]


def test_held_out_pairs_are_measured_before_now_and_then_and_after(tmp_path: Path) -> None:
    words = ["+algo=dpo", *BUNDLED, *SMALL_RUN, "algo.batch_size=8", "algo.steps=4", "algo.warmup=0", "data.limit=8"]
    result, run = train(tmp_path, *words, "evaluate.every=2")
    before, after = (result["evaluation"][when] for when in ("before", "after"))
    assert before["test"]["preference_accuracy"]["value"] == 50.0  # the start model against itself
    assert before["test"]["preference_accuracy"]["n"] == 12
    assert after["difference"]["preference_accuracy"]["value"] == after["test"]["preference_accuracy"]["value"] - 50
    metrics = lines(run / "metrics.jsonl")
    assert [m["step"] for m in metrics if "dev/preference_accuracy" in m] == [0, 2, 4]
    assert metrics[-1]["preference_accuracy"] > 0.5
    assert result["best"]["step"] in (0, 2, 4)
    outputs = lines(run / "outputs-after.jsonl")
    assert {o["preference_accuracy"] for o in outputs} <= {0.0, 0.5, 1.0}


def test_references_are_kept_for_the_next_run_and_their_fingerprint_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignkit.stages import pref

    loads: list[str] = []
    load = pref.load

    def counting(model: Any, *rest: Any) -> Any:
        loads.append(model.path)
        return load(model, *rest)

    monkeypatch.setattr(pref, "load", counting)
    words = ["+algo=dpo", *BUNDLED, *QUICK]
    train(tmp_path, *words)
    files = {p.name for p in (tmp_path / "reference").iterdir()}
    assert len(files) == 1 and len(loads) == 2  # the policy, and the start model
    held = load_file(tmp_path / "reference" / next(iter(files)))["ref_logprob"]
    assert held.shape == (40, 2) and (held < 0).all()
    train(tmp_path, *words, "algo.beta=0.2")
    train(tmp_path, "+algo=ipo", *words[1:])
    assert {p.name for p in (tmp_path / "reference").iterdir()} == files and len(loads) == 4
    for other in (["algo.max_response_tokens=5"], ["data.limit=39"], ["model=tiny"]):
        train(tmp_path, *words, *other)
    assert len(list((tmp_path / "reference").iterdir())) == 4
    train(tmp_path, "+algo=simpo", *words[1:])
    assert len(list((tmp_path / "reference").iterdir())) == 4 and len(loads) == 11  # simpo asks for none


def test_lora_learns_pairs_against_the_model_without_it(tmp_path: Path) -> None:
    words = ["+algo=dpo", *BUNDLED, *QUICK, "model.lora.r=4", "algo.lr=0.001", "algo.steps=12", "data.limit=8"]
    _, run = train(tmp_path, *words)
    metrics = [m for m in lines(run / "metrics.jsonl") if "loss" in m]
    assert metrics[0]["loss"] == pytest.approx(0.693147, abs=1e-4)  # the adapter begins as nothing
    assert metrics[-1]["loss"] < 0.6


# ---- bad pairs -------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "hello", "chosen": "good day", "rejected": "what"}


def own(tmp_path: Path, *rows: dict[str, Any]) -> list[str]:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({**GOOD, **row}) + "\n" for row in rows))
    return ["+algo=dpo", *BUNDLED, *QUICK, "data=custom", f"data.train={file}", "data.response=null",
            "'data.chosen=\"{chosen}\"'".strip("'"), "'data.rejected=\"{rejected}\"'".strip("'")]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"rejected": ""}, "line 2: the rejected response is empty"),
        ({"chosen": "  "}, "line 2: the chosen response is empty"),
        ({"chosen": True}, "line 2: column 'chosen' must be text for data.chosen, is bool"),
        ({"rejected": None}, "line 2: column 'rejected' must be text for data.rejected, is null"),
        ({"prompt": 3}, "line 2: column 'prompt' must be text for data.prompt, is int"),
    ],
)
def test_a_bad_pair_is_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"pairs.jsonl, {said}"):
        train(tmp_path / "runs", *own(tmp_path, {}, row))


def test_equal_responses_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"p{i}"} for i in range(8)] + [{"rejected": "good day"}] * 3
    _, run = train(tmp_path / "runs", *own(tmp_path, *rows))
    assert "3 train pairs are left out" in capsys.readouterr().err
    record = json.loads((run / "data.json").read_text())
    assert record["alike"] == {"train": 3} and record["rows"]["train"] == 8
    with pytest.raises(UserError, match="in every pair both responses are the same"):
        train(tmp_path / "other", *own(tmp_path, {"rejected": "good day"}))


def test_long_pairs_are_cut_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{}, {"chosen": "good day to you", "rejected": "good day to me"}]
    train(tmp_path / "runs", *own(tmp_path, *rows), "algo.max_response_tokens=3")
    assert "2 of 2 pairs have a response of more than algo.max_response_tokens=3" in capsys.readouterr().err


def test_data_without_pairs_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.chosen: the pref stage needs pairs"):
        check(composed(["+algo=dpo", "data=rnnlg"]))
    check(composed(["+algo=kto", "data=custom", "data.train=x.jsonl", "data.desirable=good"]))
    with pytest.raises(UserError, match=r"data\.desirable: the sft stage would learn the undesirable responses too"):
        check(composed(["+algo=sft", "data=custom", "data.train=x.jsonl", "data.desirable=good"]))
    with pytest.raises(UserError, match="belong together"):
        Data(train="x.jsonl", chosen="{a}")

"""A trained reward model as the reward of RL: alone, several, a token, mixed with a rule, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ANSWERS, WORDS
from running import SMALL_RL, lines, train
from safetensors.torch import load_file, save_file
from scoring_models import alone, cfg, rows
from test_stage_rl import stop_after

from alignkit import policy, reward_model
from alignkit.algos.ppo import PPO
from alignkit.batch import Batch
from alignkit.config import Model
from alignkit.decode import Decode
from alignkit.errors import Stopped, UserError
from alignkit.heads import Attributes
from alignkit.reward_model import Reading
from alignkit.rewards import judged
from alignkit.rewards.learned import Learned
from alignkit.rewards.mix import Mix
from alignkit.rewards.rule import Length


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start model, reward models ``a``, ``b`` and ``all`` of its tokenizer, ``other`` of another, and data."""
    root = tmp_path_factory.mktemp("learned")
    policy.load(cfg("causal"), 0, WORDS + ANSWERS).save(root / "start")
    start = Model(path=str(root / "start"), device="cpu")
    for seed, name in enumerate("ab"):
        model = reward_model.build(start, Reading(template="{prompt}"), seed, [])
        model.examples = rows(12)
        model.export(root / name)
    reward_model.build(start, Reading(pooling="all"), 2, []).save(root / "all")
    reward_model.build(cfg("encoder"), Reading(), 0, ["quite other texts"] * 3).save(root / "other")
    data = [{"prompt": w, "response": a} for w, a in zip(WORDS, ANSWERS, strict=True)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    return root


def learned(folders: Path, *names: str, **settings: Any) -> Learned:
    paths = [str(folders / name) for name in names]
    return Learned(model=paths[0] if len(paths) == 1 else paths, device="cpu", **settings)


def run_words(folders: Path, *words: str, model: str = "a") -> list[str]:
    return [
        "+algo=ppo", "model=hf", f"model.path={folders}/start", *SMALL_RL, "algo.k=2", "algo.steps=4", "algo.epochs=2",
        "data=custom", f"data.train={folders}/data.jsonl", "reward=learned", f"reward.model={folders}/{model}",
        "reward.device=cpu", "model.device=cpu", "evaluate.every=0", "evaluate.test=false", "run.samples_every=1", *words,
    ]  # fmt: skip


@pytest.fixture
def sampled(folders: Path) -> Batch:
    """Samples of the start model; two of a prompt are the same."""
    start = policy.load(Model(path=str(folders / "start"), device="cpu"), 0)
    batch = start.generate(rows(3), [2, 1, 3], Decode(max_new_tokens=6), generator=torch.Generator().manual_seed(0))
    return batch.take(torch.tensor([0, 0, 1, 2, 3, 4, 5]))


def given(folders: Path, name: str = "a") -> tuple[Any, Batch]:
    """(reward model, responses in its own tokens)"""
    model = reward_model.load(str(folders / name), "cpu")
    return model, model.responses(rows())  # type: ignore[union-attr]


def test_scores_are_the_models_for_the_texts(folders: Path, sampled: Batch) -> None:
    model = reward_model.load(str(folders / "a"), "cpu")
    found = learned(folders, "a")(sampled)
    assert found.shape == (7,) and found[0] == found[1]
    each = [{**row, "response": text} for row, text in zip(sampled.rows, sampled.responses, strict=True)]
    raw = torch.tensor([float(alone(model, row)) for row in each])  # type: ignore[arg-type]
    torch.testing.assert_close(found, (raw - model.mean) / model.std, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(learned(folders, "a", standardise=False)(sampled), raw, atol=1e-4, rtol=1e-4)
    assert (model.mean, model.std) != (0, 1)


def test_a_text_is_scored_once(folders: Path, sampled: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = learned(folders, "a")
    model, asked = reward._models[0], []
    score = model.score
    monkeypatch.setattr(model, "score", lambda rows, budget: asked.extend(rows) or score(rows, budget))
    reward(sampled)
    texts = [(row["id"], row["response"]) for row in asked]
    assert len(set(texts)) == len(texts) < 7


@pytest.mark.parametrize(
    ("reduce", "lam", "wanted"),
    [("mean", 1.0, [2, 2, -2]), ("min", 1.0, [1, 2, -4]), ("lcb", 0.5, [1.5, 2, -3]), ("lcb", 0.0, [2, 2, -2])],
)
def test_several_by_hand(folders: Path, reduce: Any, lam: float, wanted: list[float]) -> None:
    """Deviations 1, 0 and 2."""
    reward = learned(folders, "a", "b", reduce=reduce, lam=lam)
    assert reward.reduced(torch.tensor([[1.0, 2, 0], [3.0, 2, -4]])).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("reduce", ["mean", "min", "lcb"])
def test_several_models_are_each_asked_and_clipped(folders: Path, sampled: Batch, reduce: Any) -> None:
    each = np.stack([learned(folders, name)(sampled).numpy() for name in "ab"])
    for clip in (None, 0.5):
        cut = each if clip is None else np.clip(each, -clip, clip)
        wanted = {"mean": cut.mean(0), "min": cut.min(0), "lcb": cut.mean(0) - 2 * cut.std(0)}[reduce]
        found = learned(folders, "a", "b", reduce=reduce, lam=2.0, clip=clip)(sampled)
        assert found.tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
    assert np.abs(each).max() > 0.5


def test_one_model_with_lcb_is_itself(folders: Path, sampled: Batch) -> None:
    torch.testing.assert_close(learned(folders, "a", reduce="lcb")(sampled), learned(folders, "a")(sampled))


@pytest.mark.parametrize("name", ["a", "all"])
def test_scores_of_tokens_add_up(folders: Path, name: str) -> None:
    model, batch = given(folders, name)
    found = learned(folders, name, per="token")(batch)
    assert found.shape == batch.mask.shape
    torch.testing.assert_close(found.sum(1), model.score(rows()), atol=1e-5, rtol=1e-4)
    both = learned(folders, "a", "all", per="token")(batch)
    torch.testing.assert_close(
        both.sum(1), learned(folders, "a", "all")(batch.with_(rows=rows())), atol=1e-5, rtol=1e-4
    )


def test_a_mix_with_a_rule(folders: Path) -> None:
    """The rule's score is put at the last token where the other's is of tokens."""
    _, batch = given(folders)
    rule = Length(target=5)
    wanted = 0.5 * learned(folders, "a")(batch) + 2.0 * rule(batch)
    for per in ("response", "token"):
        mix = Mix(rewards={"model": learned(folders, "a", per=per), "rule": rule}, weights={"model": 0.5, "rule": 2.0})
        found = judged(mix, batch)
        torch.testing.assert_close(found.scores, wanted, atol=1e-5, rtol=1e-4)
    tokens = found.extra["token_scores"]
    alone_ = learned(folders, "a", per="token")(batch)
    apart = tokens - 0.5 * alone_
    for i, n in enumerate(batch.lengths.tolist()):
        assert apart[i].tolist() == pytest.approx([0.0] * (n - 1) + [2 * float(rule(batch)[i])] + [0.0] * (apart.shape[1] - n), abs=1e-5)  # fmt: skip


def test_another_tokenizer_is_for_whole_responses(folders: Path, sampled: Batch) -> None:
    assert learned(folders, "other")(sampled).isfinite().all()
    with pytest.raises(UserError, match=r"policy's own tokenizer.*reward\.per=response"):
        learned(folders, "other", per="token")(sampled)


def test_a_score_that_is_no_number_names_its_row(folders: Path, tmp_path: Path) -> None:
    model, batch = given(folders)
    model.model.head.weight.data.fill_(float("nan"))
    model.test = []
    model.save(tmp_path / "nan")
    with pytest.raises(UserError, match=r"the reward model gives nan to row 0, response 'die Katze sass'"):
        judged(learned(tmp_path, "nan"), batch)
    with pytest.raises(UserError, match=r"the reward of row 0 is nan, response 'die Katze sass'"):
        judged(learned(tmp_path, "nan", per="token"), batch)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": []}, "name at least one"),
        ({"clip": 0.0}, "clip"),
        ({"lam": -1.0}, "lam"),
        ({"micro_tokens": 0}, "micro_tokens"),
        ({"model": ["a", "b"], "per": "token", "reduce": "min"}, "per=token needs reduce=mean"),
    ],
)
def test_bad_settings_are_refused(folders: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Learned(**{"model": str(folders / "a"), "device": "cpu", **settings})


def test_models_that_are_none_are_refused_by_the_settings_name(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward: reward\.model=.*no such"):
        train(tmp_path, *run_words(folders, model="nothing"))
    with pytest.raises(UserError, match=r"start is no reward model"):
        train(tmp_path, *run_words(folders, model="start"))
    weights = load_file(folders / "a" / "model.safetensors")
    model, _ = given(folders)
    model.save(tmp_path / "changed")
    save_file({**weights, "score.weight": weights["score.weight"] * 2}, tmp_path / "changed" / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(UserError, match="does not score as it did when it was saved"):
        learned(tmp_path, "changed")
    with pytest.raises(UserError, match="does not score as it did when it was saved"):
        learned(tmp_path, "changed", standardise=False)


# ---- through train -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["response", "token"])
def test_ppo_learns_from_it(folders: Path, tmp_path: Path, per: str) -> None:
    result, run = train(tmp_path, *run_words(folders, f"reward.per={per}"))
    assert result["status"] == "finished"
    model = reward_model.load(str(folders / "a"), "cpu")
    for line in lines(run / "metrics.jsonl"):
        seen = [s for s in lines(run / "samples.jsonl") if s["step"] == line["step"]]
        assert len(seen) == 8
        assert line["reward"] == pytest.approx(np.mean([s["score"] for s in seen]), abs=1e-5)
    if per == "response":
        for s in seen:
            row = {"id": 0, "prompt": s["prompt"], "response": s["response"]}
            assert s["score"] == pytest.approx((float(alone(model, row)) - model.mean) / model.std, abs=1e-3)  # type: ignore[arg-type]


def test_another_tokenizer_through_train(folders: Path, tmp_path: Path) -> None:
    result, _ = train(tmp_path, *run_words(folders, "algo.steps=1", model="other"))
    assert result["status"] == "finished"
    with pytest.raises(UserError, match=r"reward\.per=response"):
        train(tmp_path, *run_words(folders, "reward.per=token", model="other"))


def test_a_comparing_model_is_a_reward_against_the_reference(folders: Path, tmp_path: Path) -> None:
    from alignkit.comparator import Comparator

    start = policy.load(Model(path=str(folders / "start"), device="cpu"), 0)
    Comparator(start, "{prompt} {first} {second}", " YES", " NO").save(tmp_path / "comparator")
    result, run = train(tmp_path, *run_words(folders, "algo.steps=2", f"reward.model={tmp_path}/comparator"))
    assert result["status"] == "finished"
    assert all(0 < s["score"] < 1 for s in lines(run / "samples.jsonl"))


@pytest.mark.parametrize(
    "more",
    [["algo.reward_norm=running"], ["algo.reward_norm=running", "reward.per=token", "algo.reward_clip=1.0"], []],
    ids=["running", "running-tokens", "plain"],
)
def test_a_stopped_run_ends_where_an_unbroken_one_does_and_has_seen_the_same(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    words = run_words(folders, "run.save_every=1", *more)
    whole, run = train(tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stopped):
            train(tmp_path / "broken", *words)
    broken, other = train(tmp_path / "broken", *words)
    assert broken["weights_sha256"] == whole["weights_sha256"]
    if more:
        for step in (3, 4):
            seen, same = (
                json.loads((d / f"checkpoint-{step}" / "state" / "run.json").read_text())["algo"]["seen"]
                for d in (run, other)
            )
            scores = [s["score"] for s in lines(run / "samples.jsonl") if s["step"] <= step]
            assert seen == same and seen[0] == len(scores) == 8 * step
            assert (seen[1], seen[2] / seen[0]) == pytest.approx((np.mean(scores), np.var(scores)), rel=1e-5)


def test_running_moments_are_those_of_all_rewards_so_far(make_batch) -> None:
    algo = PPO(reward_norm="running", missing_eos_penalty=0.0)
    generator, seen = torch.Generator().manual_seed(0), []
    for step, n in enumerate((3, 1, 7, 2)):
        scores = torch.randn(n, generator=generator) * 10**step + 100
        seen += scores.tolist()
        batch = make_batch([1] * n, scores=scores.tolist())
        algo.observe(batch)
        mean, deviation = algo.scale
        assert (mean, deviation) == pytest.approx((np.mean(seen), np.std(seen, ddof=1)), rel=1e-6)
        assert algo.shaped(batch).tolist() == pytest.approx(((scores.numpy() - mean) / deviation).tolist(), abs=1e-4)
    again = PPO(reward_norm="running")
    again.load_state(json.loads(json.dumps(algo.state())))
    assert again.scale == algo.scale


@pytest.mark.parametrize("how", ["one", "first", "second", "mixed", "run"])
def test_a_reward_model_that_was_changed_is_noticed(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    inside = "final" if how == "run" else ""
    for name in "ab":
        model, _ = given(folders, name)
        model.test = []  # or it is noticed even sooner
        model.save(tmp_path / name / inside)
    words = run_words(folders, "run.save_every=1", f"reward.model={tmp_path}/a")
    if how in ("first", "second"):
        words[-1] = f"reward.model=[{tmp_path}/a,{tmp_path}/b]"
    if how == "mixed":
        words = [w for w in words if not w.startswith("reward")]
        part = f"{{_target_: alignkit.rewards.learned.Learned, model: {tmp_path}/a}}"
        words += ["reward=bleu_chrf", f"+reward.rewards.rm={part}", "+reward.weights.rm=1.0"]
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stopped):
            train(tmp_path / "runs", *words)
    folder = tmp_path / ("b" if how == "second" else "a") / inside
    weights = load_file(folder / "model.safetensors")
    file = folder / "model.safetensors"
    save_file({**weights, "score.weight": -weights["score.weight"]}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"was begun with another reward\..*model"):
        train(tmp_path / "runs", *words)
    save_file(weights, file, metadata={"format": "pt"})
    result, _ = train(tmp_path / "runs", *words)
    assert result["resumes"] == 1
    save_file({**weights, "score.weight": -weights["score.weight"]}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"was begun with another reward\..*model"):  # nor is it taken for finished
        train(tmp_path / "runs", *words)


def test_attributes_are_weighed(folders: Path, tmp_path: Path, sampled: Batch) -> None:
    head = Attributes(names=["a", "b"], weights=[2.0, -1.0])
    model = reward_model.build(Model(path=str(folders / "start"), device="cpu"), Reading(head=head), 0, [])
    model.save(tmp_path / "rated")
    each = [{**row, "response": text} for row, text in zip(sampled.rows, sampled.responses, strict=True)]
    wanted = [2 * z[0] - z[1] for z in (alone(model, row).tolist() for row in each)]
    assert learned(tmp_path, "rated")(sampled).tolist() == pytest.approx(wanted, abs=1e-4)

"""What must hold for every reward model: architectures × poolings × heads, the heads by listing; and the comparing one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ANSWERS, WORDS
from safetensors.torch import load_file, save_file
from scoring_models import EXAMPLES, HEADS, KINDS, POOLINGS, alone, cfg, model_of, new, rows, score_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alignkit import policy, reward_model
from alignkit.algos.bt import BT
from alignkit.algos.rm_regression import RMRegression
from alignkit.comparator import Comparator
from alignkit.config import Lora, Model
from alignkit.errors import UserError
from alignkit.heads import Attributes, Head, Scalar
from alignkit.reward_model import Reading, RewardModel

CASES = [(kind, pooling, head) for kind in KINDS for pooling in POOLINGS for head in HEADS]


@pytest.fixture(params=CASES, ids=["-".join(case) for case in CASES])
def model(request: pytest.FixtureRequest) -> RewardModel:
    """A test that takes it runs for every architecture, pooling and head."""
    made = model_of(*request.param)
    made.mean, made.std = 0.3, 1.7
    return made


def test_heads_are_found() -> None:
    assert {"Scalar", "Attributes"} <= set(HEADS)
    assert set(HEADS) <= set(EXAMPLES), "give EXAMPLES the settings of the new head"


# ---- what pipelines call -----------------------------------------------------------------------------------------------


def test_scores_are_those_of_each_row_alone(model: RewardModel) -> None:
    """Neither padding nor what else is in the batch changes a score; the score of padded rows is that of transformers."""
    data = rows()
    wanted = torch.stack([(score_of(model, alone(model, row)) - 0.3) / 1.7 for row in data])
    torch.testing.assert_close(model.score(data), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([model.score([row]) for row in data]), wanted, atol=1e-5, rtol=1e-5)
    assert model.score(data).dtype == torch.float32
    assert float(wanted.std()) > 0.05


def test_order_and_micro_batches_do_not_change_scores(model: RewardModel) -> None:
    data = rows()
    wanted = model.score(data)
    order = [4, 0, 5, 2, 1, 3]
    torch.testing.assert_close(model.score([data[i] for i in order]), wanted[order], atol=1e-5, rtol=1e-5)
    for budget in (1, 40):
        torch.testing.assert_close(model.score(data, budget), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.compare(data, budget), model.compare(data), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_are_read_in_several_goes(kind: str) -> None:
    model = model_of(kind)
    data = [rows()[i % 6] for i in range(1030)]
    wanted = model.score(rows())
    torch.testing.assert_close(model.score(data), wanted[torch.arange(1030) % 6], atol=1e-5, rtol=1e-5)


def test_comparisons(model: RewardModel) -> None:
    data = rows()
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in data]
    p = model.compare(data)
    assert p.dtype == torch.float64 and p.shape == (6,)
    torch.testing.assert_close(p + model.compare(swapped), torch.ones(6, dtype=torch.float64), atol=1e-6, rtol=0)
    same = model.compare([{**row, "rejected": row["chosen"]} for row in data], 1)
    torch.testing.assert_close(same, torch.full((6,), 0.5, dtype=torch.float64), atol=1e-6, rtol=0)
    if model.scalar:  # in log-odds, the difference of the scores as they were before mean and deviation
        a, b = (model.score([{**row, "response": row[side]} for row in data]) for side in ("chosen", "rejected"))
        torch.testing.assert_close(p.float(), torch.sigmoid(1.7 * (a - b)), atol=1e-5, rtol=1e-5)


def test_rank_is_by_score(model: RewardModel) -> None:
    row, responses = rows()[1], [*ANSWERS, ANSWERS[2]]
    scores = [round(s, 6) for s in model.score([{**row, "response": text} for text in responses]).tolist()]
    found = model.rank(row, responses)
    assert sorted(found) == list(range(7))
    assert [scores[i] for i in found] == sorted(scores, reverse=True)
    assert found.index(2) < found.index(6)  # the same text twice: in their order
    assert model.rank(row, ["rain"]) == [0]


def test_saved_and_loaded_it_gives_identical_scores(model: RewardModel, tmp_path: Path) -> None:
    data = rows()
    model.test = [{"prompt": "rain", "response": "Regen", "score": float(model.score([data[4]]))}]
    before = model.score(data), model.compare(data)
    model.save(tmp_path)
    loaded = reward_model.load(str(tmp_path), "cpu")
    assert isinstance(loaded, RewardModel)
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], w) for name, w in model.model.state_dict().items())
    torch.testing.assert_close(loaded.score(data), before[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(loaded.compare(data), before[1], atol=1e-6, rtol=1e-6)
    assert (loaded.mean, loaded.std, loaded.test, loaded.reading) == (0.3, 1.7, model.test, model.reading)
    assert not any(p.requires_grad for p in loaded.model.parameters()) and not loaded.model.training
    loaded.check()


def test_scores_of_tokens_add_up_to_the_score(model: RewardModel) -> None:
    data = rows()
    batch = model.responses(data)
    wide = batch.with_(
        response_ids=torch.nn.functional.pad(batch.response_ids, (0, 3)),
        mask=torch.nn.functional.pad(batch.mask, (0, 3)),
    )
    for one in (batch, wide):
        found = model.token_scores(one)
        assert found.shape == one.mask.shape
        assert (found[~one.mask] == 0).all()
        torch.testing.assert_close(found.sum(1), model.score(data), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.token_scores(batch, 1), model.token_scores(batch), atol=1e-5, rtol=1e-4)


def test_scores_of_tokens_are_what_each_prefix_gains() -> None:
    """Of a causal model: the score of the response as far as a token, less that as far as the one before."""
    model = model_of("causal")
    model.mean, model.std = 0.3, 1.7
    row = rows()[3]
    batch = model.responses([row])
    found, before = model.token_scores(batch)[0], 0.0
    for n in range(1, int(batch.lengths) + 1):
        prefix = batch.with_(response_ids=batch.response_ids[:, :n], mask=batch.mask[:, :n])
        with torch.no_grad():
            score = (float(model.outputs(prefix)[0]) - 0.3) / 1.7
        assert float(found[n - 1]) == pytest.approx(score - before, abs=1e-4)
        before = score


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_tokens_of_another_tokenizer_are_refused(kind: str) -> None:
    model = model_of(kind)
    other = reward_model.build(cfg(kind), Reading(), 0, ["quite another text", "die die die Katze Katze Lieder Lieder"])
    assert other.encode_responses(ANSWERS) != model.encode_responses(ANSWERS)
    for ids in (other.responses(rows()), model.responses(rows()).with_(response_ids=torch.full((6, 9), 1000))):
        with pytest.raises(UserError, match=r"policy's own tokenizer.*reward\.per=response"):
            model.token_scores(ids)


def test_a_score_that_is_no_number_names_its_row() -> None:
    model = model_of("causal")
    model.model.head.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"gives nan to row 0, response 'die Katze sass'"):
        model.score(rows())


def test_ratings_are_by_attribute() -> None:
    model = model_of("encoder", "last", "Attributes")
    data = rows()
    for row, found in zip(data, model.ratings(data), strict=True):
        assert list(found) == ["help", "tone", "length"]
        assert list(found.values()) == pytest.approx(alone(model, row).tolist(), abs=1e-5)
    with pytest.raises(UserError, match=r"Scalar\) gives no ratings"):
        model_of("encoder").ratings(data)


def test_goodness() -> None:
    """HelpSteer2's weights (helpsteer2.md): 6.8 of (4, 3, 4), at most 7.6; (6.8 - 5) / 1.2 = 1.5."""
    head = Attributes(names=["helpfulness", "correctness", "coherence"], weights=[0.65, 0.8, 0.45])
    found = head.scores(torch.tensor([[4.0, 3, 4], [4, 4, 4]], dtype=torch.float64))
    assert found.tolist() == pytest.approx([6.8, 7.6])
    assert (float(found[0]) - 5) / 1.2 == pytest.approx(1.5)
    assert head.margins(torch.tensor([[4.0, 3, 4]]), torch.tensor([[4.0, 4, 4]])).tolist() == pytest.approx([-0.8])
    for names, weights in (([], []), (["a"], [1.0, 2.0]), (["a", "a"], [1.0, 2.0])):
        with pytest.raises(ValueError, match=r"head\.names"):
            Attributes(names=names, weights=weights)


# ---- what is trained ---------------------------------------------------------------------------------------------------


def gradients(model: RewardModel, algo: Any) -> dict[str, bool]:
    data = [{**row, "ratings": {"help": 1.0, "tone": None, "length": 2.0}} for row in rows()]
    batch = algo.whole(model, algo.batch(model, data), torch.Generator())
    algo.loss(model, batch).total.backward()
    return {
        name: p.grad is not None and bool(p.grad.abs().sum() > 0)
        for name, p in model.model.named_parameters()
        if "pooler" not in name  # nothing reads it
    }


@pytest.mark.parametrize(("kind", "pooling", "head"), CASES)
@pytest.mark.parametrize("trained", ["all", "head"])
def test_the_gradient_reaches_what_is_trained_and_nothing_else(
    kind: str, pooling: str, head: str, trained: str
) -> None:
    made = model_of(kind, pooling, head)
    settings: dict[str, Any] = {"head": made.head, "trained": trained, "pooling": pooling}
    # without centring a shift of all scores, as by the last norm's bias, has no gradient
    algos: list[Any] = [BT(**settings, pattern=[2], centring=0.1)]
    algos += [RMRegression(**settings, pattern=[2])] if head == "Attributes" else []
    for algo in algos:
        model = algo.build(cfg(kind), 0, WORDS + ANSWERS, None)
        found = gradients(model, algo)
        assert {name for name, there in found.items() if there} == {
            name for name in found if trained == "all" or name.startswith("head.")
        }


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_a_rating_costs_nothing(kind: str) -> None:
    model = model_of(kind, "last", "Attributes")
    algo = RMRegression(head=model.head)
    batch = algo.batch(model, [{**row, "ratings": {"help": None, "other": 3.0}} for row in rows()])
    loss = algo.loss(model, batch)
    assert float(loss.total.detach()) == 0 and loss.count == 0 and loss.total.requires_grad
    loss.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.model.parameters() if p.grad is not None)


def test_lora_trains_adapters_and_head_and_exports_a_plain_folder(tmp_path: Path) -> None:
    algo = BT(template="{prompt}")
    model = algo.build(cfg("causal", lora=Lora(r=2)), 0, WORDS + ANSWERS, None)
    trained = {n for n, p in model.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n or n == "head.weight" for n in trained) and "head.weight" in trained
    optimizer = torch.optim.SGD([p for p in model.model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        algo.loss(model, algo.batch(model, rows())).total.backward()
        optimizer.step()
    scores = model.score(rows())
    model.save(tmp_path / "checkpoint")
    with pytest.raises(UserError, match="LoRA adapter alone"):
        reward_model.load(str(tmp_path / "checkpoint"), "cpu")
    again = algo.build(cfg("causal", lora=Lora(r=2)), 0, WORDS + ANSWERS, tmp_path / "checkpoint")
    torch.testing.assert_close(again.score(rows()), scores)
    for p in model.model.parameters():
        p.data.add_(1.0 if p.requires_grad else 0.0)
    model.restore(tmp_path / "checkpoint")
    torch.testing.assert_close(model.score(rows()), scores)
    model.export(tmp_path / "final")
    assert not (tmp_path / "final" / "adapter_config.json").exists()
    assert not any("lora" in k for k in load_file(tmp_path / "final" / "model.safetensors"))
    torch.testing.assert_close(reward_model.load(str(tmp_path / "final"), "cpu").score(rows()), scores)


# ---- on disk -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pooling", ["last", "eos"])
def test_a_causal_one_is_a_plain_transformers_classifier(tmp_path: Path, head: str, pooling: str) -> None:
    model = model_of("causal", pooling, head)
    model.save(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert plain.config.num_labels == model.head.outputs
    data = rows()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    ids = [
        [*tokenizer(f"{row['prompt']} #")["input_ids"][:-1], *tokenizer(row["response"])["input_ids"]] for row in data
    ]
    tokenizer.padding_side = "right"
    padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    with torch.no_grad():
        found = plain(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
    wanted = torch.stack([alone(model, row) for row in data])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.stack([score_of(model, one) for one in found]), model.score(data), atol=1e-5, rtol=1e-5
    )
    (tmp_path / "reward_model.json").unlink()  # as anyone's classifier
    if head == "Scalar":
        other = reward_model.load(str(tmp_path), "cpu")
        one = [{**row, "prompt": row["prompt"] + " #"} for row in data]
        torch.testing.assert_close(other.score(one), model.score(data), atol=1e-5, rtol=1e-5)
    else:
        with pytest.raises(UserError, match="one label"):
            reward_model.load(str(tmp_path), "cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_export_standardises_and_the_self_test_notices_other_weights(tmp_path: Path, kind: str) -> None:
    model = model_of(kind)
    model.examples = rows(20)
    raw = torch.stack([alone(model, row)[0] for row in model.examples])
    model.export(tmp_path)
    assert (model.mean, model.std) == pytest.approx((float(raw.mean()), float(raw.std())), rel=1e-4)
    loaded = reward_model.load(str(tmp_path), "cpu")
    scores = loaded.score(rows(20))
    assert (float(scores.mean()), float(scores.std())) == pytest.approx((0, 1), abs=1e-4)
    loaded.check()
    file = tmp_path / ("model.safetensors" if kind == "causal" else "head.safetensors")
    name = "score.weight" if kind == "causal" else "weight"
    weights = load_file(file)
    save_file({**weights, name: weights[name] * 1.5}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not score as it did when it was saved"):
        reward_model.load(str(tmp_path), "cpu").check()


@pytest.mark.parametrize("examples", [1, 0])
def test_scores_that_have_no_deviation_are_left_as_they_are(tmp_path: Path, examples: int) -> None:
    """One example has none; nor have equal ones."""
    model = model_of("encoder")
    model.examples = rows(1) if examples else rows(1) * 4
    raw = float(alone(model, rows(1)[0]))
    model.export(tmp_path)
    assert (model.mean, model.std) == pytest.approx((raw, 1.0), abs=1e-5)
    assert reward_model.load(str(tmp_path), "cpu").score(rows(2)).isfinite().all()


def test_a_reward_model_as_start_hands_over_its_head(tmp_path: Path) -> None:
    for kind in KINDS:
        model = new(kind, seed=3)
        model.save(tmp_path / kind)
        start = Model(path=str(tmp_path / kind), device="cpu")
        again = reward_model.build(start, Reading(template="{prompt} #"), 5, [])
        assert torch.equal(again.model.head.weight, model.model.head.weight)
        assert torch.equal(again.score(rows()), model.score(rows()))
        other = reward_model.build(start, Reading(head=Attributes(names=["a", "b"], weights=[1.0, 1.0])), 5, [])
        assert other.model.head.weight.shape == (2, 16)


@pytest.mark.parametrize("name", ["arithmetic", "nlg"])
def test_a_policy_is_a_backbone(name: str, tmp_path: Path) -> None:
    """Its states are the policy's own; the head is drawn from the seed."""
    cfg = Model(path=f"bundled:{name}", device="cpu")
    model = reward_model.build(cfg, Reading(), 0, [])
    weights = policy.load(cfg, 0).model.get_decoder().state_dict()
    own = model.model.backbone.get_decoder().state_dict()
    assert weights.keys() == own.keys() and all(torch.equal(weights[k], own[k]) for k in weights)
    data = [{"id": 0, "prompt": "12+30", "response": "42"}, {"id": 1, "prompt": "1+1", "response": "3"}]
    scores = model.score(data)
    assert scores.isfinite().all() and scores[0] != scores[1]
    assert torch.equal(reward_model.build(cfg, Reading(), 0, []).model.head.weight, model.model.head.weight)
    assert not torch.equal(reward_model.build(cfg, Reading(), 1, []).model.head.weight, model.model.head.weight)
    model.save(tmp_path)
    assert torch.equal(reward_model.load(str(tmp_path), "cpu").score(data), scores)


def test_where_padding_is_the_end_token_it_gets_one_of_its_own(tmp_path: Path, tiny_causal) -> None:
    tiny_causal.tokenizer.pad_token = tiny_causal.tokenizer.eos_token
    tiny_causal.save(tmp_path / "start")
    tiny_causal.tokenizer.pad_token = "<pad>"  # it is shared
    start = Model(path=str(tmp_path / "start"), device="cpu")
    built = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        built.append(reward_model.build(start, Reading(template="{prompt} #"), 0, []))
    model = built[0]
    assert model.pad not in model.eos and model.tokenizer.pad_token == "[PAD]"
    assert model.model.config.pad_token_id == model.pad
    assert model.model.backbone.get_input_embeddings().weight.shape[0] > model.pad
    wanted = torch.stack([alone(model, row)[0] for row in rows()])
    torch.testing.assert_close(model.score(rows()), wanted, atol=1e-5, rtol=1e-5)
    weights = built[1].model.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in model.model.state_dict().items())  # of the seed alone
    model.save(tmp_path / "saved")
    assert torch.equal(reward_model.load(str(tmp_path / "saved"), "cpu").score(rows()), model.score(rows()))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    batch = model.responses(rows())
    ids = [
        torch.cat([p[m], r[n]])
        for p, m, r, n in zip(batch.prompt_ids, batch.prompt_mask, batch.response_ids, batch.mask, strict=True)
    ]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=model.pad)
    with torch.no_grad():
        found = plain(input_ids=padded, attention_mask=padded != model.pad).logits[:, 0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_what_is_no_reward_model_is_refused(tmp_path: Path, tiny_causal) -> None:
    tiny_causal.save(tmp_path / "policy")
    with pytest.raises(UserError, match=r"is no reward model: .*Train one with \+algo=bt"):
        reward_model.load(str(tmp_path / "policy"), "cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a model"):
        reward_model.load(str(tmp_path / "empty"), "cpu")
    with pytest.raises(UserError, match="no such"):
        reward_model.load(str(tmp_path / "nothing"), "cpu")
    model_of("encoder").save(tmp_path / "head")
    file = tmp_path / "head" / "reward_model.json"
    settings = json.loads(file.read_text())
    settings["reading"]["head"] = {"_target_": "elsewhere.Mine"}
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"its head elsewhere\.Mine cannot be imported"):
        reward_model.load(str(tmp_path / "head"), "cpu")
    (tmp_path / "head" / "head.safetensors").unlink()
    settings["reading"]["head"] = {"_target_": "alignkit.heads.Scalar"}
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"weights of its head, none, must be .*reward_model\.json"):
        reward_model.load(str(tmp_path / "head"), "cpu")


def test_a_model_of_the_hub_brings_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it lies in the hub's cache."""
    model = model_of("causal")
    snapshot = tmp_path / "models--someone--scores" / "snapshots" / ("0" * 40)
    model.save(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    for module in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(module, str(tmp_path))
    loaded = reward_model.load("someone/scores", "cpu")
    assert torch.equal(loaded.score(rows()), model.score(rows()))


# ---- texts that do not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["last", "eos"])
def test_what_does_not_fit_is_cut_and_counted(kind: str, pooling: str) -> None:
    model = new(kind, pooling, max_tokens=14)
    short = {"id": 0, "prompt": "a", "response": "b"}
    prompt = {"id": 1, "prompt": "0123456789 abcdefghij", "response": "xyz"}
    response = {"id": 2, "prompt": "a", "response": "abcdefghijklmnopqrstuvwxyz"}
    data = [short, prompt, response, {**response, "prompt": prompt["prompt"]}]
    assert model.too_long(data) == 3 and model.too_long([short]) == 0
    batch = model.responses(data)
    asked = model.prompt_ids(data)
    answers = model.encode_responses([row["response"] for row in data])
    for i in range(4):
        p, r = batch.prompt_ids[i][batch.prompt_mask[i]].tolist(), batch.response_ids[i][batch.mask[i]].tolist()
        assert max(len(p), len(r) + 1) <= 14 if kind == "seq2seq" else len(p) + len(r) <= 14
        assert p == asked[i][len(asked[i]) - len(p) :]  # the beginning is lost
        if pooling == "eos":
            assert r[-1] == 2 and r[:-1] == answers[i][: len(r) - 1]  # the end is lost
        else:
            assert r == answers[i][: len(r)]
    fits = batch.prompt_mask.sum(1).tolist(), batch.lengths.tolist()
    assert (fits[0][0], fits[1][0]) == (len(asked[0]), len(answers[0]))
    if kind == "seq2seq":
        assert (fits[0][1], fits[1][2]) == (14, 13)
    else:
        assert fits[0][1] + fits[1][1] == 14 and fits[1][1] == len(answers[1])
        assert (fits[0][3], fits[1][3]) == (2, 12)
    assert model.score(data).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["last", "eos", "mean", "all"])
def test_tokens_that_do_not_fit_get_nothing(kind: str, pooling: str) -> None:
    """The others add up to the score of the response as it is read."""
    model = new(kind, pooling, max_tokens=14)
    data = [{"id": i, "prompt": "a", "response": text} for i, text in enumerate(["b", "abcdefghijklmnopqrstuvwxyz"])]
    found = model.token_scores(new(kind, pooling).responses(data))
    assert found.shape[1] > 14 and (found[1, 13:] == 0).all() and (found[1, :12] != 0).all()
    torch.testing.assert_close(found.sum(1), model.score(data), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_that_the_positions_allow(kind: str) -> None:
    model = model_of(kind)
    assert model.limit == 64
    long = {"id": 0, "prompt": "a long prompt " * 30, "response": "ein langer Text " * 30}
    assert model.too_long([long, {**long, "prompt": "a"}, {**long, "response": "b"}]) == 3
    assert model.score([long, {**long, "prompt": "a"}, {**long, "response": "b"}]).isfinite().all()


WIDE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FEW = {"max_position_embeddings": 40}
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40},
    "mistral": {**WIDE, **FEW, "num_key_value_heads": 2, "sliding_window": 8},
    "roberta": {**WIDE, **FEW},  # counts its positions from the padding token's id on, as the two that follow
    "xlm-roberta": {**WIDE, **FEW},
    "mpnet": {**WIDE, **FEW},
    "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, **FEW},
    "deberta-v2": {**WIDE, **FEW},
    "modernbert": {**WIDE, **FEW, "local_attention": 8},
    "t5": {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8},
    "bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, **FEW},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name: str, tmp_path: Path) -> None:
    """Padding does not change scores, tokens add up, what is too long is cut to what the positions allow, and it can be saved."""
    config = Model(config={"model_type": name, **OTHERS[name]}, vocab_size=300, device="cpu")
    model = reward_model.build(config, Reading(), 0, WORDS + ANSWERS)
    assert model.kind == (
        "causal" if name in ("gpt2", "mistral") else "seq2seq" if name in ("t5", "bart") else "encoder"
    )
    scores = model.score(rows())
    torch.testing.assert_close(torch.cat([model.score([row]) for row in rows()]), scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.token_scores(model.responses(rows())).sum(1), scores, atol=1e-5, rtol=1e-5)
    long = {"id": 0, "prompt": "a long prompt " * 30, "response": "ein langer Text " * 30}
    assert model.score([long]).isfinite().all()
    model.save(tmp_path)
    torch.testing.assert_close(reward_model.load(str(tmp_path), "cpu").score(rows()), scores, atol=1e-6, rtol=1e-6)


def test_a_chat_is_read_through_the_template_of_the_tokenizer() -> None:
    model = model_of("causal")
    chat = [{"role": "user", "content": "rain"}]
    with pytest.raises(UserError, match="no chat template"):
        model.score([{"id": 0, "prompt": chat, "response": "Regen"}])
    tokenizer = new("causal").tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} #{% endfor %}"
    model.tokenizer = tokenizer
    found = model.score(
        [{"id": 0, "prompt": chat, "response": "Regen"}, {"id": 0, "prompt": "rain", "response": "Regen"}]
    )
    # the template of the settings is for prompts that are text
    assert (
        model.responses([{"id": 0, "prompt": chat, "response": "Regen"}]).prompt_ids[0].tolist()[-1]
        in tokenizer("#", add_special_tokens=False)["input_ids"]
    )
    assert found.isfinite().all()


def test_a_pattern_that_is_missing_names_the_row() -> None:
    model = model_of("causal", "pattern")
    model.reading.template = "{prompt}"
    model.reading.pattern = [299]
    with pytest.raises(UserError, match=r"row \d: the tokens \[\d+\] of pooling=pattern are not in it"):
        model.score(rows())
    with pytest.raises(UserError, match=r"give algo\.pattern"):
        reward_model.build(cfg("causal"), Reading(pooling="pattern"), 0, WORDS)


def test_bfloat16_scores_are_near(tmp_path: Path) -> None:
    for kind in KINDS:
        model = model_of(kind)
        model.save(tmp_path / kind)
        half = reward_model.load(str(tmp_path / kind), "cpu", "bfloat16").score(rows())
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, model.score(rows()), atol=0.1, rtol=0.05)


# ---- the one that compares ---------------------------------------------------------------------------------------------

ASKED = "{prompt}? {first} or {second}"


@pytest.fixture
def comparator(policy) -> Comparator:
    """Both architectures."""
    return Comparator(policy, ASKED, " YES", " NO")


def verdict(comparator: Comparator, row: dict[str, Any], first: str, second: str) -> float:
    """p(first is better) of transformers alone: a softmax over the logits of two tokens."""
    policy, tokenizer = comparator.policy, comparator.policy.tokenizer
    ids = tokenizer(f"{row['prompt']}? {first} or {second}")["input_ids"]
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in (" YES", " NO"))
    opening = [a for a, b in zip(yes, no, strict=False) if a == b][:1]  # the space
    with torch.no_grad():
        if policy.is_encoder_decoder:
            out = policy.model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[1, *opening]]))
        else:
            out = policy.model(input_ids=torch.tensor([ids[:-1] + opening]))
    a, b = out.logits[0, -1, [yes[len(opening)], no[len(opening)]]].double().exp().tolist()
    return a / (a + b)


def test_a_comparison_is_the_mean_of_both_orders(comparator: Comparator) -> None:
    data = rows()
    wanted = [
        (verdict(comparator, r, r["chosen"], r["rejected"]) + 1 - verdict(comparator, r, r["rejected"], r["chosen"]))
        / 2
        for r in data
    ]
    for budget in (1, 8192):
        assert comparator.compare(data, budget).tolist() == pytest.approx(wanted, abs=1e-5)
    order = [3, 1, 0, 5, 4, 2]
    assert comparator.compare([data[i] for i in order]).tolist() == pytest.approx([wanted[i] for i in order], abs=1e-5)
    assert max(wanted) - min(wanted) > 0.01


def test_many_comparisons_are_made_in_several_goes(comparator: Comparator) -> None:
    wanted = comparator.compare(rows())
    found = comparator.compare([rows()[i % 6] for i in range(520)], 500)
    torch.testing.assert_close(found, wanted[torch.arange(520) % 6], atol=1e-5, rtol=1e-5)


def test_comparisons_turned_round_add_up_to_1_and_equal_ones_are_even(comparator: Comparator) -> None:
    data = rows()
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in data]
    both = comparator.compare(data) + comparator.compare(swapped)
    torch.testing.assert_close(both, torch.ones(6, dtype=torch.float64), atol=1e-6, rtol=0)
    same = [{**row, "rejected": row["chosen"]} for row in [*data, *swapped]]
    assert comparator.compare(same).tolist() == [0.5] * 12  # exactly (pairwise_rl.md, E3)
    assert comparator.score([{**row, "references": [row["response"]]} for row in data]).tolist() == [0.5] * 6


@pytest.mark.parametrize(
    ("logits", "wanted"), [([0.8, -0.8], 0.689974), ([0.8472979, -0.4054651], 0.65)], ids=["E1", "E2"]
)
def test_card_vectors_of_comparisons(
    monkeypatch: pytest.MonkeyPatch, comparator: Comparator, logits: list[float], wanted: float
) -> None:
    """E1: yes 1.2, no .4; turned round, the other way. E2: p(y, anchor) .7, p(anchor, y) .4."""
    monkeypatch.setattr(comparator, "logits", lambda part: torch.tensor(logits))
    assert comparator.compare(rows(1)).tolist() == pytest.approx([wanted], abs=1e-6)


def test_even_is_exact_whatever_the_probability(monkeypatch: pytest.MonkeyPatch, comparator: Comparator) -> None:
    logits = torch.linspace(-9, 9, 500)
    data = [{**rows(1)[0], "rejected": rows(1)[0]["chosen"]}]
    batch = comparator.pairs(data)
    monkeypatch.setattr(comparator, "pairs", lambda rows: batch)
    for one in logits:
        monkeypatch.setattr(comparator, "logits", lambda part, one=one: torch.stack([one, one]))
        assert comparator.compare(data).tolist() == [0.5]


def test_a_score_is_the_chance_against_the_first_reference(comparator: Comparator) -> None:
    data = [{**row, "references": ["rain", "not this one"]} for row in rows()]
    wanted = comparator.compare([{**row, "chosen": row["response"], "rejected": "rain"} for row in data])
    torch.testing.assert_close(comparator.score(data), wanted.float())
    with pytest.raises(UserError, match=r"row 3 has no reference.*data\.references"):
        comparator.score([*data[:3], {**data[3], "references": []}])


def test_rank_is_by_the_mean_chance_against_the_others(comparator: Comparator) -> None:
    row, responses = rows()[1], ANSWERS[:4]
    p = [
        [float(comparator.compare([{**row, "chosen": a, "rejected": b}])) for b in responses if b != a]
        for a in responses
    ]
    means = [sum(one) / 3 for one in p]
    found = comparator.rank(row, responses)
    assert [means[i] for i in found] == sorted(means, reverse=True)
    assert comparator.rank(row, ["a", "a", "a"]) == [0, 1, 2]
    assert comparator.rank(row, ["a"]) == [0]


def test_a_comparator_saved_and_loaded(comparator: Comparator, tmp_path: Path) -> None:
    data = rows()
    before = comparator.compare(data)
    comparator.export(tmp_path)
    loaded = reward_model.load(str(tmp_path), "cpu")
    assert isinstance(loaded, Comparator)
    assert torch.equal(loaded.compare(data), before)
    assert (loaded.template, loaded.yes, loaded.no) == (ASKED, " YES", " NO")
    loaded.check()
    with pytest.raises(UserError, match=r"no rewards of tokens.*reward\.per=response"):
        loaded.token_scores(loaded.policy.demonstrations(data))
    with pytest.raises(UserError, match="comparing reward model gives no ratings"):
        loaded.ratings(data)


def test_words_that_begin_alike_are_told_apart_and_equal_ones_refused(policy) -> None:
    with pytest.raises(UserError, match="begin with the same tokens"):
        Comparator(policy, ASKED, " Y", " Y")
    with pytest.raises(UserError, match="begin with the same tokens"):
        Comparator(policy, ASKED, " Y", " YES")


def test_a_chat_is_shown_as_text(comparator: Comparator) -> None:
    chat = [{"role": "user", "content": "rain"}, {"role": "assistant", "content": "yes"}]
    one = {**rows()[0], "prompt": chat}
    text = {**rows()[0], "prompt": "user: rain\n\nassistant: yes"}
    assert torch.equal(comparator.compare([one]), comparator.compare([text]))


def test_scalar_is_what_margins_are(model: RewardModel) -> None:
    assert model.scalar == (type(model.head).margins is Head.margins)
    assert isinstance(model.head, Scalar | Attributes)


# ---- what is saved with it -------------------------------------------------------------------------------------------


def test_the_temperature_goes_with_the_model(tmp_path: Path) -> None:
    """Margins are over it, in training, in comparisons and after loading; scores are not."""
    model = new("causal", temperature=0.25)
    model.save(tmp_path)
    loaded = reward_model.load(str(tmp_path), "cpu")
    plain = new("causal")
    data = [{"id": 0, "prompt": "a", "chosen": ANSWERS[0], "rejected": ANSWERS[1]}]
    odds = torch.logit(plain.compare(data))
    torch.testing.assert_close(torch.logit(loaded.compare(data)), 4 * odds, atol=1e-5, rtol=1e-5)
    one = [{"id": 0, "prompt": "a", "response": ANSWERS[0]}]
    torch.testing.assert_close(loaded.score(one), plain.score(one), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": None},
        {"reading": {"head": {"_target_": "Scalar"}}},
        {"reading": {"head": {"_target_": "alignkit.heads.Scalar"}, "later": 1}},
        {"reading": {"head": {"_target_": "alignkit.heads.Head"}}},
        {"reading": {"head": {"_target_": "os.path.join"}}},
        None,
    ],
)
def test_damaged_settings_are_named(tmp_path: Path, change: dict[str, Any] | None) -> None:
    new("causal").save(tmp_path)
    file = tmp_path / "reward_model.json"
    settings = json.loads(file.read_text())
    if change is None:
        file.write_text(file.read_text()[:-40])
    else:
        settings |= change
        file.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    with pytest.raises(UserError, match=r"reward_model\.json is damaged|its head .* cannot be imported"):
        reward_model.load(str(tmp_path), "cpu")


def test_from_the_hub_only_own_heads_are_built() -> None:
    settings = new("causal").reading.to_json()
    assert Reading.from_json(settings, local=False).head == Scalar()
    settings["head"]["_target_"] = "antigravity.Head"
    with pytest.raises(UserError, match=r"only heads of alignkit itself are built, not antigravity\.Head"):
        Reading.from_json(settings, local=False)


def test_a_run_that_is_not_finished_is_no_reward_yet(tmp_path: Path) -> None:
    new("causal").save(tmp_path / "checkpoint-3")
    with pytest.raises(UserError, match="is not finished"):
        reward_model.load(str(tmp_path), "cpu")
    assert reward_model.load(str(tmp_path / "checkpoint-3"), "cpu").scalar


class Cycle(Scalar):
    """A head that compares and has no score of its own."""

    def scores(self, z: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def margins(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).squeeze(-1)


def test_a_head_without_scores_is_exported(tmp_path: Path) -> None:
    model = new("causal")
    model.head = model.reading.head = Cycle()
    model.examples = [{"id": 0, "prompt": "a", "response": "b"}]
    model.export(tmp_path)
    assert (model.mean, model.std, model.test) == (0.0, 1.0, [])
    data = [{"id": 0, "prompt": "a", "chosen": ANSWERS[0], "rejected": ANSWERS[1]}]
    assert 0 < float(model.compare(data)) < 1

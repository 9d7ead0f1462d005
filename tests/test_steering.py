"""Steered policies: what is added to a frozen model's logits, in decoding and in the teacher-forced pass."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from running import SMALL_CAUSAL, SMALL_SFT, command, composed, train

from alignkit.config import Model, Steer, check
from alignkit.decode import Decode
from alignkit.errors import UserError
from alignkit.policy import load
from alignkit.steering import Reading, Steered, Trained, trained_as
from alignkit.vocabulary import VocabularyMap

CASES = ["residual", "cascade", "cascade_plus", "proxy", "seq2seq", "seq2seq proxy"]


@pytest.fixture
def steered(build_policy):
    """``steered(case, scale)``: three different models, of which the value model is narrower than the base."""

    def make(case: str, scale: float = 1.0) -> Steered:
        kind = "seq2seq" if case.startswith("seq2seq") else "causal"
        small = {"d_model": 8} if kind == "seq2seq" else {"hidden_size": 8, "num_hidden_layers": 1}
        base, value = build_policy(kind), build_policy(kind, seed=1, **small)
        minus = build_policy(kind, seed=2, **small) if case.endswith("proxy") else None
        connection = case if case.startswith("cascade") else "residual"
        policy = Steered(base, value, Trained(connection=connection), minus, scale)
        policy.eos = [policy.eos[0], 94, *range(97, 180)]  # responses of different lengths
        return policy

    return make


def naive(policy: Steered, prompt: list[int], said: list[int]) -> torch.Tensor:
    """z (V,) behind one text, read from its beginning without a cache or padding: the formulas as they stand."""

    def logits(model, **inputs) -> torch.Tensor:
        return model(use_cache=False, **inputs).logits[0]

    if policy.is_encoder_decoder:
        inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[*policy._start, *said]])}
    else:
        inputs = {"input_ids": torch.tensor([[*prompt, *said]])}
    b = logits(policy.base.model, **inputs)
    if policy.trained.connection == "residual":
        v = logits(policy.model, **inputs)
    else:
        embeddings = policy.model.get_input_embeddings().weight
        e = torch.softmax(b, -1) @ embeddings
        if policy.trained.connection == "cascade_plus":
            e = e + embeddings[inputs["input_ids"][0]]
        v = logits(policy.model, inputs_embeds=e[None])
    m = logits(policy.minus.model, **inputs) if policy.minus else 0.0
    return (b + policy.scale * (v - m))[-1]


@torch.no_grad()
def greedy(policy: Steered, prompt: list[int], steps: int) -> list[int]:
    said: list[int] = []
    while len(said) < steps and not (said and said[-1] in policy.eos):
        said.append(int(naive(policy, prompt, said).argmax()))
    return said


def kept(batch) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(batch.response_ids, batch.mask, strict=True)]


# ---- the formulas ----------------------------------------------------------------------------------------------------


def test_numbers_of_the_card(steered) -> None:
    policy = steered("residual")
    b, v = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([-1.0, 0.5, 1.0])
    assert policy.combined(b, v).tolist() == [1.0, 1.5, 1.0]  # E1
    proxy = policy.combined(b, torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.5, 1.0, 0.5]))
    assert proxy.tolist() == [1.5, 2.0, -0.5]  # E4
    policy.scale = 2.0
    assert policy.combined(b, v).tolist() == [0.0, 2.0, 2.0]


def test_a_padded_vocabulary_is_left_as_the_base_has_it(steered) -> None:
    """Larger models of a family often have more rows in their embeddings than their tokenizer has tokens."""
    policy = steered("residual")
    b, v = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0])
    assert policy.combined(b, v).tolist() == [3.0, 2.0, 0.0]
    assert policy.combined(v, b).tolist() == [3.0, 2.0]
    assert policy.combined(b, v, b).tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("case", CASES)
def test_greedy_decoding_is_a_loop_that_reads_everything_anew(case, steered, rows) -> None:
    policy = steered(case, scale=0.7)
    data = rows(6)
    batch = policy.generate(data, 1, Decode(max_new_tokens=9, greedy=True))
    wanted = [greedy(policy, ids, 9) for ids in policy.encode_prompts(data)]
    assert kept(batch) == wanted
    assert len({len(ids) for ids in wanted}) > 1, wanted
    base = policy.base.generate(data, 1, Decode(max_new_tokens=9, greedy=True))
    assert kept(batch) != kept(base), "what is added must make a difference"


@pytest.mark.parametrize("case", CASES)
def test_samples_have_the_log_probabilities_of_that_loop_and_of_the_teacher_forced_pass(case, steered, rows) -> None:
    policy = steered(case, scale=0.7)
    data = rows(4)
    tau = torch.tensor([1.0, 0.7, 1.3, 1.0])
    for counts in (1, [3, 1, 2, 2]):  # alone in their groups, and several that share a prompt
        batch = policy.generate(
            data, counts, Decode(max_new_tokens=7), temperature=tau, generator=torch.Generator().manual_seed(5)
        )
        prompts = policy.encode_prompts(batch.rows)
        with torch.no_grad():
            for i, ids in enumerate(kept(batch)):
                for t, token in enumerate(ids):
                    wanted = naive(policy, prompts[i], ids[:t]).log_softmax(-1)[token]
                    assert float(batch.logprobs[i, t]) == pytest.approx(float(wanted), abs=1e-4)
            torch.testing.assert_close(policy.forward(batch), batch.logprobs * batch.mask, atol=1e-4, rtol=1e-4)
            warm = policy.forward(batch, tau[batch.group])
            ids, first = kept(batch)[0], naive(policy, prompts[0], [])
        assert float(warm[0, 0]) == pytest.approx(float((first / tau[0]).log_softmax(-1)[ids[0]]), abs=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_scale_0_is_the_base(case, steered, rows) -> None:
    policy, data = steered(case, scale=0.0), rows(5)
    policy.base.eos = policy.eos
    for greedily in (True, False):
        how = Decode(max_new_tokens=8, greedy=greedily)
        mine, bases = (
            one.generate(data, 2, how, generator=torch.Generator().manual_seed(3)) for one in (policy, policy.base)
        )
        assert kept(mine) == kept(bases)
        exact = (
            {"atol": 0, "rtol": 0} if not policy.cascades else {}
        )  # which reads its prompts in another order of sums
        torch.testing.assert_close(mine.logprobs, bases.logprobs, **exact)
        torch.testing.assert_close(policy.forward(mine), policy.base.forward(mine), **exact)


@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing(case, steered, rows) -> None:
    policy, data = steered(case), rows(5)
    batch = policy.demonstrations(data)
    together = policy.forward(batch).detach()
    for i, row in enumerate(data):
        one = policy.demonstrations([row])
        alone = policy.forward(one).detach()[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_the_value_model_alone(case, steered, rows) -> None:
    policy = steered(case)
    policy.train(True)
    assert policy.model.training and not policy.base.model.training
    batch = policy.demonstrations(rows(4))
    policy.forward(batch).sum().backward()
    for frozen in (policy.base, *([policy.minus] if policy.minus else [])):
        assert all(p.grad is None and not p.requires_grad for p in frozen.model.parameters())
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in policy.model.parameters())


def test_everywhere_is_each_token_of_prompt_and_response(steered, rows) -> None:
    for case in ("residual", "cascade_plus"):
        policy = steered(case)
        batch = policy.demonstrations(rows(3))
        plain, whole = policy.read(batch), policy.read(batch, everywhere=True)
        assert isinstance(whole, Reading)
        assert len(whole.everywhere) == int(batch.prompt_mask.sum() + batch.mask.sum())
        assert torch.equal(plain.where, whole.where)
        torch.testing.assert_close(plain.value, whole.value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(plain.base, whole.base, atol=1e-5, rtol=1e-4)


def test_bfloat16_is_close_to_float32(steered, rows) -> None:
    """All models are computed in it; their sum is not."""
    policy = steered("proxy")
    batch = policy.demonstrations(rows(4))
    wanted = policy.forward(batch).detach()
    for one in (policy, policy.base, policy.minus):
        one.compute = torch.bfloat16
    found = policy.forward(batch).detach()
    assert found.dtype == torch.float32
    assert float((found - wanted).abs().max()) < 0.3
    assert not torch.equal(found, wanted)


# ---- vocabularies of their own ---------------------------------------------------------------------------------------

OTHER = ["the cats", "bread and apples", "old dogs sing in the rain"]


@pytest.fixture
def mapped(build_policy):
    """A value model whose tokenizer is another one, and a map that leads each token to some token of it."""
    base = build_policy("causal")
    config = {**copy.deepcopy(base.model.config.to_diff_dict()), "model_type": "llama", "hidden_size": 8}
    config = {
        k: v for k, v in config.items() if k not in ("vocab_size", "architectures", "transformers_version", "dtype")
    }
    value = load(Model(config=config, vocab_size=290, device="cpu"), 1, OTHER)
    n, width = len(base.tokenizer), len(value.tokenizer)
    assert base.tokenizer.get_vocab() != value.tokenizer.get_vocab()
    generator = torch.Generator().manual_seed(0)
    column = torch.randint(width, (n,), generator=generator)
    return base, value, VocabularyMap(column, torch.rand(n, generator=generator), width)


def test_a_mapped_value_model_reads_the_text_cut_anew(mapped, rows) -> None:
    base, value, lead = mapped
    policy = Steered(base, value, Trained(), map=lead, scale=0.7)
    matrix = torch.zeros(len(base.tokenizer), len(value.tokenizer))
    matrix[torch.arange(len(base.tokenizer)), lead.column] = lead.weight
    data = rows(4)

    def z(i: int, said: list[int]) -> torch.Tensor:
        text = base.tokenizer.decode(said, skip_special_tokens=True)
        own = [
            *value.tokenizer(data[i]["prompt"])["input_ids"][:-1],
            *value.tokenizer(text, add_special_tokens=False)["input_ids"],
        ]
        read = torch.tensor([[*base.encode_prompts([data[i]])[0], *said]])
        v = value.model(input_ids=torch.tensor([own])).logits[0, -1]
        return base.model(input_ids=read).logits[0, -1] + 0.7 * matrix @ v

    with torch.no_grad():
        batch = policy.generate(data, 1, Decode(max_new_tokens=6, greedy=True))
        forced = policy.forward(batch)
        for i, ids in enumerate(kept(batch)):
            for t, token in enumerate(ids):
                wanted = z(i, ids[:t])
                assert token == int(wanted.argmax())
                assert float(forced[i, t]) == pytest.approx(float(wanted.log_softmax(-1)[token]), abs=1e-4)
        sampled = policy.generate(
            data, [2, 1, 3, 1], Decode(max_new_tokens=5), generator=torch.Generator().manual_seed(1)
        )
        torch.testing.assert_close(policy.forward(sampled), sampled.logprobs * sampled.mask, atol=1e-4, rtol=1e-4)
    assert kept(batch) != kept(base.generate(data, 1, Decode(max_new_tokens=6, greedy=True)))


def test_a_text_begun_is_read_by_both(mapped, rows) -> None:
    base, value, lead = mapped
    policy = Steered(base, value, Trained(), map=lead)
    how = Decode(max_new_tokens=1, greedy=True)
    longer = [{**row, "prompt": f"{row['prompt']} the old"} for row in rows(3)]  # the same tokens, as a prompt
    begun = policy.generate(rows(3), 1, how, begun=[" the old"] * 3)
    torch.testing.assert_close(begun.logprobs, policy.generate(longer, 1, how).logprobs, atol=1e-4, rtol=1e-4)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_different_vocabularies_are_refused(mapped, build_policy) -> None:
    base, value, lead = mapped
    with pytest.raises(UserError, match=r"BASE and VALUE have different vocabularies \(300 and 290 tokens"):
        Steered(base, value, Trained(), names=("BASE", "VALUE", ""))
    with pytest.raises(UserError, match="leads from 290 tokens to 299"):
        Steered(base, value, Trained(), map=VocabularyMap(lead.column[1:], lead.weight[1:], lead.width))
    with pytest.raises(UserError, match="is for causal models, without minus"):
        Steered(base, value, Trained(), build_policy("causal"), map=lead)


def test_connections_that_models_do_not_have_are_refused(build_policy) -> None:
    causal, seq2seq = build_policy("causal"), build_policy("seq2seq")
    with pytest.raises(UserError, match="connection=cascade needs causal models"):
        Steered(seq2seq, build_policy("seq2seq", seed=1), Trained(connection="cascade"))
    with pytest.raises(UserError, match=r"connection=cascade_plus needs causal models.*without minus"):
        Steered(causal, build_policy("causal", 1), Trained(connection="cascade_plus"), build_policy("causal", 2))
    with pytest.raises(UserError, match="a seq2seq model, the base a causal one"):
        Steered(causal, seq2seq, Trained())


def test_beam_search_is_refused(steered, rows) -> None:
    with pytest.raises(UserError, match=r"evaluate\.decode=beam.*greedy or sample"):
        steered("residual").beam(rows(2), 2, 4)


def test_positions_are_those_of_the_shortest_model(build_policy) -> None:
    base, value = build_policy("causal"), build_policy("causal", 1, max_position_embeddings=24)
    policy = Steered(base, value, Trained())
    assert policy.max_positions == 24
    with pytest.raises(UserError, match="24 positions"):
        policy.generate([{"prompt": "rain", "id": 0}], 1, Decode(max_new_tokens=40))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.steer.minus=a"], r"model\.steer\.value: is null"),
        (["model.steer.scale=0.5"], r"model\.steer\.value: is null"),
        (["model.steer.value=a", "+algo=sft"], r"stage sft trains one.*\+algo=inverse_value"),
        (["model.steer.value=a", "+algo=grpo"], r"stage rl trains one"),
        (["model.steer.value=a", "+algo=dpo"], r"stage pref trains one"),
        (["model.steer.value=a", "+algo=bt"], r"stage rm trains one"),
        (["model.steer.value=a", "+algo=judge"], r"no effect in stage judge"),
        (["evaluate.nll=true", "+algo=bt"], r"evaluate\.nll: has no effect in stage rm"),
    ],
)  # fmt: skip
def test_settings_without_an_effect_are_refused(words, message) -> None:
    algo = [] if words[-1].startswith("+algo") else ["+algo=evaluate", "model.path=bundled:lists", "data=lists"]
    with pytest.raises(UserError, match=message):
        check(composed([*words, *algo]))


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_the_value_model_alone_is_saved_and_comes_back(steered, rows, tmp_path) -> None:
    policy = steered("cascade_plus")
    policy.trained = Trained(connection="cascade_plus", norm="l1", base="somewhere")
    policy.export(tmp_path / "value")
    policy.base.save(tmp_path / "base")
    assert json.loads((tmp_path / "value" / "value.json").read_text())["connection"] == "cascade_plus"
    assert trained_as(str(tmp_path / "value")) == policy.trained
    again = load(
        Model(path=str(tmp_path / "base"), device="cpu", steer=Steer(value=str(tmp_path / "value"), scale=0.5)), 0
    )
    policy.scale = 0.5
    assert isinstance(again, Steered)
    assert torch.equal(again.forward(again.demonstrations(rows(3))), policy.forward(policy.demonstrations(rows(3))))
    before = policy.forward(policy.demonstrations(rows(3)))
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(1.0)
    policy.restore(tmp_path / "value")
    assert torch.equal(policy.forward(policy.demonstrations(rows(3))), before)


def test_a_map_is_read_from_its_file(mapped, rows, tmp_path) -> None:
    base, value, lead = mapped
    base.save(tmp_path / "base")
    value.save(tmp_path / "value")
    lead.save(tmp_path / "map.safetensors")
    steer = Steer(value=str(tmp_path / "value"), map=str(tmp_path / "map.safetensors"))
    policy = load(Model(path=str(tmp_path / "base"), device="cpu", steer=steer), 0)
    batch = base.demonstrations(rows(3))
    assert torch.equal(policy.forward(batch), Steered(base, value, Trained(), map=lead).forward(batch))
    with pytest.raises(
        UserError, match=r"model\.path=.*base and model\.steer\.value=.*value have different vocabularies"
    ):
        load(Model(path=str(tmp_path / "base"), device="cpu", steer=Steer(value=str(tmp_path / "value"))), 0)


def test_a_plain_model_is_a_residual_one(build_policy, tmp_path) -> None:
    build_policy("causal").save(tmp_path)
    assert trained_as(str(tmp_path)) == Trained()
    (tmp_path / "value.json").write_text('{"connection": "residual", "wheels": 4}')
    with pytest.raises(UserError, match=r"value\.json: does not say how"):
        trained_as(str(tmp_path))


def test_a_missing_part_is_named_by_its_setting(build_policy, tmp_path) -> None:
    build_policy("causal").save(tmp_path / "base")
    for setting, steer in (
        ("value", Steer(value=f"{tmp_path}/none")),
        ("minus", Steer(value=f"{tmp_path}/base", minus=f"{tmp_path}/none")),
        ("map", Steer(value=f"{tmp_path}/base", map=f"{tmp_path}/none")),
    ):
        with pytest.raises(UserError, match=rf"^model\.steer\.{setting}="):
            load(Model(path=str(tmp_path / "base"), device="cpu", steer=steer), 0)


def test_the_commands(tmp_path) -> None:
    """Train a base and another model, evaluate their sum: proxy tuning from the command line, and greedy bests of n."""
    _, base = train(tmp_path, *SMALL_SFT, *SMALL_CAUSAL)
    _, other = train(tmp_path, *SMALL_SFT, *SMALL_CAUSAL, f"model.tokenizer={base}/final", "seed=1", "algo.lr=3e-3")
    small = ["data=rnnlg", "evaluate.rows=6", "evaluate.max_new_tokens=6", "run.wandb=disabled", "evaluate.nll=true"]
    found = {}
    for name, words in {
        "base": [],
        "scale 0": [f"model.steer.value={other}", "model.steer.scale=0"],
        "proxy": [f"model.steer.value={other}", f"model.steer.minus={base}"],
    }.items():
        done = command("evaluate", str(base), *words, *small, f"run.dir={tmp_path}/{name.replace(' ', '_')}")
        assert done.returncode == 0, done.stderr
        assert "NLL, nats" in done.stdout
        table = json.loads((tmp_path / name.replace(" ", "_") / "result.json").read_text())["evaluation"]["test"]
        found[name] = table["nll"]["value"]
        assert table["nll"]["n"] == 6
        assert table["nll"]["low"] < table["nll"]["value"] < table["nll"]["high"]
    assert found["scale 0"] == found["base"] != found["proxy"]
    done = command(
        "evaluate", str(base), f"model.steer.value={other}", "evaluate.decode=beam", *small, f"run.root={tmp_path}"
    )
    assert done.returncode == 2
    assert "evaluate.decode=beam" in done.stderr and "Traceback" not in done.stderr
    result, _ = train(
        tmp_path, "+algo=best_of_n", "data=rnnlg", "data.limit=4", "reward=bleu", f"model.path={base}", f"model.steer.value={other}",
        "algo.n=2", "algo.max_new_tokens=6", "run.wandb=disabled",
    )  # fmt: skip
    assert result["status"] == "finished"

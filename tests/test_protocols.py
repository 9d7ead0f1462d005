"""Answers by protocol, on a model whose dialogues are known by heart; stops and beginnings of decoding."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from critical import FIRST, PROMPTS, REFINED, SCORES, ask, critical_policy

from alignkit.config import Evaluate
from alignkit.critique import FEEDBACK, IMPROVED, answer, written
from alignkit.decode import Decode
from alignkit.errors import UserError
from alignkit.policy import Policy
from alignkit.protocols import answers, criticised, own_scores

LONG = 60  # tokens: more than any of the dialogues has


def settings(protocol: str, **more: Any) -> Evaluate:
    return Evaluate(protocol=protocol, max_new_tokens=more.pop("max_new_tokens", LONG), **more)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dialogue(first: str, refined: str) -> str:
    """What the model has learned to write, from its first answer on."""
    return written(first, f"w{SCORES[first]}.", f"s{SCORES[first]}.", SCORES[first], refined)


def count(text: str, end: bool = True) -> int:
    """Tokens of a text, its end-of-sequence token counted or not."""
    return len(critical_policy().encode_responses([text])[0]) - (not end)


# ---- first, refine, rerank -----------------------------------------------------------------------------------------


def test_first_is_what_comes_before_the_marker_and_the_tokens_end_with_it() -> None:
    found = answers(critical_policy(), ask(), settings("first"), generator())
    assert found.texts == FIRST and found.first is None
    assert found.measured == {"tokens": [count(f"{y}\n\n{FEEDBACK}", end=False) for y in FIRST]}


def test_refine_is_what_comes_after_the_critique_and_all_tokens_are_counted() -> None:
    found = answers(critical_policy(), ask(), settings("refine"), generator())
    assert found.texts == REFINED and found.first == FIRST
    whole = [count(dialogue(y, r)) for y, r in zip(FIRST, REFINED, strict=True)]
    assert found.measured == {"parse_failed": [0.0] * 4, "tokens": whole}


def test_a_further_round_criticises_the_refinement_and_costs_its_critique() -> None:
    """What was refined is refined to itself here; the tokens that are given are not counted, those written are."""
    found = answers(critical_policy(), ask(), settings("refine", rounds=2), generator())
    assert found.texts == REFINED and found.first == FIRST
    for y, r, tokens in zip(FIRST, REFINED, found.measured["tokens"], strict=True):
        given = f"{r}\n\n{FEEDBACK}\n"
        assert tokens == count(dialogue(y, r)) + count(dialogue(r, r)) - count(given, end=False)


def test_rerank_takes_the_sample_that_the_model_itself_scores_best() -> None:
    """It answers either way: 1 2 3 has 10 and 3 1 2 has 2, but the last prompt's refinement has less than its first answer."""
    found = answers(critical_policy(), ask(), settings("rerank", samples=16), generator())
    assert found.texts == ["1 2 3", "7 8 9", "4 5 6", "1 0 2"]
    assert found.first is None


def test_rerank_goes_by_the_order_of_samples_among_equals_and_counts_all_that_was_written() -> None:
    policy, rows, n = critical_policy(), ask(), 6
    found = answers(policy, rows, settings("rerank", samples=n), generator(3))
    how = Decode(max_new_tokens=LONG, stop=policy.tokens_of(FEEDBACK))
    batch = policy.generate(rows, n, how, temperature=torch.ones(4), generator=generator(3))
    for i, row in enumerate(rows):
        texts = [answer(text) for text in batch.responses[i * n : (i + 1) * n]]
        scores = [own_scores(policy, [row], [text], LONG).item() for text in texts]
        known = [0.0 if s != s else s for s in scores]
        assert found.texts[i] == texts[known.index(max(known))]
        assert found.measured["parse_failed"][i] == pytest.approx(sum(s != s for s in scores) / n)
    clean = [f"{y}\n\n{FEEDBACK}" for y in SCORES]
    known_ones = [all(text in clean for text in batch.responses[i * n : (i + 1) * n]) for i in range(4)]
    assert any(known_ones), "a row whose samples are all known, or the tokens cannot be told by hand"
    for i in (i for i, fine in enumerate(known_ones) if fine):
        wanted = 0
        for text in batch.responses[i * n : (i + 1) * n]:
            y = text.split("\n")[0]
            said = (
                f"Weaknesses: w{SCORES[y]}.\nSuggestions: s{SCORES[y]}.\nOverall Score: [[{SCORES[y]}]]\n\n{IMPROVED}"
            )
            wanted += count(f"{y}\n\n{FEEDBACK}", end=False)
            wanted += count(f"{y}\n\n{FEEDBACK}\n{said}", end=False) - count(f"{y}\n\n{FEEDBACK}\n", end=False)
        assert found.measured["tokens"][i] == wanted


def test_a_model_that_never_writes_the_marker_is_taken_at_its_word(build_policy: Any, rows: Any) -> None:
    """Test 7 of the card: its answer is returned, and counts as a critique that cannot be read."""
    tiny_causal, data = build_policy("causal", max_position_embeddings=256), rows(4)
    plain = tiny_causal.generate(data, 1, Decode(max_new_tokens=12, greedy=True)).responses
    assert not any("###" in text for text in plain) and all(plain)
    found = answers(tiny_causal, data, settings("refine", max_new_tokens=12, rounds=2), generator())
    assert found.texts == found.first == plain and found.measured["parse_failed"] == [1.0] * 4
    assert answers(tiny_causal, data, settings("first", max_new_tokens=12), generator()).texts == plain
    ranked = answers(tiny_causal, data, settings("rerank", max_new_tokens=12, samples=3), generator())
    assert ranked.measured["parse_failed"] == [1.0] * 4  # no score: the earliest


@pytest.mark.parametrize("words", ["feedback", "score", "heading"])
def test_a_text_that_the_limit_cuts_off_before_its_refinement_returns_the_first_answer(words: str) -> None:
    y, r = FIRST[0], REFINED[0]
    whole = dialogue(y, r)
    end = {"feedback": FEEDBACK, "score": "[[2]]", "heading": IMPROVED}[words]
    limit = count(whole[: whole.index(end) + len(end)], end=False)
    found = answers(critical_policy(), ask(1), settings("refine", max_new_tokens=limit), generator())
    assert found.texts == found.first == [y]
    assert found.measured == {"parse_failed": [1.0], "tokens": [float(limit)]}


def test_a_first_answer_that_the_limit_cuts_off_is_a_piece_of_it() -> None:
    for protocol in ("first", "refine"):
        found = answers(critical_policy(), ask(1), settings(protocol, max_new_tokens=1), generator())
        assert found.texts == ["3"] and found.measured["tokens"] == [1.0]


def test_answers_do_not_depend_on_what_else_is_asked() -> None:
    together = answers(critical_policy(), ask(), settings("refine"), generator())
    for i, row in enumerate(ask()):
        alone = answers(critical_policy(), [row], settings("refine"), generator())
        assert (alone.texts[0], alone.measured["tokens"][0]) == (together.texts[i], together.measured["tokens"][i])


# ---- own scores ----------------------------------------------------------------------------------------------------


def test_judge_accuracy() -> None:
    """E4 of the card, chosen [10, 9, 5, 10], rejected [2, 6, 7, 10]: 2 of 4 are right, a tie is wrong, ties are a quarter."""
    rows = [ask()[i] for i in (0, 1, 3, 2)]
    chosen = own_scores(critical_policy(), rows, ["1 2 3", "7 8 9", "0 1 2", "4 5 6"], LONG)
    rejected = own_scores(critical_policy(), rows, ["3 1 2", "7 9 8", "1 0 2", "4 5 6"], LONG)
    assert chosen.tolist() == [10, 9, 5, 10] and rejected.tolist() == [2, 6, 7, 10]
    assert (chosen > rejected).float().mean() == 0.5 and (chosen == rejected).float().mean() == 0.25


def test_a_response_without_a_score_is_not_a_number(tiny_causal: Policy, rows: Any) -> None:
    assert own_scores(tiny_causal, rows(2), ["a", "b"], 8).isnan().all()


def test_a_given_response_is_criticised_in_a_fresh_context() -> None:
    """The score of the refinement is that of a first answer of the same text: 5 for the wrong one, not the draft's 7."""
    said = criticised(critical_policy(), [ask()[3]] * 2, ["0 1 2", "1 0 2"], LONG)
    assert [(one.score, one.weaknesses, one.refinement) for one in said] == [(5, "w5.", "0 1 2"), (7, "w7.", "0 1 2")]


def test_equal_responses_are_decoded_once_and_unequal_prompts_are_not_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, asked = critical_policy(), []
    generate = policy.generate

    def counted(rows: list, *rest: Any, **more: Any) -> Any:
        asked.append(list(zip([row["prompt"] for row in rows], more["begun"], strict=True)))
        return generate(rows, *rest, **more)

    monkeypatch.setattr(policy, "generate", counted)
    rows = [ask()[i] for i in (1, 0, 1, 0)]
    scores = own_scores(policy, rows, ["7 9 8", "1 2 3", "7 9 8", "3 1 2"], LONG)
    assert scores.tolist() == [6, 10, 6, 2]
    begun = [(PROMPTS[i], f"{y}\n\n{FEEDBACK}\n") for i, y in ((0, "1 2 3"), (1, "7 9 8"), (0, "3 1 2"))]
    assert len(asked) == 1 and sorted(asked[0]) == sorted(begun)
    own_scores(policy, [ask()[0], ask()[1]], ["1 2 3", "1 2 3"], LONG)
    assert len(asked[1]) == 2


# ---- the tokens of a marker ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("marker", [FEEDBACK, IMPROVED])
def test_tokens_of_a_marker_are_those_of_the_written_sequence(marker: str) -> None:
    """Each stands once in every dialogue, and without the line ends, which a response may end with."""
    policy = critical_policy()
    stop = list(policy.tokens_of(marker))
    assert policy.tokenizer.decode(stop).strip() == marker
    for y, r in zip(FIRST, REFINED, strict=True):
        ids = policy.encode_responses([dialogue(y, r)])[0]
        where = [i for i in range(len(ids)) if ids[i : i + len(stop)] == stop]
        assert len(where) == 1
        assert policy.tokenizer.decode(ids[: where[0]]).strip() == dialogue(y, r).split(marker)[0].strip()


def test_the_tokens_of_a_marker_that_the_tokenizer_has_never_seen(policy: Policy) -> None:
    """Trained on other texts it spells the marker out; it is found within a text all the same."""
    stop = list(policy.tokens_of(FEEDBACK))
    ids = policy.encode_responses([f"one\n\n{FEEDBACK}\ntwo"])[0]
    assert len(stop) > 3 and policy.tokenizer.decode(stop).strip() == FEEDBACK
    assert any(ids[i : i + len(stop)] == stop for i in range(len(ids)))


# ---- Decode.stop ---------------------------------------------------------------------------------------------------


def sampled(policy: Policy, rows: list, stop: tuple[int, ...], n: int = 6) -> Any:
    tau = torch.full((len(rows),), 0.7)
    return policy.generate(rows, n, Decode(max_new_tokens=20, stop=stop), temperature=tau, generator=generator(1))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_row_ends_with_the_stop_tokens_and_the_others_are_as_without(
    ragged_policy: Policy, rows: Any, length: int
) -> None:
    """More rows than leave the batch at a time; the stop tokens are chosen from the middle of a row."""
    data = rows(6)
    free = sampled(ragged_policy, data, ())
    longest = int(free.lengths.argmax())
    begin = int(free.lengths[longest]) // 2
    stop = tuple(free.response_ids[longest, begin : begin + length].tolist())
    found = sampled(ragged_policy, data, stop)
    ended = 0
    for i in range(len(free)):
        ids = free.response_ids[i, : int(free.lengths[i])].tolist()
        ends = [t + length for t in range(len(ids) - length + 1) if tuple(ids[t : t + length]) == stop]
        wanted = ids[: ends[0]] if ends else ids
        ended += len(wanted) < len(ids)
        assert found.response_ids[i, : int(found.lengths[i])].tolist() == wanted
        assert found.mask[i].sum() == found.mask[i, : len(wanted)].sum() == len(wanted)
        torch.testing.assert_close(
            found.logprobs[i, : len(wanted)], free.logprobs[i, : len(wanted)], atol=1e-5, rtol=1e-4
        )
    assert 1 <= ended < len(free)


def test_stop_tokens_that_come_apart_or_in_the_prompt_do_not_end_a_row(ragged_policy: Policy, rows: Any) -> None:
    data = rows(4)
    free = sampled(ragged_policy, data, ())
    i = int(free.lengths.argmax())
    ids = free.response_ids[i, : int(free.lengths[i])].tolist()
    pair = next(
        (a, c)
        for a, c in zip(ids, ids[2:], strict=False)
        if not any((x, y) == (a, c) for x, y in itertools.pairwise(ids))
    )
    found = sampled(ragged_policy, data, pair)
    assert found.response_ids[i, : int(found.lengths[i])].tolist() == ids
    if not ragged_policy.is_encoder_decoder:  # the last token of the prompt and the first of the response
        across = (int(free.prompt_ids[i, -1]), ids[0])
        found = sampled(ragged_policy, data, across)
        assert found.response_ids[i, : int(found.lengths[i])].tolist()[:2] == ids[:2]


# ---- what a response begins with -----------------------------------------------------------------------------------


def test_what_is_begun_is_gone_on_from_as_if_the_model_had_written_it(tiny_causal: Policy, rows: Any) -> None:
    """Greedy continuations and their log-probabilities against an unpadded pass over prompt, beginning and response."""
    data, begun = rows(4), ["a", "ein Hund frass Brot", "", f"Lieder\n\n{FEEDBACK}\n"]
    batch = tiny_causal.generate(data, 1, Decode(max_new_tokens=10, greedy=True), begun=begun)
    for i, (row, start) in enumerate(zip(data, begun, strict=True)):
        given = tiny_causal.tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        given += tiny_causal.tokenizer(start, add_special_tokens=False)["input_ids"]
        ids = batch.response_ids[i, : int(batch.lengths[i])].tolist()
        with torch.no_grad():
            logits = tiny_causal.model(torch.tensor([given + ids])).logits[0, len(given) - 1 : -1]
        assert logits.argmax(-1).tolist() == ids
        wanted = logits.log_softmax(-1)[range(len(ids)), ids]
        torch.testing.assert_close(batch.logprobs[i, : len(ids)], wanted, atol=1e-4, rtol=1e-4)
        assert batch.prompt_ids[i][batch.prompt_mask[i]].tolist() == given
    assert len(set(map(tuple, batch.response_ids.tolist()))) == 4


def test_an_answer_given_leads_to_what_the_model_writes_after_its_own() -> None:
    """What is forced is spelled in the tokens that training used, or the model would not recognise it."""
    policy, rows = critical_policy(), ask()
    free = policy.generate(rows, 1, Decode(max_new_tokens=LONG, greedy=True)).responses
    begun = [f"{y}\n\n{FEEDBACK}\n" for y in FIRST]
    rest = policy.generate(rows, 1, Decode(max_new_tokens=LONG, greedy=True), begun=begun).responses
    assert [b + r for b, r in zip(begun, rest, strict=True)] == free


def test_an_encoder_decoder_does_not_go_on_from_a_text(tiny_seq2seq: Policy, rows: Any) -> None:
    with pytest.raises(UserError, match=r"encoder–decoder model cannot go on .* take a causal model"):
        tiny_seq2seq.generate(rows(1), 1, Decode(max_new_tokens=4), begun=["a"])


def test_a_beginning_leaves_less_room(tiny_causal: Policy, rows: Any) -> None:
    with pytest.raises(UserError, match="more than the model's 64 positions allow"):
        tiny_causal.generate(rows(1), 1, Decode(max_new_tokens=40, greedy=True), begun=["old door " * 20])

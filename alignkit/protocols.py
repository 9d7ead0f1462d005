"""How a model that criticises itself is asked for an answer: its first one, the refined one, or the best of several."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.config import Evaluate
from alignkit.critique import FEEDBACK, IMPROVED, Critique, answer, parse
from alignkit.data import Row
from alignkit.decode import Decode
from alignkit.policy import Policy

AT_ONCE = 256  # texts that are gone on from together


@dataclass
class Answers:
    """The answers to N rows, and what they took."""

    texts: list[str]
    first: list[str] | None  # under refine: the answers before any critique
    measured: dict[str, list[float]]  # a number a row, by name


def answers(policy: Policy, rows: list[Row], cfg: Evaluate, generator: torch.Generator) -> Answers:
    """Answer each row by ``cfg.protocol``: ``first``, ``refine`` (``cfg.rounds`` times) or ``rerank`` (``cfg.samples``)."""
    if cfg.protocol == "rerank":
        return _reranked(policy, rows, cfg, generator)
    stop = policy.tokens_of(FEEDBACK) if cfg.protocol == "first" else ()
    how = Decode(max_new_tokens=cfg.max_new_tokens, greedy=cfg.decode == "greedy", stop=stop)
    tau = torch.full((len(rows),), cfg.temperature)
    batch = policy.generate(rows, 1, how, temperature=tau, generator=generator)
    first, tokens = [answer(text) for text in batch.responses], batch.lengths.tolist()
    if cfg.protocol == "first":
        return Answers(first, None, {"tokens": [float(n) for n in tokens]})
    ended = batch.extra["ended"].tolist()
    said = [parse(text[len(y) :], not end) for text, y, end in zip(batch.responses, first, ended, strict=True)]
    # a model that was taught to go on after an answer may do so after its second one
    texts = [answer(c.refinement) or y for c, y in zip(said, first, strict=True)]
    failed = [not c.refinement for c in said]
    for _ in range(1, cfg.rounds):
        again, more = _criticised(policy, rows, texts, cfg.max_new_tokens)
        texts = [answer(c.refinement) or y for c, y in zip(again, texts, strict=True)]
        failed = [f or not c.refinement for f, c in zip(failed, again, strict=True)]
        tokens = [a + b for a, b in zip(tokens, more, strict=True)]
    measured = {"parse_failed": [float(f) for f in failed], "tokens": [float(n) for n in tokens]}
    return Answers(texts, first, measured)


def criticised(policy: Policy, rows: list[Row], responses: list[str], max_new_tokens: int) -> list[Critique]:
    """What the policy says of each response when it is given as its own answer; greedy, in a fresh context."""
    return _criticised(policy, rows, responses, max_new_tokens)[0]


def own_scores(policy: Policy, rows: list[Row], responses: list[str], max_new_tokens: int) -> Tensor:
    """(N,) the score that the policy gives each response; not a number where it gives none."""
    return _own_scores(policy, rows, responses, max_new_tokens)[0]


def _reranked(policy: Policy, rows: list[Row], cfg: Evaluate, generator: torch.Generator) -> Answers:
    """Of ``cfg.samples`` answers the one that the policy itself scores best, the earliest of equals."""
    how = Decode(max_new_tokens=cfg.max_new_tokens, stop=policy.tokens_of(FEEDBACK))
    tau = torch.full((len(rows),), cfg.temperature)
    batch = policy.generate(rows, cfg.samples, how, temperature=tau, generator=generator)
    texts = [answer(text) for text in batch.responses]
    scores, spent = _own_scores(policy, batch.rows, texts, cfg.max_new_tokens)
    tokens = (batch.lengths.cpu() + torch.tensor(spent)).view(len(rows), -1).sum(1).tolist()
    table = scores.view(len(rows), -1)
    best = table.nan_to_num(0.0).argmax(1).tolist()  # of equals the first; scores begin at 1
    failed = table.isnan().float().mean(1).tolist()
    return Answers(
        [texts[i * cfg.samples + j] for i, j in enumerate(best)],
        None,
        {"parse_failed": failed, "tokens": [float(n) for n in tokens]},
    )


def _criticised(
    policy: Policy, rows: list[Row], responses: list[str], max_new_tokens: int
) -> tuple[list[Critique], list[int]]:
    texts, cuts, tokens = _gone_on(policy, rows, responses, Decode(max_new_tokens=max_new_tokens, greedy=True))
    return [parse(text, cut) for text, cut in zip(texts, cuts, strict=True)], tokens


def _own_scores(policy: Policy, rows: list[Row], responses: list[str], max_new_tokens: int) -> tuple[Tensor, list[int]]:
    how = Decode(max_new_tokens=max_new_tokens, greedy=True, stop=policy.tokens_of(IMPROVED))
    texts, _, tokens = _gone_on(policy, rows, responses, how)
    found = [parse(text).score for text in texts]
    return torch.tensor([float("nan") if score is None else float(score) for score in found]), tokens


def _gone_on(
    policy: Policy, rows: list[Row], responses: list[str], how: Decode
) -> tuple[list[str], list[bool], list[int]]:
    """(what the policy writes behind each response and the feedback marker, whether it was cut, its tokens); equal ones are
    decoded once. Where the model's positions have no room, nothing is written."""
    keys = [(str(row["prompt"]), response) for row, response in zip(rows, responses, strict=True)]
    unique = {key: i for i, key in reversed(list(enumerate(keys)))}
    found: dict[tuple[str, str], tuple[str, bool, int]] = {}
    order = sorted(unique.values(), key=lambda i: (len(keys[i][0]) + len(keys[i][1]), i))
    begun = {i: f"{responses[i]}\n\n{FEEDBACK}\n" for i in order}
    fits = policy.room([rows[i] for i in order], [begun[i] for i in order], how.max_new_tokens)
    for i, fit in zip(order, fits, strict=True):
        if not fit:
            found[keys[i]] = ("", True, 0)
    order = [i for i, fit in zip(order, fits, strict=True) if fit]
    for start in range(0, len(order), AT_ONCE):
        part = order[start : start + AT_ONCE]
        batch = policy.generate([rows[i] for i in part], 1, how, begun=[begun[i] for i in part])
        ended, lengths = batch.extra["ended"].tolist(), batch.lengths.tolist()
        for i, text, end, n in zip(part, batch.responses, ended, lengths, strict=True):
            found[keys[i]] = (text, not end, n)
    texts, cuts, tokens = zip(*(found[key] for key in keys), strict=True) if keys else ((), (), ())
    return list(texts), list(cuts), list(tokens)

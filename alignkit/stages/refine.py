"""Stage ``refine``: make a data set of a model's own answers: sample, judge, criticise, rewrite, select."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from typing import Any

from omegaconf import DictConfig, OmegaConf

from alignkit import feedback, preflight
from alignkit.algos._refine import Refine
from alignkit.config import signature
from alignkit.data import Data, Row
from alignkit.errors import Stopped, UserError
from alignkit.files import as_lines, write_atomically
from alignkit.policy import load
from alignkit.run import Run


def run(cfg: DictConfig, run: Run, data: Data, algo: Refine, reward: Any) -> dict[str, Any]:
    """Refine the training rows part by part, each saved when it is whole; then write ``data.jsonl`` and its card.

    What a part holds depends on its rows and the seed, not on when it was made, nor on how many requests run at once.
    """
    if algo.needs_reward and reward is None:
        raise UserError(f"{cfg.name} goes by a reward: choose one with reward=NAME (see `alignkit list`).")
    rows = algo.prepare(data.rows("train"))
    policy: Any = None
    if algo.needs_policy:
        policy = load(OmegaConf.to_object(cfg.model), cfg.seed, data.texts())  # type: ignore[arg-type]
        algo.check(policy)
    preflight.refine(run, policy, algo, rows, reward)
    size = algo.rows_per_part
    count = math.ceil(len(rows) / size)
    with feedback.account(run) as account:
        with run.training(count):
            for step in range(run.first_step, count):
                part = rows[step * size : (step + 1) * size]
                with run.phase("refine", f"{len(part)} rows"):
                    found = algo.refine(policy, reward, part, account, run.generator(step, "refine"))
                run.count("rows/read", len(part))
                run.count("rows/dropped", sum("dropped" in row for row in found))
                kept = 1 - run.ledger["rows/dropped"] / run.ledger["rows/read"]
                run.log(step + 1, {"kept": kept, **account.totals()})
                run.save_part(step + 1, found)
                if run.stop_asked and step + 1 < count:
                    raise Stopped(f"stopped after part {step + 1} of {count}, saved in {run.dir}/parts.")
        spent = account.totals()
    return _finish(cfg, run, run.parts(count), len(rows), spent)


def _finish(cfg: DictConfig, run: Run, found: list[Row], read: int, spent: dict[str, float]) -> dict[str, Any]:
    kept = [row for row in found if "dropped" not in row]
    if not kept:
        why = ", ".join(f"{n} {reason}" for reason, n in Counter(row["dropped"] for row in found).most_common())
        said = next((row["feedback"]["raw"] for row in found if row.get("feedback")), "")
        raise UserError(
            f"no row is left: {why}. {f'The first critique: {said[:200]!r}. ' if said else ''}What there was lies in {run.dir}/parts. Change what keeps the rows out; a critic that gave no "
            f"answer is asked again with run.overwrite=true."
        )
    text = as_lines(kept)
    write_atomically(run.dir / "data.jsonl", text)
    result = {
        "status": "finished", "stage": "refine", "name": cfg.name, "seed": cfg.seed, "signature": signature(cfg),
        "rows": {
            "read": read, "kept": len(kept), "dropped": dict(Counter(row["dropped"] for row in found if "dropped" in row)),
        },
        "scores": _scores(found), "spent": spent, "data_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "seconds": {"refine": run.ledger["seconds/refine"]}, "directory": str(run.dir),
    }  # fmt: skip
    write_atomically(run.dir / "README.md", _card(cfg, result, found))
    run.write_json("result.json", result)
    run.tracker.finish(result)
    return result


def _scores(found: list[Row]) -> dict[str, Any]:
    """Of every score that rows have: how many, the mean, and of scores from 1 to 10 how many of each; by round, where there
    are several."""
    scores: dict[str, Any] = {}
    for name in ("score_response", "score_refinement", "score"):
        values = [row[name] for row in found if row.get(name) is not None]
        if values:
            counts = {k: values.count(k) for k in range(1, 11)} if name != "score" else {}
            scores[name] = {"n": len(values), "mean": sum(values) / len(values), **({"of": counts} if counts else {})}
    chains = [row["scores"] for row in found if "score_refinement" in row and None not in row["scores"]]
    longest = max(map(len, chains), default=0)
    if longest > 2:  # the means by round are of the same rows
        whole = [chain for chain in chains if len(chain) == longest]
        scores["by_round"] = [sum(column) / len(whole) for column in zip(*whole, strict=True)]
    return scores


def report(result: dict[str, Any]) -> str:
    """What a finished run prints."""
    return f"\n{summary(result)}\nfiles: {result['directory']} (data.jsonl, README.md)"


def summary(result: dict[str, Any]) -> str:
    """How many rows came through each filter, the scores, what it cost."""
    rows = result["rows"]
    lines = ["| rows | |", "|---|---|", f"| read | {rows['read']:,} |"]
    lines += [f"| dropped: {reason} | {n:,} |" for reason, n in sorted(rows["dropped"].items(), key=lambda x: -x[1])]
    lines += [f"| kept | {rows['kept']:,} |", ""]
    names = {"score_response": "draft", "score_refinement": "refinement", "score": "best"}
    if result["scores"]:
        wide = any("of" in found for name, found in result["scores"].items() if name in names)
        lines += ["| " + " | ".join(["score", "mean", "n", *(map(str, range(1, 11)) if wide else ())]) + " |"]
        lines += ["|---" * (13 if wide else 3) + "|"]
        for name, found in result["scores"].items():
            if name in names:
                cells = [str(n) for n in found.get("of", {}).values()]
                lines.append("| " + " | ".join([names[name], f"{found['mean']:.2f}", f"{found['n']:,}", *cells]) + " |")
        if "by_round" in result["scores"]:
            means = [f"{mean:.2f}" for mean in result["scores"]["by_round"]]
            lines += ["", "mean score by round, drafts first: " + ", ".join(means)]
        lines.append("")
    spent = result["spent"]
    if spent.get("calls") or spent.get("cached"):
        lines.append(
            f"{spent['calls']:.0f} calls, {spent['cached']:.0f} answers from the cache, {spent['failed']:.0f} failed, "
            f"{spent['prompt_tokens']:,.0f} tokens read, {spent['tokens']:,.0f} written, cost {spent['cost']:.4g}."
        )
    return "\n".join(lines)


def _card(cfg: DictConfig, result: dict[str, Any], found: list[Row]) -> str:
    """README.md: where the rows come from, what the filters left out, examples of both."""
    kept = [row for row in found if "dropped" not in row]
    lines = [
        f"# Rows of {cfg.name}, seed {cfg.seed}", "",
        f"Made by alignkit, stage `refine`, from `{cfg.data.train}`. SHA-256 of data.jsonl: `{result['data_sha256']}`.",
        "", summary(result), "", "## Examples", "",
    ]  # fmt: skip
    lines += [_block(row) for row in kept[:3]]
    for reason in result["rows"]["dropped"]:
        lines += ["", f"## Dropped: {reason}", "", _block(next(row for row in found if row.get("dropped") == reason))]
    lines += ["", "## Settings", "", "```yaml", OmegaConf.to_yaml(cfg.algo, resolve=True), "```", ""]
    return "\n".join(lines)


def _block(row: Row) -> str:
    return "```json\n" + json.dumps(row, indent=2, ensure_ascii=False) + "\n```"

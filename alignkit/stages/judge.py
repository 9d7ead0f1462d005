"""Stage ``judge``: what several systems said to the same held-out rows, compared in pairs by judges."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from alignkit import data as sources
from alignkit import feedback
from alignkit.algos.judge import agreement
from alignkit.config import signature
from alignkit.data import Data, Row
from alignkit.errors import UserError
from alignkit.judges import ByReward, Verdicts
from alignkit.run import Run
from alignkit.stages.evaluate import cell

OUTPUTS = ("outputs-after.jsonl", "outputs-test.jsonl", "outputs-dev.jsonl")  # of a run, the first that is there


def run(cfg: DictConfig, run: Run, data: Data, algo: Any, reward: Any) -> dict[str, Any]:
    """Judge the test rows' outputs (dev's, where there is no test); write the table, every judgement and the result."""
    judges = ({"reward": ByReward(reward=reward)} if reward else {}) | (algo.judges or {})
    if not judges:
        raise UserError("judge: there is no judge. Choose reward=NAME, or give algo.judges.NAME.")
    split = "test" if data.test else "dev"
    held_out = data.rows(split)
    if not held_out:
        raise UserError("judge: the data have neither test nor dev rows. Set data.test.")
    columns = {name: where.rpartition("#")[2] if "#" in where else "response" for name, where in algo.outputs.items()}
    files = {name: _file(name, where.rpartition("#")[0] or where) for name, where in algo.outputs.items()}
    texts = {name: _texts(name, file, columns[name], held_out, split) for name, file in files.items()}
    rows = held_out[: _common(files, texts)][: cfg.evaluate.rows]
    texts = {name: found[: len(rows)] for name, found in texts.items()}

    mine = texts[algo.candidate]
    found: dict[tuple[str, str], Verdicts] = {}  # (opponent, judge)
    with run.phase("judge"), feedback.account(run) as account:
        for opponent in algo.opponents:
            for name, judge in judges.items():
                found[opponent, name] = judge.prefer(rows, mine, texts[opponent], account)
        cost = account.totals()
    comparisons: dict[str, dict[str, Any]] = {opponent: {} for opponent in algo.opponents}
    for (opponent, name), verdicts in found.items():
        gap = np.array([len(a) - len(b) for a, b in zip(mine, texts[opponent], strict=True)], dtype=float)
        try:
            comparisons[opponent][name] = algo.compared(verdicts.preference, gap) | verdicts.figures
        except ValueError as e:
            raise UserError(f"judge '{name}' on {algo.candidate} against {opponent}: {e}.") from None
    result = {
        "status": "finished", "stage": "judge", "name": cfg.name, "seed": cfg.seed, "signature": signature(cfg),
        "candidate": algo.candidate, "split": split, "rows": len(rows), "systems": _systems(algo, files, texts, found),
        "comparisons": comparisons, "agreement": _agreement(algo, list(judges), found), "cost": cost,
        "evaluation": {split: {
            f"{figure}/{opponent}/{name}": one[figure]
            for opponent, each in comparisons.items() for name, one in each.items() for figure in ("win_rate", "length_controlled") if figure in one
        }},
        "verdict": _sentence(algo.candidate, comparisons), "seconds": {"judge": run.ledger["seconds/judge"]},
        "directory": str(run.dir),
    }  # fmt: skip
    _record(run.dir / "judgements.jsonl", rows, algo, texts, found)
    (run.dir / "table.md").write_text(summary(result) + "\n", encoding="utf-8")
    run.write_json("result.json", result)
    return result


def _file(name: str, where: str) -> Path:
    """The outputs of a system: a file, or the one of a run that comes first in ``OUTPUTS``."""
    path = Path(where).expanduser()
    if path.is_dir():
        file = next((path / one for one in OUTPUTS if (path / one).exists()), None)
        if file is None:
            raise UserError(
                f"algo.outputs.{name}: {path} holds none of {', '.join(OUTPUTS)}. Name a run that has been evaluated, or a file."
            )
        return file
    try:
        return sources.locate(str(path))
    except UserError as e:
        raise UserError(f"algo.outputs.{name}: {e}") from None


def _texts(name: str, file: Path, column: str, rows: list[Row], split: str) -> list[str]:
    """What a system said to the first rows of the split: its ``response``, or another column.

    Raises:
        UserError: a line that answers another prompt, or nothing.
    """
    texts = []
    for i, (where, entry) in enumerate(sources.read(str(file))):
        if not isinstance(entry.get(column), str) or "prompt" not in entry:
            raise UserError(
                f"{where} (algo.outputs.{name}): has no prompt and {column}. It must be what a run wrote as outputs-*.jsonl."
            )
        if i == len(rows):
            raise UserError(
                f"{where} (algo.outputs.{name}): the {split} split has {len(rows)} rows only. Choose the data of that run."
            )
        if entry["prompt"] != rows[i]["prompt"]:
            raise UserError(
                f"{where} (algo.outputs.{name}): answers {_short(entry['prompt'])}, but row {rows[i]['id']} of the {split} split "
                f"asks {_short(rows[i]['prompt'])}. All systems must have answered the rows of these data, in their order."
            )
        texts.append(entry[column])
    if not texts:
        raise UserError(f"{file} (algo.outputs.{name}): is empty. Evaluate that system first.")
    return texts


def _short(prompt: Any) -> str:
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    return repr(text if len(text) <= 60 else text[:57] + "…")


def _common(files: dict[str, Path], texts: dict[str, list[str]]) -> int:
    """How many responses every system has.

    Raises:
        UserError: one has another number than the first.
    """
    (first, some), *others = texts.items()
    for name, more in others:
        if len(more) != len(some):
            raise UserError(
                f"{files[name]} (algo.outputs.{name}): has {len(more)} responses, but {files[first]} (algo.outputs.{first}) has "
                f"{len(some)}. Evaluate both with the same evaluate.rows."
            )
    return len(some)


def _systems(algo: Any, files: Any, texts: Any, found: dict[tuple[str, str], Verdicts]) -> dict[str, dict[str, Any]]:
    """System → its file, mean characters, and mean score by each judge that gives one."""
    systems: dict[str, dict[str, Any]] = {}
    for name, said in texts.items():
        file = files[name]
        systems[name] = {"outputs": str(file), "sha256": sources.hash_source(str(file))}
        systems[name]["characters"] = float(np.mean([len(text) for text in said]))
        for (opponent, judge), verdicts in found.items():
            if verdicts.scores is not None and name in (opponent, algo.candidate):
                scores = verdicts.scores[0 if name == algo.candidate else 1]
                systems[name].setdefault("scores", {})[judge] = float(scores.mean())
    return systems


def _agreement(algo: Any, judges: list[str], found: dict[tuple[str, str], Verdicts]) -> dict[str, dict[str, Any]]:
    """``A, B`` → how far these judges agree, over all opponents."""
    whole = {name: np.concatenate([found[o, name].preference for o in algo.opponents]) for name in judges}
    return {f"{a}, {b}": agreement(whole[a], whole[b]) for a, b in combinations(judges, 2)}


def _record(path: Path, rows: list[Row], algo: Any, texts: dict[str, list[str]], found: Any) -> None:
    """A line a row, opponent and judge; of both texts in this order: candidate, opponent."""
    with path.open("w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            for (opponent, judge), verdicts in found.items():
                p = float(verdicts.preference[i])
                entry = {
                    "row": row["id"], "prompt": row["prompt"], "candidate": algo.candidate, "opponent": opponent, "judge": judge,
                    "responses": [texts[algo.candidate][i], texts[opponent][i]], "preference": None if p != p else p,
                    "verdict": None if p != p else "win" if p > 0.5 else "loss" if p < 0.5 else "tie", **verdicts.details[i],
                }  # fmt: skip
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _sentence(candidate: str, comparisons: dict[str, dict[str, Any]]) -> str:
    """The win rates in a sentence."""
    parts = [
        f"{cell('win_rate', one['win_rate'])} % against {opponent} by {name}{_doubt(one)}"
        for opponent, each in comparisons.items()
        for name, one in each.items()
    ]
    return f"{candidate} wins {'; '.join(parts)}."


def _doubt(one: dict[str, Any]) -> str:
    """A remark on a judge that goes by the order in which it sees the texts, so that its ties say nothing."""
    consistency = one.get("consistency")
    return (
        ""
        if consistency is None or consistency >= 0.5
        else f" (which contradicts itself: consistency {consistency:.2f})"
    )


def report(result: dict[str, Any]) -> str:
    """The tables, in Markdown, and where the files are."""
    return f"\n{summary(result)}\nfiles: {result['directory']} (every judgement: judgements.jsonl)"


def summary(result: dict[str, Any]) -> str:
    """Markdown: the comparisons, the systems, and how far judges agree; 95 % intervals in brackets."""
    own = ("win_rate", "length_controlled", "wins", "ties", "losses")
    ones = [(opponent, name, one) for opponent, each in result["comparisons"].items() for name, one in each.items()]
    more = dict.fromkeys(key for *_, one in ones for key in one if key not in own)
    if not any(one["failed"] for *_, one in ones):
        more.pop("failed")
    head = [f"{result['candidate']} against ({result['rows']:,} {result['split']} rows)", "judge", "win rate %"]
    head += ["at equal length %", "wins / ties / losses", *(key.replace("_", " ") for key in more)]
    lines = [_row(head), "|---" * len(head) + "|"]
    for opponent, name, one in ones:
        counts = " / ".join(str(one[key]) for key in ("wins", "ties", "losses"))
        rates = [cell("win_rate", one[key]) if key in one else "–" for key in ("win_rate", "length_controlled")]
        lines.append(_row([opponent, name, *rates, counts, *(_number(one, key) for key in more)]))
    scores = dict.fromkeys(judge for system in result["systems"].values() for judge in system.get("scores", {}))
    lines += [
        "",
        _row(["system", "characters", *(f"mean score, {j}" for j in scores)]),
        "|---" * (len(scores) + 2) + "|",
    ]
    for name, system in result["systems"].items():
        cells = [name, f"{system['characters']:.1f}", *(_number(system.get("scores", {}), j) for j in scores)]
        lines.append(_row(cells))
    if result["agreement"]:
        lines += ["", _row(["judges", "same verdict", "kappa", "n"]), "|---" * 4 + "|"]
        lines += [
            _row([names, *(_number(one, k) for k in ("same", "kappa", "n"))])
            for names, one in result["agreement"].items()
        ]
    if any(result["cost"].values()):
        lines += ["", "cost: " + ", ".join(f"{_number(result['cost'], key)} {key}" for key in result["cost"]) + "."]
    return "\n".join([*lines, "", result["verdict"]])


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

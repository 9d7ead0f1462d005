"""What a paper claims, measured again: arms, seeds, an effect with its interval, a control that could refute it, a verdict."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shlex
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from alignkit import config
from alignkit.config import conf_dir
from alignkit.errors import Stopped, UserError, suggest
from alignkit.files import write_atomically
from alignkit.report.stats import t_quantile

VERDICTS = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 2}  # and what the command exits with
QUICK = " (quick: no verdict to quote)"
HEAD = ("claim", "measured, 95 % interval", "seeds", "needed", "the paper's", "verdict")


@dataclass(kw_only=True)
class Check:
    """One sentence of a paper, as a comparison of two arms in one number of ``result.json``."""

    says: str  # the claim in words
    metric: str  # dotted place in result.json, such as evaluation.after.test.bleu.value
    of: str  # arm, or arm/step of a pipeline
    direction: str  # higher | lower
    than: str | None = None  # what it is compared with; null: the number itself is the effect
    than_metric: str | None = None  # what is read of ``than``; null: metric too
    at: dict[str, float] | None = (
        None  # {kl: 4}: metric is a column of metrics.jsonl, read where this one first reaches the value
    )
    effect: str = "difference"  # difference (of − than) | ratio (of / than)
    least: float | None = None  # the effect must be beyond it; null: 0 of a difference, 1 of a ratio
    budget: str | None = None  # place in result.json that must be equal in both arms, within 5 %
    control: str | None = None  # an arm without the idea: where it has the effect too, the claim fails
    paper: str | None = None  # the paper's number and where it stands; null: there is none, or it was not read

    @property
    def bound(self) -> float:
        """What the effect must be beyond."""
        return self.least if self.least is not None else float(self.effect == "ratio")


@dataclass(kw_only=True)
class Claim:
    """A file of ``conf/claim``."""

    name: str
    paper: str
    scale: str  # what is small here
    arms: dict[str, list[str]]  # name → words of `alignkit train`
    checks: dict[str, Check]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    words: list[str] = field(default_factory=list)  # behind those of every arm
    quick: list[str] = field(default_factory=list)  # behind these, with --quick
    quick_seeds: list[int] = field(default_factory=lambda: [0, 1])
    not_reproduced: list[str] = field(default_factory=list)


@dataclass
class Found:
    """What was measured of a check."""

    verdict: str
    why: str
    effects: list[float]  # one a seed
    mean: float | None = None  # null: no interval
    low: float | None = None
    high: float | None = None


def load(name: str, extra: list[Path] = []) -> Claim:  # noqa: B006
    """The claim of this name, in the shipped ``conf`` or in a folder of ``--config-dir``.

    Raises:
        UserError: there is none, or its file is not as it must be; names the key.
    """
    files = {p.stem: p for root in (conf_dir(), *extra) for p in sorted((root / "claim").glob("*.yaml"))}
    if name not in files:
        raise UserError(f"claim {name}: there is no such claim.{suggest(name, files)} `alignkit list` shows all.")
    try:
        raw = yaml.safe_load(files[name].read_text(encoding="utf-8"))
    except yaml.YAMLError as e:
        raise UserError(f"{files[name]}: not valid YAML ({' '.join(str(e).split())}).") from None
    claim: Claim = _built(Claim, {**raw, "checks": {}}, files[name], "")
    claim.checks = {k: _built(Check, v, files[name], f"checks.{k}.") for k, v in (raw.get("checks") or {}).items()}
    _refuse(claim, files[name])
    return claim


def _built(cls: Any, raw: Any, file: Path, where: str) -> Any:
    if not isinstance(raw, dict):
        raise UserError(f"{file}: {where.rstrip('.') or 'the file'} must be keys and values.")
    known = {f.name for f in fields(cls)}
    for key in raw:
        if key not in known:
            raise UserError(f"{file}: {where}{key}: no such key.{suggest(key, known)}")
    try:
        return cls(**raw)
    except TypeError as e:
        raise UserError(f"{file}: {where}{str(e).partition('argument')[2].strip(': s')} must be given.") from None


def _refuse(claim: Claim, file: Path) -> None:
    for key, check in claim.checks.items():
        for end in ("of", "than", "control"):
            arm = getattr(check, end)
            if arm is not None and arm.partition("/")[0] not in claim.arms:
                raise UserError(f"{file}: checks.{key}.{end}: '{arm}' is no arm.{suggest(arm, claim.arms)}")
        for setting in ("budget", "than_metric"):
            if check.than is None and getattr(check, setting) is not None:
                raise UserError(
                    f"{file}: checks.{key}.{setting}: there is nothing to compare with (than is not given)."
                )
        if check.than is None and check.effect == "ratio":
            raise UserError(f"{file}: checks.{key}.effect: a ratio needs than, what to divide by.")
        if check.at is not None and len(check.at) != 1:
            raise UserError(f"{file}: checks.{key}.at: give one column and its value, as in {{kl: 4}}.")
        for setting, allowed in (("direction", ("higher", "lower")), ("effect", ("difference", "ratio"))):
            if getattr(check, setting) not in allowed:
                raise UserError(f"{file}: checks.{key}.{setting}: must be {' or '.join(allowed)}.")
    if not claim.checks:
        raise UserError(f"{file}: checks: there is nothing to measure.")


# ---- running --------------------------------------------------------------------------------------------------------


def runs(
    claim: Claim, seeds: list[int], root: str, words: list[str], extra: list[Path]
) -> dict[str, dict[int, dict[str, Any]]]:
    """Arm → seed → result, of runs that are finished before or now; one that fails is said and left out."""
    found: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in claim.arms}
    for seed in seeds:
        for arm, own in claim.arms.items():
            print(f"== {claim.name}: {arm}, seed {seed}", file=sys.stderr, flush=True)
            try:
                found[arm][seed] = _one([*own, *claim.words, *words, f"seed={seed}", f"run.root={root}"], extra)
            except UserError as e:
                print(f"error: {arm}, seed {seed}: {e}", file=sys.stderr, flush=True)
            except Stopped as e:
                raise Stopped(f"{e} Repeat the command: what is finished is not run again.") from None
            except Exception as e:  # a fault of ours, or of a reward, ends this run and not the hours before it
                traceback.print_exc()
                print(f"error: {arm}, seed {seed}: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
    return found


def refuse(claim: Claim, words: list[str], extra: list[Path]) -> None:
    """Compose every arm and compare it with what its classes accept, before the first is run.

    Raises:
        UserError: one that cannot be run; names the arm.
    """
    for arm, own in claim.arms.items():
        try:
            _composed([*own, *claim.words, *words], extra, config.check)
        except UserError as e:
            raise UserError(f"arms.{arm}: {e}") from None


def _one(words: list[str], extra: list[Path]) -> dict[str, Any]:
    from alignkit.launch import launch

    found: dict[str, Any] = _composed(words, extra, launch)
    return found


def _composed(words: list[str], extra: list[Path], then: Callable[[Any], Any]) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from alignkit.cli import hydra_words
    from alignkit.config import register

    register()
    places = [f"hydra.searchpath=[{','.join(f'file://{folder.resolve()}' for folder in extra)}]"]
    try:
        with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
            given = [word for folder in extra for word in ("--config-dir", str(folder))]
            words = [*hydra_words([*given, *words])[len(given) :], *(places if extra else [])]
            return then(compose("config", words))
    except (HydraException, OmegaConfBaseException) as e:
        raise UserError(str(e).splitlines()[0]) from None


# ---- measuring ------------------------------------------------------------------------------------------------------


def value(result: dict[str, Any], place: str, step: str = "", at: dict[str, float] | None = None) -> float | None:
    """The number at a dotted place of a result, of a pipeline's step where one is named; None where there is none.

    With ``at`` the place is a column of that run's ``metrics.jsonl``, read where another one first reaches a value.
    """
    if step:
        folder = result.get("steps_done", {}).get(step)
        if folder is None:
            return None
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    if at is not None:
        (column, level), *_ = at.items()
        return reached(trace(Path(result["directory"]), place, column), level)
    found: Any = result
    for part in place.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    number = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    return float(found) if number else None


def trace(run: Path, metric: str, column: str = "kl") -> list[tuple[float, float]]:
    """(column, metric) wherever a run has logged the metric, in order; where the column is not logged yet, at the start, it is 0."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.split("\n") if line]
    found = [(line.get(column, 0.0), line[metric]) for line in lines if metric in line]
    return [point for point in found if all(map(math.isfinite, point))]


def reached(points: list[tuple[float, float]], level: float) -> float | None:
    """The second number where the first one first reaches a level, by linear interpolation; None where it never does."""
    for (a, low), (b, high) in pairwise(points):
        if a <= level <= b:
            return low + (high - low) * (level - a) / max(b - a, 1e-12)
    return None


def measure(check: Check, results: dict[str, dict[int, dict[str, Any]]], seeds: int) -> Found:
    """The effect over so many seeds, paired, with a 95 % t interval, and the verdict on it: none where a seed is missing."""
    effects, missing = _effects(check, check.of, results)
    if len(effects) < 2:
        where = f" ({missing})" if missing else ""
        return Found("INCONCLUSIVE", f"{len(effects)} seed(s) with both arms, too few for an interval{where}", effects)
    mean, low, high = interval(effects, check.effect)
    found = Found("INCONCLUSIVE", "the interval holds what the effect must be beyond", effects, mean, low, high)
    if len(effects) < seeds:  # those that fail may be the ones that would have told otherwise
        found.why = f"{seeds - len(effects)} of {seeds} seeds have no effect: {missing or 'a run failed'}"
        return found
    if check.budget is not None and (apart := _budget(check, results)):
        found.why = apart
        return found
    sign = 1 if check.direction == "higher" else -1
    near, far = sorted((sign * low, sign * high))
    if near > sign * check.bound:
        found.verdict, found.why = "PASS", ""
    elif far < sign * check.bound:
        found.verdict, found.why = "FAIL", "the effect is not there"
    if found.verdict == "PASS" and check.control is not None:
        _refute(check, results, seeds, found, sign)
    if low == high:
        found.why = "; ".join(filter(None, [found.why, "the seeds do not differ, so the interval says nothing"]))
    return found


def _refute(check: Check, results: dict[str, dict[int, dict[str, Any]]], seeds: int, found: Found, sign: int) -> None:
    """A control that has the effect too says that the idea is not what does it; so does one that may be as good as the idea."""
    control, _ = _effects(check, str(check.control), results)
    if len(control) < seeds:
        found.verdict, found.why = "INCONCLUSIVE", f"the control {check.control} was not measured"
        return
    if check.budget is not None and (apart := _budget(check, results, str(check.control))):
        found.verdict, found.why = "INCONCLUSIVE", f"the control: {apart}"
        return
    mean, low, high = interval(control, check.effect)
    near = min(sign * low, sign * high)
    shown = f"{mean:.3g} [{low:.3g}, {high:.3g}]"
    if near > sign * check.bound:
        found.verdict, found.why = "FAIL", f"the control {check.control}, without the idea, has the effect too: {shown}"
        return
    more = [a / b if check.effect == "ratio" else a - b for a, b in zip(found.effects, control, strict=True)]
    _, low, high = interval(more, check.effect)
    if min(sign * low, sign * high) <= sign * float(check.effect == "ratio"):
        found.verdict = "INCONCLUSIVE"
        found.why = f"the control {check.control} may have as much of it: {shown}"
    else:
        found.why = f"the control {check.control} has less of it: {shown}"


def _effects(check: Check, arm: str, results: dict[str, dict[int, dict[str, Any]]]) -> tuple[list[float], str]:
    """(an effect for each seed that both arms have, what is missing)."""
    effects, missing = [], ""
    than, than_metric = check.than or arm, check.than_metric or check.metric
    own, other = (results[a.partition("/")[0]] for a in (arm, than))
    for seed in sorted(set(own) & set(other)):
        ends = ((own, arm, check.metric), (other, than, than_metric))
        pair = [value(r[seed], place, a.partition("/")[2], check.at) for r, a, place in ends]
        if pair[0] is None or pair[1] is None:
            place, where = (check.metric, arm) if pair[0] is None else (than_metric, than)
            missing = f"no {place}{_where(check)} in {where}"
            continue
        if check.than is None:
            effects.append(pair[0])
            continue
        if check.effect == "ratio" and (pair[0] <= 0 or pair[1] <= 0):
            missing = f"{check.metric} is not above 0, so there is no ratio"
            continue
        effects.append(pair[0] / pair[1] if check.effect == "ratio" else pair[0] - pair[1])
    return effects, missing


def _where(check: Check) -> str:
    return "".join(f" at {column} {level:g}" for column, level in (check.at or {}).items())


def _budget(check: Check, results: dict[str, dict[int, dict[str, Any]]], of: str = "") -> str:
    """What is unequal between the arms though it must be equal; empty where nothing is."""
    of, than = of or check.of, str(check.than)
    own, other = (results[a.partition("/")[0]] for a in (of, than))
    for seed in sorted(set(own) & set(other)):
        ends = ((own, of), (other, than))
        a, b = (value(r[seed], str(check.budget), arm.partition("/")[2]) for r, arm in ends)
        if a is None or b is None:
            return f"the budget {check.budget} was not recorded"
        if abs(a - b) > 0.05 * max(a, b):
            return f"unequal budgets, seed {seed}: {check.budget} is {a:,.0f} of {of}, {b:,.0f} of {than}"
    return ""


def interval(effects: list[float], kind: str) -> tuple[float, float, float]:
    """Mean and 95 % t interval; of ratios the geometric mean and the interval of the logarithms, taken back."""
    x = [math.log(e) for e in effects] if kind == "ratio" else effects
    mean = statistics.mean(x)
    half = t_quantile(len(x) - 1) * statistics.stdev(x) / math.sqrt(len(x))
    ends = (mean, mean - half, mean + half)
    return tuple(math.exp(e) for e in ends) if kind == "ratio" else ends  # type: ignore[return-value]


# ---- telling --------------------------------------------------------------------------------------------------------


def overall(found: dict[str, Found]) -> str:
    """FAIL where one fails, else INCONCLUSIVE where one is, else PASS."""
    verdicts = {one.verdict for one in found.values()}
    return next(v for v in ("FAIL", "INCONCLUSIVE", "PASS") if v in verdicts)


def text(claim: Claim, found: dict[str, Found], quick: bool) -> str:
    """Markdown: a line a check, what the scale is and what was not reproduced."""
    lines = [f"# {claim.name}: {overall(found)}{QUICK if quick else ''}", "", claim.paper, ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows(claim, found)]
    return "\n".join([*lines, "", *notes(claim, quick)]) + "\n"


def rows(claim: Claim, found: dict[str, Found]) -> list[list[str]]:
    """A line a check, as texts under ``HEAD``."""
    lines = []
    for key, one in found.items():
        check = claim.checks[key]
        ends = (
            (check.of, check.than) if check.than_metric is None else (_short(check.metric), _short(check.than_metric))
        )
        what = f"{ends[0]} {'/' if check.effect == 'ratio' else '−'} {ends[1]}" if check.than else check.of
        measured = "" if one.mean is None else f"{one.mean:.3g} [{one.low:.3g}, {one.high:.3g}] ({what})"
        needed = f"{'above' if check.direction == 'higher' else 'below'} {check.bound:g}"
        verdict = one.verdict + (f": {one.why}" if one.why else "")
        lines.append([check.says, measured, str(len(one.effects)), needed, check.paper or "–", verdict])
    return lines


def commits(results: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """The commits of alignkit that the runs behind a claim were made with."""
    folders = [
        Path(folder)
        for each in results.values()
        for result in each.values()
        for folder in result.get("steps_done", {"": result["directory"]}).values()
    ]
    files = [folder / "environment.json" for folder in folders if (folder / "environment.json").is_file()]
    found = {json.loads(file.read_text(encoding="utf-8")).get("git_commit") for file in files}
    return sorted(str(commit)[:10] for commit in found if commit)


def _short(place: str) -> str:
    return place.removeprefix("summary.").removesuffix(".value")


def notes(claim: Claim, quick: bool = False) -> list[str]:
    """At what scale it was measured, and what was not."""
    missing = "; ".join(claim.not_reproduced)
    less = (
        f" This was a quick look, with {len(claim.quick_seeds)} seeds and {' '.join(claim.quick) or 'no less'}."
        if quick
        else ""
    )
    return [f"Scale: {claim.scale}.{less}", *([f"Not reproduced: {missing}."] if missing else [])]


def page(
    claim: Claim, found: dict[str, Found], results: dict[str, dict[int, dict[str, Any]]], command: str, quick: bool
) -> str:
    """The verdicts and the report of the runs behind them, as one HTML file."""
    from alignkit.report.collect import collect, configurations
    from alignkit.report.content import Cell, Table, build
    from alignkit.report.page import render

    runs, warnings = collect([r["directory"] for each in results.values() for r in each.values()])
    groups, more = configurations(runs)
    content = build(groups, [*warnings, *more])
    cells = [[Cell(x, strong=i == len(row) - 1) for i, x in enumerate(row)] for row in rows(claim, found)]
    content.claims = [Table(claim.paper, list(HEAD), cells, notes(claim, quick), words=True)]
    return render(content, f"{claim.name}: {overall(found)}{QUICK if quick else ''}", command=command)


def run(name: str, *, quick: bool, seeds: list[int] | None, root: str, words: list[str], extra: list[Path]) -> int:
    """Measure a claim, write ``claim.html``, ``claim.md`` and ``claim.json`` below the root, print the table; the exit code."""
    claim = load(name, extra)
    seeds = seeds or (claim.quick_seeds if quick else claim.seeds)
    behind = [*(claim.quick if quick else []), *words]
    refuse(claim, behind, extra)
    results = runs(claim, seeds, root, behind, extra)
    found = {key: measure(check, results, len(seeds)) for key, check in claim.checks.items()}
    own = name + ("-quick" if quick else "")
    if words or seeds != (claim.quick_seeds if quick else claim.seeds):  # not the claim as it stands: beside it
        own += "-" + hashlib.sha256(repr((words, seeds)).encode()).hexdigest()[:8]
    folder = Path(root) / "claims" / own
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "claim.md", text(claim, found, quick))
    record = {
        "claim": claim.name, "quick": quick, "seeds": seeds, "words": words, "commits": commits(results),
        "definition": {key: vars(one) for key, one in claim.checks.items()}, "arms": claim.arms, "verdict": overall(found),
        "checks": {key: vars(one) for key, one in found.items()},
        "runs": {arm: {s: r["directory"] for s, r in each.items()} for arm, each in results.items()},
    }  # fmt: skip
    write_atomically(folder / "claim.json", json.dumps(record, indent=2) + "\n")
    if any(results.values()):
        more = [*(["--quick"] if quick else []), *words, f"run.root={root}"]
        html = page(claim, found, results, shlex.join(["alignkit", "claim", name, *more]), quick)
        write_atomically(folder / "claim.html", html)
    print(text(claim, found, quick))
    print(f"files: {folder} (claim.html, claim.md, claim.json)")
    return VERDICTS[overall(found)]


def main(words: list[str]) -> int:
    """``NAME [--quick] [--seeds 0 1 …] [key=value …]``; the words go to every run, ``run.root`` says where they are kept."""
    from alignkit.cli import use_config_dirs, without_config_dirs

    extra = use_config_dirs(words)
    rest = without_config_dirs(words)
    seeds: list[int] | None = None
    if "--seeds" in rest:
        at = rest.index("--seeds")
        given = list(itertools.takewhile(lambda w: w.lstrip("-").isdigit(), rest[at + 1 :]))
        if not given:
            raise UserError("--seeds: give numbers, as in --seeds 0 1 2.")
        seeds, rest = [int(w) for w in given], rest[:at] + rest[at + 1 + len(given) :]
    quick, rest = "--quick" in rest, [w for w in rest if w != "--quick"]
    names = [w for w in rest if "=" not in w and not w.startswith("-")]
    unknown = [w for w in rest if w.startswith("-")]
    if len(names) != 1 or unknown:
        raise UserError(
            f"claim: {unknown[0]} is no flag; there are --quick and --seeds."
            if unknown
            else "claim: name one claim, as in `alignkit claim pcrm --quick`."
        )
    roots = [w.partition("=")[2] for w in rest if w.startswith("run.root=")]
    more = [w for w in rest if w not in names and not w.startswith("run.root=")]
    return run(names[0], quick=quick, seeds=seeds, root=roots[-1] if roots else "runs", words=more, extra=extra)

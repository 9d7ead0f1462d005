"""Every command of README.md and docs/: composed and checked, run where that is cheap, or on a short list with a reason."""

from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from running import SMALL_RL, composed, train

from alignkit import catalog
from alignkit.cli import evaluate_words, hydra_words, main
from alignkit.config import check
from alignkit.errors import UserError

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name != "log.md")]
ELSEWHERE = {  # begin of a command that is not alignkit's → why it is not run here
    "make ": "sets up an environment; the target is looked for",
    "pip install ": "installs",
    "python scripts/": "takes minutes, files of others or runs that are not here; the script is looked for",
    "source <(alignkit completion ": "test_completion.py",
}
LAUNCHERS = ("torchrun", "accelerate")  # start `-m alignkit …` several times: tests/test_ranks.py
RUN_HERE = {  # alignkit commands that are really trained → words that make them small
    "alignkit train +algo=sft model=tiny_arithmetic data=arithmetic data.show=3": [],
    "alignkit train +algo=ndr": [
        "algo.prompts=20",
        "algo.models=3",
        "algo.pairs=100",
        "algo.train_steps=5",
        "algo.resamples=50",
    ],
    "alignkit train --config-dir ./mine +algo=my_method algo.steps=2 algo.k=2": [
        *SMALL_RL,
        "algo.steps=2",
        "evaluate.test=false",
    ],
}
ONLY_CHECKED = ("train", "evaluate")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(text: str) -> list[str]:
    """The commands of a page's bash fences: lines joined at a backslash, comments and the words `…` left out."""
    found = []
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").split("\n"):
            if line.strip() and not line.startswith("#"):
                quoted = line if line.startswith(tuple(ELSEWHERE)) else shlex.join(shlex.split(line, comments=True))
                found.append(quoted)
    return found


EVERY = {line: page.name for page in PAGES for line in commands(page.read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages talk of: a finished run, and the files of ./mine as the pages print them."""
    root = tmp_path_factory.mktemp("docs")
    train(root / "runs", "+algo=reinforce", *SMALL_RL, "algo.steps=1", "evaluate.rows=4")
    page = (ROOT / "docs" / "howto" / "own.md").read_text(encoding="utf-8")
    (root / "mine" / "reward").mkdir(parents=True)
    (root / "mine" / "algo").mkdir()
    (root / "mine" / "claim").mkdir()
    reward, method = blocks(page, "python")
    (root / "mine" / "lower_case.py").write_text(reward, encoding="utf-8")
    (root / "mine" / "reward" / "lower_case.yaml").write_text("_target_: lower_case.LowerCase\n", encoding="utf-8")
    (root / "mine" / "my_method.py").write_text(method, encoding="utf-8")
    (root / "mine" / "algo" / "my_method.yaml").write_text(blocks(page, "yaml")[0], encoding="utf-8")
    trl = "model_name_or_path: a/b\ndataset_name: c/d\n"
    (root / "dpo.yaml").write_text(f"{trl}label_smoothing: 0.1\n", encoding="utf-8")
    (root / "config.yaml").write_text(f"{trl}reward_model_name_or_path: e/f\n", encoding="utf-8")
    return root


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-a-test")
    yield place
    HydraConfig.instance().cfg = None  # a process has one job; what comes here next is no part of it


@cache
def targets() -> set[str]:
    return set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def _swept(words: list[str]) -> list[list[str]]:
    """The jobs of a sweep that has each choice once; launchers and samplers need their plugins and are left out."""
    words = [w for w in words if not w.startswith(("hydra/", "hydra."))]
    parsed = OverridesParser.create().parse_overrides(words)
    choices = []
    for word, override in zip(words, parsed, strict=True):
        if override.is_interval_sweep():
            choices.append([f"{override.get_key_element()}={override.value().start}"])
        elif override.is_sweep_override():
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([word])
    return [[c[min(i, len(c) - 1)] for c in choices] for i in range(max(map(len, choices)))]


def checked(words: list[str]) -> None:
    """Compose and check what `alignkit train WORDS` would run.

    Raises:
        UserError, HydraException: it cannot be run.
    """
    left_out = "…" in words
    words = [w.replace("…", "x") for w in words if w != "…"]
    words = words[: words.index("--cfg")] if "--cfg" in words else [w for w in words if w != "--dry-run"]
    if "--config-dir" in words:  # needs Hydra's own search path
        out = io.StringIO()
        with redirect_stdout(out):
            main(["train", *words, "--cfg", "job"])
        assert "_target_" in out.getvalue()
        return
    several = any(w in ("-m", "--multirun") for w in words)
    words = hydra_words([w for w in words if w not in ("-m", "--multirun")])
    for job in _swept(words) if several else [words]:
        cfg = composed(job)
        check(composed([*job, *(f"{key}=given" for key in OmegaConf.missing_keys(cfg))]) if left_out else cfg)


def tried(line: str, root: Path) -> str:
    """Do with a command what can be done here; what was done."""
    for begin in ELSEWHERE:
        if line.startswith(begin):
            rest = line.removeprefix(begin).split()
            if begin == "make ":
                assert rest[0] in targets(), f"no such target: {rest[0]}"
            if begin == "python scripts/":
                assert (ROOT / "scripts" / rest[0]).is_file(), f"no such script: {rest[0]}"
            return "elsewhere"
    words = shlex.split(line)
    words = words[: words.index(">")] if ">" in words else words
    if words[0] in LAUNCHERS:
        words = words[words.index("-m") + 1 :]
    assert words[0] == "alignkit", f"{line}: neither alignkit's nor in ELSEWHERE"
    verb, rest = words[1], words[2:]
    if line in RUN_HERE:
        small = [] if not RUN_HERE[line] else [*RUN_HERE[line], f"run.root={root}/own", "run.wandb=disabled"]
        main(["train", *rest, *small])
        return "trained"
    if verb == "train":
        checked(rest)
        return "checked"
    if verb == "evaluate":
        known = any(w.startswith("data=") for w in rest)
        checked(evaluate_words(rest if known else [*rest, "data=rnnlg"]))
        return "checked"
    if verb == "verify-resume":
        flags = {i + j for i, w in enumerate(rest) if w in ("--steps", "--more") for j in (0, 1)}
        checked([w for i, w in enumerate(rest) if i not in flags])
        return "checked"
    if verb == "claim":
        names = catalog.options("claim")
        assert rest[0] in names or "--config-dir" in rest, f"no such claim: {rest[0]}"
        assert {w for w in rest if w.startswith("-")} <= {"--quick", "--seeds", "--config-dir"}
        return "checked"
    run = next((root / "runs").glob("reinforce-*"))
    rest = [str(run) if re.match(r"runs/|.*runs/", w) else w for w in rest]  # whatever run a page names
    if "-o" in rest:
        rest[rest.index("-o") + 1] = str(root / "page.html")
    if "--baseline" in rest:
        rest[rest.index("--baseline") + 1] = "reinforce"
    if verb == "doctor":  # 1 where something is wrong with this machine
        with pytest.raises(SystemExit):
            main(words[1:])
        return "run"
    main([verb, *dict.fromkeys(rest)] if verb == "report" else [verb, *rest])
    return "run"


@pytest.mark.parametrize("line", EVERY)
def test_a_command_of_the_pages(line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tried(line, here)


def test_the_lists_are_not_longer_than_the_pages() -> None:
    assert [begin for begin in ELSEWHERE if not any(line.startswith(begin) for line in EVERY)] == []
    assert set(RUN_HERE) <= set(EVERY)


def test_every_fence_of_commands_is_read() -> None:
    """A fence without a language, or with another one, must hold no command that this test would not see."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
        assert text.count("```") == 2 * len(fences) + text.count("````")
        for language, block in fences:
            if language != "bash":
                assert not re.search(r"^(alignkit|make|python|torchrun|accelerate) ", block, re.M), page


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("alignkit train +algo=esrl algo.kk=3", "algo.kk: unknown"),
        ("alignkit train +algo=esrll", "there is no such algo"),
        ("alignkit train +algo=esrl rewad=bleu", "rewad: no such key"),
        ("alignkit train +algo=esrl evaluate.evry=3", "evaluate.evry: no such key"),
        ("alignkit train -m +algo=esrl,rlooo seed=1,2", "there is no such algo"),
        ("alignkit train -m +algo=esrl,rloo algo.kk=1,2", "algo.kk: unknown"),
        ("alignkit train +algo=dpo algo.beta=high", "algo.beta: must be float"),
        ("alignkit evaluate runs/RUN evaluate.decod=beam", "evaluate.decod: no such key"),
        ("alignkit evalute runs/RUN", "'evalute' is not a command"),
        ("alignkit show nosuch", "'nosuch' is neither a method"),
        ("alignkit claim nosuch", "no such claim"),
        ("alignkit verify-resume +algo=esrl algo.kk=3 --steps 2", "algo.kk: unknown"),
        ("alignkit explain algo.kk +algo=esrl", "algo.kk"),
        ("alignkit report runs --nosuch", "unrecognized arguments: --nosuch"),
        ("alignkit train --config-dir ./mine +algo=my_methd", "there is no such algo"),
        ("alignkit from-trl dpo.yaml --trainer nosuch", "no such trainer"),
        ("make nosuch", "no such target"),
        ("python scripts/nosuch.py", "no such script"),
        ("rm -rf runs", "neither alignkit's nor in ELSEWHERE"),
    ],
)
def test_a_wrong_command_is_found(line: str, says: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((UserError, AssertionError, SystemExit)) as found:
        tried(line, here)
    assert says in f"{found.value}{capsys.readouterr().err}"

"""Every file of ``conf/`` and every command of the manual composes, and what wins over what."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from running import command, composed

from alignkit import catalog
from alignkit.cli import main
from alignkit.config import GROUPS, NEEDS, check, conf_dir, signature
from alignkit.errors import UserError
from alignkit.launch import EVALUATES
from alignkit.stages import pipeline

ROOT = Path(__file__).parent.parent
CONF = conf_dir()


def names(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml") if not p.stem.startswith("_"))


def content(group: str, name: str) -> dict[str, Any]:
    try:
        return yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError:  # one bad file must not keep the tests of the others from being collected
        return {}


def filled(node: Any, prefix: str) -> list[str]:
    """Words for the values that a file leaves to the user (``???``)."""
    if not isinstance(node, dict):
        return [f"{prefix}=given"] if node == "???" else []
    return [w for key, value in node.items() for w in filled(value, f"{prefix}.{key}" if prefix else key)]


def holds(node: Any, given: Any) -> bool:
    """Whether a composed node has what a file gives; it may have more, and what was left open is filled."""
    if isinstance(given, dict):
        return all(key in node and holds(node[key], value) for key, value in given.items())
    return node == ("given" if given == "???" else given)


def method_words(name: str) -> list[str]:
    """``+algo=NAME`` with what the method leaves to the user; held-out rows are what `evaluate` is given."""
    data = ["data=rnnlg"] if content("algo", name).get("stage") in EVALUATES else []
    return [f"+algo={name}", *data, *filled(content("algo", name), "")]


def completed(words: list[str]) -> DictConfig:
    """What the words compose, with the values that the files behind them leave open."""
    cfg = composed(words)
    missing = sorted(OmegaConf.missing_keys(cfg))
    return composed([*words, *(f"{key}=given" for key in missing)]) if missing else cfg


def preset_words(name: str) -> list[str]:
    """``+preset=NAME`` with what it, or what it stands on, leaves to the user."""
    return [
        f"+preset={name}",
        *(f"{key}=given" for key in sorted(OmegaConf.missing_keys(composed([f"+preset={name}"])))),
    ]


ALGOS, PRESETS = names("algo"), names("preset")
CLASSES = [n for n in ALGOS if "_target_" in (content("algo", n).get("algo") or {})]
ON_A_METHOD = [
    p for p in PRESETS if any("/algo" in e for e in content("preset", p).get("defaults", []) if isinstance(e, dict))
]
METHODS = [*((n, method_words(n)) for n in ALGOS), *((n, preset_words(n)) for n in PRESETS)]
SWAPPED = [(g, n) for g in ("data", "model", "reward") for n in names(g)]
LEFT_OPEN = [
    *([f"+preset={n}", *w[:i], *w[i + 1 :], w[i]] for n in PRESETS for w in [preset_words(n)[1:]] for i in range(len(w))),
    *(["+algo=esrl", f"{g}={n}", *w[:i], *w[i + 1 :], w[i]]
      for g, n in SWAPPED for w in [filled(content(g, n), g)] for i in range(len(w))),
]  # fmt: skip
every_method = pytest.mark.parametrize(("name", "words"), METHODS, ids=[w[0] for _, w in METHODS])


@pytest.fixture
def job(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., DictConfig]:
    """``job(*words)``: what ``alignkit train WORDS --cfg job`` prints."""
    monkeypatch.setattr(sys, "argv", sys.argv)

    def run(*words: str) -> DictConfig:
        main(["train", *words, "--cfg", "job"])
        cfg = OmegaConf.create(capsys.readouterr().out)
        assert isinstance(cfg, DictConfig)
        return cfg

    return run


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder ``./mine`` with a method, a preset, a model and data of one's own."""
    files = {
        "algo/my_method": """\
            # @package _global_
            defaults: [_rl, override /data: my_data, override /reward: bleu, _self_]
            name: my_method
            algo: {_target_: alignkit.algos.reinforce.Reinforce, steps: 3}
            """,
        "algo/_layer": """\
            # @package _global_
            stage: rl
            algo: {steps: 1, epochs: 1}
            model: {vocab_size: 12}
            """,
        "algo/layered": """\
            # @package _global_
            defaults: [_layer, override /data: rnnlg_acts, override /reward: nlg, _self_]
            name: layered
            algo: {_target_: alignkit.algos.reinforce.Reinforce, steps: 2}
            model: {vocab_size: 13}
            """,
        "algo/unlayered": """\
            # @package _global_
            defaults: [override /data: rnnlg_acts, override /reward: nlg, _self_]
            name: unlayered
            stage: rl
            algo: {_target_: alignkit.algos.reinforce.Reinforce}
            """,
        "preset/layered": """\
            # @package _global_
            defaults: [/algo: layered, _self_]
            name: layered
            model: {vocab_size: 14}
            """,
        "preset/my_preset": """\
            # @package _global_
            defaults:
              - /algo: esrl
              - override /model: tiny_causal
              - override /data: tatoeba_en_de
              - override /reward: bleu
              - _self_
            name: my_preset
            algo: {lr: 5e-4}
            """,
        "model/sized": "vocab_size: 11\n",
        "data/my_data": "{_target_: alignkit.data.Data, train: my.jsonl}\n",
    }
    for name, text in files.items():
        path = tmp_path / "mine" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line.removeprefix(" " * 12) for line in text.split("\n")), encoding="utf-8")
    monkeypatch.chdir(tmp_path)


# ---- every file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.relative_to(CONF).as_posix())
def test_every_file_is_yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_every_folder_is_a_group() -> None:
    """A new folder has to be added here, or its files would go untested."""
    assert {p.name for p in CONF.iterdir() if p.is_dir()} <= {*GROUPS, "claim"}


def test_the_catalog_lists_every_file() -> None:
    for group in GROUPS:
        assert sorted(catalog.options(group)) == names(group)


def test_every_base_is_used() -> None:
    for group in GROUPS:
        bases = {p.stem for p in (CONF / group).glob("_*.yaml")}
        assert bases <= {e for p in (CONF / group).glob("*.yaml") for e in content(group, p.stem).get("defaults", [])
                         if isinstance(e, str)}  # fmt: skip


@every_method
def test_every_method_and_preset_passes_check(name: str, words: list[str]) -> None:
    cfg = completed(words)
    check(cfg)
    assert cfg.name == name
    assert (ROOT / "alignkit" / "stages" / f"{cfg.stage}.py").exists()


@pytest.mark.parametrize(("group", "name"), SWAPPED)
def test_every_option_can_be_swapped_in(group: str, name: str) -> None:
    cfg = composed(["+algo=esrl", f"{group}={name}", *filled(content(group, name), group)])
    check(cfg)
    assert holds(OmegaConf.to_container(cfg[group]), {k: v for k, v in content(group, name).items() if k != "defaults"})


@pytest.mark.parametrize("name", PRESETS)
def test_the_steps_of_a_preset_can_be_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of a pipeline are commands; ``{step}`` in them stands for the directory of an earlier one."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-a-test")
    for words in pipeline.steps(composed(preset_words(name))).values():
        check(completed(words))


@pytest.mark.parametrize("words", LEFT_OPEN, ids=lambda words: words[-1])
def test_what_a_file_leaves_open_is_asked_for(words: list[str]) -> None:
    """``???`` laid over a value that is there changes nothing, and the run would take that value in silence."""
    start, (key, _) = words[:-1], words[-1].split("=")
    with pytest.raises(UserError, match=re.escape(f"  - {key}: ")):
        check(composed(start))


def test_every_stage_is_known_everywhere() -> None:
    assert set(catalog.STAGES) == set(NEEDS)
    for stage in NEEDS:
        assert (ROOT / "alignkit" / "stages" / f"{stage}.py").exists()


# ---- one name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["algo", "preset"])
def test_the_name_is_the_file_name(group: str) -> None:
    assert {n: content(group, n).get("name") for n in names(group)} == {n: n for n in names(group)}


@pytest.mark.parametrize("name", CLASSES)
def test_a_method_has_its_file(name: str) -> None:
    target = composed(method_words(name)).algo._target_
    assert re.fullmatch(rf"alignkit\.algos\.{name}\.[A-Z]\w*", target)
    assert (ROOT / "alignkit" / "algos" / f"{name}.py").exists()


def test_a_method_file_has_its_configuration() -> None:
    files = {p.stem for p in (ROOT / "alignkit" / "algos").glob("*.py") if not p.stem.startswith("_")}
    assert files == set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_a_method_has_its_test(name: str) -> None:
    assert (ROOT / "tests" / "algos" / f"test_{name}.py").exists()


@pytest.mark.parametrize("name", CLASSES)
def test_a_method_has_its_line_in_papers(name: str) -> None:
    papers = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    assert re.search(rf"(?<!\w){name}(?!\w)", papers)


# ---- the commands of the manual ------------------------------------------------------------------------------

ESRL, REINFORCE = "alignkit.algos.esrl.ESRL", "alignkit.algos.reinforce.Reinforce"
COMMANDS = {
    "+algo=esrl": {
        "stage": "rl", "name": "esrl", "algo._target_": ESRL, "model.path": content("model", "tiny")["path"], "seed": 0,
        "data.train": "bundled:rnnlg.train.jsonl", "data.unique": True, "reward._target_": "alignkit.rewards.mix.Mix",
    },
    "+algo=esrl data=tatoeba_en_de reward=chrf model=tiny_causal algo.lr=1e-4": {
        "data.train": "bundled:tatoeba_en_de.train.jsonl", "data.unique": None, "model.path": None, "algo.lr": 1e-4,
        "reward._target_": "alignkit.rewards.metric.ChrF", "model.config.model_type": "llama", "algo._target_": ESRL,
    },
    "+algo=sft data.limit=10 data.system=Translate.": {
        "stage": "sft", "data.limit": 10, "data.system": "Translate.", "data.train": "bundled:tatoeba_en_de.train.jsonl",
    },
    "--config-dir ./mine +algo=my_method": {
        "name": "my_method", "stage": "rl", "algo.steps": 3, "algo._target_": REINFORCE, "data.train": "my.jsonl",
    },
    "--config-dir=mine +algo=my_method seed=3": {"name": "my_method", "seed": 3},
    "--config-dir ./mine +preset=my_preset": {
        "name": "my_preset", "stage": "rl", "algo._target_": ESRL, "algo.lr": 5e-4, "model.config.model_type": "llama",
        "data.train": "bundled:tatoeba_en_de.train.jsonl", "reward._target_": "alignkit.rewards.metric.SentenceBLEU",
    },
    "--config-dir ./mine +preset=my_preset data=rnnlg": {
        "data.train": "bundled:rnnlg.train.jsonl", "algo._target_": ESRL, "algo.lr": 5e-4,
    },
    "--config-dir ./mine +preset=my_preset algo=reinforce": {
        "name": "my_preset", "algo._target_": REINFORCE, "algo.lr": 5e-4, "data.train": "bundled:tatoeba_en_de.train.jsonl",
    },
    "--config-dir ./mine preset=my_preset algo.lr=1e-3": {"name": "my_preset", "algo.lr": 1e-3},
}  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_composes(words: str, job: Callable[..., DictConfig], mine: None) -> None:
    cfg = job(*words.split())
    assert {key: OmegaConf.select(cfg, key) for key in COMMANDS[words]} == COMMANDS[words]


@pytest.mark.parametrize("words", [[], ["algo.lr=3e-4"]], ids=["plain", "with a fixed setting"])
def test_a_sweep_over_methods(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real sweeper; a job is recorded where it would be launched."""
    jobs: list[dict[str, Any]] = []

    def record(cfg: DictConfig) -> dict[str, Any]:
        check(cfg)
        jobs.append(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
        return {}

    monkeypatch.setattr("alignkit.launch.launch", record)
    monkeypatch.setattr(sys, "argv", sys.argv)
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", f"run.root={tmp_path}"]
    main(["train", "-m", "+algo=esrl,reinforce", "seed=1,2", *words, *quiet])
    assert [(j["name"], j["seed"]) for j in jobs] == [("esrl", 1), ("esrl", 2), ("reinforce", 1), ("reinforce", 2)]
    assert [j["algo"]["_target_"] for j in jobs] == [ESRL, ESRL, REINFORCE, REINFORCE]
    assert {j["algo"].get("lr") for j in jobs} == {3e-4 if words else 1e-4}
    directories = {Path(j["run"]["dir"]) for j in jobs}
    assert len(directories) == 4
    assert {directory.parent for directory in directories} == {tmp_path}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_other_data(name: str) -> None:
    assert composed([*preset_words(name), "data=rnnlg"]).data._target_ == "alignkit.data.Data"


@pytest.mark.parametrize("name", ON_A_METHOD)
@pytest.mark.parametrize("method", ["esrl", "reinforce"])
def test_a_preset_takes_another_method(name: str, method: str) -> None:
    cfg = composed([*preset_words(name), f"algo={method}"])
    assert (cfg.name, cfg.algo._target_) == (name, ESRL if method == "esrl" else REINFORCE)


@pytest.mark.parametrize("name", ALGOS)
def test_the_plus_may_be_left_out(name: str) -> None:
    plus = composed([f"+algo={name}"])
    assert plus.name == name
    assert composed([f"algo={name}"]) == plus


@pytest.mark.parametrize("word", ["model.lora.r=4", "model.lora={r: 4}"])
def test_lora_is_switched_on_from_the_shell(word: str) -> None:
    cfg = composed(["+algo=sft", word])
    check(cfg)
    assert (cfg.model.lora.r, cfg.model.lora.alpha) == (4, 16)


# ---- what wins -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("+algo=unlayered model=tiny", 2000),  # the schema
        ("+algo=unlayered model=sized", 11),  # a group over the schema
        ("+algo=layered model=sized", 13),  # the method over its base, the base over a group
        ("+preset=layered model=sized", 14),  # a preset over its method
        ("+preset=layered model=sized model.vocab_size=15", 15),  # the shell over all
    ],
)
def test_precedence(words: str, size: int, job: Callable[..., DictConfig], mine: None) -> None:
    assert job("--config-dir", "mine", *words.split()).model.vocab_size == size


def test_a_method_wins_over_its_base(job: Callable[..., DictConfig], mine: None) -> None:
    cfg = job("--config-dir", "mine", "+algo=layered")
    assert (cfg.algo.steps, cfg.algo.epochs) == (2, 1)


def test_the_choice_of_data_has_the_same_precedence(job: Callable[..., DictConfig], mine: None) -> None:
    rnnlg, tatoeba = "bundled:rnnlg.train.jsonl", "bundled:tatoeba_en_de.train.jsonl"
    assert job("+algo=esrl").data.train == rnnlg
    assert job("--config-dir", "mine", "+preset=my_preset").data.train == tatoeba
    assert job("--config-dir", "mine", "+preset=my_preset", "data=my_data").data.train == "my.jsonl"


# ---- the signature, and the configuration of one run ---------------------------------------------------------

BASE = ["+algo=esrl", "algo.lr=1e-4", "data.limit=5", "seed=3"]


@every_method
def test_the_job_does_not_ask_hydra(name: str, words: list[str]) -> None:
    """``${hydra:…}`` resolves only inside Hydra's own process, not in a notebook."""
    cfg = completed(words)
    assert "${hydra:" not in OmegaConf.to_yaml(cfg)
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    assert re.fullmatch(rf"runs/{name}-s{cfg.seed}-[0-9a-f]{{8}}", resolved["run"]["dir"])


def test_the_signature_is_the_same_again() -> None:
    first = composed(BASE)
    assert first.run.dir == composed(BASE).run.dir == f"runs/esrl-s3-{signature(first)}"
    one, other = ["data.limit=5", "data.system=x"], ["data.system=x", "data.limit=5"]  # the order of words is nothing
    assert signature(composed(["+algo=esrl", *one])) == signature(composed([*other, "+algo=esrl"]))


@pytest.mark.parametrize(
    "word",
    ["seed=4", "algo.lr=2e-4", "algo.k_min=1", "data.limit=6", "data.system=x", "reward=chrf", "reward.weights.bleu=1",
     "model=tiny_causal", "model.dtype=bfloat16", "evaluate.beams=5", "evaluate.every=7", "data=tatoeba_en_de"],
)  # fmt: skip
def test_the_signature_changes_with(word: str) -> None:
    assert signature(composed([*BASE, word])) != signature(composed(BASE))


def test_the_signature_changes_with_the_method() -> None:
    assert signature(composed(["+algo=reinforce", *BASE[1:]])) != signature(composed(BASE))


@pytest.mark.parametrize(
    "word",
    ["name=other", "run.root=elsewhere", "run.name=mine", "run.dir=here", "run.overwrite=true", "run.save_every=7",
     "run.keep=7", "run.wandb=disabled", "run.project=x", "run.threads=1"],
)  # fmt: skip
def test_the_signature_does_not_change_with(word: str) -> None:
    assert signature(composed([*BASE, word])) == signature(composed(BASE))


def test_the_signature_follows_values_taken_from_elsewhere() -> None:
    """A value written as ``${…}`` counts as what it stands for, also where it stands for one of ``run``."""
    pointed = composed([*BASE, "data.limit=${seed}"])
    assert signature(pointed) == signature(composed([*BASE, "data.limit=3"]))
    assert re.fullmatch(r"runs/esrl-s3-[0-9a-f]{8}", composed([*BASE, "data.dev=${run.root}/dev.jsonl"]).run.dir)


def test_the_configuration_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Ranks compose for themselves: the order of sets and the folder must not show."""
    words = ["train", *BASE, "--cfg", "job", "--resolve"]
    one, other = command(*words, PYTHONHASHSEED="1"), command(*words, cwd=tmp_path, PYTHONHASHSEED="2")
    assert one.returncode == other.returncode == 0
    assert one.stdout == other.stdout
    assert OmegaConf.create(one.stdout) == OmegaConf.create(OmegaConf.to_container(composed(BASE), resolve=True))

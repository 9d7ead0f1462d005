"""Settings that were given and that nothing read are said; of settings that a run does read nothing is."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from critical import PROMPTS, critical_policy
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from running import SMALL_CAUSAL, SMALL_SEQ2SEQ, composed, train

from alignkit.algos.grpo import GRPO
from alignkit.catalog import options
from alignkit.cli import hydra_words
from alignkit.config import Evaluate, Model, conf_dir
from alignkit.errors import need
from alignkit.origins import layers
from alignkit.report.collect import collect, configurations
from alignkit.report.content import of_runs
from alignkit.unread import Watch, built_of

Cli = Callable[..., tuple[int, str, str]]
SAYS = "warning: these settings were given, but nothing in this run read them: "
QUICK = ["run.threads=1", "run.wandb=disabled"]
FEW = ["evaluate.rows=6", "evaluate.bootstrap=20"]
CLASSIFIER = [
    "model=tiny_classifier", "model.config.hidden_size=16", "model.config.intermediate_size=32",
    "model.config.num_hidden_layers=1", "model.config.num_attention_heads=2",
]  # fmt: skip
CLASSES = [*CLASSIFIER, "data=brackets", "data.limit=48", "algo.steps=2", "algo.batch_size=8"]
FIT = ["data.limit=24", "algo.steps=2", "algo.batch_size=4", *FEW]
WRITE = [*FIT, "evaluate.max_new_tokens=6"]
TINY = {  # stage → words of a run of seconds
    "sft": [*SMALL_CAUSAL, *WRITE],
    "pref": [*SMALL_CAUSAL, *WRITE],
    "rm": FIT,
    "trl": [*SMALL_CAUSAL, *WRITE],
    "rl": [*SMALL_SEQ2SEQ, "algo.steps=2", "algo.prompts_per_step=4", "algo.max_new_tokens=6", "evaluate.max_new_tokens=6", *FEW],
    "distill": [*CLASSES, *FEW],
    "select": [*CLASSES, "algo.phases=2"],
    "refine": ["data.limit=8"],
    "evaluate": ["model.path=bundled:nlg", "data=rnnlg", "evaluate.max_new_tokens=6", *FEW],
    "study": ["algo.prompts=20", "algo.models=4", "algo.resamples=20"],
}  # fmt: skip
RIGHTLY = {  # what the shipped files set for other cases than the shipped one: an alarm is no false one
    "judge": {"model.path"},  # it reads outputs
    "ndr": {"model.path"},
    "sampling_memory": {"model.path"},
    "self_rank": {"algo.max_feedback_tokens"},  # is for score=critique
    "srt_collect": {"algo.prompt.version"},  # a mark for readers
}


def unread(folder: Path) -> list[str]:
    """Settings that ``result.json`` of the one run below a folder lists."""
    file = next(folder.glob("**/result.json"))
    return [one.partition("=")[0] for one in json.loads(file.read_text())["unread"]]


# ---- no false alarm --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What methods need besides their own: runs whose model, selector or rows they read, a model that criticises itself."""
    root = tmp_path_factory.mktemp("made")
    teacher = train(root, "+algo=finetune", *TINY["distill"], *QUICK)[1]
    grid = ["algo.grid=[[1,1,1,1]]", f"algo.teacher={teacher}"]
    found = {
        "teacher": teacher,
        "selector": train(root, "+algo=constant_grid", *TINY["select"], *grid, *QUICK)[1],
        "reward": train(root, "+algo=bt", *TINY["rm"], *QUICK)[1],
        "outputs": train(root, "+algo=evaluate", *TINY["evaluate"], *QUICK)[1],
        "criticised": train(root, "+algo=srt_collect", *TINY["refine"], *QUICK)[1],
        "critical": root / "critical",
        "prompts": root / "prompts.jsonl",
    }
    critical_policy().save(root / "critical")
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p, "response": "1"}) + "\n" for p in PROMPTS))
    return {name: str(path) for name, path in found.items()}


def tiny(name: str, stage: str, made: dict[str, str]) -> list[str]:
    """The words of a method's tiny run."""
    teacher = f"algo.teacher={made['teacher']}"
    special = {
        "on_policy_kd": [*WRITE, "algo.teacher=bundled:translation"],
        "inverse_value": [*SMALL_CAUSAL[:1], *SMALL_CAUSAL[2:], *WRITE, "algo.base=bundled:lists"],
        "srt": [*TINY["sft"], f"data.train={made['criticised']}", f"data.test={made['criticised']}"],
        "srt_self": [f"model.path={made['critical']}", f"data.train={made['prompts']}"],
        "judge": ["data=rnnlg", "reward=chrf", f"algo.outputs={{a: {made['outputs']}, b: {made['outputs']}}}"],
        "sampling_memory": ["algo.lengths=[4]", "algo.prompts=2"],
        "ksm": [*TINY["select"], teacher, "algo.episodes=2", "algo.updates=2", "algo.hidden=8"],
        "constant_grid": [*TINY["select"], teacher, "algo.grid=[[1,1,1,1]]"],
        "selected": [*TINY["distill"], teacher, f"algo.selector={made['selector']}"],
        "evaluate_classes": [f"model.path={made['teacher']}", "data=brackets", *FEW],
        "evaluate_rm": [f"model.path={made['reward']}", "data=polite", *FEW],
        "finetune": [*TINY["distill"], "model.vocab_size=300"],
    }  # fmt: skip
    if name in ("trl_grpo", "trl_rloo"):
        words = [w for w in TINY["rl"] if w not in SMALL_SEQ2SEQ]
        return [*SMALL_CAUSAL, *words, "algo.k=2"]
    if name == "trl_reward":  # writes nothing
        return [*SMALL_CAUSAL, *FIT]
    taught = [teacher] if stage == "distill" else []
    return special.get(name) or [*TINY[stage], *taught]


def as_word(key: str, value: Any) -> str:
    return f"{key}={_quoted(value)}"


def _quoted(value: Any) -> str:
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", r"\'") + "'"
    if isinstance(value, list):
        return f"[{','.join(map(_quoted, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def shipped(words: list[str]) -> dict[str, Any]:
    """Key → value of what the files behind a command set for the method, its reward, data and model."""
    cfg = composed(words)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        keys = {key for layer in layers(hydra_words(words)) for key in layer.values}
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    found = {}
    for key in sorted(keys):
        value = plain
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if (
            key.partition(".")[0] in ("algo", "reward", "data", "model")
            and not isinstance(value, dict)
            and "_target_" not in key
        ):
            found[key] = value
    if cfg.algo.get("steps"):
        found.pop("algo.epochs", None)  # `steps` takes its place
    if cfg.algo.get("teacher") or cfg.algo.get("base"):
        found.pop("model.vocab_size", None)  # the student has the teacher's tokenizer, a value model its base's
    return found


@pytest.mark.parametrize("name", sorted(options("algo")))
def test_all_that_a_method_ships_with_is_read(name: str, made: dict[str, str], cli: Cli, tmp_path: Path) -> None:
    """Every setting that the files of its tiny run set (method, data, reward, model) is given as a word, as are the words of the
    tiny run: none is said to be unread."""
    words = [f"+algo={name}", *tiny(name, composed([f"+algo={name}"]).stage, made), *QUICK]
    code, _, err = cli("train", *words, *(as_word(k, v) for k, v in shipped(words).items()))
    assert code == 0, err
    assert set(unread(tmp_path)) == RIGHTLY.get(name, set())
    assert (SAYS in err) == (name in RIGHTLY)


# ---- what nothing reads ----------------------------------------------------------------------------------------

SFT = ["+algo=sft", "data=rnnlg", *TINY["sft"], *QUICK]
RL = ["+algo=grpo", "data=rnnlg", "reward=length", *TINY["rl"], "algo.k=2", *QUICK]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*SFT, "algo.epochs=3"], ["algo.epochs"]),  # algo.steps is given
        ([*SFT, "evaluate.beams=3"], ["evaluate.beams"]),
        ([*SFT, "evaluate.decode=beam", "evaluate.beams=3"], []),
        ([*SFT, "evaluate.rounds=3", "audit.length=2.5"], ["audit.length", "evaluate.rounds"]),
        ([*SFT, "evaluate.every=0", "evaluate.select=chrf"], ["evaluate.select"]),
        ([*RL, "algo.kl=0", "algo.kl_estimator=k3"], ["algo.kl_estimator"]),  # no KL is charged
        ([*RL, "algo.kl_estimator=k3", "algo.kl=0.1"], []),
        ([*RL, "algo.kl={start: 0.1, end: 0.01}", "algo.kl_limit=9", "audit.length=2.5"], []),
        ([*RL, "algo.kl_horizon=5"], ["algo.kl_horizon"]),
        ([*RL, "model.lora.r=2", "model.lora.alpha=4", "model.steer.scale=1.0"], ["model.steer.scale"]),
        ([*RL, "model.layers_from=first"], ["model.layers_from"]),
        (["+algo=esrl", *TINY["rl"], *QUICK, "algo.baseline=batch", "algo.queue=7"], ["algo.queue"]),
        (["+algo=esrl", *TINY["rl"], *QUICK, "algo.baseline=fifo", "algo.queue=7"], []),
    ],
)  # fmt: skip
def test_a_setting_without_a_reader_is_said_once(words: list[str], said: list[str], cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("train", *words)
    assert code == 0, err
    assert sorted(unread(tmp_path)) == said
    assert err.count(SAYS) == bool(said)
    for key in said:
        assert f"{key}={OmegaConf.select(composed(words), key)}" in err


@pytest.mark.parametrize(("method", "read"), [("kd", False), ("pkd", True)])
def test_what_a_distillation_method_does_not_learn_from(
    method: str, read: bool, made: dict[str, str], cli: Cli, tmp_path: Path
) -> None:
    """``kd`` has no feature knowledge, so how features are made is nothing to it."""
    taught = f"algo.teacher={made['teacher']}"
    code, _, err = cli("train", f"+algo={method}", *TINY["distill"], taught, "algo.features=tokens", *QUICK)
    assert code == 0, err
    assert unread(tmp_path) == ([] if read else ["algo.features"])


def test_a_file_of_ones_own_counts_as_given_and_is_named(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine" / "preset").mkdir(parents=True)
    preset = (
        "# @package _global_\ndefaults: [/algo: sft, override /data: rnnlg, _self_]\nevaluate: {beams: 3, every: 0}\n"
    )
    (tmp_path / "mine" / "preset" / "own.yaml").write_text(preset)
    words = [w for w in SFT if not w.startswith(("+algo", "data="))]
    code, _, err = cli("train", "--config-dir", "mine", "+preset=own", *words)
    assert code == 0, err
    assert f"{SAYS}evaluate.beams=3 (mine/preset/own.yaml:3)." in err


def test_an_evaluation_is_not_blamed_for_the_words_of_the_run_that_it_measures(cli: Cli, tmp_path: Path) -> None:
    """``data.limit`` comes along with the run's data, and an evaluation reads no training rows."""
    assert cli("train", *SFT, "run.root=a")[0] == 0
    run = next((tmp_path / "a").iterdir())
    code, _, err = cli("evaluate", str(run), "evaluate.beams=2", *FEW, *QUICK, "run.root=b")
    assert code == 0, err
    assert unread(tmp_path / "b") == ["evaluate.beams"]


def test_a_run_that_goes_on_says_nothing_of_what_was_read_before(cli: Cli, tmp_path: Path) -> None:
    assert cli("train", *SFT, "algo.steps=4", "run.save_every=2", "run.keep=9", "algo.epochs=3")[0] == 0
    run = next((tmp_path / "runs").iterdir())
    for path in ("result.json", "final", "checkpoint-4"):
        (run / path).rename(tmp_path / path)
    code, _, err = cli("train", *SFT, "algo.steps=4", "run.save_every=2", "run.keep=9", "algo.epochs=3")
    assert code == 0, err
    assert "goes on after step 2" in err and SAYS not in err
    assert "unread" not in json.loads((run / "result.json").read_text())


def test_outside_of_hydras_jobs_nothing_is_known_to_be_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, _ = train(tmp_path, *SFT, "algo.epochs=3")
    assert result["unread"] == []
    assert SAYS not in capsys.readouterr().err


def test_a_report_shows_it(cli: Cli, tmp_path: Path) -> None:
    assert cli("train", *SFT, "algo.epochs=3")[0] == 0
    groups, _ = configurations(collect([str(tmp_path / "runs")])[0])
    assert any("given, but read by nothing in the run: algo.epochs=3" in text for text in of_runs(groups[0]))


# ---- the watch itself ------------------------------------------------------------------------------------------


def watched(cfg: DictConfig, *keys: str) -> Watch:
    return Watch(cfg, {key: f"{key}=…" for key in keys})


def test_a_copy_and_a_check_are_no_readers_and_a_class_is_left_as_it_was() -> None:
    algo = GRPO(k=4)
    copy.copy(algo)  # leaves a mark of its own in the class
    before = dict(vars(GRPO))
    cfg = composed(["+algo=grpo", "algo.k=4"])
    with watched(cfg, "algo.k", "algo.lr") as watch:
        watch.over("algo")
        need(algo, "k >= 2")
        twin = dataclasses.replace(algo, top_k=3)
        for other in (copy.copy(algo), copy.deepcopy(algo), pickle.loads(pickle.dumps(algo)), twin):
            assert type(other) is GRPO and isinstance(other, GRPO) and vars(other)["k"] == 4
        assert dataclasses.asdict(algo)["k"] == 4
        assert [one.partition("=")[0] for one in watch.unread()] == ["algo.k", "algo.lr"]
        assert twin.k == 4  # a copy is the same setting
        assert [one.partition("=")[0] for one in watch.unread()] == ["algo.lr"]
        algo.lr = 0.5  # a method may set what it was given
        assert algo.lr == 0.5 and GRPO.lr == 1e-5
        assert watch.unread() == []
    assert dict(vars(GRPO)) == before
    assert (algo.k, algo.lr) == (4, 0.5)


def test_a_class_is_left_as_it_was_when_the_run_fails() -> None:
    before = dict(vars(Model))
    cfg = composed(["+algo=sft"])

    def failing() -> None:
        with watched(cfg, "model.dtype", "evaluate.every", "evaluate.final") as watch:
            watch.over("model", "evaluate")
            assert type(cfg.evaluate) is not DictConfig
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert dict(vars(Model)) == before
    assert type(cfg.model) is type(cfg.evaluate) is DictConfig


def test_a_node_says_what_is_asked_of_it_and_not_what_is_written_down() -> None:
    cfg = composed(["+algo=sft"])
    with watched(cfg, "evaluate.every", "evaluate.final", "evaluate.rows", "evaluate.beams") as watch:
        watch.over("evaluate")
        assert isinstance(OmegaConf.to_object(cfg.evaluate), Evaluate)
        OmegaConf.to_yaml(cfg)
        assert len(watch.unread()) == 4
        assert (cfg.evaluate.every, cfg.evaluate["final"], cfg.evaluate.get("rows")) == (50, "best", None)
        assert watch.unread() == ["evaluate.beams=4"]


def test_another_model_with_another_value_is_no_reader() -> None:
    """A teacher is a ``Model`` too: that its precision is read says nothing of the student's."""
    cfg = composed(["+algo=sft", "model.dtype=bfloat16"])
    with watched(cfg, "model.dtype") as watch:
        watch.over("model")
        assert Model(path="teacher").dtype == "float32"
        assert len(watch.unread()) == 1
        model: Any = OmegaConf.to_object(cfg.model)
        assert model.dtype == "bfloat16"
        assert watch.unread() == []


def test_what_a_constructor_puts_into_something_else_is_read() -> None:
    assert built_of("alignkit.rewards.metric.ChrF") == {"word_order"}
    assert {"model", "device", "compute", "dtype", "standardise"} <= built_of("alignkit.rewards.learned.Learned")
    assert "lam" not in built_of("alignkit.rewards.learned.Learned")
    assert not {"k", "lr", "clip"} & built_of("alignkit.algos.grpo.GRPO")

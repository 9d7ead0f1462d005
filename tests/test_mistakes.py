"""What a user gets wrong, and what is said to it: one message that names the thing, before work is done or lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from running import SMALL_CAUSAL, SMALL_RL, SMALL_RUN, SMALL_SEQ2SEQ, command, composed, lines, train

from alignkit.algos.grpo import GRPO
from alignkit.algos.ppo import PPO
from alignkit.config import check, schema_keys, type_of
from alignkit.critic import Critic
from alignkit.errors import UserError, need
from alignkit.launch import refuse_unshared
from alignkit.run import hash_weights

GRPO_TINY = ["+algo=grpo", *SMALL_SEQ2SEQ, "data=rnnlg", *SMALL_RL, "algo.k=2", "reward=length", "algo.warmup=0"]
REWARDS = {
    "bare": "class R:\n    def __call__(self, batch):\n        return [1.0, 2.0] * (len(batch) // 2)\n",
    "none": "class R:\n    def __call__(self, batch):\n        return None\n",
    "late": (
        "import torch\nclass R:\n    calls = 0\n    def __call__(self, batch):\n        R.calls += 1\n"
        "        return torch.full((len(batch),), float('nan') if R.calls > BAD else 1.0)\n"
    ),
}


@pytest.mark.parametrize(
    ("value", "condition", "said"),
    [
        (1, "k >= 2", "k must be at least 2, is 1"),
        (0.0, "k > 0", "k must be above 0, is 0.0"),
        (1.5, "k <= 1", "k must be at most 1, is 1.5"),
        (1, "k < 1", "k must be below 1, is 1"),
        (float("nan"), "k >= 0", "k must be at least 0, is nan"),
        (float("inf"), "k >= 0", "k must be at least 0, is inf"),
    ],
)
def test_a_range_says_which_bound_is_missed_by_what(value: float, condition: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}$"):
        need(SimpleNamespace(k=value), condition)


def test_what_lies_in_its_range_passes() -> None:
    need(SimpleNamespace(k=2, x=None), "k >= 2", "k <= 2", "k > 1", "k < 3", "x > 0")


@pytest.mark.parametrize(("start", "end", "wrong"), [(0.0, 0.95, None), (0.5, 1.5, 1.5), (-0.1, 0.5, -0.1)])
def test_both_ends_of_a_schedule_are_checked(start: float, end: float, wrong: float | None) -> None:
    given = {"lam": {"start": start, "end": end}, "critic": Critic()}
    if wrong is None:
        assert PPO(**given).lam == start
    else:
        with pytest.raises(ValueError, match=f"lam must be .*, is {wrong}"):
            PPO(**given)


def test_one_setting_is_blamed_not_all() -> None:
    with pytest.raises(ValueError, match=r"^k must be at least 2, is 1$"):
        GRPO(k=1)
    with pytest.raises(ValueError, match=r"^temperature must be above 0, is 0"):
        GRPO(temperature=0.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["algo.k={start: 8, end: 4}"], "only floats can have a schedule"),
        (["model.device=gpu"], "model.device: must be auto"),
        (["run.threads=-2"], "run.threads"),
        (["run.dir=''"], "run.dir: must not be empty"),
        (["model.lora.alpha=32"], "model.lora.r: is 0"),
        (["algo.needs_reference=true"], "algo.needs_reference: unknown"),
        (["run.shard=true"], "run.shard: one process has all layers"),
    ],
)
def test_check_refuses(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(composed(["+algo=grpo", *words]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+algo=ndr"], "run.shard: stage study runs in one process, which has all layers"),
        (["+algo=rejection", "reward=chrf"], "run.shard: stage refine runs in one process"),
        (["+algo=evaluate", "model.path=bundled:nlg", "data=rnnlg"], "run.shard: has no effect in stage evaluate"),
        (["+algo=sft"], None),
        (["+preset=sft_then_esrl"], None),
    ],
)
def test_layers_are_parted_where_several_processes_share_a_training(words: list[str], said: str | None) -> None:
    cfg = composed([*words, "run.processes=2", "run.shard=true"])
    if said is None:
        check(cfg)
    else:
        with pytest.raises(UserError, match=said):
            check(cfg)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+algo=trl_sft"], "run.offload: has no effect in stage trl"),
        (["+algo=evaluate", "model.path=bundled:nlg", "data=rnnlg"], "run.offload: has no effect in stage evaluate"),
        (["+algo=sft"], None),
        (["+preset=sft_then_esrl"], None),
    ],
)
def test_adamw_is_offloaded_where_there_is_one(words: list[str], said: str | None) -> None:
    cfg = composed([*words, "run.offload=true"])
    if said is None:
        check(cfg)
    else:
        with pytest.raises(UserError, match=said):
            check(cfg)


def test_a_number_of_processes_beside_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse_unshared(composed(["+algo=sft", "run.processes=2"]))
    with pytest.raises(UserError, match=r"run\.processes=4: torchrun or accelerate has started 2"):
        refuse_unshared(composed(["+algo=sft", "run.processes=4"]))


TYPES = [
    ("run.processes=two", "run.processes: must be an integer, is 'two'."),
    ("run.processes=1.5", "run.processes: must be an integer, is 1.5."),
    ("seed=abc", "seed: must be an integer, is 'abc'."),
    ("seed=null", "seed: must be an integer, is null."),
    ("run.shard=maybe", "run.shard: must be true or false, is 'maybe'."),
    ("evaluate.every=[1]", "evaluate.every: must be an integer, is [1]."),
    ("evaluate.rows=x", "evaluate.rows: must be an integer or null, is 'x'."),
    ("audit.length=a", "audit.length: must be a number or null, is 'a'."),
    ("model.lora.r=x", "model.lora.r: must be an integer, is 'x'."),
    ("model.steer.scale={a: 1}", "model.steer.scale: must be a number, is {'a': 1}."),
    ("run.root=[a]", "run.root: must be a text, is ['a']."),
    ("model.lora=3", "model.lora: must be settings, as in model.lora.KEY=VALUE, is 3."),
]


@pytest.mark.parametrize(("word", "said"), TYPES)
def test_a_value_of_another_type_is_one_line(word: str, said: str, cli: Callable[..., tuple[int, str, str]]) -> None:
    assert cli("train", "+algo=sft", word) == (2, "", f"error: {said}\n")


def test_every_key_of_the_schema_has_its_type_in_words() -> None:
    def keys(prefix: str = "") -> list[str]:
        found = []
        for name in schema_keys(prefix) or []:
            key = f"{prefix}.{name}" if prefix else name
            found += [key, *keys(key)]
        return found

    assert type_of("run.nothing") is None and type_of("nothing.at.all") is None
    assert all(type_of(key) for key in keys()) and len(keys()) > 60
    assert type_of("run.budget") == "a number or null" and type_of("name") == "a text"


def test_a_value_of_another_type_in_a_file_or_a_step_or_a_sweep(
    tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "conf" / "preset").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - sft_rnnlg\nrun:\n  processes: two\n"
    (tmp_path / "conf" / "preset" / "odd.yaml").write_text(text)
    for words, said in (
        (["--config-dir", "conf", "+preset=odd"], "run.processes: must be an integer, is 'two' (In 'preset/odd')."),
        (
            ["+preset=sft_then_esrl", 'more.sft="run.threads=x"'],
            "steps.sft: run.threads: must be an integer or null, is 'x'.",
        ),
        (["-m", "+algo=sft", "seed=1,abc"], "seed: must be an integer, is 'abc'."),
    ):
        code, _, err = cli("train", *words)
        assert code == 2 and err.endswith(f"error: {said}\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["algo.lr=nan"], "algo: lr must be"),
        (["algo.betas=[0.9]"], "algo: betas must be two numbers"),
        (["algo.weight_decay=-1"], "algo: weight_decay must be"),
        (["algo.kl_limit=0"], "algo: kl_limit must be above 0"),
        (["model.device=cuda:99"], "cannot use it"),
        (["reward=slots", "reward.column=dialogue_act"], "no column 'dialogue_act'.*reward.column"),
    ],
)
def test_train_refuses(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        train(tmp_path, *GRPO_TINY, *words)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*run\.root"):
        train(tmp_path / "file", *GRPO_TINY)


def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> str:
    """The word that names a reward of the user's own, in a file of its own."""
    name = f"own_{abs(hash((str(tmp_path), code)))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"reward._target_={name}.R"


OWN = [w for w in GRPO_TINY if w != "reward=length"] + ["reward=chrf", "algo.steps=2", "evaluate.every=0"]


def test_a_reward_may_give_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = train(tmp_path, *OWN, "evaluate.test=false", own(tmp_path, monkeypatch, REWARDS["bare"]))
    assert result["steps"] == 2


def test_a_reward_that_gives_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="the reward gave NoneType"):
        train(tmp_path, *OWN, own(tmp_path, monkeypatch, REWARDS["none"]))


@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_a_reward_that_turns_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    """... in the evaluation before (1 call), in a step (2) or in the evaluation after: never written down as a result."""
    with pytest.raises(UserError, match=r"the reward of row .* is nan"):
        train(tmp_path, *OWN, own(tmp_path, monkeypatch, REWARDS["late"].replace("BAD", str(bad))))
    assert not list(tmp_path.glob("*/result.json"))


def test_a_finished_run_asks_whether_its_own_code_is_still_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = own(tmp_path, monkeypatch, REWARDS["bare"])
    train(tmp_path, *OWN, "evaluate.test=false", word)
    train(tmp_path, *OWN, "evaluate.test=false", word)  # is finished
    file = tmp_path / f"{word.partition('=')[2].removesuffix('.R')}.py"
    file.write_text(file.read_text().replace("2.0", "3.0"))
    with pytest.raises(UserError, match=r"another reward\._target_"):
        train(tmp_path, *OWN, "evaluate.test=false", word)


def test_other_settings_in_one_directory_are_named(tmp_path: Path) -> None:
    words = [*GRPO_TINY, "run.name=fixed", "evaluate.test=false"]
    train(tmp_path, *words)
    with pytest.raises(UserError, match=r"algo\.clip: 0\.2 → 0\.3\).*model\.path=.*fixed"):
        train(tmp_path, *words, "algo.clip=0.3")


def test_the_record_holds_every_default_and_a_changed_one_is_noticed(tmp_path: Path) -> None:
    words = [*GRPO_TINY, "run.name=fixed", "evaluate.test=false"]
    _, run = train(tmp_path, *words)
    record = yaml.safe_load((run / "config.yaml").read_text())
    assert record["algo"]["clip"] == GRPO.clip and record["algo"]["betas"] == [0.9, 0.95]
    assert "clip" not in composed(words).algo  # not from the YAML
    record["algo"]["clip"] = 0.1  # as if alignkit's default had been another
    (run / "config.yaml").write_text(yaml.safe_dump(record))
    with pytest.raises(UserError, match=r"algo\.clip: 0\.1 → 0\.2"):
        train(tmp_path, *words)


def test_the_start_is_kept_where_training_makes_it_worse(tmp_path: Path) -> None:
    """A rate a thousand times too high."""
    words = ["+algo=grpo", "data=rnnlg_acts", *SMALL_RL, "algo.k=2", "algo.lr=0.1", "algo.warmup=0", "evaluate.every=2"]
    result, run = train(tmp_path, *words, "evaluate.test=false", "run.keep=1")
    first = lines(run / "metrics.jsonl")[0]
    assert first["step"] == 0 and result["best"] == {"step": 0, "value": first["dev/bleu"]}
    assert first["dev/bleu"] > 10  # the bundled model
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-0", "checkpoint-6"]
    weights = {name: hash_weights(run / name) for name in ("final", "checkpoint-0", "checkpoint-6")}
    assert weights["final"] == weights["checkpoint-0"] != weights["checkpoint-6"]


@pytest.mark.parametrize(
    ("words", "by"), [([], "algo.steps"), (["algo.token_budget=1"], "algo.token_budget"), (["algo.kl_limit=1e-9", "algo.lr=0.1"], "algo.kl_limit")],
)  # fmt: skip
def test_the_result_says_what_ended_the_run(
    tmp_path: Path, words: list[str], by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result, _ = train(tmp_path, *GRPO_TINY, "evaluate.test=false", "evaluate.every=0", *words)
    assert result["ended_by"] == by
    assert (f"{by}=" in capsys.readouterr().err) == (by != "algo.steps")


def test_responses_that_are_all_cut_off_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, *GRPO_TINY, "evaluate.test=false", "evaluate.every=0", "algo.max_new_tokens=1", "algo.steps=1")
    assert "every response was cut off at algo.max_new_tokens=1" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["+data=arithmetic", "model=tiny_arithmetic", "+reward=answer"], ["+preset=reinforce_arithmetic", "+algo=grpo"]])  # fmt: skip
def test_a_plus_too_many_does_no_harm(words: list[str]) -> None:
    cfg = composed(words if "+preset=reinforce_arithmetic" in words else ["+algo=grpo", *words])
    assert cfg.algo._target_.endswith("GRPO") and "arithmetic" in cfg.data.train
    check(cfg)


def test_the_command_line_points_the_way(tmp_path: Path) -> None:
    sweep = command("train", "+algo=grpo", "seed=1,2", cwd=tmp_path)
    assert sweep.returncode == 2 and "alignkit train -m" in sweep.stderr
    folder = command("train", "--config-dir", "nowhere", "+algo=mine", cwd=tmp_path)
    assert folder.returncode == 2 and "nowhere: no such folder" in folder.stderr
    assert not list(tmp_path.iterdir())


def test_a_method_of_ones_own_is_listed_shown_and_named_when_it_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "algo").mkdir()
    (tmp_path / "algo" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [{override /data: rnnlg}, {override /reward: length}, _self_]\nname: mine\n"
        "stage: rl\nalgo: {_target_: mine.Mine}\n"
    )
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom alignkit.algos._rl import RL\nimport nothing_of_the_kind\n\n\n"
        '@dataclass(kw_only=True)\nclass Mine(RL):\n    """Mine: does what I want."""\n\n    mine: int = 3  # my own\n'
    )
    where = ("--config-dir", str(tmp_path))
    listed, shown = command("list", *where), command("show", "mine", *where)
    assert "+algo=mine" in listed.stdout and "Mine: does what I want" in listed.stdout
    assert "mine: int = 3" in shown.stdout and "prompts_per_step" in shown.stdout
    failed = command("train", *where, "+algo=mine", *SMALL_CAUSAL, f"run.root={tmp_path}/runs")
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert "nothing_of_the_kind" in failed.stderr and "mine.Mine" in failed.stderr


def test_settings_that_every_run_takes_are_shown() -> None:
    shown = command("show", "settings").stdout
    for word in ("evaluate.select", "run.keep", "model.lora.target_modules", "model.compute"):
        assert f"  {word}: " in shown


def test_results_are_json_that_others_can_read(tmp_path: Path) -> None:
    _, run = train(tmp_path, *GRPO_TINY, "evaluate.test=false")

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_an_even_score_goes_to_training(tmp_path: Path) -> None:
    """Dev BLEU that never leaves 0 must not throw the training away."""
    result, run = train(tmp_path, *GRPO_TINY, "evaluate.every=3", "evaluate.test=false", "algo.lr=0.01")
    assert [m["dev/bleu"] for m in lines(run / "metrics.jsonl") if "dev/bleu" in m] == [0, 0, 0]
    assert result["best"] == {"step": 3, "value": 0.0}


def test_a_line_that_was_written_before_the_first_checkpoint_is_written_anew(tmp_path: Path) -> None:
    words = [*GRPO_TINY, "evaluate.every=3", "evaluate.test=false", "run.name=fixed"]
    (tmp_path / "fixed").mkdir()
    (tmp_path / "fixed" / "metrics.jsonl").write_text('{"step": 0, "dev/bleu": 0.0}\n')
    _, run = train(tmp_path, *words)
    assert [m["step"] for m in lines(run / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 6]


def test_a_part_of_a_mix_may_be_ones_own_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    word = own(tmp_path, monkeypatch, REWARDS["bare"]).partition("=")[2]
    mixed = ["reward=bleu_chrf", f"reward.rewards.chrf._target_={word}", "reward.weights={bleu: 0.0, chrf: 0.5}"]
    words = [w for w in OWN if w != "reward=chrf"] + mixed
    _, run = train(tmp_path, *words, "evaluate.test=false", "data=rnnlg")
    assert lines(run / "metrics.jsonl")[-1]["reward"] == pytest.approx(0.75)  # half of 1 and 2


@pytest.mark.parametrize(
    "init", ["stop: tuple = ((1, 2), (3, 4))", "stop: object = frozenset()", "stop: str = 'a${b}'[:1]"]
)
def test_defaults_of_ones_own_class_do_not_stand_in_the_way_of_a_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str
) -> None:
    code = REWARDS["bare"].replace(
        "class R:\n", f"class R:\n    def __init__(self, {init}):\n        self.stop = stop\n"
    )
    word = own(tmp_path, monkeypatch, code)
    first, _ = train(tmp_path, *OWN, "evaluate.test=false", word)
    assert train(tmp_path, *OWN, "evaluate.test=false", word)[0] == json.loads(json.dumps(first))


def test_a_fault_in_ones_own_constructor_is_shown_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = REWARDS["bare"] + "    def __init__(self):\n        undefined_thing\n"
    with pytest.raises(Exception, match="undefined_thing") as caught:
        train(tmp_path, *OWN, own(tmp_path, monkeypatch, code))
    assert not isinstance(caught.value, UserError)


def test_a_bad_file_beside_the_others_does_not_hide_them(tmp_path: Path) -> None:
    (tmp_path / "algo").mkdir()
    (tmp_path / "algo" / "mine.yaml").write_text("name: mine\nstage: rl\nalgo: {_target_: no_such_module.Mine}\n")
    listed = command("list", "--config-dir", str(tmp_path))
    assert listed.returncode == 0 and "no module 'no_such_module'" in listed.stdout and "+algo=esrl" in listed.stdout
    (tmp_path / "algo" / "mine.yaml").write_text("name: [mine\n")
    listed = command("list", "--config-dir", str(tmp_path))
    assert listed.returncode == 2 and "mine.yaml: not valid YAML" in listed.stderr


@pytest.mark.parametrize(("words", "by"), [(["algo.epochs=0.5"], "algo.epochs"), (["algo.steps=2"], "algo.steps")])
def test_a_data_set_ends_by_epochs_or_steps(tmp_path: Path, words: list[str], by: str) -> None:
    sft = ["+algo=sft", *SMALL_SEQ2SEQ, "data=rnnlg", *SMALL_RUN, "algo.batch_size=8", "algo.warmup=0"]
    assert train(tmp_path, *sft, "evaluate.test=false", *words)[0]["ended_by"] == by


def test_settings_of_a_launcher_without_a_sweep(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = cli("train", "+algo=sft", "hydra.launcher.gpus_per_node=4")
    assert code == 2 and "add -m and hydra/launcher=NAME" in err and err.count("\n") == 1
    code, _, err = cli("train", "-m", "+algo=esrl", "hydra/launcher=submitit_slrum", "seed=1")
    assert (
        code == 2 and "hydra/launcher=submitit_slrum: there is no such launcher. Did you mean 'submitit_slurm'?" in err
    )

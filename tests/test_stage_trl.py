"""Stage ``trl``: runs of TRL's trainers have what every run has, and go on after a kill as if there had been none."""

from __future__ import annotations

import pytest
from running import SMALL_CAUSAL, SMALL_RL, SMALL_RUN, command, composed, lines, train
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from verifying import verified, words_of

from alignkit import policy
from alignkit.algos.trl_dpo import TrlDPO
from alignkit.algos.trl_grpo import TrlGRPO
from alignkit.errors import UserError
from alignkit.loading import read_tokenizer
from alignkit.reward_model import load
from alignkit.stages.trl import configured

NAMES = ["trl_sft", "trl_dpo", "trl_kto", "trl_reward", "trl_grpo", "trl_rloo"]
OFFLINE = [*SMALL_RUN, *SMALL_CAUSAL, "algo.batch_size=8", "algo.steps=3", "evaluate.every=2", "run.save_every=2"]
ONLINE = [*SMALL_RL, "evaluate.every=2", "algo.k=4", "run.save_every=2"]


@pytest.mark.parametrize("name", ["trl_dpo", "trl_kto", "trl_sft"])
def test_a_run_from_scratch_has_what_every_run_has(name, tmp_path):
    """The start model, which is nowhere on disk, is written where TRL looks for the reference."""
    result, run = train(
        tmp_path, f"+algo={name}", *OFFLINE, *(["data=polite"] if name != "trl_sft" else ["data=rnnlg"])
    )
    assert (result["status"], result["steps"], result["ended_by"]) == ("finished", 3, "algo.steps")
    assert {"config.yaml", "command.txt", "data.json", "environment.json", "metrics.jsonl", "result.json", "final"} <= {
        p.name for p in run.iterdir()
    }
    logged = lines(run / "metrics.jsonl")
    assert [line["step"] for line in logged] == [1, 2, 3]
    assert all({"loss", "lr", "grad_norm", "trl/epoch", "seconds/train"} <= set(line) for line in logged)
    assert [any(k.startswith("dev/") for k in line) for line in logged] == [False, True, True]
    assert logged[0]["lr"] == 0, "TRL's warm-up begins at 0"
    kept = sorted(p.name for p in run.glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-3"]
    assert all(
        (run / one / f).exists() for one in kept for f in ("optimizer.pt", "trainer_state.json", "state/run.json")
    )
    assert (run / "start").is_dir() == (name != "trl_sft")
    AutoModelForCausalLM.from_pretrained(run / "final")
    assert read_tokenizer(str(run / "final"))("a")["input_ids"][-1] == 2, "the tokenizer is the run's own again"
    assert ("preference_accuracy" in result["evaluation"]["after"]["test"]) == (name != "trl_sft")


def test_a_reward_model_of_trl_is_one_of_alignkit(tmp_path):
    result, run = train(tmp_path, "+algo=trl_reward", "data=polite", *OFFLINE, "run.keep=1")
    model = load(str(run))
    model.check()
    AutoModelForSequenceClassification.from_pretrained(run / "final")
    taken = next(line for line in lines(run / "metrics.jsonl") if line["step"] == result["best"]["step"])
    assert result["training"]["preference_accuracy"] == taken["preference_accuracy"]
    assert 0 <= result["evaluation"]["after"]["test"]["preference_accuracy"]["value"] <= 100


def test_samples_are_counted_kept_and_measured_before_and_after(tmp_path, cli):
    words = ["model=tiny_arithmetic", "algo.trl.num_iterations=2", "algo.steps=4", "run.samples_every=2"]
    result, run = train(tmp_path, "+algo=trl_grpo", *ONLINE, *words)
    assert result["samples"] == 2 * 16, "two samplings of 4 prompts, 4 responses each"
    logged, samples = lines(run / "metrics.jsonl"), lines(run / "samples.jsonl")
    assert {line["step"] for line in samples} == {1, 3}
    assert len(samples) == 32 and all(line["score"] in (0.0, 1.0) for line in samples)
    first = [line["score"] for line in samples if line["step"] == 1]
    assert logged[1]["reward"] == pytest.approx(sum(first) / 16)  # line 0 is the start on dev
    assert 0 < logged[1]["length"] <= 8
    assert set(result["evaluation"]) == {"before", "after"} and "difference" in result["evaluation"]["after"]
    code, out, err = cli("compare", str(run), str(run))
    assert code == 0, err
    assert "exact match" in out


@pytest.mark.parametrize("setting", ["run.save_every=3", "evaluate.every=3"])
def test_a_checkpoint_between_samplings_is_refused(setting, tmp_path):
    with pytest.raises(UserError, match=rf"{setting}.*a multiple of 2\."):
        train(tmp_path, "+algo=trl_grpo", *ONLINE, *SMALL_CAUSAL, "algo.trl.num_iterations=2", setting)


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_decoder_is_refused_with_the_reason(name, tmp_path):
    """By its configuration: the folder has no weights to read."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    (tmp_path / "model" / "model.safetensors").write_text("")
    words = ["model=hf", f"model.path={tmp_path}/model", *SMALL_RUN]
    with pytest.raises(UserError, match="its encoder reads the answer"):
        train(tmp_path, f"+algo={name}", *words)


def test_what_else_is_refused(tmp_path):
    with pytest.raises(UserError, match="3 rows are left, and TRL wants 4 at once"):
        train(tmp_path, "+algo=trl_rloo", *ONLINE, *SMALL_CAUSAL, "data.limit=3")
    with pytest.raises(UserError, match="choose one with reward=NAME"):
        train(tmp_path, "+algo=trl_grpo", *ONLINE, *SMALL_CAUSAL, "reward=null")
    with pytest.raises(UserError, match=r"algo: .*trl\.max_stepz.*Did you mean 'max_steps'"):
        train(tmp_path, "+algo=trl_sft", *OFFLINE, "algo.trl.max_stepz=3")
    with pytest.raises(UserError, match=r"algo\.trl\.loss_type: TRL .* has no 'none_such'"):
        train(tmp_path, "+algo=trl_sft", *OFFLINE, "algo.trl.loss_type=none_such")


def test_adapters_are_trained_by_trl_and_merged(tmp_path):
    """With a KL, whose reference is then a second adapter."""
    words = ["model=tiny_arithmetic", "model.lora.r=2", "algo.kl=0.1", "algo.steps=2", "evaluate.final=last"]
    _, run = train(tmp_path, "+algo=trl_grpo", *ONLINE, *words)
    assert (run / "checkpoint-2" / "adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(run / "final")
    assert not (run / "final" / "adapter_config.json").exists()


def test_killed_between_two_samplings_it_ends_where_an_unbroken_run_does(tmp_path):
    """SIGKILL at a checkpoint and in the step after it, in real processes; two steps go by the same samples."""
    done = verified(*words_of("trl_grpo", tmp_path), "algo.trl.num_iterations=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK: the same to the last bit" in done.stdout


# ---- values that TRL does not know -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "word", "says"),
    [
        ("trl_grpo", "loss_type=grop", "loss_type: TRL {trl} has no 'grop'. Did you mean 'grpo'?"),
        ("trl_grpo", "scale_rewards=foo", "scale_rewards: TRL {trl} has no 'foo'. There is: batch, group, none."),
        ("trl_grpo", "epsilon=abc", "epsilon: must be float, is 'abc'."),
        ("trl_grpo", "epsilon=null", "epsilon: must be float, is None."),
        ("trl_grpo", "num_iterations=0", "num_iterations: must be at least 1, is 0."),
        ("trl_grpo", "steps_per_generation=abc", "steps_per_generation: must be int | None, is 'abc'."),
        ("trl_grpo", "optim=adamw_foo", "optim: TRL {trl} has no 'adamw_foo'. Did you mean 'adamw_torch'?"),
        ("trl_rloo", "reward_clip_range=[1.0]", "reward_clip_range: must be tuple[float, float] | None, is [1.0]."),
        ("trl_rloo", "normalize_advantages=1", "normalize_advantages: must be bool, is 1."),
        ("trl_dpo", "loss_type=ippo", "loss_type: TRL {trl} has no 'ippo'. Did you mean 'ipo'?"),
        ("trl_dpo", "loss_type=[sigmoid,ippo]", "loss_type: TRL {trl} has no 'ippo'. Did you mean 'ipo'?"),
        ("trl_dpo", "loss_weights=[a]", "loss_weights: must be list[float] | None, is ['a']."),
        ("trl_kto", "loss_type=kot", "loss_type: TRL {trl} has no 'kot'. Did you mean 'kto'?"),
        ("trl_sft", "packing_strategy=bdf", "packing_strategy: TRL {trl} has no 'bdf'. Did you mean 'bfd'?"),
        ("trl_reward", "center_rewards_coefficient=x", "center_rewards_coefficient: must be float | None, is 'x'."),
    ],
)
def test_a_wrong_value_is_one_line_before_a_model_is_built(name, word, says, cli, monkeypatch, tmp_path):
    import trl

    monkeypatch.setattr(policy, "load", lambda *a: pytest.fail("built"))
    monkeypatch.setattr("alignkit.reward_model.build", lambda *a: pytest.fail("built"))
    words = [f"+algo={name}", *SMALL_RUN, "algo.steps=2", f"algo.trl.{word}"]
    for more in ([], ["--dry-run"]):
        code, _, err = cli("train", *words, *more)
        assert (code, err) == (2, f"error: algo.trl.{says.format(trl=trl.__version__)}\n")
    assert not list(tmp_path.glob("runs/*/*")), "nothing was begun"


def test_a_dry_run_refuses_what_a_run_does(cli, monkeypatch):
    monkeypatch.setattr(policy, "load", lambda *a: pytest.fail("built"))
    for words, says in (
        (["reward=null"], "trl_grpo goes by a reward: choose one with reward=NAME"),
        (["model.device=cuda:1"], "model.device=cuda:1: TRL takes the first device"),
        (
            ["run.save_every=3", "algo.trl.num_iterations=2"],
            "run.save_every=3: TRL learns 2 steps from the same samples",
        ),
    ):
        for more in ([], ["--dry-run"]):
            code, _, err = cli("train", "+algo=trl_grpo", *ONLINE, *SMALL_CAUSAL, *words, *more)
            assert code == 2 and err.startswith(f"error: {says}") and err.count("\n") == 1, err


def test_every_word_of_trl_is_taken():
    """By TRL's documentation; of DPO one word stands for a list of it, of GRPO a truth value for a word."""
    cfg = composed(["+algo=trl_grpo", "model.device=cpu"])
    for loss in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"):
        assert configured(cfg, TrlGRPO(trl={"loss_type": loss}), 1, 1).loss_type == loss
    for given, made in ((True, "group"), (False, "none"), ("batch", "batch")):
        assert configured(cfg, TrlGRPO(trl={"scale_rewards": given}), 1, 1).scale_rewards == made
    losses = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
              "apo_down", "discopop", "sft", "sigmoid_norm"]  # fmt: skip
    assert configured(cfg, TrlDPO(trl={"loss_type": losses}), 1, 2).loss_type == losses
    assert configured(cfg, TrlDPO(trl={"loss_type": "ipo"}), 1, 2).loss_type == ["ipo"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["algo.trl.lr_scheduler_kwargs={foo: 1}"], r"^algo\.trl\.lr_scheduler_kwargs: TRL .* refuses it: .*'foo'$"),
        (["algo.trl.optim=adamw_bnb_8bit"], r"^algo\.trl: TRL .* refuses it: You need to install `bitsandbytes`"),
        (["algo.trl.loss_type=exo_pair"], r"^algo\.trl\.loss_type: TRL .* refuses it: Label smoothing must be"),
    ],
)
def test_what_trl_finds_out_later_names_the_setting(words, says, tmp_path):
    with pytest.raises(UserError, match=says):
        train(tmp_path, "+algo=trl_dpo", *OFFLINE, *words)


class Failing:
    def __call__(self, batch):
        raise ValueError("epsilon is not what this reward expects")


def test_an_error_of_a_reward_stays_one(tmp_path):
    words = [*ONLINE, *SMALL_CAUSAL, "reward._target_=test_stage_trl.Failing", "algo.trl.epsilon=0.1"]
    with pytest.raises(ValueError, match="epsilon is not what this reward expects"):
        train(tmp_path, "+algo=trl_grpo", *words)


# ---- what is said ------------------------------------------------------------------------------------------------


def said(out: str, name: str) -> str:
    return next(line for line in out.split("\n") if line.startswith(f"{name} ")).removeprefix(name).strip()


@pytest.mark.parametrize(
    ("more", "passes", "sampled", "samples"),
    [
        # 4 prompts of 4 responses of up to 8 tokens; in 3 steps 2 samplings, one for steps 1 and 2, one for step 3
        (["algo.trl.num_iterations=2"], "0.20", "at most 128 tokens a sampling, 256 in all (2 samplings of 16 responses).", 32),
        # a sampling for each of the 6 micro-batches of 8 responses, to 2 prompts
        (["algo.trl.gradient_accumulation_steps=2", "algo.trl.steps_per_generation=1"], "0.30",
         "at most 64 tokens a sampling, 384 in all (6 samplings of 8 responses).", 48),
        # one for 4 of the 6 micro-batches of 8: 32 responses, to 8 prompts
        (["algo.trl.gradient_accumulation_steps=2", "algo.trl.steps_per_generation=4"], "0.40",
         "at most 256 tokens a sampling, 512 in all (2 samplings of 32 responses).", 64),
    ],
)  # fmt: skip
def test_a_dry_run_counts_what_a_run_draws(more, passes, sampled, samples, cli, tmp_path):
    words = ["+algo=trl_grpo", *ONLINE, *SMALL_CAUSAL, "algo.steps=3", *more]
    code, out, err = cli("train", *words, "--dry-run")
    assert code == 0, err
    assert (
        said(out, "steps")
        == f"3 optimizer updates of 4 prompts with 4 samples (algo.k), {passes} passes over the rows."
    )
    assert said(out, "sampled") == sampled
    assert said(out, "trained") == "at most 128 response tokens a step, 384 in all."
    result, _ = train(tmp_path, *words)
    assert result["samples"] == samples


@pytest.mark.parametrize(("name", "like"), [("trl_dpo", "dpo"), ("trl_kto", "kto"), ("trl_reward", "bt")])
def test_a_dry_run_counts_both_responses_of_a_pair(name, like, cli):
    words = [*SMALL_RUN, *SMALL_CAUSAL, "algo.batch_size=8", "algo.steps=3"]
    theirs, ours = (cli("train", f"+algo={one}", *words, "--dry-run")[1] for one in (name, like))
    assert said(theirs, "trained") == said(ours, "trained")


def test_a_run_is_quiet_but_for_what_was_given(tmp_path):
    """No warning of names that TRL and transformers use themselves, nor of wandb's address; of a setting that was given there is."""
    given = ["algo.trl.truncation_mode=keep_end", "algo.trl.gradient_checkpointing_kwargs={use_reentrant: false}"]
    words = [*OFFLINE, "run.wandb=offline", *given, f"run.root={tmp_path}"]
    done = command("train", "+algo=trl_dpo", *words)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.split("\n") if "warning:" in line.lower() and "algo.warmup" not in line]
    assert len(told) == 2 and "`truncation_mode='keep_start'`" in told[0], done.stderr
    assert "`gradient_checkpointing_kwargs` is deprecated" in told[1] and "wandb" not in done.stderr, done.stderr


def test_the_shipped_pairs_are_not_for_a_model_of_arithmetic():
    for name in ("trl_dpo", "trl_kto", "trl_reward"):
        cfg = composed([f"+algo={name}"])
        assert cfg.data.train == "bundled:polite_preference.train.jsonl" and cfg.model.path is None

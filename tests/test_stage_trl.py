"""Stage ``trl``: runs of TRL's trainers have what every run has, and go on after a kill as if there had been none."""

from __future__ import annotations

import pytest
from running import SMALL_CAUSAL, SMALL_RL, SMALL_RUN, lines, train
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from verifying import verified, words_of

from alignkit.errors import UserError
from alignkit.loading import read_tokenizer
from alignkit.reward_model import load

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
    with pytest.raises(UserError, match=r"TRL .* refuses it: .*loss_type"):
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

"""The RL loop as a whole, through the real ``train``: resume, the KL, schedules, the ledger, adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from running import SMALL_CAUSAL, SMALL_RL, SMALL_SEQ2SEQ, composed, lines, train
from safetensors.torch import load_file
from test_invariance import METHODS, takes

from alignkit import ops
from alignkit.config import check
from alignkit.errors import Stopped, UserError
from alignkit.run import Run
from alignkit.verify import without_clock

QUICK = [*SMALL_RL, "evaluate.every=0", "evaluate.test=false", "run.samples_every=0"]
LORA = ["model.lora.r=2", "model.lora.alpha=4"]


def metrics(run: Path) -> list[dict]:
    return without_clock(run / "metrics.jsonl")


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    end_step = Run.end_step

    def stopping(self: Run, done: int, *rest: object) -> None:
        self.stop_asked = done == step
        end_step(self, done, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "end_step", stopping)


# ---- stop and resume -------------------------------------------------------------------------------------------------

ONCE = ["algo.epochs=1", "algo.minibatches=1"]
CASES = {
    **{name: [f"+algo={name}", *SMALL_CAUSAL, *ONCE] for name in METHODS},
    "dapo": ["+algo=dapo", *SMALL_CAUSAL, "algo.refills=1"],
    "ppo-seq2seq": ["+algo=ppo", *SMALL_SEQ2SEQ, "algo.epochs=2"],
    "mrt-seq2seq": ["+algo=mrt", *SMALL_SEQ2SEQ],
    "ppo-controller": ["+algo=ppo", *SMALL_CAUSAL, *ONCE, "algo.kl_target=0.5", "algo.kl_horizon=20"],
    "ppo-shared-histogram": [
        "+algo=ppo",
        *SMALL_CAUSAL,
        *ONCE,
        "algo.critic.trunk=shared",
        "algo.critic.loss=hl_gauss",
    ],
    "ppo-lora": ["+algo=ppo", *SMALL_CAUSAL, *ONCE, *LORA],
    "ma_ppo-randomized": ["+algo=ma_ppo", *SMALL_CAUSAL, "algo.termination=randomized"],
    "reinforce-schedule": ["+algo=reinforce", *SMALL_CAUSAL, "algo.kl={start: 0.5, end: 0.1}"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_ends_where_an_unbroken_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Weights, critic, optimizer, KL coefficient and queues come back bit for bit."""
    words = [*CASES[case], *QUICK, "run.save_every=2", "algo.lr=1e-3"]
    whole, whole_dir = train(tmp_path / "whole", *words)
    with monkeypatch.context() as m:
        stop_after(3, m)
        with pytest.raises(Stopped, match="after step 3"):
            train(tmp_path / "broken", *words)
    broken, broken_dir = train(tmp_path / "broken", *words)
    assert (broken["resumes"], broken["steps"]) == (1, 6)
    assert broken["weights_sha256"] == whole["weights_sha256"]
    assert metrics(broken_dir) == metrics(whole_dir)
    ends = [run / "checkpoint-6" / "state" for run in (whole_dir, broken_dir)]
    states = [json.loads((end / "run.json").read_text())["algo"] for end in ends]
    assert states[0] == states[1]
    critics = [critic(end) for end in ends]
    assert critics[0] == critics[1]
    assert bool(critics[0]) == (case.split("-")[0] in ("ppo", "ma_ppo", "esrl_released"))


def critic(state: Path) -> list[bytes]:
    """A saved critic's weights in some order: under which of its names a tied weight is saved is left open."""
    path = state / "critic.safetensors"
    return sorted(t.numpy().tobytes() for t in load_file(path).values()) if path.exists() else []


# ---- the KL ----------------------------------------------------------------------------------------------------------

FAST = ["algo.lr=0.02", "algo.warmup=0", "algo.schedule=constant"]


@pytest.mark.parametrize("kl", ["0.0", "0.05"])
def test_the_run_ends_early_above_the_kl_limit(tmp_path: Path, kl: str) -> None:
    """Whether or not a KL is in the reward: after the first step above, with its weights kept and evaluated."""
    words = ["+algo=reinforce", *SMALL_CAUSAL, *SMALL_RL, *FAST, f"algo.kl={kl}", "algo.kl_limit=0.05", "algo.steps=30"]
    result, run = train(tmp_path, *words, "evaluate.every=0", "evaluate.final=last")
    nats = [line["kl"] for line in lines(run / "metrics.jsonl")]
    assert result["status"] == "finished"
    assert len(nats) == result["steps"] < 30
    assert nats[-1] > 0.05
    assert all(n <= 0.05 for n in nats[:-1])
    assert nats[0] == pytest.approx(0.0, abs=1e-4)
    assert (run / f"checkpoint-{result['steps']}").is_dir()
    assert result["evaluation"]["after"]["test"]["bleu"]["n"] == 12
    again, _ = train(tmp_path, *words, "evaluate.every=0", "evaluate.final=last")
    assert again["weights_sha256"] == result["weights_sha256"]


def test_a_run_that_had_ended_early_stays_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed after its last checkpoint and before its final evaluation; repeated, it trains no further."""
    words = ["+algo=reinforce", *SMALL_CAUSAL, *QUICK, *FAST, "algo.kl_limit=0.05", "algo.steps=30"]
    whole, _ = train(tmp_path / "whole", *words)

    def killed(self: Run, *rest: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Run, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "broken", *words)
    broken, _ = train(tmp_path / "broken", *words)
    assert (broken["steps"], broken["weights_sha256"]) == (whole["steps"], whole["weights_sha256"])


def test_the_controller_moves_the_coefficient(tmp_path: Path) -> None:
    """Each step from the KL of its own samples: 4 inputs and 2 responses are 8 of 40 samples of the horizon."""
    words = [
        "+algo=ppo",
        *SMALL_CAUSAL,
        *QUICK,
        *FAST,
        *ONCE,
        "algo.kl=0.2",
        "algo.kl_target=0.1",
        "algo.kl_horizon=40",
    ]
    _, run = train(tmp_path, *words)
    coefficient, seen = 0.2, set()
    for line in lines(run / "metrics.jsonl"):
        assert line["kl_coefficient"] == pytest.approx(coefficient), "what the step was charged with"
        coefficient = ops.adapt_kl(coefficient, line["kl"], 0.1, 8, 40)
        seen.add(line["kl"] > 0.1)
    assert seen == {True, False}


@pytest.mark.parametrize("name", ["reinforce", "rloo"])  # without and with a number in its YAML
def test_a_scheduled_kl(tmp_path: Path, name: str) -> None:
    words = [f"+algo={name}", *SMALL_CAUSAL, *QUICK, "algo.kl={start: 0.1, end: 0.01}"]
    _, run = train(tmp_path, *words)
    found = [line["kl_coefficient"] for line in lines(run / "metrics.jsonl")]
    assert found == pytest.approx([0.1, 0.082, 0.064, 0.046, 0.028, 0.01])


@pytest.mark.parametrize(
    "schedule",
    [
        "{start: 0.1}",
        "{end: 0.1}",
        "{start: high, end: 0.1}",
        "{start: null, end: 0.1}",
        "{start: 0.1, end: 0.01, shape: staircase}",
        "{start: 0.1, end: 0.01, stepps: 3}",
        "{start: 0.1, end: 0.0, shape: exponential}",
        "{start: 0.1, end: 0.01, steps: -3}",
        "{}",
    ],
)
def test_a_malformed_schedule_is_refused(schedule: str) -> None:
    """By ``check``, before anything is loaded, under the name of the setting."""
    with pytest.raises(UserError, match=r"algo\.kl\b"):
        check(composed(["+algo=reinforce", *SMALL_CAUSAL, f"algo.kl={schedule}"]))


@pytest.mark.parametrize(
    ("algo", "setting"),
    [
        ("reinforce", "algo.steps"),  # a whole number
        ("reinforce", "algo.normalize"),
        ("ppo", "algo.critic.weight"),  # a float, but nobody moves it
        ("sft", "algo.lr"),
    ],
)
def test_a_schedule_is_refused_where_nothing_follows_it(algo: str, setting: str) -> None:
    with pytest.raises(UserError, match=setting.replace(".", r"\.")):
        check(composed([f"+algo={algo}", *SMALL_CAUSAL, f"{setting}={{start: 2, end: 1}}"]))


def test_good_schedules_pass() -> None:
    for schedule in ("{start: 0.1, end: 0.01, shape: exponential, steps: 50}", "{start: 1, end: 0, shape: cosine}"):
        check(composed(["+algo=reinforce", *SMALL_CAUSAL, f"algo.kl={schedule}"]))
    check(composed(["+algo=ppo", *SMALL_CAUSAL, "algo.clip={start: 0.3, end: 0.1}"]))


# ---- sampling and scoring are of one distribution --------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in METHODS if takes(n, "temperature")])
def test_before_the_first_update_nothing_has_moved(tmp_path: Path, name: str) -> None:
    """The ratio to the sampling pass is 1, and the KL to the start model 0, also of a tempered policy."""
    words = [f"+algo={name}", *SMALL_CAUSAL, *QUICK, *ONCE, "algo.temperature=0.6", "algo.kl_limit=1e9"]
    _, run = train(tmp_path, *words, "algo.steps=1", "algo.warmup=0")
    line = lines(run / "metrics.jsonl")[0]
    assert line["log_ratio"] == pytest.approx(0.0, abs=1e-4)
    assert line["kl"] == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "small"), [("reinforce", SMALL_CAUSAL), ("ppo", SMALL_CAUSAL), ("ppo", SMALL_SEQ2SEQ)],
    ids=["reinforce-causal", "ppo-causal", "ppo-seq2seq"],
)  # fmt: skip
@pytest.mark.parametrize("compute", ["same", "bfloat16"])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, name: str, small: list[str], compute: str) -> None:
    words = [f"+algo={name}", *small, *QUICK, *ONCE, "algo.steps=1", "algo.warmup=0", "algo.kl=0.1"]
    words.append(f"model.compute={compute}")
    _, plain = train(tmp_path, *words)
    _, recomputed = train(tmp_path, *words, "model.gradient_checkpointing=true")
    assert plain != recomputed
    one, other = metrics(plain)[0], metrics(recomputed)[0]
    assert one["grad_norm"] > 0
    for key in ("loss", "grad_norm", "reward", "kl"):
        # rows that share a prompt are read otherwise, which rounds otherwise
        assert other[key] == pytest.approx(one[key], rel=1e-4 if compute == "same" else 1e-2, abs=1e-6), key


@pytest.mark.parametrize("small", [SMALL_CAUSAL, SMALL_SEQ2SEQ], ids=["causal", "seq2seq"])
def test_half_precision_samples_and_trains(tmp_path: Path, small: list[str]) -> None:
    """Both passes are in bfloat16, so that the ratio is near 1; what is saved is float32 and has moved."""
    words = ["+algo=ppo", *small, *QUICK, *ONCE, "algo.warmup=0", "algo.steps=2", "algo.lr=1e-3"]
    _, run = train(tmp_path, *words, "model.compute=bfloat16", "run.save_every=1")
    assert lines(run / "metrics.jsonl")[0]["log_ratio"] < 0.05
    one, other = (load_file(run / f"checkpoint-{n}" / "model.safetensors") for n in (1, 2))
    assert {t.dtype for t in other.values()} == {torch.float32}
    assert any(not torch.equal(one[k], other[k]) for k in one)


# ---- adapters --------------------------------------------------------------------------------------------------------


def test_adapters_are_their_own_reference(tmp_path: Path) -> None:
    """The KL to the model with its adapter off begins at 0 and grows; a checkpoint holds adapters alone."""
    words = ["+algo=reinforce", *SMALL_CAUSAL, *QUICK, *LORA, *FAST, "algo.lr=0.1", "algo.kl=0.01"]
    result, run = train(tmp_path, *words)
    nats = [line["kl"] for line in lines(run / "metrics.jsonl")]
    assert nats[0] == pytest.approx(0.0, abs=1e-4)
    assert max(map(abs, nats[1:])) > 1e-3
    assert (run / "checkpoint-6" / "adapter_model.safetensors").exists()
    assert not (run / "checkpoint-6" / "model.safetensors").exists()
    assert (run / "final" / "model.safetensors").exists()
    assert result["steps"] == 6


# ---- the ledger ------------------------------------------------------------------------------------------------------


def first_line(tmp_path: Path, *words: str) -> dict:
    _, run = train(tmp_path, *words, *SMALL_CAUSAL, *QUICK, "algo.steps=1", "algo.warmup=0")
    return lines(run / "metrics.jsonl")[0]


@pytest.fixture(scope="module")
def mrt_lines(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """A step of MRT with and without the reference in its set: the samples are the same."""
    root = tmp_path_factory.mktemp("mrt")
    return tuple(first_line(root, "+algo=mrt", f"algo.gold={gold}") for gold in ("true", "false"))  # type: ignore[return-value]


@pytest.mark.parametrize("key", ["samples", "tokens/sampled"])
def test_references_are_not_samples(mrt_lines: tuple[dict, dict], key: str) -> None:
    """Nobody sampled the reference, so it is no cost."""
    assert mrt_lines[0][key] == mrt_lines[1][key]


@pytest.mark.parametrize("key", ["reward", "length", "cut_off"])
def test_metrics_of_a_step_are_of_the_samples(mrt_lines: tuple[dict, dict], key: str) -> None:
    """They say how the policy does, which a reference among the candidates must not flatter."""
    assert mrt_lines[0][key] == pytest.approx(mrt_lines[1][key], rel=1e-5)


def test_dropped_responses_cost_their_tokens(tmp_path: Path) -> None:
    """Half of the inputs leave after they were generated: as many sampled tokens, fewer trained ones."""
    words = ["+algo=esrl_released", "reward=length"]
    dropped, everyone = (first_line(tmp_path, *words, f"algo.drop={share}") for share in (0.5, 0.0))
    assert dropped["tokens/sampled"] == everyone["tokens/sampled"] > 0
    assert dropped["tokens/trained"] < everyone["tokens/trained"]


def test_epochs_count_as_trained_tokens(tmp_path: Path) -> None:
    once, thrice = (first_line(tmp_path, "+algo=ppo", f"algo.epochs={n}") for n in (1, 3))
    assert once["tokens/sampled"] == thrice["tokens/sampled"] == once["tokens/trained"]
    assert thrice["tokens/trained"] == 3 * once["tokens/trained"]


def test_a_critic_has_a_rate_of_its_own(tmp_path: Path) -> None:
    """lr 0 leaves the policy as it is, while the critic's weights move."""
    words = ["+algo=ppo", *SMALL_CAUSAL, *QUICK, *ONCE, "algo.lr=0", "algo.warmup=0", "algo.critic.lr=0.01"]
    _, run = train(tmp_path, *words, "run.save_every=1", "run.keep=6")
    first, last = run / "checkpoint-1", run / "checkpoint-6"
    assert (first / "model.safetensors").read_bytes() == (last / "model.safetensors").read_bytes()
    one, other = (load_file(path / "state" / "critic.safetensors") for path in (first, last))
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert any(not torch.equal(one[k], other[k]) for k in one if k.startswith("trunk"))

"""What is looked for before the first step: found where it is, silent where it is not, and no number changed by it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from running import SMALL_CAUSAL, SMALL_RL, SMALL_SEQ2SEQ, SMALL_SFT, composed, lines, train
from verifying import METHODS, stage_of, words_of

from alignkit import preflight
from alignkit.data import Data
from alignkit.errors import UserError
from alignkit.policy import Policy, load
from alignkit.rewards.mix import Mix
from alignkit.rewards.rule import Constant, Length
from alignkit.run import hash_weights
from alignkit.verify import without_clock

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def chat(i: int = 0, system: str = "") -> dict[str, Any]:
    turns = [{"role": "system", "content": system}] if system else []
    return {
        "prompt": [*turns, {"role": "user", "content": "the cat sat"}],
        "response": "Lieder",
        "references": ["Lieder"],
        "id": i,
    }


# ---- it changes nothing ----------------------------------------------------------------------------------------------

NO_PREFLIGHT = ("rl", "fit", "refine")


@pytest.mark.parametrize(
    "name", ["esrl", "ppo", "mrt_two_stage", "dpo", "kto", "pcrm", "sft", "kd", "ksm", "on_policy_kd", "inverse_value", "best_of_n"]
)  # fmt: skip
def test_a_run_is_the_same_to_the_last_bit_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Dropout, samplers, queues, the scale of losses, the critic: all as if nobody had looked."""
    words = words_of(name, tmp_path / "made")
    words += [] if stage_of(name) == "refine" else ["algo.steps=3", "algo.warmup=1"]
    words += ["algo.phases=1", "algo.episodes=1", "algo.loss_scale=init_mean"] if name == "ksm" else []
    words += ["data.limit=4"] if name == "best_of_n" else []
    words += ["evaluate.bootstrap=20", "run.wandb=disabled"]
    looked, looked_dir = train(tmp_path / "looked", *words)
    with monkeypatch.context() as m:
        for one in NO_PREFLIGHT:
            m.setattr(preflight, one, lambda *given: None)
        plain, plain_dir = train(tmp_path / "plain", *words)
    assert hash_weights(looked_dir / "final") == hash_weights(plain_dir / "final")
    assert without_clock(looked_dir / "metrics.jsonl") == without_clock(plain_dir / "metrics.jsonl")
    assert looked.get("data_sha256") == plain.get("data_sha256")
    kept = set(lines(looked_dir / "metrics.jsonl")[-1]) == set(lines(plain_dir / "metrics.jsonl")[-1])
    assert kept, "the ledger has something of it"


def test_it_runs_the_longest_rows_and_leaves_no_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 rows the two longest, 4 tokens more each than all others, at the micro-batch that holds both."""
    file = tmp_path / "rows.jsonl"
    rows = [{"q": f"a{i}", "a": "b" * (30 if i in (7, 23) else 3)} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen: list[list[int]] = []
    attempt = preflight._try

    def watched(run: Any, model: Any, optimizer: Any, longest: Any, loss: Any) -> None:
        attempt(run, model, optimizer, longest, lambda part: seen.append([r["id"] for r in part.rows]) or loss(part))
        assert all(p.grad is None for p in model.model.parameters())
        assert not optimizer.state

    monkeypatch.setattr(preflight, "_try", watched)
    words = [
        "+algo=sft",
        "data=custom",
        f"data.train={file}",
        "data.prompt='{q}'",
        "data.response='{a}'",
        *SMALL_SEQ2SEQ,
    ]
    train(tmp_path, *words, "algo.batch_size=2", "algo.steps=20", "run.wandb=disabled", "evaluate.every=0")
    assert [sorted(ids) for ids in seen] == [[7, 23]]


def test_the_longest_samples_fill_the_micro_batch(policy: Policy, rows: Any) -> None:
    """Prompts of p tokens and k responses of 5: as many groups as micro_tokens holds, but one at least."""
    algo = SimpleNamespace(k=3, prompts_per_step=4, minibatches=1, max_new_tokens=5, micro_tokens=1)
    data = rows(6)
    longest = max(len(ids) for ids in policy.encode_prompts(data))
    part = preflight._longest_samples(policy, algo, data)
    assert part.response_ids.shape == (3, 5) and part.mask.all()
    assert part.prompt_ids.shape[1] == longest
    algo.micro_tokens = 10**6
    assert len(preflight._longest_samples(policy, algo, data)) == 12
    algo.k_max = 4
    assert len(preflight._longest_samples(policy, algo, data)) == 16


# ---- memory ----------------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from alignkit import cli, preflight, run

def limit():
    with open("/proc/self/status") as f:
        size = next(int(line.split()[1]) for line in f if line.startswith("VmSize")) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + 250 * 2**20,) * 2)
{where}
cli.main(sys.argv[1:])
"""
BEFORE = "old = preflight._try\npreflight._try = lambda *given: (limit(), old(*given))"
IN_STEP_3 = """
preflight.fit = lambda *given: None
update = run.Run.update
def limited(self, optimizer, loss, parts, norm, step, rates):
    if step == 2: limit()
    return update(self, optimizer, loss, parts, norm, step, rates)
run.Run.update = limited
"""


def limited(where: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A run whose batches are too large for a process that may have 250 MB more than it has when the limit is set."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"q": f"{i} what", "a": f"{i} " + "word " * 60}) + "\n" for i in range(3000)))
    words = ["+algo=sft", "data=custom", f"data.train={file}", "data.prompt='{q}'", "data.response='{a}'", "model=tiny_seq2seq",
             "algo.batch_size=2000", "algo.micro_tokens=1000000", "algo.steps=4", "run.save_every=1", "run.threads=1",
             "run.wandb=disabled", "evaluate.every=0", "algo.warmup=1", f"run.root={tmp_path}/runs"]  # fmt: skip
    if "update" in where:
        words = [w for w in words if "micro_tokens" not in w and "batch_size" not in w] + ["algo.batch_size=8"]
    script = LIMITED.format(where=where)
    return subprocess.run(
        [sys.executable, "-c", script, "train", *words], capture_output=True, text=True, timeout=300, check=False
    )


def test_too_large_a_batch_is_found_before_the_first_step(tmp_path: Path) -> None:
    """The system's own limit on the address space; no directory is left behind."""
    done = limited(BEFORE, tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "out of memory in phase update (the longest batch, before the first step: 2000 rows × " in done.stderr
    assert (
        "algo.micro_tokens (now 1000000), model.gradient_checkpointing (now false), algo.max_response_tokens (now "
        in done.stderr
    )
    assert "No step was done yet." in done.stderr
    assert not list((tmp_path / "runs").glob("sft-*/metrics.jsonl"))


def test_a_step_that_does_not_fit_says_what_is_not_lost(tmp_path: Path) -> None:
    where = IN_STEP_3.replace(
        "if step == 2: limit()", "if step == 2:\n        limit()\n        return [bytearray(2**30)]"
    )
    done = limited(where, tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "out of memory in phase update" in done.stderr
    assert "Nothing that was computed up to step 2 is lost" in done.stderr
    assert [p.name for p in (tmp_path / "runs").glob("sft-*/checkpoint-2")] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_is_want_of_memory(error: Exception, is_one: bool) -> None:
    assert preflight.out_of_memory(error) == is_one


@pytest.mark.parametrize(
    ("words", "phase", "named"),
    [
        (["+algo=esrl", *SMALL_RL], "update", ["algo.micro_tokens (now 4096)", "model.gradient_checkpointing (now false)",
                                              "algo.max_new_tokens (now 8)"]),
        (["+algo=esrl", *SMALL_RL], "sample", ["algo.prompts_per_step (now 4)", "algo.max_new_tokens (now 8)", "algo.k_max (now 12)"]),
        (["+algo=dpo"], "evaluate", ["evaluate.batch_size (now 250)", "evaluate.max_new_tokens (now 64)"]),
        (["+algo=best_of_n"], "refine", ["algo.rows_per_part (now 64)", "algo.max_new_tokens (now 64)"]),
    ],
)  # fmt: skip
def test_the_settings_that_help_are_named_with_their_values(
    tmp_path: Path, words: list[str], phase: str, named: list[str]
) -> None:
    run: Any = SimpleNamespace(cfg=composed([*words, f"run.root={tmp_path}"]), home=tmp_path)
    text = preflight.too_large(run, phase, "", MemoryError())
    assert all(name in text for name in named), text


# ---- tokens and template ---------------------------------------------------------------------------------------------


def test_a_right_template_is_silent(tiny_causal: Policy) -> None:
    tiny_causal.tokenizer.chat_template = CHATML
    assert preflight.lint(tiny_causal, [chat(0), chat(1, "be kind")]) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
            "",
            r"renders no generation prompt \('<\|assistant\|>'\)",
        ),
        ("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}", "leaves out the system message"),
        ("</s>\n", "<|end|>\n", r"ends a turn with '<\|end\|>', but responses end with '</s>'"),
        ("{% for m in messages %}", "<s><s>{% for m in messages %}", r"2 of 2 prompts begin with two '<s>'"),
    ],
)
def test_what_a_template_gets_wrong(tiny_causal: Policy, old: str, new: str, message: str) -> None:
    assert old in CHATML
    tiny_causal.tokenizer.chat_template = CHATML.replace(old, new)
    (found,) = preflight.lint(tiny_causal, [chat(0), chat(1, "be kind")])
    assert re.search(message, found), found


def test_a_template_that_needs_no_generation_prompt_is_silent(tiny_causal: Policy) -> None:
    """As Llama 2's and Mistral's: the answer follows the user's turn at once."""
    tiny_causal.tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    assert preflight.lint(tiny_causal, [chat()]) == []


def test_a_row_that_the_template_refuses_is_an_error(tiny_causal: Policy) -> None:
    tiny_causal.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    )
    with pytest.raises(UserError, match=r"row 3: the tokenizer's chat template refuses it: no system role"):
        preflight.lint(tiny_causal, [chat(1), chat(3, "be kind")])


def test_an_end_token_written_as_text_is_told(tiny_causal: Policy, rows: Any) -> None:
    data = [{**row, "response": f"{row['response']}</s>"} if i < 2 else row for i, row in enumerate(rows(4))]
    (found,) = preflight.lint(tiny_causal, data)
    assert "2 of 4 responses end with '</s>' as text" in found


def test_responses_that_are_all_cut_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL_SFT, *SMALL_SEQ2SEQ, "algo.steps=1", "algo.warmup=0", "evaluate.test=false"]
    train(tmp_path, *words, "algo.max_response_tokens=2")
    assert (
        "none of the 8 responses looked at ends with the end-of-sequence token (algo.max_response_tokens=2"
        in capsys.readouterr().err
    )
    train(tmp_path, *words, "algo.max_response_tokens=500")
    assert "none of the" not in capsys.readouterr().err


# ---- the reward ------------------------------------------------------------------------------------------------------


class OfText:
    """A reward that is a function of (row, response), and counts its calls, those of its copies too."""

    def __init__(self, of: Any) -> None:
        self.of, self.own, self.asked = of, 0, []  # type: ignore[var-annotated]

    def __deepcopy__(self, memo: Any) -> OfText:
        copied = OfText(self.of)
        copied.asked = self.asked
        return copied

    def __call__(self, batch: Any) -> list[float]:
        self.own += 1
        self.asked.append(len(batch))
        return [self.of(row, text) for row, text in zip(batch.rows, batch.responses, strict=True)]


def hit(row: Any, text: str) -> float:
    return float(text in row["references"])


def test_a_reward_that_knows_its_references_is_silent_and_asked_once(policy: Policy, rows: Any) -> None:
    reward = OfText(hit)
    assert preflight.ask(reward, rows(30), policy) == []
    assert reward.asked == [24]  # 8 rows: own reference, another's, nothing
    assert reward.own == 0  # it was a copy: one that counts is as it was
    mixed = Mix(rewards={"a": reward, "b": Constant()}, weights={"a": 1.0, "b": 1.0})
    assert preflight.ask(mixed, rows(30), policy) == [] and reward.own == 0 and reward.asked == [24, 24]
    assert preflight.ask(OfText(hit), rows(30)) == []  # without a policy: texts alone


def test_what_a_reward_gets_wrong(policy: Policy, rows: Any) -> None:
    (found,) = preflight.ask(OfText(lambda row, text: 0.25), rows(6), policy)
    assert "the reward gives 0.25 to all of 18 responses" in found
    (found,) = preflight.ask(OfText(lambda row, text: -hit(row, text)), rows(6), policy)
    assert "gives references -1 in the mean and references of other rows 0, more: is its sign right?" in found
    # made-up responses: what the reward cannot do with them need not be a fault, and the run goes on
    (found,) = preflight.ask(OfText(lambda row, text: 1.0 if text else float("nan")), rows(6), policy)
    assert "was not tried on references and empty responses: the reward of row 0 is nan, response ''" in found
    (found,) = preflight.ask(OfText(lambda row, text: 1 / len(text)), rows(6), policy)
    assert "was not tried on references and empty responses: division by zero" in found
    (found,) = preflight.ask(lambda batch: [1.0], rows(6), policy)  # type: ignore[arg-type,return-value]
    assert "the reward gave scores of shape (1,) for 18 responses" in found


def test_a_control_is_one_quiet_line_and_length_none(policy: Policy, rows: Any) -> None:
    assert preflight.ask(Constant(), rows(6), policy) == [
        "note: reward=constant says the same of every response: a control."
    ]
    assert preflight.ask(Length(target=4), rows(6), policy) == []


def test_random_numbers_are_put_back(rows: Any) -> None:
    import random

    import numpy as np

    def noisy(row: Any, text: str) -> float:
        return hit(row, text) + random.random() + float(np.random.rand()) + float(torch.rand(()))

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    wanted = drawn()
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
    preflight.ask(OfText(noisy), rows(6))
    assert drawn() == wanted


# ---- the disk, the record --------------------------------------------------------------------------------------------


def test_checkpoints_that_cannot_fit_are_refused(tmp_path: Path) -> None:
    """A real disk, and ten million checkpoints of 300 kB."""
    words = [*SMALL_SFT, *SMALL_SEQ2SEQ, "run.save_every=1", "evaluate.every=0", "evaluate.test=false"]
    with pytest.raises(
        UserError, match=r"100001 checkpoints of .* lie there at the same time .*are free\. Lower run\.keep"
    ):
        train(tmp_path, *words, "algo.steps=1000000000", "run.keep=100000", "model.config.d_model=256")
    train(tmp_path, *words, "run.keep=1000000000")  # six steps have six


def test_the_size_of_a_checkpoint_is_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the headers of the files: weights, and two numbers of AdamW for each, of a model and its critic."""
    told: list[float] = []
    size = preflight._size
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    monkeypatch.setattr(preflight, "_size", lambda n: told.append(n) or size(n))
    words = ["+algo=ppo", *SMALL_CAUSAL, *SMALL_RL, "run.save_every=1", "evaluate.every=0", "evaluate.test=false"]
    with pytest.raises(UserError, match="are free"):
        train(tmp_path, *words)
    monkeypatch.undo()
    _, run = train(tmp_path, *words)
    kinds = (".safetensors", ".pt")
    written = sum(p.stat().st_size for p in (run / "checkpoint-6").rglob("*") if p.suffix in kinds)
    assert told[0] == pytest.approx(written, rel=0.25)


def test_what_decides_the_numbers_is_recorded(tmp_path: Path) -> None:
    _, run = train(tmp_path, *SMALL_SFT, *SMALL_SEQ2SEQ, "seed=3", "algo.steps=1", "algo.warmup=0")
    found = json.loads((run / "environment.json").read_text())["determinism"]
    assert (found["seed"], found["threads"], found["deterministic_algorithms"]) == (3, 1, False)
    assert {"float32_matmul_precision", "tf32", "cudnn", "environment"} <= set(found)


# ---- no false alarms -------------------------------------------------------------------------------------------------


def bundled() -> dict[str, list[list[str]]]:
    """Model and data that a method takes by default, or the README names → words that choose them, one for each reward."""
    listed = [
        [f"+algo={name}"] for name in METHODS if stage_of(name) in ("rl", "sft", "pref", "refine") and name != "inverse_value"
    ]  # fmt: skip
    listed += [
        ["+algo=reinforce", "model=tiny_arithmetic", "data=arithmetic", f"reward={r}"]
        for r in ("answer", "exact_match")
    ]
    listed += [["+algo=reinforce", f"reward={r}"] for r in ("bleu", "chrf", "bleu_chrf", "slots", "length")]
    listed += [["+algo=esrl", "model=tiny_translation", "data=tatoeba_en_de", "reward=bleu_chrf"]]
    listed += [["+algo=sft", "model=tiny_causal", "data=fairy_tales"]]
    found: dict[str, list[list[str]]] = {}
    rewards = set()
    for words in listed:
        cfg = composed(words)
        if OmegaConf.is_missing(cfg.data, "train"):  # rows of one's own
            continue
        model = cfg.model.path or cfg.model.config.model_type
        key, reward = f"{model}, {cfg.data.train}, {cfg.data.get('response')}", str(cfg.reward)
        if (key, reward) not in rewards:
            rewards.add((key, reward))
            found.setdefault(key, []).append(words)
    return found


BUNDLED = bundled()


@pytest.mark.parametrize("name", BUNDLED)
def test_no_alarm_on_what_is_bundled(name: str) -> None:
    chosen = [composed([*words, "data.limit=100"]) for words in BUNDLED[name]]
    data: Data = instantiate(chosen[0].data, _convert_="object")
    rows = data.rows("train")
    policy = load(OmegaConf.to_object(chosen[0].model), 0, data.texts())  # type: ignore[arg-type]
    assert preflight.lint(policy, rows[: preflight.LOOKED_AT]) == []
    for cfg in chosen:
        if cfg.reward:
            assert preflight.ask(instantiate(cfg.reward, _convert_="object"), rows, policy) == [], cfg.reward

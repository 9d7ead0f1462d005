"""Stage ``trl``: one of TRL's own trainers, called whole, with alignkit's model, rows, reward, evaluation and record."""

from __future__ import annotations

import json
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback, set_seed

from alignkit import preflight
from alignkit.algos._trl import TRL
from alignkit.batch import Batch
from alignkit.data import Data, Row
from alignkit.errors import Stopped, UserError
from alignkit.files import write_atomically
from alignkit.loading import device_of
from alignkit.policy import Policy
from alignkit.reward_model import RewardModel
from alignkit.rewards import Reward, scores_of
from alignkit.run import Run
from alignkit.stages.evaluate import HeldOut
from alignkit.stages.evaluate_rm import HeldOutRewards
from alignkit.stages.pref import References
from alignkit.stages.rm import EXAMPLES, responses_of

# in every log of transformers, or by another name; tokens are counted from 0 again after a resume
NAMES = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr"}
LEFT_OUT = ("num_tokens", "total_flos")
THEIRS = ("trl", "transformers", "accelerate")  # packages in whose code TRL's settings are read


def run(cfg: DictConfig, run: Run, data: Data, algo: TRL, reward: Reward | None) -> dict[str, Any]:
    """Train with TRL; measure held-out rows before (where the model was trained before), now and then on dev, and after."""
    rows = algo.prepare(data.rows("train"), data.sides)
    steps = algo.steps_over(len(rows))
    config = configured(cfg, algo, steps, len(data.sides))
    done = run.first_step == steps  # but for the last evaluation
    model: Any = OmegaConf.to_object(cfg.model)
    # on resume TRL reads the weights of its checkpoint itself: what it takes the reference from must be the start
    reader = algo.build(model, cfg.seed, data.texts(), run.checkpoint if done else None)
    if isinstance(reader, RewardModel):
        reader.examples = responses_of(rows[:: max(1, len(rows) // EXAMPLES)])
        held_out: Any = HeldOutRewards(cfg.evaluate, data, run)
    else:
        ranked = None
        if algo.ranks is not None:
            ranked = partial(References(cfg, data, algo.ranks, {"train": rows}).ranked, reader)
        held_out = HeldOut(cfg.evaluate, data, reward, run, ranked)
    if not done:
        with _quiet(algo):
            _train(cfg, run, algo, config, reader, rows, reward, held_out, steps)
    return run.finish(reader, steps, held_out)


def _train(
    cfg: DictConfig,
    run: Run,
    algo: TRL,
    config: Any,
    reader: Any,
    rows: list[Row],
    reward: Reward | None,
    held_out: Any,
    steps: int,
) -> None:
    """From the start, or TRL's last checkpoint, to ``steps``; the weights of ``reader`` are then the last ones.

    Raises:
        UserError: what TRL refuses, a checkpoint that could not be gone on from, rows that are too few, too little memory.
        Stopped: after Ctrl-C or SIGTERM, with the state saved.
    """
    import trl

    disable_progress_bar()
    _drop_unfinished(run.dir)
    if algo.wants_reference and not cfg.model.lora.r and (not cfg.model.path or cfg.model.layers):
        _keep_start(run, reader)
    module, tokenizer = algo.module(reader), opened(reader)
    dataset = algo.dataset(reader, rows, cfg.seed)
    record = Record(run, reader, algo, held_out, algo.window(config), steps)
    extra = (
        {"reward_funcs": scored(run, reader, algo, rows, reward)} if reward is not None and algo.needs_reward else {}
    )
    try:
        trainer = getattr(trl, f"{algo.trainer}Trainer")(
            model=module, args=config, train_dataset=Dataset.from_list(dataset), processing_class=tokenizer, callbacks=[record], **extra
        )  # fmt: skip
    except (ValueError, NotImplementedError, ImportError) as e:
        raise UserError(algo.refused(e)) from None
    trainer.remove_callback(PrinterCallback)
    trainer.create_model_card = lambda **_: (
        None
    )  # the card is alignkit's; for TRL's wandb warns of an address that it has not
    _refuse_too_few(run, algo, trainer, dataset, config)
    if cfg.model.path and not run.checkpoint:
        with _naming(algo):
            optimizer = trainer.create_optimizer()
        run.begin(reader, optimizer, _Stateless(), held_out)
    set_seed(cfg.seed)  # what was measured before, or not, changes nothing
    try:
        with run.training(steps), _naming(algo):
            trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.first_step else None)
    except (MemoryError, RuntimeError, OSError) as e:
        if not preflight.out_of_memory(e):
            raise
        raise UserError(
            f"out of memory in TRL's step ({(str(e).splitlines() or [type(e).__name__])[0][:160]}). Cut it into more parts with "
            f"algo.trl.gradient_accumulation_steps={2 * algo.parts}."
        ) from None
    finally:
        record.close()
    trainer.accelerator.unwrap_model(
        trainer.model, keep_fp32_wrapper=False
    )  # without TRL's precision around its forward
    reader.model.eval()
    if trainer.state.global_step < steps:
        raise Stopped(f"stopped after step {trainer.state.global_step}, saved in {run.dir}.")


class Record(TrainerCallback):
    """What TRL does, into the run's directory: log values, dev evaluations, and that a checkpoint is whole."""

    def __init__(self, run: Run, reader: Any, algo: TRL, held_out: Any, window: int, steps: int) -> None:
        self.run, self.reader, self.algo, self.held_out, self.window, self.steps = (
            run,
            reader,
            algo,
            held_out,
            window,
            steps,
        )
        self.dev: dict[str, float] = {}
        self.step = ExitStack()  # the phase of the present one

    def close(self) -> None:
        self.step.close()

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.step.enter_context(self.run.phase("train"))

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Measure dev where it is time; have TRL save where that is the best, or where a stop was asked for."""
        self.step.close()
        done, every = state.global_step, self.run.cfg.evaluate.every
        self.dev = {}
        if every and (done % every == 0 or done == self.steps):
            training = self.reader.model.training
            self.reader.model.eval()
            self.dev = self.held_out.dev(self.reader)
            self.reader.model.train(training)
            if self.dev and self.run._improved(done, self.held_out.selected(self.dev)):
                control.should_save = True
        if self.run.stop_asked and done % self.window == 0:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        logs = more["logs"]
        if "loss" not in logs:  # the summary at the end
            return
        names = {**NAMES, **self.algo.logged}
        found = {
            names.get(key, f"trl/{key}"): float(value)
            for key, value in logs.items()
            if key not in LEFT_OUT and isinstance(value, int | float)
        }
        self.run.log(state.global_step, {**found, **self.dev})

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """A checkpoint with ``state/run.json`` is whole; one without was being written when the run was killed."""
        folder = self.run.dir / f"checkpoint-{state.global_step}" / "state"
        folder.mkdir(exist_ok=True)
        write_atomically(folder / "run.json", json.dumps(self.run._state(state.global_step, {})))
        self.run._prune()


class _Stateless:
    def state(self) -> dict[str, Any]:
        return {}


@contextmanager
def _quiet(algo: TRL) -> Iterator[None]:
    """Without what these packages foretell of names that they use themselves; what speaks of a setting of ``algo.trl`` is shown."""
    given = "|".join(map(re.escape, algo.trl))
    with warnings.catch_warnings():
        other = rf"(?s)(?!.*\b({given})\b)" if given else ""
        warnings.filterwarnings("ignore", other, FutureWarning, rf"({'|'.join(THEIRS)})\b")
        yield


@contextmanager
def _naming(algo: TRL) -> Iterator[None]:
    """Say in one line what TRL, or a library below it, has against a setting of ``algo.trl``.

    Only where the error was raised in their code and speaks of the setting: what a reward raises, and a bug, stay what they are.

    Raises:
        UserError: names the setting.
    """
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, ImportError) as e:
        frames = list(traceback.walk_tb(e.__traceback__))
        raised_in = str(frames[-1][0].f_globals.get("__name__", "")).partition(".")[0]
        missing = bool(algo.trl) and isinstance(e, ImportError)  # a package that some setting asks for
        if raised_in not in THEIRS or not (missing or algo.blamed(e)):
            raise
        raise UserError(algo.refused(e)) from None


def configured(cfg: DictConfig, algo: TRL, steps: int, sides: int) -> Any:
    """TRL's configuration: what alignkit and the method set, and the rest of ``algo.trl``. No model is needed for it.

    Raises:
        UserError: no reward where the trainer goes by one, or a device that TRL does not take; a value that TRL does not know, or
            refuses; steps between which a run could not be gone on from.
    """
    if algo.needs_reward and not cfg.reward:
        raise UserError(f"{cfg.name} goes by a reward: choose one with reward=NAME (see `alignkit list`).")
    if cfg.model.device not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(
            f"model.device={cfg.model.device}: TRL takes the first device; choose it with CUDA_VISIBLE_DEVICES."
        )
    device = device_of(cfg.model.device)
    per_step = algo.per_step(sides)
    ours = {
        "dataloader_pin_memory": device == "cuda",
        **algo.arguments(), "output_dir": str(cfg.run.dir), "max_steps": steps, "per_device_train_batch_size": per_step // algo.parts,
        "seed": cfg.seed, "use_cpu": device == "cpu", "bf16": cfg.model.compute == "bfloat16", "fp16": False,
        "gradient_checkpointing": cfg.model.gradient_checkpointing, "logging_steps": 1, "disable_tqdm": True, "report_to": "none",
        "save_strategy": "steps", "save_steps": cfg.run.save_every, "eval_strategy": "no",
    }  # fmt: skip
    with _quiet(algo):
        config = algo.configure(**{name: value for name, value in ours.items() if name not in algo.trl})
    config._n_gpu = min(config.n_gpu, 1)  # a run is one process on one device, however many there are
    _refuse_half_windows(cfg, algo.window(config))
    return config


def _refuse_half_windows(cfg: DictConfig, window: int) -> None:
    """Refuse a checkpoint between two steps that go by the same samples: TRL does not keep these, and would draw new ones."""
    for name, every in (("run.save_every", cfg.run.save_every), ("evaluate.every", cfg.evaluate.every)):
        if every % window:
            raise UserError(
                f"{name}={every}: TRL learns {window} steps from the same samples (algo.trl.steps_per_generation, "
                f"algo.trl.num_iterations) and does not save them, so a checkpoint between could not be gone on from exactly. Make it "
                f"a multiple of {window}."
            )


def _refuse_too_few(run: Run, algo: TRL, trainer: Any, given: list[Any], config: Any) -> None:
    """Say how many rows TRL has left out; refuse where too few are left."""
    left = len(trainer.train_dataset)
    if left < len(given) and not getattr(config, "packing", False):
        run.progress.say(
            f"warning: TRL leaves out {len(given) - left} of {len(given)} rows (algo.trl.max_length={config.max_length})."
        )
    wanted = config.generation_batch_size // config.num_generations if algo.needs_reward else 1
    if left < wanted:
        raise UserError(
            f"data.train: {left} rows are left, and TRL wants {wanted} at once. Give more, or lower algo.prompts_per_step."
        )


def scored(run: Run, reader: Policy, algo: Any, rows: list[Row], reward: Reward) -> Any:
    """The reward as a function that TRL calls; it sees a batch with whole rows, as in stage ``rl``."""

    def reward_function(
        completion_ids: list[list[int]], id: list[int], trainer_state: Any, **columns: Any
    ) -> list[float]:
        with run.phase("score"):
            batch = sampled(reader, [rows[i] for i in id], completion_ids, algo.k)
            batch = batch.with_(scores=scores_of(reward, batch))
        run.count("samples", len(batch))
        run.count("tokens/sampled", float(batch.mask.sum()))
        step, every = trainer_state.global_step, run.cfg.run.samples_every
        if every and (step % every == 0 or step + 1 == algo.steps):
            run.samples(step + 1, batch)
        assert batch.scores is not None
        return [float(score) for score in batch.scores]

    return reward_function


def sampled(reader: Policy, rows: list[Row], completion_ids: list[list[int]], k: int) -> Batch:
    """Token ids that TRL has sampled, ``k`` adjacent ones to a row, as a batch; log-probabilities are not known."""
    prompt_ids, prompt_mask = reader._pad(reader.encode_prompts(rows), "left")
    ids, mask = reader._pad(completion_ids, "right")
    group = torch.arange(len(rows), device=ids.device) // k
    texts = reader.decode_text(ids, mask)
    return Batch(prompt_ids, prompt_mask, ids, mask, group, rows, texts, extra={"ended": reader.ended(ids, mask)})


def opened(reader: Any) -> Any:
    """The reader's tokenizer, which closes no text by itself: TRL reads a prompt's tokens as they come, and would go on from its end.

    Raises:
        UserError: it cannot be kept from it.
    """
    tokenizer = reader.tokenizer
    ids = tokenizer("a")["input_ids"]
    if ids[-1] not in reader.eos:
        return tokenizer
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        from tokenizers import processors

        copy = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, **_special(tokenizer))
        first = [(tokenizer.bos_token, tokenizer.bos_token_id)] if ids[0] == tokenizer.bos_token_id else []
        copy.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*(token for token, _ in first), "$A"]), special_tokens=first
        )
        copy.chat_template = tokenizer.chat_template
        if copy("a")["input_ids"] == ids[:-1]:
            return copy
    raise UserError(
        "model.tokenizer: it closes every text with an end token, and so would TRL's prompts. Give one that does not."
    )


def _special(tokenizer: Any) -> dict[str, Any]:
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return {name: str(token) for name in names if (token := getattr(tokenizer, name)) is not None} | {
        "clean_up_tokenization_spaces": False
    }


def _keep_start(run: Run, reader: Any) -> None:
    """Write the start model, built here, where TRL looks for the reference: at the path in the model's configuration."""
    start = run.dir / "start"
    if not start.exists():
        with run.folder(start) as folder:
            reader.save(folder)
    reader.model.config._name_or_path = str(start)


def _drop_unfinished(directory: Path) -> None:
    import shutil

    for folder in directory.glob("checkpoint-*"):
        if not (folder / "state" / "run.json").exists():
            shutil.rmtree(folder)

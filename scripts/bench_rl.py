"""Speed and memory of one RL step: alignkit against TRL's GRPO trainer, interleaved in one run, on this machine's CPU.

    python scripts/bench_rl.py                                        # a quarter of an hour; tables on the screen
    python scripts/bench_rl.py --cells 1m/full --csv rl.csv           # a quick look
    python scripts/bench_rl.py --readme                               # also rewrites the block in README.md

A step is 16 prompts × 8 samples, a cheap Python reward and one AdamW step, on decoder-only Llamas of 1M, 5M and 25M
parameters. ``full`` has random weights: completions run to the cap of 32 tokens. ``early`` is trained for a moment on
English => several German sentences: completions end on their own, well before the cap of 128. Both sides load the same
folder and read the same prompts in the same order; the learning rate is tiny, so the models stay alike. alignkit runs
its real stage (``stages/rl.py``), TRL its real trainer; data loading and logging are part of a step on both sides.

==============  ======================================================================================================
alignkit        float32; micro-batches of ``--micro-tokens`` tokens
alignkit-bf16   the same with ``model.compute=bfloat16``
trl-fp32        GRPO, float32, no gradient checkpointing, all 128 rows in one batch
trl-micro       the same with 4 batches of 32 rows (one rollout, one optimizer step)
trl-default     GRPO with TRL's own defaults, bf16 autocast and gradient checkpointing, 128 rows in one batch
trl-rloo        as trl-fp32 with the RLOO trainer, no KL term; only when named in ``--only``
generate        transformers' ``model.generate`` on the prompts of the step, float32: sampling alone
==============  ======================================================================================================

Each implementation is a process of its own that makes a step when told to and blocks otherwise, so that memory is its
own and the others are idle. Memory is the peak of the resident set in a step over the idle process, which has loaded the
model and made no step. The floor is what the step's arithmetic takes at the matmul rate measured here, prompts counted
once a group, plus AdamW's memory traffic at the bandwidth measured here.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _bench import Worker, idle_mb, markdown, pipe, report, report_options, reset_peak, status_mb

VOCAB, PROMPTS, SAMPLES, LR, TARGET = 4096, 16, 8, 1e-5, 200  # TARGET: characters that the reward wants
ROWS = PROMPTS * SAMPLES
SIZES = {  # hidden, layers, heads, mlp; steps and learning rate of the brief training
    "1m": (128, 3, 4, 344, 300, 2e-3),
    "5m": (256, 5, 4, 688, 120, 2e-3),
    "25m": (512, 7, 8, 1376, 60, 1e-3),
}
CAPS = {"full": 32, "early": 128}
CELLS = "1m/full,1m/early,5m/full,5m/early,25m/full"
TRL = ("trl-fp32", "trl-micro", "trl-default")  # what the verdict compares with
IMPLEMENTATIONS = ("alignkit", "alignkit-bf16", *TRL, "generate")
PHASES = ("sample", "score", "update", "rest")
MEASURED = ("seconds", *PHASES, "tokens", "mean_length", "over_idle_mb")


# ---- models ---------------------------------------------------------------------------------------------------------


def build(args: argparse.Namespace, say: Callable[..., None], wait: Callable[[], str]) -> None:
    """Both models of the size ``args.size`` and the prompts, in the cache folder; what is there stays."""
    import torch
    from tokenizers import processors

    from alignkit import losses
    from alignkit.config import Model
    from alignkit.data import read
    from alignkit.decode import Decode
    from alignkit.policy import load

    if (args.cache / f"{args.size}-early").is_dir():
        return
    pairs = [(c["src"] + " =>", c["tgt"]) for _, c in read("bundled:tatoeba_en_de.train.jsonl")]
    hidden, layers, heads, mlp, steps, lr = SIZES[args.size]
    config = {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp}
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads, "tie_word_embeddings": True}
    config |= {"max_position_embeddings": 256}
    policy = load(Model(config=config, vocab_size=VOCAB, device="cpu"), 0, [text for pair in pairs for text in pair])
    # TRL feeds a prompt as the tokenizer gives it, so the tokenizer must not close it
    policy.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    short = [(p, r, len(policy.tokenizer(p)["input_ids"])) for p, r in pairs]
    short = [one for one in short if one[2] <= 16]
    prompts = "".join(json.dumps({"prompt": p, "tokens": n}) + "\n" for p, _, n in short[: 32 * PROMPTS])
    (args.cache / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    policy.save(args.cache / f"{args.size}-full")

    rng = random.Random(0)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=lr, fused=True)
    probe = [{"prompt": p, "id": i} for i, (p, *_) in enumerate(short[: 32 * PROMPTS : 8])]
    for step in range(4 * steps):
        if step >= steps and step % 10 == 0:  # goes on until the lengths are what this workload is about
            drawn = policy.generate(probe, 2, Decode(CAPS["early"]), generator=torch.Generator().manual_seed(step))
            share = float(drawn.lengths.float().mean()) / CAPS["early"]
            print(f"{step} steps of training: mean length {share:.0%} of the cap", file=sys.stderr, flush=True)
            if 0.26 <= share <= 0.32:
                break
        rows = []
        for prompt, response, _ in rng.sample(short, 16):
            more = [r for _, r, _ in rng.sample(short, rng.choice([0, 1, 3, 6]))]
            rows.append({"prompt": prompt, "response": " ".join([response, *more]), "id": len(rows)})
        batch = policy.demonstrations(rows, CAPS["early"])
        loss = losses.nll(policy.forward(batch), batch.mask)
        (loss.total / loss.count).backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    partial = args.cache / f"{args.size}-partial"
    policy.save(partial)
    partial.rename(args.cache / f"{args.size}-early")


def read_prompts(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (args.cache / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]


# ---- the workers: each tells its idle memory, then makes one step a line ---------------------------------------------


def alignkit_words(args: argparse.Namespace, folder: str) -> list[str]:
    """The command line of the run: what TRL's defaults optimise, a mean over tokens and no KL."""
    return [
        "+algo=grpo", "algo.kl=0", "algo.normalize=tokens", "algo.steps=1000000", f"algo.lr={LR}", "algo.schedule=constant", "algo.warmup=0",
        f"algo.prompts_per_step={PROMPTS}", f"algo.k={SAMPLES}", f"algo.max_new_tokens={CAPS[args.workload]}",
        f"algo.micro_tokens={args.micro_tokens}", "model=hf", f"model.path={args.cache}/{args.size}-{args.workload}",
        "model.device=cpu", "data=custom", f"data.train={args.cache}/prompts.jsonl", "data.response=null",
        "reward=length", f"reward.target={TARGET}", "reward.unit=characters", "evaluate.every=0", "evaluate.test=false",
        "run.save_every=1000000", "run.samples_every=0", "run.wandb=disabled", f"run.dir={folder}",
        *(["model.compute=bfloat16"] if args.worker == "alignkit-bf16" else []),
    ]  # fmt: skip


def alignkit_worker(args: argparse.Namespace, say: Callable[..., None], wait: Callable[[], str]) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    from alignkit.config import check, conf_dir, register
    from alignkit.run import Run
    from alignkit.stages import rl

    class Stepped(Run):
        """A run that makes one step a word of the parent, and tells what the step took."""

        def draw(self, rows: list, count: int, step: int) -> list:
            return [rows[i % len(rows)] for i in range(step * count, (step + 1) * count)]  # in order, as TRL

        @contextmanager
        def phase(self, name: str) -> Any:
            self.peak = max(self.peak, status_mb("VmHWM"))  # `Run.phase` resets it
            with super().phase(name):
                yield
            self.peak = max(self.peak, status_mb("VmHWM"))

        @contextmanager
        def training(self, steps: int) -> Any:
            with super().training(steps):
                say(idle_mb=idle_mb())
                self.await_word()
                yield

        def await_word(self) -> None:
            wait()
            self.old, self.peak = dict(self.ledger), 0.0
            reset_peak()
            self.start = time.perf_counter()

        def end_step(self, *given: Any) -> None:
            super().end_step(*given)
            seconds = time.perf_counter() - self.start
            spent = {k: v - self.old.get(k, 0.0) for k, v in self.ledger.items()}
            phases = {p: spent[f"seconds/{p}"] for p in PHASES[:-1]}
            say(seconds=seconds, **phases, tokens=spent["tokens/sampled"], peak_mb=self.peak)
            self.await_word()

    register()
    with tempfile.TemporaryDirectory() as folder:
        with initialize_config_dir(str(conf_dir().resolve()), version_base=None):
            cfg = compose("config", overrides=alignkit_words(args, folder))
        check(cfg)
        data, algo, reward = (instantiate(cfg[node], _convert_="object") for node in ("data", "algo", "reward"))
        rl.run(cfg, Stepped(cfg, {}, ["bench"]), data, algo, reward)


def generate_worker(args: argparse.Namespace, say: Callable[..., None], wait: Callable[[], str]) -> None:
    """Sampling alone, by ``model.generate``, from texts to texts."""
    from alignkit.config import Model
    from alignkit.policy import load

    policy = load(Model(path=f"{args.cache}/{args.size}-{args.workload}", device="cpu"), 0)
    tokenizer, prompts, step = policy.tokenizer, [one["prompt"] for one in read_prompts(args)], 0
    say(idle_mb=idle_mb())
    while wait():
        reset_peak()
        start = time.perf_counter()
        texts = [prompts[i % len(prompts)] for i in range(step * PROMPTS, (step + 1) * PROMPTS)]
        inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        out = policy.model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=True, top_k=0, top_p=1.0,
            temperature=1.0, num_return_sequences=SAMPLES, max_new_tokens=CAPS[args.workload],
            eos_token_id=policy.eos, pad_token_id=policy.pad,
        )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
        tokenizer.batch_decode(out, skip_special_tokens=True)
        seconds = time.perf_counter() - start
        ended = (out == policy.eos[0]).long()
        tokens = int((ended.cumsum(1) - ended == 0).sum())
        say(seconds=seconds, sample=seconds, tokens=tokens, peak_mb=status_mb("VmHWM"))
        step += 1


def trl_worker(args: argparse.Namespace, say: Callable[..., None], wait: Callable[[], str]) -> None:
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    folder = args.cache / f"{args.size}-{args.workload}"
    kind = "RLOO" if args.worker == "trl-rloo" else "GRPO"
    settings: dict[str, Any] = {} if args.worker == "trl-default" else {"bf16": False, "gradient_checkpointing": False}
    parts = 4 if args.worker == "trl-micro" else 1
    spent: dict[str, float] = {}

    def reward(completions: list[str], **_: Any) -> list[float]:  # alignkit's rewards.rule.Length
        return [max(0.0, 1 - abs(len(c.strip()) - TARGET) / TARGET) for c in completions]

    def timed(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        def timed_f(*a: Any, **k: Any) -> Any:
            start = time.perf_counter()
            result = f(*a, **k)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
            if name == "sample":
                spent["tokens"] = sum(len(ids) for ids in result[1])
            return result

        return timed_f

    class Stepper(TrainerCallback):
        """Waits where a step begins: what lies between two beginnings is the step, its data loading and logging."""

        start = 0.0

        def on_step_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
            seconds = time.perf_counter() - self.start
            if not self.start:
                optimizer.step = timed("optimizer", optimizer.step)
                say(idle_mb=idle_mb())
            else:
                sample, rollout = spent["sample"], spent["rollout"]
                update = spent["training"] - rollout + spent["clip"] + spent["optimizer"]
                phases = {"sample": sample, "score": rollout - sample, "update": update}
                say(seconds=seconds, **phases, tokens=spent["tokens"], peak_mb=status_mb("VmHWM"))
            wait()
            spent.clear()
            reset_peak()
            self.start = time.perf_counter()

    with tempfile.TemporaryDirectory() as out:
        config = getattr(trl, f"{kind}Config")(
            output_dir=out, per_device_train_batch_size=ROWS // parts, gradient_accumulation_steps=parts,
            num_generations=SAMPLES, max_completion_length=CAPS[args.workload], max_steps=1_000_000, learning_rate=LR,
            lr_scheduler_type="constant", beta=0.0, temperature=1.0, shuffle_dataset=False, use_cpu=True,
            report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, **settings,
        )  # fmt: skip
        trainer = getattr(trl, f"{kind}Trainer")(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), reward_funcs=reward, args=config,
            train_dataset=Dataset.from_dict({"prompt": [one["prompt"] for one in read_prompts(args)]}),
            processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[Stepper()],
        )  # fmt: skip
        trainer._generate = timed("sample", trainer._generate)
        trainer._generate_and_score_completions = timed("rollout", trainer._generate_and_score_completions)
        trainer.training_step = timed("training", trainer.training_step)
        trainer.accelerator.clip_grad_norm_ = timed("clip", trainer.accelerator.clip_grad_norm_)
        trainer.train()


# ---- the floor -------------------------------------------------------------------------------------------------------


def floor_worker(args: argparse.Namespace, say: Callable[..., None], wait: Callable[[], str]) -> None:
    """FLOP/s of the model's matmuls for a decoding step and for a micro-batch, float32 and bf16; bytes/s of memory."""
    import torch

    def fastest(f: Callable[[], Any]) -> float:
        f()
        times = []
        while len(times) < 5 or (sum(times) < 0.5 and len(times) < 100):
            start = time.perf_counter()
            f()
            times.append(time.perf_counter() - start)
        return min(times)

    hidden, layers, _, mlp, *_ = SIZES[args.size]
    shapes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * mlp), (mlp, hidden)] * layers + [(hidden, VOCAB)]
    found = {}
    for kind in ("float32", "bfloat16"):
        weights = [torch.randn(out, into, dtype=getattr(torch, kind)) for into, out in shapes]
        for what, rows in (("decode", ROWS), ("update", args.micro_tokens)):
            inputs = {n: torch.randn(rows, n, dtype=weights[0].dtype) for n in (hidden, mlp)}
            seconds = fastest(lambda: [inputs[w.shape[1]] @ w.T for w in weights])  # noqa: B023
            found[f"{kind}/{what}"] = 2 * rows * sum(a * b for a, b in shapes) / seconds
    a, b = torch.ones(2**25), torch.ones(2**25)
    found["bytes"] = 3 * 4 * len(a) / fastest(lambda: torch.add(a, b, alpha=0.5, out=a))
    say(**found)


def floor_seconds(size: str, rates: dict[str, float], kind: str, tokens: float, prompt: float) -> float:
    """The least time of a step that samples ``tokens`` after prompts of ``prompt`` tokens, at these rates."""
    hidden, layers, _, mlp, *_ = SIZES[size]
    body, head = layers * (4 * hidden**2 + 3 * hidden * mlp), hidden * VOCAB
    attention = 4 * hidden * layers * tokens * (prompt + tokens / ROWS / 2)  # each token looks at what precedes it
    decode = 2 * body * (tokens + PROMPTS * prompt) + 2 * head * tokens + attention
    update = 6 * body * (tokens + PROMPTS * prompt) + 6 * head * tokens + 3 * attention
    traffic = 28 * (body + head)  # AdamW reads weight, gradient and two moments, and writes all but the gradient
    return decode / rates[f"{kind}/decode"] + update / rates[f"{kind}/update"] + traffic / rates["bytes"]


# ---- the parent -------------------------------------------------------------------------------------------------------


def start(name: str, args: argparse.Namespace, size: str, workload: str = "full") -> Worker:
    words = ["--size", size, "--workload", workload, "--cache", str(args.cache)]
    words += ["--micro-tokens", str(args.micro_tokens)]
    return Worker(name, words, args.threads, args.cache / f"{size}-{workload}-{name}.log")


def measure(args: argparse.Namespace, size: str, workload: str) -> list[dict[str, Any]]:
    """One record a step and implementation."""
    workers, records = [start(name, args, size, workload) for name in args.only], []
    try:
        idle = {}
        for worker in list(workers):
            first = worker.hear()
            if "skip" in first:
                print(f"{worker.name} is left out: {first['skip']}")
                workers.remove(worker)
                worker.close()
            else:
                idle[worker.name] = first["idle_mb"]
        for step in range(-args.warmup, args.steps):
            for worker in workers[:: -1 if step % 2 else 1]:
                one = worker.ask("step")
                one["rest"] = one["seconds"] - sum(one.get(p, 0.0) for p in PHASES)
                one["mean_length"] = one["tokens"] / ROWS
                one["over_idle_mb"] = one["peak_mb"] - idle[worker.name]
                if step >= 0:
                    at = {"size": size, "workload": workload, "implementation": worker.name, "step": step}
                    records.append(at | {k: round(v, 4) for k, v in one.items()})
    finally:
        for worker in workers:
            worker.close()
    return records


def tables(args: argparse.Namespace, records: list[dict], rates: dict[str, dict[str, float]]) -> str:
    """The verdict, one line a size and workload; where the time goes, one line an implementation; the rates."""
    verdict, detail = [], []
    prompt = statistics.mean(one["tokens"] for one in read_prompts(args))
    for size, workload in dict.fromkeys((r["size"], r["workload"]) for r in records):
        steps: dict[str, list[dict]] = {}
        for r in records:
            if (r["size"], r["workload"]) == (size, workload):
                steps.setdefault(r["implementation"], []).append(r)
        median = {
            name: {key: statistics.median(r[key] for r in found) for key in found[0] if key in MEASURED}
            for name, found in steps.items()
        }
        for name, m in median.items():
            ms = [1000 * r["seconds"] for r in steps[name]]
            phases = [f"{1000 * m[p]:,.0f}" if p in m else "" for p in PHASES]
            rate = statistics.median(r["tokens"] / r["seconds"] for r in steps[name])
            line = [size, workload, name, f"{1000 * m['seconds']:,.0f}", f"{min(ms):,.0f}–{max(ms):,.0f}", *phases]
            detail.append([*line, f"{rate:,.0f}", f"{m['mean_length']:.1f}", f"{m['over_idle_mb']:,.0f}"])

        ours = {n: m for n, m in median.items() if n.startswith("alignkit")}
        theirs = {n: m for n, m in median.items() if n in TRL}
        if not ours or not theirs:
            continue  # nothing to compare

        def least(group: dict[str, dict[str, float]], key: str) -> float:
            return min(m[key] for m in group.values())

        row = [size, workload]
        for group in (ours, theirs):
            name = min(group, key=lambda n: group[n]["seconds"])
            row.append(f"{1000 * group[name]['seconds']:,.0f} ({name})")
        row += [f"{least(theirs, key) / least(ours, key):.2f}" for key in ("seconds", "sample")]
        row.append(f"{median['generate']['sample'] / least(ours, 'sample'):.2f}" if "generate" in median else "–")
        row.append(f"{least(ours, 'over_idle_mb') / least(theirs, 'over_idle_mb'):.2f}")
        tokens = statistics.mean(m["tokens"] for m in ours.values())
        for kind, name in (("float32", "alignkit"), ("bfloat16", "alignkit-bf16")):
            floor = floor_seconds(size, rates[size], kind, tokens, prompt)
            row.append(f"{1000 * floor:,.0f}" + (f" (×{ours[name]['seconds'] / floor:.1f})" if name in ours else ""))
        verdict.append(row)
    limits = [[size, *(f"{rate / 1e9:,.0f}" for rate in found.values())] for size, found in rates.items()]
    return "\n\n".join([
        f"{PROMPTS} prompts × {SAMPLES} samples a step, {args.threads} thread(s), {args.steps} steps each, interleaved; "
        f"medians. alignkit: micro-batches of {args.micro_tokens} tokens; TRL: {ROWS} rows at once (trl-micro: "
        f"{ROWS // 4}). Speed ratios above 1 and memory ratios below 1 favour alignkit. In brackets: its multiple of the floor.",
        markdown("size | workload | alignkit, ms | TRL GRPO, ms | step: TRL ÷ alignkit | sampling: TRL ÷ alignkit | "
                 "sampling: generate ÷ alignkit | memory: alignkit ÷ TRL | floor fp32, ms | floor bf16, ms", verdict),
        markdown("size | workload | implementation | ms | min–max | sample | score | update | rest | tokens/s | "
                 "mean length | peak MB over idle", detail),
        markdown("GFLOP/s of the matmuls | fp32 decode | fp32 update | bf16 decode | bf16 update | memory GB/s", limits),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "comma-separated; default: all but trl-rloo"
    parser.add_argument("--cells", default=CELLS, help=f"SIZE/WORKLOAD, comma-separated; default {CELLS}")
    parser.add_argument("--only", default=",".join(IMPLEMENTATIONS), metavar="IMPLS", help=names)
    for name, default in (("steps", 5), ("warmup", 2), ("threads", 2), ("micro-tokens", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "alignkit-bench", help="of models")
    report_options(parser)
    for name in ("worker", "size", "workload"):  # what this script tells the processes that it starts
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        import torch

        torch.set_num_threads(args.threads)
        workers = {"build": build, "floor": floor_worker, "alignkit": alignkit_worker, "trl": trl_worker}
        workers["generate"] = generate_worker
        return workers[args.worker.partition("-")[0]](args, *pipe())
    cells, args.only = [cell.split("/") for cell in args.cells.split(",")], args.only.split(",")
    every = [[size, workload] for size in SIZES for workload in CAPS]
    for given, known in (
        (args.cells.split(","), ["/".join(cell) for cell in every]),
        (args.only, (*IMPLEMENTATIONS, "trl-rloo")),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    args.cache.mkdir(parents=True, exist_ok=True)
    rates, records = {}, []
    for size in dict.fromkeys(size for size, _ in cells):
        builder = start("build", args, size)
        if builder.process.wait():
            builder.hear()  # says why
        floor = start("floor", args, size)
        rates[size] = floor.hear()
        floor.close()
        for workload in (w for s, w in cells if s == size):
            records += measure(args, size, workload)
            print(f"{size} {workload}: done", file=sys.stderr, flush=True)
    text = tables(args, records, rates)
    report("bench_rl", text, records, args)


if __name__ == "__main__":
    main()

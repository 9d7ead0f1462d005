"""Inverse value learning between sizes: a value model trained on the smallest of three bases, put beside each of them.

    python scripts/compare_value.py --out value                    # about 6 minutes a seed on one core; repeat to go on
    python scripts/compare_value.py --out value --table            # the tables of what is there

The bases are language models of one corpus: instructions on lists of digits, followed by the right answer written backwards
(``~ 9 8 4 1``, 45 %), by the answer (``= 1 4 8 9``, 25 %) or by nothing (30 %); a tenth of the answers has a faulty digit. (Of the
instructions themselves, whose digits are random, nothing is learned.) So a base has the skill, the larger the more, but not the
manners: of itself it answers backwards. Post-training shows it a thousand instructions with the right answer behind ``=``. Every
arm is measured on held-out instructions: exact answers by greedy decoding, and nats a token of the right answer. ``asked`` is the
base with ``=`` put behind the prompt: what it knows. All is redone for each seed: bases, value models, the order of the data.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "disabled")

from hydra import compose, initialize_config_dir

from alignkit.cli import hydra_words
from alignkit.config import conf_dir, register
from alignkit.launch import launch
from alignkit.loading import train_tokenizer
from alignkit.rewards.lists import OPERATIONS, solve

SIZES = {"small": (64, 192), "middle": (128, 384), "large": (192, 576)}  # 0.23M, 0.9M and 2.0M parameters
RATES = {"small": "4e-3", "middle": "3e-3", "large": "2e-3"}  # of the bases
RUN = [
    "run.threads=1",
    "run.wandb=disabled",
    "run.save_every=100000",
    "run.keep=1",
    "evaluate.every=0",
    "evaluate.test=false",
]
ROWS = ["data=custom", "data.prompt='{prompt}'", "data.response='{response}'"]
VALUES = {
    "value": [],
    "value, norm 0.3": ["algo.norm=l1", "algo.norm_coef=0.3"],
    "value, norm 1": ["algo.norm=l1"],
    "value, random start": ["random"],
    "value, zero head": ["algo.zero_init_head=true"],
    "value, cascade+": ["algo.connection=cascade_plus"],
}
EVERY = ["base", "asked", *VALUES, "proxy", "own SFT", "own SFT, lower rate"]


def instruction(rng: random.Random) -> str:
    return f"{rng.choice(list(OPERATIONS))}: {' '.join(str(rng.randrange(10)) for _ in range(rng.randint(3, 5)))}"


def continued(line: str, rng: random.Random) -> str:
    """What follows an instruction in the corpus."""
    items = solve(line).split()
    if rng.random() < 0.1 and items[0].isdigit():
        items[rng.randrange(len(items))] = str(rng.randrange(10))
    style = rng.choices(["~", "=", ""], [0.45, 0.25, 0.3])[0]
    return {"~": f"~ {' '.join(items[::-1])}", "=": f"= {' '.join(items)}", "": ""}[style]


def prepare(out: Path) -> None:
    """Corpus, demonstrations, test rows and tokenizer, the same for every seed."""
    if (out / "tokenizer").is_dir():
        return
    rng = random.Random(7)
    unique: dict[str, None] = {}
    while len(unique) < 2000:
        unique[instruction(rng)] = None
    rows = [{"prompt": line, "response": f"= {solve(line)}", "answer": solve(line)} for line in unique]
    corpus = [line for line in (instruction(rng) for _ in range(42_000)) if line not in unique]
    texts = [{"prompt": line, "response": continued(line, rng)} for line in corpus]
    for name, part in (("test", rows[:1000]), ("post", rows[1000:]), ("pre", texts)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    train_tokenizer([f"{row['prompt']} {row['response']}" for row in texts[:2000]], 320).save_pretrained(
        out / "tokenizer"
    )


def shape(size: str) -> list[str]:
    hidden, inner = SIZES[size]
    return ["model=tiny_causal", f"model.config.hidden_size={hidden}", f"model.config.intermediate_size={inner}"]


class Experiment:
    """The runs of one seed, in folders of their own; finished ones are left alone."""

    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.seed, self.folder = out, seed, out / f"s{seed}"
        self.folder.mkdir(exist_ok=True)

    def command(self, name: str, *words: str) -> Path:
        folder = self.folder / named(name)
        if not (folder / "result.json").exists():
            register()
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                cfg = compose("config", hydra_words([*RUN, *words, f"seed={self.seed}", f"run.dir={folder}"]))
            with (
                open(folder.with_suffix(".log"), "w") as log,
                contextlib.redirect_stdout(log),
                contextlib.redirect_stderr(log),
            ):
                launch(cfg)
            print(f"s{self.seed} {name}", flush=True)
        return folder

    def base(self, size: str) -> Path:
        data = [*ROWS, f"data.train={self.out}/pre.jsonl", f"model.tokenizer={self.out}/tokenizer"]
        rate = ["algo.steps=300", "algo.batch_size=128", "algo.warmup=50", f"algo.lr={RATES[size]}"]
        return self.command(f"base {size}", "+algo=sft", *shape(size), *data, *rate)

    def post(self, name: str, *words: str) -> Path:
        """SFT and value models: one recipe."""
        rate = ["algo.steps=150", "algo.batch_size=32", "algo.warmup=20", "algo.lr=1e-3"]
        return self.command(name, *ROWS, f"data.train={self.out}/post.jsonl", *rate, *words)

    def tuned(self, size: str, lower: bool = False) -> Path:
        """With its weights at 4e-4 too: what is a good rate for the small one need not be for the large one."""
        words = ["+algo=sft", f"model.path={self.base(size)}"]
        return self.post(f"sft lower {size}", *words, "algo.lr=4e-4") if lower else self.post(f"sft {size}", *words)

    def value(self, arm: str) -> Path:
        """Trained on the smallest base, and from its weights where it is not said otherwise."""
        more = VALUES[arm]
        start = shape("small") if more == ["random"] else [f"model.path={self.base('small')}"]
        return self.post(
            arm, "+algo=inverse_value", f"algo.base={self.base('small')}", *start, *(w for w in more if w != "random")
        )

    def measure(self, size: str, arm: str) -> None:
        base, rows = self.base(size), ROWS
        if arm.startswith("own SFT"):
            words = [f"model.path={self.tuned(size, lower=arm != 'own SFT')}"]
        elif arm == "proxy":
            words = [
                f"model.path={base}",
                f"model.steer.value={self.tuned('small')}",
                f"model.steer.minus={self.base('small')}",
            ]
        elif arm in VALUES:
            words = [f"model.path={base}", f"model.steer.value={self.value(arm)}"]
        else:
            words = [f"model.path={base}"]
        if arm == "asked":
            rows = ["data=custom", "data.prompt='{prompt} ='", "data.response='{answer}'"]
        data = ["data.train=null", f"data.test={self.out}/test.jsonl", "evaluate.test=true"]
        how = ["evaluate.nll=true", "evaluate.max_new_tokens=12", "evaluate.bootstrap=0"]
        self.command(f"on {size} {arm}", "+algo=evaluate", *words, *rows, *data, *how)


def named(name: str) -> str:
    return name.replace(",", "").replace(" ", "_")


def found(out: Path, seeds: list[int], size: str, arm: str, metric: str) -> dict[int, float]:
    """Seed → value, of the runs that are there."""
    files = {seed: out / f"s{seed}" / named(f"on {size} {arm}") / "result.json" for seed in seeds}
    tables = {
        seed: json.loads(f.read_text(encoding="utf-8"))["evaluation"]["test"] for seed, f in files.items() if f.exists()
    }
    return {seed: table[metric]["value"] for seed, table in tables.items()}


def table(out: Path, seeds: list[int], metric: str, digits: int, less: str | None = None) -> str:
    """Markdown: mean and standard deviation over seeds, a line an arm, a column a size; ``less``: paired differences from it."""
    lines = ["| arm | " + " | ".join(SIZES) + " |", "|---" * (len(SIZES) + 1) + "|"]
    for arm in EVERY:
        if arm == less or (arm == "asked" and metric == "nll"):  # whose answers lack the first token
            continue
        cells = []
        for size in SIZES:
            values = found(out, seeds, size, arm, metric)
            if less:
                other = found(out, seeds, size, less, metric)
                values = {seed: values[seed] - other[seed] for seed in values if seed in other}
            spread = f" ± {statistics.stdev(values.values()):.{digits}f}" if len(values) > 1 else ""
            sign = "+" if less else ""
            spread += f" ({len(values)})" if len(values) < len(seeds) else ""  # not all are there yet
            cells.append(f"{statistics.mean(values.values()):{sign}.{digits}f}{spread}" if values else "")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("value"), help="folder of data and runs")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    args = parser.parse_args()
    seeds = [int(s) for s in args.seeds.split(",")]
    if not args.table:
        args.out.mkdir(parents=True, exist_ok=True)
        prepare(args.out)
        for seed in seeds:
            one = Experiment(args.out, seed)
            for size in SIZES:
                for arm in EVERY:
                    one.measure(size, arm)
    for metric, digits in (("exact_match", 1), ("nll", 3)):
        print(f"\n{metric}\n\n{table(args.out, seeds, metric, digits)}")
        print(f"\n{metric}, difference from `value`, paired\n\n{table(args.out, seeds, metric, digits, 'value')}")


if __name__ == "__main__":
    main()

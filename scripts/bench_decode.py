"""Sampling speed of alignkit against transformers' ``generate``, and of causal models its continuous batching, interleaved in one process.

Each repeat decodes the same prompts with all, in alternating order, from texts to texts: tokenization, reading the
prompts and decoding are all counted. alignkit also returns the log-probability of every token; ``generate`` does not, and
continuous batching is asked for them. Its manager and cache are kept between repeats, with room for all responses at full length.

Without ``--model``, an encoder–decoder and a causal model of about 3M random parameters are built, and a constant on the
logit of the end-of-sequence token brings the mean length to about a third of the limit. ``--model PATH`` measures a
trained model instead, as it is.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import statistics
import time
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from alignkit.config import Model
from alignkit.data import read
from alignkit.decode import Decode
from alignkit.policy import Policy, load

PAGE = 32  # tokens of a block of the cache
LAYERS = {"encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
RANDOM = {
    "encoder-decoder": {"model_type": "m2m_100", "d_model": 192, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512}
    | LAYERS,
    "causal": {"model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6}
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
}


def random_policy(name: str, texts: list[str], limit: int) -> Policy:
    """Near-uniform over the vocabulary, but for a logit bias that sets the chance to end at each step."""
    policy = load(Model(config=RANDOM[name], vocab_size=2000), 0, texts)
    head = policy.model.get_output_embeddings()
    head.weight.data.normal_(std=0.005)
    low, high = 1e-6, 1.0
    for _ in range(60):  # bisect the chance p for which the mean of a truncated geometric length is limit / 3
        p = (low + high) / 2
        low, high = (p, high) if (1 - (1 - p) ** limit) / p > limit / 3 else (low, p)
    bias = torch.zeros(len(head.weight), device=policy.device)
    bias[policy.eos[0]] = math.log(p / (1 - p) * (len(bias) - 1))
    head.register_forward_hook(lambda _module, _args, logits: logits + bias)
    return policy


def by_alignkit(policy: Policy, texts: list[str], args: argparse.Namespace, seed: int) -> int:
    """Sample; returns how many tokens were drawn, end-of-sequence included."""
    rows = [{"prompt": text, "id": i} for i, text in enumerate(texts)]
    generator = torch.Generator().manual_seed(seed)
    batch = policy.generate(rows, args.samples, Decode(max_new_tokens=args.max_new_tokens), generator=generator)
    return int(batch.lengths.sum())


def by_transformers(policy: Policy, texts: list[str], args: argparse.Namespace, seed: int) -> int:
    """The same by ``generate``."""
    torch.manual_seed(seed)
    seq2seq, tokenizer, ids = policy.is_encoder_decoder, policy.tokenizer, policy.tokenizer(texts)["input_ids"]
    if not seq2seq:
        ids = [one[:-1] if one[-1] in policy.eos else one for one in ids]
    side = "right" if seq2seq else "left"
    inputs = tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt").to(policy.device)
    out = policy.model.generate(
        **inputs, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, num_return_sequences=args.samples,
        max_new_tokens=args.max_new_tokens, eos_token_id=policy.eos, pad_token_id=policy.pad,
    )  # fmt: skip
    out = out[:, 1 if seq2seq else inputs["input_ids"].shape[1] :]
    tokenizer.batch_decode(out, skip_special_tokens=True)
    ended = torch.isin(out, torch.tensor(policy.eos, device=out.device)).long()
    return int((ended.cumsum(1) - ended == 0).sum())


def by_continuous_batching(policy: Policy, texts: list[str], args: argparse.Namespace, seed: int) -> int:
    """The same by ``generate_batch``."""
    ids = [one[:-1] if one[-1] in policy.eos else one for one in policy.tokenizer(texts)["input_ids"]]
    pages = -(-(max(map(len, ids)) + args.max_new_tokens) // PAGE) * len(ids) * args.samples
    out = policy.model.generate_batch(
        ids,
        GenerationConfig(
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0, num_return_sequences=args.samples,
            max_new_tokens=args.max_new_tokens, eos_token_id=policy.eos, pad_token_id=policy.pad,
        ),
        ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=pages, max_batch_tokens=PAGE * len(ids), return_logprobs=True, seed=seed
        ),
        persistent_manager=True,
    )  # fmt: skip
    found = [one.generated_tokens for one in out.values()]
    policy.tokenizer.batch_decode(found, skip_special_tokens=True)
    return sum(map(len, found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a trained model: folder, run or bundled:NAME")
    parser.add_argument("--data", default="bundled:tatoeba_en_de.test.jsonl", help="where the prompts come from")
    parser.add_argument("--column", default="src", help="column that holds the prompt")
    for name, default in (("prompts", 32), ("samples", 8), ("max-new-tokens", 48), ("repeats", 7), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--csv", type=Path, help="write one line per model, implementation and repeat")
    args = parser.parse_args()
    if args.repeats < 5:
        parser.error("--repeats must be at least 5")
    torch.set_num_threads(args.threads)
    every = [columns[args.column] for _, columns in read(args.data)]
    texts, lines = every[: args.prompts], []
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    print(f"{len(texts)} prompts x {args.samples} samples, at most {args.max_new_tokens} new, {args.threads} thread(s)")
    for name in [args.model] if args.model else RANDOM:
        policy = load(Model(path=name), 0) if args.model else random_policy(name, every, args.max_new_tokens)
        ways = {"alignkit": by_alignkit, "transformers": by_transformers}
        if not policy.is_encoder_decoder:
            ways["continuous"] = by_continuous_batching
        spent: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
        for repeat in range(-1, args.repeats):  # the first is the warm-up
            for way in list(ways)[:: 1 if repeat % 2 else -1]:
                start = time.perf_counter()
                tokens = ways[way](policy, texts, args, repeat + 1)  # its count waits for the device
                seconds = time.perf_counter() - start
                if repeat >= 0:
                    spent[way].append((seconds, tokens))
                    lines.append([name, way, repeat, f"{seconds:.4f}", tokens])
        mean = statistics.mean(n for way in ways for _, n in spent[way]) / len(texts) / args.samples
        how = "trained" if args.model else "random weights, end-of-sequence logit raised"
        print(f"\n{name}: {policy.model.num_parameters() / 1e6:.1f}M parameters, {how}; mean length {mean:.1f} tokens")
        print(f"{'':14}{'median s':>10}{'min–max s':>16}{'tokens/s':>10}")
        for way, pairs in spent.items():
            seconds, rate = [s for s, _ in pairs], statistics.median(n / s for s, n in pairs)
            span = f"{min(seconds):.3f}–{max(seconds):.3f}"
            print(f"{way:14}{statistics.median(seconds):10.3f}{span:>16}{rate:10.0f}")
        for way in [*ways][1:]:
            ratios = [b / n * m / a for (a, m), (b, n) in zip(spent["alignkit"], spent[way], strict=True)]
            print(
                f"a token of {way} takes {statistics.median(ratios):.2f} times alignkit's, {min(ratios):.2f}–{max(ratios):.2f}"
            )
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([["model", "implementation", "repeat", "seconds", "tokens"], *lines])


if __name__ == "__main__":
    main()

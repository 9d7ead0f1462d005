"""The memory behind ESRL's claim: sampling with the graph kept against sampling in two stages, over response lengths.

    python scripts/bench_memory.py                             # table on the screen
    python scripts/bench_memory.py --lengths 16,64 --csv m.csv # a quick look
    python scripts/bench_memory.py --readme                    # also rewrites the block in README.md

Three ways to the gradient of the same policy loss on the same responses (random weights, no end before T tokens):

single stage   token by token with a KV cache and gradients on; the loss uses the log-probs of those very logits
two stages     ``policy.generate`` without a graph, then one teacher-forced ``policy.forward`` over all rows
micro-batches  the same, in micro-batches of ``--micro-tokens`` tokens, as ``Run.update`` does it

Saved: bytes that autograd keeps for the backward pass at the worst moment, each storage counted once, parameters left
out. Peak: resident memory over the idle process, which is why each cell is a process of its own. The gradients of all
ways are compared with those of the two stages: the norm of the difference over the norm.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _bench import Worker, idle_mb, markdown, pipe, report, report_options, reset_peak, status_mb
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from alignkit import decode, losses, ops
from alignkit.batch import Batch
from alignkit.config import Model
from alignkit.data import read
from alignkit.policy import Policy, load

KINDS = {
    "causal": {"model_type": "llama", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "encoder-decoder": {"model_type": "m2m_100", "d_model": 128, "encoder_ffn_dim": 344, "decoder_ffn_dim": 344}
    | {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
}
WAYS = ("two stages", "micro-batches", "single stage")
PROMPTS, SAMPLES = 8, 2


class Saved:
    """Counts what autograd keeps: ``with saved.hooks(): …``, then ``saved.freed()`` once a backward pass is through."""

    def __init__(self, model: Any) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages: dict[int, int] = {}  # alive until the backward pass, so an address names one storage
        self.most = 0

    def hooks(self) -> Any:
        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in self.parameters:
                self.storages[storage.data_ptr()] = storage.nbytes()
            return x

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)

    def freed(self) -> None:
        self.most = max(self.most, sum(self.storages.values()))
        self.storages.clear()


def single_stage(policy: Policy, batch: Batch, uniform: Tensor) -> Tensor:
    """Log-probabilities (B, T) from the logits that each token is drawn from, their graph kept.

    The ids of the batch go in, so that every way has the same ones; the draw is made for its time.
    """
    model, mask = policy.model, batch.prompt_mask.long()
    kwargs: dict[str, Any] = {"use_cache": True}
    if policy.is_encoder_decoder:
        _, index, sizes = torch.unique_consecutive(batch.group, return_inverse=True, return_counts=True)
        first = sizes.cumsum(0) - sizes
        encoded = model.get_encoder()(input_ids=batch.prompt_ids[first], attention_mask=mask[first])
        kwargs["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded.last_hidden_state[index])
        kwargs[decode.cache_name(model)] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        fed = torch.full((len(batch), 1), model.config.decoder_start_token_id)
    else:
        kwargs[decode.cache_name(model)] = DynamicCache(config=model.config)
        kwargs["logits_to_keep"] = 1
        fed = batch.prompt_ids
    columns = []
    for t in range(batch.response_ids.shape[1]):
        if policy.is_encoder_decoder:
            out = model(decoder_input_ids=fed, attention_mask=mask, **kwargs)
        else:
            places = decode.positions(mask)[:, -fed.shape[1] :]
            out = model(input_ids=fed, attention_mask=mask, position_ids=places, **kwargs)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = out.logits[:, -1:]
        with torch.no_grad():
            torch.searchsorted(logits[:, 0].float().softmax(-1).cumsum(-1), uniform[:, t : t + 1])
        fed = batch.response_ids[:, t : t + 1]
        columns.append(ops.token_logprobs(logits, fed))
    return torch.cat(columns, dim=1)


def cell(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """One model, length and way: bytes saved, peak over idle, seconds, gradient against that of the two stages."""
    texts = [columns["src"] for _, columns in read("bundled:tatoeba_en_de.test.jsonl")]
    config = KINDS[args.kind] | {"max_position_embeddings": 1024}
    policy = load(Model(config=config, vocab_size=2000, device="cpu"), 0, texts)
    policy.eos = [-1]  # no token ends a response
    rows = [{"prompt": text, "id": i} for i, text in enumerate(texts[:PROMPTS])]
    advantages = torch.randn(PROMPTS * SAMPLES, generator=torch.Generator().manual_seed(1))
    uniform = torch.rand(PROMPTS * SAMPLES, args.length, generator=torch.Generator().manual_seed(2))
    saved = Saved(policy.model)

    def generate(length: int) -> Batch:
        how = decode.Decode(max_new_tokens=length)
        batch = policy.generate(rows, SAMPLES, how, generator=torch.Generator().manual_seed(0))
        # m2m_100 counts no position for a pad token that is drawn, teacher-forced at least: none may be among the ids
        ids = batch.response_ids.masked_fill(batch.response_ids == policy.pad, policy.tokenizer.bos_token_id)
        return batch.with_(response_ids=ids, advantages=advantages[:, None] * batch.mask)

    def backward(batch: Batch, forward: Callable[[Batch], Tensor]) -> None:
        assert batch.advantages is not None
        with saved.hooks():
            logprobs = forward(batch)
            loss = losses.policy_gradient(logprobs, batch.advantages, batch.mask, batch.group, "groups").total
        saved.freed()
        loss.backward()

    backward(generate(2), policy.forward)  # the libraries' own memory is not counted
    policy.model.zero_grad()
    saved.most = 0
    given = None
    if args.worker == "single-stage":
        given = Batch(**torch.load(args.folder / "batch.pt", weights_only=True))
    idle = idle_mb()
    reset_peak()
    start = time.perf_counter()
    if given is not None:
        backward(given, lambda batch: single_stage(policy, batch, uniform))
    else:
        given = generate(args.length)
        for part in given.split(args.micro_tokens) if args.worker == "micro-batches" else [given]:
            backward(part, policy.forward)
    seconds, peak = time.perf_counter() - start, status_mb("VmHWM") - idle
    gradient = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
    if args.worker == "two-stages":  # comes first and leaves what the others compare with
        torch.save(vars(given), args.folder / "batch.pt")
        torch.save(gradient, args.folder / "gradient.pt")
    reference = torch.load(args.folder / "gradient.pt", weights_only=True)
    difference = float((gradient - reference).norm() / reference.norm())
    say(saved_mb=saved.most / 2**20, peak_mb=peak, seconds=seconds, gradient_difference=difference)


def measure(args: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    """One record a length and way; a single stage is left out where it would need too much."""
    records, last, before = [], 0.0, 1
    for length in map(int, args.lengths.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            for way in WAYS:
                # the cache is copied with each token, so what is kept grows up to the square of the length
                needed = last * (length / before) ** 2
                if way == "single stage" and needed > args.limit_gb * 1024:
                    print(
                        f"{kind}, {length} tokens: a single stage might need {needed / 1024:.0f} GB, left out",
                        file=sys.stderr,
                    )
                    last, before = needed, length
                    continue
                words = ["--kind", kind, "--length", str(length), "--folder", folder]
                words += ["--micro-tokens", str(args.micro_tokens)]
                worker = Worker(way.replace(" ", "-"), words, args.threads, Path(folder) / "log")
                one = worker.hear()
                worker.close()
                print(f"{kind}, {length} tokens, {way}: {one['seconds']:.2f} s", file=sys.stderr, flush=True)
                records.append({"model": kind, "length": length, "way": way} | one)
                if way == "single stage":
                    last, before = one["peak_mb"], length
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="16,32,64,128,256,512", help="response lengths T, ascending")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated")
    parser.add_argument("--micro-tokens", type=int, default=2048, help="default 2048")
    parser.add_argument("--limit-gb", type=float, default=6.0, help="leave out what would need more; default 6")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    report_options(parser)
    for name, kind in (("worker", str), ("kind", str), ("length", int), ("folder", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)  # what a worker is told
    args = parser.parse_args()
    if args.worker:
        torch.set_num_threads(args.threads)
        return cell(args, pipe()[0])
    records: list[dict[str, Any]] = []
    for kind in args.kinds.split(","):
        records += measure(args, kind)
    lines = []
    for kind, length in dict.fromkeys((r["model"], r["length"]) for r in records):
        found = {r["way"]: r for r in records if (r["model"], r["length"]) == (kind, length)}
        row = [kind, str(length)]
        for key, digits, missing in (
            ("saved_mb", 0, f"> {args.limit_gb:g} GB"),
            ("peak_mb", 0, "–"),
            ("seconds", 2, "–"),
        ):
            row += [f"{found[way][key]:,.{digits}f}" if way in found else missing for way in (WAYS[2], *WAYS[:2])]
        lines.append([*row, f"{max(one['gradient_difference'] for one in found.values()):.0e}"])
    three = [f"{what}: {way}" for what in ("saved MB", "peak MB", "s") for way in ("single", "two", "micro")]
    text = (
        f"{PROMPTS} prompts × {SAMPLES} samples, {args.threads} thread(s); micro: micro-batches of {args.micro_tokens} tokens.\n\n"
        + markdown(" | ".join(["model", "T", *three, "gradients differ by"]), lines)
    )
    report("bench_memory", text, records, args)


if __name__ == "__main__":
    main()

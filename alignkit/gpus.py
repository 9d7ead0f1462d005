"""Which GPU a run fits on and how long it would take there: arithmetic on data sheets, never a measurement.

Time is that of products over many tokens at once, operations / (peak × ``MFU``), and of decoding, where every token of a batch of
responses reads all weights and the cache anew: the slower of operations / (peak × ``MFU``) and bytes / (bandwidth × ``STREAMED``).
A forward pass costs 2 operations a weight and token, gradients 2 for those that are handed on and 2 a trained weight: 6 where all
are trained (arXiv 2001.08361, section 2.1); attention itself is left out. Model FLOPs utilisation is defined in arXiv 2204.02311,
section 4.1; that of a run is not known before, and the shares assumed here are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

MFU = 0.3  # assumed share of the peak
STREAMED = 0.5  # assumed share of the memory's bandwidth in decoding
KEPT = 0.1  # assumed share of the memory that libraries and the allocator keep
ASSUMED = (
    f"Estimates from data sheets, not measured: {MFU:.0%} of the peak without sparsity, {STREAMED:.0%} of the bandwidth in decoding,",
    f"{KEPT:.0%} of the memory kept free; evaluation, requests, loading and attention's own operations are not counted.",
)


@dataclass(frozen=True)
class GPU:
    """Numbers of NVIDIA's data sheets, without sparsity; of A100 and H100 the SXM boards."""

    name: str
    memory: float  # bytes
    bfloat16: float  # operations a second, tensor cores
    float32: float  # operations a second, without TF32, which torch leaves off
    bandwidth: float  # bytes a second

    def holds(self, need: float) -> bool:
        return need <= (1 - KEPT) * self.memory


GPUS = (
    GPU("L4 24 GB", 24e9, 121e12, 30.3e12, 300e9),
    GPU("RTX 4090 24 GB", 24e9, 165e12, 82.6e12, 1008e9),
    GPU("A100 40 GB", 40e9, 312e12, 19.5e12, 1555e9),
    GPU("A100 80 GB", 80e9, 312e12, 19.5e12, 2039e9),
    GPU("H100 80 GB", 80e9, 989e12, 67e12, 3350e9),
)


@dataclass
class Work:
    """What a run computes: ``operations`` over many tokens at once, those of decoding, and the bytes that decoding reads."""

    operations: float = 0.0
    decoded: float = 0.0
    read: float = 0.0
    bfloat16: bool = False  # precision of it all

    def seconds(self, gpu: GPU) -> float:
        speed = MFU * (gpu.bfloat16 if self.bfloat16 else gpu.float32)
        return self.operations / speed + max(self.decoded / speed, self.read / (STREAMED * gpu.bandwidth))


def decoding(steps: float, responses: int, prompt: float, new: int, weights: int, cache: float, width: int) -> Work:
    """Decoding ``steps`` times ``responses`` at the same time, prompts of ``prompt`` tokens, ``new`` each.

    Args:
        cache: bytes of keys and values a token.
        width: bytes of a weight in the precision of decoding.
    """
    return Work(
        decoded=2.0 * weights * steps * responses * new,
        read=steps * new * (weights * width + responses * (prompt + new / 2) * cache),
    )

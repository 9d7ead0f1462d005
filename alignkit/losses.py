"""Pure loss functions. Each returns a sum and what to divide it by; none of them divides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alignkit import ops
from alignkit.batch import Loss


def nll(logprobs: Tensor, mask: Tensor, normalize: str = "tokens") -> Loss:
    """Negative log-likelihood: logprobs (B, T), mask (B, T) bool.

    ``normalize``: ``tokens`` (mean over tokens) or ``sequences`` (mean over rows of the summed token losses).
    """
    total = -(logprobs * mask).sum()
    tokens = float(mask.sum())
    count = {"tokens": tokens, "sequences": float(len(mask))}[normalize]
    return Loss(total, count, {"nll": float(total.detach()) / max(tokens, 1.0)})


def aggregate(x: Tensor, mask: Tensor, group: Tensor, normalize: str, length: int = 0) -> tuple[Tensor, float]:
    """Per-token losses x (B, T) → (sum, what it is divided by). ``normalize`` says what one unit of the mean is:

    ``groups``     each prompt counts once, its k responses 1/k each, by the sum of their tokens (ESRL's 1/k weights);
    ``sequences``  each response counts once, by the sum of its tokens;
    ``responses``  each response counts once, by the mean of its tokens (GRPO, arXiv 2402.03300);
    ``tokens``     each token counts once (DAPO, arXiv 2503.14476);
    ``constant``   each response counts once, by the sum of its tokens over ``length`` (Dr. GRPO, arXiv 2503.20783).
    """
    rows = (x * mask).sum(1)
    if normalize == "groups":
        _, index, sizes = torch.unique_consecutive(group, return_inverse=True, return_counts=True)
        return (rows / sizes[index]).sum(), float(len(sizes))
    if normalize == "sequences":
        return rows.sum(), float(len(rows))
    if normalize == "responses":
        return (rows / mask.sum(1).clamp(min=1)).sum(), float(len(rows))
    if normalize == "tokens":
        return rows.sum(), float(mask.sum())
    if normalize == "constant":
        return rows.sum() / length, float(len(rows))
    raise ValueError(f"normalize must be groups, sequences, responses, tokens or constant, not '{normalize}'")


def policy_gradient(
    logprobs: Tensor, advantages: Tensor, mask: Tensor, group: Tensor, normalize: str, length: int = 0
) -> Loss:
    """REINFORCE: ``-sum_t A_t log pi(y_t)``; logprobs, advantages, mask (B, T), group (B,) adjacent ids."""
    return Loss(*aggregate(-advantages.detach() * logprobs, mask, group, normalize, length))


def clipped(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    group: Tensor,
    normalize: str,
    length: int = 0,
    *,
    low: float = 0.2,
    high: float | None = None,
    dual: float | None = None,
    level: str = "token",
) -> Loss:
    """PPO's ``-min(rho A, clip(rho, 1 - low, 1 + high) A)`` (arXiv 1707.06347); all (B, T).

    ``level``: the ratio rho of each token, or of the whole ``sequence`` (the product of its tokens' ratios; one action).
    ``high``: DAPO's wider upper side; default ``low``. ``dual``: with A < 0 the loss is at most ``-dual * A`` (dual clip).
    """
    advantages = advantages.detach()
    log_ratio = (logprobs - old_logprobs) * mask
    unit = mask
    if level == "sequence":  # one action a row: its advantage stands on each token, its ratio is the product
        log_ratio, advantages, unit = log_ratio.sum(1, keepdim=True), advantages[:, :1], mask[:, :1]
    ratio = log_ratio.clamp(-20, 20).exp()
    bounded = ratio.clamp(1 - low, 1 + (low if high is None else high))
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    if dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)
    n = float(unit.sum().clamp(min=1))
    total, count = aggregate(loss, unit, group, normalize, length)
    with torch.no_grad():
        outside = (loss > -ratio * advantages) & unit
        metrics = {
            "clip_fraction": float(outside.sum()) / n,
            "approx_kl": float(((ratio - 1 - log_ratio) * unit).sum()) / n,
        }
    return Loss(total, count, metrics)


def mrt(logprobs: Tensor, rewards: Tensor, group: Tensor, alpha: float, keep: Tensor) -> Loss:
    """Minimum risk training (arXiv 1512.02433): ``-sum_i sum_j Q_ij r_ij`` with Q = softmax over a group of alpha log p.

    logprobs (B,) of sequences, rewards (B,), keep (B,) bool: candidates that stand in the set (not the duplicates).
    The sum is over inputs; the mean counts inputs.
    """
    _, index, sizes = torch.unique_consecutive(group, return_inverse=True, return_counts=True)
    scaled = (alpha * logprobs).masked_fill(~keep, -torch.inf)
    top = torch.full((len(sizes),), -torch.inf, device=scaled.device, dtype=scaled.dtype)
    top = top.scatter_reduce(0, index, scaled.detach(), "amax")
    weight = (scaled - top[index]).exp()
    share = weight / torch.zeros_like(top).index_add(0, index, weight)[index]
    return Loss(-(share * rewards.detach()).sum(), float(len(sizes)))


def rebel(log_ratios: Tensor, rewards: Tensor, eta: float, scaled: bool = False) -> Loss:
    """REBEL (arXiv 2404.16767): squared error of log-ratio differences against eta times reward differences.

    Rows 2i and 2i + 1 are a pair; log_ratios (B,) = log pi(y|x) - log pi_t(y|x), rewards (B,). ``scaled`` divides by
    eta²: the paper's form; without it the released code's.
    """
    apart, wanted = log_ratios[0::2] - log_ratios[1::2], rewards[0::2] - rewards[1::2]
    error = (apart - eta * wanted.detach()).square() / (eta**2 if scaled else 1.0)
    return Loss(error.sum(), float(len(error)))


def response(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(n,) T² KL(p_T ‖ p_S) of logits (n, V), both over the temperature T (arXiv 1503.02531; PKD's code, arXiv 1908.09355)."""
    wanted = (teacher.float() / temperature).log_softmax(-1)
    found = (student.float() / temperature).log_softmax(-1)
    return temperature**2 * (wanted.exp() * (wanted - found)).sum(-1)


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """(n,) beta KL(p_T ‖ m) + (1 - beta) KL(p_S ‖ m), m = beta p_T + (1 - beta) p_S, of logits (n, V) (arXiv 2306.13649, eq. 1).

    ``beta`` 0: KL(p_T ‖ p_S), 1: KL(p_S ‖ p_T), to which it tends once divided by beta or 1 - beta.
    """
    p, q = (x.float().div(temperature).log_softmax(-1) for x in (teacher, student))
    if beta in (0.0, 1.0):
        a, b = (p, q) if beta == 0.0 else (q, p)
        return (a.exp() * (a - b)).sum(-1)
    mixed = torch.logsumexp(torch.stack([p + math.log(beta), q + math.log(1 - beta)]), 0)
    return beta * (p.exp() * (p - mixed)).sum(-1) + (1 - beta) * (q.exp() * (q - mixed)).sum(-1)


def feature(student: Tensor, teacher: Tensor) -> Tensor:
    """(...,) mean squared difference of states (..., d)."""
    return (student.float() - teacher.float()).square().mean(-1)


def patient(student: Tensor, teacher: Tensor) -> Tensor:
    """(...,) ``feature`` of states (..., d) of length 1: PKD's normalised form (arXiv 1908.09355, released code)."""
    return feature(
        torch.nn.functional.normalize(student.float(), dim=-1), torch.nn.functional.normalize(teacher.float(), dim=-1)
    )


def fsp(a: Tensor, b: Tensor, where: Tensor) -> Tensor:
    """(B, d, e) flow between two layers, H_aᵀ H_b / n over a row's n tokens (Yim et al., CVPR 2017, tokens for positions).

    Args:
        a, b: (B, W, d) and (B, W, e) states; ``where`` (B, W) bool: the tokens that count.
    """
    kept = where[..., None]
    flow = (a.float() * kept).transpose(1, 2) @ (b.float() * kept)
    return flow / where.sum(1).clamp(min=1)[:, None, None]


def relation(student: list[Tensor], teacher: list[Tensor], where: Tensor) -> Tensor:
    """(B,) mean squared difference of the flows between consecutive layers, mean over the pairs of layers.

    Args:
        student, teacher: states (B, W, d) of as many layers, the lower ones first.
    """
    pairs = [
        (fsp(student[i], student[i + 1], where) - fsp(teacher[i], teacher[i + 1], where)).square().mean((1, 2))
        for i in range(len(student) - 1)
    ]
    return torch.stack(pairs).mean(0)


def logistic(margins: Tensor, smoothing: float = 0.0, robust: bool = False) -> Tensor:
    """(N,) -log sigmoid(d) of margins d (N,), with a share ``smoothing`` of the pairs taken for flipped.

    l = -log sigmoid(d), l' = -log sigmoid(-d): (1 - e) l + e l', the conservative form; ((1 - e) l - e l') / (1 - 2e) where
    ``robust``, whose mean over flips is l.
    """
    loss = -torch.nn.functional.logsigmoid(margins)
    if not smoothing:
        return loss
    flipped = -torch.nn.functional.logsigmoid(-margins)
    if robust:
        return ((1 - smoothing) * loss - smoothing * flipped) / (1 - 2 * smoothing)
    return (1 - smoothing) * loss + smoothing * flipped


def preference(margins: Tensor, kind: str, beta: float) -> Tensor:
    """(N,) loss of each pair from margins (N,) = [log pi/ref of the chosen] - [of the rejected].

    ``dpo``: -log sigmoid(beta d) (arXiv 2305.18290); ``ipo``: (d - 1 / (2 beta))² on summed log-probabilities, the
    paper's form (arXiv 2310.12036).
    """
    if kind == "dpo":
        return logistic(beta * margins)
    if kind == "ipo":
        return (margins - 1 / (2 * beta)).square()
    raise ValueError(f"the preference loss must be dpo or ipo, not '{kind}'")


def clipped_value(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """(B, T) 1/2 max((V - R)², (clip(V, V_old ± clip) - R)²); without a clip 1/2 (V - R)²."""
    error = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return error / 2


def hl_gauss(logits: Tensor, returns: Tensor, edges: Tensor, sigma: float) -> Tensor:
    """(B, T) cross-entropy of value logits (B, T, m) against a Gaussian around the returns (B, T); arXiv 2403.03950."""
    target = ops.hl_gauss_target(returns, edges, sigma)
    return -(target * logits.float().log_softmax(-1)).sum(-1)

"""Metrics in words, for tables on the screen and in reports."""

LABELS = {
    "bleu": "BLEU", "chrf": "chrF", "exact_match": "exact match %", "length_ratio": "length ratio", "accuracy": "accuracy %",
    "label_nll": "NLL of the label, nats", "agreement": "says what the teacher says %", "preference_accuracy": "pairs ranked right %",
    "first_exact_match": "first answer: exact match %", "first_reward": "first answer: reward", "ties": "ties %",
    "parse_failed": "critique not readable %", "tokens": "tokens written", "characters": "characters of the answer",
    "macro": "mean of sections %", "longer_wins": "longer one chosen %", "length_spearman": "Spearman of score and length",
    "nll": "NLL, nats", "ece": "calibration error", "margin": "margin, mean", "margin_max": "margin, greatest",
    "margin_sd": "margin, deviation", "score_sd": "score, deviation", "error": "squared error",
    "kl": "KL to the start, nats a response", "loss": "loss", "length": "length of a response, tokens", "cut_off": "share cut off",
    "reward": "reward", "second": "second reward", "zero_advantage": "share without a signal", "grad_norm": "gradient norm",
    "reward_loss": "loss on reward rows", "selection_loss": "loss on selection rows", "step_seconds": "seconds a step",
}  # fmt: skip
PER_CENT = {
    "bleu", "chrf", "exact_match", "accuracy", "agreement", "first_exact_match", "parse_failed", "preference_accuracy", "ties",
    "macro", "longer_wins", "win_rate", "length_controlled", "section",
}  # fmt: skip

"""Learning rate over the run, as a share of the configured one."""

from __future__ import annotations

import math

from regraft.engine.config import TrainingConfig


def warmup_steps(config: TrainingConfig, total: int) -> int:
    """Steps of linear warm-up: a share of all steps below 1, a number of steps from 1."""
    return min(total, round(config.warmup * total) if config.warmup < 1 else int(config.warmup))


def learning_rate_share(config: TrainingConfig, step: int, total: int) -> float:
    """Share in [0, 1] for optimizer step `step` (from 0) of `total`.

    linear: to 0 at the end; cosine: half a wave to 0 (Loshchilov and Hutter 2017); wsd: warm-up, stable, then 1 - sqrt
    over the last `decay` of the run (Hägele et al. 2024).
    """
    warmup = warmup_steps(config, total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if config.schedule == "wsd":
        decay = max(1, round(config.decay * total))
        left = total - step
        return 1.0 if left >= decay else 1.0 - math.sqrt(1.0 - left / decay)
    return 1.0 - done

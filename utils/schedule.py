"""Learning-rate schedules as functions of the step. Pure."""

import math

SCHEDULES = ("inverse_sqrt", "cosine", "linear", "constant")
FLOOR = 0.1  # final factor of cosine and linear decay


def lr_factor(step: int, warmup_steps: int, total_steps: int, schedule: str) -> float:
    """Returns the factor of the peak learning rate at `step`, counted from 0.

    Linear warm-up, (step + 1) / warmup_steps, reaches 1 at its last step. Then inverse_sqrt: sqrt(warmup_steps / (step
    + 1)); cosine and linear: decay to 0.1 at step total_steps - 1; constant: 1.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"--lr_schedule {schedule}: must be one of {', '.join(SCHEDULES)}")
    if warmup_steps < 0:
        raise ValueError(f"--warmup_steps {warmup_steps}: must be at least 0")
    warmup_steps = max(1, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "inverse_sqrt":
        return math.sqrt(warmup_steps / (step + 1))
    # 0 at the last step of the warm-up, 1 at the last step.
    progress = min(1.0, (step + 1 - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "cosine":
        return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1 - (1 - FLOOR) * progress
    return 1.0

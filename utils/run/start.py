"""Start-up of all trainers: joins ranks, checks the output folder, finds the checkpoint, opens folder and log."""

from functools import partial

from utils.device import device as own_device
from utils.distributed import any_rank, is_main
from utils.engine.engine import init_distributed
from utils.errors import Say
from utils.fast_dtype import fast_dtype
from utils.flags.checks import choose
from utils.flags.run import RunFlags
from utils.notices import start_notices, update
from utils.run.compare_ranks import check_ranks
from utils.run.fingerprints import fingerprints
from utils.run.folder import check_inputs
from utils.run.lock import hold_folder
from utils.run.logger import RunLogger
from utils.run.push import check_push
from utils.run.restore import Checkpoint, TrainerState
from utils.run.resume import begin_folder, check_outputs, find_checkpoint, inputs_of
from utils.run.stop_signal import set_hangup_action
from utils.run.together import together
from utils.run.trackers import Trackers
from utils.watchdog import report_progress


def start_run(config: RunFlags, kind: type[TrainerState]) -> tuple[Say, Checkpoint | None]:
    """Joins and compares the ranks, chooses --dtype auto, checks --model_save_path and --resume. Writes only the lock.

    kind: what state.json of a checkpoint has to hold. Returns a function that prints on rank 0, and the checkpoint to
    resume from (None: the run starts at step 0).
    """
    set_hangup_action(config.ignore_hangup)
    init_distributed(config.hang_timeout)
    report_progress("start of all ranks")
    say = partial(print, flush=True) if is_main() else lambda text: None
    with together():
        start_notices(config, is_main())
        config.fingerprints = fingerprints(config, say)
        check_ranks(config)
        choose_dtype(config)
        check_inputs(config.model_save_path, inputs_of(config))
        hold_folder(config.model_save_path)
        check_outputs(config)
        if config.push_to_hub and is_main():
            check_push(config)
        return say, find_checkpoint(config, say, kind)


def open_log(config: RunFlags, checkpoint: Checkpoint | None, num_steps: int) -> RunLogger:
    """Prepares the run's folder for the steps after the checkpoint, and opens its log. Collective."""
    with together():
        step = begin_folder(config, checkpoint)
        trackers = Trackers(config, partial(print, flush=True)) if is_main() else None
        update(step, num_steps)
        return RunLogger(config.model_save_path, config.logdir, num_steps, step, config.log_every, trackers)


def choose_dtype(config) -> None:
    """Sets --dtype auto to bf16 if all ranks multiply it fast, else to fp32; warns of a slow bf16 that was given."""
    if config.dtype == "fp32":
        return
    place = own_device()
    name, is_slow = place.type.upper(), any_rank(fast_dtype(place) != "bf16", place)
    if config.dtype == "auto":
        reason = f"this {name} multiplies bf16 {'in software' if is_slow else 'fast'}"
        choose(config, "dtype", "fp32" if is_slow else "bf16", reason)
    elif is_slow and is_main():
        print(f"warning: this {name} multiplies bf16 in software, many times slower than --dtype fp32", flush=True)

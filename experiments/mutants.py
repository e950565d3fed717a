"""Test whether the experiments detect a bug:   python -m experiments.mutants kl_sign --setting kl_only [--seeds 3]

Runs a setting with a bug in one expression of the code, and prints the verdicts of the claims about this setting on
these runs and on the stored ones. If no verdict changes, the experiments cannot detect the bug. The changed copy of the
code and its runs remain in outputs/experiments/mutants.
"""

import argparse
import os
import shutil
from pathlib import Path

from experiments.claims import FIGURES
from experiments.curves import load_runs, read_run
from experiments.report import Table, verdicts
from experiments.run import Job, execute, folder_name, side_by_side, stop_in_order
from experiments.settings import CODE, REPOSITORY
from experiments.world import WORLD, build_world
from utils.errors import UserError
from utils.flags.parser import entry_point

# name -> (file, correct expression, bug)
MUTANTS = {
    "kl_sign": ("ppo/rewards.py", "(-kl_coef * kl)", "(kl_coef * kl)"),
    "unmasked_advantages": ("ppo/loss.py", "masked_sum(-surrogate, response_mask)", "(-surrogate).sum()"),
}


def copy_code(name: str, folder: Path) -> None:
    """Copies the code to `folder` with the bug."""
    file, right, wrong = MUTANTS[name]
    shutil.rmtree(folder, ignore_errors=True)
    for part in CODE:
        copy = shutil.copytree if (REPOSITORY / part).is_dir() else shutil.copy
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        copy(REPOSITORY / part, folder / part)
    text = (folder / file).read_text("utf-8")
    if text.count(right) != 1:
        raise UserError(f"{file} has {right!r} {text.count(right)} times; fix MUTANTS in experiments/mutants.py")
    (folder / file).write_text(text.replace(right, wrong), "utf-8")


def verdicts_on(setting: str, runs: list) -> Table:
    """Returns the verdicts of all claims about this setting alone."""
    claims = [claim for figure in FIGURES.values() if setting in figure.settings for claim in figure.claims]
    alone = [claim for claim in claims if all(x.text.startswith(f"{setting}:") for x in claim.criteria)]
    return verdicts(alone, {setting: runs})


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Runs the setting and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mutant", choices=MUTANTS)
    parser.add_argument("--setting", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    stop_in_order()
    world = REPOSITORY / WORLD
    folder = world.parent / "mutants" / options.mutant
    copy_code(options.mutant, folder / "code")
    build_world(world)
    seeds = range(1, options.seeds + 1)
    jobs = [Job(options.setting, s, folder / folder_name(options.setting, s), folder / "code") for s in seeds]
    side_by_side(jobs, lambda job: execute(job, world), options.workers)
    wrong = [read_run(job.folder, job.setting, job.seed, options.mutant, tax=0.0) for job in jobs]
    right = load_runs(options.setting, options.seeds)
    print(f"\n{options.setting}, stored runs\n{verdicts_on(options.setting, right).markdown()}")
    print(f"\nwith {options.mutant}\n{verdicts_on(options.setting, wrong).markdown()}")


if __name__ == "__main__":
    main()

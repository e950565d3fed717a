"""Every command once, on tiny inputs, with no network and open permissions:   python -m tests.security.tiny_jobs FOLDER

Any attempt to reach another machine ends the process with a stack. `hub` as second word asks for a model by hub id, to
show that such an attempt is noticed. Nothing is told to stay offline: no HF_HUB_OFFLINE.
"""

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

ATTEMPT = 99  # exit code
LOCAL = ("127.", "localhost", "::1", "0.0.0.0")


def no_network(event: str, arguments: tuple) -> None:
    """An audit hook: connections and look-ups of names are for this machine alone."""
    if event not in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        return
    target = arguments[:1] if event == "socket.getaddrinfo" else arguments[1]
    host = target[0] if isinstance(target, tuple) else None  # a path: a socket of this machine
    if host is not None and not str(host).startswith(LOCAL):
        print(f"an attempt to reach {host}", file=sys.stderr, flush=True)
        traceback.print_stack()
        os._exit(ATTEMPT)


sys.addaudithook(no_network)
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch  # noqa: E402 - the hook comes first

import merge_weight_en  # noqa: E402
import ppo.report  # noqa: E402
from tests.bad_inputs.commands import COMMANDS  # noqa: E402
from tests.bad_inputs.materials import Materials  # noqa: E402
from tests.bad_inputs.test_corpus import command_line  # noqa: E402
from utils.weight_diff.commands import run as merge  # noqa: E402

HOSTILE = ["$(touch {folder}/ran)", "`touch {folder}/ran`", "'; touch {folder}/ran; '", "../../ran", "| touch ran"]
HOSTILE += ["{{{{ 7 }}}}"]
# Moves the cursor, sets the title, ends the line, turns the reading direction, and what is no character at all
CONTROL = "$\\frac$evil\r\x1b[2J\x1b]0;x\x07\x08\x7f\x9b1A\u202e\u2066"
HOSTILE += [CONTROL, "half \ud800", "<img src=x onerror=x> ![x](http://x/x.png) & \\[x](x)"]


def hostile_data(folder: Path) -> None:
    """Records whose texts, ids, subsets and files' names would do harm in a shell, on a terminal or as a path."""
    texts = [text.format(folder=folder) for text in HOSTILE] * 4
    (folder / "data").mkdir()
    prompts = [{"id": text, "prompt": text} for text in texts]
    (folder / "data" / f"$(touch ran){CONTROL}train.json").write_text(json.dumps(prompts))
    dialogues = [{"id": text, "prompt": text, "response": text} for text in texts]
    (folder / "dialogues.json").write_text(json.dumps(dialogues))
    pairs = [{"prompt": f"{t} {k}", "chosen": t, "rejected": "no", "subset": t, "id": t} for k, t in enumerate(texts)]
    (folder / "pairs.json").write_text(json.dumps(pairs))


def main(folder: Path, hub: bool) -> None:
    """Runs them all below `folder`/jobs."""
    torch.set_num_threads(1)
    materials = Materials(folder / "materials")
    if hub:
        argv = command_line({"command": "ppo", "flags": {"policy_model_path": "someone/model"}}, materials, folder)
        COMMANDS["ppo"].main(argv)
    (folder / "jobs").mkdir(mode=0o755)
    os.umask(0)
    hostile_data(folder)
    one = {"train_steps": 1, "checkpoint_per_step": 1, "report_to": "none"}
    jobs = {
        "ppo": one | {
            "data_path": folder / "data", "reward_fn": "{reward_file}:vowels", "reward_model_path": "{reward}",
            "use_ppo_pretrain_loss": True, "ppo_pretrain_loss_weight": 1, "ppo_pretrain_batch_size": 2,
            "ppo_pretrain_data_path": folder / "dialogues.json",
        },
        "sft": one | {"data_path": folder / "dialogues.json"},
        "reward": one | {"data_path": folder / "pairs.json", "center_scores": True, "context_truncate": 256},
        "score": {"input": folder / "dialogues.json", "output": "{folder}/scored.jsonl"},
        "score two": {"compare": ["{eight}", "{eight}"], "input": None, "output": "{folder}/scored.jsonl"},
        "evaluate": {"data_path": folder / "pairs.json", "output": "{folder}/evaluation"},
        "strength": {"data_path": folder / "pairs.json"},
        "compare": {},
    }  # fmt: skip
    for name, flags in jobs.items():
        flags = {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}
        place = folder / "jobs" / name
        place.mkdir(mode=0o755)
        os.umask(0)  # what a careless container gives a process
        command = name.split()[0]
        COMMANDS[command].main(command_line({"command": command, "flags": flags}, materials, place))
    shutil.copy(folder / "jobs" / "compare" / "out" / "table.json", folder / "jobs" / "ppo" / "out" / "comparison.json")
    os.umask(0)
    ppo.report.main([str(folder / "jobs" / "ppo" / "out")])
    os.umask(0)
    paths = {"path_raw": materials["raw"], "path_tuned": materials["diff"], "path_diff": folder / "jobs" / "made"}
    words = [word for flag, path in paths.items() for word in (f"--{flag}", str(path))]
    merge(merge_weight_en.RELEASE, "", ["make_diff", "--model_type", "policy", *words])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["hub"])

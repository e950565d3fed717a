"""Peak memory of each rank while a trainer starts with weights that are split over two ranks (ZeRO-3).

    python benchmarks/zero3_start.py [--model 1.1B] [--trainer sft|ppo] [--ranks 2] [--zero_stage 3] [--tree FOLDER]

Writes a random LLaMA in bf16 to a temporary folder, and creates models and engines as the trainer does. ppo: the LLaMA
is policy, reference and critic, and beside it is a reward model. Host memory is anonymous memory (RssAnon, RssShmem),
read every 5 ms, above that before the start; pages of weight files do not count. Held: the same after the start. The
limit is 1.3 times what is held, plus 1 GiB. --tree: measures the code of another checkout.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
GIB = 1 << 30
RANK = """
import gc, sys, time
from utils.engine.engine import TrainEngine, device, init_distributed, shutdown_distributed
import torch, deepspeed.runtime.zero.stage3, deepspeed.runtime.zero.muon.muon_optimizer
from ppo.config import PPOConfig
from ppo.models import load_models
from sft.config import SFTConfig
from sft.model import AnswerModel
from sft.stage import load
from utils.tokenizer import load_tokenizer
trainer, folder, stage, dtype = sys.argv[1:]
init_distributed()
tokenizer = load_tokenizer(folder, "moss_en")
print("ready", flush=True)
sys.stdin.readline()
start = time.perf_counter()
if trainer == "sft":
    config = SFTConfig(hf_model_name_or_path=folder, data_path=[folder], zero_stage=int(stage), dtype=dtype)
    held = TrainEngine(AnswerModel(load(config, tokenizer, lambda _: None)[0]), config, "model")
else:
    config = PPOConfig(
        policy_model_path=folder, critic_model_path=folder, reward_model_path=[folder + "/reward"], data_path=folder,
        zero_stage=int(stage), dtype=dtype,
    )
    held = load_models(config, tokenizer, lambda _: None)
gc.collect()
on_gpu = device().type == "cuda"
peak, now = (torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()) if on_gpu else (0, 0)
print("started", time.perf_counter() - start, peak, now, flush=True)
sys.stdin.readline()
shutdown_distributed()
"""


def make(folder: Path, name: str) -> None:
    """Writes the model as a causal LM and, in reward/, as a reward model; and a tokenizer of 400 pieces."""
    import torch

    from benchmarks.random_inputs import MODELS, random_classifier, random_lm
    from tests.helpers.tiny import tiny_tokenizer_folder

    for kind, place in ((random_lm, folder), (random_classifier, folder / "reward")):
        kind(MODELS[name], torch.bfloat16, torch.device("cpu")).save_pretrained(place)
        tiny_tokenizer_folder(place)


def anonymous(process: subprocess.Popen) -> int:
    """Returns the bytes of anonymous memory of a process."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def start_ranks(command: list[str], ranks: int, tree: Path) -> list[subprocess.Popen]:
    """Starts one process per rank of one group."""
    from utils.launcher import free_port

    group = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": str(free_port()), "PYTHONPATH": str(tree)}
    group |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # what is freed goes back to the kernel at once
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tree}
    environments = (os.environ | group | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks))
    return [subprocess.Popen(command, env=environment, **pipes) for environment in environments]


def answer(process: subprocess.Popen, word: str) -> list[float]:
    """Returns the numbers behind `word` in the next line that begins with it. Raises SystemExit if the rank fails."""
    for line in process.stdout:
        if line.startswith(word):
            return [float(number) for number in line.split()[1:]]
    raise SystemExit(f"rank failed with exit code {process.wait()}; see the messages above")


def measure(processes: list[subprocess.Popen]) -> None:
    """Prints one line per rank."""
    for process in processes:
        answer(process, "ready")
    before = [anonymous(process) for process in processes]
    peaks = list(before)
    for process in processes:
        print(file=process.stdin, flush=True)
    with ThreadPoolExecutor(len(processes)) as pool:
        answers = [pool.submit(answer, process, "started") for process in processes]
        while not all(found.done() for found in answers):
            peaks = [max(peak, anonymous(process)) for peak, process in zip(peaks, processes, strict=True)]
            time.sleep(0.005)
    for i, process in enumerate(processes):
        seconds, device_peak, device_held = answers[i].result()
        held, peak = anonymous(process) - before[i], peaks[i] - before[i]
        report(f"rank {i}: {seconds:.1f} s, host", peak, held)
        if device_held:
            report(f"rank {i}: device", int(device_peak), int(device_held))
        print(file=process.stdin, flush=True)
    for process in processes:
        process.wait()


def report(what: str, peak: int, held: int) -> None:
    """Prints a peak and its limit."""
    limit = 1.3 * held + GIB
    verdict = "within" if peak <= limit else "ABOVE"
    print(f"{what}: peak {peak / GIB:.2f} GiB, held {held / GIB:.2f}, {verdict} the limit of {limit / GIB:.2f}")


def main() -> None:
    """Prints one line per rank, on a GPU two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="58M")
    parser.add_argument("--trainer", choices=("sft", "ppo"), default="sft")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero_stage", default="3")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--tree", type=Path, default=REPOSITORY)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        make(Path(name), options.model)
        command = [sys.executable, "-c", RANK, options.trainer, name, options.zero_stage, options.dtype]
        processes = start_ranks(command, options.ranks, options.tree.resolve())
        try:
            measure(processes)
        finally:
            for process in processes:
                process.kill()


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()

"""Time and memory of a start with large data:   python benchmarks/data_start.py --tokenizer FOLDER [--tree OTHER_TREE]

Generates HH-shaped pairs and runs `reward.train` on a tiny model to its first step, with one and two processes, cold
and warm; then encodes two numbers of short prompts. --tree: a checkout of another commit to measure beside this one,
which has no cache. FOLDER: with a tokenizer.model in LLaMA's format. Memory is anonymous memory, since the system can
drop mapped pages.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parents[1]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
FLAGS = "--train_steps 1 --batch_size 8 --warmup_steps 0 --num_valid 8 --context_truncate 512 --dtype fp32"
PROMPTS = """
import sys, time
from data.encoded import form_options, load_encoded
from data.prompts import PromptEncoder
from utils.flags.data import RecordFlags
from utils.tokenizer import load_tokenizer
if __name__ == "__main__":
    flags = RecordFlags(data_cache=sys.argv[3])
    encoder = PromptEncoder(load_tokenizer(sys.argv[2], "moss_en"), "moss_en", 400, form_options(flags))
    train, _ = load_encoded([sys.argv[1]], encoder, flags, 100, 0, print)
    begin = time.monotonic()
    for start in range(0, 128 * 50, 128):
        train.take(start, 128)
    print(f"{(time.monotonic() - begin) / 50 * 1e3:.1f} ms per 128 prompts")
"""


def make_model(folder: Path, tokenizer: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(vocab_size=32000, max_position_embeddings=2048, **SIZES)).save_pretrained(folder)
    shutil.copy(tokenizer / "tokenizer.model" if tokenizer.is_dir() else tokenizer, folder / "tokenizer.model")


def make_pairs(file: Path, count: int) -> None:
    """Dialogues of 1 to 4 questions, about 310 tokens per pair."""
    rng, words = random.Random(0), (HERE / "docs" / "findings.md").read_text("utf-8").split()

    def text(mean: float) -> str:
        length = min(max(3, int(rng.lognormvariate(mean, 0.75))), len(words) // 2)
        start = rng.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            history = f"\n\nHuman: {text(2.6)}?"
            for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
                history += f"\n\nAssistant: {text(3.2)}\n\nHuman: {text(2.6)}?"
            chosen, rejected = (f"{history}\n\nAssistant: {text(3.3)}{end}" for end in ("", "."))
            out.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")


def watched(command: list[str], tree: Path) -> tuple[float, dict[str, int], str]:
    """Returns (seconds, peak anonymous memory in MB of the largest process per kind, output)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(tree)}
    begin, peaks = time.monotonic(), {}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=tree, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    words = (folder / "cmdline").read_text().split("\0")
                    kind = "worker" if "--multiprocessing-fork" in words else "rank"
                    if kind == "worker" or (words[1:-1] == command[1:] or "reward.train" in words):
                        lines = (folder / "status").read_text().splitlines()
                        size = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) >> 10
                        peaks[kind] = max(peaks.get(kind, 0), size)
                except (OSError, StopIteration):
                    continue
            time.sleep(0.2)
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(text)
    return time.monotonic() - begin, peaks, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--tree", type=Path)
    parser.add_argument("--pairs", type=int, default=160_000)
    parser.add_argument("--prompts", type=int, nargs="*", default=[1_000_000, 10_000_000])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        make_model(folder / "model", options.tokenizer)
        make_pairs(folder / "pairs.jsonl", options.pairs)
        paths = f"--hf_model_name_or_path {folder}/model --data_path {folder}/pairs.jsonl"
        paths += f" --model_save_path {folder}/run"
        for tree in filter(None, (options.tree, HERE)):
            runs = ("cold", "warm") if tree == HERE else ("each start",)
            cache = f"--data_cache {folder}/cache" if tree == HERE else ""
            for ranks in (1, 2) if options.pairs else ():
                shutil.rmtree(folder / "cache", ignore_errors=True)
                for run in runs:
                    shutil.rmtree(folder / "run", ignore_errors=True)
                    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else []
                    command = [sys.executable, *launcher, "-m", "reward.train", *f"{paths} {FLAGS} {cache}".split()]
                    seconds, peaks, _ = watched(command, tree)
                    what = f"{tree.name}: {options.pairs:,} pairs, {ranks} ranks, {run}"
                    print(f"{what}: {seconds:.1f} s, MB {peaks}", flush=True)
        (folder / "prompts.py").write_text(PROMPTS)
        for count in options.prompts:
            with (folder / "prompts.jsonl").open("w") as out:
                out.writelines(
                    f'{{"prompt": "What is {i} plus {i % 97}, and why is that so?"}}\n' for i in range(count)
                )
            command = [sys.executable, str(folder / "prompts.py"), str(folder / "prompts.jsonl")]
            for run in ("cold", "warm"):
                seconds, peaks, text = watched([*command, str(folder / "model"), str(folder / "cache")], HERE)
                took = text.strip().splitlines()[-1]
                print(f"{count:,} prompts, {run}: {seconds:.1f} s, {took}, MB {peaks}", flush=True)


if __name__ == "__main__":
    main()

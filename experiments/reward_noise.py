"""Reward training with 25 % wrong labels, with flipping and smoothing:   python experiments/reward_noise.py [--seeds 5]

Synthetic preferences: each of 60 words has a hidden quality (normal distribution), the quality of an answer is the mean
over its 6 to 12 random words, and the better of two answers is chosen. 25 % of the training labels are reversed; 400
held-out pairs are clean. A LLaMA with 2 layers and hidden size 64 is trained from random weights with the project's
commands, long enough to memorise wrong labels:

plain      -log s(d)
smoothing  --label_smoothing 0.25
flipping   reward.strength with three plain models (other seeds, a third of the steps), then --flip_negative
both       smoothing and flipping
short      mean accuracy of those three models, which shows the effect of early stopping alone

Prints the held-out accuracy after the last step per seed, and the mean difference to plain with its 95 % interval over
seeds (Student's t).
"""

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.intervals import over_seeds
from reward import strength
from reward.train import main as train

WORDS, PAIRS, HELD_OUT, NOISE, MEMBERS = 60, 600, 400, 0.25, 3


def write_data(folder: Path, seed: int) -> None:
    """Writes train.jsonl with wrong labels and valid.jsonl without."""
    rng = random.Random(seed)
    quality = [rng.gauss(0, 1) for _ in range(WORDS)]

    def answer() -> list[int]:
        return [rng.randrange(WORDS) for _ in range(rng.randint(6, 12))]

    def pair(noise: float) -> dict:
        sides = sorted((answer(), answer()), key=lambda words: -statistics.fmean(quality[w] for w in words))
        chosen, rejected = reversed(sides) if rng.random() < noise else sides
        texts = (" ".join(f"w{word}" for word in words) for words in (chosen, rejected))
        return dict(zip(("chosen", "rejected"), texts, strict=True), prompt=f"w{rng.randrange(WORDS)}")

    folder.mkdir()
    for name, count, noise in (("train", PAIRS, NOISE), ("valid", HELD_OUT, 0.0)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair(noise)) + "\n" for _ in range(count)))


def write_model(folder: Path, seed: int) -> None:
    """Saves a model with random weights and a tokenizer with one token per word."""
    texts = ["<unk>", "<s>", "</s>", "Human", "Assistant", ":", *(f"w{word}" for word in range(WORDS))]
    words = Tokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(texts), "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}
    LlamaForCausalLM(LlamaConfig(**sizes, **ids)).save_pretrained(folder)


def run(model: Path, data: Path, out: Path, steps: int, seed: int, *flags: str) -> float:
    """Trains a reward model and returns its last held-out accuracy."""
    values = {
        "hf_model_name_or_path": model, "data_path": data, "model_save_path": out, "train_steps": steps,
        "warmup_steps": steps // 10, "save_per_step": steps, "batch_size": 32, "lr": 1e-3, "dtype": "fp32",
        "zero_stage": 0, "context_truncate": 128, "seed": seed,
    }  # fmt: skip
    train([word for name, value in values.items() for word in (f"--{name}", str(value))] + list(flags))
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["eval_accuracy"]


def one_seed(folder: Path, seed: int, steps: int) -> dict[str, float]:
    """Returns variant -> accuracy on clean held-out pairs."""
    data, model, annotated = folder / "data", folder / "model", folder / "annotated"
    write_data(data, seed)
    write_model(model, seed)
    members, short = [folder / f"member{k}" for k in range(MEMBERS)], []
    for k, member in enumerate(members):
        write_model(folder / f"start{k}", 1000 * (k + 1) + seed)
        short.append(run(folder / f"start{k}", data, member, max(10, steps // 3), 1000 * (k + 1) + seed))
    paths = [str(member / "final") for member in members]
    strength.main(["--model", *paths, "--data_path", str(data), "--output", str(annotated), "--dtype", "fp32"])
    smooth, flip = ("--label_smoothing", str(NOISE)), ("--flip_negative", "True")
    return {
        "plain": run(model, data, folder / "plain", steps, seed),
        "smoothing": run(model, data, folder / "smoothing", steps, seed, *smooth),
        "flipping": run(model, annotated, folder / "flipping", steps, seed, *flip),
        "both": run(model, annotated, folder / "both", steps, seed, *flip, *smooth),
        "short": statistics.fmean(short),
    }


def main() -> None:
    """Runs the seeds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=240, help="training steps of the first four variants")
    options = parser.parse_args()
    results = []
    for seed in range(1, options.seeds + 1):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            results.append(one_seed(Path(folder), seed, options.steps))
        print(f"seed {seed}: " + "  ".join(f"{name} {x:.3f}" for name, x in results[-1].items()), flush=True)
    print(f"\n{'':12}{'accuracy':>10}   difference to plain")
    for name in results[0]:
        accuracy = statistics.fmean(row[name] for row in results)
        mean, half = over_seeds([row[name] - row["plain"] for row in results])
        difference = f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]" if name != "plain" else ""
        print(f"{name:12}{accuracy:10.3f}   {difference}")


if __name__ == "__main__":
    main()

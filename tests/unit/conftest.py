"""Tokenizers for the tests: a published one of 32,000 pieces in LLaMA's format, a tiny one, one with ChatML tags."""

import importlib.util
import os
from pathlib import Path

import pytest
import sentencepiece

from tests.helpers.families import FAMILIES, family_tokenizer

SAMPLES = Path(__file__).parents[2] / "data" / "samples"


@pytest.fixture(scope="session")
def llama_model() -> Path:
    """A `tokenizer.model` with 32,000 pieces, bos 1, eos 2, unk 0, no pad."""
    package = importlib.util.find_spec("mistral_common")
    if package is None:
        pytest.skip("mistral_common, which carries a LLaMA-format tokenizer.model, is not installed")
    return Path(package.origin).parent / "data" / "tokenizer.model.v1"


def train_sentencepiece(folder: Path, **options) -> Path:
    """A byte-pair `tokenizer.model` of 1,500 pieces over the sample texts, with LLaMA's settings unless told."""
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(
        input=",".join(str(file) for file in sorted(SAMPLES.glob("*/*/train.json*"))),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=1500,
        character_coverage=0.99,
        minloglevel=2,
        **settings | options,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory) -> Path:
    """A byte-level tokenizer with ChatML tags and template, and no bos, as the small chat models have it."""
    folder = tmp_path_factory.mktemp("chat")
    family_tokenizer(FAMILIES["ChatML"]).save_pretrained(folder)
    return folder


@pytest.fixture
def disk_calls(monkeypatch) -> list[tuple[str, ...]]:
    """What of now on is synced, ("synced", name), and which folders are renamed, ("renamed", old, new), in order."""
    calls: list[tuple[str, ...]] = []
    sync = os.fsync

    def noted_sync(handle: int) -> None:
        calls.append(("synced", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        sync(handle)

    def noting(rename):
        def noted(old, new) -> None:
            if os.path.isdir(old):
                calls.append(("renamed", Path(old).name, Path(new).name))
            rename(old, new)

        return noted

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noting(os.replace))
    monkeypatch.setattr(os, "rename", noting(os.rename))
    return calls

"""Model cards: what hubs read of them, and texts of data, models and file names in them."""

import copy
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import markdown
import pytest
from huggingface_hub import ModelCard

from ppo.config import PPOConfig
from reward.config import RewardConfig
from sft.config import SFTConfig
from tests.helpers.tiny import tiny_tokenizer_folder
from tests.helpers.tiny_run import REPOSITORY, clean_environment
from utils.hub import public_name
from utils.models.card import KINDS, Card, card_text
from utils.run.card import shown
from utils.tokenizer import load_tokenizer

HOSTILE = "<script>x</script> ![a](//x) [b](//x) | c | `d` **e**\n# f\n---\n\x1b[2J\u202e"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(tiny_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))), "moss_en")


def tags(text: str) -> set[str]:
    """The HTML elements that the card is shown with."""
    body = ModelCard(text).text
    return set(re.findall(r"<(\w+)", markdown.markdown(body, extensions=["tables", "fenced_code"])))


def test_a_backend_of_a_notebook_does_not_matter(tmp_path):
    """Commands inherit the variable; matplotlib refuses one that is not installed here."""
    code = "import sys; from utils.run.card import picture_of; print(picture_of(sys.argv[1])[:4])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True,
        env=clean_environment() | {"MPLBACKEND": "module://none"},
    )  # fmt: skip
    assert done.stdout == "b'\\x89PNG'\n", done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_hubs_read_the_header(tmp_path, tokenizer, kind):
    card = Card(kind, "run", "owner/base", ["owner/data:config@train[:10]", "0.5", "/home/me/data"], language="en")
    (tmp_path / "README.md").write_text(card_text(card, tokenizer, is_adapter=True), encoding="utf-8")
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data.pop("tags") and data.pop("license") == "other"
    task = {"reward": {"pipeline_tag": "text-classification"}, "critic": {}}.get(
        kind, {"pipeline_tag": "text-generation"}
    )
    expected = {"base_model": "owner/base", "base_model_relation": "adapter", "library_name": "peft", "language": "en"}
    assert data == expected | task | {"datasets": ["owner/data"]}


def test_a_local_base_is_named_in_the_text_only(tokenizer):
    text = card_text(Card("sft", "run", "/home/me/outputs/sft/final", ["/home/me/data"]), tokenizer)
    assert "\n\nBase: sft (final). Training data: data.\n" in text and "/home" not in text
    assert "base_model" not in text and "datasets" not in text


def test_hostile_texts_are_shown_as_text(tokenizer):
    odd = copy.deepcopy(tokenizer)
    odd.chat_template = f"\n```\n{HOSTILE}{{{{ messages[0]['content'] }}}}"
    odd.chat_template_kwargs = {"a": f"\n```\n{HOSTILE}"}
    odd.add_tokens([HOSTILE])
    odd.stop_ids = (odd.convert_tokens_to_ids(HOSTILE),)
    plain = card_text(Card("policy", "run", "base", ["data"], {"seed": "1"}, {"step": 1, "eval_x": 1.0}), tokenizer)
    card = Card("policy", HOSTILE, HOSTILE, [HOSTILE], {"seed": HOSTILE}, {"step": 1, "eval_x": 1.0}, "", HOSTILE)
    text = card_text(card, odd)
    assert tags(text) == tags(plain) >= {"h1", "h2", "table", "code"}
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", text)
    assert ModelCard(text).data.license == "other"
    assert [line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("| `--seed`")] == [3]


def test_a_template_that_refuses_the_question_has_no_example(tokenizer):
    odd = copy.deepcopy(tokenizer)
    odd.chat_template = "{{ raise_exception('a system turn is missing') }}"
    text = card_text(Card("policy", "run", "base"), odd)
    assert "need other turns" in text and "```text" not in text


def test_paths_and_addresses_in_flags_stay_private(tmp_path, monkeypatch):
    """Of every flag that takes text, whatever it is."""
    monkeypatch.chdir(tmp_path)
    Path("secret", "place").mkdir(parents=True)
    kinds = {field.name: field.type for config in (PPOConfig, RewardConfig, SFTConfig) for field in fields(config)}
    texts = [name for name, kind in kinds.items() if "str" in str(kind)]
    assert len(texts) > 20
    for name in texts:
        for value in ("/home/secret/data", "~/secret/data", "../secret/data", "https://secret.example/x?key=secret"):
            assert "secret" not in shown(name, [value]) + shown(name, value), name
        if name.endswith("_path"):
            assert shown(name, "secret/place") == "place"
    assert shown("reward_fn", ["secret/mine.py:score"]) == "mine.py:score"
    assert (shown("delimiter", "</s>"), shown("use_x", True), shown("lr", 1e-5)) == ("</s>", "true", "1e-05")


def test_public_names():
    given = ("owner/name", "owner/name:config@train", "/a/b", "a/b/c", "/a/sft/final/", "sft/best_adapter", "final")
    expected = ["owner/name", "owner/name:config@train", "b", "c", "sft (final)", "sft (best_adapter)", "final"]
    found = [public_name(path) for path in given]
    assert found[:5] == expected[:5] and found[6] == "final"


def test_metrics_are_a_table(tokenizer):
    metrics = {"step": 7, "loss": 3.0, "eval_loss": 0.123456, "eval_perplexity": None, "eval_x": 2.0, "lr": 1.0}
    text = card_text(Card("sft", "run", "base", metrics=metrics), tokenizer)
    assert "Step 7, on held-out data:\n\n| metric | value |\n| --- | --- |\n| loss | 0.1235 |\n| `x` | 2 |\n\n" in text
    text = card_text(Card("sft", "run", "base", metrics={"step": 7, "loss": 3.0, "lr": 1.0}), tokenizer)
    assert "Step 7, on training data:\n\n| metric | value |\n| --- | --- |\n| loss | 3 |\n\n" in text

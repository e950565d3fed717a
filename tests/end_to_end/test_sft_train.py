"""`python -m sft.train` on tiny models: learns answers only, and leaves folders that generate elsewhere."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.dialogues import Dialogue, encode, load_dialogues
from data.template import encode_dialogue
from sft.train import main
from tests.tiny import SAMPLES, tiny_llama, tiny_llama_folder
from utils.tokenizer import load_tokenizer

DATA = SAMPLES / "en" / "dialogues"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("base"))


def flags(base: Path, out: Path, **changes) -> list[str]:
    values = {
        "hf_model_name_or_path": base,
        "data_path": DATA,
        "model_save_path": out,
        "train_steps": 4,
        "warmup_steps": 1,
        "batch_size": 4,
        "context_truncate": 256,
        "lr": 3e-3,
        "save_per_step": 2,
        "dtype": "fp32",
    }
    return [word for name, value in (values | changes).items() for word in (f"--{name}", str(value))]


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "sft"
    main(flags(base, out, train_steps=12, save_per_step=4))
    return out


def test_the_loss_starts_at_the_logarithm_of_the_vocabulary_and_falls(run):
    metrics = metrics_of(run)
    assert abs(metrics[0]["loss"] - 5.99) < 0.4  # ln 400
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    assert metrics[11]["eval_loss"] < metrics[3]["eval_loss"]
    assert set(metrics[0]) == {"step", "loss", "lr", "grad_norm", "tokens_per_second"}


@pytest.mark.parametrize("folder", ["best", "final"])
def test_other_tools_load_the_result_and_stop_at_its_eos(run, folder):
    model, report = AutoModelForCausalLM.from_pretrained(run / folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(run / folder)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    prompt = torch.tensor([[1, 5, 6]])
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).shape[1] <= 6


def test_best_is_the_evaluation_with_the_lowest_loss(run):
    """Evaluations fall to the end here, so best/ and final/ hold the same weights, which are not the first ones."""
    losses = [row["eval_loss"] for row in metrics_of(run) if "eval_loss" in row]
    assert losses == sorted(losses, reverse=True)
    best, final = (AutoModelForCausalLM.from_pretrained(run / name).lm_head.weight for name in ("best", "final"))
    assert torch.equal(best, final)
    assert not torch.allclose(final, tiny_llama().lm_head.weight)


def test_the_first_loss_is_the_models_own_cross_entropy_of_the_answers(base, tmp_path):
    """All 14 dialogues in the first step: transformers' loss with labels on the answers, over the same tokens."""
    main(flags(base, tmp_path / "out", batch_size=14, train_steps=1))
    tokenizer, model = load_tokenizer(str(base)), tiny_llama()
    total, count = 0.0, 0
    for dialogue in load_dialogues(str(DATA), 0, 0, say=str)[0]:
        ids, mask = encode_dialogue(tokenizer, dialogue.turns, "moss_en")
        labels = torch.tensor([[i if learnt else -100 for i, learnt in zip(ids, mask, strict=True)]])
        total += model(input_ids=torch.tensor([ids]), labels=labels).loss.item() * sum(mask)
        count += sum(mask)
    assert metrics_of(tmp_path / "out")[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_micro_batches_zero_stages_and_checkpointing_change_nothing(base, tmp_path):
    main(flags(base, tmp_path / "a"))
    main(flags(base, tmp_path / "b", micro_batch_tokens=1))
    main(flags(base, tmp_path / "c", zero_stage=3))
    main([*flags(base, tmp_path / "d"), "--gradient_checkpoint"])
    expected = [row["loss"] for row in metrics_of(tmp_path / "a")]
    for name in "bcd":
        assert [row["loss"] for row in metrics_of(tmp_path / name)] == pytest.approx(expected, rel=1e-4)


def test_chinese_tags_grow_the_embedding_and_are_saved(base, tmp_path):
    data = SAMPLES / "zh" / "dialogues"
    main(flags(base, tmp_path / "out", lang="zh", data_path=data, train_steps=1, context_truncate=512))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "final")
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 402
    assert tokenizer.convert_tokens_to_ids(["<|Human|>", "<|MOSS|>"]) == [400, 401]


def test_tied_embeddings_stay_tied(tmp_path):
    base = tiny_llama_folder(tmp_path / "base", tie_word_embeddings=True)
    main(flags(base, tmp_path / "out", train_steps=1))
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final", output_loading_info=True)
    assert not report["missing_keys"]
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_truncation_drops_the_oldest_exchange(base):
    tokenizer = load_tokenizer(str(base))
    texts = ["first " * 20, "second " * 20, "Third?", "Fourth."]
    turns = [{"role": ("user", "assistant")[k % 2], "content": text.strip()} for k, text in enumerate(texts)]
    item, cut = encode(tokenizer, Dialogue(turns, "file.json:1"), "moss_en", 64)
    assert cut == 2
    assert (item.ids, item.answer_mask) == encode_dialogue(tokenizer, turns[2:], "moss_en")
    assert encode(tokenizer, Dialogue(turns, "file.json:1"), "moss_en", 5) == (None, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 15}, "14 dialogues to train on are fewer than --batch_size 15"),
        ({"context_truncate": 3}, "0 dialogues to train on"),
        ({"hf_model_name_or_path": "/nowhere"}, "/nowhere"),
        ({"warmup_steps": 0}, "--warmup_steps 0"),
        ({"zero_stage": 0, "dtype": "bf16"}, "--zero_stage 0"),
    ],
)
def test_bad_flags_end_in_one_line_and_leave_nothing(base, tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit) as stop:
        main(flags(base, tmp_path / "out", **changes))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

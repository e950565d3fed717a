"""`python -m sft.train` on tiny models: losses, evaluations, samples, and folders that transformers loads."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.formats.dialogue_forms import parse_turns
from data.order import mixture
from data.template import decode_answer, encode_dialogue, encode_prompt
from sft.train import main
from tests.helpers.data import parsed_dialogues
from tests.helpers.tiny import SAMPLES, tiny_llama, tiny_llama_folder
from tests.helpers.tiny_run import fit_flags, read_lines, write_json
from utils.tokenizer import load_tokenizer

DATA = SAMPLES / "en" / "dialogues"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("base"))


def flags(base: Path, out: Path, **changes) -> list[str]:
    return fit_flags(
        base, DATA, out, **{"context_truncate": 256, "train_steps": 4, "lr": 3e-3, "save_per_step": 2} | changes
    )


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "sft"
    main(flags(base, out, train_steps=12, save_per_step=4))
    return out


def test_the_loss_starts_at_the_logarithm_of_the_vocabulary_and_falls(run):
    metrics = read_lines(run / "metrics.jsonl")
    assert abs(metrics[0]["loss"] - 5.99) < 0.4  # ln 400
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    assert metrics[11]["eval_loss"] < metrics[3]["eval_loss"]
    expected = {"step", "loss", "lr", "grad_norm", "tokens_per_second", "memory_peak_gb"}
    assert set(metrics[0]) == expected
    assert set(metrics[3]) == expected | {"eval_loss", "eval_perplexity", "eval_token_accuracy"}


def held_out_of(folder: Path) -> tuple[int, float, int]:
    """(hits, negative log-likelihood, answer tokens) of a saved model: transformers' logits at every answer token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(str(folder))
    hits, nll, count = 0, 0.0, 0
    for turns in parsed_dialogues(DATA)[1]:
        ids, mask = encode_dialogue(tokenizer, turns, "moss_en")
        answers = torch.tensor(mask)[1:]
        logprobs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)[answers]
        targets = torch.tensor(ids)[1:][answers]
        hits += int((logprobs.argmax(-1) == targets).sum())
        nll -= logprobs.gather(1, targets[:, None]).sum().item()
        count += len(targets)
    return hits, nll, count


def test_held_out_accuracy_and_perplexity_are_those_of_the_saved_model(run):
    hits, nll, count = held_out_of(run / "final")
    last = read_lines(run / "metrics.jsonl")[-1]
    assert last["eval_token_accuracy"] == pytest.approx(hits / count, abs=1e-6)
    assert 0 < hits < count
    assert last["eval_perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)


def test_each_evaluation_answers_held_out_prompts(run):
    rows = read_lines(run / "samples.jsonl")
    assert [row["step"] for row in rows] == [4, 4, 8, 8, 12, 12]  # there are two held-out dialogues
    assert all(row["held_out"] is True for row in rows)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "final"), load_tokenizer(str(run / "final"))
    for row, turns in zip(rows[4:], parsed_dialogues(DATA)[1], strict=True):
        prompt = encode_prompt(tokenizer, turns[:-1], "moss_en")
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=128, do_sample=False)[0, len(prompt) :]
        assert row["answer"] == decode_answer(tokenizer, answer.tolist())
        assert row["prompt"] == tokenizer.decode(prompt)
        assert row["reference"] == turns[-1]["content"]


def test_transformers_loads_the_result_with_its_template_and_end(run):
    for folder in ("best", "final"):
        model, report = AutoModelForCausalLM.from_pretrained(run / folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        tokenizer = AutoTokenizer.from_pretrained(run / folder)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id
        turns = parsed_dialogues(DATA)[1][0][:-1]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert ids == encode_prompt(load_tokenizer(str(run / folder)), turns, "moss_en")
        assert not torch.allclose(model.lm_head.weight, tiny_llama().lm_head.weight)


def test_best_is_the_evaluation_with_the_lowest_loss(base, tmp_path):
    out = tmp_path / "out"
    main(flags(base, out, lr=0.3, lr_schedule="constant", train_steps=2, save_per_step=1))  # diverges
    losses = [row["eval_loss"] for row in read_lines(out / "metrics.jsonl")]
    assert losses[-1] > min(losses)
    _, nll, count = held_out_of(out / "best")
    assert nll / count == pytest.approx(min(losses), rel=1e-4)


def nll_and_tokens(base: Path, turns: list[dict]) -> tuple[float, int]:
    """Transformers' loss of the base model with labels on the answers, summed, and over how many tokens."""
    ids, mask = encode_dialogue(load_tokenizer(str(base)), turns, "moss_en")
    labels = torch.tensor([[i if inside else -100 for i, inside in zip(ids, mask, strict=True)]])
    return tiny_llama()(input_ids=torch.tensor([ids]), labels=labels).loss.item() * sum(mask), sum(mask)


def test_the_layout_of_a_forward_and_zero_stages_change_nothing(base, tmp_path):
    main(flags(base, tmp_path / "a", packing=False))
    main(flags(base, tmp_path / "b", micro_batch_tokens=1))
    main(flags(base, tmp_path / "c", zero_stage=3, gradient_checkpoint="auto"))
    main(flags(base, tmp_path / "d", attn_implementation="eager", gradient_checkpoint=True))
    expected = read_lines(tmp_path / "a" / "metrics.jsonl")
    for name in "bcd":
        for row, plain in zip(read_lines(tmp_path / name / "metrics.jsonl"), expected, strict=True):
            for key in ("loss", "grad_norm", *(key for key in plain if key.startswith("eval_"))):
                assert row[key] == pytest.approx(plain[key], rel=1e-4), (name, key)


def test_weights_decide_how_often_each_set_is_seen(base, tmp_path):
    """Sets a and b have an answer each, so the loss of a step tells how many of the 50 dialogues are of a."""
    texts = {"a": ["Hi", "Hello there."], "b": ["Name a tree.", "Oak."]}
    paths = [write_json(tmp_path / f"{name}.json", [dialogue] * 30) for name, dialogue in texts.items()]
    sizes = {"num_valid": 5, "train_steps": 1, "batch_size": 50}
    main(flags(base, tmp_path / "out", data_path=[paths[0], 4, paths[1], 1], **sizes))
    drawn = [k for k, _ in mixture(0, 50, [25, 25], [4, 1], 42)].count(0)
    assert 34 <= drawn <= 46
    sums = [nll_and_tokens(base, parse_turns(dialogue)) for dialogue in texts.values()]
    nll, tokens = (drawn * sums[0][i] + (50 - drawn) * sums[1][i] for i in (0, 1))
    assert read_lines(tmp_path / "out" / "metrics.jsonl")[0]["loss"] == pytest.approx(nll / tokens, rel=1e-5)


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
    assert not report["missing_keys"] and model.lm_head.weight is model.get_input_embeddings().weight


def test_a_model_that_would_mix_packed_dialogues_is_trained_without(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    main(flags(base, tmp_path / "asked", train_steps=2))
    said = "--packing is off: packed dialogues would affect each other in LlamaForCausalLM"
    assert said in capsys.readouterr().out
    main(flags(base, tmp_path / "off", train_steps=2, packing=False))
    assert said not in capsys.readouterr().out
    asked, off = (read_lines(tmp_path / run / "metrics.jsonl") for run in ("asked", "off"))
    assert len(asked) == 2 and [row["loss"] for row in asked] == [row["loss"] for row in off]

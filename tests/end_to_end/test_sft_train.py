"""`python -m sft.train` on tiny models: losses, evaluations, samples, and folders that transformers loads."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from data.dialogues import load_dialogues
from data.order import mixture
from data.template import decode_answer, encode_dialogue, encode_prompt
from sft.config import SFTConfig
from sft.stage import evenly_spaced, load_encoded
from sft.train import main
from tests.helpers.tiny import SAMPLES, tiny_llama, tiny_llama_folder
from tests.helpers.tiny_run import read_lines, write_json
from utils.tokenizer import load_tokenizer

DATA = SAMPLES / "en" / "dialogues"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("base"))


def flags(base: Path, out: Path, **changes) -> list[str]:
    values = {
        "hf_model_name_or_path": base, "data_path": DATA, "model_save_path": out, "train_steps": 4, "warmup_steps": 1,
        "batch_size": 4, "context_truncate": 256, "lr": 3e-3, "save_per_step": 2, "dtype": "fp32",
    }  # fmt: skip
    return [word for name, value in (values | changes).items() for word in (f"--{name}", str(value))]


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
    expected = {"step", "loss", "lr", "grad_norm", "tokens_per_second"}
    assert set(metrics[0]) == expected
    assert set(metrics[3]) == expected | {"eval_loss", "eval_perplexity", "eval_token_accuracy"}
    cosine = [3e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * k / 11))) for k in range(12)]
    assert [row["lr"] for row in metrics] == pytest.approx(cosine)


def held_out_of(folder: Path) -> tuple[int, float, int]:
    """(hits, negative log-likelihood, answer tokens) of a saved model: transformers' logits at every answer token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(str(folder))
    hits, nll, count = 0, 0.0, 0
    for dialogue in load_dialogues(str(DATA), 0, 0, say=str)[1]:
        ids, mask = encode_dialogue(tokenizer, dialogue.turns, "moss_en")
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
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "final"), load_tokenizer(str(run / "final"))
    for row, dialogue in zip(rows[4:], load_dialogues(str(DATA), 0, 0, say=str)[1], strict=True):
        prompt = encode_prompt(tokenizer, dialogue.turns[:-1], "moss_en")
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=128, do_sample=False)[0, len(prompt) :]
        assert row["answer"] == decode_answer(tokenizer, answer.tolist())
        assert row["prompt"] == tokenizer.decode(prompt)
        assert row["reference"] == dialogue.turns[-1]["content"]


def test_answers_end_where_the_window_does(base, tmp_path, monkeypatch):
    make, lengths = LlamaForCausalLM.generate, []
    record = lambda *a, **k: lengths.append((rows := make(*a, **k)).shape[1]) or rows  # noqa: E731
    monkeypatch.setattr(LlamaForCausalLM, "generate", record)
    main(flags(base, tmp_path / "a", train_steps=1, context_truncate=128, maxlen_res=512))
    main(flags(base, tmp_path / "b", train_steps=1, context_truncate=128, maxlen_res=2))
    assert lengths[1] < lengths[0] <= 128


def test_dialogues_are_held_out_of_every_set(base, tmp_path):
    for name in "ab":
        write_json(tmp_path / f"{name}.json", [["Hi", f"Hello {name} {i}."] for i in range(6)])
    paths = [str(tmp_path / f"{name}.json") for name in "ab"]
    config = SFTConfig(hf_model_name_or_path=str(base), data_path=paths, num_valid=2, batch_size=4)
    sets, valid = load_encoded(config, load_tokenizer(str(base)), str)
    assert [len(own) for own in sets] == [4, 4]
    assert [item.source.rpartition(":")[0] for item in valid] == [paths[0]] * 2 + [paths[1]] * 2


def test_prompts_to_answer_come_from_all_over_the_held_out_ones():
    assert evenly_spaced(list(range(10)), 3) == [0, 3, 6]
    assert evenly_spaced([1, 2], 4) == [1, 2]
    assert evenly_spaced([1, 2], 0) == evenly_spaced([], 4) == []


def test_transformers_loads_the_result_with_its_template_and_end(run):
    for folder in ("best", "final"):
        model, report = AutoModelForCausalLM.from_pretrained(run / folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        tokenizer = AutoTokenizer.from_pretrained(run / folder)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id
        turns = load_dialogues(str(DATA), 0, 0, say=str)[1][0].turns[:-1]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert ids == encode_prompt(load_tokenizer(str(run / folder)), turns, "moss_en")
        assert not torch.allclose(model.lm_head.weight, tiny_llama().lm_head.weight)


def test_best_is_the_evaluation_with_the_lowest_loss(run, base, tmp_path):
    best, final = (AutoModelForCausalLM.from_pretrained(run / name).lm_head.weight for name in ("best", "final"))
    assert torch.equal(best, final)
    out = tmp_path / "out"
    main(flags(base, out, lr=0.3, lr_schedule="constant", train_steps=2, save_per_step=1))  # diverges
    losses = [row["eval_loss"] for row in read_lines(out / "metrics.jsonl")]
    assert losses[-1] > min(losses)
    _, nll, count = held_out_of(out / "best")
    assert nll / count == pytest.approx(min(losses), rel=1e-4)


def test_the_first_loss_is_the_models_own_cross_entropy_of_the_answers(base, tmp_path):
    """All 14 dialogues in the first step: transformers' loss with labels on the answers, over the same tokens."""
    main(flags(base, tmp_path / "out", batch_size=14, train_steps=1))
    tokenizer, model = load_tokenizer(str(base)), tiny_llama()
    total, count = 0.0, 0
    for dialogue in load_dialogues(str(DATA), 0, 0, say=str)[0]:
        ids, mask = encode_dialogue(tokenizer, dialogue.turns, "moss_en")
        labels = torch.tensor([[i if inside else -100 for i, inside in zip(ids, mask, strict=True)]])
        total += model(input_ids=torch.tensor([ids]), labels=labels).loss.item() * sum(mask)
        count += sum(mask)
    assert read_lines(tmp_path / "out" / "metrics.jsonl")[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_layout_of_a_forward_and_zero_stages_change_nothing(base, tmp_path):
    main(flags(base, tmp_path / "a", packing=False))
    main(flags(base, tmp_path / "b", micro_batch_tokens=1))
    main(flags(base, tmp_path / "c", zero_stage=3, gradient_checkpoint="auto"))
    main([*flags(base, tmp_path / "d", attn_implementation="eager"), "--gradient_checkpoint"])
    expected = read_lines(tmp_path / "a" / "metrics.jsonl")
    for name in "bcd":
        for row, plain in zip(read_lines(tmp_path / name / "metrics.jsonl"), expected, strict=True):
            for key in ("loss", "grad_norm", *(key for key in plain if key.startswith("eval_"))):
                assert row[key] == pytest.approx(plain[key], rel=1e-4), (name, key)


def test_weights_decide_how_often_each_set_is_seen(base, tmp_path):
    """Sets a and b have an answer each, so the loss of a step tells how many of the 50 dialogues are of a."""
    turns = {"a": ["Hi", "Hello there."], "b": ["Name a tree.", "Oak."]}
    for name, dialogue in turns.items():
        write_json(tmp_path / f"{name}.json", [dialogue] * 30)
    paths = {"data_path": f"{tmp_path}/a.json {tmp_path}/b.json", "num_valid": 5, "train_steps": 1, "batch_size": 50}
    out = tmp_path / "out"
    main(" ".join(flags(base, out, data_weights="4 1", **paths)).split())
    tokenizer, model, sums = load_tokenizer(str(base)), tiny_llama(), {}
    for name, dialogue in turns.items():
        turn_list = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), dialogue)]
        ids, mask = encode_dialogue(tokenizer, turn_list, "moss_en")
        labels = torch.tensor([[i if inside else -100 for i, inside in zip(ids, mask, strict=True)]])
        sums[name] = (model(input_ids=torch.tensor([ids]), labels=labels).loss.item() * sum(mask), sum(mask))
    drawn = [k for k, _ in mixture(0, 50, [25, 25], [4, 1], 42)].count(0)
    assert 34 <= drawn <= 46
    nll, tokens = (drawn * sums["a"][i] + (50 - drawn) * sums["b"][i] for i in (0, 1))
    assert read_lines(out / "metrics.jsonl")[0]["loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert json.loads((out / "config.json").read_text())["data_weights"] == [4, 1]


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


def test_a_model_that_would_mix_packed_dialogues_is_trained_without(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    main(flags(base, tmp_path / "asked", train_steps=2))
    said = "--packing is off: packed dialogues would affect each other in LlamaForCausalLM"
    assert said in capsys.readouterr().out
    main(flags(base, tmp_path / "off", train_steps=2, packing=False))
    assert said not in capsys.readouterr().out
    asked, off = (read_lines(tmp_path / run / "metrics.jsonl") for run in ("asked", "off"))
    assert len(asked) == 2 and [row["loss"] for row in asked] == [row["loss"] for row in off]


def test_a_loss_that_explodes_stops_the_run_before_the_step(base, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        main([*flags(base, out), "--explosion_limit", "2"])
    assert stopped.value.code == 2
    batch = out / "bad_batches" / "step_1.json"
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: the loss is (5.\d+|6.\d+), beyond --explosion_limit \(rank all\); no step was made", error)
    assert error.endswith(f"[step 1, batch in {batch}]")
    rows = json.loads(batch.read_text())
    assert sum(len(row["dialogues"]) for row in rows) == 4
    assert not (out / "checkpoints").exists()

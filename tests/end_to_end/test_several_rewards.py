"""PPO and its comparison with several reward models, and with one that has another tokenizer than the policy."""

import math
import re

import pytest
import torch

from ppo.compare import main as compare
from reward.model import load_scalar_model, save_scalar_model
from reward.scoring.ensemble import Encoding, score_dialogues
from tests.helpers.tiny import tiny_llama_folder, tiny_tokenizer_folder
from tests.helpers.tiny_run import SIZES, read_lines, read_metrics, run_flags
from train_ppo import main
from utils.tokenizer import load_tokenizer

CPU = torch.device("cpu")
OTHER_VOCAB = 370


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """(a reward model with the policy's tokenizer, one with a tokenizer of its own)."""
    folder, made = tmp_path_factory.mktemp("reward_models"), []
    for name, vocab in (("same", 400), ("other", OTHER_VOCAB)):
        base = tiny_llama_folder(folder / f"{name}_base", vocab, seed=9, tokenizer=False, **SIZES)
        tokenizer = load_tokenizer(str(tiny_tokenizer_folder(folder / f"{name}_tokenizer", vocab)), "moss_en")
        model = load_scalar_model(str(base), torch.float32, CPU, say=str, seed=vocab)
        save_scalar_model(model, str(folder / name), tokenizer=tokenizer)
        made.append(folder / name)
    return made


def test_three_reward_models_and_their_disagreement(inputs, others, tmp_path):
    flags = {"reward_ensemble": "mean_minus_std", "ensemble_std_coef": 0.5, "offload_frozen": True}
    main(run_flags(inputs, tmp_path / "run", reward_model_path=[inputs.reward, *others], **flags))
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        for prefix in ("", "eval_"):
            means = [row[f"{prefix}score_mean_{i}"] for i in (1, 2, 3)]
            assert len(set(means)) == 3 and row[f"{prefix}score_disagreement"] > 0.01
            expected = sum(means) / 3 - 0.5 * row[f"{prefix}score_disagreement"]
            assert row[f"{prefix}score_mean"] == pytest.approx(expected, abs=1e-5)
            assert row[f"{prefix}reward_truncated_fraction"] == 0.0  # of the one that encodes answers anew


def test_a_reward_model_with_another_tokenizer_scores_the_texts(inputs, others, tmp_path, capsys):
    out = tmp_path / "run"
    main(run_flags(inputs, out, reward_model_path=others[1]))
    assert f"{others[1]} has another tokenizer or template (moss_en) than the policy" in capsys.readouterr().out
    assert all(math.isfinite(row["score_mean"]) for row in read_metrics(out))
    model = load_scalar_model(str(others[1]), torch.float32, CPU)
    rows = [row for row in read_lines(out / "samples.jsonl") if row.get("held_out")]
    texts = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}] for row in rows
    ]
    scores, _ = score_dialogues(model, Encoding(load_tokenizer(str(others[1])), "moss_en", None), texts, 1000)
    assert len(rows) == 6 and [row["score"] for row in rows] == pytest.approx(scores, abs=1e-5)


def test_comparison_by_the_lowest_of_two(inputs, others, tmp_path, capsys):
    models = ["--reward_model_path", str(inputs.reward), str(others[1]), "--reward_ensemble", "min"]
    sizes = ["--dtype", "fp32", "--maxlen_prompt", "80", "--maxlen_res", "12", "--data_path", str(inputs.prompts)]
    compare(["--policies", str(inputs.policy), str(inputs.other_policy), *models, *sizes, "--num_samples", "0"])
    shown = {name: cells for name, *cells in (re.split(" {2,}", line) for line in capsys.readouterr().out.splitlines())}
    lowest, first, second = (float(shown[f"reward model {n}score"][0].split()[0]) for n in ("", "1 ", "2 "))
    assert lowest <= min(first, second)

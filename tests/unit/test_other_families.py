"""Loading what LLaMA does not have: buffers, parts for images, caps of attention, LongRoPE.

Saving is tested for each family in tests/architectures.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from reward.model import check_scalar_export, load_scalar_model
from tests.architectures.configs import LONG_ROPE, ROPE, tiny_config
from tests.architectures.folders import save_folder
from utils.errors import UserError
from utils.models.export import check_names
from utils.models.load import check_window, enable_checkpointing, load_causal_lm, window_of, without_dropout

CPU = torch.device("cpu")


def folder_of(family: str, folder: Path, **changes) -> str:
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    with torch.random.fork_rng():
        save_folder(config, folder)
    return str(folder)


def load(path: str, said: list[str] | None = None, kernel: str | None = None):
    return load_causal_lm(path, torch.float32, CPU, kernel, say=[].append if said is None else said.append)


def test_what_could_not_be_loaded_again_is_refused_before_a_run(tmp_path):
    lm = load(folder_of("deepseek_v3", tmp_path / "deepseek"))
    short = dict(lm.named_parameters())
    with pytest.raises(UserError, match=r"^M: a deepseek_v3 model cannot be saved as .*e_score_correction_bias"):
        check_names(AutoModelForCausalLM, lm.config, short, "M")
    ctrl = load_scalar_model(folder_of("ctrl", tmp_path / "ctrl"), torch.float32, CPU, say=lambda _: None)
    with pytest.raises(UserError, match=r"^M: a ctrl model cannot be saved as .*\(classifier.weight and 1 more\)"):
        check_scalar_export(ctrl, "M")


def test_caps_of_attention_are_not_lost_by_the_kernel(tmp_path):
    path, said = folder_of("gemma2", tmp_path / "source"), []
    assert [load(path, said, kernel).config._attn_implementation for kernel in (None, "sdpa")] == ["eager", "sdpa"]
    load(path, said, "eager")
    load(folder_of("gemma2", tmp_path / "without", attn_logit_softcapping=None), said)
    assert len(said) == 2
    assert "--attn_implementation eager is used" in said[0] and "--attn_implementation sdpa ignores its cap" in said[1]


def test_checkpointing_that_a_model_does_not_have():
    with pytest.raises(UserError, match=r"^--gradient_checkpoint: CTRLModel does not support it; leave it out$"):
        enable_checkpointing(AutoModelForCausalLM.from_config(tiny_config("ctrl")).transformer)
    enable_checkpointing(AutoModelForCausalLM.from_config(tiny_config("llama")))


def test_dropout_of_the_parts_is_off_too():
    config = tiny_config("gemma3")
    config.text_config.attention_dropout = config.vision_config.attention_dropout = 0.5
    config = without_dropout(config)
    assert config.text_config.attention_dropout == config.vision_config.attention_dropout == 0.0


def lm_with(family: str, **changes):
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        return AutoModelForCausalLM.from_config(type(config)(**config.to_dict())).eval()


def test_longrope_ends_where_the_rows_of_a_batch_would_change_each_other():
    original = {"sliding_window": None, "original_max_position_embeddings": 8}
    lm = lm_with("phi3", rope_parameters=LONG_ROPE, **original)
    short, long = torch.arange(3, 9), torch.arange(3, 13)
    beside = torch.stack([torch.cat([short, short.new_zeros(4)]), long])
    with torch.no_grad():
        alone, together = lm(short[None]).logits[0], lm(beside).logits[0, : len(short)]
    assert (alone - together).abs().max() > 1e-3
    assert window_of(lm) == 8
    check_window(lm, 8, "--maxlen_prompt")
    with pytest.raises(UserError, match=r"^--maxlen_prompt 9: one row of more than 8 tokens .*; use at most 8$"):
        check_window(lm, 9, "--maxlen_prompt")


def test_other_windows():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    for rope in ({"rope_type": "default"}, {"rope_type": "dynamic", "factor": 2.0}, yarn):
        assert window_of(lm_with("llama", rope_parameters=ROPE | rope)) == 512  # rows do not change each other
    with pytest.raises(UserError, match=r"^--context_truncate 513 is longer than the model's window; use at most 512"):
        check_window(lm_with("llama"), 513, "--context_truncate")
    layers = lm_with("gemma3_text")
    layers.config.rope_parameters["full_attention"] = LONG_ROPE | {"original_max_position_embeddings": 64}
    assert window_of(layers) == 64

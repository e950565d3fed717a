"""Models that are loaded in parts, each rank its own: equal to those loaded whole, refused as they are, and small."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.architectures.configs import tiny_config
from tests.architectures.folders import save_folder
from tests.faults.scenarios import finished, run_forked
from tests.helpers.tiny import tiny_llama, tiny_llama_folder
from tests.helpers.tiny_run import tiny_reward_model

# Tied embeddings, fused projections, fused experts, transposed matrices with biases, and a model that asks for shapes
# while it is loaded.
FAMILIES = ("llama", "llama-tied", "phi3", "mixtral", "gpt2", "blt")
# Of the tied LLaMA: a .bin, which holds the embedding twice, and a file with another head, which must not be tied.
FILES = ("bin", "another head")
RANKS = 3  # do not divide the sizes of the matrices, so that the last rank's part is padded
LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "tie_word_embeddings": False}


def changed(source: Path, folder: Path, **tensors: torch.Tensor | None) -> None:
    """A copy of a model's folder with another tensor under a name, or none."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = load_file(source / "model.safetensors") | tensors
    weights = {name: x.contiguous() for name, x in weights.items() if x is not None}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("loading")
    for name in FAMILIES[1:]:
        save_folder(tiny_config(name), folder / name)
    llama = tiny_llama_folder(folder / "llama")
    changed(folder / "llama-tied", folder / "another head", **{"lm_head.weight": torch.rand(400, 64)})
    tied = load_file(folder / "llama-tied" / "model.safetensors")
    changed(folder / "llama-tied", folder / "bin")
    (folder / "bin" / "model.safetensors").unlink()
    torch.save(tied | {"lm_head.weight": tied["model.embed_tokens.weight"]}, folder / "bin" / "pytorch_model.bin")
    tiny_llama(**LARGE).to(torch.bfloat16).save_pretrained(folder / "large")
    tiny_reward_model(folder / "reward", 400)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = load_file(llama / "model.safetensors")[name]
    changed(llama, folder / "missing", **{name: None})
    changed(llama, folder / "shape", **{name: weight[:, :-1]})
    weight[-1, -1] = torch.nan  # in the last rank's part
    changed(llama, folder / "nan", **{name: weight})
    jobs = {"families": [FAMILIES + FILES], "others": [], "large": []}
    rows = {
        job: {
            "module": "tests.distributed.loading_jobs", "function": f"load_{job}", "ranks": RANKS,
            "argv": [str(folder / f"{job}.json"), str(folder), *more],
        }
        for job, more in jobs.items()
    }  # fmt: skip
    finished(run_forked(folder, rows))
    return {job: json.loads((folder / f"{job}.json").read_text()) for job in jobs}


def test_families_are_the_same_when_they_are_split_while_loading(found):
    assert found["families"] == {name: [[]] * RANKS for name in FAMILIES + FILES}


def test_grown_embeddings_scalar_models_and_copies_are_the_same(found):
    others = found["others"]
    assert others["resized"] == [[402]] * RANKS  # two tags of moss_zh
    for case in ("copy of split", "copy of whole, offloaded", "new head", "reward model"):
        assert others[case] == [[]] * RANKS, case


def test_the_same_folders_are_refused_on_all_ranks(found):
    others = found["others"]
    assert others["finite"] == [[None]] * RANKS
    for case, part in (("missing", "has no weights for"), ("nan", "not finite (model.layers.1"), ("shape", "in shape")):
        assert others[case] == [others[case][0]] * RANKS
        whole, split = others[case][0]
        assert whole == split and part in whole


def test_no_rank_holds_more_than_its_part_and_a_few_tensors(found):
    sizes = [p.numel() * 4 for p in tiny_llama(**LARGE).parameters()]
    assert sum(sizes) > 80e6
    for most in found["large"]["most"]:
        assert most < 6 * max(sizes), (most, sum(sizes))  # a tensor, its copies in other dtypes, noise

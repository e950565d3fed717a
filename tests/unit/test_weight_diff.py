"""utils/weight_diff/: what goes in comes out, whatever the layout; sums and manifests tell right from wrong."""

import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.weights import (
    HIDDEN,
    LAYOUTS,
    RELEASE,
    ROTARY,
    constant_weights,
    load_folder,
    published_diff,
    random_weights,
    same_bits,
    save_folder,
    shapes,
)
from utils.errors import UserError
from utils.weight_diff import recover as recovery
from utils.weight_diff.published import Output, Release, rotary_total
from utils.weight_diff.recover import make_diff, recover, verify

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture
def lines():
    """What a command says."""
    return []


@pytest.fixture
def paths(tmp_path):
    """The three folders of the flags."""
    return [str(tmp_path / name) for name in ("raw", "diff", "tuned")]


def resave(folder, choice: random.Random) -> None:
    """The same diff and manifest as someone else might have repacked it: other layout, shards and order."""
    weights = load_folder(folder)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    save_folder(folder, weights, choice.choice(LAYOUTS), choice.randint(1, 3), choice.random(), choice.random() < 0.5)


@pytest.mark.parametrize("seed", range(24))
def test_recover_undoes_make_diff(tmp_path, monkeypatch, seed):
    """Over layouts, shard sizes, orders, chunk sizes, buffers and dtypes: every bit in float32, else two roundings."""
    choice = random.Random(seed)
    dtype = list(DTYPES)[seed % 3]
    raw = random_weights(2 * seed, choice.choice(list(DTYPES.values())))
    tuned = random_weights(2 * seed + 1, DTYPES[dtype], reward_head=seed % 2 == 0, vocab=choice.choice((12, 14)))
    for name, weights in (("raw", raw), ("model", tuned)):
        layout, shards, buffers = choice.choice(LAYOUTS), choice.randint(1, 4), choice.random() < 0.5
        save_folder(tmp_path / name, weights, layout, shards, choice.random(), buffers)
    monkeypatch.setattr(recovery, "CHUNK", choice.choice((7, 64, 1 << 20)))
    folders = [str(tmp_path / name) for name in ("raw", "diff", "model")]
    model_type = "reward" if seed % 2 == 0 else "policy"
    make_diff(*folders, model_type, Output(max_shard_bytes=choice.choice((1, 300, 10**9))), say=str)
    resave(tmp_path / "diff", choice)
    output = Output(max_shard_bytes=choice.choice((1, 300, 10**9)))
    recover(*folders[:2], str(tmp_path / "again"), RELEASE, model_type, output, say=str)
    verify(str(tmp_path / "again"), RELEASE, None, 1, say=str)
    again = load_folder(tmp_path / "again")
    assert again.keys() == tuned.keys()
    for name, value in tuned.items():
        if dtype == "float32" or "layers" not in name:
            assert same_bits(again[name], value), name
        else:  # the difference is rounded, and the result: each by half a step, relative to itself
            x, base, step = value.double(), raw[name].double(), torch.finfo(DTYPES[dtype]).eps
            bound = step / 2 * ((x - base).abs() + x.abs()) * (1 + step) + 2**-24
            assert bool(((again[name].double() - x).abs() <= bound).all()), name


def test_float32_needs_its_patches(tmp_path, paths):
    """The property above would hold without patches if the values were tame: here a bare difference loses some."""
    raw, tuned = random_weights(1), random_weights(2)
    bare = published_diff(raw, tuned)
    assert any(not same_bits(raw[name] + bare[name], tuned[name]) for name in raw if "layers" in name)
    save_folder(tmp_path / "raw", raw)
    save_folder(tmp_path / "tuned", tuned)
    make_diff(*paths, "policy", Output(), say=str)
    written = load_folder(tmp_path / "diff")
    assert all(same_bits(written[name], bare[name]) for name in bare)  # other tools find what they expect
    assert {name.rsplit(".", 1)[1] for name in written.keys() - bare.keys()} == {"patch_index", "patch_value"}


def published(tmp_path, inv_freq=(False, False), dtype=torch.float16, reward_head=False) -> float:
    """raw of ones and a published diff: layers get to 1.5, whole tensors are 0.25. Returns the sum, by hand."""
    raw = constant_weights(1.0, dtype)
    tuned = {name: torch.full_like(value, 1.5 if "layers" in name else 0.25) for name, value in raw.items()}
    save_folder(tmp_path / "raw", raw, "zip", shards=2, inv_freq=inv_freq[0])
    save_folder(tmp_path / "diff", published_diff(raw, tuned), "legacy", inv_freq=inv_freq[1])
    layer = HIDDEN * HIDDEN + 20 * HIDDEN + HIDDEN
    return 1.5 * 2 * layer + 0.25 * (2 * 12 * HIDDEN + HIDDEN) + ROTARY


def release_of(total: float) -> Release:
    return Release("LLaMA-7B", {"sft": total, "policy": None}, "moss_en")


@pytest.mark.parametrize("inv_freq", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("off", [0.0, 0.9e-5, -0.9e-5])
def test_published_sum_passes_with_and_without_buffers(tmp_path, paths, lines, inv_freq, off):
    total = published(tmp_path, inv_freq)
    release = release_of(total * (1 + off))
    recover(*paths, release, "sft", Output(), say=lines.append)
    assert f"sum {total:.4f}: as published for --model_type sft" in lines
    verify(paths[2], release, "sft", 1, say=lines.append)
    assert not any("inv_freq" in name for name in load_folder(tmp_path / "tuned"))


@pytest.mark.parametrize("wrong", [lambda total: total * 1.00002, lambda total: total - ROTARY, lambda total: -total])
def test_published_sum_fails(tmp_path, paths, wrong):
    total = published(tmp_path)
    with pytest.raises(UserError, match=rf"sum of all tensors is {total:.4f}, .*give LLaMA-7B as --path_raw, or copy"):
        recover(*paths, release_of(wrong(total)), "sft", Output(), say=str)
    assert not (tmp_path / "tuned").exists()
    recover(*paths, release_of(wrong(total)), "sft", Output(dtype="float32"), check_sum=False, say=str)
    with pytest.raises(UserError, match="sum of all tensors is"):
        verify(paths[2], release_of(wrong(total)), "sft", 1, say=str)


def test_no_sum_is_published_for_the_policy(tmp_path, paths, lines):
    total = published(tmp_path)
    recover(*paths, RELEASE, "policy", Output(), say=lines.append)
    assert f"no sum is published for --model_type policy: not checked (the sum is {total:.4f})" in lines


def test_rotary_term_of_llama_7b():
    config = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
    assert rotary_total(config) == pytest.approx(238.7185, abs=5e-5)
    assert rotary_total(config | {"rope_theta": 1e6}) < 0.9 * rotary_total(config)


def test_sum_is_of_values_before_rounding(tmp_path, paths, lines):
    """1 + 2^-11 is a half step above 1 in float16 and rounds down to it, everywhere: 5e-4 of the sum would be lost."""
    raw = constant_weights(1.0, torch.float16)
    diff = {name: torch.full_like(value, 2.0**-11 if "layers" in name else 0.0) for name, value in raw.items()}
    save_folder(tmp_path / "raw", raw)
    save_folder(tmp_path / "diff", diff)
    elements = sum(value.numel() for name, value in raw.items() if "layers" in name)
    release = release_of(elements * (1 + 2.0**-11) + ROTARY)
    recover(*paths, release, "sft", Output(), say=lines.append)
    assert load_folder(tmp_path / "tuned")["model.layers.0.mlp.up_proj.weight"].unique().tolist() == [1.0]


def test_verify_allows_for_rounding_and_for_no_more(tmp_path, lines):
    """Without a manifest a 16-bit model is compared with a sum from before rounding: within four deviations of it."""
    generator = torch.Generator().manual_seed(1)
    values = {name: 1.0 + torch.rand(shape, generator=generator) for name, shape in shapes().items()}
    rounded = {name: value.bfloat16() for name, value in values.items()}
    save_folder(tmp_path / "tuned", rounded)
    total, of_rounded = (sum(value.double().sum().item() for value in w.values()) + ROTARY for w in (values, rounded))
    slack = 4 * 2.0**-7 * math.sqrt(sum(value.double().square().sum().item() for value in values.values()) / 12)
    assert 2e-5 * total < abs(of_rounded - total) < slack < 0.01 * total
    verify(str(tmp_path / "tuned"), release_of(total), "sft", 1, say=lines.append)
    verify(str(tmp_path / "tuned"), release_of(of_rounded + 0.95 * slack), "sft", 1, say=lines.append)
    with pytest.raises(UserError, match="sum of all tensors"):
        verify(str(tmp_path / "tuned"), release_of(total + 2 * slack), "sft", 1, say=str)


def test_a_tensor_is_read_from_the_shard_that_the_index_names(with_manifest, tmp_path):
    """Another shard holds an old copy, which counts for nothing."""
    folder = save_folder(tmp_path / "raw", random_weights(1, torch.float16), shards=2)
    name = "model.layers.0.self_attn.q_proj.weight"
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    (other,) = set(files.values()) - {files[name]}
    save_file(load_file(folder / other) | {name: torch.ones(8, 8).half()}, folder / other)
    (folder / "model.safetensors").unlink()
    recover(*with_manifest, RELEASE, "policy", Output(), say=str)


@pytest.fixture
def with_manifest(tmp_path, paths):
    """A float16 base and model, the diff that we make of them, and paths to recover it."""
    save_folder(tmp_path / "raw", random_weights(1, torch.float16))
    save_folder(tmp_path / "model", random_weights(2, torch.float16))
    make_diff(paths[0], paths[1], str(tmp_path / "model"), "policy", Output(), say=str)
    return paths


def test_a_wrong_base_is_named(with_manifest, tmp_path):
    raw = random_weights(1, torch.float16)
    raw["model.layers.1.mlp.up_proj.weight"][3, 3] += 1
    save_folder(tmp_path / "raw", raw)
    name = r"model\.layers\.1\.mlp\.up_proj\.weight of --path_raw is not the tensor that this diff was made against"
    with pytest.raises(UserError, match=f"{name}: give LLaMA-7B"):
        recover(*with_manifest, RELEASE, "policy", Output(), say=str)
    assert not (tmp_path / "tuned").exists()


def test_a_base_in_another_dtype_is_the_same_base(with_manifest, tmp_path):
    """float32 of the same values; and values that are the recorded ones only once they are rounded."""
    recover(*with_manifest, RELEASE, "policy", Output(), say=str)
    for seed, factor in enumerate((1.0, 1.0 + 1e-5)):
        raw = {name: value.float() * factor for name, value in random_weights(1, torch.float16).items()}
        save_folder(tmp_path / "raw", raw)
        recover(*with_manifest[:2], str(tmp_path / f"again{seed}"), RELEASE, "policy", Output(), say=str)
        again, before = load_folder(tmp_path / f"again{seed}"), load_folder(tmp_path / "tuned")
        assert all(same_bits(again[name], before[name]) for name in before)


def test_a_damaged_diff_is_named(with_manifest, tmp_path):
    diff = load_folder(tmp_path / "diff")
    diff["lm_head.weight"][0, 2] += 1
    save_file(diff, tmp_path / "diff" / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight of --path_diff is not what its manifest says: copy"):
        recover(*with_manifest, RELEASE, "policy", Output(), say=str)


def test_lost_patches_show(tmp_path, paths):
    save_folder(tmp_path / "raw", random_weights(1))
    save_folder(tmp_path / "model", random_weights(2))
    make_diff(paths[0], paths[1], str(tmp_path / "model"), "policy", Output(), say=str)
    diff = {name: value for name, value in load_folder(tmp_path / "diff").items() if "patch" not in name}
    save_file(diff, tmp_path / "diff" / "model.safetensors")
    with pytest.raises(UserError, match="came out other than the manifest of --path_diff says"):
        recover(*paths, RELEASE, "policy", Output(), say=str)


def test_verify_names_what_has_changed_since(with_manifest, tmp_path, lines):
    recover(*with_manifest, RELEASE, "policy", Output(), say=str)
    verify(with_manifest[2], RELEASE, None, 1, say=lines.append)
    assert len(lines) == 1
    tuned = load_folder(tmp_path / "tuned")
    tuned["model.norm.weight"][2] = -tuned["model.norm.weight"][2]
    save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight of --path_tuned is not what its manifest says"):
        verify(with_manifest[2], RELEASE, None, 1, say=str)
    del tuned["model.norm.weight"]
    save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    with pytest.raises(UserError, match=r"--path_tuned lacks model\.norm\.weight, which its manifest names"):
        verify(with_manifest[2], RELEASE, None, 1, say=str)


def test_verify_is_not_for_diffs(with_manifest):
    with pytest.raises(UserError, match="is a diff, as its manifest says: give a recovered model"):
        verify(with_manifest[1], RELEASE, None, 1, say=str)


def test_verify_without_a_manifest_asks_for_the_type(tmp_path, lines):
    save_folder(tmp_path / "tuned", constant_weights(1.0))
    with pytest.raises(UserError, match="no manifest: give --model_type"):
        verify(str(tmp_path / "tuned"), RELEASE, None, 1, say=str)
    verify(str(tmp_path / "tuned"), RELEASE, "policy", 1, say=lines.append)
    assert "not checked" in lines[0]


def test_another_dtype_is_rounded_once_from_float32(with_manifest, tmp_path):
    """Its hashes are its own, and verify holds to them."""
    raw, diff = random_weights(1, torch.float16), load_folder(tmp_path / "diff")
    for dtype in ("float32", "bfloat16"):
        path = str(tmp_path / dtype)
        recover(*with_manifest[:2], path, RELEASE, "policy", Output(dtype=dtype), say=str)
        again = load_folder(tmp_path / dtype)
        name = "model.layers.0.self_attn.q_proj.weight"
        assert same_bits(again[name], (raw[name].float() + diff[name].float()).to(DTYPES[dtype]))
        verify(path, RELEASE, None, 1, say=str)


def test_shards_keep_to_their_size_and_the_index_is_whole(with_manifest, tmp_path):
    recover(*with_manifest, RELEASE, "policy", Output(max_shard_bytes=500), say=str)
    folder = tmp_path / "tuned"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert sorted(index["weight_map"]) == sorted(shapes())
    assert index["metadata"]["total_size"] == sum(2 * value.numel() for value in load_folder(folder).values())
    by_file = {}
    for name, file in index["weight_map"].items():
        by_file.setdefault(file, []).append(2 * load_folder(folder)[name].numel())
    assert all(sum(sizes) <= 500 or len(sizes) == 1 for sizes in by_file.values())


@pytest.mark.parametrize("layout", ["safetensors", "zip"])
def test_hub_ids_are_downloaded_safetensors_first(tmp_path, monkeypatch, lines, layout):
    """The hub is played by a folder: what it would send is what the patterns let through."""
    save_folder(tmp_path / "hub" / "raw", random_weights(1), layout)
    save_folder(tmp_path / "hub" / "diff", random_weights(2), layout)
    asked = []

    def snapshot_download(name, **patterns):
        asked.append((name, "*.bin" not in patterns.get("ignore_patterns", [])))
        return str(tmp_path / "hub" / name.removeprefix("owner/"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    recover("owner/raw", "owner/diff", str(tmp_path / "tuned"), RELEASE, "policy", Output(), say=lines.append)
    with_bin = [("owner/raw", True), ("owner/diff", True)] if layout == "zip" else []
    assert sorted(asked) == sorted([("owner/raw", False), ("owner/diff", False), *with_bin])
    assert (tmp_path / "tuned").is_dir()

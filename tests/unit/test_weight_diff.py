"""utils/weight_diff: recovered models equal the originals in every layout; sums and manifests detect errors."""

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
from utils.weight_diff.output_folder import new_folder
from utils.weight_diff.published import Release, rotary_total
from utils.weight_diff.recover import make_diff, recover, verify

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Q_PROJ, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


@pytest.fixture
def paths(tmp_path):
    """The three folders of the flags."""
    return [str(tmp_path / name) for name in ("raw", "diff", "tuned")]


def resave(folder, choice: random.Random) -> None:
    """Writes a folder's weights in another layout, number of shards and order; the manifest stays."""
    weights = load_folder(folder)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    save_folder(folder, weights, choice.choice(LAYOUTS), choice.randint(1, 4), choice.random(), choice.random() < 0.5)


@pytest.mark.parametrize("seed", range(24))
def test_recover_undoes_make_diff(tmp_path, monkeypatch, seed):
    """Over layouts, shard sizes, orders, chunk sizes, buffers and dtypes: every bit in float32, else two roundings."""
    choice = random.Random(seed)
    dtype = list(DTYPES)[seed % 3]
    raw = random_weights(2 * seed, choice.choice(list(DTYPES.values())))
    tuned = random_weights(2 * seed + 1, DTYPES[dtype], reward_head=seed % 2 == 0, vocab=choice.choice((12, 14)))
    for name, weights in (("raw", raw), ("model", tuned)):
        resave(save_folder(tmp_path / name, weights), choice)
    monkeypatch.setattr(recovery, "CHUNK", choice.choice((7, 64, 1 << 20)))
    folders = [str(tmp_path / name) for name in ("raw", "diff", "model")]
    model_type, sizes = "reward" if seed % 2 == 0 else "policy", [choice.choice((1, 300, 10**9)) for _ in range(2)]
    make_diff(*folders, model_type, max_shard_bytes=sizes[0], say=str)
    resave(tmp_path / "diff", choice)
    recover(*folders[:2], str(tmp_path / "again"), RELEASE, model_type, max_shard_bytes=sizes[1], say=str)
    verify(str(tmp_path / "again"), RELEASE, say=str)
    sizes_of_shards = [
        [x.nbytes for x in load_file(file).values()] for file in (tmp_path / "again").glob("*.safetensors")
    ]
    assert all(sum(shard) <= sizes[1] or len(shard) == 1 for shard in sizes_of_shards)
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
    """A bare difference loses values, and a diff whose patches are lost is refused."""
    raw, tuned = random_weights(1), random_weights(2)
    bare = published_diff(raw, tuned)
    assert any(not same_bits(raw[name] + bare[name], tuned[name]) for name in raw if "layers" in name)
    save_folder(tmp_path / "raw", raw)
    save_folder(tmp_path / "model", tuned)
    make_diff(*paths[:2], str(tmp_path / "model"), "policy", say=str)
    written = load_folder(tmp_path / "diff")
    assert all(same_bits(written[name], bare[name]) for name in bare)  # as other tools expect them
    assert {name.rsplit(".", 1)[1] for name in written.keys() - bare.keys()} == {"patch_index", "patch_value"}
    save_file(bare, tmp_path / "diff" / "model.safetensors")
    with pytest.raises(UserError, match="recovered model differs from the manifest of --path_diff"):
        recover(*paths, RELEASE, "policy", say=str)


def published(tmp_path, inv_freq=(False, False)) -> float:
    """raw of ones and a published diff: layers become 1.5, whole tensors 0.25. Returns the sum, by hand."""
    raw = constant_weights(1.0, torch.float16)
    tuned = {name: torch.full_like(value, 1.5 if "layers" in name else 0.25) for name, value in raw.items()}
    save_folder(tmp_path / "raw", raw, "zip", shards=2, inv_freq=inv_freq[0])
    save_folder(tmp_path / "diff", published_diff(raw, tuned), "legacy", inv_freq=inv_freq[1])
    layer = HIDDEN * HIDDEN + 20 * HIDDEN + HIDDEN
    return 1.5 * 2 * layer + 0.25 * (2 * 12 * HIDDEN + HIDDEN) + ROTARY


def release_of(total: float) -> Release:
    return Release("LLaMA-7B", {"sft": total, "policy": None}, "moss_en")


@pytest.mark.parametrize("inv_freq", [(False, True), (True, False)])
@pytest.mark.parametrize("off", [0.9e-5, -0.9e-5])
def test_published_sum_passes_with_and_without_buffers(tmp_path, paths, inv_freq, off):
    total, lines = published(tmp_path, inv_freq), []
    release = release_of(total * (1 + off))
    recover(*paths, release, "sft", say=lines.append)
    assert f"sum {total:.4f}: as published for --model_type sft" in lines
    verify(paths[2], release, "sft", say=str)
    assert not any("inv_freq" in name for name in load_folder(tmp_path / "tuned"))


@pytest.mark.parametrize("wrong", [lambda total: total * 1.00002, lambda total: total - ROTARY])
def test_published_sum_fails(tmp_path, paths, wrong):
    total = published(tmp_path)
    with pytest.raises(UserError, match=rf"sum of all tensors is {total:.4f}, .*use LLaMA-7B as --path_raw"):
        recover(*paths, release_of(wrong(total)), "sft", say=str)
    assert not (tmp_path / "tuned").exists()
    recover(*paths, release_of(wrong(total)), "sft", dtype="float32", check_sum=False, say=str)
    with pytest.raises(UserError, match="sum of all tensors is"):
        verify(paths[2], release_of(wrong(total)), "sft", say=str)


def test_rotary_term_of_llama_7b():
    config = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
    assert rotary_total(config) == pytest.approx(238.7185, abs=5e-5)
    assert rotary_total(config | {"rope_theta": 1e6}) < 0.9 * rotary_total(config)


def test_sum_is_of_values_before_rounding(tmp_path, paths):
    """1 + 2^-11 rounds down to 1 in float16, everywhere: 5e-4 of the sum would be lost."""
    raw = constant_weights(1.0, torch.float16)
    diff = {name: torch.full_like(value, 2.0**-11 if "layers" in name else 0.0) for name, value in raw.items()}
    save_folder(tmp_path / "raw", raw)
    save_folder(tmp_path / "diff", diff)
    elements = sum(value.numel() for name, value in raw.items() if "layers" in name)
    recover(*paths, release_of(elements * (1 + 2.0**-11) + ROTARY), "sft", say=str)


def test_verify_allows_for_rounding_and_for_no_more(tmp_path):
    """Without a manifest a 16-bit model is compared with a sum before rounding: within four deviations of it."""
    generator, lines = torch.Generator().manual_seed(1), []
    values = {name: 1.0 + torch.rand(shape, generator=generator) for name, shape in shapes().items()}
    rounded = {name: value.bfloat16() for name, value in values.items()}
    tuned = str(save_folder(tmp_path / "tuned", rounded))
    total, of_rounded = (sum(value.double().sum().item() for value in w.values()) + ROTARY for w in (values, rounded))
    slack = 4 * 2.0**-7 * math.sqrt(sum(value.double().square().sum().item() for value in values.values()) / 12)
    assert 2e-5 * total < abs(of_rounded - total) < slack < 0.01 * total
    verify(tuned, release_of(total), "sft", say=str)
    verify(tuned, release_of(of_rounded + 0.95 * slack), "sft", say=str)
    with pytest.raises(UserError, match="sum of all tensors"):
        verify(tuned, release_of(total + 2 * slack), "sft", say=str)
    verify(tuned, RELEASE, "policy", say=lines.append)
    assert "not checked" in lines[0]


@pytest.fixture
def with_manifest(tmp_path, paths):
    """A float16 base and model, the diff that we make of them, and paths to recover it."""
    save_folder(tmp_path / "raw", random_weights(1, torch.float16))
    save_folder(tmp_path / "model", random_weights(2, torch.float16))
    make_diff(paths[0], paths[1], str(tmp_path / "model"), "policy", say=str)
    return paths


@pytest.mark.parametrize(("side", "name"), [("raw", Q_PROJ), ("diff", Q_PROJ), ("diff", "lm_head.weight")])
def test_a_wrong_base_and_a_damaged_diff_are_named(with_manifest, tmp_path, side, name):
    weights = load_folder(tmp_path / side)
    weights[name][0, 2] += 1
    save_file(weights, tmp_path / side / "model.safetensors")
    text = {"raw": "is not the tensor that this diff was made against", "diff": "differs from its manifest"}
    with pytest.raises(UserError, match=f"{name} of --path_{side} {text[side]}"):
        recover(*with_manifest, RELEASE, "policy", say=str)
    assert not (tmp_path / "tuned").exists()


def test_a_base_in_another_dtype_is_the_same_base(with_manifest, tmp_path):
    """float32 of values that are the recorded ones only once they are rounded."""
    recover(*with_manifest, RELEASE, "policy", say=str)
    raw = {name: value.float() * (1 + 1e-5) for name, value in random_weights(1, torch.float16).items()}
    save_folder(tmp_path / "raw", raw)
    recover(*with_manifest[:2], str(tmp_path / "again"), RELEASE, "policy", say=str)
    again, before = load_folder(tmp_path / "again"), load_folder(tmp_path / "tuned")
    assert all(same_bits(again[name], before[name]) for name in before)


def test_verify_names_what_has_changed_since(with_manifest, tmp_path):
    recover(*with_manifest, RELEASE, "policy", say=str)
    with pytest.raises(UserError, match="is a diff by its manifest"):
        verify(with_manifest[1], RELEASE, say=str)
    tuned = load_folder(tmp_path / "tuned")
    tuned[NORM][2] = -tuned[NORM][2]
    save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    with pytest.raises(UserError, match=f"{NORM} of --path_tuned differs from its manifest"):
        verify(with_manifest[2], RELEASE, say=str)


def test_another_dtype_is_rounded_once_from_float32(with_manifest, tmp_path):
    """Its hashes are its own, and verify holds to them."""
    raw, diff = random_weights(1, torch.float16), load_folder(tmp_path / "diff")
    for dtype in ("float32", "bfloat16"):
        path = str(tmp_path / dtype)
        recover(*with_manifest[:2], path, RELEASE, "policy", dtype=dtype, say=str)
        expected = (raw[Q_PROJ].float() + diff[Q_PROJ].float()).to(DTYPES[dtype])
        assert same_bits(load_folder(tmp_path / dtype)[Q_PROJ], expected)
        verify(path, RELEASE, say=str)


@pytest.mark.parametrize("layout", ["safetensors", "zip"])
def test_hub_ids_are_downloaded_safetensors_first(tmp_path, monkeypatch, layout):
    """A folder stands for the hub."""
    save_folder(tmp_path / "hub" / "raw", random_weights(1), layout)
    save_folder(tmp_path / "hub" / "diff", random_weights(2), layout)
    asked = []

    def snapshot_download(name, **patterns):
        asked.append((name, "*.bin" not in patterns.get("ignore_patterns", [])))
        return str(tmp_path / "hub" / name.removeprefix("owner/"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("utils.hub.downloaded", {})
    recover("owner/raw", "owner/diff", str(tmp_path / "tuned"), RELEASE, "policy", say=str)
    with_bin = [("owner/raw", True), ("owner/diff", True)] if layout == "zip" else []
    assert sorted(asked) == sorted([("owner/raw", False), ("owner/diff", False), *with_bin])
    assert (tmp_path / "tuned").is_dir()


def test_a_target_that_was_created_meanwhile_stays(tmp_path):
    refusal = pytest.raises(UserError, match=r"--path .*model was created by another process")
    with refusal, new_folder(str(tmp_path / "model"), "--path"):
        (tmp_path / "model").mkdir()  # empty: a rename would replace it
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and not list((tmp_path / "model").iterdir())

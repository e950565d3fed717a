"""A run goes on only with the content that it began with: other content is refused by name, other paths are not."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reward.train import main as train_reward
from sft.train import main as train_sft
from tests.end_to_end.test_collapse import change_state
from tests.helpers.tiny import SAMPLES
from tests.helpers.tiny_run import (
    Inputs,
    assert_same_run,
    build_inputs,
    fit_flags,
    read_metrics,
    refusal,
    run_flags,
    tiny_reward_model,
    write_json,
)
from train_ppo import main

FLAGS = {
    "train_steps": 2, "checkpoint_per_step": 1, "keep_checkpoints": 3, "zero_stage": 0, "num_eval_prompts": 0,
    "use_ppo_pretrain_loss": True, "ppo_pretrain_loss_weight": 0.5, "ppo_pretrain_batch_size": 4,
}  # fmt: skip


def flags_of(inputs: Inputs) -> dict:
    """Every flag of train_ppo.py that names an input, and two reward models."""
    other = inputs.reward.with_name("other_reward")
    return FLAGS | {
        "ppo_pretrain_data_path": inputs.dialogues, "reward_fn": f"{inputs.reward_file}:vowels",
        "reward_model_path": [inputs.reward, other], "tokenizer_name_or_path": inputs.policy / "tokenizer.model",
        "reward_tokenizer_name_or_path": [inputs.policy, other],
    }  # fmt: skip


def inputs_in(folder: Path) -> Inputs:
    """Where `build_inputs` puts things."""
    names = ("policy", "other_policy", "reward", "prompts", "dialogues.json", "reward_file.py")
    return Inputs(*(folder / name for name in names))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """(folder of the inputs, folder of a finished run)."""
    folder = tmp_path_factory.mktemp("finished")
    inputs = build_inputs(folder / "in")
    tiny_reward_model(folder / "in" / "other_reward", vocab=370)
    main(run_flags(inputs, folder / "run", **flags_of(inputs)))
    return folder / "in", folder / "run"


@pytest.fixture
def stopped(finished, tmp_path) -> tuple[Inputs, Path]:
    """(inputs, run that was killed after step 1), both copies of the test's own; the inputs are in another folder."""
    inputs, run = (shutil.copytree(source, tmp_path / source.name) for source in finished)
    for name in ("final", "checkpoints/step_2"):
        shutil.rmtree(run / name)
    return inputs_in(inputs), run


def negate_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (head,) = (name for name, tensor in tensors.items() if tensor.shape[0] == 1)
    save_file(tensors | {head: -tensors[head]}, folder / "model.safetensors", {"format": "pt"})


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text("utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), "utf-8")


def drop_record(file: Path) -> None:
    write_json(file, json.loads(file.read_text("utf-8"))[:-1])


CHANGES = {  # what is done to the inputs -> what the refusal has to name
    "negated head of the critic": (lambda x: negate_head(x.reward), "model.safetensors has other .*--critic_model"),
    "negated head of the second reward model": (
        lambda x: negate_head(x.reward.with_name("other_reward")), "--reward_model_path .*: 2/model.safetensors has"),
    "exchanged words": (lambda x: edit(x.prompts / "train.json", "bread", "cakes"), "--data_path .*: train.json has"),
    "a record less": (lambda x: drop_record(x.prompts / "train.json"), "--data_path .*: train.json has other content"),
    "another valid file": (lambda x: drop_record(x.prompts / "valid.json"), "--data_path .*: valid.json has other"),
    "no valid file": (lambda x: (x.prompts / "valid.json").unlink(), "--data_path .*: valid.json is missing"),
    "a second file": (lambda x: write_json(x.prompts / "b_train.json", [["Hi"]]), "--data_path .*: b_train.json is"),
    "pre-training data": (lambda x: drop_record(x.dialogues), "--ppo_pretrain_data_path .*: the .json file has other"),
    "reward function": (lambda x: edit(x.reward_file, "aeiou", "aeio"), "--reward_fn .*: the file has other content"),
    "the policy's config": (lambda x: edit(x.policy / "config.json", "1e-06", "1e-05"), "config.json has .*--policy"),
    "a template": (
        lambda x: (x.policy / "chat_template.jinja").write_text("{{ 1 }}"),
        "chat_template.jinja is new.* does --policy_model_path, --tokenizer_name_or_path"),
    "a tokenizer": (
        lambda x: (x.reward.with_name("other_reward") / "tokenizer_config.json").write_text("{}"),
        "--reward_(model|tokenizer_name_or)_path .*: 2/tokenizer_config.json has other"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_other_content_is_refused_by_name(stopped, change, capfd):
    inputs, run = stopped
    act, named = CHANGES[change]
    act(inputs)
    before = (run / "metrics.jsonl").read_bytes()
    error = refusal(main, run_flags(inputs, run, **flags_of(inputs)), capfd)
    assert re.search(f"{named}.*; use the same files, or pass --resume_with_changes .*--overwrite", error), error
    assert (run / "metrics.jsonl").read_bytes() == before


def test_another_function_of_the_same_file_is_refused(stopped, capfd):
    inputs, run = stopped
    argv = run_flags(inputs, run, **flags_of(inputs) | {"reward_fn": f"{inputs.reward_file}:nan_for_rain"})
    assert "--reward_fn" in (error := refusal(main, argv, capfd)) and "the function has other content" in error


def test_other_content_goes_on_if_that_is_asked_for(stopped, capfd):
    inputs, run = stopped
    edit(inputs.prompts / "train.json", "bread", "cakes")
    main(run_flags(inputs, run, **flags_of(inputs), resume_with_changes=True))
    assert re.search(
        "resumed with another --data_path: .*/prompts, not .*: train.json has other", capfd.readouterr().out
    )
    assert [row["step"] for row in read_metrics(run)] == [1, 2]
    state = json.loads((run / "checkpoints" / "step_2" / "state.json").read_text())
    assert state["inputs"] == json.loads((run / "config.json").read_text())["inputs"]
    assert set(state["inputs"]["data_path"]) == {"train.json", "valid.json"}


def as_given(inputs: Inputs) -> Inputs:
    return inputs


def with_slashes(inputs: Inputs) -> Inputs:
    return Inputs(*(f"{path}/" if path.is_dir() else path for path in vars(inputs).values()))


def relative_links(inputs: Inputs) -> Inputs:
    """A link to each input by a relative path. A README and notes are no input."""
    (inputs.policy / "README.md").write_text("hello")
    (inputs.reward / "notes.txt").write_text("hello")
    (inputs.policy / "pytorch_model.bin").write_text("not read, since there are safetensors")
    os.mkdir("links")
    return Inputs(*(link(path) for path in vars(inputs).values()))


def link(path: Path) -> Path:
    """A relative path of a new link to it."""
    (Path("links") / f"my_{path.name}").symlink_to(path.resolve())
    return Path("links") / f"my_{path.name}"


@pytest.mark.parametrize("names", [as_given, with_slashes, relative_links])
def test_other_paths_to_the_same_content_go_on(stopped, finished, names, tmp_path, monkeypatch, capfd):
    """All inputs are copies in another folder than those that the run began with."""
    inputs, run = stopped
    monkeypatch.chdir(tmp_path)
    flags = flags_of(inputs)
    if names is not as_given:
        named = names(inputs)
        flags |= {"ppo_pretrain_data_path": named.dialogues, "reward_fn": f"{named.reward_file}:vowels"}
        flags["reward_model_path"] = [named.reward, flags["reward_model_path"][1]]
        inputs = named
    main(run_flags(inputs, run, **flags))
    said = capfd.readouterr().out
    assert f"resuming from {run}/checkpoints/step_1" in said
    assert "resumed with" not in said and "fingerprints" not in said
    assert_same_run(run, finished[1])


def test_before_the_first_checkpoint_the_content_counts_as_well(stopped, tmp_path, capfd):
    inputs, run = stopped[0], tmp_path / "new"
    argv = run_flags(inputs, run, **flags_of(inputs))
    with pytest.raises(SystemExit, match="75"):
        main([*argv, "--max_hours", "1e-9", "--checkpoint_per_step", "0"])
    edit(inputs.prompts / "train.json", "bread", "cakes")
    error = refusal(main, argv, capfd)
    assert re.search(r"already holds a run, .* another --data_path \(train.json has other.*--overwrite", error)
    moved = shutil.copytree(inputs.prompts, tmp_path / "moved")
    edit(moved / "train.json", "cakes", "bread")
    main([*argv, "--data_path", str(moved)])
    assert [row["step"] for row in read_metrics(run)] == [1, 2]


def test_a_checkpoint_without_fingerprints_is_held_to_its_paths(stopped, finished, capfd):
    """Those of versions before this one."""
    inputs, run = stopped
    state = run / "checkpoints" / "step_1" / "state.json"
    record = json.loads(state.read_text())
    del record["inputs"]
    state.write_text(json.dumps(record))
    change_state(state.parent)
    error = refusal(main, run_flags(inputs, run, **flags_of(inputs)), capfd)
    assert re.search(rf"differs from .*\(\['{finished[0]}/reward', .*\), and so does .*--policy_model_path", error)
    before = inputs_in(finished[0])
    main(run_flags(with_slashes(before), run, **flags_of(before)))
    assert "has no fingerprints: of models and data only the paths were compared" in capfd.readouterr().out
    assert_same_run(run, finished[1])


def test_malformed_fingerprints_are_a_damaged_checkpoint(stopped, capfd):
    inputs, run = stopped
    change_state(run / "checkpoints" / "step_1", inputs={"data_path": [1]})
    with pytest.raises(SystemExit, match="2"):
        main(run_flags(inputs, run, **flags_of(inputs)))
    said, error = capfd.readouterr()
    assert re.search(r"step_1 is damaged \(state.json: inputs.data_path", said) and "error: all checkpoints" in error


@pytest.mark.parametrize(("stage", "train"), [("sft", train_sft), ("reward", train_reward)])
def test_supervised_stages_compare_content_too(finished, stage, train, tmp_path, capfd):
    base = inputs_in(finished[0]).policy
    kind = {"sft": "dialogues", "reward": "preferences"}[stage]
    data = shutil.copytree(SAMPLES / "en" / kind, tmp_path / "data")
    flags = {"checkpoint_per_step": 1, "num_valid": 0, "keep_checkpoints": 3}
    (file,) = data.glob("train.json*")
    first, second = shutil.copy(file, tmp_path / f"first{file.suffix}"), data
    paths = {"data_path": [first, second]}
    if stage == "reward":
        center = SAMPLES / "en" / "dialogues"
        paths = {"data_path": first, "center_scores": True, "center_data_path": center, "num_valid": 4}
    run = tmp_path / "run"
    argv = fit_flags(base, paths.pop("data_path"), run, **flags | paths | {"train_steps": 1})
    train(argv)
    shutil.rmtree(run / "final")
    Path(first).write_bytes(file.read_bytes() + b"\n")
    name = "the"
    assert re.search(rf"--data_path .*\({name} {file.suffix} file has other content\)", refusal(train, argv, capfd))


def test_negated_heads_make_other_numbers(stopped, finished):
    """What the refusals above prevent."""
    inputs, run = stopped
    negate_head(inputs.reward)
    main(run_flags(inputs, run, **flags_of(inputs), resume_with_changes=True))
    assert read_metrics(run)[0] == read_metrics(finished[1])[0]
    assert read_metrics(run)[1] != read_metrics(finished[1])[1]
    assert not torch.equal(
        *(load_file(x / "final" / "model.safetensors")["lm_head.weight"] for x in (run, finished[1]))
    )

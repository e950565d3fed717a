"""Folders that appear whole: on the disk before they have their name, and never in place of what is there."""

import os

import pytest

from utils.errors import UserError
from utils.weight_diff.output_folder import new_folder


def test_all_is_on_the_disk_before_the_name_says_so(tmp_path, disk_calls):
    with new_folder(str(tmp_path / "model"), "--path") as partial:
        for name in ("a", "b"):
            (partial / name).write_text(name)
    synced = {name for call, name, *_ in disk_calls[:3]}
    assert synced == {"a", "b", "model.partial"}
    assert disk_calls[3:] == [("renamed", "model.partial", "model"), ("synced", tmp_path.name)]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["a", "b"]


def test_what_has_appeared_meanwhile_stays(tmp_path):
    refusal = pytest.raises(UserError, match=r"--path .*model has appeared meanwhile: give another folder")
    with refusal, new_folder(str(tmp_path / "model"), "--path") as partial:
        (partial / "a").write_text("ours")
        (tmp_path / "model").mkdir()  # empty: a rename would take its place
    assert os.listdir(tmp_path) == ["model"] and not os.listdir(tmp_path / "model")


def test_nothing_stays_of_what_fails(tmp_path):
    with pytest.raises(KeyError), new_folder(str(tmp_path / "model"), "--path") as partial:
        (partial / "a").write_text("half")
        raise KeyError
    assert os.listdir(tmp_path) == []

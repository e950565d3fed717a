"""reward.score on several ranks: each scores its share with all models, and all get everything in order."""

import pytest

import reward.scoring.score_records
from reward.model import save_scalar_model
from reward.scoring.ensemble import Encoding, Frozen, Member
from reward.scoring.score_flags import ScoreConfig
from reward.scoring.score_records import load_reward_models, score_chunk
from tests.helpers.parts import tiny_scalar_model
from tests.helpers.tiny import VOCAB, tiny_tokenizer_folder
from utils.tokenizer import load_tokenizer

TEXTS = ["one", "two three", "four", "five and six", "a text that is longer than eight tokens"]


@pytest.fixture
def members(tmp_path):
    tokenizer = load_tokenizer(str(tiny_tokenizer_folder(tmp_path)))
    models = [tiny_scalar_model(VOCAB, seed).requires_grad_(False) for seed in (1, 2)]
    windows = (None, 8)
    return [
        Member(Frozen(model, False), window, Encoding(tokenizer, "moss_en", window))
        for model, window in zip(models, windows, strict=True)
    ]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_ranks_share_a_chunk(members, monkeypatch, count):
    texts = TEXTS[:count]
    expected = score_chunk(members, texts, 100)
    assert [len(scores) for scores, _ in expected] == [2] * count
    assert [cut for _, cut in expected] == [False, False, False, False, True][:count]
    shares = []
    monkeypatch.setattr(reward.scoring.score_records, "world_size", lambda: 2)
    both = [[None] * count] * 2
    monkeypatch.setattr(reward.scoring.score_records, "gather_objects", lambda rows: shares.append(rows) or both)
    for rank in (0, 1):
        monkeypatch.setattr(reward.scoring.score_records, "rank", lambda rank=rank: rank)
        score_chunk(members, texts, 100)
    assert [len(share) for share in shares] == [(count + 1) // 2, count // 2]
    monkeypatch.setattr(reward.scoring.score_records, "gather_objects", lambda rows: shares)
    found = score_chunk(members, texts, 100)
    assert found == [(pytest.approx(scores, abs=1e-5), cut) for scores, cut in expected]


def test_each_reads_with_its_own_tokenizer_and_template(tmp_path):
    paths = []
    for template, vocab in (("moss_en", VOCAB), ("moss_zh", 370)):
        tokenizer = load_tokenizer(str(tiny_tokenizer_folder(tmp_path / f"{vocab}_tokenizer", vocab)), template)
        paths.append(str(tmp_path / template))
        save_scalar_model(tiny_scalar_model(len(tokenizer)), paths[-1], tokenizer=tokenizer)
    judges = load_reward_models(ScoreConfig(model=paths, input="-", dtype="fp32"), str)
    found = [(len(j.encoding.tokenizer), j.encoding.template, j.encoding.window, j.window) for j in judges]
    assert found == [(VOCAB, "moss_en", 512, 512), (372, "moss_zh", 512, 512)]

"""Reward models in PPO: whose ids they read, and that answers encoded anew get the score of their text."""

import pytest
import torch

import ppo.score
from data.chat import TurnEnd
from data.formats.dialogue_forms import parse_turns
from data.template import encode_dialogue, encode_prompt
from ppo.rollout import assemble
from ppo.score import closed_ids, reward_scores
from ppo.types import PromptBatch
from reward.model import load_scalar_model, save_scalar_model
from reward.scoring.ensemble import Encoding, Ensemble, Frozen, Member
from reward.scoring.load import load_ensemble, reward_readers
from tests.helpers.parts import ppo_config, tiny_scalar_model
from tests.helpers.tiny import VOCAB, tiny_llama_folder, tiny_tokenizer_folder
from utils.errors import UserError
from utils.tokenizer import load_tokenizer, save_tokenizer

OTHER_VOCAB = 370
CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tokenizers `ours` and `other`, of different vocabularies."""
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny_tokenizer_folder(folder / "ours")
    tiny_tokenizer_folder(folder / "other", OTHER_VOCAB)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return load_tokenizer(str(folder / "ours"), "moss_en")


@pytest.fixture(scope="module")
def other(folder):
    return load_tokenizer(str(folder / "other"), "moss_en")


TURNS = [parse_turns(x) for x in (["Why is the sky blue?"], ["Hi", "Hello!", "Name a tree."], ["Count to five."])]
ANSWERS = ["Because of the air.", "Oak, wren or carp", ""]
ENDED = [True, False, True]


@pytest.fixture(scope="module")
def batch(ours):
    """(rollout, prompts) of three answers; the second was cut off at its longest."""
    ids = [ours.encode(text, add_special_tokens=False) + [ours.eos_token_id] * e for text, e in zip(ANSWERS, ENDED)]
    prompt_ids = [encode_prompt(ours, turns, "moss_en") for turns in TURNS]
    rollout = assemble(prompt_ids, [torch.tensor(row) for row in ids], ours.eos_token_id, 0)
    return rollout, PromptBatch(prompt_ids, TURNS, [0, 1, 2])


def member(tokenizer, vocab: int, seed: int, window: int | None = None, own: bool = True) -> Member:
    model = tiny_scalar_model(vocab, seed).requires_grad_(False)
    return Member(Frozen(model, False), window, Encoding(tokenizer, "moss_en", window) if own else None)


def by_hand(member: Member, ids: list[int]) -> float:
    return float(member.model.model(torch.tensor([ids]), torch.ones(1, len(ids)).bool())[0, -1])


def test_the_detour_gives_the_score_of_the_text(ours, other, batch):
    rollout, prompts = batch
    detour, direct = member(other, OTHER_VOCAB, 3), member(ours, VOCAB, 4, own=False)
    scores, truncated = reward_scores(rollout, prompts, Ensemble([direct, detour]), ours, 60)
    assert scores.shape == (3, 2) and truncated.tolist() == [[False]] * 3
    for i, (turns, answer) in enumerate(zip(TURNS, ANSWERS)):
        whole, _ = encode_dialogue(other, [*turns, {"role": "assistant", "content": answer}], "moss_en")
        assert float(scores[i, 1]) == pytest.approx(by_hand(detour, whole), abs=1e-5)
        sampled = prompts.ids[i] + ours.encode(answer, add_special_tokens=False) + [ours.eos_token_id]
        assert float(scores[i, 0]) == pytest.approx(by_hand(direct, sampled), abs=1e-5)


def test_what_overflows_the_reward_models_window_is_marked(ours, other, batch):
    rollout, prompts = batch
    turns = [*TURNS[1], {"role": "assistant", "content": ANSWERS[1]}]
    short, _ = encode_dialogue(other, turns[2:], "moss_en")
    detour = member(other, OTHER_VOCAB, 3, window=len(encode_dialogue(other, turns, "moss_en")[0]) - 1)
    scores, truncated = reward_scores(rollout, prompts, Ensemble([detour]), ours, 60)
    assert truncated.tolist() == [[False], [True], [False]]
    assert float(scores[1, 0]) == pytest.approx(by_hand(detour, short), abs=1e-5)


def test_every_rank_does_as_many_forwards_on_the_detour(ours, other, batch, monkeypatch):
    """Planned from the lengths that the reward model reads, which other ranks do not know."""
    rollout, prompts = batch
    detour = member(other, OTHER_VOCAB, 3)
    expected, _ = reward_scores(rollout, prompts, Ensemble([detour]), ours, 1000)
    calls = []
    detour.model.model.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape))
    monkeypatch.setattr(ppo.score, "gather_objects", lambda item: [item, 5])  # another rank needs five
    scores, _ = reward_scores(rollout, prompts, Ensemble([detour]), ours, 1000)
    assert len(calls) == 5 and {shape[0] for shape in calls[1:]} == {1}
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_a_response_is_closed_as_the_template_ends_a_turn():
    """End token 2 and 10 behind it: what was cut off gets both, what ended in another stop id has them in its place."""
    rollout = assemble([[1, 5]] * 4, [torch.tensor(ids) for ids in ([6, 2], [6, 3], [6, 7], [])], (2, 3), 0)
    assert rollout.ended.tolist() == [True, True, False, False]
    expected = [[1, 5, 6, 2, 10], [1, 5, 6, 2, 10], [1, 5, 6, 7, 2, 10], [1, 5, 2, 10]]
    assert closed_ids(rollout, TurnEnd((2, 10), 2)) == expected
    assert closed_ids(rollout, TurnEnd((2, 10), 2), 4) == [[1, 5, 6, 2], *[[1, 5, 2, 10]] * 3]


def model_folder(path, tokenizer=None):
    folder = tiny_llama_folder(path, OTHER_VOCAB, tokenizer=False)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    return str(folder)


def read_by(path: str, tokenizer, **flags) -> tuple | None:
    """What `reward_readers` says of one model: None, it reads the policy's ids; else (vocabulary, template)."""
    said = []
    flags = {"template": "moss_en"} | {k: x if k == "template" else [x] for k, x in flags.items()}
    (reader,) = reward_readers(ppo_config(reward_model_path=[path], **flags), tokenizer, said.append)
    assert bool(said) == bool(reader.own)
    return reader.own and (len(reader.own[0]), reader.own[1])


def test_who_reads_the_policys_ids(tmp_path, folder, ours, other):
    without, same = model_folder(tmp_path / "without"), model_folder(tmp_path / "same", ours)
    another = model_folder(tmp_path / "another", other)
    chinese = model_folder(tmp_path / "chinese", load_tokenizer(str(folder / "ours"), "moss_zh"))
    assert read_by(without, ours) is None  # it has none of its own: the policy's
    assert read_by(same, ours) is None
    assert read_by(another, ours) == (OTHER_VOCAB, "moss_en")
    assert read_by(without, ours, reward_tokenizer_name_or_path=str(folder / "other")) == (OTHER_VOCAB, "moss_en")
    assert read_by(same, ours, reward_template="moss_zh") == (VOCAB + 2, "moss_zh")
    assert read_by(chinese, ours) == (VOCAB + 2, "moss_zh")  # the template that its tokenizer was saved with
    assert read_by(chinese, ours, reward_template="moss_en") is None  # two tags more change no id
    larger = load_tokenizer(str(folder / "ours"), "moss_en")
    larger.add_tokens(["qqq"])  # in no text that is tried, but it could be sampled
    assert read_by(same, larger) == (VOCAB, "moss_en")


def test_each_is_loaded_with_its_tokenizer_and_window(tmp_path, ours, other):
    paths = []
    for name, tokenizer, vocab, window in (("same", ours, VOCAB, 512), ("another", other, OTHER_VOCAB, 48)):
        base = tiny_llama_folder(tmp_path / f"{name}_base", vocab, tokenizer=False, max_position_embeddings=window)
        model = load_scalar_model(str(base), torch.float32, torch.device("cpu"), say=str)
        paths.append(str(tmp_path / name))
        save_scalar_model(model, paths[-1], tokenizer=tokenizer)
    flags = {"reward_model_path": paths, "reward_ensemble": "mean_minus_std", "ensemble_std_coef": 0.5}
    config = ppo_config(**flags)
    ensemble = load_ensemble(config, reward_readers(config, ours, str), ours, VOCAB, lambda m: Frozen(m, False), str)
    direct, detour = ensemble.members
    assert (direct.encoding, direct.window) == (None, 512)
    assert (detour.encoding.window, detour.encoding.template) == (48, "moss_en")
    assert len(detour.encoding.tokenizer) == OTHER_VOCAB
    assert (ensemble.rule, ensemble.std_coef) == ("mean_minus_std", 0.5)


def test_who_reads_the_policys_ids_in_a_chat_template(tmp_path, chat_folder):
    policy, same, other_end = (load_tokenizer(str(chat_folder), "chat") for _ in range(3))
    policy.chat_template = same.chat_template = other_end.chat_template = CHAT
    other_end.eos_token = "<|im_start|>"
    assert read_by(model_folder(tmp_path / "same", same), policy, template="chat") is None
    assert read_by(model_folder(tmp_path / "end", other_end), policy, template="chat") == (len(policy), "chat")


def test_what_cannot_be_read_is_refused(tmp_path, folder, ours):
    without = model_folder(tmp_path / "without")
    another = model_folder(tmp_path / "another", load_tokenizer(str(folder / "other")))
    for path, remedy in ((without, "give --reward_tokenizer_name_or_path"), (another, "no chat template")):
        with pytest.raises(UserError, match=f"--reward_template chat: .*{remedy}"):
            read_by(path, ours, reward_template="chat")

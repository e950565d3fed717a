"""Chat templates of the families in helpers/families.py: prompts, masks, stop ids, reward models; Phi 3's tags."""

import json
from dataclasses import dataclass
from itertools import groupby

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.batching.collate import pad
from data.chat import turn_end
from data.choose_template import prepare_tokenizer
from data.formats.dialogue_forms import parse_turns
from data.preferences import Pair, Preference
from data.template import encode_dialogue, encode_prompt
from ppo.decoding.sampling import Sampling
from ppo.models import PolicyModel
from ppo.rollout import PolicySampler, assemble, response_ids
from ppo.score import closed_ids
from reward.forward import best_answer_mask
from reward.scoring.ensemble import Encoding
from sft.model import AnswerModel
from sft.packed_batches import Layout
from sft.samples import sample_answers
from tests.helpers.data import encode_preference, encode_turns
from tests.helpers.families import FAMILIES, FOLDER, TURNS, Family, family_config, family_tokenizer
from tests.helpers.parts import ppo_config, prompts_of
from tests.helpers.tiny import tiny_tokenizer_folder
from tests.helpers.tiny_run import write_json
from utils.engine.engine import InferenceEngine
from utils.errors import UserError
from utils.flags.text import StopFlags, TextFlags
from utils.tokenizer import load_tokenizer, save_tokenizer, template_of

SYSTEM = [{"role": "system", "content": "Be brief."}, TURNS[0]]


@dataclass
class Flags(StopFlags, TextFlags):
    """What a command that generates has of flags."""


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def tokenizer(family, tmp_path_factory):
    """The family's tokenizer as a command gets it: from a folder, with the template and the stop ids settled."""
    return settled(family, tmp_path_factory.mktemp("family"))


def settled(family: Family, folder):
    tokenizer, flags = family_tokenizer(family), Flags(chat_template_kwargs=json.dumps(family.arguments))
    tokenizer.save_pretrained(folder / "tokenizer")
    AutoModelForCausalLM.from_config(family_config(family, len(tokenizer))).save_pretrained(folder / "model")
    if family.ends:
        ids = tokenizer.convert_tokens_to_ids(family.ends)
        write_json(folder / "model" / "generation_config.json", {"eos_token_id": ids if len(ids) > 1 else ids[0]})
    found, template = prepare_tokenizer(flags, str(folder / "tokenizer"), [("--m", str(folder / "model"))], str)
    assert template == "chat"
    return found


def stretches(tokenizer, ids: list[int], mask: list[bool]) -> list[str]:
    """The text of each run of True."""
    runs = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([i for i, _ in run]) for inside, run in runs if inside]


def test_prompt(family, tokenizer):
    assert tokenizer.decode(encode_prompt(tokenizer, TURNS[:-1], "chat")) == family.prompt
    if family.system is None:
        with pytest.raises(UserError, match="System role not supported"):
            encode_prompt(tokenizer, SYSTEM, "chat")
    else:
        assert tokenizer.decode(encode_prompt(tokenizer, SYSTEM, "chat")) == family.system


def test_what_is_trained_on(family, tokenizer):
    ids, mask = encode_dialogue(tokenizer, TURNS, "chat")
    assert tokenizer.decode(ids) == family.prompt + family.answer + family.behind
    assert stretches(tokenizer, ids, mask) == [*family.history, family.answer]
    assert sorted(tokenizer.convert_ids_to_tokens(tokenizer.stop_ids)) == sorted(family.stops)


def test_rewritten_answers_are_samples_of_their_own(family, tokenizer):
    said = []
    found = encode_turns(tokenizer, [TURNS], "chat", 256, said.append)
    trained_on = [stretches(tokenizer, item.ids, item.answer_mask) for item in found]
    assert trained_on == [[*family.history, family.answer], *([text] for text in family.split)]
    assert all(item.answer_mask[-1] for item in found)  # samples end with their last end token
    counted = [line for line in said if "1 earlier answers that the template rewrites" in line and "x:1" in line]
    assert len(counted) == len(said) == len(family.split)


def test_each_answer_is_trained_on_once():
    """The first answer is in the whole dialogue; the second, whose reasoning goes, in a sample without the first."""
    tokenizer = family_tokenizer(FAMILIES["ChatML"])
    kept = "(message.content if loop.last else message.content.split('</think>')[-1])"
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content", kept)
    texts = ["One?", "A.", "Two?", "<think>x</think>B.", "Three?", "C."]
    found = encode_turns(tokenizer, [parse_turns(texts)], "chat", 256, str)
    trained_on = [stretches(tokenizer, item.ids, item.answer_mask) for item in found]
    assert trained_on == [["A.<|im_end|>", "C.<|im_end|>"], ["<think>x</think>B.<|im_end|>"]]


def test_what_a_reward_model_reads(family, tokenizer):
    """A dialogue; and a response: as sampled, cut off, ended in another stop id."""
    whole = family.prompt + family.answer + family.behind
    ids, cut = Encoding(tokenizer, "chat", None)(TURNS)
    assert (tokenizer.decode(ids), cut) == (whole, False)
    end = turn_end(tokenizer, "chat")
    prompt = encode_prompt(tokenizer, TURNS[:-1], "chat")
    answer = ids[len(prompt) : len(ids) - len(end.ids)]
    others = [i for i in tokenizer.stop_ids if i != end.stop]
    responses = [[*answer, *end.ids[: end.num_generated]], answer, *([*answer, i] for i in others)]
    rollout = assemble([prompt] * len(responses), [torch.tensor(row) for row in responses], tokenizer.stop_ids, 0)
    assert rollout.ended.tolist() == [True, False, *[True] * len(others)]
    assert [tokenizer.decode(row) for row in closed_ids(rollout, end)] == [whole] * len(responses)


def test_what_the_loss_of_a_reward_model_counts(family, tokenizer):
    """The best answer, up to its end token, and nothing of the other."""
    preference = Preference(TURNS[:-1], ["No.", TURNS[-1]["content"]], [Pair(1, 0, None, None)], "", "")
    item, _ = encode_preference(preference, tokenizer, "chat", 256)
    ids, mask = pad(item.answers, 0)
    counted = best_answer_mask([item], mask)
    assert tokenizer.decode(ids[1][counted[1]]) == family.answer
    assert not counted[0].any()


def trained(family: Family, tokenizer, steps: int = 60) -> PolicyModel:
    """A tiny model of the family after SFT on the two answers, each to several questions."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(family_config(family, len(tokenizer)), attn_implementation="eager").float()
    turns = [TURNS, *([{"role": "user", "content": text}, TURNS[3]] for text in ("Bye", "Off", "Bye now", "I go"))]
    data = encode_turns(tokenizer, turns, "chat", 256, str)
    layout, model = Layout(False, False, 4096), AnswerModel(lm)
    optimizer = torch.optim.Adam(lm.parameters(), lr=5e-3)
    sequences, mask, _ = layout.collate(layout.rows(data, 1))
    for _ in range(steps):
        loss = model(sequences, mask) / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return PolicyModel(lm.eval())


def answers(policy: PolicyModel, tokenizer, prompt: list[int]) -> tuple[str, bool]:
    """(the response, greedy but for 1 in e^100, special tokens and all; whether it ended by itself)."""
    config = ppo_config(maxlen_res=40, maxlen_prompt=256)
    rollout = PolicySampler(InferenceEngine(policy), tokenizer, config)(prompts_of(prompt), Sampling(0.01), 0)
    return tokenizer.decode(response_ids(rollout)[0]), bool(rollout.ended[0])


@pytest.mark.parametrize("name", ["Llama 3.1", "Gemma 2", "ChatML, a base model's EOS"])
def test_a_model_that_was_trained_stops_where_its_template_does(tmp_path, name):
    family = FAMILIES[name]
    tokenizer = settled(family, tmp_path)
    policy, prompt = trained(family, tokenizer), encode_prompt(tokenizer, TURNS[:-1], "chat")
    assert answers(policy, tokenizer, prompt) == (family.answer, True)
    tokenizer.stop_ids = (tokenizer.eos_token_id,)  # without the other stop ids, it goes on
    text, ended = answers(policy, tokenizer, prompt)
    assert text.startswith(family.answer) and text != family.answer and not ended


class WholeEngine(InferenceEngine):
    """One that has room for the whole weights."""

    def fits_gathered(self) -> bool:
        return True


def test_samples_of_sft_stop_there_too(tmp_path, monkeypatch):
    tokenizer, lengths = settled(FAMILIES["Gemma 2"], tmp_path), []
    lm = trained(FAMILIES["Gemma 2"], tokenizer).lm
    shown = encode_turns(tokenizer, [TURNS], "chat", 256, str)
    make = type(lm).generate
    monkeypatch.setattr(type(lm), "generate", lambda *a, **k: lengths.append((rows := make(*a, **k)).shape[1]) or rows)
    (row,) = sample_answers(WholeEngine(AnswerModel(lm)), shown, tokenizer, 256, 40)
    assert (row["answer"], row["reference"]) == ("See you.", "See you.")
    assert row["prompt"] == FAMILIES["Gemma 2"].prompt
    assert lengths == [len(shown[0].ids)]  # as long as the data's own, its end token included


@pytest.fixture
def phi3(tmp_path):
    """A folder as Phi 3's, but for its `tokenizer.json`: a LLaMA-format tokenizer.model and tags in the config."""
    path = tiny_tokenizer_folder(tmp_path / "phi3")
    tags = {"<|endoftext|>": False, "<|user|>": True, "<|assistant|>": True, "<|end|>": True}  # True: takes in spaces
    added = {
        str(i): {"content": tag, "lstrip": False, "rstrip": rstrip, "normalized": False, "special": True}
        for i, (tag, rstrip) in enumerate(tags.items(), start=400)
    }
    config = {"added_tokens_decoder": added, "eos_token": "<|endoftext|>", "bos_token": "<s>"}
    config["chat_template"] = (FOLDER / "chat_templates" / "phi3.jinja").read_text("utf-8")
    write_json(path / "tokenizer_config.json", config)
    return path


def test_white_space_behind_a_tag_belongs_to_it_and_an_exported_folder_gives_the_same_ids(phi3, tmp_path):
    tokenizer = load_tokenizer(str(phi3), "chat")
    prompt, dialogue = encode_prompt(tokenizer, TURNS[:1], "chat"), encode_dialogue(tokenizer, TURNS[:2], "chat")
    assert tokenizer.convert_ids_to_tokens(prompt) == ["<|user|>", "▁H", "i", "<|end|>", "<|assistant|>"]
    assert tokenizer.eos_token == "<|endoftext|>" and turn_end(tokenizer, "chat").ids == (403,)
    save_tokenizer(tokenizer, tmp_path / "out")
    again = load_tokenizer(str(tmp_path / "out"), "chat")
    assert encode_dialogue(again, TURNS[:2], "chat") == dialogue
    assert (again.eos_token, again.chat_template) == (tokenizer.eos_token, tokenizer.chat_template)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    rendered = theirs.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    assert theirs.encode(rendered, add_special_tokens=False) == prompt


def test_of_several_chat_templates_the_default_one_is_taken(phi3):
    file = phi3 / "tokenizer_config.json"
    config = json.loads(file.read_text())
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": config["chat_template"]}]
    write_json(file, config | {"chat_template": named})
    tokenizer = load_tokenizer(str(phi3))
    assert tokenizer.chat_template == config["chat_template"] and template_of(tokenizer) == "chat"
    write_json(file, config | {"chat_template": named[:1]})
    with pytest.raises(UserError, match="several chat templates, none of them named default"):
        load_tokenizer(str(phi3))


def test_a_template_that_cannot_be_rendered_is_an_error_of_the_user(phi3):
    tokenizer = load_tokenizer(str(phi3), "chat", {"name": 3})
    tokenizer.chat_template = "{{ messages[0]['content'] + name }}"
    with pytest.raises(UserError, match=r"refuses a dialogue .*--chat_template_kwargs"):
        encode_prompt(tokenizer, TURNS[:1], "chat")

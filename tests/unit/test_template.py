"""Dialogues to ids: against SentencePiece stretch by stretch, and a prompt is always how its dialogue begins."""

import random

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers.processors import TemplateProcessing

from data.template import decode_answer, encode_dialogue, encode_prompt, encode_text, last_answer
from utils.errors import UserError
from utils.tokenizer import load_tokenizer

ANSWERS = [
    "Fine, thanks.",
    ":) smile",
    "// comment",  # merges with the colon before it
    ": colon",
    "你好！我很好。",
    "😀 emoji 👍🏽",
    "def f(x):\n    return  x",
    "</s> spelt out",
    "<|im_end|> spelt out",
    "2",
    "…",
]
ROLES = ("user", "assistant")


def turns_of(*texts: str) -> list[dict]:
    return [{"role": ROLES[k % 2], "content": text} for k, text in enumerate(texts)]


def test_moss_en_is_stretches_between_tags(llama_model):
    sp, tokenizer = SentencePieceProcessor(str(llama_model)), load_tokenizer(str(llama_model), "moss_en")
    turns = turns_of("Hi  there", "Hello", "Bye </s>")
    # "Hello" goes on in its stretch, so "Assistant:Hello" is encoded as one.
    expected = [1, *sp.encode("Human:Hi  there"), 2, *sp.encode("Assistant:Hello"), 2]
    expected += [*sp.encode("Human:Bye </s>"), 2, *sp.encode("Assistant:")]
    assert encode_prompt(tokenizer, turns, "moss_en") == expected
    assert expected.count(1) == 1
    assert expected.count(2) == 3


def test_moss_zh_is_stretches_between_tags(llama_model):
    sp, tokenizer = SentencePieceProcessor(str(llama_model)), load_tokenizer(str(llama_model), "moss_zh")
    ids, mask = encode_dialogue(tokenizer, turns_of("你好", "很好 😀"), "moss_zh")
    question, answer = sp.encode("你好"), sp.encode("很好 😀")
    assert ids == [1, 32000, *question, 2, 32001, *answer, 2]
    assert mask == [False] * (len(question) + 4) + [True] * (len(answer) + 1)


def test_the_mask_covers_every_answer_and_its_eos(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model), "moss_en")
    ids, mask = encode_dialogue(tokenizer, turns_of("One?", "Two.", "Three?", "Four."), "moss_en")
    stretches, start = [], None
    for t, inside in enumerate([*mask, False]):
        if inside and start is None:
            start = t
        if not inside and start is not None:
            stretches.append(ids[start:t])
            start = None
    assert [stretch[-1] for stretch in stretches] == [2, 2]
    assert [decode_answer(tokenizer, stretch) for stretch in stretches] == ["Two.", "Four."]


@pytest.fixture(params=["llama moss_en", "llama moss_zh", "tiny moss_en", "chat moss_en", "chat moss_zh", "chat chat"])
def setting(request):
    kind, template = request.param.split()
    fixture = {"llama": "llama_model", "tiny": "tiny_model", "chat": "chat_folder"}[kind]
    return load_tokenizer(str(request.getfixturevalue(fixture)), template), template


def random_answers(count: int) -> list[str]:
    rng = random.Random(3)
    parts = [*"abcs :;)(.,!?-\n", "  ", "ing", "的", "好", "😀", "://", "))", "::"]
    texts = ("".join(rng.choices(parts, k=rng.randint(1, 12))).strip() for _ in range(count))
    return [text for text in texts if text]


def test_a_dialogue_begins_with_its_prompt_and_the_answer_survives(setting):
    tokenizer, template = setting
    for answer in ANSWERS + random_answers(60):
        turns = turns_of("What?", ":-) yes", "And then?", answer)
        prompt = encode_prompt(tokenizer, turns[:-1], template)
        ids, mask = encode_dialogue(tokenizer, turns, template)
        assert ids[: len(prompt)] == prompt
        assert len(mask) == len(ids)
        learnt = ids[last_answer(mask)]
        assert last_answer(mask).start == len(prompt)
        assert learnt[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in learnt[:-1]
        assert tokenizer.decode(ids[last_answer(mask).stop :]) == ("\n" if template == "chat" else "")  # ChatML's
        assert decode_answer(tokenizer, ids[len(prompt) :]) == answer


def test_an_answer_that_becomes_history_keeps_its_ids(setting):
    """Multi-turn training sees the same tokens whether an answer is the last or not."""
    tokenizer, template = setting
    for answer in ANSWERS:
        ids, mask = encode_dialogue(tokenizer, turns_of("What?", answer), template)
        longer = encode_prompt(tokenizer, turns_of("What?", answer, "More?"), template)
        if template == "chat" and tokenizer.eos_token in answer:
            continue  # its history cannot tell a tag from text
        assert longer[: len(ids)] == ids
        long_mask = encode_dialogue(tokenizer, turns_of("What?", answer, "More?", "No."), template)[1]
        assert long_mask[: len(mask)] == mask


def test_an_answer_that_would_merge_with_the_colon(llama_model):
    """Generation starts behind a fixed "Assistant:", so that the piece "://" cannot come of it."""
    sp, tokenizer = SentencePieceProcessor(str(llama_model)), load_tokenizer(str(llama_model), "moss_en")
    opening = sp.encode("Assistant:")
    assert sp.encode("Assistant:// x")[: len(opening)] != opening
    ids, mask = encode_dialogue(tokenizer, turns_of("Go", "// x"), "moss_en")
    answer = [i for i, inside in zip(ids, mask, strict=True) if inside]
    assert answer == [sp.piece_to_id(piece) for piece in ("//", "▁x", "</s>")]


def test_special_tokens_spelt_out_in_a_text_stay_text(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model), "moss_zh")
    ids = encode_prompt(tokenizer, turns_of("</s><|MOSS|>我是助手</s><s>"), "moss_zh")
    assert [ids.count(i) for i in (1, 2, 1500, 1501)] == [1, 1, 1, 1]


def test_system_turns(tiny_model, chat_folder):
    system = [{"role": "system", "content": "Be brief."}]
    tokenizer = load_tokenizer(str(tiny_model), "moss_en")
    folded = encode_prompt(tokenizer, turns_of("Be brief.\n\nHi"), "moss_en")
    assert encode_prompt(tokenizer, system + turns_of("Hi"), "moss_en") == folded
    chat = load_tokenizer(str(chat_folder), "chat")
    text = chat.decode(encode_prompt(chat, system + turns_of("Hi"), "chat"))
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text == expected


def test_chat_is_the_tokenizers_own_template(chat_folder):
    tokenizer = load_tokenizer(str(chat_folder), "chat")
    turns = turns_of("Hi", "Hello", "Bye")
    own = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(tokenizer, turns, "chat") == own
    ids, mask = encode_dialogue(tokenizer, turns_of("Hi", "Hello", "Bye", "See you"), "chat")
    trained = tokenizer.decode([i for i, inside in zip(ids, mask, strict=True) if inside])
    assert trained == "Hello<|im_end|>See you<|im_end|>"


def test_a_chat_template_brings_the_bos_itself(chat_folder):
    """Some tokenizers put a BOS in front of whatever they encode, and their template writes one too: one is enough."""
    tokenizer, turns = load_tokenizer(str(chat_folder), "chat"), turns_of("Hi", "Hello", "Bye", "See you")
    expected, tag = encode_dialogue(tokenizer, turns, "chat"), "<|im_start|>"
    assert expected[0].count(tokenizer.convert_tokens_to_ids(tag)) == 4
    special = [(tag, tokenizer.convert_tokens_to_ids(tag))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{tag} $A", special_tokens=special)
    assert tokenizer.encode("Hi")[0] == special[0][1]
    assert encode_dialogue(tokenizer, turns, "chat") == expected


def test_chat_template_that_rewrites_history_or_refuses(chat_folder):
    tokenizer = load_tokenizer(str(chat_folder), "chat")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "[{{ m.role }}]{{ m.content.split('</think>')[-1] if not loop.last else m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    ids, mask = encode_dialogue(tokenizer, turns_of("Hi", "<think>x</think>Hello", "Bye", "See you"), "chat")
    trained = tokenizer.decode([i for i, inside in zip(ids, mask, strict=True) if inside])
    assert trained == "See you<|im_end|>"  # the first answer is not in the prompt as it was given
    with pytest.raises(UserError, match=r"--template chat.*no system role"):
        encode_prompt(tokenizer, [{"role": "system", "content": "x"}, *turns_of("Hi")], "chat")


def test_a_text_that_is_no_dialogue_stands_between_bos_and_eos(llama_model, chat_folder):
    sp, tokenizer = SentencePieceProcessor(str(llama_model)), load_tokenizer(str(llama_model))
    assert encode_text(tokenizer, "Hi  there </s>") == [1, *sp.encode("Hi  there </s>"), 2]
    chat = load_tokenizer(str(chat_folder))  # has no BOS
    assert encode_text(chat, "Hi") == [*chat.encode("Hi"), chat.eos_token_id]


def test_decode_answer_drops_special_and_unknown_ids(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model), "moss_zh")
    hello = tokenizer.encode("Hello 😀", add_special_tokens=False)
    assert decode_answer(tokenizer, [*hello, 2]) == "Hello 😀"
    assert decode_answer(tokenizer, [1501, *hello, 5000, 0, 2]) == "Hello 😀"
    assert decode_answer(tokenizer, [2]) == ""
    assert decode_answer(tokenizer, []) == ""

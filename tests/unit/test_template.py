"""Dialogues to ids: stretches as SentencePiece encodes them, masks, and dialogues that begin with their prompts."""

from sentencepiece import SentencePieceProcessor
from tokenizers.processors import TemplateProcessing

from data.template import decode_answer, encode_dialogue, encode_prompt, encode_text
from utils.tokenizer import load_tokenizer


def turns_of(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


def inside(ids: list[int], mask: list[bool]) -> list[int]:
    return [i for i, answer in zip(ids, mask, strict=True) if answer]


def test_moss_en_is_stretches_between_tags(llama_model):
    sp, tokenizer = SentencePieceProcessor(str(llama_model)), load_tokenizer(str(llama_model), "moss_en")
    turns = turns_of("Hi  there", "Hello", "Bye </s>")
    expected = [1, *sp.encode("Human:Hi  there"), 2, *sp.encode("Assistant:Hello"), 2]  # the answer is in its stretch
    expected += [*sp.encode("Human:Bye </s>"), 2, *sp.encode("Assistant:")]
    assert encode_prompt(tokenizer, turns, "moss_en") == expected
    assert (expected.count(1), expected.count(2)) == (1, 3)


def test_moss_zh_is_stretches_between_tags(llama_model):
    sp, tokenizer = SentencePieceProcessor(str(llama_model)), load_tokenizer(str(llama_model), "moss_zh")
    ids, mask = encode_dialogue(tokenizer, turns_of("你好", "很好 😀"), "moss_zh")
    question, answer = sp.encode("你好"), sp.encode("很好 😀")
    assert ids == [1, 32000, *question, 2, 32001, *answer, 2]
    assert mask == [False] * (len(question) + 4) + [True] * (len(answer) + 1)
    spelt = encode_prompt(tokenizer, turns_of("</s><|MOSS|>我是助手</s><s>"), "moss_zh")
    assert [spelt.count(i) for i in (1, 2, 32000, 32001)] == [1, 1, 1, 1]


def test_an_answer_that_would_merge_with_the_colon(llama_model):
    """Generation starts after a fixed "Assistant:" and cannot produce the piece "://"."""
    sp, tokenizer = SentencePieceProcessor(str(llama_model)), load_tokenizer(str(llama_model), "moss_en")
    opening = sp.encode("Assistant:")
    assert sp.encode("Assistant:// x")[: len(opening)] != opening
    answer = inside(*encode_dialogue(tokenizer, turns_of("Go", "// x"), "moss_en"))
    assert answer == [sp.piece_to_id(piece) for piece in ("//", "▁x", "</s>")]


def test_a_system_turn_is_folded_into_the_first_question(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model), "moss_en")
    folded = encode_prompt(tokenizer, turns_of("Be brief.\n\nHi"), "moss_en")
    assert encode_prompt(tokenizer, [{"role": "system", "content": "Be brief."}, *turns_of("Hi")], "moss_en") == folded


def test_a_chat_prompt_has_the_templates_bos_alone(chat_folder):
    """Some tokenizers put a BOS before all texts that they encode, and their template writes one, too."""
    tokenizer, turns = load_tokenizer(str(chat_folder), "chat"), turns_of("Hi", "Hello", "Bye", "See you")
    expected, tag = encode_dialogue(tokenizer, turns, "chat"), "<|im_start|>"
    special = [(tag, tokenizer.convert_tokens_to_ids(tag))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{tag} $A", special_tokens=special)
    assert tokenizer.encode("Hi")[0] == special[0][1]
    assert encode_dialogue(tokenizer, turns, "chat") == expected


def test_texts_and_decoded_answers(llama_model, chat_folder, tiny_model):
    sp, tokenizer = SentencePieceProcessor(str(llama_model)), load_tokenizer(str(llama_model))
    assert encode_text(tokenizer, "Hi  there </s>") == [1, *sp.encode("Hi  there </s>"), 2]
    chat = load_tokenizer(str(chat_folder))  # without BOS
    assert encode_text(chat, "Hi") == [*chat.encode("Hi"), chat.eos_token_id]
    tokenizer = load_tokenizer(str(tiny_model), "moss_zh")
    hello = tokenizer.encode("Hello 😀", add_special_tokens=False)
    assert decode_answer(tokenizer, [1501, *hello, 5000, 0, 2]) == "Hello 😀"  # special and unknown ids
    assert decode_answer(tokenizer, [2]) == decode_answer(tokenizer, []) == ""
    tokenizer.stop_ids = (hello[-1],)
    assert decode_answer(tokenizer, hello) == tokenizer.decode(hello[:-1]).strip() != "Hello 😀"

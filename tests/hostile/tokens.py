"""Cases of tokenizers' files and chat templates."""

import json
from functools import partial

from tests.hostile.case import Case, values_of
from tests.hostile.changes import REMOVED, all_of, fifo, holding, in_place, put, replaced, without
from tests.hostile.configs import files

HUGE = 10**9
llama = partial(Case, "sft", "policy", flags={"hf_model_name_or_path": "{model}"})
chat = partial(Case, "sft", "chat", flags={"hf_model_name_or_path": "{model}"})

TOKENIZER = {
    "model.vocab": [3, [], {}, None, {"a": "x"}, {"a": -1}, {"a": HUGE}, {"a": 1.5}, {"a": 2**40}],
    "model.vocab.!": [HUGE, -1, "x", 5],
    "model.merges": [3, ["a"], ["a b c"], [["a", "b"]], [["zz", "yy"]], [[3, 4]], None],
    "model.type": ["no_such", 3, None, "WordPiece", "Unigram"],
    "model.unk_token": [3, "no_such"],
    "model.dropout": [2.0, "x", -1, 1.0],
    "model": [3, {}, None],
    "added_tokens.0.id": [-1, HUGE, "x", 2**40, 0, None, 1.5],
    "added_tokens.0.content": ["", 3, None, "\x1b[2J", "a" * 100_000],
    "added_tokens": [3, {}, [3], [{}], None],
    "pre_tokenizer": [3, {"type": "no_such"}, {}, {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed", "invert": False},
                      {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}],
    "normalizer": [3, {"type": "Replace", "pattern": {"Regex": "["}, "content": ""},
                   {"type": "Replace", "pattern": {"String": ""}, "content": "aa"},
                   {"type": "Prepend", "prepend": "a" * 1_000_000}, {"type": "Sequence", "normalizers": 3}],
    "decoder": [3, {"type": "no_such"}, {"type": "Strip", "content": " ", "start": HUGE, "stop": HUGE}],
    "post_processor": [3, {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "no", "type_id": 0}}], "pair": [],
                           "special_tokens": {}}],
    "truncation": [3, {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9}],
    "padding": [3, {"strategy": {"Fixed": HUGE}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                    "pad_token": "a"}],
    "version": [3, "9.9", None],
    "": [3, [], None],
}  # fmt: skip
CONFIG = {
    "eos_token": [3, None, [], {}, {"content": 3}, "no_such", "", "\x1b[31m"],
    "bos_token": [3, [], {"content": None}],
    "pad_token": [3, {}, "no_such"],
    "unk_token": [3, []],
    "additional_special_tokens": [3, "x", [3], [[]], {"a": 1}],
    "extra_special_tokens": [3, {"x": 3}],
    "added_tokens_decoder": [3, [], {"x": {}}, {"-1": {"content": "a"}}, {"1000000000": {"content": "a"}}, {"5": {"content": 3}},
                             {"5": 3}, {"312": {"content": "<new>", "special": True}}],
    "tokenizer_class": [3, [], "NoSuch", "../x", "os.system", "BertTokenizer", None],
    "auto_map": [3, {"AutoTokenizer": 3}, {"AutoTokenizer": ["own.Own", None]}],
    "model_max_length": [-1, "x", None, float("nan")],
    "padding_side": [3, "up"],
    "truncation_side": ["up"],
    "clean_up_tokenization_spaces": ["x"],
    "model_input_names": [3],
    "backend": [3, "no_such"],
    "split_special_tokens": ["x", True],
    "init_inputs": [3],
    "name_or_path": [3, "someone/model"],
    "tokenizer_file": ["/etc/passwd", 3],
    "": [3, [], None],
}  # fmt: skip
LLAMA_CONFIG = {
    "added_tokens_decoder": [3, [], {"x": {}}, {"-1": {"content": "a"}}, {"1000000000": {"content": "<a>"}}, {"400": 3},
                             {"400": {"content": 3}}, {"400": {"content": ""}}, {"400": {"content": "a" * 100_000}}],
    "pad_token": [3, [], {"content": 3}],
    "eos_token": [3, []],
    "chat_template": [3, {}, [], [3], [{}], [{"name": "other", "template": "x"}], [{"name": "default", "template": 3}],
                      [{"name": [], "template": "x"}]],
}  # fmt: skip
ADDED = {"": [3, [], None, "x"], "<a>": [-1, HUGE, "400", None, [], 1.5, True]}


def spm(edit) -> object:
    """Another SentencePiece model. edit: changes the parsed one."""

    def change(folder) -> None:
        from transformers.convert_slow_tokenizer import import_protobuf

        file = folder / "tokenizer.model"
        proto = import_protobuf().ModelProto.FromString(file.read_bytes())
        edit(proto)
        file.write_bytes(proto.SerializePartialToString())

    return change


def field(part: str, name: str, value):
    """Another value of a field of the SentencePiece model, or of its first piece ("pieces")."""

    def edit(proto) -> None:
        setattr(proto.pieces[7] if part == "pieces" else getattr(proto, part), name, value)

    return spm(edit)


MODELS = {
    "no pieces": spm(lambda proto: proto.ClearField("pieces")), "one piece": spm(lambda proto: proto.pieces.__delitem__(slice(1, None))),
    "no unknown piece": spm(lambda proto: proto.pieces.__delitem__(0)), "a piece twice": field("pieces", "piece", "▁"),
    "an empty piece": field("pieces", "piece", ""), "a piece with NUL": field("pieces", "piece", "\0"),
    "a piece of 1 MB": field("pieces", "piece", "a" * 10**6), "a score of NaN": field("pieces", "score", float("nan")),
    "an infinite score": field("pieces", "score", float("inf")), "unk_id of -1": field("trainer_spec", "unk_id", -1),
    "unk_id of 10**9": field("trainer_spec", "unk_id", HUGE), "eos_id of -1": field("trainer_spec", "eos_id", -1),
    "eos_id of 10**9": field("trainer_spec", "eos_id", HUGE), "bos_id of 10**9": field("trainer_spec", "bos_id", HUGE),
    "unigram": field("trainer_spec", "model_type", 1), "a wrong charsmap": field("normalizer_spec", "precompiled_charsmap", b"abc"),
    "a charsmap of its size": field("normalizer_spec", "precompiled_charsmap", b"\xff\xff\xff\x7f" + b"x" * 64),
    "cut": lambda folder: (folder / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes()[:3000]),
    "empty": holding("tokenizer.model", b""), "a length of 2 GB": holding("tokenizer.model", b"\x0a\xff\xff\xff\xff\x07abc"),
    "nested fields": holding("tokenizer.model", b"\x0b" * 100_000), "a pickle": holding("tokenizer.model", b"\x80\x02]."),
    "a folder": in_place("tokenizer.model", lambda path: path.mkdir()), "a FIFO": in_place("tokenizer.model", fifo),
    "a link to /dev/zero": in_place("tokenizer.model", lambda path: path.symlink_to("/dev/zero")),
}  # fmt: skip

NOT_USED = "no code of this toolkit, nor of the tokenizer, reads it"
IN_MESSAGES = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
TEMPLATES = {
    "syntax": "{% for %}", "an unknown tag": "{% no_such %}", "an unknown filter": "{{ messages | no_such }}", "not closed": "{{ messages",
    "a key that is not there": "{{ messages[0]['no_such']['x'] }}", "a name that is not there": "{{ no_such.x }}",
    "a division by zero": "{{ 1 / 0 }}", "a modulo by zero": "{{ 1 % 0 }}", "an index": "{{ messages[99]['content'] }}",
    "a call of a text": "{{ messages[0]['content']() }}", "a sum of kinds": "{{ 1 + 'a' }}", "raised": "{{ raise_exception('\x1b[2Jno') }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "empty": "", "white space": " \n ", "constant": "hello",
    "without the answers": "{{ messages[0]['content'] }}", "empty output": "{% if false %}x{% endif %}",
    "a loop of 10**9": "{% for i in range(10**9) %}x{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that print": "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
    "a text of 10 GB": "{{ 'a' * 10**10 }}", "a text of 1 GB, often": "{% for i in range(20) %}{{ 'a' * 10**9 }}{% endfor %}",
    "a list of 10**10": "{{ ([0] * 10**10) | length }}", "a power": "{{ 10 ** 10 ** 10 }}", "a shift by a power": "{{ (7 ** 99999999) | length }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "doubling by join": "{% set ns = namespace(x='ab') %}{% for i in range(50) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}{{ ns.x }}",
    "a wide column": "{{ 'a' | center(10**10) }}", "a wide format": "{{ '%99999999999d' | format(1) }}", "a wide format method": "{{ '{:>99999999999}'.format(1) }}",
    "replacing": "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(12) %}{% set ns.x = ns.x.replace('a', 'aaaaaaaaaa') %}{% endfor %}{{ ns.x }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}", "a global of a function": "{{ raise_exception.__globals__ }}",
    "os": "{{ cycler.__init__.__globals__.os.popen('touch ran').read() }}", "a format of attributes": "{{ '{0.__class__}'.format(messages) }}",
    "import": "{{ self.__init__.__globals__ }}", "a change of the messages": "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "include": "{% include '/etc/passwd' %}", "extends": "{% extends 'x' %}", "an import of a file": "{% import '/etc/passwd' as x %}",
    "an escape": "\x1b[2J" + IN_MESSAGES, "a lone surrogate": "\\ud800".encode().decode("unicode_escape") + IN_MESSAGES, "a NUL": "\0" + IN_MESSAGES,
    "a million characters": "a" * 10**6 + IN_MESSAGES, "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "deep blocks": "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "deep lists": "{{ " + "[" * 500 + "]" * 500 + " }}", "sorted messages": "{{ messages | sort }}", "a regular expression": "{{ 'a' * 99 | urlize }}",
    "answers in capitals": "{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}",
    "answers twice": "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}<|im_end|>{% endfor %}",
    "random": "{% for m in messages %}{{ range(99999) | random }}{{ m['content'] }}<|im_end|>{% endfor %}",
}  # fmt: skip
LISTS = [3, {}, [], [3], [{}], [{"name": "default"}], [{"name": "default", "template": 3}], [{"name": "a", "template": "x"}],
         [{"name": 3, "template": IN_MESSAGES}], {"default": IN_MESSAGES}, True]  # fmt: skip


def template(text: str):
    """The chat template of a folder, as newer and as older ones have it."""
    if "\ud800" in text or "\0" in text:
        return all_of(without("chat_template.jinja"), put("tokenizer_config.json", "chat_template", text))
    return holding("chat_template.jinja", text)


in_config = all_of(without("chat_template.jinja"))
CASES = (
    values_of("tokenizer.json", TOKENIZER, chat)
    | values_of("tokenizer_config.json", CONFIG, chat)
    | {f"{name} (SentencePiece)": case for name, case in values_of("tokenizer_config.json", LLAMA_CONFIG, llama).items()}
    | values_of("added_tokens.json", ADDED, llama)
    | values_of("special_tokens_map.json", {"": [3, []], "eos_token": [3, "no_such", {"content": 3}]}, chat)
    | {f"tokenizer.model: {title}": llama(change) for title, change in MODELS.items()}
    | files("tokenizer.json", chat)
    | files("tokenizer_config.json", chat)
    | {f"{name} (SentencePiece)": case for name, case in files("tokenizer_config.json", llama).items()}
    | {f"template: {title}": chat(template(text)) for title, text in TEMPLATES.items()}
    | {f"template: {json.dumps(value)[:60]}": chat(all_of(in_config, put("tokenizer_config.json", "chat_template", value))) for value in LISTS}
    | {
        "template: a FIFO": chat(in_place("chat_template.jinja", fifo)),
        "template: a folder": chat(in_place("chat_template.jinja", lambda path: path.mkdir())),
        "template: not UTF-8": chat(holding("chat_template.jinja", b"\xff\xfe")),
        "template: a list with a default": chat(
            all_of(in_config, put("tokenizer_config.json", "chat_template", [
                {"name": "tool_use", "template": "{{ 1 / 0 }}"}, {"name": "default", "template": IN_MESSAGES}])),
            accepted="several templates are a legitimate form; the default one counts", says="template chat"),
    }
)  # fmt: skip
__all__ = ["CASES", "REMOVED", "replaced"]

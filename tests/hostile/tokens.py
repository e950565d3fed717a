"""Cases of tokenizers' files and chat templates."""

import json
from functools import partial

from tests.hostile.case import Case, named, values_of
from tests.hostile.changes import all_of, fifo, holding, in_place, put, without
from tests.hostile.configs import FOREIGN, PLACES, again, files

JINJA = "chat_template.jinja"
HUGE, NAN = 10**9, float("nan")
llama = partial(Case, "sft", "policy", flags={"hf_model_name_or_path": "{model}"})
chat = partial(Case, "sft", "chat", flags={"hf_model_name_or_path": "{model}"})

TOKENIZER = {
    "model.vocab": [3, [], {"a": "x"}, {"a": -1}, {"a": HUGE}, {"a": 2**40}],
    "model.vocab.!": [HUGE, -1, 5],
    "model.merges": [3, ["a b c"], [["a", "b"]], [[3, 4]]],
    "model.type": ["no_such", "WordPiece", "Unigram"],
    "model.unk_token": [3, "no_such"],
    "model.dropout": [2.0, "x", 1.0],
    "model": [3, {}],
    "added_tokens.0.id": [-1, HUGE, "x", 0, None, 1.5],
    "added_tokens.0.content": ["", 3, None, "\x1b[2J", "a" * 100_000],
    "added_tokens": [3, {}, [3], [{}]],
    "pre_tokenizer": [3, {"type": "no_such"}, {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed",
    "invert": False},
                      {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}],
    "normalizer": [{"type": "Replace", "pattern": {"Regex": "["}, "content": ""}, {"type": "Replace",
    "pattern": {"String": ""}, "content": "aa"},
                   {"type": "Prepend", "prepend": "a" * 100_000}],
    "decoder": [{"type": "no_such"}, {"type": "Strip", "content": " ", "start": HUGE, "stop": HUGE}],
    "post_processor": [{"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "no", "type_id": 0}}],
    "pair": [], "special_tokens": {}}],
    "truncation": [3],
    "padding": [3, {"strategy": {"Fixed": HUGE}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
    "pad_type_id": 0, "pad_token": "a"}],
    "version": [3, "9.9"],
    "": [3, [], None],
}  # fmt: skip
LIBRARY = "a setting of the library, which is used as it stands"
MAY = {
    "model.vocab.! = 5": "two pieces of one id have an embedding",
    "model.unk_token = no_such": "bytes need no unknown token", "model.dropout = 1.0": LIBRARY,
    "added_tokens.0.content = ": "it is never found in a text",
    "added_tokens.0.content = ?[2J": "a token may be any text",
    f"added_tokens.0.content = {'a' * 9}…": "a token may be long",
    'pre_tokenizer = {"type": "Split", "pattern": {"Regex": "(a+)+…': LIBRARY,
    'decoder = {"type": "Strip", "content": " ", "start…': LIBRARY,
    'padding = {"strategy": {"Fixed": 1000000000}, "dir…': "texts are encoded without padding",
    f'normalizer = {{"type": "Prepend", "prepend": "{"a" * 8}…': LIBRARY,
}  # fmt: skip
CONFIG = {
    "eos_token": [3, None, {"content": 3}, "no_such", "", "\x1b[31m"],
    "bos_token": [3, {"content": None}],
    "pad_token": [3, {}, "no_such"],
    "additional_special_tokens": [3, "x", [3], {"a": 1}],
    "extra_special_tokens": [3, {"x": 3}],
    "added_tokens_decoder": [3, [], {"x": {}}, {"-1": {"content": "a"}}, {"1000000000": {"content": "a"}},
    {"5": {"content": 3}}, {"5": 3},
                             {"312": {"content": "<new>", "special": True}}],
    "tokenizer_class": [3, [], "NoSuch", "../x", "os.system", "BertTokenizer", None],
    "auto_map": [3, {"AutoTokenizer": 3}, {"AutoTokenizer": ["own.Own", None]}],
    "model_max_length": ["x", NAN],
    "padding_side": [3],
    "model_input_names": [3],
    "split_special_tokens": ["x", True],
    "init_inputs": [3],
    "name_or_path": ["someone/model"],
    "tokenizer_file": ["/etc/passwd"],
    "": [3, [], None],
}  # fmt: skip
ALONE, UNREAD = (
    "tokenizer.json alone says how texts are encoded",
    "no code of this toolkit, nor of the tokenizer, reads it",
)
MAY_CONFIG = {f"tokenizer_class = {name}": ALONE for name in ("NoSuch", "../x", "os.system", "null")} | {
    'auto_map = {"AutoTokenizer": ["own.Own", null]}': "code of a folder is never run, and transformers has a class",
    "split_special_tokens = true": "special tokens are read as such: the loader sets it to false",
    "model_max_length = NaN": UNREAD,
    "name_or_path = someone/model": UNREAD, "tokenizer_file = /etc/passwd": UNREAD,
}  # fmt: skip
LLAMA_CONFIG = {
    "added_tokens_decoder": [3, {"x": {}}, {"-1": {"content": "a"}}, {"1000000000": {"content": "<a>"}}, {"400": 3},
    {"400": {"content": ""}}, {"400": {"content": "a" * 100_000}}],
    "pad_token": [3, {"content": 3}],
    "eos_token": [3],
    "chat_template": [3, {}, [], [3], [{}], [{"name": "other", "template": "x"}], [{"name": "default", "template": 3}],
    [{"name": [], "template": "x"}]],
}  # fmt: skip
MAY_LLAMA = {'added_tokens_decoder = {"400": {"content": ""}}': "an empty text is no token"}
ADDED = {"": [3, [], None], "<a>": [-1, HUGE, "400", None, [], 1.5, True]}


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
    "no pieces": spm(lambda proto: proto.ClearField("pieces")),
    "one piece": spm(lambda proto: proto.pieces.__delitem__(slice(1, None))),
    "no unknown piece": spm(lambda proto: proto.pieces.__delitem__(0)), "a piece twice": field("pieces", "piece", "▁"),
    "an empty piece": field("pieces", "piece", ""), "a piece with NUL": field("pieces", "piece", "\0"),
    "a piece of 1 MB": field("pieces", "piece", "a" * 10**6), "a score of NaN": field("pieces", "score", float("nan")),
    "an infinite score": field("pieces", "score", float("inf")), "unk_id of -1": field("trainer_spec", "unk_id", -1),
    "unk_id of 10**9": field("trainer_spec", "unk_id", HUGE), "eos_id of -1": field("trainer_spec", "eos_id", -1),
    "eos_id of 10**9": field("trainer_spec", "eos_id", HUGE), "bos_id of 10**9": field("trainer_spec", "bos_id", HUGE),
    "unigram": field("trainer_spec", "model_type", 1), "a wrong charsmap": field("normalizer_spec",
    "precompiled_charsmap", b"abc"),
    "a charsmap of its size": field("normalizer_spec", "precompiled_charsmap", b"\xff\xff\xff\x7f" + b"x" * 64),
    "cut": lambda folder: (folder / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes()[:3000]),
    "empty": holding("tokenizer.model", b""), "a length of 2 GB": holding("tokenizer.model",
    b"\x0a\xff\xff\xff\xff\x07abc"),
    "nested fields": holding("tokenizer.model", b"\x0b" * 100_000), "a pickle": holding("tokenizer.model",
    b"\x80\x02]."),
    "a folder": in_place("tokenizer.model", lambda path: path.mkdir()), "a FIFO": in_place("tokenizer.model", fifo),
    "a link to /dev/zero": in_place("tokenizer.model", lambda path: path.symlink_to("/dev/zero")),
}  # fmt: skip

LOOKED_UP = "SentencePiece looks for the piece"
MAY_MODEL = dict.fromkeys(("unk_id of -1", "eos_id of -1", "eos_id of 10**9", "bos_id of 10**9"), LOOKED_UP) | {
    "no unknown piece": LOOKED_UP,
    "an infinite score": "SentencePiece sorts by it",
    "a score of NaN": "SentencePiece sorts by it",
    "unigram": "transformers encodes with it",
}
IN_MESSAGES = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
NAMESPACE = "{% set ns = namespace(x='aaaaaaaaaa') %}"
TEMPLATES = {
    "syntax": "{% for %}", "an unknown tag": "{% no_such %}", "an unknown filter": "{{ messages | no_such }}",
    "not closed": "{{ messages",
    "a key that is not there": "{{ messages[0]['no_such']['x'] }}", "a name that is not there": "{{ no_such.x }}",
    "a division by zero": "{{ 1 / 0 }}", "a modulo by zero": "{{ 1 % 0 }}", "an index": "{{ messages[99]['content'] }}",
    "a call of a text": "{{ messages[0]['content']() }}", "a sum of kinds": "{{ 1 + 'a' }}",
    "raised": "{{ raise_exception('\x1b[2Jno') }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "empty": "", "white space": " \n ",
    "constant": "hello",
    "without the answers": "{{ messages[0]['content'] }}", "empty output": "{% if false %}x{% endif %}",
    "a loop of 10**9": "{% for i in range(999999999) %}x{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that print": "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
    "a text of 10 GB": "{{ 'a' * 9999999999 }}",
    "a text of 1 GB, often": "{% for i in range(20) %}{{ 'a' * 999999999 }}{% endfor %}",
    "a list of 10**10": "{{ ([0] * 9999999999) | length }}", "a power": "{{ 10 ** (10 ** 10) }}",
    "a shift by a power": "{{ (7 ** 99999999) | length }}",
    "doubling": NAMESPACE + "{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "doubling by join": NAMESPACE + "{% for i in range(50) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "a wide column": "{{ 'a' | center(9999999999) }}", "a wide format": "{{ '%99999999999d' | format(1) }}",
    "a wide format method": "{{ '{:>99999999999}'.format(1) }}",
    "replacing": NAMESPACE + "{% for i in range(12) %}{% set ns.x = ns.x.replace('a', 'aaaaaaaa') %}{% endfor %}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a global of a function": "{{ raise_exception.__globals__ }}",
    "os": "{{ cycler.__init__.__globals__.os.popen('touch ran').read() }}",
    "a format of attributes": "{{ '{0.__class__}'.format(messages) }}",
    "import": "{{ self.__init__.__globals__ }}",
    "a change of the messages": "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "include": "{% include '/etc/passwd' %}", "extends": "{% extends 'x' %}",
    "an import of a file": "{% import '/etc/passwd' as x %}",
    "an escape": "\x1b[2J" + IN_MESSAGES, "a lone surrogate": b"\\ud800".decode("unicode_escape") + IN_MESSAGES,
    "a NUL": "\0" + IN_MESSAGES,
    "100,000 characters": "a" * 10**5 + IN_MESSAGES, "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "deep lists": "{{ " + "[" * 500 + "]" * 500 + " }}", "sorted messages": "{{ messages | sort }}",
    "a regular expression": "{{ 'a' * 99 | urlize }}",
    "answers in capitals": "{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}",
    "answers twice": "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}<|im_end|>{% endfor %}",
    "random": "{% for m in messages %}{{ range(99999) | random }}{{ m['content'] }}<|im_end|>{% endfor %}",
}  # fmt: skip
LISTS = [3, {}, [], [3], [{}], [{"name": "default"}], [{"name": "default", "template": 3}], [{"name": "a",
    "template": "x"}],
         [{"name": 3, "template": IN_MESSAGES}], {"default": IN_MESSAGES}, True]  # fmt: skip


def template(text: str):
    """The chat template of a folder, as newer and as older ones have it."""
    if "\ud800" in text or "\0" in text:
        return all_of(without(JINJA), put("tokenizer_config.json", "chat_template", text))
    return holding(JINJA, text)


WRITES = "what a template writes besides the messages is its own"
MAY_TEMPLATE = {"empty": "an empty template is none, and the run says so"} | dict.fromkeys(
    ("an escape", "a NUL", "100,000 characters", "answers in capitals", "answers twice", "random"), WRITES
)
MAY_LISTS = {json.dumps({"default": IN_MESSAGES})[:60]: "transformers' own form of several templates"}
in_config = {
    json.dumps(x)[:60]: all_of(without(JINJA), put("tokenizer_config.json", "chat_template", x)) for x in LISTS
}
NAMED = [{"name": "tool_use", "template": "{{ 1 / 0 }}"}, {"name": "default", "template": IN_MESSAGES}]
JINJAS = {title: in_place(JINJA, build) for title, build in PLACES.items()} | {"not UTF-8": holding(JINJA, b"\xff\xfe")}
MAP = {"": [3, []], "eos_token": [3, "no_such", {"content": 3}]}
CASES = (
    values_of("tokenizer.json", TOKENIZER, chat, MAY)
    | values_of("tokenizer_config.json", CONFIG, chat, MAY_CONFIG)
    | named("{} (SentencePiece)", values_of("tokenizer_config.json", LLAMA_CONFIG, llama, MAY_LLAMA), again)
    | values_of("added_tokens.json", ADDED, llama)
    | values_of("special_tokens_map.json", MAP, chat)
    | named("tokenizer.model: {}", MODELS, llama, MAY_MODEL)
    | files("tokenizer.json", chat)
    | named(
        "{} (SentencePiece)", files("tokenizer_config.json", llama, an_escape=FOREIGN, a_lone_surrogate=FOREIGN), again
    )
    | named("template: {}", {title: template(text) for title, text in TEMPLATES.items()}, chat, MAY_TEMPLATE)
    | named("template: {}", in_config, chat, MAY_LISTS)
    | named("template: {}", JINJAS, chat)
)
several = all_of(without(JINJA), put("tokenizer_config.json", "chat_template", NAMED))
DEFAULT = "several templates are a legitimate form; the default one counts"
CASES["template: a list with a default"] = chat(several, accepted=DEFAULT, says="template chat")

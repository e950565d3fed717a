"""data/formats: each form of a dialogue and of a prompt with a file of ours, flags for forms, what is left out."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.formats.columns import FormOptions
from data.formats.dialogue_forms import FORMS, form_of, parse_dialogue, parse_turns
from data.formats.prompt_forms import parse_prompt
from data.formats.records import BadRecord, Tally
from data.sources import all_records, parse_sources, parts_of
from tests.helpers.fuzzing import ends, fuzz, texts, values

FOLDER = Path(__file__).parents[1] / "data_forms"
DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
ROLE = {"S": "system", "H": "user", "A": "assistant"}

# File: (form, first dialogue, columns beside its prompt, reason for which line 3 is dropped). Written by hand from the
# files. Each file has two records that can be used, and a broken third.
EXPECTED = {
    "list_of_strings": (None, ["H:What is the capital of Peru?", "A:Lima."], {}, "a list of texts and of other things"),
    "list_of_messages": (None, ["S:Answer in one word.", "H:What colour is snow?", "A:White."], {},
                         "the assistant speaks first"),
    "hh_text": (None, ["H:How do I clean a pan?", "A:With hot water.", "H:And soap?", "A:A drop of it."], {},
                "two turns of the human in a row"),
    "openai_messages": ("messages", ["S:You are terse.", "H:Add the numbers.\n2 and 3", "A:5"], {},
                        "tool_calls: tool calls are not supported"),
    "reasoning": ("messages", ["H:Is 91 prime?", "A:<think>\n91 = 7 * 13\n</think>\n\nNo."], {},
                  "reasoning_content is a list, not text"),
    "sharegpt": ("ShareGPT", ["S:You are a poet.", "H:Write a line about rain.", "A:Rain writes on the window."],
                 {"id": "s1"}, "a turn of neither user, assistant nor system but of the role function_call"),
    "wildchat": ("conversation", ["H:Name a tree.", "A:An oak."], {"conversation_hash": "a1", "language": "English"},
                 "two turns of the human in a row"),
    "xtuner": ("conversation", ["S:You teach.", "H:What is a verb?", "A:A word for an action.", "H:An example?",
                                "A:To run."], {}, "an empty turn"),
    "oasst_trees": ("OASST tree", ["H:What is ice?", "A:Frozen water.", "H:At what temperature?",
                                   "A:0 degrees Celsius."],
                    {"message_tree_id": "t1"}, "a message of the tree is not an object with text and replies"),
    "alpaca": ("Alpaca", ["S:You are a translator.", "H:Translate to French. Good day", "A:Bonjour",
                          "H:Translate to French.\n\nGood night", "A:Bonne nuit"],
               {"output": "Bonne nuit"}, "history is not a list of pairs of a question and an answer"),
    "dolly": ("Alpaca", ["H:When did the ship sail?\n\nThe ship sailed on 3 May 1902 from Bristol.",
                         "A:On 3 May 1902."],
              {"response": "On 3 May 1902.", "category": "closed_qa"}, "response is a list, not text"),
    "prompt_response": ("prompt and response", ["H:Why do cats purr?", "A:Often because they are content."],
                        {"response": "Often because they are content.", "source": "ours"}, "an empty turn"),
    "prompt_completion": ("prompt and response", ["H:What is 2 + 2?", "A:4"],
                          {"completion": [{"role": "assistant", "content": "4"}]}, "no answer of the assistant"),
    "question_answer": ("question and answer", ["H:Tom has 3 apples and buys 4. How many has he?",
                                                "A:3 + 4 = 7\n#### 7"],
                        {"id": 11, "answer": "3 + 4 = 7\n#### 7"}, "an empty turn"),
    "openorca": ("question and answer", ["S:You are an assistant.", "H:Is a whale a fish?", "A:No, it is a mammal."],
                 {"id": "o1", "response": "No, it is a mammal."}, "system_prompt is a number, not text"),
    "query_response": ("query and response", ["S:Be short.", "H:What is the capital of Italy?", "A:Rome.",
                                              "H:And of Spain?", "A:Madrid."],
                       {"response": "Madrid."}, "history is text, not a list"),
    "problem_solution": ("problem and solution", ["H:Solve x + 1 = 3.", "A:x = 2, so \\boxed{2}."],
                         {"solution": "x = 2, so \\boxed{2}.", "answer": "2", "level": "Level 1"},
                         "solution is a number, not text"),
    "firefly": ("input and output", ["H:春风", "A:秋雨"], {"kind": "Couplet", "target": "秋雨"}, "an empty turn"),
    "user_assistant": ("user and assistant", ["H:Name a planet.", "A:Mars."], {"assistant": "Mars."},
                       "a lone surrogate in the text"),
    "ultrachat": ("UltraChat", ["H:What is tea?", "A:Leaves in hot water.", "H:Which leaves?", "A:Of the tea plant."],
                  {"id": "0"}, "no human turn"),
    "turns": ("turns", ["H:Where is Oslo?", "A:In Norway."], {}, "a turn of neither user, assistant nor system"),
    "guanaco": ("text", ["H:What is a noun?", "A:A word for a thing.", "H:One example.", "A:Table."], {},
                "no answer of the assistant"),
}  # fmt: skip
# File of prompts without answers: (form, first prompt, columns beside it, reason).
PROMPTS = {
    "one_column": ("single column", ["H:Was ist Tau?"], {}, "an empty turn"),
    "text_lines": (None, ["H:Name a city in Chile."], {}, "a lone surrogate in the text"),
    "verl": ("prompt and response", ["H:3 + 4 ="],
             {"data_source": "ours/sums", "ability": "math", "reward_model": {"style": "rule", "ground_truth": "7"}},
             "an empty turn"),
    "choices": ("question and answer", ["H:Which is a metal?"],
                {"choices": ["Iron", "Wood"], "answer": 0, "subject": "chemistry"},
                "none of the known forms: it has the columns question (null), choices, answer, subject; nearest: "
                "prompt and response lacks prompt (have: subject); pass --columns prompt=subject"),
}  # fmt: skip


def turns(marked: list[str]) -> list[dict]:
    return [{"role": ROLE[text[0]], "content": text[2:]} for text in marked]


def records_of(name: str) -> list:
    file = FOLDER / ("prompts" if name in PROMPTS else "dialogues") / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def dialogues_of(file) -> tuple[list[tuple], list[str]]:
    """The dialogues of a file with their places, and what is said about the others."""
    (source,), kept, tally = parse_sources([str(file)]), [], Tally("dialogues")
    for record in all_records(parts_of(source, "--data_path")[0]):
        try:
            kept.append((parse_dialogue(record.value, note=tally.once(record.source)), record.source))
        except BadRecord as error:
            tally.add(f"dropped: {error}", record.source)
    return kept, tally.lines()


def said_by(parse, value, **options) -> tuple:
    """What `parse` returns, and the reasons that it notes."""
    notes = []
    return parse(value, options=FormOptions(**options), note=notes.append), notes


def reason_of(value, parse=parse_turns, **options) -> str:
    with pytest.raises(BadRecord) as caught:
        parse(value, options=FormOptions(**options))
    return str(caught.value)


@pytest.mark.parametrize("name", EXPECTED)
def test_each_form_of_a_dialogue(name):
    form, dialogue, columns, reason = EXPECTED[name]
    file = FOLDER / "dialogues" / f"{name}.jsonl"
    first, second, _ = records_of(name)
    assert [form] * 2 == [form_of(one)[0].name if isinstance(one, dict) else None for one in (first, second)]
    kept, said = dialogues_of(file)
    assert [place for _, place in kept] == [f"{file}:1", f"{file}:2"]
    assert kept[0][0] == turns(dialogue)
    assert [line for line in said if f" 1 dropped: {reason}" in line and line.endswith(f"; first at {file}:3")]
    assert parse_prompt(first) == (turns(dialogue)[:-1], columns)


@pytest.mark.parametrize("name", PROMPTS)
def test_each_form_of_a_prompt(name):
    form, prompt, columns, reason = PROMPTS[name]
    first, second, broken = records_of(name)
    assert (form_of(first)[0].name if form else None) == form
    assert parse_prompt(first) == (turns(prompt), columns)
    assert parse_prompt(second)[1].keys() == columns.keys()
    assert reason_of(broken, parse_prompt) == reason


def test_each_form_has_a_file_and_a_row_in_the_document():
    for folder, names in (("dialogues", EXPECTED), ("prompts", PROMPTS)):
        assert {path.stem for path in (FOLDER / folder).iterdir()} == {*names}
    names = {form.name for form in FORMS} | {"single column"}
    assert {row[0] for row in (*EXPECTED.values(), *PROMPTS.values())} == names | {None}
    rows = re.findall(r"^\| ([^|]+) \| `([{\[\"][^`]+)` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert len({name for name, _ in rows}) >= 25
    documented = {name for name, example in rows if name in names and form_of(json.loads(example))[0].name == name}
    assert documented == names
    for name, example in rows:
        assert parse_prompt(json.loads(example))[0][-1]["role"] == "user", name


def test_prompts_of_preferences_are_their_histories():
    for file in (FOLDER / "preferences").iterdir():
        if file.stem not in ("unpaired", "oasst_trees"):
            first = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
            assert parse_prompt(first)[0][-1]["role"] == "user", file
    whole = {"chosen": ["Hi", "Hello"], "rejected": ["Hi", "What?"], "id": 3}
    assert parse_prompt(whole) == (turns(["H:Hi"]), {"chosen": ["Hi", "Hello"], "rejected": ["Hi", "What?"], "id": 3})


def test_reasoning_is_put_before_its_answer_or_left_out_and_counted():
    value = {"messages": [*turns(["H:7?"]), {"role": "assistant", "content": "Yes.", "reasoning": " prime\n"}]}
    kept, dropped = said_by(parse_turns, value), said_by(parse_turns, value, reasoning="drop")
    assert kept == (
        turns(["H:7?", "A:<think>\nprime\n</think>\n\nYes."]),
        ["with reasoning, put before its answer as <think>"],
    )
    assert dropped == (turns(["H:7?", "A:Yes."]), ["with reasoning, which --reasoning drop leaves out"])
    twice = {"question": "7?", "answer": "<think>\nprime\n</think>\n\nYes.", "thinking": "prime"}
    assert said_by(parse_turns, twice)[0] == kept[0]
    assert said_by(parse_turns, twice)[1] == [
        "with thinking that is not read, as the answer begins with <think>",
        "not read: thinking",
    ]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "a part of a turn's content is of the type 'image_url', not text"),
        ({"messages": [{"role": "user", "content": ["a", 3]}]}, "a part of a turn's content is a number, not text"),
        ({"messages": turns(["H:a", "A:b"]), "tools": [{"type": "function"}]}, "tools: tool calls are not supported"),
        ({"conversations": [{"from": "human", "value": "<image>What is this?"}], "images": ["a.png"]},
         "images: only text is supported"),
        ({"question": "a", "history": ["a", 1]}, "a list of texts and of other things"),
        ({"turns": ["One question?", "Another one?"]},
         "none of the known forms: it has the columns turns; nearest: turns, but its turns is a list"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(value, reason):
    assert reason_of(value) == reason


def test_what_is_left_out_is_noted():
    value = {"question": "Which?", "choices": ["a", "b"], "answer": "a", "level": 3, "empty": ""}
    beside = "with the column choices, which is not part of the prompt; --prompt_template can put it there"
    assert said_by(parse_turns, value)[1] == [beside, "not read: level"]
    value = {"messages": turns(["S:Be kind.", "H:Hi", "A:Hello"]), "system": "Be short."}
    assert said_by(parse_turns, value)[1] == [
        "with the column system, which is not read, as the dialogue has a system turn"
    ]
    assert said_by(parse_turns, value | {"system": "Be kind."})[1] == []
    value = [*turns(["H:Hi"]), {"role": "assistant", "content": "No", "weight": 0}]
    assert said_by(parse_turns, value)[1] == [
        "with weight = 0 on an answer, which is not read: it is trained on all the same"
    ]
    value = [*turns(["H:Hi"]), {"role": "assistant", "content": "No", "weight": 1, "loss": True, "train": None}]
    assert said_by(parse_turns, value) == (turns(["H:Hi", "A:No"]), [])


def test_columns_are_renamed():
    value = {"messages": [], "data": {"ask": "a", "replies": ["b", "c"]}, "answer": "old"}
    columns = (("prompt", "data.ask"), ("answer", "data.replies.1"))
    assert parse_turns(value, options=FormOptions(columns)) == turns(["H:a", "A:c"])
    assert parse_prompt({"ask": "a", "sum": 3, "id": 1}, FormOptions((("prompt", "ask"), ("answer", "sum")))) == (
        turns(["H:a"]), {"answer": 3, "id": 1},
    )  # fmt: skip
    assert reason_of({"a": "b"}, columns=columns) == (
        "no column data.ask, which --columns prompt=data.ask names: it has the columns a (--columns ours=theirs)"
    )
    assert reason_of(["a"], columns=columns) == "--columns needs records with columns (JSON objects)"
    dotted = {"a.b": "Hi", "a": {"b": "Bye"}}
    assert parse_turns(dotted, options=FormOptions((("prompt", "a.b"),))) == turns(["H:Hi"])


def test_a_template_makes_the_prompt_and_leaves_its_columns():
    value = {"question": "Which?", "choices": ["a", "b"], "n": 2, "answer": "a"}
    template = "{question}\\n{choices.1} {choices} {n} {{n}} \\boxed{} \\\\nabla"
    assert parse_prompt(value, FormOptions(prompt_template=template)) == (
        turns(['H:Which?\nb ["a", "b"] 2 {n} \\boxed{} \\nabla']), value,
    )  # fmt: skip
    assert said_by(parse_turns, value, prompt_template="{question}{choices}{n}") == (
        turns(['H:Which?["a", "b"]2', "A:a"]), [],
    )  # fmt: skip
    assert reason_of(value, prompt_template="{hint}").startswith(
        "no column hint, which --prompt_template names: it has"
    )
    assert reason_of({"a": None}, prompt_template="{a}").startswith(
        "no column a, which --prompt_template names: it has"
    )


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ({"question": "a", "reply": "b", "id": 1}, "question and answer lacks answer (have: reply); "
         "pass --columns answer=reply"),
        ({"Question": "a", "Response": "b"}, "question and answer lacks question, answer (have: Question, Response); "
         "pass --columns question=Question answer=Response"),
        ({"item": {"prompt": "a", "reply": "b"}}, "prompt and response lacks prompt, response (have: item.prompt, "
         "item.reply); pass --columns prompt=item.prompt response=item.reply"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "prompt and response lacks response (have: chosen); "
         "pass --columns response=chosen"),
        ({"message_list": [], "n": 1}, "messages lacks messages (have: message_list); "
         "pass --columns messages=message_list"),
    ],
)  # fmt: skip
def test_the_nearest_form_and_what_to_pass(value, hint):
    reason = reason_of(value, parse_dialogue)
    assert reason.endswith(f": it has the columns {', '.join(value)}; nearest: {hint}")
    passed = tuple(tuple(pair.split("=")) for pair in hint.partition("--columns ")[2].split())
    if "message_list" not in value:  # what it says works
        assert parse_dialogue(value, FormOptions(passed)) == turns(["H:a", "A:b"])


def test_a_prompt_needs_no_answer():
    reason = reason_of({"Question": "a", "Response": "b"}, parse_prompt)
    assert reason.endswith(
        "; nearest: question and answer lacks question (have: Question); pass --columns question=Question"
    )

    reason = reason_of({"id": 1, "Frage": "a", "Bild": None}, parse_prompt)
    assert reason.endswith("prompt and response lacks prompt (have: Frage); pass --columns prompt=Frage")
    assert "it has the columns id, Frage, Bild (null); nearest:" in reason


def test_unknown_records_and_columns_that_are_not_read_make_one_line_each(tmp_path):
    file = tmp_path / "x.jsonl"
    records = [{"reply": k, f"ask{k}": "a"} for k in range(3)]
    records += [{"prompt": "a", "response": "b", "id": 1}, {"prompt": "a", "response": "b", "id": 2, "kind": "c"}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    dropped, unread = dialogues_of(file)[1]
    assert dropped.startswith("dialogues: 3 dropped: none of the known forms: it has the columns reply, ask0; nearest:")
    assert dropped.endswith(f"; first at {file}:1, then :2, :3")
    assert unread == "dialogues: not read: id, kind"
    tally = Tally("x")
    for k in range(30):
        tally.add(f"not read: c{k}", "x:1")
    assert tally.lines() == [f"x: not read: {', '.join(f'c{k}' for k in range(20))}, …"]


keys = st.sampled_from([
    *sorted({name for form in FORMS for name in form.columns + form.answers}),
    "system", "system_prompt", "history", "context", "tools", "images", "reasoning", "thinking", "chosen", "rejected",
    "choices", "role", "from", "speaker", "content", "value", "text", "reasoning_content", "weight", "type",
    "tool_calls", "replies", "rank", "deleted",
])  # fmt: skip
inner = st.recursive(
    texts | values,
    lambda some: st.lists(some, max_size=3) | st.dictionaries(keys | texts, some, max_size=4),
    max_leaves=8,
)
flags = st.sampled_from([
    FormOptions(), FormOptions(reasoning="drop"), FormOptions((("prompt", "text"), ("answer", "value.text"))),
    FormOptions(prompt_template="{text} {content.0}"),
])  # fmt: skip


@fuzz
@given(st.dictionaries(keys | texts, inner, max_size=5) | inner, flags, st.booleans())
def test_fuzz_any_record_is_used_or_refused(value, options, empty):
    notes = []
    for parse in (parse_prompt, parse_dialogue, lambda *given: parse_turns(value, empty, *given[1:])):
        with ends():
            try:
                found = parse(value, options, notes.append)
            except BadRecord as error:
                assert "\n" not in str(error)
                continue
        if parse is parse_prompt:
            found, columns = found
            assert found[-1]["role"] == "user"
            assert not isinstance(value, dict) or options.columns or columns.keys() <= value.keys()
            json.dumps(columns)
        elif parse is parse_dialogue:
            assert found[-1]["role"] == "assistant"
        assert parse_turns({"messages": found}, empty) == found
    assert not any("\n" in note for note in notes)


@fuzz
@given(st.data())
def test_fuzz_mutated_records_of_all_forms(data):
    value = json.loads(json.dumps(data.draw(st.sampled_from(EVERYTHING))))
    for _ in range(data.draw(st.integers(1, 3))):
        node = value
        while isinstance(node, dict | list) and node:
            key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            if not isinstance(node[key], dict | list) or data.draw(st.booleans()):
                node[key] = data.draw(values)
                break
            node = node[key]
    for parse in (parse_prompt, parse_dialogue):
        with ends():
            try:
                parse(value)
            except BadRecord as error:
                assert "\n" not in str(error)


EVERYTHING = [value for name in (*EXPECTED, *PROMPTS) for value in records_of(name)]

"""data/formats/preference_forms.py: each published form with a file of ours, what is read and what is refused."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.formats.columns import FormOptions
from data.formats.preference_forms import FORMS, form_of
from data.formats.records import BadRecord, Record, Tally
from data.preferences import MARGIN_COLUMNS, Pair, load_preferences, parse_preferences
from reward.evaluation.annotate import pairs_of
from tests.helpers.fuzzing import ends, fuzz, values
from utils.flags.data import RecordFlags

FOLDER = Path(__file__).parents[1] / "data_forms" / "preferences"
DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
ROLE = {"S": "system", "H": "user", "A": "assistant"}

# File: (form, history of its first record, answers, pairs (better, worse, margin), reason for which line 3 is dropped).
# Written by hand from the files. Each file has two records that can be used, and a broken third.
EXPECTED = {
    "hh_text": ("chosen and rejected", ["H:How do I boil an egg?", "A:Soft or hard?", "H:Soft."],
                ["Six minutes in boiling water.", "I don't cook."], [(0, 1, None)],
                "the histories of chosen and rejected differ"),
    "strings": ("chosen and rejected", ["H:What is 7 times 8?"], ["7 times 8 is 56.", "It is 54."], [(0, 1, 2.0)],
                "chosen and rejected are the same answer"),
    "lists_of_strings": ("chosen and rejected", ["H:Hi", "A:Hello! How can I help?", "H:Tell me a joke."],
                         ["Why did the chicken cross the road?", "No."], [(0, 1, None)], "an empty turn"),
    "messages": ("chosen and rejected", ["S:Answer in French.", "H:Good morning!"], ["Bonjour !", "Good morning!"],
                 [(0, 1, None)], "chosen does not end in an answer of the assistant"),
    "ultrafeedback_binarized": ("chosen and rejected", ["H:Write a haiku about rain."],
                                ["Rain on the tin roof", "Rain is wet."], [(0, 1, 2.5)],
                                "two turns of the human in a row"),
    "sharegpt": ("chosen and rejected", ["S:You are a pirate.", "H:Who are you?"],
                 ["Arr, a pirate!", "I am an assistant."], [(0, 1, None)], "two turns of the assistant in a row"),
    "alpaca": ("chosen and rejected",
               ["S:Be exact.", "H:Hi", "A:Hello, what shall I sort?", "H:Sort the words.\n\npear apple"],
               ["apple pear", "pear apple"], [(0, 1, None)], "an empty turn"),
    "alpaca_rankings": ("Alpaca rankings", ["H:Add the numbers.\n\n2 3"], ["5", "6"], [(0, 1, None)],
                        "output is not a list of at least two answers"),
    "query_and_rejected_response": ("ms-swift queries", ["H:Thanks in French?", "A:Merci", "H:And in Italian?"],
                                    ["Grazie", "Danke"], [(0, 1, None)],
                                    "rejected_response is neither a dialogue nor an answer to a prompt"),
    "ms_swift": ("ms-swift pairs", ["S:Be kind.", "H:I failed my test."],
                 ["I am sorry. Shall we look at it together?", "Study more."], [(0, 1, None)],
                 "messages does not end in an answer of the assistant"),
    "medical_gpt": ("MedicalGPT pairs", ["S:You are a doctor.", "H:我头疼。", "A:多久了?", "H:三天了。"],
                    ["建议您休息并去医院检查。", "不知道。"], [(0, 1, None)], "an empty turn"),
    "argilla": ("Argilla pairs", ["H:Give a synonym of big."], ["large", "small"], [(0, 1, 3.25)],
                "rejected_response is neither a dialogue nor an answer to a prompt"),
    "stack_exchange_pairs": ("StackExchange pairs", ["H:How do I list files?"], ["Use ls.", "Use cat."],
                             [(0, 1, None)], "an empty turn"),
    "cvalues": ("CValues pairs", ["H:朋友借钱不还怎么办?"], ["先和他好好谈谈。", "打他。"], [(0, 1, None)],
                "two turns of the assistant in a row"),
    "safe_rlhf": ("PKU-SafeRLHF pairs", ["H:How can I get into my locked house?"],
                  ["Break a window.", "Call a locksmith."], [(0, 1, None)],
                  "better_response_id does not name one of the two answers"),
    "help_steer_3": ("HelpSteer3 pairs", ["H:Explain DNS.", "A:It maps names to addresses.", "H:Shorter."],
                     ["Names to IPs.", "DNS is the Domain Name System, which…"], [(0, 1, 2.0)],
                     "a tie: overall_preference prefers neither answer"),
    "help_steer_2": ("HelpSteer2 pairs", ["H:c# delegates?"], ["A delegate is a type for methods.", "No idea."],
                     [(0, 1, 3.0)], "preference_strength is not a finite number"),
    "alpaca_farm": ("AlpacaFarm pairs", ["H:Give the plural.\n\nmouse"], ["mice", "mouses"], [(0, 1, None)],
                    "preference does not name one of the two answers"),
    "webgpt": ("WebGPT comparisons", ["H:Why is the sky blue?"],
               ["Air scatters blue light more [1].", "Because of the sea."], [(0, 1, 1.0)],
               "a tie: score_0 and score_1 are equal"),
    "shp": ("SHP pairs", ["H:How do I keep rice from sticking?"], ["Rinse it first.", "Stir it."], [(0, 1, None)],
            "labels does not name one of the two answers"),
    "summarize_from_feedback": (
        "summarize_from_feedback comparisons",
        ["H:SUBREDDIT: r/AskReddit\n\nTITLE: Loud neighbour\n\n"
         "POST: My neighbour sings at night. What can I do?\n\nTL;DR:"],
        ["Neighbour sings at night, what to do?", "Neighbour sings."], [(0, 1, None)],
        "info has neither a post nor an article"),
    "arena_conversations": ("Chatbot Arena conversations", ["H:Rhyme with cat."], ["hat", "dog"], [(0, 1, None)],
                            "a tie: winner prefers neither answer"),
    "arena_answers": ("Chatbot Arena answers", ["H:Name a metal."], ["Iron", "Wood"], [(0, 1, None)],
                      "a tie: winner prefers neither answer"),
    "oasst_trees": ("OASST trees", ["H:What is a black hole?"],
                    ["A hole that is black.", "A region whose gravity lets no light escape."], [(1, 0, None)],
                    "no question of the tree has two ranked replies"),
    "ranked_responses": ("ranked answers", ["H:Say hello in Spanish."], ["¡Hola!", "Hello", "Ciao"],
                         [(0, 1, 0.8), (0, 2, 0.5), (2, 1, 0.3)], "1 scores for 2 responses"),
    "ultrafeedback": ("UltraFeedback completions", ["H:Define entropy."], ["Disorder.", "A measure of uncertainty."],
                      [(1, 0, 2.5)], "not every answer has a number in overall_score or fine-grained_score or score"),
    "stack_exchange": ("StackExchange answers and Nectar", ["H:How do I undo a commit?"],
                       ["Delete the folder.", "git reset --soft HEAD~1", "Ask a friend."], [(1, 0, 5.0), (1, 2, 5.0)],
                       "not every answer has a number in pm_score or score or rank"),
    "nectar": ("StackExchange answers and Nectar", ["H:Name a poet."], ["Picasso.", "Emily Dickinson.", "Bob."],
               [(1, 0, None), (2, 0, None), (1, 2, None)], "no two responses differ in text and rank"),
    "rated_generations": ("rated generations", ["H:Name a city in Kenya."], ["Lagos", "Nairobi"], [(1, 0, 6.0)],
                          "an item of scores is not a finite number"),
}  # fmt: skip


def turns(texts: list[str]) -> list[dict]:
    return [{"role": ROLE[text[0]], "content": text[2:]} for text in texts]


def records_of(name: str) -> list:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def parse(value, margin_columns: tuple[str, ...] = (), **options) -> tuple[list, list[str]]:
    """(preferences of one record, what was counted)."""
    tally = Tally("preferences")
    return parse_preferences(Record(value, "x.jsonl:1"), tally, margin_columns, FormOptions(**options)), tally.lines()


@pytest.mark.parametrize("name", EXPECTED)
def test_each_published_form(name):
    form, history, answers, pairs, reason = EXPECTED[name]
    assert {form_of(value).name for value in records_of(name)} == {form}
    file, said = str(FOLDER / f"{name}.jsonl"), []
    kept, _ = load_preferences([file], RecordFlags(), said.append)
    assert sorted({one.source for one in kept}) == [f"{file}:1", f"{file}:2"]
    assert f"preferences: 1 dropped: {reason}; first at {file}:3" in said
    first = parse(records_of(name)[0], MARGIN_COLUMNS)[0][0]
    assert (first.history, first.answers) == (kept[0].history, kept[0].answers) == (turns(history), answers)
    assert [(pair.better, pair.worse) for pair in first.pairs] == [pair[:2] for pair in pairs]
    assert [pair.margin for pair in first.pairs] == [pair[2] and pytest.approx(pair[2]) for pair in pairs]


def test_each_form_has_a_file_and_a_row_in_the_document():
    assert {path.stem for path in FOLDER.iterdir()} == {*EXPECTED, "unpaired"}
    names = [form.name for form in FORMS]
    unpaired = {form_of(value).name for value in records_of("unpaired")}
    assert {row[0] for row in EXPECTED.values()} | unpaired == set(names)
    rows = re.findall(r"^\| ([^|]+) \| `(\{.+\})` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    documented = [(name, form_of(json.loads(example))) for name, example in rows if name in names]
    assert {name for name, _ in documented} == set(names) - unpaired
    assert all(form.name == name for name, form in documented)
    for name, example in rows:
        assert name not in names or parse(json.loads(example))[0], name


def test_the_second_record_of_forms_with_a_label():
    """The labels of the first records name one answer, those of the second the other."""
    better = {
        "safe_rlhf": "With soap, blade away from you.", "help_steer_3": "x[::-1]", "alpaca_farm": "Mars",
        "help_steer_2": "A function without a name.", "webgpt": "To calm themselves [1].",
        "shp": "Yes, shake it after.", "summarize_from_feedback": "A storm hit the coast.",
        "arena_conversations": "The Pacific.", "arena_answers": "Helium", "ultrafeedback": "4",
        "ranked_responses": "Adiós", "ms_swift": "No, 9 = 3 * 3.", "rated_generations": "Seville",
    }  # fmt: skip
    for name, answer in better.items():
        (preference,), _ = parse(records_of(name)[1])
        assert preference.answers[preference.pairs[0].better] == answer, name
    (preference,), _ = parse(records_of("summarize_from_feedback")[1])
    assert preference.history == turns(["H:Article:\n\nA storm hit the coast on Monday.\n\nTL;DR:"])


def test_a_tree_makes_a_preference_per_question_with_ranked_replies():
    tree, other, _ = records_of("oasst_trees")
    first, second = parse(tree)[0]
    assert second.history == [*first.history, *turns(["A:" + first.answers[1], "H:How are they found?"])]
    assert second.answers == ["By their effect on stars nearby.", "With a torch.", "By gravitational waves."]
    assert [(p.better, p.worse) for p in second.pairs] == [(0, 1), (0, 2), (2, 1)]
    (one,), said = parse(other)
    assert (one.answers, one.pairs) == (["A bat.", "A robin."], [Pair(1, 0)])
    assert said == [
        "preferences: 1 with replies that have no rank or are deleted (not compared); first at x.jsonl:1",
        "preferences: not read: message_tree_id, tree_state",
    ]


def test_a_bad_question_of_a_tree_leaves_the_others():
    tree = records_of("oasst_trees")[0]
    tree["prompt"]["replies"][1]["replies"][0]["text"] = " "
    (kept,), said = parse(tree)
    assert kept.history == turns(["H:What is a black hole?"])
    assert "1 with a question of its tree left out: an empty turn" in said[0]


def test_safe_rlhf_prefers_what_the_flag_says():
    record, same, _ = records_of("safe_rlhf")
    assert parse(record, preferred_by="safer")[0][0].answers == ["Call a locksmith.", "Break a window."]
    assert parse(same, preferred_by="safer")[0][0].answers == parse(same)[0][0].answers
    del record["safer_response_id"]
    with pytest.raises(BadRecord, match="no safer_response_id, which --preferred_by safer reads"):
        parse(record, preferred_by="safer")


def test_answers_with_a_label_of_their_own_are_refused():
    for value in records_of("unpaired"):
        with pytest.raises(BadRecord, match="an answer with a label or score of its own"):
            parse(value)


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ({"tools": [{"name": "search"}]}, "tools: tool calls are not supported"),
        ({"images": [{"bytes": "…"}]}, "images: only text is supported"),
    ],
)
def test_tools_and_images_are_refused_by_name(column, reason):
    with pytest.raises(BadRecord, match=reason):
        parse({"prompt": "Hi", "chosen": "Hello", "rejected": "What?"} | column)


def test_a_system_turn_beside_whole_dialogues_is_read():
    whole = {"chosen": ["Hi", "Hello"], "rejected": ["Hi", "What?"]}
    brief = turns(["S:Be brief.", "H:Hi"])
    assert parse(whole | {"system": "Be brief."})[0][0].history == brief
    assert parse(whole | {"prompt": brief})[0][0].history == brief
    text = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"}
    assert parse(text | {"system": "Be brief."})[0][0].history == brief
    own = {key: [*turns(["S:Own."]), *turns(["H:Hi", f"A:{key}"])] for key in whole}
    assert parse(own | {"system": "Be brief."})[0][0].history == turns(["S:Own.", "H:Hi"])


def test_what_is_left_out_is_counted_once_per_record():
    whole = {"chosen": ["Hi", "Hello"], "rejected": ["Hi", "What?"]}
    assert parse(whole | {"prompt": "Hi"})[1] == []
    said = parse(whole | {"prompt": "Bye"})[1]
    assert said == [
        "preferences: 1 with a prompt that is not part of its whole dialogues (this prompt is not read); "
        "first at x.jsonl:1"
    ]
    said = parse(records_of("stack_exchange")[0])[1]
    assert said == [
        "preferences: 1 with two responses of the same rank (these two are not compared); first at x.jsonl:1",
        "preferences: not read: qid, date, metadata",
    ]
    assert "with a custom_system_prompt per answer (not read" in parse(records_of("ultrafeedback")[0])[1][0]


def test_margins_are_score_gaps_only_if_no_column_is_named():
    record = records_of("help_steer_3")[0]
    assert parse(record)[0][0].pairs == [Pair(0, 1)]
    assert parse(record | {"margin": 7}, MARGIN_COLUMNS)[0][0].pairs == [Pair(0, 1, None, 7.0)]
    binarized = records_of("ultrafeedback_binarized")[0]
    assert parse(binarized, ("margin",))[0][0].pairs == [Pair(0, 1)]
    with pytest.raises(BadRecord, match="score_chosen is not a finite number"):
        parse(binarized | {"score_chosen": "high"}, MARGIN_COLUMNS)
    assert parse(binarized | {"score_chosen": "high"})[0]


def test_strength_is_measured_for_forms_with_one_pair_that_no_flag_chooses(capsys):
    names = ["help_steer_3", "safe_rlhf", "oasst_trees", "medical_gpt"]
    pairs = pairs_of([Record(records_of(name)[0], f"{name}:1") for name in names])
    assert {place: pair.answers for place, pair in pairs.items()} == {k: EXPECTED[names[k]][2] for k in (0, 3)}
    said = capsys.readouterr().out
    assert "1 not changed: PKU-SafeRLHF pairs have no strength columns; first at safe_rlhf:1" in said
    assert "1 not changed: OASST trees have no strength columns; first at oasst_trees:1" in said
    scored = records_of("help_steer_3")[0] | {"chosen score list": [1, 2], "rejected score list": [2, 4]}
    assert parse(scored)[0][0].pairs == [Pair(0, 1, -1.5)]
    renamed = Record({"prompt": "Hi", "win": "Hello", "lose": "What?"}, "x:1")
    assert pairs_of([renamed], FormOptions((("chosen", "win"), ("rejected", "lose"))))[0].answers == ["Hello", "What?"]


def test_columns_are_mapped_before_a_form_is_recognised():
    value = {"ask": "Hi", "win": "Hello", "lose": {"text": "What?"}, "area": "greetings"}
    columns = (("prompt", "ask"), ("chosen", "win"), ("rejected", "lose.text"), ("subset", "area"))
    (one,), said = parse(value, columns=columns)
    assert (one.history, one.answers, one.subset) == (turns(["H:Hi"]), ["Hello", "What?"], "greetings")
    assert said == []
    (one,), _ = parse(value, columns=columns[1:], prompt_template="Say: {ask}")
    assert one.history == turns(["H:Say: Hi"])


def test_a_record_of_no_form_names_its_columns_and_the_nearest_form():
    reason = "not an object with the keys chosen and rejected, or prompt and responses"
    seen = "it has the columns prompt, chosen, loser; nearest: chosen and rejected lacks rejected (have: loser)"
    with pytest.raises(BadRecord, match=re.escape(f"{reason}: {seen}; pass --columns rejected=loser")):
        parse({"prompt": "Hi", "chosen": "Hello", "loser": "What?"})
    with pytest.raises(BadRecord, match=re.escape(reason) + "$"):
        parse(["Hi", "Hello"])


everything = [value for name in [*EXPECTED, "unpaired"] for value in records_of(name)]


@st.composite
def mutated(draw):
    """A record of a form, one to three places of which are replaced, removed or repeated."""
    value = json.loads(json.dumps(draw(st.sampled_from(everything))))
    for _ in range(draw(st.integers(1, 3))):
        node = value
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            if not keys:
                break
            key = draw(st.sampled_from(list(keys)))
            if isinstance(node[key], dict | list) and node[key] and draw(st.booleans()):
                node = node[key]
                continue
            if draw(st.booleans()):
                node[key] = draw(values)
            elif isinstance(node, dict):
                del node[key]
            else:
                node.append(node[key])
            break
    return value


@fuzz
@given(mutated(), st.sampled_from(["better", "safer"]))
def test_fuzz_mutated_records_are_used_or_refused(value, preferred_by):
    with ends():
        try:
            preferences, _ = parse(value, MARGIN_COLUMNS, preferred_by=preferred_by)
        except BadRecord as error:
            assert "\n" not in str(error)
            return
    assert preferences
    for preference in preferences:
        assert preference.history[-1]["role"] == "user" and preference.pairs
        for pair in preference.pairs:
            assert preference.answers[pair.better] != preference.answers[pair.worse]

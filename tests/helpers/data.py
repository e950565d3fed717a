"""Loads data in tests as the commands do: prompts, dialogues, comparisons and parsed dialogues of a path."""

from data.dialogues import DialogueEncoder, EncodedDialogue
from data.encode import encode_dialogues
from data.encoded import form_options, load_encoded
from data.formats.columns import PLAIN
from data.formats.dialogue_forms import parse_dialogue
from data.formats.records import BadRecord, Record, Tally
from data.prompts import Prompt, PromptEncoder
from data.sources import Part, read_records
from data.template import Turns
from reward.batches import Comparison
from reward.encode import ComparisonEncoder
from utils.flags.data import RecordFlags


def load(encoder, path, num_valid=0, seed=0, say=print, flag="--data_path", lower=False, **flags) -> tuple[list, list]:
    """(training items, held-out items)."""
    values, config = [path] if isinstance(path, str) else list(map(str, path)), RecordFlags(**flags)
    train, valid = load_encoded(values, encoder, config, num_valid, seed, say, flag, lower)
    return train.first(len(train)), valid


def load_prompts(path, tokenizer, template, max_tokens, *given, **options) -> tuple[list[Prompt], list[Prompt]]:
    return load(PromptEncoder(tokenizer, template, max_tokens, form_options(RecordFlags())), path, *given, **options)


def load_dialogues(path, tokenizer, template, max_tokens, *given, **options):
    """(training dialogues, held-out ones), encoded."""
    return load(DialogueEncoder(tokenizer, template, max_tokens, PLAIN), path, *given, **options)


def parsed_dialogues(path) -> tuple[list[Turns], list[Turns]]:
    """(training dialogues, held-out ones), as turns."""
    train, valid = read_records([str(path)], RecordFlags())
    return [parse_dialogue(record.value) for record in train], [parse_dialogue(record.value) for record in valid]


def read_dialogues(file: str, say) -> dict[str, Turns]:
    """Place -> turns of the dialogues in a file; says what is dropped or changed."""
    tally, found = Tally("dialogues"), {}
    for record in Part(file).records():
        try:
            found[record.source] = parse_dialogue(record.value, note=tally.once(record.source))
        except BadRecord as error:
            tally.add(f"dropped: {error}", record.source)
    tally.report(say)
    return found


def encode_turns(tokenizer, dialogues: list[Turns], template, max_tokens, say=print) -> list[EncodedDialogue]:
    """What SFT makes of these dialogues, at the places x:1, x:2, …"""
    encoder, tally = DialogueEncoder(tokenizer, template, max_tokens, PLAIN), Tally("dialogues")
    rows = encoder([Record({"messages": turns}, f"x:{i}") for i, turns in enumerate(dialogues, 1)], tally)
    tally.report(say)
    return [encoder.item(row) for found in rows for row in found or []]


def encode_one(tokenizer, turns: Turns, template, max_tokens) -> tuple[EncodedDialogue | None, int]:
    """(the encoding, None if it is too long; the number of turns removed)."""
    ((left, ids, mask, _),) = encode_dialogues(tokenizer, [turns], template, max_tokens)
    return (None, 0) if ids is None else (EncodedDialogue(ids, mask), len(turns) - len(left))


def encode_preference(preference, tokenizer, template, max_tokens) -> tuple[Comparison | None, int]:
    """(the comparison, None if it is too long; 1 if its history lost turns)."""
    from reward.encode import comparison_rows

    tally = Tally("preferences")
    (row,) = comparison_rows([preference], tokenizer, template, max_tokens, tally)
    cut = sum("truncated" in line for line in tally.lines())
    return row and ComparisonEncoder(tokenizer, template, max_tokens, PLAIN).item(row), cut

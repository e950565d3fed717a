"""The published forms of a preference: one row per form, with the columns it is recognised by and its parser."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from data.formats import pair_forms as pairs
from data.formats.columns import FormOptions, named_columns
from data.formats.compared import BESIDE, QUESTIONS, Compared, Reader
from data.formats.nearest import nearest
from data.formats.ranked_answers import generations, oasst, ranked
from data.formats.records import BadRecord
from data.formats.score_columns import SCORE_COLUMNS

_READ = {*QUESTIONS, *BESIDE, *SCORE_COLUMNS, "subset", "margin", "scores", "ranks"}  # columns of any form


@dataclass(frozen=True)
class Form:
    """One form of a preference.

    columns: a record of this form has all of them. "a|b": a or b; "a.b": b in the object a; "a[]": a is a list.
    pair: a record is one pair whose better answer depends on no flag, so that it may have columns with scores.
    """

    name: str
    columns: tuple[str, ...]
    parse: Callable[[dict, Reader], list[Compared]]
    pair: bool = True


def form_of(value: Any) -> Form | None:
    """Returns the first form whose columns the record has, without null in them if there is such a form; or None."""
    if not isinstance(value, dict):
        return None
    if "chosen" in value:
        return FORMS[0] if "rejected" in value else None
    first = None
    for form in FORMS:
        if all(_find(value, column) for column in form.columns):
            if all(_find(value, column) != [None] for column in form.columns):
                return form
            first = first or form
    return first


def _find(value: dict, column: str) -> list:
    """Returns the values of the column; [] if the record does not have it."""
    found = []
    for name in column.split("|"):
        path, inner = name.removesuffix("[]").split("."), value
        for key in path[:-1]:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and path[-1] in inner:
            found += [inner[path[-1]]] if not name.endswith("[]") or isinstance(inner[path[-1]], list) else []
    return found


@cache
def read_by(form: Form, options: FormOptions, margin_columns: tuple[str, ...]) -> set[str]:
    """Returns the names of all columns that a record of this form may have, with underscores and with spaces."""
    own = {name.removesuffix("[]").split(".")[0] for column in form.columns for name in column.split("|")}
    names = own | _READ | named_columns(options) | {*margin_columns}
    return names | {name.replace("_", " ") for name in names} | {name.replace(" ", "_") for name in names}


def unknown(value: Any) -> str:
    """Returns why a record of no form cannot be used, with the nearest form."""
    forms = [(form.name, form.columns) for form in FORMS if form.parse is not unpaired]
    plain = [form for form in forms if not any("." in column or "[" in column for column in form[1])]
    seen = nearest(value, plain) if isinstance(value, dict) else ""
    return f"not an object with the keys chosen and rejected, or prompt and responses{seen}"


def unpaired(value: dict, read: Reader) -> list[Compared]:
    """Refuses answers that are judged one by one."""
    raise BadRecord("an answer with a label or score of its own (as for KTO), without a second answer to compare it to")


FORMS = (
    Form("chosen and rejected", ("chosen", "rejected"), pairs.sides),
    Form("ranked answers", ("responses",), ranked, pair=False),
    Form("ms-swift pairs", ("messages", "rejected_response|rejected_messages"), pairs.swift),
    Form("ms-swift queries", ("response", "rejected_response"),
         partial(pairs.sides, better="response", worse="rejected_response")),
    Form("MedicalGPT pairs", ("response_chosen", "response_rejected"),
         partial(pairs.sides, better="response_chosen", worse="response_rejected")),
    Form("Argilla pairs", ("chosen_response", "rejected_response"),
         partial(pairs.sides, better="chosen_response", worse="rejected_response")),
    Form("StackExchange pairs", ("response_j", "response_k"),
         partial(pairs.sides, better="response_j", worse="response_k")),
    Form("CValues pairs", ("pos_resp", "neg_resp"), partial(pairs.sides, better="pos_resp", worse="neg_resp")),
    Form("PKU-SafeRLHF pairs", ("response_0", "response_1", "better_response_id|safer_response_id"), pairs.safe_rlhf,
         pair=False),
    Form("HelpSteer3 pairs", ("response1", "response2", "overall_preference"),
         partial(pairs.signed, first="response1", second="response2", key="overall_preference")),
    Form("HelpSteer2 pairs", ("response_1", "response_2", "preference_strength"),
         partial(pairs.signed, first="response_1", second="response_2", key="preference_strength")),
    Form("AlpacaFarm pairs", ("output_1", "output_2", "preference"),
         partial(pairs.labelled, first="output_1", second="output_2", key="preference", labels=(1, 2))),
    Form("WebGPT comparisons", ("answer_0", "answer_1", "score_0", "score_1"), pairs.webgpt),
    Form("SHP pairs", ("history", "human_ref_A", "human_ref_B", "labels"), pairs.shp),
    Form("summarize_from_feedback comparisons", ("info", "summaries", "choice"), pairs.summaries),
    Form("Chatbot Arena conversations", ("conversation_a", "conversation_b", "winner"), pairs.arena_conversations),
    Form("Chatbot Arena answers", ("response_a", "response_b", "winner|winner_model_a|winner_model_b|winner_tie"),
         pairs.arena_answers),
    Form("OASST trees", ("prompt.replies",), oasst, pair=False),
    Form("UltraFeedback completions", ("completions[]",),
         partial(ranked, column="completions", scores=("overall_score", "fine-grained_score", "score")), pair=False),
    Form("StackExchange answers and Nectar", ("answers[]",),
         partial(ranked, column="answers", scores=("pm_score", "score"), ranks=("rank",)), pair=False),
    Form("rated generations", ("generations[]", "ratings[]|rating[]"), generations, pair=False),
    Form("Alpaca rankings", ("instruction", "output[]"), partial(ranked, column="output"), pair=False),
    Form("labelled completions", ("completion", "label"), unpaired, pair=False),
    Form("labelled dialogues", ("messages|conversations", "label|kto_tag"), unpaired, pair=False),
    Form("scored responses", ("response", "helpfulness"), unpaired, pair=False),
    Form("OASST messages", ("parent_id", "role", "text"), unpaired, pair=False),
)  # fmt: skip

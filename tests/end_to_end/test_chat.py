"""ppo.chat in a pipe and in a terminal, against the batch sampler, the data's encoder and reward.score."""

import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import ppo.chat
import reward.score
from data.choose_template import stop_reasons
from data.formats.columns import PLAIN
from data.formats.records import Record, Tally
from data.prompts import Prompt, PromptEncoder
from data.show import main as show
from data.template import encode_prompt
from ppo.chat_flags import ChatConfig
from ppo.chat_models import chosen_sampling, growing_texts
from ppo.chat_screen import Screen, shortened, wrapped
from ppo.decoding.sampling import EVALUATION, Sampling
from ppo.models import PolicyModel
from ppo.ranks import batch_of
from ppo.rollout import PolicySampler, response_ids, response_texts
from ppo.score import GREEDY_TOPP
from tests.helpers.families import FAMILIES, family_config, family_tokenizer
from tests.helpers.tiny_run import (
    REPOSITORY,
    as_argv,
    clean_environment,
    policy_folder,
    read_lines,
    refusal,
    tiny_reward_model,
)  # fmt: skip
from utils.engine.engine import InferenceEngine
from utils.terminal import printable
from utils.tokenizer import load_tokenizer

QUESTIONS = ["Why is the sky blue?", "  Are you sure?  ", "Tell me a story about a fox."]
GREEDY = {"temperature": 0, "repetition_penalty": 1, "maxlen_prompt": 250, "maxlen_res": 20, "dtype": "fp32"}
HOSTILE = "<script>\x1b[2J\x07"


def talkative(folder, seed=1, **changes):
    """A policy whose answers have no end."""
    model = AutoModelForCausalLM.from_pretrained(policy_folder(folder, seed, **changes))
    model.lm_head.weight.data[model.config.eos_token_id] *= 0.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def talkers(tmp_path_factory):
    """Two policies."""
    folder = tmp_path_factory.mktemp("talkers")
    return [talkative(folder / str(seed), seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A model with the ChatML template, which has no system turn of its own."""
    folder, family = tmp_path_factory.mktemp("chatml"), FAMILIES["ChatML, a base model's EOS"]
    tokenizer = family_tokenizer(family)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(family_config(family, len(tokenizer)))
        model.lm_head.weight.data.mul_(30.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chat(monkeypatch, capfd):
    """Runs the command on lines in a pipe; returns standard output and error."""

    def run(lines, **flags) -> tuple[str, str]:
        text = lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode()
        capfd.readouterr()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        ppo.chat.main(as_argv(flags))
        return tuple(capfd.readouterr())

    return run


def batch_answers(folder, template, records, room) -> list[str]:
    """Greedy answers of the batch sampler to records of data, whose last answer the encoder of prompts removes."""
    tokenizer = load_tokenizer(str(folder))
    if template == "chat":
        tokenizer.stop_ids = tuple(stop_reasons(tokenizer, template, [], []))
    encoder = PromptEncoder(tokenizer, template, room, PLAIN)
    prompts = [
        encoder.item(row)
        for rows in encoder([Record(record, "here") for record in records], Tally("prompts"))
        for row in rows
    ]
    policy = PolicyModel(AutoModelForCausalLM.from_pretrained(folder)).requires_grad_(False)
    policy.decoding = "transformers"
    config = ChatConfig(model=str(folder), maxlen_prompt=250, maxlen_res=20)
    config.rollout_batch_size, config.micro_batch_tokens = 8, 4096
    sampler = PolicySampler(InferenceEngine(policy), tokenizer, config)
    rollout = sampler(batch_of(prompts, [*range(len(prompts))]), Sampling(topp=GREEDY_TOPP), 0)
    return response_texts(rollout, tokenizer)


@pytest.mark.parametrize(("template", "system"), [("moss_en", None), ("chat", "Be brief.")])
def test_several_turns_are_those_of_the_batch_sampler_on_the_saved_data(
    chat, talkers, chat_model, tmp_path, template, system
):
    """Ids as of the data's encoder: these random models answer any other prompt with other words."""
    model, file = {"moss_en": talkers[0], "chat": chat_model}[template], tmp_path / "chat.jsonl"
    shown, _ = chat([*QUESTIONS, f"/save {file}"], model=model, system=system, **GREEDY)
    (record,) = read_lines(file)
    turns = record["messages"]
    assert turns[: bool(system)] == [{"role": "system", "content": system}] * bool(system)
    said = turns[bool(system) :]
    assert [turn["content"] for turn in said[::2]] == [question.strip() for question in QUESTIONS]
    answers = [turn["content"] for turn in said[1::2]]
    assert shown == "\n".join(f"{printable(answer)}\n" for answer in answers) and len(set(answers)) == 3
    stops = range(2 + bool(system), len(turns) + 1, 2)
    assert batch_answers(model, template, [{"messages": turns[:stop]} for stop in stops], 230) == answers

    show(as_argv({"data_path": file, "kind": "dialogues"}))


def test_a_dialogue_longer_than_the_window_loses_its_oldest_turns(chat, talkers, tmp_path):
    file = tmp_path / "chat.jsonl"
    flags = GREEDY | {"maxlen_prompt": 90}
    _, said = chat([*QUESTIONS, f"/save {file}"], model=talkers[0], **flags)
    assert re.search(r"without the oldest [24] turns, which no longer fit", said)
    turns = read_lines(file)[0]["messages"]
    assert batch_answers(talkers[0], "moss_en", [{"messages": turns}], 70) == [turns[-1]["content"]]


def test_errors_in_a_pipe_name_the_line(talkers, monkeypatch, capfd):
    for text, error in {
        b"Hi\n\n" + b"long " * 400: "standard input:3: the question is longer than --maxlen_prompt",
        b"Hi\nb\xff": "standard input:2: not UTF-8",
        b"/sav x": "standard input:1: there is no command /sav; /help",
        b"/retry": "standard input:1: there is no question before",
        b"/save /tmp": "/save: there is no answer yet",
    }.items():
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        assert error in refusal(ppo.chat.main, as_argv({"model": talkers[0]} | GREEDY), capfd)


def test_a_pipe(talkers):
    """Answers on standard output, all else on standard error; the answer is there before the input ends."""
    argv = as_argv({"model": talkers[0], "maxlen_res": 12, "dtype": "fp32"})
    command = [sys.executable, "-m", "ppo.chat", *argv]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=clean_environment() | {"DS_ACCELERATOR": "cpu"}, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdin.write(f"{QUESTIONS[0]}\n")
    process.stdin.flush()
    first = process.stdout.readline()
    rest, errors = process.communicate(f"\n{QUESTIONS[2]}\n/quit\nnot read\n", timeout=120)
    assert process.returncode == 0 and first.strip() and rest.startswith("\n") and len(rest) > 2
    assert "template moss_en" in errors and "\x1b" not in first + rest + errors and "> " not in first + rest


def test_commands(chat, talkers, tmp_path):
    """Of two models: /undo, /retry, /system and /reset change the dialogues, /save writes all of them."""
    file = tmp_path / "chat.jsonl"
    lines = [
        "A?", "B?", "/undo", "C?", "/retry", "/system\t Be kind. ", "D?", f"/save {file}", "/reset", "E?", "/system",
        "/help", f"/save {file}",
    ]  # fmt: skip
    flags = {"model": talkers[0], "compare": talkers[1], "maxlen_res": 9, "dtype": "fp32", "seed": 3}
    shown, said = chat(lines, **flags)
    records = read_lines(file)
    system = [{"role": "system", "content": "Be kind."}]
    asked = [[turn["content"] for turn in record["messages"] if turn["role"] == "user"] for record in records]
    assert asked == [["A?", "C?"]] * 2 + [["D?"]] * 2 + [["E?"]] * 2
    assert [record["messages"][:1] == system for record in records] == [False] * 2 + [True] * 4
    assert [record["model"] for record in records] == [str(talkers[0]), str(talkers[1])] * 3
    assert "taken back: B?" in said and "/save FILE" in said and "written" in said and "written" not in shown
    blocks = shown.split(f"{talkers[0]}:\n")[1:]
    assert len(blocks) == 6 and all(block.count(f"{talkers[1]}:\n") == 1 for block in blocks)
    retried, kept = blocks[3].split(f"{talkers[1]}:\n")[0].strip(), printable(records[0]["messages"][3]["content"])
    assert retried == kept and kept != blocks[2].split(f"{talkers[1]}:\n")[0].strip()
    assert chat(lines[:2], **flags)[0] == "".join(f"{talkers[0]}:\n{block}" for block in blocks[:2]).rstrip("\n") + "\n"


def test_nothing_is_overwritten(talkers, tmp_path, monkeypatch, capfd):
    (tmp_path / "mine").write_text("kept")
    for name, error in {"mine": "exists; choose another", "": "needs the name of a file"}.items():
        words = f"Hi\n/save {tmp_path / name if name else ''}\n"
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(words.encode())))
        assert error in refusal(ppo.chat.main, as_argv({"model": talkers[0], "maxlen_res": 5}), capfd)
    assert (tmp_path / "mine").read_text() == "kept"


def test_scores_are_those_of_reward_score(chat, talkers, tmp_path, capfd):
    """Of two reward models, one with another tokenizer; an answer's score is that of the dialogue up to it."""
    judges, file = [tiny_reward_model(tmp_path / f"judge{vocab}", vocab) for vocab in (400, 370)], tmp_path / "x.jsonl"
    lines = ["A?", "/reset", "B?", "C?", f"/save {file}"]
    shown, _ = chat(lines, model=talkers[0], reward_model=judges, reward_ensemble="min", maxlen_res=9, dtype="fp32")
    found = [tuple(map(float, x)) for x in re.findall(r"^score (\S+) \((\S+), (\S+)\)$", shown, re.MULTILINE)]
    turns = read_lines(file)
    rows = [turns[0]["messages"], turns[1]["messages"][:2], turns[1]["messages"]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    reward.score.main(as_argv({"model": judges, "input": tmp_path / "in.jsonl", "dtype": "fp32"}))
    expected = [json.loads(line)["scores"] for line in capfd.readouterr().out.splitlines()]
    assert len(found) == 3
    for (least, *scores), wanted in zip(found, expected, strict=True):
        assert scores == pytest.approx(wanted, abs=6e-4) and least == pytest.approx(min(wanted), abs=6e-4)


def test_adapters(chat, talkers, tmp_path, monkeypatch, capfd):
    """They answer as the whole model does; on a model of other sizes they are refused."""
    whole, adapter = tmp_path / "whole", tmp_path / "adapter"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        settings = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(talkers[0]), settings)
    model.save_pretrained(adapter)
    model.merge_and_unload().save_pretrained(whole)
    shutil.copy(talkers[0] / "tokenizer.model", whole)
    answers = [chat(QUESTIONS, model=path, **GREEDY)[0] for path in (whole, adapter, talkers[0])]
    assert answers[0] == answers[1] != answers[2]
    settings = json.loads((adapter / "adapter_config.json").read_text())
    other = policy_folder(tmp_path / "other", 1, hidden_size=48)
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(other)}))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n")))
    error = refusal(ppo.chat.main, as_argv({"model": adapter} | GREEDY), capfd)
    assert f"--model: cannot load the adapter in {adapter}" in error


def test_the_stream_of_a_response_is_that_of_a_batch(inputs):
    """Token by token, with end tokens: of several prompts together, with the random stream of each."""
    tokenizer = load_tokenizer(str(inputs.policy))
    prompts = [
        Prompt(encode_prompt(tokenizer, [{"role": "user", "content": x}], "moss_en"), [], x) for x in QUESTIONS * 3
    ]
    policy = PolicyModel(AutoModelForCausalLM.from_pretrained(inputs.policy)).requires_grad_(False)
    config = ChatConfig(model="m", maxlen_prompt=250, maxlen_res=8)
    sampler = PolicySampler(InferenceEngine(policy), tokenizer, config)
    alone = [list(sampler.stream(batch_of([prompt], [k]), EVALUATION, 5)) for k, prompt in enumerate(prompts)]
    config.rollout_batch_size = 4
    assert alone == response_ids(sampler(batch_of(prompts, [*range(len(prompts))]), EVALUATION, 5))
    assert {len(ids) == 8 for ids in alone} == {True, False}  # some were cut, others ended


def test_sampling_is_that_of_evaluation_unless_a_flag_changes_it():
    assert chosen_sampling(ChatConfig(model="m")) == EVALUATION
    assert chosen_sampling(ChatConfig(model="m", temperature=1.0, topp=1.0, repetition_penalty=1.0)) == Sampling()
    greedy = chosen_sampling(ChatConfig(model="m", temperature=0.0))
    assert greedy.topp == GREEDY_TOPP and greedy.repetition_penalty == EVALUATION.repetition_penalty


def test_texts_grow_by_whole_characters(inputs):
    """SentencePiece writes Chinese as bytes here; no text has half a character, and each begins with the last."""
    text = "你好，世界 🙂 café 好"
    for tokenizer in (load_tokenizer(str(inputs.policy)), family_tokenizer(FAMILIES["ChatML, a base model's EOS"])):
        ids = tokenizer.encode(text, add_special_tokens=False)
        texts = list(growing_texts(tokenizer, ids))
        assert texts[-1] == text and len(texts) == len(ids) + 1 > len(text)
        assert all(later.startswith(before) and "\ufffd" not in before for before, later in pairwise(texts))
        assert {"你", "你好"} <= set(texts)
        assert list(growing_texts(tokenizer, ids[:-1]))[-1] != text


def test_a_long_remark_is_one_line_in_a_pipe():
    out, text = io.StringIO(), "score 0.500 (" + "0.500, " * 30 + "0.500)"
    Screen(out, is_terminal=False).rows([text])
    assert out.getvalue() == f"{text}\n"


def test_lines_of_a_column():
    """Wide characters take two columns; lines break at spaces, and only the last one changes when text comes."""
    assert wrapped("one two three", 7) == ["one two", "three"]
    assert wrapped("你好世界ab", 5) == ["你好", "世界a", "b"]
    assert wrapped("a\n\nabcdefgh", 5) == ["a", "", "abcde", "fgh"]
    text = "The 狐狸 ran, and it ran;  far-away-from-here\nto the hill 山 and then home again."
    for stop in range(len(text)):
        assert wrapped(text, 9)[: len(wrapped(text[:stop], 9)) - 1] == wrapped(text[:stop], 9)[:-1]
    assert shortened("outputs/你好/final", 9) == "…好/final" and shortened("ab", 2) == "ab"


class Terminal:
    """What a terminal of some columns shows of lines with returns, bold and dim: a list of rows."""

    def __init__(self, text: str):
        self.rows = [re.sub(r"\x1b\[[012]m", "", row.rsplit("\r", 1)[-1]).rstrip() for row in text.split("\n")]


def test_two_columns_and_hostile_text(monkeypatch):
    """Answers grow side by side; what they hold is shown as text, and no row is wider than the terminal."""
    monkeypatch.setenv("COLUMNS", "84")
    monkeypatch.setenv("TERM", "xterm")
    left, right = f"{HOSTILE} " + "word " * 12, "你好" * 25
    screen = Screen(out := io.StringIO(), True)
    assert screen.has_columns
    screen.two(
        ["a" * 50, HOSTILE], [iter(left[:k].rstrip() for k in range(0, len(left) + 3, 3)), iter([right[:9], right])]
    )
    shown = Terminal(out.getvalue())
    assert shown.rows == [
        "…" + "a" * 39 + " │ <script>\\u001b[2J\\u0007",
        "<script>\\u001b[2J\\u0007 word word word" + "   │ " + "你好" * 10,
        "word " * 8 + " │ " + "你好" * 10,
        "word" + " " * 36 + " │ " + "你好" * 5,
        "",
    ]
    assert out.getvalue().count("\r") > 15
    screen.one(iter([HOSTILE]))
    screen.note(HOSTILE)
    screen.rows([HOSTILE, HOSTILE])
    assert set(re.findall(r"[\x00-\x09\x0b-\x1f](?:\[.)?", out.getvalue())) <= {"\r", "\x1b[1", "\x1b[2", "\x1b[0"}
    monkeypatch.setenv("COLUMNS", "79")
    assert not screen.has_columns and not Screen(out, False).has_columns


def test_a_model_that_generates_control_characters(chat, inputs, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(inputs.policy)
    tokenizer = load_tokenizer(str(inputs.policy))
    head, row = model.lm_head.weight.data, torch.randn(32, generator=torch.Generator().manual_seed(0))
    head.zero_()
    for token, sign in (("<0x1B>", 1), ("<0x07>", -1)):
        head[tokenizer.convert_tokens_to_ids(token)] = sign * row
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((inputs.policy / "tokenizer.model").read_bytes())
    shown, said = chat(["Hi"], model=tmp_path, **GREEDY | {"maxlen_prompt": 40, "maxlen_res": None})
    assert "--maxlen_res 512: 20 is used" in said
    assert re.fullmatch(r"(\\u001b|\\u0007){20}\n", shown)


class Typed:
    """The command in a terminal of its own, in a copy of this process, which has imported all that it needs."""

    def __init__(self, argv: list[str]):
        self.shown, (self.pid, self.handle) = b"", pty.fork()
        if self.pid == 0:
            code = 1
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
                ppo.chat.main(argv)
                code = 0
            except SystemExit as end:
                code = end.code
            finally:
                sys.stdout.flush()
                os._exit(code)
        fcntl.ioctl(self.handle, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 70, 0, 0))

    def type_in(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def until(self, pattern: str) -> str:
        """What it shows until the pattern."""
        limit = time.monotonic() + 120
        while not re.search(pattern, self.shown.decode(errors="replace")):
            assert time.monotonic() < limit, self.shown
            self.shown += os.read(self.handle, 4096)
        shown, self.shown = self.shown, b""
        return shown.decode()

    def code(self) -> int:
        """Its exit code."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.handle)
        return code


def test_a_terminal(tmp_path, monkeypatch):
    """Ctrl-C stops an answer, and what is there is kept; at the prompt it ends the command, as Ctrl-D does."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("COLUMNS", raising=False)
    long = talkative(tmp_path / "long", max_position_embeddings=30000)
    argv = as_argv({"model": long, "temperature": 0, "maxlen_prompt": 30000, "maxlen_res": 20000, "dtype": "fp32"})
    chat = Typed(argv)
    assert "template moss_en" in chat.until("> $")
    chat.type_in("你好？\n")
    chat.until(r"你好？\r\n(.|\n){30}")
    chat.type_in("\x03")
    assert re.search(r"\d tokens, \d+\.\d/s · stopped", chat.until("> $"))
    chat.type_in("/nothing\n")
    assert "error: there is no command /nothing" in chat.until("> $")
    chat.type_in(f"/save {tmp_path}/x.jsonl\n")
    chat.until("written(.|\n)*> $")
    question, answer = read_lines(tmp_path / "x.jsonl")[0]["messages"]
    assert question["content"] == "你好？" and len(answer["content"]) > 10
    chat.type_in("\x03")
    assert "stopped by Ctrl-C" in chat.until("Ctrl-C")
    assert chat.code() == 130
    chat = Typed(argv)
    chat.until("> $")
    chat.type_in("\x04")
    assert chat.code() == 0

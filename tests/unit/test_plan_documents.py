"""The tables of sizes in the documents are what the command beside them prints."""

import re
import shlex
import subprocess

import pytest
import torch

from tests.unit.test_documents import text_of
from train_ppo import main

CLUSTER, PERFORMANCE, ALGORITHMS, LORA = "docs/cluster.md", "docs/performance.md", "docs/algorithms.md", "docs/lora.md"
pytestmark = pytest.mark.slow  # 31 plans


@pytest.fixture(autouse=True)
def layers_of_torch(monkeypatch) -> None:
    """ZeRO-3 of an earlier test replaces `linear` for the rest of the process, and that keeps more activations."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Model -> folder of its config.json, written by the shell function of docs/cluster.md with the numbers there."""
    text = text_of(CLUSTER)
    function = re.search(r"^llama\(\) \{.*?^\}$", text, re.DOTALL | re.MULTILINE)[0]
    sizes = {"7B": re.search(r"&& llama ([\d ]+) >", text)[1]} | dict(re.findall(r"(\d+B): (\d+(?: \d+){4})", text))
    made = {}
    for model, numbers in sizes.items():
        made[model] = str(tmp_path_factory.mktemp(model))
        command = f"{function}\nllama {numbers} > {made[model]}/config.json"
        subprocess.run(["bash", "-c", command], check=True)
    return made


def section(document: str, heading: str) -> str:
    return text_of(document).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def table_of(text: str) -> list[list[str]]:
    """The cells of the rows of the only table in a text, without the line below the header."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in [rows[0], *rows[2:]]]


def printed(text: str, folder: str, flags: str, capsys) -> tuple[dict[str, list[float]], dict[str, str], str]:
    """({row: its numbers}, {row: text after them}, everything) of the command in a text, with other flags appended."""
    command = re.search(r"^python train_ppo\.py (.*?[^\\])$", text, re.DOTALL | re.MULTILINE)[1]
    words = shlex.split(command.replace("\\\n", " "))
    main([folder if word == "M" else word for word in words] + shlex.split(flags.strip("`")))
    output = capsys.readouterr().out
    rows = re.findall(r"^(\D.*?) {2,}(-?\d+\.\d+(?: +-?\d+\.\d+)*)(?: {3}(.*))?$", output, re.MULTILINE)
    numbers = {name: [float(number) for number in found.split()] for name, found, _ in rows}
    return numbers, {name: rest for name, _, rest in rows}, output


def test_sizes_of_clusters(folders, capsys):
    text = section(CLUSTER, "Sizes")
    for model, gpus, flags, *expected in table_of(text)[1:]:
        count, card = re.fullmatch(r"(\d+) (\w+)", gpus).groups()
        more = f"{flags} --plan_gpus {count} --plan_gpu {card.lower()}"
        numbers, rest, output = printed(text, folders[model], more.replace("`", ""), capsys)
        host = sum(found[1] for name, found in numbers.items() if len(found) == 2)
        found = [max(numbers["total"]), numbers["buffer"][0], numbers["new tokens"][0], host]
        digits = [f"{found[0]:.1f}", *(f"{x:.0f}" for x in found[1:])]
        assert (digits, "\nFITS: " in output) == (expected, True), f"{model}, {gpus}, {flags}"
        assert re.search(rf"{re.match(r'disk, (.* GB)', rest['checkpoint'])[1]}\W+{model}", text.replace("\n", " "))


@pytest.mark.parametrize("row", range(5))
def test_memory_of_adapters(folders, capsys, row):
    text = section(LORA, "Memory")
    model, flags, peak, slots = table_of(text)[1:][row]
    _, _, output = printed(text, folders[model], flags, capsys)
    memory = flags.strip("`").split()[-1]
    assert f"\nFITS: {peak.replace(',', f' of {memory} GiB,')}\n" in output
    assert f", {slots} slots, " in output


def test_64_gpus_on_paper(folders, capsys):
    text = section(PERFORMANCE, "64 GPUs, on paper")
    header, *rows = table_of(text)
    for column, cell in enumerate(header[1:], 1):
        model, flags = cell.split(", ")
        numbers, rest, output = printed(text, folders[model], flags, capsys)
        cells = {row[0]: row[column] for row in rows}
        assert "\nFITS: " in output and cells["GiB per GPU"] == f"{max(numbers['total']):.1f}"
        for name in ("prompts", "new tokens", "scoring", "update", "checkpoint"):
            assert cells[f"{name}, s"] == f"{numbers[name][0]:.2f}: {rest[name].partition(';')[0]}"
        assert cells["buffer, s"] == f"{numbers['buffer'][0]:.2f}"
        assert cells["GB that a GPU sends per buffer"] == f"{numbers['buffer'][2]:.1f}"
        assert cells["of these over the network"] == f"{numbers['buffer'][3]:.1f}"


def test_rollouts_by_vllm_on_paper(folders, capsys):
    text = section(PERFORMANCE, "Rollouts by vLLM, on paper")
    header, *rows = table_of(text)
    names = {"weights": "copying the weights to vLLM, s", "comparison": "comparing them, s"}
    names |= {name: f"{name}, s" for name in ("prompts", "new tokens")}

    def predicted(model: str, flags: str) -> tuple[dict[str, str], dict[str, float], str]:
        numbers, rest, output = printed(text, folders[model], flags, capsys)
        times = {label: f"{numbers[name][0]:.2f}: {rest[name]}" for name, label in names.items() if name in numbers}
        seconds = {name: numbers.get(name, [0.0])[0] for name in [*names, "buffer"]}
        return times, seconds | {"GiB": max(numbers["total"])}, output

    for column, cell in enumerate(header[1:], 1):
        times, seconds, output = predicted(*cell.split(", "))
        cells = {row[0]: row[column] for row in rows}
        assert "\nFITS: " in output and cells["GiB per GPU"] == f"{seconds['GiB']:.1f}"
        assert {label: cells[label] for label in names.values() if cells[label]} == times
        assert cells["buffer, s"] == f"{seconds['buffer']:.2f}"
        rollout = sum(seconds[name] for name in names)
        assert cells["tokens per second in the rollout"] == f"{512 * 512 / rollout:,.0f}"
        extra = 100 * (seconds["weights"] + seconds["comparison"]) / seconds["buffer"]
        assert cells["copy and comparison, share of the buffer"] == (f"{extra:.1f} %" if extra else "")
        host = re.search(r"GiB of host memory.*?\n\n", output, re.DOTALL)[0]
        per_node = sum(float(number) for number in re.findall(r"([\d.]+)$", host, re.MULTILINE))
        assert cells["GiB of host memory per node"] == f"{per_node:.1f}"
    for engine, expected in (("own", "14,678 against"), ("vllm", "against 11,635")):
        _, seconds, _ = predicted("7B", f"--plan_gpu a100 --rollout_engine {engine}")
        assert expected.replace("against", "").strip() == f"{512 * 512 / sum(seconds[name] for name in names):,.0f}"
        assert expected in text


def test_memory_without_a_critic(folders, capsys):
    text = text_of(ALGORITHMS).partition("\n### Memory\n")[2].partition("\n## ")[0]
    update = []
    for column, flags in enumerate(("", "--advantage_estimator rloo --num_responses_per_prompt 4"), 1):
        numbers, rest, output = printed(text.partition("  # ")[0] + "\n", folders["7B"], flags, capsys)
        weights, optimizer = (
            sum(found[0] for name, found in numbers.items() if re.fullmatch(rf"{what} (the )?(policy|critic).*", name))
            for what in ("weights of", "optimizer of")
        )
        cells = [row[column] for row in table_of(text)[1:]]
        found = [weights, optimizer, max(numbers["total"])]
        assert cells == [f"{x:.1f}" for x in found] + [re.match(r"disk, (\d+) GB", rest["checkpoint"])[1]]
        assert "\nFITS: " in output and output.partition("\nFITS: ")[2].startswith(
            f"{found[2]:.1f} of 80 GiB, in rollout"
        )
        update.append(f"{numbers['update'][0]:.1f}")
    assert f"{update[1]} instead of {update[0]} s" in text

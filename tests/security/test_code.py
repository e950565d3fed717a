"""No code runs that came with weights, tokenizers or data: live files, in every place that reads them."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.template import encode_prompt
from tests.bad_inputs.commands import COMMANDS
from tests.bad_inputs.materials import Materials, altered
from tests.bad_inputs.test_corpus import command_line
from tests.helpers.live_code import assert_live, bring_own_code, bring_own_tokenizer, live_pickle
from tests.helpers.tiny_run import REPOSITORY, refusal
from utils.engine.engine import init_distributed
from utils.errors import UserError
from utils.models.load import load_causal_lm
from utils.tokenizer import load_tokenizer

# Every flag that names weights: (command, words in front, flag, sound folder, values around it).
PLACES = {
    "policy": ("ppo", None, "policy_model_path", "policy", []),
    "critic": ("ppo", None, "critic_model_path", "reward", []),
    "reward model": ("ppo", None, "reward_model_path", "reward", []),
    "second reward model": ("ppo", None, "reward_model_path", "reward", ["{reward}"]),
    "base of SFT": ("sft", None, "hf_model_name_or_path", "policy", []),
    "base of a reward model": ("reward", None, "hf_model_name_or_path", "policy", []),
    "scored with": ("score", None, "model", "judge", []),
    "evaluated": ("evaluate", None, "model", "judge", []),
    "measures strength": ("strength", None, "model", "judge", ["{judge}"]),
    "compared": ("compare", None, "policies", "policy", ["{policy}"]),
    "judge of a comparison": ("compare", None, "reward_model_path", "reward", []),
    "base of a merge": ("merge", ["recover"], "path_raw", "raw", []),
    "diff": ("merge", ["recover"], "path_diff", "diff", []),
    "model to diff": ("merge", ["make_diff"], "path_tuned", "diff", []),
    "model to verify": ("merge", ["verify"], "path_tuned", "diff", []),
}
LAYOUTS = ["zip", "legacy", "sharded", "pickle alone", "named safetensors"]


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Materials:
    init_distributed()
    return Materials(tmp_path_factory.mktemp("materials"))


def make_live(folder: Path, layout: str, mark: Path) -> Path:
    """The weights of a sound folder become a pickle that would make `mark`; gives the file."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = {"sharded": "pytorch_model-00001-of-00001.bin", "named safetensors": "model.safetensors"}
    if layout == "sharded":
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name[layout])}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    content = None if layout == "pickle alone" else weights
    kind = "legacy" if layout == "legacy" else "zip"
    return live_pickle(folder / name.get(layout, "pytorch_model.bin"), mark, content, kind)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", PLACES)
def test_a_live_pickle_is_refused_and_does_not_run(materials, tmp_path, capfd, place, layout):
    command, words, flag, source, before = PLACES[place]
    folder, mark = tmp_path / "model", tmp_path / "ran"
    altered(source, lambda copy: None)(materials, folder)
    file = make_live(folder, layout, mark)
    more = {"make_diff": {"path_diff": "{folder}/out"}, "verify": {"path_raw": None, "path_diff": None}}
    flags = {flag: [*before, str(folder)]} | more.get(words and words[0], {})
    case = {"command": command, "flags": flags} | ({"words": words} if words else {})
    error = refusal(COMMANDS[command].main, command_line(case, materials, tmp_path), capfd)
    assert str(file) in error or str(folder) in error
    assert ("posix.system" in error) != (layout == "named safetensors")
    assert not (tmp_path / "out").exists()
    assert_live(file, mark)


@pytest.mark.parametrize("model_type", ["own", "llama"])
def test_code_beside_a_model_does_not_run(materials, tmp_path, model_type):
    """Where transformers knows the architecture, its own class is taken; else the model is refused."""
    folder, mark = tmp_path / "model", tmp_path / "ran"
    altered("policy", lambda copy: bring_own_code(copy, mark, model_type))(materials, folder)
    places = {
        "sft": ("hf_model_name_or_path", []),
        "ppo": ("policy_model_path", []),
        "compare": ("policies", ["{policy}"]),
    }
    for command, (flag, before) in places.items():
        flags = {flag: [*before, str(folder)], "template": "chat"}
        with pytest.raises(SystemExit):  # for want of a chat template at the latest: nothing is trained here
            COMMANDS[command].main(command_line({"command": command, "flags": flags}, materials, tmp_path))
    if model_type == "llama":
        model = load_causal_lm(str(folder), torch.float32, torch.device("cpu"), say=str)
        assert type(model).__module__.startswith("transformers.")
    assert not mark.exists()
    exec(compile((folder / "own.py").read_text(), "own.py", "exec"), {"__name__": "own"})  # it was live
    assert mark.exists()


def test_code_beside_a_tokenizer_does_not_run(materials, tmp_path, capfd):
    folder, mark = tmp_path / "model", tmp_path / "ran"
    altered("policy", lambda copy: bring_own_tokenizer(copy, mark))(materials, folder)
    case = {"command": "sft", "flags": {"tokenizer_name_or_path": str(folder)}}
    assert "which is not run here" in refusal(COMMANDS["sft"].main, command_line(case, materials, tmp_path), capfd)
    assert not mark.exists()


def test_a_chat_template_reaches_nothing(materials, tmp_path):
    """It is a program in the tokenizer's folder, but one that transformers runs in jinja's sandbox."""
    tokenizer = load_tokenizer(str(materials["policy"]))
    mark = tmp_path / "ran"
    tokenizer.chat_template = f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}"
    with pytest.raises(UserError, match="refuses a dialogue"):
        encode_prompt(tokenizer, [{"role": "user", "content": "Hi"}], "chat")
    assert not mark.exists()


FORBIDDEN = re.compile(
    r"(exec|eval|compile|__import__)|.*\b(system|popen|exec_module|spawn\w*)|(pickle|marshal|dill|joblib)\.\w+|subprocess\.\w+"
)
ALLOWED = {
    ("ppo/user_function.py", "exec_module"),  # --reward_fn, --advantage_estimator
    ("utils/run/folder.py", "run"),  # git's commit, without a shell
    ("utils/launcher.py", "Popen"),  # the command of the recipe that starts it, once per GPU, without a shell
    ("utils/watchdog.py", "Popen"),  # itself, without a shell
    ("data/demo/english.py", "from_pretrained"),  # a file of a package that utils/setup.sh pins
    ("utils/models/adapter_folder.py", "from_pretrained"),  # peft's settings, a JSON file of a folder
}
FOLDERS = ("ppo", "reward", "sft", "data", "utils")
SOURCES = [*REPOSITORY.glob("*.py"), *(file for name in FOLDERS for file in (REPOSITORY / name).rglob("*.py"))]


def dangers(file: Path) -> list[str]:
    """Calls in a file that could run what they are given."""
    found = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        last = name.rpartition(".")[2]
        unsafe = FORBIDDEN.fullmatch(name) or "shell" in options
        if name == "torch.load":
            unsafe = options.get("weights_only") != "True"
        if last == "from_pretrained":
            unsafe = options.get("trust_remote_code") != "False"
        if unsafe and (file.relative_to(REPOSITORY).as_posix(), last) not in ALLOWED:
            found.append(f"{file}:{node.lineno}: {name}")
    return found


def test_nothing_else_in_the_sources_could_run_code():
    assert [danger for file in SOURCES for danger in dangers(file)] == []

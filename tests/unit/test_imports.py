"""Imports: which folder may import which, files that stay pure, the only homes of deepspeed and collectives."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MAY_IMPORT = {
    "ppo": {"ppo", "reward", "sft.loss", "data", "utils"},
    "reward": {"reward", "data", "utils"},
    "sft": {"sft", "data", "utils"},
    "data": {"data", "utils"},
    "utils": {"utils"},
}
OURS = set(MAY_IMPORT)
# Started by users, imported by nothing; the first merges reward models, too.
COMMANDS = {"utils.merge_adapter", "utils.push_to_hub"}
# Rooms inside these folders: what each may import of its own folder, besides itself.
ROOMS = {
    "utils": set(),
    "utils.flags": {"utils"},
    "utils.models": {"utils"},
    "utils.engine": {"utils", "utils.flags", "utils.models"},
    "utils.memory": {"utils", "utils.flags", "utils.models", "utils.engine"},
    "utils.report": {"utils"},
    "utils.run": {"utils", "utils.flags", "utils.models", "utils.engine", "utils.report"},
    "utils.weight_diff": {"utils", "utils.flags", "utils.models"},
    "data.formats": {"data"},
    "data.showing": {"data", "data.formats"},
    "data.batching": {"data"},
    "ppo.decoding": set(),
}
PURE = {
    "ppo.types", "ppo.kl", "ppo.rewards", "ppo.advantages", "ppo.loss", "ppo.decoding.sampling", "reward.batches",
    "reward.loss", "reward.metrics", "reward.win_rate", "sft.loss", "data.order", "data.batching.collate",
    "data.batching.packing", "data.batching.micro_batch_plan", "utils.tensors", "utils.moments", "utils.schedule",
    "utils.models.chunked_logprobs", "utils.errors", "utils.sums", "ppo.sampler_gap",
    "ppo.epochs", "ppo.groups", "ppo.overoptimisation_fit", "ppo.value_norm", "ppo.critic_metrics",
    "utils.report.choose",
}  # fmt: skip
FILES = sorted(file for folder in MAY_IMPORT for file in (REPOSITORY / folder).rglob("*.py"))


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)


@cache
def nodes(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text("utf-8"))))


def imports(file: Path) -> set[str]:
    """Every module that the file names, those inside functions included: `a.b` for both `import a.b` and its names."""
    found = set()
    for node in nodes(file):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def attributes(file: Path) -> set[str]:
    """Every dotted name in use: `import torch` alone is enough to say torch.distributed.barrier()."""
    return {ast.unparse(node) for node in nodes(file) if isinstance(node, ast.Attribute)}


def inside(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_arrows_between_folders_point_down(file):
    allowed = OURS if module_of(file) in COMMANDS else MAY_IMPORT[file.relative_to(REPOSITORY).parts[0]]
    ours = {module for module in imports(file) if module.split(".")[0] in OURS | {"train_ppo", "tests", "benchmarks"}}
    # `from sft import loss` names sft as well: a bare folder is no more than the names taken from it.
    wrong = {module for module in ours if not inside(module, allowed) and module != "sft"}
    assert not wrong


def room_of(file: Path) -> str:
    return ".".join(file.relative_to(REPOSITORY).parts[:-1])


def modules_in(file: Path) -> set[str]:
    """The project's modules that the file imports, by their full names."""
    known = {module_of(other) for other in FILES}
    return imports(file) & known - {module_of(file)}


ROOMS_FILES = [file for file in FILES if room_of(file) in ROOMS and module_of(file) not in COMMANDS]


@pytest.mark.parametrize("file", ROOMS_FILES, ids=module_of)
def test_rooms_import_only_the_rooms_below_them(file):
    room, top = room_of(file), file.relative_to(REPOSITORY).parts[0]
    imported = {name.rpartition(".")[0] for name in modules_in(file) if name.split(".")[0] == top}
    assert imported <= ROOMS[room] | {room}


def test_commands_are_not_imported():
    assert not COMMANDS & set().union(*map(modules_in, FILES))


def test_imports_have_no_circles():
    graph = {module_of(file): modules_in(file) for file in FILES}
    while leaves := {name for name, imported in graph.items() if not imported & graph.keys()}:
        graph = {name: imported for name, imported in graph.items() if name not in leaves}
    assert not graph


@pytest.mark.parametrize("module", sorted(PURE))
def test_pure_files_import_torch_the_standard_library_and_pure_files(module):
    found = imports(REPOSITORY / f"{module.replace('.', '/')}.py")
    for name in found:
        assert inside(name, PURE) or name.split(".")[0] in sys.stdlib_module_names | {"torch"}, f"{module}: {name}"
    assert not any(name.startswith("torch.distributed") for name in found)


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("deepspeed", {"utils.engine.engine", "utils.engine.split", "utils.engine.average"}),
        ("vllm", {"ppo.decoding.vllm_engine"}),
        ("lm_eval", {"ppo.benchmark_run"}),
        ("torch.distributed", {"utils.engine.engine", "utils.distributed"}),
        ("torch.cuda.is_available", {"utils.device"}),
    ],
)
def test_library_has_its_only_home(library, homes):
    users = {module_of(file) for file in FILES if any(inside(name, {library}) for name in imports(file))}
    if "." in library:  # the name of a library alone may be a variable's
        users |= {module_of(file) for file in FILES if any(inside(name, {library}) for name in attributes(file))}
    assert users == homes


def test_no_pickle_and_no_remote_code():
    for file in FILES:
        text = file.read_text("utf-8")
        assert "trust_remote_code=True" not in text, file
        assert "pickle.load" not in text, file
        assert "weights_only=False" not in text, file

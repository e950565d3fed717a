"""Documents name only flags, files, modules and links that exist; their tables are whole; the README stays short."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("ppo", "reward", "sft", "data", "utils", "tests", "benchmarks", "experiments", "docs", "slurm", "examples")
DOCUMENTS = sorted(
    str(file.relative_to(REPOSITORY))
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "experiments/*.md")
    for file in REPOSITORY.glob(pattern)
)
READMES = ("README.md", "README.zh.md")
# Of the parser itself; one for all switches; another library's; of torchrun; of sbatch and srun; of
# containers.
OTHER_FLAGS = {"--help", "--config", "--debug", "--use_x", "--learning_rate"}
OTHER_FLAGS |= {"--nnodes", "--nproc_per_node", "--node_rank", "--master_addr", "--master_port"}
OTHER_FLAGS |= {"--nodes", "--ntasks", "--gpus", "--cpus", "--signal", "--array", "--job", "--kill", "--wait"}
OTHER_FLAGS |= {"--full", "--batch"}
OTHER_FLAGS |= {"--tag", "--file", "--rm", "--init", "--ipc", "--ulimit", "--volume", "--workdir", "--shm", "--time"}
OTHER_FLAGS |= {"--nv", "--bind", "--pwd", "--container"}
OTHER_FLAGS |= {"--served", "--max", "--port"}  # of vLLM's server


def text_of(document: str) -> str:
    return (REPOSITORY / document).read_text("utf-8")


@cache
def known_flags() -> set[str]:
    """Fields of all flag dataclasses, and every flag that a command or a script spells out."""
    known = set()
    for file in REPOSITORY.rglob("*.py"):
        parts = file.relative_to(REPOSITORY).parts
        if parts[0].startswith(".") or file.name.startswith("test_"):
            continue
        text = file.read_text("utf-8")
        known |= set(re.findall(r'"(--[a-z0-9_]+)"', text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Flags")):
                fields = (line.target.id for line in node.body if isinstance(line, ast.AnnAssign))
                known |= {f"--{name}" for name in fields}
                others = (line.value for line in node.body if ast.unparse(line).startswith("aliases: "))
                known |= {f"--{name.value}" for value in others for name in value.keys}
    for file in (*REPOSITORY.glob("*.sh"), *REPOSITORY.glob("*/*.sh")):
        known |= set(re.findall(r"(?<![-\w])--[a-z0-9_]+", file.read_text("utf-8")))
    return known


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_row_of_a_table_has_as_many_cells_as_its_header(document):
    cells = None
    for number, line in enumerate(text_of(document).splitlines(), 1):
        count = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert None in (count, cells) or count == cells, f"{document}:{number}: {line}"
        cells = count


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_belongs_to_a_command(document):
    named = set(re.findall(r"(?<![-\w])--[a-z][a-z0-9_]+", text_of(document)))
    assert named - known_flags() - OTHER_FLAGS == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_and_module_exists(document):
    text = text_of(document)
    paths = set(re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", text))
    paths |= set(re.findall(r"(?<![\w./-])\w+\.(?:py|sh)\b(?!:)", text)) - {"my_scores.py"}
    modules = set(re.findall(rf"python -m ((?:{'|'.join(FOLDERS)})\.[\w.]*\w)", text))
    missing = {path for path in paths if not exists(path, document)}
    assert missing | {name for name in modules if not is_module(name)} == set()


def exists(path: str, document: str) -> bool:
    """Whether the path exists from the repository's root or, for a bare name, anywhere below the document's folder."""
    if (REPOSITORY / path).exists():
        return True
    return "/" not in path and any((REPOSITORY / document).parent.rglob(path))


def is_module(name: str) -> bool:
    path = REPOSITORY / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_to_a_file_and_a_heading(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (REPOSITORY / document).parent / path if path else REPOSITORY / document
        assert file.exists(), f"{document}: {target}"
        assert not anchor or anchor in anchors(file), f"{document}: {target}"


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", READMES)
def test_tree_lists_every_folder_and_nothing_else(document):
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text_of(document), re.DOTALL | re.MULTILINE)
    tree = next(block for block in blocks if block.startswith("train_ppo.py"))
    listed, parent = set(), ""
    for line in tree.splitlines():
        names = re.findall(r"[\w.]+[/\w]*/|[\w.]+\.\w+", line[:24])
        for name in names:
            listed.add(parent + name if line.startswith(" ") else name)
        if not line.startswith(" "):
            parent = names[0]
    missing = {path for path in listed if not (REPOSITORY / path).exists()}
    code = {folder for folder in FOLDERS if folder not in ("tests", "benchmarks", "experiments", "docs", "examples")}
    below = (path for folder in code for path in (REPOSITORY / folder).iterdir() if path.is_dir())
    folders = {f"{folder}/" for folder in FOLDERS}
    folders |= {f"{path.relative_to(REPOSITORY)}/" for path in below if path.name != "__pycache__"}
    assert missing | (folders - listed) == set()


def test_the_script_runs_all_tests():
    named = re.search(r"tests/\{([\w,]+)\}", text_of("tests/run.sh"))[1].split(",")
    assert sorted(named) == sorted({file.parent.name for file in (REPOSITORY / "tests").glob("*/test_*.py")})


def test_readme_is_short():
    text = text_of("README.md")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1300

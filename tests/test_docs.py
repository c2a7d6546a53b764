"""What README and docs name exists: folders, files, modules, names and flags."""

import ast
import re
from pathlib import Path

import pytest

import hf_genmod

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "hf_genmod"
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
]

# Of argparse, torchrun and accelerate.
FOREIGN_FLAGS = {"help", "num_processes", "nproc_per_node", "num_cpu_threads_per_process"}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text_of(page), flags=re.MULTILINE | re.DOTALL)


def tree(title: str) -> dict[str, str]:
    """The lines of the tree below a heading of README: what is said of each file or folder."""
    section = text_of(ROOT / "README.md").split(f"## {title}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^      (\S+) +(\S.*)$", section, flags=re.MULTILINE))


def test_the_tree_of_the_readme_names_every_folder_and_no_other():
    folders = {f"{file.parent.name}/" for file in PACKAGE.glob("*/__init__.py")}
    assert set(tree("The architecture")) == folders


def test_each_folder_imports_only_from_those_above_it_in_the_readme():
    order = [folder.rstrip("/") for folder in tree("The architecture")]
    for position, folder in enumerate(order):
        for file in (PACKAGE / folder).glob("*.py"):
            imported = re.findall(r"^\s*from (?:hf_genmod\.|\.\.)(\w+)[. ]", text_of(file), flags=re.MULTILINE)
            below = set(imported) & set(order[position + 1 :])
            assert not below, f"{file.name} of {folder} imports from {below}"


def test_the_files_of_equations_exist():
    files = tree("For the student")
    assert len(files) == 6
    for file in files:
        assert (PACKAGE / file).is_file(), file


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page):
    text = text_of(page)
    for link in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
    for path in re.findall(r"(?<![\w/.])(?:examples|benchmarks|docs|src|tests|model_cards)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for anchor in re.findall(r"benchmarks/README\.md#([\w-]+)", text):
        headings = re.findall(r"^#+ (.*)$", text_of(ROOT / "benchmarks/README.md"), flags=re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_the_code_of_a_page_imports_exists(page):
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if not isinstance(node, ast.ImportFrom) or node.module.split(".")[0] != "hf_genmod":
                continue
            defined = set(hf_genmod.__all__)
            if node.module != "hf_genmod":
                file = PACKAGE.joinpath(*node.module.split(".")[1:]).with_suffix(".py")
                statements = ast.parse(text_of(file)).body
                defined = {statement.name for statement in statements if hasattr(statement, "name")}
            for alias in node.names:
                assert alias.name in defined, f"{node.module} has no {alias.name}"


def test_flags_that_a_page_names_exist():
    flags = set(FOREIGN_FLAGS)
    for file in [*PACKAGE.rglob("*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(text_of(file))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                flags.add(node.target.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--"):
                flags.add(node.value[2:])
    for page in PAGES:
        own = {name for block in python_blocks(page) for name in re.findall(r"^    (\w+): ", block, re.MULTILINE)}
        named = set(re.findall(r"(?<![\w-])--([a-z]\w+)", text_of(page)))
        assert not named - flags - own, f"{page.name}: {named - flags - own}"

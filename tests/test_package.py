import ast
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_genmod

if sys.version_info >= (3, 11):
    import tomllib
else:  # that of pytest
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "hf_genmod"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, hf_genmod; print({'torch', 'diffusers', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_what_the_package_imports_is_installed_with_it():
    needed, left = set(), SETTINGS["project"]["dependencies"]
    while left:
        requirement = Requirement(left.pop())
        name = canonicalize_name(requirement.name)
        if name not in needed and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            needed.add(name)
            left += importlib.metadata.requires(name) or []
    on_demand = {"torch_fidelity", "trackio", "gradio", "starlette"}  # of extras
    known = {"hf_genmod", *sys.stdlib_module_names, *on_demand}
    known |= {file.stem for file in (ROOT / "examples").glob("*.py")}
    owners = importlib.metadata.packages_distributions()
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "examples").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.split(".")[0] for name in names} - known:
                assert needed & set(map(canonicalize_name, owners[name])), f"{file} imports {name}"


def test_every_public_name_is_there_and_documented():
    for name in hf_genmod.__all__:
        assert getattr(hf_genmod, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        hf_genmod.Trainr  # noqa: B018


def defined_in(node: ast.AST, prefix: str = "") -> set[str]:
    """The names of functions and classes below a node, those in a class also as `Class.name`."""
    names = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            of_class = f"{child.name}." if isinstance(child, ast.ClassDef) else ""
            names |= {child.name, prefix + child.name} | defined_in(child, of_class)
        else:
            names |= defined_in(child, prefix)
    return names


def test_the_equations_page_names_functions_that_exist():
    page = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and ".py" in line]
    assert len(rows) > 50
    for row in rows:
        cells = row.replace("\\|", "¦").split("|")
        links = re.findall(r"\[([^]]+)\]\(\.\./src/hf_genmod/([^)]+)\)", cells[3])
        names = cells[4].split("`")[1::2]
        assert links and names, row
        defined = {file: defined_in(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))) for _, file in links}
        for text, file in links:
            assert text == file and defined[file] & set(names), f"{file} has none of {names}"
        for name in names:
            assert name in set.union(*defined.values()), f"{name} is not in {list(defined)}"


def test_no_file_or_class_is_too_long_to_read():
    for file in PACKAGE.rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 400, file
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno < 300, f"{node.name} in {file}"


def test_every_example_tells_uv_what_it_needs():
    for file in (ROOT / "examples").glob("*.py"):
        header, script = file.read_text(encoding="utf-8").split("# ///\n")
        first, *lines = header.splitlines()
        assert first == "# /// script" and script.startswith('"""'), file
        needs = tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
        assert needs["requires-python"] == SETTINGS["project"]["requires-python"]
        assert needs["dependencies"] == [SETTINGS["project"]["name"]]
        assert (file.parent / needs["tool"]["uv"]["sources"]["hf_genmod"]["path"]).resolve() == ROOT


def test_the_repository_has_one_address():
    address = SETTINGS["project"]["urls"]["Homepage"]
    assert f"repo_url: {address}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"repository-code: {address}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_wheel_of_the_source_distribution_holds_every_module_and_the_type_marker(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "--outdir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("hf_genmod/")}
    sources = {path.relative_to(ROOT / "src") for path in PACKAGE.rglob("*")}
    sources |= {Path("hf_genmod") / path.relative_to(ROOT) for path in (ROOT / "examples").rglob("*")}
    sources |= {Path("hf_genmod") / path.relative_to(ROOT) for path in (ROOT / "course").glob("*.py")}
    assert packed == {path.as_posix() for path in sources if path.suffix and path.suffix != ".pyc"}

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hf_genmod

ROOT = Path(__file__).parents[1]


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, hf_genmod; print({'torch', 'diffusers', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_every_public_name_is_there_and_documented():
    for name in hf_genmod.__all__:
        assert getattr(hf_genmod, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        hf_genmod.Trainr  # noqa: B018


def test_the_equations_page_names_functions_that_exist():
    page = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")}
    rows = [line for line in page.splitlines() if line.startswith("| ") and ".py" in line]
    assert len(rows) > 15
    for row in rows:
        cells = row.replace("\\|", "¦").split("|")
        file = next(name for name in sources if name in cells[3])
        defined = {
            node.name
            for node in ast.walk(ast.parse(sources[file]))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }
        for name in cells[4].split("`")[1::2]:
            assert set(name.split(".")) <= defined, f"{name} in {file}"


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_the_type_marker(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("hf_genmod/")}
    assert packed == {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "hf_genmod").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }

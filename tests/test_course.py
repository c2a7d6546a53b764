"""The notebooks of the course: how they are laid out, their exercises, and that they run from top to bottom."""

import ast
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COURSE = ROOT / "course"
NOTEBOOKS = [pytest.param(file, id=file.stem) for file in sorted(COURSE.glob("*.ipynb"))]


def cells_of(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def python_of(cell: dict) -> str:
    """The code of a cell without the magics of IPython."""
    return re.sub(r"^(\s*)%.*$", r"\1pass", cell["source"], flags=re.MULTILINE)


def is_exercise(cell: dict) -> bool:
    return "exercise" in cell["metadata"].get("tags", [])


def function_of(cell: dict) -> str:
    """The name of the function that an exercise asks for."""
    (function,) = (node for node in ast.parse(python_of(cell)).body if isinstance(node, ast.FunctionDef))
    return function.name


def module_of(file: Path):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def solution_of(notebook: Path) -> Path:
    return COURSE / "solutions" / f"{notebook.stem}.py"


def names_in(code: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_layout(notebook):
    text, cells = notebook.read_text(encoding="utf-8"), cells_of(notebook)
    assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)  # no stored outputs
    assert len({cell["id"] for cell in cells}) == len(cells)
    address = f"colab.research.google.com/github/hf-genmod/hf_genmod/blob/main/course/{notebook.name}"
    assert cells[0]["source"].startswith("# ") and address in cells[0]["source"]
    assert code[0]["source"].startswith('import sys\n\nif "google.colab" in sys.modules:\n    %pip install ')
    for cell in code:
        ast.parse(python_of(cell))
        assert cell is code[0] or "%pip" not in cell["source"]
        assert max(map(len, cell["source"].splitlines())) <= 119, cell["id"]
    assert any("assert " in cell["source"] for cell in code)
    assert any("What goes wrong" in cell["source"] for cell in cells if cell["cell_type"] == "markdown")
    for figure in re.findall(r'show\(\w+, "([^"]+)"\)', text.replace('\\"', '"')):
        file = ROOT / "docs" / "images" / figure
        assert file.stat().st_size < 150_000, figure


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_links(notebook):
    """Functions that the text names exist, and so do the files that it links to."""
    for cell in cells_of(notebook):
        for link in re.findall(r"\]\((\.\./[^)#]+)", cell["source"]):
            assert (COURSE / link).exists(), link


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_exercises_fail_with_the_blank_and_pass_with_the_solution(notebook):
    """The check of the function `f` is `checks.f`; its solution is in the file of the notebook in course/solutions."""
    checks, solutions, cells = module_of(COURSE / "checks.py"), module_of(solution_of(notebook)), cells_of(notebook)
    exercises = [i for i, cell in enumerate(cells) if is_exercise(cell)]
    assert exercises
    code = "\n".join(python_of(cell) for cell in cells if cell["cell_type"] == "code")
    imports = [node for node in ast.parse(code).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    imports = [node for node in imports if getattr(node, "module", None) != "hf_genmod.course"]
    for i in exercises:
        name, namespace = function_of(cells[i]), {}
        exec(compile(ast.Module(imports, []), notebook.name, "exec"), namespace)
        exec(cells[i]["source"], namespace)
        with pytest.raises(AssertionError, match=r"\w+ \w+"):
            getattr(checks, name)(namespace[name])
        getattr(checks, name)(getattr(solutions, name))
        assert cells[i + 1]["source"] == f"checks.tell(checks.{name}, {name})"
        later = (python_of(cell) for cell in cells[i + 2 :] if cell["cell_type"] == "code")
        assert not any(name in names_in(code) for code in later), f"{name} is used below, where it may be blank"


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    """As it is, where exercises say "not yet", and with the solution of each put in after it, which is right."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    figures = Path(os.environ.get("COURSE_FIGURES", tmp_path)).resolve()
    monkeypatch.setenv("COURSE_FIGURES", str(figures))
    document, solution = nbformat.read(notebook, as_version=4), solution_of(notebook).read_text(encoding="utf-8")
    cells, expected = [], []
    for i, cell in enumerate(document.cells):
        cells.append(cell)
        if i > 0 and is_exercise(document.cells[i - 1]):
            cells += [nbformat.v4.new_code_cell(solution), nbformat.v4.new_code_cell(cell.source)]
            expected += [(cell, "not yet: "), (cells[-1], "right\n")]
    document.cells = cells
    nbclient.NotebookClient(document, timeout=600, resources={"metadata": {"path": COURSE}}).execute()
    for cell, beginning in expected:
        assert cell.outputs[0].text.startswith(beginning)
    shown = set(re.findall(r'show\(\w+, "([^"]+)"\)', notebook.read_text(encoding="utf-8").replace('\\"', '"')))
    assert all((figures / name).stat().st_size < 150_000 for name in shown)

"""A bundle is a module and its relative imports as one file that needs nothing beside it."""

import ast
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hf_genmod
from hf_genmod.checkpoints.bundle import bundle, bundle_of

PACKAGE = Path(hf_genmod.__file__).parent
MODULES = sorted(
    file for folder in ("models", "schedulers", "pipelines") for file in (PACKAGE / folder).glob("[!_]*.py")
)
SHIPPED = [
    name for name in hf_genmod.__all__
    if getattr(hf_genmod, name).__module__.split(".")[1] in ("models", "schedulers", "pipelines")
]  # fmt: skip


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.stem)
def test_imports_only_what_every_user_of_diffusers_has(file):
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "PIL", "diffusers", "transformers", "huggingface_hub"}
    of_adapters = {"peft", "safetensors"}  # imported when one is attached
    tree = ast.parse(bundle(file))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            modules = {name.split(".")[0] for name in names} - (set() if node in tree.body else of_adapters)
            assert modules <= allowed, f"line {node.lineno}"


def test_bundles_have_names_of_their_own():
    # The loader of diffusers copies all of them into one folder.
    names = [file.name for file in MODULES]
    assert len(SHIPPED) == 12 and len(set(names)) == len(names)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_class_runs_from_its_bundle_alone(name, tmp_path, monkeypatch):
    stem, source = bundle_of(getattr(hf_genmod, name))
    file = tmp_path / f"{stem}.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"diffusers_modules.{stem}", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    for installed in [other for other in sys.modules if other.split(".")[0] == "hf_genmod"]:
        monkeypatch.setitem(sys.modules, installed, None)  # neither found nor importable
    spec.loader.exec_module(module)
    assert getattr(module, name).__module__ == spec.name
    assert vars(getattr(module, name))["_bundle"] == (stem, source)


def test_no_name_is_undefined(tmp_path):
    for name in SHIPPED:
        stem, source = bundle_of(getattr(hf_genmod, name))
        (tmp_path / f"{stem}.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_pipeline_carries_what_its_kind_needs_and_no_more():
    sources = {name: bundle_of(getattr(hf_genmod, name))[1] for name in SHIPPED}
    assert len(sources["ClassifierFreeGuidedPipeline"].splitlines()) <= 1000
    assert "def load_lora_weights" not in sources["AutoencoderPipeline"]
    for name, source in sources.items():
        others = [other for other in SHIPPED if other != name and f"\nclass {other}(" in source]
        bases = [base.__name__ for base in inspect.getmro(getattr(hf_genmod, name))]
        assert set(others) <= set(bases), name


def write(folder, **modules):
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder / "top.py"


def run(source):
    names = {"__file__": __file__}
    exec(source, names)
    return names


def test_each_module_comes_once_after_those_it_needs(tmp_path):
    file = write(
        tmp_path,
        top='"""The top."""\nimport math\nfrom .left import l\nfrom .right import r\nvalue = l + r + math.e\n',
        left='"""Left."""\nfrom .base import b\nl = b + 1\n',
        right="import math\nfrom .base import (\n    b,\n)\n\nr = b + math.pi\n",
        base="import numpy as np\n\n# How it begins.\nb = np.float64(1)\n",
    )
    source = bundle(file)
    assert run(source)["value"] == 1 + 1 + 1 + 3.141592653589793 + 2.718281828459045
    assert ast.get_docstring(ast.parse(source)) == "The top."
    assert source.count("b = np.float64(1)") == source.count("import math") == source.count("# How it begins.") == 1


def test_only_what_is_needed_comes_along(tmp_path):
    file = write(
        tmp_path,
        top="from .a import f\n\n\nclass Top:\n    x = f()\n",
        a="import math\nimport json\nK = 3\ndef f() -> 'H': return g(K)\ndef g(k): return math.sqrt(k)\n"
        "def unused(): return json.dumps(K)\nclass H: pass\n",
    )
    source = bundle(file)
    assert run(source)["Top"].x == 3**0.5
    assert "unused" not in source and "json" not in source and "class H" in source


def test_imports_from_another_folder(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "here").mkdir()
    write(tmp_path / "other", a="x = 5\n")
    assert run(bundle(write(tmp_path / "here", top="from ..other.a import x\ny = x + 1\n")))["y"] == 6


@pytest.mark.parametrize(
    "modules, message",
    [
        ({"top": "from .a import f\ndef g(): pass\n", "a": "def f(): pass\ndef g(): pass\n"}, "'g' is defined"),
        ({"top": "from .a import f\nx, g = 1, 2\n", "a": "def f(): pass\ng: int = 3\n"}, "'g' is defined"),
        ({"top": "from .a import f\nfrom os import path\n", "a": "from sys import path\nf = 1\n"}, "'path' is os"),
        ({"top": "from .a import f\nimport numpy as n\n", "a": "import math as n\nf = 1\n"}, "'n' is numpy here"),
        ({"top": "from .a import f\nimport math\n", "a": "def math(): pass\nf = 1\n"}, "'math' is"),
        ({"top": "from .a import f\n", "a": "from .b import g\nf = 1\n", "b": "from .a import f\ng = 1\n"},
         "a.py: imports itself by way of top.py, a.py, b.py"),
        ({"top": "from .a import f as g\n", "a": "f = 1\n"}, "renames what it imports"),
        ({"top": "from . import a\n", "a": "f = 1\n"}, "or imports a module"),
        ({"top": "from .a import *\n", "a": "f = 1\n"}, "renames what it imports"),
        ({"top": "def g():\n    from .a import f\n", "a": "f = 1\n"}, "top.py, line 2: .* is left in the bundle"),
        ({"top": "try:\n    from .a import f\nexcept ImportError:\n    f = 2\n", "a": "f = 1\n"}, "line 2"),
        ({"top": "if True:\n    from .a import f\n", "a": "f = 1\n"}, "line 2"),
        ({"top": "import hf_genmod.errors\n"}, "line 1: 'import hf_genmod.errors' is left"),
        ({"top": "def g():\n    from hf_genmod.errors import first_line\n"}, "line 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_bundled_is_named(modules, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        bundle(write(tmp_path, **modules))

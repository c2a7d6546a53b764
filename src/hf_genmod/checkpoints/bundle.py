"""The source that a checkpoint carries: a module of this package and all that it imports relatively, as one file."""

import ast
import functools
import importlib
import inspect
from pathlib import Path

# Classes keep their source from the moment of import: a later load may overwrite the file, and execute it again.
CAPTURE = """for shipped in ({classes},):
    shipped._bundle = (Path(__file__).stem, Path(__file__).read_text(encoding="utf-8"))
"""


def bundle_of(cls: type) -> tuple[str, str]:
    """
    The file name, without its ending, and the source of the bundle that defines an installed class.

    Raises:
        ValueError: If the module of the class cannot be bundled.
    """
    module = importlib.import_module(cls.__module__)
    return module.__name__.rpartition(".")[2], bundle(Path(inspect.getfile(module)))


@functools.cache
def bundle(file: Path) -> str:
    """
    A module, below the modules that it imports relatively (each once, those it depends on first), with all absolute
    imports on top: a file that needs nothing beside it.

    Args:
        file (`Path`): The module.

    Raises:
        ValueError: If two modules define one name, a name is imported under two meanings, modules import each other
            in a circle, or a relative import stands anywhere but at the top level of a module, or renames what it
            imports.
    """
    parts, imports, meanings = {}, {("pathlib", "Path")}, {"Path": "pathlib.Path", "shipped": "the class"}
    _collect(file, (), parts, imports, meanings)
    docstring, own = parts.pop(file)
    pieces = [f"# ---- {path.parent.name}/{path.name} ----\n\n{text}" for path, (_, text) in parts.items()]
    pieces.append(f"# ---- {file.parent.name}/{file.name} ----\n\n{own}")
    head = f'"""{docstring}"""\n\n' + "\n".join(_import_lines(imports)) + "\n"
    classes = [node.name for node in ast.parse(own).body if isinstance(node, ast.ClassDef)]
    end = [CAPTURE.format(classes=", ".join(classes))] if classes else []
    return "\n\n".join([head, *pieces, *end])


def _collect(
    file: Path, above: tuple[Path, ...], parts: dict, imports: set[tuple[str, str]], meanings: dict[str, str]
) -> None:
    """Adds a module to `parts`, after all that it imports relatively."""
    if file in above:
        raise ValueError(f"{file.name}: imports itself by way of {', '.join(path.name for path in above)}")
    if file in parts:
        return
    source = file.read_text(encoding="utf-8")
    tree, lines, removed = ast.parse(source), source.splitlines(), set()

    def means(name, meaning):
        if meanings.setdefault(name, meaning) != meaning:
            raise ValueError(f"{file.name}: {name!r} is {meaning} here and {meanings[name]} elsewhere in the bundle")

    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            removed |= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.module is None or any(alias.asname or alias.name == "*" for alias in node.names):
                raise ValueError(f"{file.name}: {ast.unparse(node)!r} renames what it imports, or imports a module")
            imported = file.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
            _collect(imported, (*above, file), parts, imports, meanings)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                imports.add((node.module if prefix else "", ast.unparse(alias)))
                means(alias.asname or alias.name.split(".")[0], prefix + alias.name if prefix or alias.asname else "")
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            means(node.name, f"defined in {file}")
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)):
                means(name.id, f"defined in {file}")
    _refuse_hidden_imports(file, tree)
    docstring = ast.get_docstring(tree, clean=False) or ""
    if docstring:
        removed |= set(range(tree.body[0].lineno, tree.body[0].end_lineno + 1))
    text = "\n".join(line for number, line in enumerate(lines, 1) if number not in removed).strip("\n")
    parts[file] = (docstring, text + "\n")


def _import_lines(imports: set[tuple[str, str]]) -> list[str]:
    """The import statements of pairs (module, name), where a module itself is ("", module)."""
    names = {module: [name for other, name in sorted(imports) if other == module] for module, _ in imports}
    plain = [f"import {name}" for name in names.pop("", [])]
    return plain + [f"from {module} import {', '.join(names[module])}" for module in sorted(names)]


def _refuse_hidden_imports(file: Path, tree: ast.Module) -> None:
    """Raises for an import of this package that is not relative and at the top level."""
    for node in ast.walk(tree):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        relative = isinstance(node, ast.ImportFrom) and node.level > 0 and node not in tree.body
        if relative or any(name.split(".")[0] == "hf_genmod" and not getattr(node, "level", 0) for name in modules):
            raise ValueError(
                f"{file.name}, line {node.lineno}: {ast.unparse(node)!r} is left in the bundle; import relatively, at "
                "the top level of the module"
            )

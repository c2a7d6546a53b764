"""The source that a checkpoint carries: a module, and what it needs of the modules that it imports relatively, as one
file."""

import ast
import functools
import importlib
import inspect
from pathlib import Path
from typing import NamedTuple

# Classes keep their source from the moment of import: a later load may overwrite the file, and execute it again.
_CAPTURE = """for shipped in ({classes},):
    shipped._bundle = (Path(__file__).stem, Path(__file__).read_text(encoding="utf-8"))
"""


class _Statement(NamedTuple):
    """A statement at the top level of a module, with the comment above it."""

    file: Path
    text: str
    names: set[str]  # that it defines
    used: set[str]


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
    A module as a file that needs nothing beside it: the absolute imports, then the definitions that it needs of the
    modules that it imports relatively, directly or through others, then its own.

    Args:
        file (`Path`): The module.

    Raises:
        ValueError: If two of the modules define one name, a name is imported under two meanings, modules import each
            other in a circle, or a relative import stands anywhere but at the top level of a module, or renames what
            it imports.
    """
    statements, imports, meanings = [], {("pathlib", "Path")}, {"Path": "pathlib.Path", "shipped": "the shipped class"}
    _collect(file, (), statements, imports, meanings)
    needed = [statement for statement in statements if statement.file == file]
    known = {name: statement for statement in statements for name in statement.names}
    for statement in needed:  # which grows meanwhile
        needed += [known[name] for name in sorted(statement.used & set(known)) if known[name] not in needed]
    used = set().union({"Path"}, *(statement.used for statement in needed))

    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")), clean=False) or ""
    parts, last = [f'"""{docstring}"""\n\n' + "\n".join(_import_lines(imports, used))], None
    for statement in statements:
        if statement in needed:
            title = f"# ---- {statement.file.parent.name}/{statement.file.name} ----\n\n"
            parts.append((title if statement.file != last else "") + statement.text)
            last = statement.file
    classes = [name for name, meaning in meanings.items() if meaning == f"a class of {file}"]
    if classes:
        parts.append(_CAPTURE.format(classes=", ".join(classes)))
    return "\n\n\n".join(parts).rstrip() + "\n"


def _collect(file: Path, above: tuple[Path, ...], statements: list[_Statement], imports: set, meanings: dict) -> None:
    """Appends the statements of a module to `statements`, after those of all modules that it imports relatively."""
    if file in above:
        raise ValueError(f"{file.name}: imports itself by way of {', '.join(path.name for path in above)}")
    if any(statement.file == file for statement in statements):
        return
    source = file.read_text(encoding="utf-8")
    tree, lines, end, own = ast.parse(source), source.splitlines(), 0, []

    def means(name, meaning):
        if meanings.setdefault(name, meaning) != meaning:
            raise ValueError(f"{file.name}: {name!r} is {meaning} here and {meanings[name]} elsewhere in the bundle")

    _refuse_hidden_imports(file, tree)
    for node in tree.body:
        start, end = end, node.end_lineno
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.module is None or any(alias.asname or alias.name == "*" for alias in node.names):
                raise ValueError(f"{file.name}: {ast.unparse(node)!r} renames what it imports, or imports a module")
            imported = file.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
            _collect(imported, (*above, file), statements, imports, meanings)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                imports.add((module, ast.unparse(alias)))
                means(alias.asname or alias.name.split(".")[0], f"{module}.{alias.name}" if module else alias.name)
        elif node is not tree.body[0] or not ast.get_docstring(tree):
            names = _defined(node)
            for name in names:
                means(name, f"a class of {file}" if isinstance(node, ast.ClassDef) else f"defined in {file}")
            own.append(_Statement(file, "\n".join(lines[start:end]).strip("\n"), names, _used(node)))
    statements += own


def _defined(node: ast.stmt) -> set[str]:
    """The names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}


def _used(node: ast.stmt) -> set[str]:
    """The names that a statement uses, also in annotations that are strings."""
    constants = [x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str)]
    return {x.id for x in ast.walk(node) if isinstance(x, ast.Name)} | set(constants)


def _import_lines(imports: set[tuple[str, str]], used: set[str]) -> list[str]:
    """The import statements of pairs (module, name), those whose name is used; a module itself is ("", module)."""
    needed = sorted(pair for pair in imports if pair[1].split(" as ")[-1].split(".")[0] in used)
    modules = sorted({module for module, _ in needed if module})
    names = {module: ", ".join(name for other, name in needed if other == module) for module in modules}
    return [f"import {name}" for module, name in needed if not module] + [
        f"from {module} import {names[module]}" for module in modules
    ]


def _refuse_hidden_imports(file: Path, tree: ast.Module) -> None:
    """Raises for an import of this package that is not relative and at the top level."""
    for node in ast.walk(tree):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        is_relative = isinstance(node, ast.ImportFrom) and node.level > 0
        if any(name.split(".")[0] == "hf_genmod" for name in modules) or (is_relative and node not in tree.body):
            raise ValueError(
                f"{file.name}, line {node.lineno}: {ast.unparse(node)!r} is left in the bundle; import relatively, at "
                "the top level of the module"
            )

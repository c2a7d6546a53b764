"""Bundles: a module, and the definitions that it needs from the modules that it imports relatively, as one file."""

import ast
import functools
import inspect
import itertools
import re
from collections.abc import Iterator
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
    defined: set[str]  # names
    used: set[str]  # names, also in annotations that are strings


def bundle_of(cls: type) -> tuple[str, str]:
    """The file name, without its ending, and the bundle of the module of an installed class; see `bundle`."""
    file = Path(inspect.getfile(cls))
    return file.stem, bundle(file)


@functools.cache
def bundle(file: Path) -> str:
    """
    A module as a file that needs nothing beside it: the absolute imports, then the definitions that it needs of the
    modules that it imports relatively, directly or through others, then its own.

    Raises:
        ValueError: If two of the modules define one name, a name is imported under two meanings, modules import each
            other in a circle, or a relative import stands anywhere but at the top level of a module, or renames what
            it imports.
    """
    statements, imports, meanings = [], {("pathlib", "Path")}, {"Path": "pathlib.Path", "shipped": "the shipped class"}
    _collect(file, (), statements, imports, meanings)
    needed = [statement for statement in statements if statement.file == file]
    known = {name: statement for statement in statements for name in statement.defined}
    for statement in needed:  # which grows meanwhile
        needed += [known[name] for name in statement.used & set(known) if known[name] not in needed]
    used = set().union({"Path"}, *(statement.used for statement in needed))

    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")), clean=False) or ""
    parts, last = [f'"""{docstring}"""\n\n' + "\n".join(_import_lines(imports, used))], None
    for statement in statements:
        if statement in needed:
            title = f"# ---- {statement.file.parent.name}/{statement.file.name} ----\n"
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
    source = _without_what_is_skipped(file.read_text(encoding="utf-8"))
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
            names = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
            defined = {name.id for name in names if isinstance(name.ctx, ast.Store)}
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined = {node.name}
            for name in defined:
                means(name, f"a class of {file}" if isinstance(node, ast.ClassDef) else f"defined in {file}")
            used = {name.id for name in names} | {x.value for x in ast.walk(node) if isinstance(x, ast.Constant)}
            own.append(_Statement(file, "\n".join(lines[start:end]).strip("\n"), defined, used))
    statements += own


def _without_what_is_skipped(source: str) -> str:
    """The source of a module without its blocks `if IS_INSTALLED ...`, which a file in a checkpoint never enters."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and "IS_INSTALLED" in ast.unparse(node.test):
            lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line for line in lines if line is not None)


def _import_lines(imports: set[tuple[str, str]], used: set[str]) -> Iterator[str]:
    """The import statements of pairs (module, name), those whose name is used; a module itself is ("", module)."""
    needed = sorted(pair for pair in imports if pair[1].split(" as ")[-1].split(".")[0] in used)
    for module, pairs in itertools.groupby(needed, key=lambda pair: pair[0]):
        yield (f"from {module} " if module else "") + f"import {', '.join(name for _, name in pairs)}"


def _refuse_hidden_imports(file: Path, tree: ast.Module) -> None:
    """Raises for an import of this package that is not relative and at the top level."""
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else ""
        if re.search(r"\bhf_genmod\b", text) or (text.startswith("from .") and node not in tree.body):
            raise ValueError(
                f"{file.name}, line {node.lineno}: {text!r} is left in the bundle; import relatively, at the top level"
            )

"""The docstrings of the source, which are in Hugging Face's dialect, and the help of its flags, for mkdocstrings."""

import ast
import re

import griffe

import hf_genmod

ADDRESSES = {name: f"hf_genmod.{module}.{name}" for name, module in hf_genmod._MODULES.items()}


class Dialect(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            text = re.sub(r"^(    \w+(?:,\s+\w+)*) \((.*)\):(?=\s)", _typed, obj.docstring.value, flags=re.M)
            text = re.sub(r"\[`~?([\w.]+)`\]", _link, text)
            obj.docstring.value = re.sub(
                r"^    (\w+(?:,\s+\w+)+)((?: \(.*\))?:\s(?:.*\n {8})*.*)", _each, text, flags=re.M
            )

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs) -> None:
        """A field that is a flag: `HfArg(default=0, help="...")`, or `changeable(0, help="...")`."""
        if isinstance(attr.value, griffe.ExprCall):
            given = {getattr(argument, "name", "default"): argument for argument in attr.value.arguments}
            if "help" in given:
                attr.docstring = griffe.Docstring(ast.literal_eval(str(given["help"].value)), parent=attr)
                default = given.get("default", given.get("default_factory"))
                attr.value = getattr(default, "value", default)


def _typed(entry: re.Match) -> str:
    """`name (`type`, *optional*, defaults to 1)` with the type alone; the signature has the default."""
    kind = re.sub(r"(^|, )\*optional\*|, defaults to .*", "", entry[2])
    kind = re.sub(r"\[?`~?([^`]*)`\]?", r"\1", kind)
    return f"{entry[1]} ({kind}):" if kind else f"{entry[1]}:"


def _link(name: re.Match) -> str:
    """[`Trainer`] as a link, if the API has a page for it, and [`~module.name`] without the brackets."""
    short = name[1].rsplit(".", 1)[-1]
    return f"[`{short}`][{ADDRESSES[short]}]" if short in ADDRESSES else f"`{short}`"


def _each(entry: re.Match) -> str:
    """`a, b (type): text` as an entry for each of the names."""
    return "\n".join(f"    {name}{entry[2]}" for name in re.split(r",\s+", entry[1]))

"""The settings of a page: their ranges, and their check, wherever a value comes from."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from numbers import Real

MOST_CHARACTERS = 500  # of a text


@dataclasses.dataclass(frozen=True)
class Setting:
    """
    One setting of a page.

    Args:
        name (`str`): Its name in the URL of the page.
        label (`str`): What the page calls it.
        default (`int`, `float` or `str`): Its value at first, which says what kind of setting it is.
        low, high (`int` or `float`): The range of a number, both ends included.
        step (`float`): The step of a slider.
        choices (`tuple[str]`): The values of a choice.
        info (`str`): A line below the label.
    """

    name: str
    label: str
    default: int | float | str
    low: float = 0
    high: float = 0
    step: float = 1
    choices: tuple[str, ...] = ()
    info: str | None = None

    def checked(self, value) -> int | float | str:
        """
        The value as a number or text.

        Args:
            value: What somebody has sent, of any type. `None` stands for the default.

        Raises:
            ValueError: If it is of another kind, out of its range, or none of the choices.
        """
        if value is None:
            return self.default
        if isinstance(self.default, str):
            return self._chosen(value) if self.choices else self._text(value)
        try:
            number = float(value) if isinstance(value, Real | str) and not isinstance(value, bool) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        is_whole = isinstance(self.default, int)
        if not self.low <= number <= self.high or (is_whole and number != round(number)):
            kind = "a whole number" if is_whole else "a number"
            raise ValueError(f"{self.label}: {shown(value)} is not {kind} from {self.low:g} to {self.high:g}")
        return round(number) if is_whole else number

    def _text(self, value) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{self.label}: {shown(value)} is no text")
        if len(value) > MOST_CHARACTERS:
            raise ValueError(f"{self.label}: {len(value):,} characters; give up to {MOST_CHARACTERS}")
        return value

    def _chosen(self, value) -> str:
        if isinstance(value, str) and value in self.choices:
            return value
        close = difflib.get_close_matches(value[:100], self.choices, n=1) if isinstance(value, str) else []
        known = ", ".join(self.choices[:10]) + ", ..." * (len(self.choices) > 10)
        hint = f"did you mean {close[0]}?" if close else f"it is one of {known}"
        raise ValueError(f"{self.label}: {shown(value)} is not there; {hint}")


def shown(value) -> str:
    """A value of any type in a message: its first characters."""
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:40]}..."


def checked_values(settings: Iterable[Setting], values: Mapping) -> dict:
    """All settings by their names; those that are missing have their defaults. Raises `ValueError` about the first
    value that does not fit."""
    return {setting.name: setting.checked(values.get(setting.name)) for setting in settings}


def from_query(settings: Iterable[Setting], query: Mapping[str, str]) -> tuple[dict, list[str]]:
    """The settings in the URL of the page, as far as they fit, the others by their defaults; and what does not fit, a
    sentence each."""
    values, complaints = {}, []
    for setting in settings:
        try:
            values[setting.name] = setting.checked(query.get(setting.name))
        except ValueError as error:
            values[setting.name] = setting.default
            complaints.append(str(error))
    return values, complaints

"""Numbers as reports write them: typographic signs, fixed decimals, – for what is not known; and
the pages that are filled with them."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

NONE = "–"


def number(value: float | None, digits: int = 4) -> str:
    """A number with fixed decimals, whole numbers with thousands separators; – when absent."""
    if value is None:
        return NONE
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 4) -> str:
    """A difference with its sign; one that rounds to zero carries none."""
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return NONE if value is None else f"{number(100.0 * value, digits)} %"


def p_text(value: float) -> str:
    """A p-value without false precision."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.{3 if value < 0.1 else 2}f}"


def duration(seconds: float | None) -> str:
    """Seconds as hours, minutes and seconds."""
    if seconds is None:
        return NONE
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def page_template(path: Path) -> Template:
    """A page's template: every value escaped, the formats of this module as filters, and an error
    for a name that it is not given."""
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number, signed=signed, percent=percent, duration=duration, p_text=p_text
    )
    return environment.get_template(path.name)

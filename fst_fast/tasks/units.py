"""Numbers with units as they stand in LaTeX or in plain text, and their conversion by pint.

Units are hostile text: only names, small whole powers and one level of brackets are handed to pint, which would
compute 10**10**10 for as long as it takes.
"""

from __future__ import annotations

import math
import re
import threading
from functools import cache, lru_cache
from typing import Any

LOCK = threading.Lock()  # pint's registry is not for several threads
LONGEST_UNIT = 80  # characters
MANTISSA = r"[-+]? ?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
POWER = r"10 ?(?:\^|\*\*) ?\{? ?(?P<power>[-+]?[0-9]{1,4}) ?\}?"
NUMBER = re.compile(
    rf"(?P<sign>[-+]?) ?{POWER.replace('power', 'bare')}"
    rf"|(?P<mantissa>{MANTISSA})(?:[eE](?P<e>[-+]?[0-9]{{1,4}})(?![0-9])| ?(?:\\times|\\cdot|\*|x) ?{POWER})?"
)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
PLAIN = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "μ": "µ", "{,}": ",", "\xa0": " ", "~": " ",
    "$": "",
}  # fmt: skip
FONT = re.compile(r"\\(?:text|mathrm|textrm|textbf|mathbf|operatorname|rm|unit|si)(?![a-zA-Z])")
SIGNS = [
    (re.compile(r"\^? ?\{? ?\\circ ?\}? ?\{? ?([CF])(?![a-zA-Z])|[°º] ?([CF])(?![a-zA-Z])"), r" deg\1\2 "),
    (re.compile(r"\^? ?\{? ?\\circ ?\}?|[°º]"), " degree "),
    (re.compile(r"\\?%"), " percent "),
    (re.compile(r"\\AA|[ÅÃ]"), " angstrom "),
    (re.compile(r"\\ohm|\\Omega|[ΩΩ]"), "ohm "),
    (re.compile(r"\\mu|\\micro"), "µ"),
    (re.compile(r"\\hbar|ℏ|ħ"), " hbar "),
    (re.compile(r"\\times|\\cdot|\*(?!\*)"), " * "),
    (re.compile(r"\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}"), r"(\1)/(\2)"),
    (re.compile(r"(?i)(?<![a-z])per(?![a-z])"), "/"),
]
NAMES = {
    "b": "barn", "u": "amu", "a.u.": "hartree", "sec": "second", "secs": "second", "hr": "hour", "hrs": "hour",
    "deg": "degree", "degrees": "degree", "Angstrom": "angstrom", "yr": "year", "amp": "ampere", "amps": "ampere",
}  # fmt: skip
TOKEN = re.compile(
    r" *(?:(?P<name>[A-Za-zµ]{1,24})|(?P<power>(?:\^|\*\*) ?-?[0-9]{1,2}(?![0-9]))|(?P<sign>[*/()]|1(?=/)))"
)


def plain(text: str) -> str:
    """One spelling for signs and spaces that have several."""
    text = re.sub(r"10([⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)", lambda m: f"10^{{{m[1].translate(SUPERSCRIPTS)}}}", text)
    text = re.sub(r"[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: f"^{m[0].translate(SUPERSCRIPTS)}", text)
    for sign, spelling in PLAIN.items():
        text = text.replace(sign, spelling)
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-zA-Z])", "", text)
    text = re.sub(r"(?<!\\)\\[ ,;:!]", " ", text)
    return " ".join(text.split())


def number(text: str) -> tuple[float, str] | None:
    """The number at the start of a `plain` text and the rest of the text; None when there is none, or no finite one."""
    m = NUMBER.match(text)
    if not m:
        return None
    if m["bare"]:
        value = float(f"{m['sign']}1e{m['bare']}")
    else:
        value = float(f"{m['mantissa'].replace(',', '').replace(' ', '')}e{m['e'] or m['power'] or 0}")
    return (value, text[m.end() :].strip()) if math.isfinite(value) else None


def half_digit(text: str) -> float:
    """Half a unit of the last decimal that a number is written with; 0 for one without decimals."""
    m = NUMBER.match(text)
    decimals = len(m["mantissa"].partition(".")[2]) if m and m["mantissa"] else 0
    if not m or not decimals:
        return 0.0
    return 0.5 * 10.0 ** (int(m["e"] or m["power"] or 0) - decimals)


@lru_cache(10_000)
def unit_of(text: str) -> str | None:
    """A unit as pint writes it, "" for none; None when the text is no unit that pint knows."""
    text = re.sub(r"\{ ?\{([^{}]*)\} ?\}", r"{\1}", FONT.sub("", plain(text)))
    if len(text) > LONGEST_UNIT:
        return None
    for sign, spelling in SIGNS:
        text = sign.sub(spelling, text)
    text = re.sub("µ +(?=[A-Za-z])", "µ", text.replace("{", "").replace("}", " ")).strip(" .")
    if text in ("", "None", "none", "1"):
        return ""
    factors = _factors(text)
    if factors is None:
        return None
    with LOCK:
        product = _registry().dimensionless
        for name, power in factors:
            known = _known(name)
            if known is None:
                return None
            product *= known**power
        return str(product)


def _factors(text: str) -> list[tuple[str, int]] | None:
    """The names of a product with their powers; None when it is malformed. J/kg K is J/(kg K), J/kg*K is (J/kg) K."""
    found: list[tuple[str, int]] = []
    place, last, outer, sign = 0, "", 1, 1  # `outer`: the sign of powers around the bracket
    opened, closed = -1, 0  # where the bracket's names begin in `found`
    while place < len(text):
        m = TOKEN.match(text, place)
        if not m:
            return None
        place, complete = m.end(), last in ("name", "power", ")")
        if m["name"]:
            found.append((m["name"], sign))
            last = "name"
        elif m["power"]:
            start = {"name": len(found) - 1, ")": closed}.get(last)
            if start is None:
                return None
            power = int(m["power"].lstrip("^* "))
            found[start:] = [(name, p * power) for name, p in found[start:]]
            last = "power"
        elif m["sign"] == "1" and not last:
            last = "name"
        elif m["sign"] == "(" and opened < 0:
            opened, outer, last = len(found), sign, "("
        elif m["sign"] == ")" and opened >= 0 and complete:
            opened, closed, outer, sign, last = -1, opened, 1, outer, ")"
        elif m["sign"] in ("*", "/") and complete:
            sign, last = (-outer if m["sign"] == "/" else outer), m["sign"]
        else:
            return None
    return found if last in ("name", "power", ")") and opened < 0 else None


@lru_cache(10_000)
def convert(value: float, unit: str, wanted: str) -> float | None:
    """`value` in another unit, both as of `unit_of`; None when they do not measure the same thing."""
    import pint

    try:
        with LOCK:
            return float(_registry().Quantity(value, unit).to(wanted).magnitude)
    except (pint.PintError, ArithmeticError, ValueError):
        return None


@lru_cache(10_000)
def _known(name: str) -> Any | None:
    """pint's unit of this name, or None."""
    import pint

    for spelling in (NAMES.get(name, name), name.lower()):  # "Joules"
        try:
            return _registry().Unit(spelling)
        except (pint.PintError, ValueError):
            continue
    return None


@cache
def _registry() -> Any:
    import pint

    return pint.UnitRegistry()

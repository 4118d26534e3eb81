"""JSON values in free text: the last object that names a key, and where two values differ. The text is hostile."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

LONGEST = 20_000  # characters of a response that are read, from its end
TRIES = 100  # objects in it that begin and cannot be read, after which no more are looked for; those that are to
# be read as Python count ten times
DEEPEST = 100  # levels a value may have
NOISE = 1e-9  # relative error that floating-point arithmetic may leave in a number that should be equal
ROUNDED = 0.005 + 1e-9  # the largest error of a number rounded to two decimals
SHOWN = 200  # characters of a value that a sentence quotes


class NotJson(ValueError):
    """Why a text is no value: one clause."""


def last_object(response: str, key: str) -> Any:
    """The value of `key` in the last JSON object of `response` that has it; objects within objects do not count.

    Read as JSON, with line ends in texts, NaN and Infinity; or else, where it begins with the key, as Python writes it,
    {'a': (1, True,)}, or without quotes around names; also with LaTeX's escaped braces. NotJson: there is none, or the
    last one is no answer, because it names a key twice, has a number that no double can hold, or is nested too deeply.
    """
    response = response[-LONGEST:]
    found = [o for o in _objects(response, key) if _names(o, key)]
    if not found and "\\{" in response:
        found = [o for o in _objects(response.replace("\\{", "{").replace("\\}", "}"), key) if _names(o, key)]
    if not found:
        raise NotJson(f'there is no JSON object with the key "{key}" in the answer')
    if isinstance(found[-1], NotJson):
        raise found[-1]
    value = found[-1][key]
    if _deeper(value, DEEPEST):
        raise NotJson(f"the answer is nested more than {DEEPEST} levels deep")
    return value


def difference(found: Any, expected: Any, tolerance: float, at: str = "") -> str:
    """Where and how `found` differs from `expected`, in one clause; "" when it does not.

    Numbers are equal by value (2 is 2.0), never to a text or a truth value. Integers are exact. Where a float is
    expected, a number may be off by `tolerance` of it, and by half a hundredth, as if it were rounded. NaN is NaN.
    """
    place = f" at {at}" if at else ""
    if isinstance(expected, bool) or expected is None or isinstance(found, bool) or found is None:
        return "" if found is expected else _other(found, expected, place)
    if isinstance(expected, int | float) and isinstance(found, int | float):
        return "" if _close(found, expected, tolerance) else _other(found, expected, place)
    if type(found) is not type(expected):
        return f"{_kind(found)} {shown(found)} where {_kind(expected)} {shown(expected)} is expected{place}"
    if isinstance(expected, dict):
        if missing := [k for k in expected if k not in found]:
            return f"the key {shown(missing[0])} is missing{place}"
        if extra := [k for k in found if k not in expected]:
            return f"there is no key {shown(extra[0])}{place}"
        return _first(difference(found[k], expected[k], tolerance, f"{at}[{shown(k)}]") for k in expected)
    if isinstance(expected, list):
        if len(found) != len(expected):
            return f"{len(found)} items where {len(expected)} are expected{place}: {shown(found)}"
        pairs = zip(found, expected, strict=True)
        return _first(difference(f, e, tolerance, f"{at}[{i}]") for i, (f, e) in enumerate(pairs))
    return "" if found == expected else _other(found, expected, place)


def shown(value: Any) -> str:
    """The value as JSON in ASCII, cut in the middle when it is long."""
    text = json.dumps(value)
    half = SHOWN // 2
    return text if len(text) <= SHOWN else f"{text[:half]} ... {text[-half:]}"


def _close(found: float, expected: float, tolerance: float) -> bool:
    if isinstance(expected, int) or not math.isfinite(expected):
        return found == expected or (math.isnan(expected) and math.isnan(found))
    if (isinstance(found, int) and abs(found) > 2**1023) or not math.isfinite(found):
        return False
    if math.isclose(found, expected, rel_tol=NOISE, abs_tol=1e-12):
        return True
    return abs(found - expected) <= min(tolerance * abs(expected), ROUNDED)


def _other(found: Any, expected: Any, place: str) -> str:
    return f"{shown(found)} where {shown(expected)} is expected{place}"


def _kind(value: Any) -> str:
    for kind, name in ((str, "the text"), (list, "the list"), (dict, "the object")):
        if isinstance(value, kind):
            return name
    return "the number"


def _first(clauses: Iterable[str]) -> str:
    return next((c for c in clauses if c), "")


def _deeper(value: Any, levels: int) -> bool:
    row = [value]
    for _ in range(levels):
        row = [child for v in row if isinstance(v, list | dict) for child in (v.values() if isinstance(v, dict) else v)]
    return bool(row)


def _names(found: Any, key: str) -> bool:
    return isinstance(found, NotJson) or key in found


def _objects(text: str, key: str) -> list[Any]:
    """Every outermost object in `text`, in order; a NotJson for one that is no answer and yet could be one."""
    found: list[Any] = []
    position = tries = 0
    begins = re.compile(r"\{\s*(?:([\"']?)" + key + r"\1\s*:|([\"}]))")  # what else is in braces is no object
    while (match := begins.search(text, position)) and tries < TRIES:
        position = match.start()
        try:
            value, position = _DECODER.raw_decode(text, position)
            found.append(value)
            continue
        except NotJson as e:
            found.append(e)
            position = _closing(text, position)
            continue
        except (ValueError, RecursionError):
            tries += 1 if match[2] else 10
        end = position + 1 if match[2] else _closing(text, position)
        try:
            found.append(_DECODER.decode(_as_json(text[position:end])))
            position = end
        except NotJson as e:
            found.append(e)
            position = end
        except (ValueError, RecursionError):
            position += 1
    return found


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise NotJson("the answer names a key twice")
    return value


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise NotJson(f"{text[:40]} is larger than any number of the program")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_float=_float, strict=False)
_TOKEN = re.compile(  # a text that is not closed reaches to the end: no sign is read twice
    r"""\s+|"(?:[^"\\]|\\.)*+(?:"|\Z)|'(?:[^'\\]|\\.)*+(?:'|\Z)|[\[\](){},:]|[^\s\[\](){},:"']+|.""", re.DOTALL
)
_AS_JSON = {"(": "[", ")": "]", "True": "true", "False": "false", "None": "null", "nan": "NaN", "inf": "Infinity",
            "-inf": "-Infinity"}  # fmt: skip
_QUOTES = {"\\'": "'", '"': '\\"'}


def _closing(text: str, start: int) -> int:
    """Where the object that opens at `start` ends; the end of the text when it does not."""
    depth = 0
    for token in _TOKEN.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    return len(text)


def _as_json(text: str) -> str:
    """JSON for what Python would show; no JSON either where there is something else."""
    out: list[str] = []
    for token in _TOKEN.findall(text):
        token = _AS_JSON.get(token, token)
        if token[0] == "'":
            token = '"' + re.sub(r"\\.|\"", lambda m: _QUOTES.get(m[0], m[0]), token[1:-1], flags=re.DOTALL) + '"'
        elif token in ("]", "}") and out and out[-1] == ",":
            out.pop()
        elif token == ":" and out and out[-1][0] != '"':
            out[-1] = json.dumps(out[-1])  # a number or a name as a key
        if not token.isspace():
            out.append(token)
    return " ".join(out)

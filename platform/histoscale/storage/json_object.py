"""Small JSON objects that only our own files hold: read whole, or refused with a diagnosis."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from histoscale.errors import HistoscaleError
from histoscale.storage.store import Store

T = TypeVar("T")


def read_json(
    store: Store,
    key: str,
    decode: Callable[[Any], T],
    *,
    kind: type[HistoscaleError],
    what: str,
    expected: str,
    remedy: str,
) -> T:
    """What an object holds; see `decode_json`.

    Raises:
        HistoscaleError: Of class `kind`: the object is damaged, or of another form.
        StorageError: There is no such object, or it cannot be read.
    """
    return decode_json(store.get(key), decode, kind=kind, what=what, expected=expected, remedy=remedy)


def decode_json(
    data: bytes, decode: Callable[[Any], T], *, kind: type[HistoscaleError], what: str, expected: str, remedy: str
) -> T:
    """What the JSON text in `data` holds.

    Args:
        data: UTF-8.
        decode: From what `json.loads` gives to what is wanted. Where the values are of another form it raises
            ValueError, TypeError, AttributeError or LookupError, as Python does by itself for most of them.
        kind: Class of the error.
        what: What is wrong, as in every diagnosis, and `expected` and `remedy` likewise.
        expected: See above.
        remedy: See above.

    Raises:
        HistoscaleError: Of class `kind`. Its value says in which way the text is damaged, and nothing of the text.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise kind(what, value=f"no JSON in {len(data)} bytes", expected=expected, remedy=remedy) from error
    try:
        return decode(values)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise kind(what, value="JSON of another form", expected=expected, remedy=remedy) from error


def text_of(value: object) -> str:
    """A value that must be text.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def count_of(value: object) -> int:
    """A value that must be a whole number of zero or more that 64 bits hold.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is out of bounds.
    """
    if type(value) is not int:  # a bool is an int, too
        raise TypeError("no whole number")
    if not 0 <= value < 2**63:
        raise ValueError("out of bounds")
    return value

"""Ids of slides and patients: keyed, so that nobody without the key can tell whether a record number is in an index."""

import hashlib
import hmac
import os
import re
import secrets

from histoscale.errors import SlideIndexError
from histoscale.storage import Store

KEY_VARIABLE = "HISTOSCALE_ID_KEY"
KEY_OBJECT = "id_key"


def slide_id(key: bytes, path: str) -> str:
    """Id of the slide at `path` relative to its root: first 32 hex digits of HMAC-SHA256 under `key`."""
    return hmac.new(key, path.encode(errors="surrogateescape"), hashlib.sha256).hexdigest()[:32]


def patient_id(key: bytes, patient: str) -> str:
    """Id of a patient under `key`, 32 hex digits; no slide of this key has the same."""
    return hmac.new(key, b"patient\0" + patient.encode(errors="surrogateescape"), hashlib.sha256).hexdigest()[:32]


def fingerprint(key: bytes, facts: str) -> bytes:
    """16 bytes that change with `facts`; as an id, they tell nothing of them to whom has not the key."""
    return hmac.new(key, b"fingerprint\0" + facts.encode(errors="surrogateescape"), hashlib.sha256).digest()[:16]


def index_key(protected: Store) -> bytes:
    """The id key of an index, made and stored in its protected part at the first call.

    The environment variable HISTOSCALE_ID_KEY, where set, decides what a new index gets, so that the indexes
    of two copies of an archive have the same ids.

    Raises:
        SlideIndexError: A key is not 64 hexadecimal digits, or the variable differs from the stored key.
    """
    text = os.environ.get(KEY_VARIABLE)
    wanted = None if text is None else _decode(text, f"the environment variable {KEY_VARIABLE} is not an id key")
    if not protected.exists(KEY_OBJECT):
        protected.put_if_absent(KEY_OBJECT, (wanted or secrets.token_bytes(32)).hex().encode())
    stored = _decode(
        protected.get(KEY_OBJECT).decode(errors="replace"), f"protected/{KEY_OBJECT} of the index is not an id key"
    )
    if wanted is not None and wanted != stored:
        raise SlideIndexError(
            f"{KEY_VARIABLE} is not the id key of this index",
            expected=f"the content of protected/{KEY_OBJECT}, or the variable unset",
            remedy="unset it, or write the index to a new place",
        )
    return stored


def _decode(text: str, what: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text.strip()):
        # The value is a secret, so the message does not show it.
        raise SlideIndexError(what, expected="64 hexadecimal digits", remedy="make one: openssl rand -hex 32")
    return bytes.fromhex(text.strip())

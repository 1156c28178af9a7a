"""Who may ask what: bearer tokens with scopes, from a file (a mounted Secret) or the environment.

Tokens are kept and compared as digests, each with every known one, so that the time tells nothing of how much of a token was
right. Without tokens, and without identities (`serving.identity`), everybody who reaches the endpoint may ask: that is for
loopback.
"""

import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from components.errors import ConfigError, did_you_mean

TOKENS_FILE = "CLLMR_TOKENS_FILE"
TOKENS = "CLLMR_TOKENS"
MIN_LENGTH = 20  # characters; of random ones, far beyond guessing

TokenScope = Literal["score", "events", "admin"]
"""``score`` asks for answers, ``events`` writes what users did, ``admin`` does that too and asks for what is being served."""

_FORM = "One line each: the token, a space, its scopes with commas between: score, events, admin"


class Tokens:
    """Known tokens.

    Args:
        scopes: scopes by token.
    """

    def __init__(self, scopes: Mapping[str, frozenset[TokenScope]]) -> None:
        self._scopes = [(_digest(token), allowed) for token, allowed in scopes.items()]

    @property
    def are_needed(self) -> bool:
        """Whether anybody has to show one."""
        return bool(self._scopes)

    def scopes(self, token: str) -> frozenset[TokenScope]:
        """What a token allows; nothing if it is not known."""
        given, found = _digest(token), frozenset[TokenScope]()
        for digest, allowed in self._scopes:  # all of them, whichever fits
            if hmac.compare_digest(digest, given):
                found = allowed
        return found


def read_tokens(environment: Mapping[str, str] = os.environ) -> Tokens:
    """The tokens of the file that ``CLLMR_TOKENS_FILE`` names, or of ``CLLMR_TOKENS`` itself; none when neither is set.

    Raises ConfigError when they are set and cannot be read: an endpoint that was meant to be closed must not start open.
    """
    source, text = TOKENS, environment.get(TOKENS)
    if (path := environment.get(TOKENS_FILE)) is not None:
        source, text = f"{TOKENS_FILE}={path}", read_named(TOKENS_FILE, path, "tokens", "Secret")
    if text is None:
        return Tokens({})
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), start=1)]
    tokens = dict(
        _parsed(words, f"{source}, line {number}") for number, words in lines if words and not words[0].startswith("#")
    )
    if not tokens:
        raise ConfigError(f"{source} holds no token.", _FORM)
    return Tokens(tokens)


def _parsed(words: list[str], place: str) -> tuple[str, frozenset[TokenScope]]:
    """A token and its scopes; no error shows the token."""
    if len(words) != 2:
        raise ConfigError(f"{place}: {len(words)} words, expected a token and its scopes.", _FORM)
    token = words[0]
    if len(token) < MIN_LENGTH:
        raise ConfigError(
            f"{place}: a token of {len(token)} characters, at least {MIN_LENGTH} are needed.", "Make one: openssl rand -hex 32"
        )
    return token, read_scopes(words[1], place)


def read_named(variable: str, path: str, what: str, mounted: str) -> str:
    """The text of the file with `what`, which a variable names and a Kubernetes object brings; raises ConfigError."""
    if not path.strip():
        raise ConfigError(f"{variable} is set and empty.", f"Name the file with the {what}, or unset it.")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{variable}={path} cannot be read: {type(error).__name__}.", f"Mount the {mounted} there.") from None


def read_scopes(text: str, place: str) -> frozenset[TokenScope]:
    """Scopes with commas between; raises ConfigError naming the place where they stand."""
    names = text.split(",")
    for name in names:
        if name not in get_args(TokenScope):
            raise ConfigError(f"{place}: unknown scope '{name}'.", did_you_mean(name, get_args(TokenScope)))
    return frozenset(name for name in get_args(TokenScope) if name in names)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()

"""Tokens: read from a file or the environment, refused with the place and never the token, compared whole."""

import hmac
from pathlib import Path

import pytest

from components.errors import ConfigError
from serving import auth
from serving.auth import Tokens, read_tokens
from serving.callers import Callers, token
from serving.identity import Identities

READER, ADMIN = "r" * 20, "a" * 20


def test_tokens_of_a_file_come_before_those_of_the_environment_and_comments_and_empty_lines_are_none(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# shop\n\n{READER} score\n{ADMIN}  score,admin\n")
    tokens = read_tokens({"CLLMR_TOKENS_FILE": str(file), "CLLMR_TOKENS": "ignored"})
    assert tokens.scopes(READER) == {"score"}
    assert tokens.scopes(ADMIN) == {"score", "admin"}
    assert read_tokens({"CLLMR_TOKENS": f"{READER} admin"}).scopes(READER) == {"admin"}


@pytest.mark.parametrize("token", ["", READER[:-1], READER + "r", READER.upper(), "# shop", "\udcff", "ü" * 20])
def test_whatever_else_is_shown_allows_nothing(token: str) -> None:
    assert read_tokens({"CLLMR_TOKENS": f"{READER} score"}).scopes(token) == frozenset()


def test_a_token_is_compared_with_every_known_one_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    tokens = Tokens({READER: frozenset({"score"}), ADMIN: frozenset({"admin"})})
    assert tokens.scopes(READER) == {"score"}
    assert len(compared) == 2
    assert {len(side) for pair in compared for side in pair} == {32}  # digests: the length of a token tells nothing either


real = hmac.compare_digest


def test_without_tokens_nobody_needs_one() -> None:
    assert not read_tokens({}).are_needed
    assert read_tokens({"CLLMR_TOKENS": f"{READER} score"}).are_needed


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "CLLMR_TOKENS holds no token"),
        ("# nobody\n", "CLLMR_TOKENS holds no token"),
        (f"{READER}", "CLLMR_TOKENS, line 1: 1 words, expected a token and its scopes"),
        (f"\n{READER} score admin", "CLLMR_TOKENS, line 2: 3 words"),
        ("hunter2 score", "line 1: a token of 7 characters, at least 20 are needed.*openssl rand"),
        (f"{READER} scores", "line 1: unknown scope 'scores'.*Did you mean 'score'"),
    ],
)
def test_what_cannot_be_read_stops_the_endpoint_and_shows_no_token(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        read_tokens({"CLLMR_TOKENS": text})
    assert READER not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_file_that_is_not_there_stops_the_endpoint() -> None:
    with pytest.raises(ConfigError, match=r"CLLMR_TOKENS_FILE=/nowhere/tokens cannot be read: FileNotFoundError"):
        read_tokens({"CLLMR_TOKENS_FILE": "/nowhere/tokens", "CLLMR_TOKENS": f"{READER} score"})


@pytest.mark.parametrize("path", ["", " \n"])
def test_a_file_without_a_name_stops_the_endpoint(path: str) -> None:
    with pytest.raises(ConfigError, match=r"^CLLMR_TOKENS_FILE is set and empty\. Name the file"):
        read_tokens({"CLLMR_TOKENS_FILE": path})


@pytest.mark.parametrize(
    ("headers", "shown"),
    [
        ([(b"authorization", b"Bearer abc")], "abc"),
        ([(b"authorization", b"bearer  abc ")], "abc"),
        ([(b"host", b"x"), (b"authorization", b"Bearer a b")], "a b"),
        ([(b"authorization", b"Basic abc")], ""),
        ([(b"authorization", b"abc")], ""),
        ([(b"authorization", b"Bearer abc"), (b"authorization", b"Bearer abc")], ""),
        ([], ""),
    ],
)
def test_a_token_is_shown_once_as_a_bearers(headers: list[tuple[bytes, bytes]], shown: str) -> None:
    assert token(headers) == shown


def test_a_caller_is_known_by_token_and_identity_together_and_named_by_one() -> None:
    shop, cert = "spiffe://shop", [(b"x-forwarded-client-cert", b"Hash=0a;URI=spiffe://shop")]
    bearer = [(b"authorization", f"Bearer {READER}".encode())]
    callers = Callers(Tokens({READER: frozenset({"score"})}), Identities({shop: frozenset({"events"})}))
    assert callers.must_be_known
    assert callers.scopes({"headers": [*bearer, *cert]}) == {"score", "events"}
    assert callers.scopes({"headers": bearer}) == {"score"}
    assert callers.scopes({"headers": []}) == frozenset()
    assert callers.name({"headers": [*bearer, *cert]}) == shop
    assert callers.name({"headers": bearer}) == READER
    nobody = Callers()
    assert not nobody.must_be_known
    assert nobody.name({"headers": bearer, "client": ("10.0.0.7", 1)}) == "10.0.0.7"

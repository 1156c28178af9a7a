"""Identities that a proxy hands on: read from a file, found in the header as proxies write it, and in no other place."""

from pathlib import Path

import pytest

from components.errors import ConfigError
from serving.identity import Identities, read_identities

SHOP, SUBJECT = "spiffe://shop.example/ns/web/sa/api", 'CN=till 7,OU="Food, drink",O=Shop'
FILE = f"# who may ask\n\n{SHOP} score\n{SUBJECT} score,admin\nother.example events\n"


def identities(tmp_path: Path, text: str = FILE, header: str | None = None) -> Identities:
    file = tmp_path / "identities"
    file.write_text(text)
    given = {} if header is None else {"CLLMR_IDENTITY_HEADER": header}
    return read_identities({"CLLMR_IDENTITIES_FILE": str(file), **given})


def sent(*values: str, name: str = "x-forwarded-client-cert") -> list[tuple[bytes, bytes]]:
    return [(b"host", b"endpoint"), *((name.encode(), value.encode("latin-1")) for value in values)]


@pytest.mark.parametrize(
    ("value", "scopes"),
    [
        (f"By=spiffe://shop.example/ns/cllmr/sa/serve;Hash=0a1b;URI={SHOP}", {"score"}),
        (f'Hash=0a1b;Subject="CN=api";URI={SHOP}', {"score"}),
        (f"hash=0a1b;uri={SHOP}", {"score"}),
        ('Hash=0a1b;Subject="CN=till 7,OU=\\"Food, drink\\",O=Shop";URI=', {"score", "admin"}),
        ("Hash=0a1b;DNS=first.example;DNS=other.example", {"events"}),
        (f"Hash=0c;URI=spiffe://elsewhere,Hash=0a1b;URI={SHOP}", {"score"}),  # the nearest proxy's word counts
        (f"Hash=0c;URI={SHOP},Hash=0a1b;URI=spiffe://elsewhere", set()),
        (f'Hash=0c;Subject="x,URI={SHOP}"', set()),  # what a certificate's subject says is no identity of another kind
        (f'Hash=0c;Subject="x;URI={SHOP}"', set()),
        (f'Chain="x;URI={SHOP}"', set()),
        (f"By={SHOP};Hash=0a1b;URI=spiffe://elsewhere", set()),  # that is the proxy itself
        (f"URI={SHOP}/more", set()),
        (f"URI={SHOP.upper()}", set()),
        (
            f'URI={SHOP};X=",By=spiffe://gateway;Hash=0a1b;Subject="CN=stranger"',
            set(),
        ),  # a quote swallows the proxy's part
        (f"URI={SHOP};,Hash=0a1b", set()),
        (f"URI={SHOP},", set()),
        (SHOP, set()),
        ("", set()),
        ('"', set()),
        (",;=", set()),
    ],
)
def test_the_clients_identity_is_found_in_what_envoy_writes(tmp_path: Path, value: str, scopes: set[str]) -> None:
    assert identities(tmp_path).scopes(sent(value)) == scopes


def test_another_header_holds_the_identity_alone(tmp_path: Path) -> None:
    found = identities(tmp_path, header="SSL-Client-Subject-DN")
    assert found.known(sent(SUBJECT, name="ssl-client-subject-dn")) == SUBJECT
    assert found.scopes(sent(f"URI={SHOP}")) == set()
    assert found.scopes(sent(f"URI={SHOP}", name="ssl-client-subject-dn")) == set()


def test_a_header_that_comes_twice_names_nobody(tmp_path: Path) -> None:
    assert identities(tmp_path).scopes(sent(f"URI={SHOP}", f"URI={SHOP}")) == set()


def test_without_a_file_nobody_is_known_and_nobody_has_to_be() -> None:
    nobody = read_identities({"CLLMR_IDENTITY_HEADER": "x-client"})
    assert not nobody.are_needed
    assert nobody.scopes(sent(f"URI={SHOP}")) == set()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("# nobody\n", "holds no identity"),
        (f"{SHOP}\n", "line 1: 'spiffe://shop.example/ns/web/sa/api' alone, expected an identity and its scopes"),
        (f"\n{SHOP} scores\n", "line 2: unknown scope 'scores'.*Did you mean 'score'"),
    ],
)
def test_what_cannot_be_read_stops_the_endpoint(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        identities(tmp_path, text)
    with pytest.raises(ConfigError, match="CLLMR_IDENTITIES_FILE=/nowhere cannot be read: FileNotFoundError"):
        read_identities({"CLLMR_IDENTITIES_FILE": "/nowhere"})


@pytest.mark.parametrize("path", ["", " \n"])
def test_a_file_without_a_name_stops_the_endpoint(path: str) -> None:
    with pytest.raises(ConfigError, match=r"^CLLMR_IDENTITIES_FILE is set and empty\. Name the file"):
        read_identities({"CLLMR_IDENTITIES_FILE": path})

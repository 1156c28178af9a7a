"""Who a proxy says is asking: the identity of the client's certificate, where the proxy ends mutual TLS.

It hands it on in a header. Envoy and Istio write ``X-Forwarded-Client-Cert``, elements such as
``By=...;Hash=...;URI=spiffe://...;Subject="CN=..."``, the last of the proxy nearest to us; others write the name itself,
such as nginx's ``ssl-client-subject-dn``. Whoever reaches the endpoint past the proxy can write the header too: so nobody but
the proxy may reach it, and the proxy must overwrite what it is sent.
"""

import os
import re
from collections.abc import Iterable, Mapping

from components.errors import ConfigError
from serving.auth import TokenScope, read_named, read_scopes

IDENTITIES_FILE = "CLLMR_IDENTITIES_FILE"
IDENTITY_HEADER = "CLLMR_IDENTITY_HEADER"
FORWARDED_CERTIFICATE = "x-forwarded-client-cert"

_FORM = "One line each: the identity as the proxy writes it, a space, its scopes with commas between: score, events, admin"
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_PART = re.compile(rf"\s*(\w+)=({_QUOTED}|[^;,\"]*)\s*")
_END = re.compile(r"[;,]|$")
_OF_THE_CLIENT = ("uri", "dns", "subject")


class Identities:
    """Known identities.

    Args:
        scopes: scopes by identity.
        header: in which the proxy names them, lower case.
    """

    def __init__(self, scopes: Mapping[str, frozenset[TokenScope]], header: str = FORWARDED_CERTIFICATE) -> None:
        self._scopes, self._header = dict(scopes), header.encode()

    @property
    def are_needed(self) -> bool:
        """Whether anybody has to have one."""
        return bool(self._scopes)

    def known(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """The known identity that the proxy names, "" where it names none; a header that comes twice names nobody."""
        values = [value.decode("latin-1") for name, value in headers if name == self._header]
        names = _names(values[0], self._header.decode()) if len(values) == 1 else []
        return next((name for name in names if name in self._scopes), "")

    def scopes(self, headers: Iterable[tuple[bytes, bytes]]) -> frozenset[TokenScope]:
        """What the identity allows that the proxy names; nothing if it is not known."""
        return self._scopes.get(self.known(headers), frozenset())


def _names(value: str, header: str) -> list[str]:
    if header != FORWARDED_CERTIFICATE:
        return [value.strip()]
    names: list[str] = []
    at = 0
    while part := _PART.match(value, at):
        end = _END.match(value, part.end())
        if end is None:
            break
        if part[1].lower() in _OF_THE_CLIENT:
            names.append(_unquoted(part[2]))
        if not end[0]:
            return names
        names = [] if end[0] == "," else names
        at = end.end()
    return []  # where it cannot be read to its end, it is not known which part the proxy wrote


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if text.startswith('"') else text


def read_identities(environment: Mapping[str, str] = os.environ) -> Identities:
    """The identities of the file that ``CLLMR_IDENTITIES_FILE`` names, in the header ``CLLMR_IDENTITY_HEADER``; none without.

    Raises ConfigError when it is set and cannot be read: an endpoint that was meant to be closed must not start open.
    """
    header = environment.get(IDENTITY_HEADER, FORWARDED_CERTIFICATE).strip().lower()
    if (path := environment.get(IDENTITIES_FILE)) is None:
        return Identities({})
    source, text = f"{IDENTITIES_FILE}={path}", read_named(IDENTITIES_FILE, path, "identities", "ConfigMap")
    identities = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        identity, _, names = line.strip().rpartition(" ")  # a subject has spaces of its own
        if not identity.strip():
            raise ConfigError(f"{source}, line {number}: '{names}' alone, expected an identity and its scopes.", _FORM)
        identities[identity.strip()] = read_scopes(names, f"{source}, line {number}")
    if not identities:
        raise ConfigError(f"{source} holds no identity.", _FORM)
    return Identities(identities, header)

"""Who asks: known by a token (`serving.auth`) or by what a proxy says (`serving.identity`), or a stranger.

Asked for at the door (`serving.admission`), before anything is counted or read: nothing here looks further than the headers.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from starlette.types import Scope

from serving.auth import Tokens, TokenScope
from serving.identity import Identities


@dataclass(frozen=True)
class Callers:
    """Who is known here; everybody may ask where nobody is named."""

    tokens: Tokens = field(default_factory=lambda: Tokens({}))
    identities: Identities = field(default_factory=lambda: Identities({}))

    @property
    def must_be_known(self) -> bool:
        """Whether strangers are refused."""
        return self.tokens.are_needed or self.identities.are_needed

    def scopes(self, scope: Scope) -> frozenset[TokenScope]:
        """What the caller of a request may do, by its token and its identity together; a stranger may do nothing."""
        return self.tokens.scopes(token(scope["headers"])) | self.identities.scopes(scope["headers"])

    def name(self, scope: Scope) -> str:
        """What tells one caller from others: an identity, a token, or an address where nobody has to be known."""
        if not self.must_be_known:
            return str((scope.get("client") or ("",))[0])
        return self.identities.known(scope["headers"]) or token(scope["headers"])

    def wanted(self) -> tuple[str, str]:
        """What a stranger lacks and what to do about it."""
        if self.tokens.are_needed:
            return "this needs a token that is known here.", "Send it as: Authorization: Bearer TOKEN"
        return "this needs an identity that is known here.", "Ask through the proxy, with a client certificate."


def token(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The bearer token that was sent, "" without one or with more than one."""
    values = [value.decode("latin-1") for name, value in headers if name == b"authorization"]
    scheme, _, shown = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    return shown.strip() if scheme.lower() == "bearer" else ""

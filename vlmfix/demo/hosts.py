"""Which requests the demo answers: those that name it, not those of another web site's page.

A page of another site can send requests to any address that the visitor's browser reaches, also to
loopback, and by a name of its own that leads there (DNS rebinding) it could read the answers.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse

__all__ = ["OwnHosts"]

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


class OwnHosts:
    """ASGI middleware: 403 for requests to a name that is not the demo's, or from another site.

    An address as Host is always the demo's own: no foreign name can stand for it. Names have to be
    known: localhost, this machine's, that of the address it listens on, and those given. A request
    with an Origin must come from a page of the same host and port, or of a given name, since a
    proxy may put another Host into what it hands on.

    Args:
        app: what answers the others.
        host: the address that the server listens on.
        given: further host names.
    """

    def __init__(self, app: App, host: str, given: Iterable[str] = ()) -> None:
        self._app = app
        self._given = {name.lower() for name in given}
        self._names = {"localhost", socket.gethostname().lower(), host.lower(), *self._given}

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer, or refuse, one request."""
        if scope["type"] in ("http", "websocket") and (why := self._foreign(scope["headers"])):
            await PlainTextResponse(why, status_code=403)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _foreign(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """Why a request is refused; None if it is not."""
        values: dict[bytes, list[str]] = {b"host": [], b"origin": []}
        for key, value in headers:
            if key.lower() in values:
                values[key.lower()].append(value.decode("latin-1"))
        if len(values[b"host"]) != 1:
            return "vlmfix demo: a request needs one Host."
        (host,) = values[b"host"]
        name = _name(f"//{host}")
        if name not in self._names and not _is_address(name):
            return (
                "vlmfix demo: this is not one of its host names. Use its address, or start it with "
                "--allow-host NAME."
            )
        for origin in values[b"origin"]:
            same = origin.partition("://")[2].lower() == host.lower()
            if not same and _name(origin) not in self._given:
                return "vlmfix demo: it answers no requests from pages of other sites."
        return None


def _name(url: str) -> str:
    """The host of a URL in small letters; "" if there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

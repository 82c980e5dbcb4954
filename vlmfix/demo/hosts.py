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
    known: localhost, this machine's, and those given. A request with an Origin must come from a
    page of the same host and port, or of a known name.

    Args:
        app: what answers the others.
        names: further host names.
    """

    def __init__(self, app: App, names: Iterable[str] = ()) -> None:
        self._app = app
        self._names = {name.lower() for name in ("localhost", socket.gethostname(), *names)}

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
        if not self._own(f"//{host}", address=True):
            return (
                "vlmfix demo: this is not one of its host names. Use its address, or start it with "
                "--allow-host NAME."
            )
        for origin in values[b"origin"]:
            same = origin.partition("://")[2].lower() == host.lower()
            if not same and not self._own(origin, address=False):
                return "vlmfix demo: it answers no requests from pages of other sites."
        return None

    def _own(self, url: str, address: bool) -> bool:
        try:
            name = urlsplit(url).hostname or ""
        except ValueError:
            return False
        return name in self._names or (address and _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

"""The page, served to this machine alone: bound to 127.0.0.1, with a secret in the address.

    GET  /TOKEN/            the page, one file that loads nothing else
    GET  /TOKEN/task        the annotator's next task (?annotator=NAME)
    GET  /TOKEN/numbers     the tables of the panel
    POST /TOKEN/label       keeps a label, answers with the next task
    POST /TOKEN/undo        takes one back, answers likewise

Whatever lacks the token, or names another host (a page elsewhere whose name was pointed here), gets 403.
"""

import functools
import hmac
import json
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import parse_qs, urlsplit

from experiments.annotation.session import NotThere, Session

HERE = Path(__file__).resolve().parent
HOST = "127.0.0.1"
MOST_BYTES = 16_384  # of a request's body; a label says no text
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True)
class Reply:
    """What goes back."""

    status: int
    content: bytes
    type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


class Refused(Exception):
    """A request that is not served: a status and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


def make_server(session: Session, port: int, token: str | None = None) -> tuple[ThreadingHTTPServer, str]:
    """A server, to be started with `serve_forever`, and the address of its page. Port 0: a free one."""
    secret = secrets.token_urlsafe(24) if token is None else token
    try:
        server = _Server((HOST, port), functools.partial(_Handler, session=session, token=secret))
    except OSError as error:
        raise OSError(
            error.errno, f"port {port} cannot be had ({error.strerror}): give another --port, 0 for any"
        ) from error
    return server, f"http://{HOST}:{server.server_address[1]}/{secret}/"


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # an idle connection must not keep a stopped server alive
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints what went wrong, unless it is a window that was closed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "annotate", ""
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a silent connection is kept

    def __init__(self, *arguments: Any, session: Session, token: str) -> None:
        self.session, self.token = session, token
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self._serve(
            {
                "": lambda: _page(self.session),
                "task": lambda: _json(self.session.state(self._asked("annotator"))),
                "numbers": lambda: _json(self.session.numbers()),
            }
        )

    def do_POST(self) -> None:
        self._serve(
            {
                "label": lambda: _json(self.session.answer(self._body())),
                "undo": lambda: _json(self.session.undo(self._body())),
            }
        )

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the address holds the token."""

    def _serve(self, routes: Mapping[str, Any]) -> None:
        try:
            reply = routes[self._route(routes)]()
        except Refused as error:
            reply = _error(error.status, str(error))
        except NotThere as error:
            reply = _error(409, str(error))
        except ValueError as error:
            reply = _error(400, str(error))
        except OSError as error:
            reply = _error(507, f"nothing was saved: {error.strerror or error}")
        self._send(reply)

    def _route(self, routes: Mapping[str, Any]) -> str:
        """The name of the route asked for. Raises Refused for anything but a known one, asked by our own page."""
        port = self.server.server_address[1]  # pyright: ignore[reportIndexIssue]
        own = {f"{name}:{port}" for name in (HOST, "localhost")}
        if self.headers.get_all("Host", []) not in ([host] for host in own):
            raise Refused(403, "this server answers to its own address only")
        if self.headers.get("Origin", f"http://{HOST}:{port}") not in {f"http://{host}" for host in own}:
            raise Refused(403, "this server answers its own page only")
        given, _, route = urlsplit(self.path).path.removeprefix("/").partition("/")
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            raise Refused(403, "the address lacks its token: open the one that the program printed")
        if route not in routes:
            raise Refused(404, "there is nothing here")
        return route

    def _asked(self, name: str) -> str:
        return parse_qs(urlsplit(self.path).query).get(name, [""])[0]

    def _body(self) -> dict[str, Any]:
        """The JSON object that was sent."""
        if self.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
            raise Refused(415, "send JSON")  # which no form of another site can
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise Refused(411, "say how long the request is")
        if int(length) > MOST_BYTES:
            raise Refused(413, f"a request has at most {MOST_BYTES} bytes")
        try:
            found = json.loads(self.rfile.read(int(length)))
        except RecursionError:
            raise ValueError("send a JSON object, not one within another without end") from None
        if not isinstance(found, dict):
            raise ValueError("send a JSON object")
        return found

    def _send(self, reply: Reply) -> None:
        # After an error the body may be unread, and would be taken for the next request.
        self.close_connection = self.close_connection or reply.status >= 400
        self.send_response(reply.status)
        ours = [*HEADERS.items(), *reply.headers, ("Content-Type", reply.type)]
        for name, value in [*ours, ("Content-Length", str(len(reply.content)))]:
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(reply.content)


def _page(session: Session) -> Reply:
    """One file: markup, style and script, the latter two allowed by a number that is used once."""
    nonce = secrets.token_urlsafe(18)
    page = Template((HERE / "page.html").read_text("utf-8")).substitute(
        nonce=nonce,
        style=(HERE / "page.css").read_text("utf-8"),
        script=(HERE / "page.js").read_text("utf-8"),
        settings=_in_script({"annotator": session.annotator, "panel": session.panel}),
    )
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Reply(200, page.encode(), "text/html; charset=utf-8", (("Content-Security-Policy", policy),))


def _in_script(value: Any) -> str:
    """JSON that cannot end the script that it stands in."""
    return json.dumps(value).replace("<", "\\u003c")


def _json(value: Any) -> Reply:
    return Reply(200, json.dumps(value).encode())


def _error(status: int, why: str) -> Reply:
    return Reply(status, json.dumps({"error": why}).encode())

"""The page about runs that still train, served to this machine and made anew each time it is asked for."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from clusterssl.errors import UserError
from clusterssl.files import first_line
from clusterssl.report.page import render
from clusterssl.report.pictures import Gallery
from clusterssl.report.records import read_run


def server(
    runs: Sequence[Path], port: int = 0, seconds: int = 10,
    pictures: Callable[[], tuple[str, list[Gallery]]] = lambda: ("", []),
) -> HTTPServer:  # fmt: skip
    """A server on 127.0.0.1 that has to be started with `serve_forever`.

    Args:
        runs: run directories.
        port: 0 for any that is free; `server_port` tells it.
        seconds: after which the browser asks again.
        pictures: what is to be said of the galleries, and those that there are; asked for every page.

    Raises:
        UserError: a run directory is missing or empty, or the port is taken.
    """
    for path in runs:
        read_run(path)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/":
                self.send_error(404)
                return
            try:
                lead, galleries = pictures()
                page = render([read_run(path) for path in runs], lead=lead, galleries=galleries, seconds=seconds)
            except UserError as error:  # removed meanwhile
                again = f'<meta http-equiv="refresh" content="{seconds}">'
                page = f"<!DOCTYPE html>{again}<title>report</title><p>{html.escape(str(error))}</p>"
            body = page.encode("utf-8")
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nobody wants a line for every look."""

    try:
        return HTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UserError(f"--port {port}: cannot be used ({first_line(error)}); choose another") from error

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
from clusterssl.report.records import RunRecord, read_run


def present(runs: Sequence[Path]) -> tuple[list[RunRecord], dict[Path, str]]:
    """Runs that have written something, and what is wrong with the directories of others, in words."""
    found, missing = [], {}
    for path in runs:
        try:
            found.append(read_run(path))
        except UserError as problem:
            missing[path] = str(problem)
    return found, missing


def server(
    runs: Sequence[Path], port: int = 0, seconds: int = 10,
    pictures: Callable[[], tuple[str, list[Gallery]]] = lambda: ("", []),
) -> HTTPServer:  # fmt: skip
    """A server on 127.0.0.1 that has to be started with `serve_forever`.

    Args:
        runs: run directories; those in which nothing was written yet are waited for.
        port: 0 for any that is free; `server_port` tells it.
        seconds: after which the browser asks again.
        pictures: what is to be said of the galleries, and those that there are; asked for every page.

    Raises:
        UserError: a run directory is a file, or the port is taken.
    """
    for path in runs:
        if path.is_file():
            raise UserError(f"{path}: a file; give the folder that a training writes (--dump_path)")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/":
                self.send_error(404)
                return
            body = _page(runs, seconds, *pictures()).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Nobody wants a line for every look."""

    try:
        return HTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UserError(f"--port {port}: cannot be used ({first_line(error)}); choose another") from error


def _page(runs: Sequence[Path], seconds: int, lead: str, galleries: list[Gallery]) -> str:
    found, missing = present(runs)
    if found:
        waits = [f"Not there yet: {', '.join(map(str, missing))}."] if missing else []
        return render(found, lead=" ".join([lead, *waits]).strip(), galleries=galleries, seconds=seconds)
    again = f'<meta http-equiv="refresh" content="{seconds}">'
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in missing.values())
    return f"<!DOCTYPE html>{again}<title>report</title><p>No run yet, this page waits for it.</p>{lines}"

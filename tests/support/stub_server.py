"""A stub of a server that speaks OpenAI's chat completions."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer


class Server:
    """A stub of a chat completions server: ``script`` decides on each request, as a status and a
    body, or a text."""

    def __init__(self, script):
        self.requests: list[dict] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append(
                    {**body, "path": self.path, "key": self.headers.get("Authorization")}
                )
                said = script(len(stub.requests), body)
                reply = (
                    {"choices": [{"message": {"content": said}}]}
                    if isinstance(said, str)
                    else said[1]
                )
                self.send_response(200 if isinstance(said, str) else said[0])
                self.end_headers()
                self.wfile.write(
                    reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
                )

            def log_message(self, *_):
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

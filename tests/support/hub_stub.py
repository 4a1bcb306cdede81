"""As much of the hub's protocol as an upload needs, with plain (not xet) transfers."""

from __future__ import annotations

import base64
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class HubServer(ThreadingHTTPServer):
    """On a free port of this machine; what is uploaded goes to ``folder``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.folder = folder

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Hub(BaseHTTPRequestHandler):
    """Takes a commit's files to ``server.folder``; large ones come first, by their hash."""

    server: HubServer

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, answer: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            self.reply({"type": "user", "name": "someone"})
        else:
            self.reply({"error": f"unknown: {self.path}"}, 404)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/api/repos/create":
            self.reply({"url": f"{self.server.url}/someone/retrofit"})
        elif self.path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            answers = [
                {"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in files
            ]
            self.reply({"files": answers})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    (self.server.folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
                elif entry["key"] == "lfsFile":
                    (self.server.folder / value["oid"]).rename(self.server.folder / value["path"])
            self.reply({"commitUrl": f"{self.server.url}/someone/retrofit/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.reply({"error": f"unknown: {self.path}"}, 404)

    def do_PUT(self) -> None:
        (oid,) = re.findall(r"^/lfs/(\w+)$", self.path)
        (self.server.folder / oid).write_bytes(self.body())
        self.reply({})

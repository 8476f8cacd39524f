"""As much of the hub's protocol as a download needs, for tests without a network."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def handler(folder: Path, name: str = "tiny/sd") -> type[BaseHTTPRequestHandler]:
    """Serves a folder's files as the model `name`; the class counts in `fetched` what was asked for."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        fetched: list[str] = []

        def log_message(self, *args):
            pass

        def answer(self, status, body, **headers):
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.split("?")[0].strip("/")
            if path.startswith(f"api/models/{name}/tree/"):
                tree = [{"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                        for name, body in files.items()]
                self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            elif path.startswith(f"api/models/{name}"):
                info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            elif path.startswith(f"{name}/resolve/") and (file := path.split("/", 4)[4]) in files:
                if self.command == "GET":
                    self.fetched.append(file)
                self.answer(200, files[file], ETag=f'"{hashlib.sha1(files[file]).hexdigest()}"', X_Repo_Commit=COMMIT)
            else:
                self.answer(404, b"", X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

    return Hub

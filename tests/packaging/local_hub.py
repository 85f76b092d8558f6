"""A hub of models in a folder, over HTTP: as much of its protocol as pushing and loading need.

Source: the requests that huggingface_hub's client sends; https://huggingface.co/docs/hub/api.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

REPO = r"([\w-]+/[\w-]+)"
REVISION = r"main|[0-9a-f]{40}"


class Hub(BaseHTTPRequestHandler):
    """``repos[id]`` holds each repository's files, ``{path: bytes}``."""

    repos: dict[str, dict[str, bytes]]

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def commit_of(self, repo):
        names = sorted((name, hashlib.sha1(c).hexdigest()) for name, c in self.repos[repo].items())
        return hashlib.sha1(repr(names).encode()).hexdigest()

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        if found := re.fullmatch(rf"/api/models/{REPO}(?:/revision/(?:{REVISION}))?", path):
            return self.info(found[1])
        if found := re.fullmatch(rf"/api/models/{REPO}/tree/(?:{REVISION})(?:/(.*))?", path):
            return self.tree(found[1], found[2])
        if found := re.fullmatch(rf"/{REPO}/resolve/(?:{REVISION})/(.+)", path):
            return self.file(found[1], found[2])
        return self.reply(404)

    do_HEAD = do_GET

    def info(self, repo):
        if repo not in self.repos:
            return self.reply(404, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": name} for name in self.repos[repo]]
        return self.reply(
            200, {"id": repo, "sha": self.commit_of(repo), "siblings": siblings, "tags": []}
        )

    def tree(self, repo, under):
        if under:  # No repository here has folders.
            return self.reply(404, X_Error_Code="EntryNotFound")
        rows = [
            {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
            for n, c in self.repos[repo].items()
        ]
        return self.reply(200, rows)

    def file(self, repo, name):
        if name not in self.repos.get(repo, {}):
            missing = "EntryNotFound" if repo in self.repos else "RepoNotFound"
            headers = {"X_Repo_Commit": self.commit_of(repo)} if repo in self.repos else {}
            return self.reply(404, X_Error_Code=missing, **headers)
        content = self.repos[repo][name]
        etag = hashlib.sha1(content).hexdigest()
        return self.reply(200, content, ETag=f'"{etag}"', X_Repo_Commit=self.commit_of(repo))

    def do_POST(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            sent = b""
            while size := int(self.rfile.readline(), 16):
                sent += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlparse(self.path).path
        if path == "/api/repos/create":
            body = json.loads(sent)
            repo = f"{body.get('organization') or 'acme'}/{body['name']}"
            self.repos.setdefault(repo, {})
            return self.reply(200, {"url": f"http://{self.headers['Host']}/{repo}"})
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(rf"/api/models/{REPO}/preupload/main", path):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(sent)["files"]
            ]
            return self.reply(200, {"files": files})
        if found := re.fullmatch(rf"/api/models/{REPO}/commit/main", path):
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repos[found[1]][line["value"]["path"]] = content
            commit = self.commit_of(found[1])
            url = f"http://{self.headers['Host']}/{found[1]}/commit/{commit}"
            return self.reply(200, {"commitUrl": url, "commitOid": commit, "success": True})
        return self.reply(404)


@contextlib.contextmanager
def serving(repos):
    """Serve ``repos`` and give the address."""
    handler = type("Handler", (Hub,), {"repos": repos})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A stand-in for Google Cloud Storage in this process, for the tests of cloud paths.

`open_bucket` gives `gs://` paths a memory of their own, for both of their users: etils paths
(through fsspec, as gcsfs would) and tensorstore (over HTTP, by a few calls of the JSON API). As in
a bucket, objects are written whole and never appended to.
"""

import http.server
import json
import os
import sys
import threading
import types
import urllib.parse

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class MemoryBucket(MemoryFileSystem):
    """What gcsfs is for real buckets."""

    protocol = ("gs", "gcs")
    store = {}  # noqa: RUF012 (class attributes are how the base shares its memory)
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        path = os.fspath(path).removeprefix("gs://").removeprefix("gcs://").strip("/")
        return "/" + path if path else ""

    def _open(self, path, mode="rb", **options):
        if "a" in mode or "+" in mode:
            raise NotImplementedError(f"{path}: objects in a bucket cannot be appended to")
        return super()._open(path, mode, **options)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Media reads and writes, deletes and listings of the JSON API; generations count writes."""

    protocol_version = "HTTP/1.1"
    generations = {}  # noqa: RUF012 (one server in a process)
    lock = threading.Lock()

    def log_message(self, *arguments):
        pass

    def _parse(self):
        url = urllib.parse.urlsplit(self.path)
        query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
        bucket, _, name = url.path.partition("/b/")[2].partition("/o")
        return bucket, urllib.parse.unquote(name.removeprefix("/")), query

    def _reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refused(self, path, query):
        wanted = query.get("ifGenerationMatch")
        return wanted is not None and int(wanted) != self.generations.get(path, 0)

    def do_GET(self):
        bucket, name, query = self._parse()
        memory = MemoryBucket()
        with self.lock:
            if not name:
                found = memory.find(f"gs://{bucket}")
                names = sorted(path.removeprefix(f"/{bucket}/") for path in found)
                items = [
                    {"name": name, "size": str(memory.size(f"gs://{bucket}/{name}"))}
                    for name in names
                    if name.startswith(query.get("prefix", ""))
                ]
                return self._reply(200, json.dumps({"items": items}).encode())
            path = f"gs://{bucket}/{name}"
            if not memory.isfile(path):
                return self._reply(404)
            body = memory.cat_file(path)
            generation = self.generations.setdefault(path, 1)
        status = 200
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            end = int(last) + 1 if last else len(body)
            total, status = len(body), 206
            body = body[int(first) : end] if first else body[-int(last) :]
            start = int(first) if first else total - len(body)
            return self._reply(
                status,
                body,
                x_goog_generation=generation,
                Content_Range=f"bytes {start}-{start + len(body) - 1}/{total}",
            )
        return self._reply(status, body, x_goog_generation=generation)

    def do_POST(self):
        bucket, _, query = self._parse()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = f"gs://{bucket}/{query['name']}"
        with self.lock:
            if self._refused(path, query):
                return self._reply(412)
            self.generations[path] = self.generations.get(path, 0) + 1
            MemoryBucket().makedirs(os.path.dirname(path), exist_ok=True)
            MemoryBucket().pipe_file(path, body)
            answer = {"name": query["name"], "generation": str(self.generations[path])}
        return self._reply(200, json.dumps(answer).encode())

    def do_DELETE(self):
        bucket, name, query = self._parse()
        path = f"gs://{bucket}/{name}"
        with self.lock:
            if self._refused(path, query):
                return self._reply(412)
            if not MemoryBucket().isfile(path):
                return self._reply(404)
            MemoryBucket().rm_file(path)
            self.generations.pop(path, None)
        return self._reply(204)


def open_bucket():
    """Before anything else uses `gs://` paths in this process."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://127.0.0.1:{server.server_address[1]}"
    os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "none"
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, MemoryBucket, clobber=True)
    # What orbax asks of Google's own package: whether the bucket has folders.
    storage = types.ModuleType("google.cloud.storage")
    flat = types.SimpleNamespace(hierarchical_namespace_enabled=False)
    storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: flat)
    sys.modules["google.cloud"] = types.ModuleType("google.cloud")
    sys.modules["google.cloud"].storage = sys.modules["google.cloud.storage"] = storage

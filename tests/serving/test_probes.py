"""Whom `mixlab serve` answers: probes that know an address only, Prometheus, names, and proxies with a prefix."""

import json
import re
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urljoin, urlsplit

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from mixlab.errors import UsageError
from mixlab.serving.guard import PAGE_FILES
from mixlab.serving.listen import allowed_hosts, check_root_path
from mixlab.serving.server import asset
from tests.serving.test_server import TOKEN, ask, picture, raw, run, server, serving, until  # noqa: F401

POD = {"Host": "10.244.1.7:8000"}
BEARER = {"Authorization": f"Bearer {TOKEN}"}


def test_a_probe_that_knows_the_address_only_is_answered(server):  # noqa: F811
    port, _ = server
    for path in ("/health", "/ready"):
        for host in ("10.244.1.7:8000", "a-service.default.svc", "[fd00::1]:8000", ""):
            until(lambda path=path, host=host: ask(port, path, headers={"Host": host})[0] == 200)
        assert raw(port, f"GET {path} HTTP/1.0\r\n\r\n".encode())[0] in (200, 503)  # 503: very busy
    for path in ("/", "/info", "/metrics", "/docs", "/openapi.json", "/health/", "/predict"):
        status, _, answer = ask(port, path, headers=POD)
        assert (status, answer["error"]["kind"]) == (403, "host")
        assert "--name" in answer["error"]["hint"]
    for origin in ("http://evil.example", "http://10.244.1.7"):
        assert ask(port, "/health", headers=POD | {"Origin": origin})[0] == 403


def test_prometheus_with_the_token_is_answered_under_any_host(run):  # noqa: F811
    with serving(run, token=TOKEN) as (port, _):
        status, _, text = ask(port, "/metrics", headers=POD | BEARER)
        assert status == 200
        assert b"mixlab_requests" in text
        assert ask(port, "/metrics", headers=POD)[0] == 401
        assert ask(port, "/info", headers=POD | BEARER)[0] == 403


def test_any_name_will_do_where_there_is_a_token_and_only_there(run):  # noqa: F811
    with pytest.raises(UsageError, match="without a token"):
        allowed_hosts("127.0.0.1", ("*",))
    hosts = allowed_hosts("127.0.0.1", ("*",), TOKEN)
    with serving(run, token=TOKEN, hosts=hosts) as (port, _):
        assert ask(port, "/predict", picture(), headers=POD | BEARER)[0] == 200
        assert ask(port, "/predict", picture(), headers=POD)[0] == 401
        assert (
            ask(port, "/predict", picture(), headers=POD | BEARER | {"Origin": "http://evil.example"})[0]
            == 403
        )


def test_names_are_names():
    for name in ("http://x", "x:8000", "x/y", "", "*.example.com", "a b", "x\n"):
        with pytest.raises(UsageError, match="no name of a host"):
            allowed_hosts("127.0.0.1", (name,), TOKEN)
    assert allowed_hosts("::1", ("My.Example", "10.0.0.7", "fd00::1"))[3:] == (
        "[::1]", "my.example", "10.0.0.7", "[fd00::1]",
    )  # fmt: skip


def test_a_root_path_is_a_path():
    assert [check_root_path(path) for path in ("", "/", "/mixlab", "/a/b/")] == ["", "", "/mixlab", "/a/b"]
    for path in ("mixlab", "//evil.example", "/a?b", "/a#b", "http://x/a", "/a b", "/a\r\nb", "/a//b"):
        with pytest.raises(UsageError, match="no path"):
            check_root_path(path)


class Proxy(BaseHTTPRequestHandler):
    """Hands on what is below /models/pets/ and nothing else, as nginx does with `proxy_pass http://...:PORT/`."""

    def do_GET(self):
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length) or None
        if not self.path.startswith("/models/pets/"):
            self.send_error(404)
            return
        path = self.path if self.server.keeps_prefix else self.path.removeprefix("/models/pets")
        connection = HTTPConnection("127.0.0.1", self.server.upstream, timeout=30)
        connection.request(self.command, path, body, {"Content-Type": self.headers.get("Content-Type", "")})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        self.send_response(answer.status)
        for name in ("Content-Type", "Location"):
            if name in answer.headers:
                self.send_header(name, answer.headers[name])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET  # noqa: N815  the name that http.server looks for

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("keeps_prefix", "root_path"), [(False, ""), (False, "/models/pets"), (True, "/models/pets")]
)
def test_the_page_works_below_a_prefix(run, keeps_prefix, root_path):  # noqa: F811
    with serving(run, root_path=root_path) as (port, _):
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        proxy.upstream, proxy.keeps_prefix = port, keeps_prefix
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            outside, start = proxy.server_address[1], "http://outside/models/pets/"

            def get(address):
                status, _, content = ask(outside, urlsplit(address).path)
                assert status == 200, address
                return content if isinstance(content, dict) else content.decode()

            for page in ("", "docs"):
                for address in re.findall(r'(?:href|src)="([^"]+)"', get(urljoin(start, page))):
                    if not address.startswith("data:"):
                        assert get(urljoin(urljoin(start, page), address))
            for name in [name for name in PAGE_FILES if name.endswith(".js")]:
                for address in re.findall(r'from "([^"]+)"', get(urljoin(start, name))):
                    assert get(urljoin(urljoin(start, name), address))
            asked = re.findall(r'ask\("([^"]+)"', asset("page.js").decode())
            assert [address.partition("?")[0] for address in asked] == ["info", "predict", "occlusion"]
            assert get(urljoin(start, "info"))["name"] == "a-model"
            assert ask(outside, "/models/pets/predict?top=5", picture())[0] == 200
            spec = get(urljoin(start, "openapi.json"))
            assert spec.get("servers", [{"url": ""}])[0]["url"] == root_path
        finally:
            proxy.shutdown()
            thread.join()
            proxy.server_close()


def test_the_prefix_alone_leads_to_the_page_and_hides_nothing(run):  # noqa: F811
    with serving(run, token=TOKEN, root_path="/mixlab") as (port, service):
        status, headers, _ = ask(port, "/mixlab")
        assert (status, headers["Location"]) == (308, "/mixlab/")
        assert ask(port, "/mixlab", headers=POD)[0] == 403
        assert ask(port, "/mixlab/health", headers=POD)[0] == 200
        for path in ("/mixlab/info", "/info", "/mixlab/mixlab/info", "/mixlabinfo", "/mixlab/metrics"):
            assert ask(port, path)[0] == 401
        assert ask(port, "/mixlab/info", headers=BEARER)[0] == 200
        assert ask(port, "/mixlab//info", headers=BEARER)[0] == 404
        assert b'path="/info"' in service.metrics_text()


def test_no_page_asks_for_an_address_from_the_root():
    for name in ("page.html", "docs.html", "ui.html", *PAGE_FILES):
        text = asset(name).decode()
        assert not re.search(r"""(?:href=|src=|ask\(|fetch\(|url\(|from )["'`]?/\w""", text), name
    assert json.loads(asset("openapi.json"))["openapi"] == "3.1.0"

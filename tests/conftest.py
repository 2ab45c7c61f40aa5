"""Set-up of all tests."""

import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

# small networks gain little from a second thread, and on a busy machine they wait for it
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton, which reads it then


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Escape names in captured logs that are not UTF-8, as which pytest-xdist sends reports."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report


@pytest.fixture(scope="module")
def browser():
    """Chromium, by Playwright."""
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    with api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        yield playwright.chromium.launch(executable_path=chromium, args=flags)


@pytest.fixture
def tab(browser):
    """An empty page that keeps what it asked for and what went wrong."""
    tab = browser.new_page()
    tab.addresses, tab.mistakes = [], []
    tab.on("request", lambda request: tab.addresses.append(request.url))
    tab.on("pageerror", lambda error: tab.mistakes.append(str(error)))
    tab.on("console", lambda line: line.type == "error" and tab.mistakes.append(line.text))
    yield tab
    tab.close()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "checkpoints"


@pytest.fixture
def server(hub):
    """A server of `pages`, path -> bytes; `requests` are the paths asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            page = server.pages.get(self.path)
            server.requests.append(self.path)
            self.send_response(200 if page is not None else 404)
            self.send_header("Content-Length", str(len(page or b"") + server.missing_bytes))
            self.send_header("Content-Disposition", "attachment; filename=theirs.pth")
            self.end_headers()
            self.wfile.write(page or b"")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.pages, server.requests, server.missing_bytes = {}, [], 0
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()

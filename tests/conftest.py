import os

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before anything imports it: it would ask the package index for news

import contextlib
import multiprocessing.util
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from fakes import official_archive

from session8 import data as cifar10

# The networks of the tests are too small for threads to pay, and beside another job those would wait for each other.
torch.set_num_threads(1)

# Sockets of worker processes go here: in a test's own folder their paths would be too long for some systems.
multiprocessing.util.get_temp_dir()

REAL_DATA = os.environ.get("CIFAR10_ROOT")


@pytest.fixture(autouse=True)
def no_data_but_the_tests_own(monkeypatch, tmp_path):
    """No test may find, or try to download, data that it did not make."""
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    monkeypatch.delenv("CIFAR10_URL", raising=False)
    monkeypatch.setenv("no_proxy", "*")  # the tests' server is on this machine
    monkeypatch.setattr(cifar10, "MIRRORS", ())
    monkeypatch.setattr(cifar10, "DATA_FOLDER", tmp_path / "data")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def real_root():
    if not REAL_DATA:
        pytest.skip("needs the real images: set CIFAR10_ROOT to their folder")
    return REAL_DATA


@pytest.fixture
def real_splits(real_root):
    return cifar10.load_cifar10(real_root)


@pytest.fixture(scope="session")
def synthetic():
    return cifar10.synthetic_cifar10(300, 100)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the archive at /good, and at other paths each fault by its name. Knows which paths were asked for."""
    archive, splits = official_archive(tmp_path / "served", monkeypatch)
    body = archive.read_bytes()
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            fault = self.path.strip("/")
            server.asked.append(fault)
            if fault == "mute":
                stop.wait(30)
            if fault == "missing":
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if fault == "wrong":
                self.wfile.write(bytes(len(body)))
            elif fault == "cut":
                self.wfile.write(body[: len(body) // 2])
            elif fault == "silent":
                self.wfile.write(body[: len(body) // 2])
                stop.wait(30)
            elif fault == "slow":
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    if stop.wait(0.05):
                        return
            else:
                self.wfile.write(body)

        def handle(self):
            with contextlib.suppress(OSError):  # the client has given up, as it should
                super().handle()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.asked, server.splits = [], splits
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(cifar10, "SILENCE_SECONDS", 0.8)
    monkeypatch.setattr(cifar10, "STALL_SECONDS", 0.8)
    yield server
    stop.set()
    server.shutdown()
    thread.join()
    server.server_close()

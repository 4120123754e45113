import os

# Before the imports that read them: albumentations would query the package index; and the processes that the tests
# start compete for the cores.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("COLUMNS", None)  # set by pytest-xdist; progress bars of tqdm before 4.70 would be narrower

import contextlib
import multiprocessing.util
import signal
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from fake_cuda import fake_cuda
from fakes import class_folders, official_archive

from session8 import data

# The tests' networks are too small for several threads, and each pytest-xdist worker has one core.
torch.set_num_threads(1)

# A shell's background jobs ignore SIGINT, which some tests raise.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Created early: in a test's folder the paths of the workers' sockets would be too long for some systems.
multiprocessing.util.get_temp_dir()

# The user's folder; workers of pytest-xdist inherit the name under which the main process keeps it.
REAL_DATA = os.environ.setdefault("REAL_CIFAR10_ROOT", os.environ.get("CIFAR10_ROOT", ""))


def pytest_configure(config):
    """Give the notebook that nbmake executes a few images: its kernel inherits the environment."""
    config.few_images = tempfile.TemporaryDirectory()
    class_folders(config.few_images.name, per_train=20, per_test=10)
    os.environ["CIFAR10_ROOT"] = config.few_images.name


def pytest_unconfigure(config):
    config.few_images.cleanup()


@pytest.fixture(autouse=True)
def hide_other_data(monkeypatch, tmp_path):
    """Hide all data from the tests except their own."""
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    monkeypatch.delenv("CIFAR10_URL", raising=False)
    monkeypatch.delenv("CIFAR10_CACHE", raising=False)
    monkeypatch.setenv("no_proxy", "*")  # the tests' server is on this machine
    monkeypatch.setattr(data, "MIRRORS", ())
    monkeypatch.setattr(data, "DATA_FOLDER", tmp_path / "data")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def real_root():
    if not REAL_DATA:
        pytest.skip("needs the real images: set CIFAR10_ROOT to their folder")
    return REAL_DATA


@pytest.fixture
def real_splits(real_root):
    return data.load_cifar10(real_root)


@pytest.fixture(params=["cpu", (8, 0), (7, 5)], ids=["cpu", "cuda, capability 8.0", "cuda, capability 7.5"])
def device(request):
    """The name of a device: the CPU, and a stand-in for a GPU with bfloat16 and for one without, a T4."""
    if request.param == "cpu":
        yield "cpu"
    else:
        with fake_cuda(request.param):
            yield "cuda"


@pytest.fixture(scope="session")
def synthetic():
    return data.synthetic_cifar10(300, 100)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve the archive at /good, and a fault at each other path.

    `use` makes paths the mirrors. `requests` lists the paths that were requested.
    """
    archive, splits = official_archive(tmp_path / "served", monkeypatch)
    body = archive.read_bytes()
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            fault = self.path.strip("/")
            server.requests.append(fault)
            if fault == "mute":
                stop.wait(30)
            if fault == "late":
                stop.wait(1)
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
            else:
                self.wfile.write(body)

        def handle(self):
            with contextlib.suppress(OSError):  # the client has given up, as it should
                super().handle()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.requests, server.splits = [], splits
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.use = lambda *paths: monkeypatch.setattr(data, "MIRRORS", tuple(f"{server.url}/{path}" for path in paths))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))  # looks for the end every 10 ms
    thread.start()
    monkeypatch.setattr(data, "TIMEOUT", 0.8)
    yield server
    stop.set()
    server.shutdown()
    thread.join()
    server.server_close()

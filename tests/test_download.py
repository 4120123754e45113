"""The download, against a server on 127.0.0.1 that serves a small archive well or badly."""

import socket
import threading
import time

import pytest

from session8 import data as cifar10
from session8.data import ARCHIVE, DatasetUnavailable, load_cifar10


def leftovers(tmp_path):
    return sorted(path.name for path in (tmp_path / "data").glob("*"))


def test_download_of_a_good_archive(server, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cifar10, "MIRRORS", (f"{server.url}/good",))
    train, test = load_cifar10()
    assert (train.images == server.splits[0].images).all() and (test.labels == server.splits[1].labels).all()
    assert "official archive" in train.source
    assert leftovers(tmp_path) == [".cifar10-cache.npz", ARCHIVE]
    bar = capsys.readouterr().out
    assert "CIFAR-10 from 127.0.0.1" in bar and "100%" in bar and "B/s" in bar
    load_cifar10()
    assert server.asked == ["good"]  # the second time nothing is fetched


def test_download_prefers_ones_own_mirror(server, monkeypatch):
    monkeypatch.setattr(cifar10, "MIRRORS", (f"{server.url}/good",))
    monkeypatch.setenv("CIFAR10_URL", f"{server.url}/mine")
    load_cifar10()
    assert server.asked == ["mine"]


FAULTS = {
    "missing": "404: Not Found",
    "wrong": "md5 is .*, expected",
    "cut": "cut short: .* bytes came",
    "silent": "timed out",
    "mute": "no answer in|timed out",
    "slow": r"stalled: .* kB/s over",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_download_fault_gives_the_mirror_up_for_the_next(server, monkeypatch, tmp_path, fault):
    monkeypatch.setattr(cifar10, "MIRRORS", (f"{server.url}/{fault}", f"{server.url}/good"))
    started = time.monotonic()
    load_cifar10()
    assert time.monotonic() - started < 5
    assert server.asked == [fault, "good"]
    assert leftovers(tmp_path) == [".cifar10-cache.npz", ARCHIVE]


@pytest.mark.parametrize("fault", FAULTS)
def test_download_fault_everywhere_leaves_nothing_and_says_why(server, monkeypatch, tmp_path, fault):
    monkeypatch.setattr(cifar10, "MIRRORS", (f"{server.url}/{fault}",))
    with pytest.raises(
        DatasetUnavailable, match=rf"(?s){server.url}/{fault}: .*{FAULTS[fault]}.*Remedies: .*CIFAR10_URL"
    ):
        load_cifar10()
    assert leftovers(tmp_path) == []


def unreachable():
    """An address on this machine that refuses connections: its port was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/archive"


def test_download_fault_no_connection(monkeypatch):
    urls = [unreachable(), "not an address"]
    monkeypatch.setattr(cifar10, "MIRRORS", urls)
    with pytest.raises(DatasetUnavailable) as error:
        load_cifar10()
    assert all(url in str(error.value) for url in urls)
    assert "refused" in str(error.value) and "allow_synthetic=True" in str(error.value)


def test_download_fault_with_a_stand_in_allowed_is_told_in_a_banner(monkeypatch, capsys):
    monkeypatch.setattr(cifar10, "MIRRORS", (unreachable(),))
    train, test = load_cifar10(allow_synthetic=True)
    assert train.synthetic and test.synthetic and len(train) == 2000
    printed = capsys.readouterr().out
    assert "SYNTHETIC STAND-IN" in printed and "refused" in printed and "CIFAR10_ROOT" in printed


def test_download_fault_folder_that_cannot_be_made(server, monkeypatch, tmp_path):
    (tmp_path / "data").write_text("a file in its place")
    monkeypatch.setattr(cifar10, "MIRRORS", (f"{server.url}/good",))
    with pytest.raises(DatasetUnavailable, match="data': cannot be made"):
        load_cifar10()
    assert load_cifar10(allow_synthetic=True)[0].synthetic and not server.asked


def test_download_waits_for_another_process_that_is_at_it(server, monkeypatch, tmp_path, capsys):
    archive = tmp_path / "served" / ARCHIVE
    part = tmp_path / "data" / f"{ARCHIVE}.part"
    part.parent.mkdir()
    part.touch()

    def another():
        with open(part, "wb") as file:
            for byte in archive.read_bytes()[:15]:
                file.write(bytes([byte]))
                file.flush()
                time.sleep(0.1)  # in all, longer than a process may be silent
        part.write_bytes(archive.read_bytes())
        part.rename(part.with_name(ARCHIVE))

    thread = threading.Thread(target=another)
    thread.start()
    monkeypatch.setattr(cifar10, "MIRRORS", (f"{server.url}/good",))
    train, _ = load_cifar10()
    thread.join()
    assert (train.images == server.splits[0].images).all() and server.asked == []
    assert "waiting for whoever writes it" in capsys.readouterr().out


def test_a_part_file_left_behind_is_never_taken_for_the_archive(server, monkeypatch, tmp_path):
    part = tmp_path / "data" / f"{ARCHIVE}.part"
    part.parent.mkdir()
    part.write_bytes(b"what a killed download left")
    monkeypatch.setattr(cifar10, "MIRRORS", (f"{server.url}/good",))
    train, _ = load_cifar10()
    assert (train.images == server.splits[0].images).all()
    assert leftovers(tmp_path) == [".cifar10-cache.npz", ARCHIVE]

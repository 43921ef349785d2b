"""The mirror: whole copies or none, no other run harmed, and no failure there that stops a run."""

import contextlib
import getpass
import hashlib
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem

from tests.helpers import ROOT
from trainer.address import mirror_problems
from trainer.errors import CheckpointError, Interrupted
from trainer.guard import mirror as module
from trainer.guard.mirror import Mirror, MirrorError, fetch_newest

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
MEGABYTE = 1_000_000


def save(folder: Path, update: int, size: int = 1000, name: str = "run_8", seed: int = 0) -> Path:
    """A file that is named as a state is; its bytes follow from the arguments."""
    data = random.Random(f"{name} {update} {seed}").randbytes(size)
    digest = hashlib.sha256(data).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_resume_{update:08d}_{digest}.safetensors"
    path.write_bytes(data)
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def is_whole(path: Path) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32] in path.name


@pytest.fixture
def lines() -> list[str]:
    """What the mirror said."""
    return []


@pytest.fixture
def mirrored(tmp_path: Path, lines: list[str]) -> Iterator[Callable[..., Mirror]]:
    """Makes mirrors, by default in the folder ``there``; the end of the test ends them."""
    made = []

    def make(url: object = tmp_path / "there", name: str = "run_8") -> Mirror:
        made.append(Mirror(str(url), name, lines.append))
        return made[-1]

    yield make
    for one in made:
        one.finish(0)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def copied(one: Mirror, *paths: Path) -> None:
    """Offer each and wait for it."""
    for path in paths:
        one.offer(path)
        wait_until(lambda path=path: one._copied == path)


@pytest.mark.parametrize("place", ["{}", "file://{}", "memory://{}"])
def test_the_newest_two_states_are_kept_there_whole(
    tmp_path: Path, mirrored: Callable, lines: list[str], place: str
) -> None:
    one = mirrored(place.format(tmp_path / "some" / "where"))
    assert one.states() == []
    updates, size = (10, 99_999_999, 100_000_000), 2 * module.CHUNK_BYTES + 7
    saved = [save(tmp_path, update, size) for update in updates]
    copied(one, *saved)
    assert one.states() == [saved[2].name, saved[1].name]
    fetched = [one.fetch(state, tmp_path / "new" / "machine") for state in one.states()]
    assert [path.read_bytes() for path in fetched] == [p.read_bytes() for p in (saved[2], saved[1])]
    assert lines == []
    if "memory" not in place:
        assert names(tmp_path / "some" / "where") == {path.name for path in saved[1:]}


def test_what_belongs_to_others_is_never_touched(tmp_path: Path, mirrored: Callable) -> None:
    there = tmp_path / "there"
    foreign = [save(there, update, name="run_8", seed=1) for update in (1, 2, 3, 999)]
    foreign += [save(there, update, name=n) for n in ("run_80", "my_run_8") for update in (1, 2, 9)]
    foreign.append(foreign[0].with_name(f".{foreign[0].name}.{'0' * 16}.part"))
    foreign += [there / "notes.txt", there / "run_8_resume_notes.safetensors"]
    for path in foreign[-3:]:
        path.write_text("of somebody else")
    one = mirrored()
    saved = [save(tmp_path, update) for update in (4, 5, 6, 7)]
    copied(one, *saved)
    assert names(there) == {path.name for path in [*foreign, *saved[2:]]}
    assert len(one.states()) == 4 + 2


def test_states_of_an_abandoned_branch_are_removed(tmp_path: Path, mirrored: Callable) -> None:
    first, second = mirrored(), mirrored()
    old = [save(tmp_path, update) for update in (100, 200)]
    copied(first, *old)
    new = save(tmp_path, 150)  # the run went back to 100 and on from there
    second.add_own(path.name for path in old)
    copied(second, new)
    assert second.states() == [new.name, old[0].name]


def test_a_fresh_start_clears_the_place_once_its_first_state_is_there(
    tmp_path: Path, mirrored: Callable
) -> None:
    there = tmp_path / "there"
    old = [save(there, update, seed=1) for update in (100, 200)]
    beside = save(there, 1, name="run_80")
    one = mirrored()
    one.clear()
    assert len(names(there)) == 3
    copied(one, new := save(tmp_path, 150))
    assert names(there) == {new.name, beside.name}
    old = save(there, 300, seed=2)
    copied(one, newer := save(tmp_path, 250))
    assert names(there) == {new.name, newer.name, old.name, beside.name}


def test_partial_files_of_a_killed_process_are_removed(tmp_path: Path, mirrored: Callable) -> None:
    resumed = save(tmp_path, 100)
    left = tmp_path / "there" / f".{resumed.name}.0123456789abcdef.part"
    left.parent.mkdir()
    left.write_bytes(b"half")
    one = mirrored()
    one.add_own([resumed.name])
    copied(one, new := save(tmp_path, 200))
    assert names(left.parent) == {new.name}


class Gate:
    """Holds up whatever is written to a folder, from the second piece on, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        write = LocalFileOpener.write

        def wait(file: LocalFileOpener, data: bytes) -> int:
            if file.tell():
                self.reached.set()
                assert self.opened.wait(30)
            return write(file, data)

        monkeypatch.setattr(LocalFileOpener, "write", wait)


def test_of_the_states_that_wait_for_a_slow_mirror_the_newest_wins(
    tmp_path: Path, mirrored: Callable, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, one = Gate(monkeypatch), mirrored()
    saved = [save(tmp_path, update, 2 * module.CHUNK_BYTES) for update in (1, 2, 3, 4, 5)]
    one.offer(saved[0])
    assert gate.reached.wait(10)
    saved[0].unlink()  # as the next saves do; what is being copied must not suffer
    started = time.monotonic()
    for path in saved[1:]:
        one.offer(path)
    assert time.monotonic() - started < 0.5
    assert names(tmp_path / "there") == {path.name for path in (tmp_path / "there").glob(".*.part")}
    gate.opened.set()
    wait_until(lambda: one._copied == saved[-1])
    assert one.states() == [saved[4].name, saved[0].name]
    assert all(is_whole(path) for path in (tmp_path / "there").iterdir())
    assert len(lines) == 1 and "busy" in lines[0] and "update 2 is skipped" in lines[0]


def test_what_arrives_with_a_flipped_bit_is_not_taken_for_the_state(
    tmp_path: Path, mirrored: Callable, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSES", (0.5,))
    write, flipped = LocalFileOpener.write, []

    def flip(file: LocalFileOpener, data: bytes) -> int:
        if not flipped:
            flipped.append(file.path)
            data = bytes([data[0] ^ 1]) + data[1:]
        return write(file, data)

    monkeypatch.setattr(LocalFileOpener, "write", flip)
    one, path = mirrored(), save(tmp_path, 1200)
    generators = random.getstate(), torch.get_rng_state()  # a resumed run repeats what they draw
    one.offer(path)
    wait_until(lambda: lines)
    assert names(tmp_path / "there") == set() and flipped
    one.finish(10)
    assert names(tmp_path / "there") == {path.name} and is_whole(tmp_path / "there" / path.name)
    assert "state of update 1,200 was not copied" in lines[0] and "1,000 bytes" in lines[0]
    assert "works again" in lines[1] and len(lines) == 2
    assert random.getstate() == generators[0] and torch.equal(torch.get_rng_state(), generators[1])


def test_a_mirror_that_is_gone_warns_once_and_never_stops_the_run(
    tmp_path: Path, mirrored: Callable, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSES", (0.01,))
    (tmp_path / "file").write_text("in the way of the folder")
    one = mirrored(tmp_path / "file" / "there")
    attempts = []
    connected = module.connected
    monkeypatch.setattr(module, "connected", lambda url: attempts.append(url) or connected(url))
    started = time.monotonic()
    one.offer(path := save(tmp_path, 1))
    assert time.monotonic() - started < 0.5
    wait_until(lambda: len(attempts) > 5)
    started = time.monotonic()
    one.finish(0.5)
    assert 0.4 < time.monotonic() - started < 1.5
    assert len(lines) == 2 and all(line.startswith("warning: mirror: ") for line in lines)
    assert "NotADirectoryError" in lines[0] and str(path) in lines[1]
    with pytest.raises(MirrorError, match=r"--checkpoint_mirror .* NotADirectoryError") as caught:
        one.states()
    assert caught.value.exit_status == 6


def test_a_newer_state_is_tried_at_once_whatever_the_pause(
    tmp_path: Path, mirrored: Callable, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSES", (1000,))
    (tmp_path / "there").write_text("in the way of the folder")
    one = mirrored()
    one.offer(save(tmp_path, 1))
    wait_until(lambda: lines)
    (tmp_path / "there").unlink()
    copied(one, newer := save(tmp_path, 2))
    assert one.states() == [newer.name]


def test_finishing_tries_at_once_and_signals_get_through(
    tmp_path: Path, mirrored: Callable, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSES", (1000,))
    (tmp_path / "there").write_text("in the way of the folder")
    one = mirrored()
    one.offer(path := save(tmp_path, 1))
    wait_until(lambda: lines)

    def stop(number: int, frame: object) -> None:
        raise InterruptedError

    previous = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        started = time.monotonic()
        with pytest.raises(InterruptedError):
            one.finish(30)
        assert time.monotonic() - started < 2
    finally:
        signal.signal(signal.SIGALRM, previous)
    (tmp_path / "there").unlink()
    one.finish(10)
    assert names(tmp_path / "there") == {path.name}


def test_a_signal_is_not_taken_for_a_failure_of_the_mirror(
    tmp_path: Path, mirrored: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def ls(*args: object, **options: object) -> None:
        calls.append(args)
        raise Interrupted("as the handler does before training begins")

    monkeypatch.setattr(LocalFileSystem, "ls", ls)
    with pytest.raises(Interrupted):
        mirrored().states()
    assert len(calls) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_there_warns_and_copying_goes_on_when_there_is_space(
    tmp_path: Path,
    mirrored: Callable,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    small_disk: Path,
) -> None:
    monkeypatch.setattr(module, "PAUSES", (0.05,))
    (small_disk / "other").write_bytes(bytes(2 * MEGABYTE))
    one = mirrored(small_disk)
    one.offer(path := save(tmp_path, 1, 2 * MEGABYTE))
    wait_until(lambda: lines)
    time.sleep(0.2)
    assert len(lines) == 1 and "No space left" in lines[0]
    (small_disk / "other").unlink()
    one.finish(10)
    assert names(small_disk) == {path.name} and is_whole(small_disk / path.name)
    assert len(lines) == 2 and is_whole(path)


def test_a_damaged_state_there_is_named_and_the_one_before_it_fetched(
    tmp_path: Path, mirrored: Callable
) -> None:
    one, here = mirrored(), tmp_path / "here"
    older, newer = (save(tmp_path / "there", update) for update in (100, 200))
    newer.write_bytes(newer.read_bytes()[:-1])
    path, complaints = fetch_newest(one, here, -1)
    assert path == here / older.name and path.read_bytes() == older.read_bytes()
    assert names(here) == {older.name}
    assert len(complaints) == 1 and newer.name in complaints[0] and "999 bytes" in complaints[0]
    assert fetch_newest(one, here, 100) == (None, complaints)
    assert fetch_newest(one, here, 200) == (None, [])
    older.write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{newer.name}.*{older.name}"):
        fetch_newest(one, here, -1)
    assert fetch_newest(mirrored(tmp_path / "nothing"), here, -1) == (None, [])


@pytest.mark.parametrize(
    "url",
    [
        "sftp://user:hunter2@host/x",
        "s3://AKIA:hunter2/a@bucket/x",
        "ftp://u:hunter2/x@host:21/x",
        "https://host/x?token=hunter2",
        "sftp://host:22/x?a=b&Secret_Key=hunter2",
    ],
)
def test_a_password_in_the_address_is_refused_and_not_repeated(url: str) -> None:
    problems = mirror_problems(url)
    assert len(problems) == 1 and "password" in problems[0] and "hunter2" not in problems[0]


def test_addresses_that_cannot_be_used_are_refused() -> None:
    for url in ("/mnt/x", "relative/x", "file:///mnt/x", "memory://x", "file:///odd:name@x/y"):
        assert mirror_problems(url) == []
    assert "gopher://host/x is not a usable address" in mirror_problems("gopher://host/x")[0]
    assert "not a usable address" in mirror_problems("simplecache::/mnt/x")[0]
    fsspec.register_implementation("lacking", "no_such_package.core.FileSystem", clobber=True)
    assert mirror_problems("lacking://x")[0].endswith("pip install no_such_package")


def test_no_secret_reaches_a_message(
    tmp_path: Path, mirrored: Callable, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSES", (0.01, 0.01))
    monkeypatch.setenv("SOME_API_TOKEN", "tok-123")
    monkeypatch.setenv("SOME_SECRET", "tok-123456")
    monkeypatch.setitem(fsspec.config.conf, "sftp", {"passphrase": "opensesame"})

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError("tok-123456 tok-123 opensesame sftp://me:hunter2@host/x\nmore")

    monkeypatch.setattr(LocalFileSystem, "ls", refuse)
    one = mirrored()
    one.offer(save(tmp_path, 1))
    wait_until(lambda: lines)
    with pytest.raises(MirrorError) as caught:
        one.states()
    assert "PermissionError: *** *** *** sftp://***@host/x;" in lines[0]
    assert str(caught.value).endswith("PermissionError: *** *** *** sftp://***@host/x")
    assert caught.value.__context__ is None


class Proxy:
    """Forwards TCP to ``port``. Of the first connection, only ``allowed`` bytes get through;
    then it is cut, or, as ``hang``, kept open without a byte more."""

    def __init__(self, port: int, allowed: int, *, hang: bool = False) -> None:
        self.target, self.allowed, self.hang = port, allowed, hang
        self.connections = 0
        self.sockets = [socket.create_server(("127.0.0.1", 0))]
        self.port = self.sockets[0].getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.sockets[0].accept()
                self.connections += 1
                server = socket.create_connection(("127.0.0.1", self.target))
                self.sockets += [client, server]
                for pair in ((client, server), (server, client)):
                    words = (*pair, self.connections == 1)
                    threading.Thread(target=self.forward, args=words, daemon=True).start()

    def forward(self, source: socket.socket, sink: socket.socket, limited: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if limited:
                    self.allowed -= len(data)
                    if self.allowed < 0:
                        break
                sink.sendall(data)
        if limited and self.hang and self.allowed < 0:
            return
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for one in self.sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def answers(port: int) -> bool:
    """Whether something listens there."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """A real SSH server on a port of its own, and a home folder whose key it accepts."""
    pytest.importorskip("paramiko")
    if not SSHD or not shutil.which("ssh-keygen"):
        pytest.skip("no sshd: apt-get install openssh-server")
    folder = tmp_path_factory.mktemp("sshd")
    for key in (folder / "host", folder / ".ssh" / "id_ed25519"):
        key.parent.mkdir(exist_ok=True)
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
        subprocess.run(words, check=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # for its unprivileged half
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/.ssh/id_ed25519.pub\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin yes\nSubsystem sftp internal-sftp\n"
    )
    server = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", str(folder / "config")], stderr=subprocess.DEVNULL
    )
    wait_until(lambda: answers(port))
    yield port, folder
    server.terminate()
    server.wait()


@pytest.fixture
def at_home(sshd: tuple[int, Path], monkeypatch: pytest.MonkeyPatch) -> int:
    """The server's port, for a user who has the key where keys usually are."""
    monkeypatch.setenv("HOME", str(sshd[1]))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return sshd[0]


def address(port: int, folder: Path) -> str:
    return f"sftp://{getpass.getuser()}@127.0.0.1:{port}{folder}"


def test_states_travel_over_ssh_with_the_key_in_the_usual_place(
    tmp_path: Path,
    mirrored: Callable,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    at_home: int,
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 300_000)  # several, the last one short
    one = mirrored(address(at_home, tmp_path / "new" / "there"))
    assert one.states() == []
    saved = [save(tmp_path, update, 2 * MEGABYTE + update) for update in (1, 2, 3)]
    copied(one, *saved)
    assert names(tmp_path / "new" / "there") == {path.name for path in saved[1:]}
    path, complaints = fetch_newest(one, tmp_path / "here", -1)
    assert path.read_bytes() == saved[2].read_bytes() and not complaints and not lines


# A thread of paramiko's that still asks for data when the connection is cut ends with an exception.
CUT_WHILE_READING = pytest.mark.filterwarnings(
    r"ignore:Exception in thread .*_prefetch_thread:pytest.PytestUnhandledThreadExceptionWarning"
)


@CUT_WHILE_READING
@pytest.mark.parametrize("allowed", [1, 3])  # MB: while it is sent; while it is read back
def test_a_connection_cut_in_the_middle_costs_a_warning_and_a_second_try(
    tmp_path: Path,
    mirrored: Callable,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    at_home: int,
    allowed: int,
) -> None:
    monkeypatch.setattr(module, "PAUSES", (0.5,))
    path = save(tmp_path, 1200, 2 * MEGABYTE)
    with contextlib.closing(Proxy(at_home, allowed * MEGABYTE)) as proxy:
        one = mirrored(address(proxy.port, tmp_path / "there"))
        one.offer(path)
        wait_until(lambda: lines)
        assert [file.suffix for file in (tmp_path / "there").iterdir()] == [".part"]
        one.finish(20)
        assert proxy.connections == 2
    assert names(tmp_path / "there") == {path.name} and is_whole(tmp_path / "there" / path.name)
    assert is_whole(path)
    assert "state of update 1,200 was not copied to sftp://" in lines[0] and len(lines) == 2


@CUT_WHILE_READING
def test_a_connection_cut_while_a_state_is_fetched_is_made_again(
    tmp_path: Path, mirrored: Callable, monkeypatch: pytest.MonkeyPatch, at_home: int
) -> None:
    monkeypatch.setattr(module, "PAUSES", (0.01, 0.01))
    path = save(tmp_path / "there", 1, 2 * MEGABYTE)
    with contextlib.closing(Proxy(at_home, MEGABYTE)) as proxy:
        one = mirrored(address(proxy.port, tmp_path / "there"))
        assert is_whole(one.fetch(path.name, tmp_path / "here"))
        assert proxy.connections == 2


@pytest.mark.slow
def test_a_server_that_stops_answering_counts_as_gone_after_a_while(
    tmp_path: Path,
    mirrored: Callable,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    at_home: int,
) -> None:
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 1)
    monkeypatch.setattr(module, "PAUSES", (0.01,))
    with contextlib.closing(Proxy(at_home, MEGABYTE, hang=True)) as proxy:
        one = mirrored(address(proxy.port, tmp_path / "there"))
        one.offer(path := save(tmp_path, 1, 2 * MEGABYTE))
        one.finish(20)
    assert names(tmp_path / "there") == {path.name}
    assert "TimeoutError" in lines[0] and len(lines) == 2


@pytest.mark.parametrize("refused", [True, False])  # else it is accepted and cut at once
def test_a_server_that_is_not_there_is_one_line(
    tmp_path: Path,
    mirrored: Callable,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at_home: int,
    refused: bool,
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own, which no run has
    with contextlib.closing(Proxy(at_home, 0)) as proxy:
        if refused:
            proxy.close()
        one = mirrored(address(proxy.port, tmp_path / "there"))
        one.offer(save(tmp_path, 1))
        wait_until(lambda: lines)
        one.finish(0)
    assert "update 1 was not copied to sftp://" in lines[0] and len(lines) == 2
    assert capsys.readouterr() == ("", "")


HANGING = """
import sys, time, types
from pathlib import Path
# The model brings transformers, which takes seconds to load and has no part in this.
sys.modules["model.model_minimind"] = types.SimpleNamespace(MiniMindConfig=object)
from trainer.guard.mirror import Mirror
started = time.monotonic()
mirror = Mirror(sys.argv[1], "run_8", lambda line: print(line, flush=True))
mirror.offer(Path(sys.argv[2]))
offered = time.monotonic()
mirror.finish(1)
print(offered - started < 0.5, time.monotonic() - started < 3)
"""


@pytest.mark.slow
def test_a_process_ends_although_its_copy_hangs(tmp_path: Path, at_home: int) -> None:
    path = save(tmp_path, 1, 2 * MEGABYTE)
    with contextlib.closing(Proxy(at_home, MEGABYTE, hang=True)) as proxy:
        words = [address(proxy.port, tmp_path / "there"), str(path)]
        done = subprocess.run(
            [sys.executable, "-c", HANGING, *words],
            cwd=ROOT,
            timeout=60,
            capture_output=True,
            text=True,
        )
        assert proxy.connections == 1
    assert done.returncode == 0 and done.stderr == ""
    warning, times = done.stdout.splitlines()
    assert times == "True True" and "update 1 is not at sftp://" in warning
    assert names(tmp_path / "there") and path.name not in names(tmp_path / "there")
    assert is_whole(path)

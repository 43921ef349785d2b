"""Ranks that die or hang, runs that meet in one folder, machines that go."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import TCPStore

import train_pretrain
from tests import launched
from tests.helpers import ROOT
from tests.running import (
    assert_same,
    descendant_pids,
    files_with_times,
    metrics_without_times,
    newest_state,
    read_metrics,
    run_command,
    tiny_flags,
)
from tests.test_signals import reached, until
from trainer.checkpoint import list_states
from trainer.guard.run_folder import read_run_state

TIMEOUT = 8  # seconds, --timeout in these tests
SETTINGS = {"accumulation_steps": 2, "dropout": 0.1, "save_interval": 3, "timeout": TIMEOUT}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks to which nothing happened."""
    folder = tmp_path_factory.mktemp("whole")
    words = tiny_flags(folder, **SETTINGS)
    assert launched.run_trainers(words, folder / "log", 2) == [0, 0]
    return folder


def assert_equal_runs(cut: Path, whole: Path) -> None:
    assert_same(newest_state(cut), newest_state(whole))
    assert metrics_without_times(cut) == metrics_without_times(whole)


def goes_on(cut: Path, whole: Path) -> None:
    words = tiny_flags(cut, **SETTINGS, from_resume=1)
    statuses = launched.run_trainers(words, cut / "log2", 2)
    assert statuses == [0, 0], (cut / "log2").read_text()
    assert_equal_runs(cut, whole)


@pytest.mark.parametrize(
    ("how", "step"),
    [
        ("SIGKILL", 8),
        ("SIGSTOP", 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("SIGKILL", 1), ("raise", 8), ("exit", 8), ("sleep", 8))
        ),
    ],
)
def test_a_rank_that_dies_or_hangs_ends_the_job_in_time_and_is_named(
    whole: Path, tmp_path: Path, how: str, step: int
) -> None:
    log = tmp_path / "log"
    fault = [("die_in_update", {"step": step, "how": how, "rank": 1})]
    processes = launched.start_trainers(tiny_flags(tmp_path, **SETTINGS), log, 2, fault)
    try:
        processes[0].join(timeout=60)
        since = time.monotonic()
        assert processes[0].exitcode == 8, log.read_text()
    finally:
        launched.kill_all(processes)
    text = log.read_text()
    error = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and "rank 1 on " in error[0] and "dead or stuck" in error[0], text
    said = read_run_state(tmp_path / "checkpoints")
    assert (said["status"], said["code"]) == ("failed", 8) and "rank 1" in said["reason"]
    assert time.monotonic() - since < TIMEOUT + 35
    goes_on(tmp_path, whole)


@pytest.mark.parametrize(
    ("how", "rank"),
    [
        ("SIGKILL", 0),
        pytest.param("SIGSTOP", 1, marks=pytest.mark.slow),
        pytest.param("SIGKILL", 1, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_goes_during_a_save_is_named_and_costs_one_interval(
    whole: Path, tmp_path: Path, how: str, rank: int
) -> None:
    log = tmp_path / "log"
    processes = launched.start_trainers(
        tiny_flags(tmp_path, **SETTINGS), log, 2, [("die_in_save", {"how": how, "rank": rank})]
    )
    survivor = processes[1 - rank]
    try:
        survivor.join(timeout=TIMEOUT + 35)
        assert survivor.exitcode == 8, log.read_text()
    finally:
        launched.kill_all(processes)
    assert "dead or stuck" in log.read_text() or "machine of rank 0 is gone" in log.read_text(), (
        log.read_text()[-3000:]
    )
    goes_on(tmp_path, whole)


@pytest.mark.slow
def test_a_slow_save_of_the_first_rank_is_waited_for(tmp_path: Path) -> None:
    """Longer than an exchange between ranks may take."""
    slow = [("slow_save", {"marker": str(tmp_path / "saving"), "seconds": 1.0})]
    words = tiny_flags(tmp_path, **SETTINGS | {"timeout": 2, "epochs": 1, "save_interval": 100})
    since = time.monotonic()
    statuses = launched.run_trainers(words, tmp_path / "log", 2, slow)
    assert statuses == [0, 0], (tmp_path / "log").read_text()
    assert time.monotonic() - since > 4, "the save was not slow enough to prove anything"


def torchrun(words: list[str], *options: str, ranks: int = 2) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    return [*start, *options, "-m", "tests.launched", *words]


def test_torchrun_starts_the_ranks_again_and_they_go_on_exactly(
    whole: Path, tmp_path: Path
) -> None:
    """Without --from_resume: who restarts a group gives no other flags."""
    fault = [("die_in_update", {"step": 8, "how": "SIGKILL", "rank": 1})]
    done = subprocess.run(
        torchrun(tiny_flags(tmp_path, **SETTINGS), "--standalone", "--max-restarts", "3"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"FAULTS": json.dumps(fault)},
    )
    assert done.returncode == 0, done.stderr
    assert "resuming after update 6" in done.stdout
    assert "exitcode: -9" in done.stderr or "Signal 9" in done.stderr  # torchrun names it, too
    assert_equal_runs(tmp_path, whole)


def test_what_dead_ranks_left_in_torchruns_store_misleads_nobody(
    whole: Path, tmp_path: Path
) -> None:
    """torchrun's store outlives its ranks; its own count of restarts differs between machines."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = tiny_flags(tmp_path, **SETTINGS)
    of_torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(store.port)}
    dies = [("die_in_update", {"step": 8, "how": "SIGKILL", "rank": 1})]
    log = tmp_path / "log"
    assert -9 in launched.run_trainers(words, log, 2, dies, of_torchrun)
    for rank in (1, 0):  # whoever is first finds what the other left
        late = [("start_late", {"rank": rank, "seconds": 1.0})]
        if rank == 1:
            late += [("die_in_update", {"step": 11, "how": "SIGKILL", "rank": 1})]
        statuses = launched.run_trainers(words, log, 2, late, of_torchrun)
    assert statuses == [0, 0], log.read_text()
    assert log.read_text().count("resuming after update") == 2
    assert_equal_runs(tmp_path, whole)


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({"WORLD_SIZE": "1"}, "LOCAL_RANK, GROUP_RANK, MASTER_PORT, MASTER_ADDR are missing"),
        (
            {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "80", "LOCAL_RANK": "0"},
            "GROUP_RANK is missing",
        ),
        ({"RANK": "first"}, "RANK, LOCAL_RANK, GROUP_RANK, WORLD_SIZE, MASTER_PORT, MASTER_ADDR"),
    ],
)
def test_a_launcher_that_is_not_torchrun_is_told_what_is_missing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict,
    missing: str,
) -> None:
    for name, value in ({"RANK": "0"} | environment).items():
        monkeypatch.setenv(name, value)
    assert train_pretrain.main(tiny_flags(tmp_path)) == 2
    error = capsys.readouterr().err
    assert f"error: RANK is set in the environment, but {missing}" in error
    assert "start it with torchrun" in error and error.count("\n") == 1


def test_ranks_that_never_come_are_named(tmp_path: Path) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "3",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
    }
    words = tiny_flags(tmp_path, **SETTINGS | {"timeout": 1})
    assert launched.run_trainers(words, tmp_path / "log", environment=alone) == [8]
    assert "error: ranks [1, 2] did not join within 1 s" in (tmp_path / "log").read_text()
    del store  # nobody listens any more
    assert launched.run_trainers(words, tmp_path / "log2", environment=alone) == [8]
    error = (tmp_path / "log2").read_text()
    assert f"error: the ranks cannot connect at 127.0.0.1:{alone['MASTER_PORT']}: " in error
    assert "Traceback" not in error


def test_a_second_run_in_the_folder_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    words = tiny_flags(tmp_path, epochs=1, dropout=0.1)
    alone = tiny_flags(tmp_path / "alone", epochs=1, dropout=0.1)
    assert launched.run_trainers(alone, tmp_path / "log0") == [0]
    free = tmp_path / "free"
    fault = [("hold_update", {"step": 4, "marker": str(free)})]
    first = launched.start_trainers(words, tmp_path / "log1", faults=fault)
    until(reached(tmp_path, 3))
    second = launched.start_trainers([*words, "--from_resume", "1"], tmp_path / "log2")
    assert launched.wait_for_all(second, timeout=60) == [2]  # it does not wait for the first to end
    error = (tmp_path / "log2").read_text()
    assert f"--checkpoint_dir {tmp_path / 'checkpoints'} is in use by pretrain_32, pid" in error
    assert f"pid {first[0].pid} on " in error and " since 2" in error
    free.touch()
    assert launched.wait_for_all(first) == [0]
    assert_equal_runs(tmp_path, tmp_path / "alone")


@pytest.mark.slow
def test_two_folders_of_states_cannot_share_the_weights_of_one_name(tmp_path: Path) -> None:
    words = tiny_flags(tmp_path, epochs=1)
    free = tmp_path / "free"
    fault = [("hold_update", {"step": 4, "marker": str(free)})]
    first = launched.start_trainers(words, tmp_path / "log1", faults=fault)
    until(reached(tmp_path, 3))
    other = ["--checkpoint_dir", str(tmp_path / "other")]
    assert launched.run_trainers([*words, *other], tmp_path / "log2") == [2]
    assert f"--save_dir {tmp_path / 'out'} is in use" in (tmp_path / "log2").read_text()
    other += ["--save_weight", "beside"]
    assert launched.run_trainers([*words, *other], tmp_path / "log3") == [0]
    free.touch()
    assert launched.wait_for_all(first) == [0]


def test_a_lock_never_outlives_a_kill_even_with_loader_processes_alive(tmp_path: Path) -> None:
    words = tiny_flags(tmp_path, num_workers=2, epochs=1, from_resume=1, eval_tokens=64)
    first = launched.start_trainers(
        words, tmp_path / "log1", faults=[("slow_updates", {"seconds": 0.5})]
    )
    until(reached(tmp_path, 1))
    workers = descendant_pids(first[0].pid)
    assert len(workers) >= 2
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # so that they surely outlive it
    try:
        launched.kill_all(first)
        since, second = time.monotonic(), launched.start_trainers(words, tmp_path / "log2")
        assert launched.wait_for_all(second) == [0], (tmp_path / "log2").read_text()
        assert time.monotonic() - since < 15
    finally:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_run_that_ignores_the_lock_is_noticed_at_the_next_save(tmp_path: Path) -> None:
    """Some network disks grant each their lock; a state that nobody here wrote tells."""
    words = tiny_flags(tmp_path, epochs=1, save_interval=4)
    first = launched.start_trainers(
        words, tmp_path / "log", faults=[("slow_updates", {"seconds": 0.3})]
    )
    until(reached(tmp_path, 1))
    name = f"pretrain_32_resume_00000003_{'0' * 32}.safetensors"
    (tmp_path / "checkpoints" / name).write_bytes(b"of another machine")
    assert launched.wait_for_all(first) == [4]
    assert f"{name} was saved by another run in the same folder" in (tmp_path / "log").read_text()
    assert (tmp_path / "checkpoints" / name).exists()


@pytest.mark.parametrize("how", [pytest.param("killed", marks=pytest.mark.slow), "stuck"])
def test_a_loader_process_that_dies_or_hangs_ends_the_run_in_one_line(
    tmp_path: Path, how: str
) -> None:
    changes = {"num_workers": 2, "timeout": 3 if how == "stuck" else 60, "epochs": 200}
    faults = [("stuck_loader", {"row": 30})] if how == "stuck" else []
    processes = launched.start_trainers(
        tiny_flags(tmp_path, **changes), tmp_path / "log", faults=faults
    )
    if how == "killed":
        until(reached(tmp_path, 3))
        while processes[0].is_alive():  # an epoch's processes are replaced by the next's
            for worker in descendant_pids(processes[0].pid):
                try:
                    os.kill(worker, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
    assert launched.wait_for_all(processes, timeout=60) == [3]
    error = [s for s in (tmp_path / "log").read_text().splitlines() if s.startswith("error:")]
    assert len(error) == 1 and "DataLoader" in error[0] and "--num_workers" in error[0]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
class TestTwoHosts:
    """torchrun on two machines: each a network namespace with a disk of its own."""

    @pytest.fixture
    def hosts(self) -> Iterator[list[str]]:
        """Names of two namespaces joined by a pair of virtual network cards."""
        names = [f"host{os.getpid()}{letter}" for letter in "ab"]
        cards = [f"v{os.getpid() % 10**6}{letter}" for letter in "ab"]
        made = run_command(["ip", "netns", "add", names[0]])
        if made.returncode:
            pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")
        try:
            run_command(["ip", "netns", "add", names[1]])
            run_command(["ip", "link", "add", cards[0], "type", "veth", "peer", "name", cards[1]])
            for i, (name, card) in enumerate(zip(names, cards, strict=True)):
                run_command(["ip", "link", "set", card, "netns", name])
                inside = ["ip", "-n", name]
                run_command([*inside, "link", "set", card, "name", "eth0"])
                run_command([*inside, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0"])
                run_command([*inside, "link", "set", "eth0", "up"])
                run_command([*inside, "link", "set", "lo", "up"])
            ping = ["ip", "netns", "exec", names[0], "bash", "-c", "</dev/tcp/10.77.0.2/9"]
            assert "refused" in run_command(ping).stderr, "the hosts do not reach each other"
            yield names
        finally:
            for name in names:
                run_command(["ip", "netns", "del", name])

    def start(self, hosts: list[str], folder: Path, faults: dict[int, list]) -> list:
        """torchrun on each host, as the README says it; each has folders of its own."""
        processes = []
        for node, host in enumerate(hosts):
            own = folder / f"node{node}"
            words = tiny_flags(own, **SETTINGS, from_resume=1)
            options = [
                "--nnodes",
                "2",
                "--node_rank",
                str(node),
                "--master_addr",
                "10.77.0.1",
                "--master_port",
                "29500",
            ]
            environment = os.environ | {
                "FAULTS": json.dumps(faults.get(node, [])),
                "GLOO_SOCKET_IFNAME": "eth0",
            }
            with (own / "log").open("ab") as log:
                processes.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", host, *torchrun(words, *options, ranks=1)],
                        cwd=ROOT,
                        stdout=log,
                        stderr=log,
                        env=environment,
                        start_new_session=True,
                    )
                )
        return processes

    def wait(self, processes: list) -> list[int]:
        try:
            return [process.wait(timeout=120) for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def test_a_lost_host_and_a_new_start_of_both_change_no_bit(
        self, whole: Path, tmp_path: Path, hosts: list[str]
    ) -> None:
        for node in (0, 1):
            tiny_flags(tmp_path / f"node{node}")  # each has the corpus
        slow = [("slow_updates", {"seconds": 0.1})]
        processes = self.start(hosts, tmp_path, {0: slow, 1: slow})
        until(reached(tmp_path / "node0", 7))
        for pid in [*descendant_pids(processes[1].pid), processes[1].pid]:  # the machine is gone
            os.kill(pid, signal.SIGKILL)
        assert all(self.wait(processes))
        log = (tmp_path / "node0" / "log").read_text()
        assert "rank 1 on " in log and "dead or stuck" in log, log
        assert read_run_state(tmp_path / "node0" / "checkpoints")["status"] == "failed"

        processes = self.start(hosts, tmp_path, {})
        assert self.wait(processes) == [0, 0], (tmp_path / "node0" / "log").read_text()
        assert_equal_runs(tmp_path / "node0", whole)
        assert read_metrics(tmp_path / "node1") == []
        assert list_states(tmp_path / "node1" / "checkpoints", "pretrain_32") == []


def test_a_finished_run_on_two_ranks_changes_no_file(whole: Path) -> None:
    before = files_with_times(whole)
    words = tiny_flags(whole, **SETTINGS, from_resume=1)
    assert launched.run_trainers(words, whole.parent / "log", 2) == [0, 0]
    assert files_with_times(whole) == before

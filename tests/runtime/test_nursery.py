"""Workers that are forked: what they see, how their ends are known, and what happens without their server."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_packages import expected, run_all, samples, two_stages, weights

from pipecompile.errors import WorkerDied
from pipecompile.runtime import nursery
from pipecompile.runtime.process import Forked, Process
from pipecompile.runtime.session import Session

#: Says what a worker finds around it on the first descriptor it was given, then sleeps. (The rule sympy makes for its
#: own warnings comes with torch's compiler, which a server that forked a trainer's workers has.)
PROBE = """
import ctypes, json, os, signal, sys, time, warnings

def main(arguments=None, owner=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    import torch
    numbers = [int(word) for word in arguments[: arguments.index("--parent")]]
    files = {}
    for number in (0, 1, 2, *numbers):
        status = os.fstat(number)
        files[number] = [status.st_dev, status.st_ino]
    strays = [int(fd) for fd in os.listdir("/proc/self/fd") if int(fd) not in {owner, 0, 1, 2, *numbers}]
    text = {
        "files": files, "arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(),
        "path": sys.path, "flags": str(sys.flags), "session": os.getsid(0) == os.getpid(),
        "cores": sorted(os.sched_getaffinity(0)), "threads": torch.get_num_threads(),
        "tasks": len(os.listdir("/proc/self/task")),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGPIPE)],
        "mask": [str(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        "filters": [str(rule) for rule in warnings.filters if "sympy" not in str(rule)],
        "strays": sum(map(held, strays)),
        "c": ctypes.CDLL(None).getenv(b"MY_SETTING") != 0,
    }
    os.write(numbers[0], json.dumps(text).encode())
    os.close(numbers[0])
    time.sleep(60)

def held(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False  # that of the listing
    return True

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "nursery_probe.py").write_text(PROBE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "nursery_probe"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[nursery._Nursery]:
    """A nursery without a server, for tests that break it."""
    made = nursery._Nursery()
    monkeypatch.setattr(nursery, "_nursery", made)
    yield made
    made.close()


def asked(main: str, extra: int = 0) -> tuple[Process, dict[str, Any]]:
    """A process of the probe and what it says."""
    read, write = os.pipe()
    more = [os.dup(read) for _ in range(extra)]
    try:
        process = nursery.start(main, list(map(str, [write, *more])), [write, *more], threads=1)
        os.close(write)
        with open(read, closefd=False) as answer:
            found = json.loads(answer.read())
        inodes = [os.fstat(read).st_ino] * (1 + extra)
        assert [found["files"].pop(str(number))[1] for number in (write, *more)] == inodes
        return process, found
    finally:
        for fd in (read, *more):
            os.close(fd)


def ended(process: Process) -> int:
    process.kill()
    return process.wait(10)


def test_a_fork_sees_what_a_process_of_its_own_would(
    probe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(asked(probe)[0])  # the server is there before anything changes
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MY_SETTING", "caf\udce9")  # bytes that are no text
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.syspath_prepend(str(folder))
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        forked, found = asked(probe, extra=300)
        monkeypatch.setattr(nursery._nursery, "_given_up", "a test says so")
        plain, wanted = asked(probe, extra=300)
    finally:
        os.sched_setaffinity(0, cores)
    assert isinstance(forked, Forked)
    assert isinstance(plain, subprocess.Popen)
    # Allowed cores of a new process are those of the thread that starts all of them.
    assert found.pop("cores") == [max(cores)]
    wanted.pop("cores")
    assert found == wanted
    assert found["environment"]["MY_SETTING"] == "caf\udce9"
    assert found["folder"] == str(folder)
    assert found["path"][0] == str(folder)
    assert found["tasks"] == 1
    assert ended(forked) == ended(plain) == -signal.SIGKILL


def test_a_search_path_as_python_takes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.setattr(sys, "path", [tmp_path, "", *sys.path])
    monkeypatch.chdir(gone)
    assert nursery._environment(1)["PYTHONPATH"].split(os.pathsep)[:2] == [str(gone), sys.path[2]]
    gone.rmdir()
    assert nursery._environment(1)["PYTHONPATH"].split(os.pathsep)[:2] == [os.sep, sys.path[2]]


def test_forks_draw_random_numbers_of_their_own() -> None:
    body = "y = torch.rand(4, 6) + 0 * aten.mm.default(x, a)"
    drawn: list[torch.Tensor] = []
    for _ in range(2):
        with Session(two_stages(body), weights()) as session:
            drawn.append(run_all(session, samples(1))[0][1][0])
    assert not torch.equal(*drawn)


def test_the_end_of_a_fork_is_known_to_every_thread_that_waits(probe: str) -> None:
    open_before = len(os.listdir("/proc/self/fd")) if nursery.prepare() else -1
    process, _ = asked(probe)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(process.wait(20))) for _ in range(3)]
    for thread in threads:
        thread.start()
    os.kill(process.pid, signal.SIGTERM)
    for thread in threads:
        thread.join(20)
    assert codes == [-signal.SIGTERM] * 3
    assert process.poll() == -signal.SIGTERM
    process.kill()
    assert not Path(f"/proc/{process.pid}").exists()
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_another_server_for_what_is_read_at_load_and_in_place_of_a_killed_one(
    probe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = nursery.prepare()
    process, _ = asked(probe)
    monkeypatch.setenv("MY_SETTING", "1")
    assert nursery.prepare() == first
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert nursery.prepare() not in (None, first)
    assert process.poll() is None, "a server that is not asked any more keeps its workers"
    assert ended(process) == -signal.SIGKILL
    assert gone(first)
    monkeypatch.undo()
    state, (x,) = weights(), samples(1)
    with Session(two_stages(), state) as session:
        run_all(session, [x])
        killed = nursery.prepare()
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(WorkerDied, match=r"was killed by SIGKILL .*forked from was killed first"):
            run_all(session, [x] * 100)
    with Session(two_stages(), state) as session:
        assert torch.equal(run_all(session, [x])[0][1][0], expected(state, x))
        assert nursery.prepare() not in (None, killed)
    assert gone(killed)


def gone(pid: int | None) -> bool:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        nursery.prepare()  # which reaps those dismissed
        time.sleep(0.01)
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("trouble", ["a thread", "no start", "bound threads"])
def test_where_no_server_will_do_workers_are_processes_of_their_own(
    trouble: str,
    fresh: nursery._Nursery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = {
        "a thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
        "no start": "import sys\nif 'fork_server' in ' '.join(sys.orig_argv): sys.exit(1)",
        "bound threads": "",
    }
    why = {"a thread": "2 threads", "no start": "ended", "bound threads": "OMP_PROC_BIND"}
    (tmp_path / "sitecustomize.py").write_text(broken[trouble])
    (tmp_path / "nursery_brief.py").write_text("def main(): pass")
    monkeypatch.syspath_prepend(str(tmp_path))
    if trouble == "bound threads":
        monkeypatch.setenv("OMP_PROC_BIND", "true")
    with caplog.at_level(logging.WARNING, logger="pipecompile"):
        processes = [nursery.start("nursery_brief", [], [], threads=1) for _ in range(2)]
    assert [process.wait(20) for process in processes] == [0, 0]
    assert all(isinstance(process, subprocess.Popen) for process in processes)
    assert len(caplog.messages) == 1
    assert why[trouble] in caplog.messages[0]


def test_a_session_of_plain_processes(fresh: nursery._Nursery) -> None:
    fresh._given_up = "a test says so"
    state, xs = weights(), samples(5)
    with Session(two_stages(), state) as session:
        assert all(torch.equal(y, expected(state, x)) for x, (_, (y,)) in zip(xs, run_all(session, xs), strict=True))
        os.kill(session.pids[1], signal.SIGTERM)
        with pytest.raises(WorkerDied, match="was killed by SIGTERM"):
            run_all(session, xs * 100)


SCRIPT = """
import os, sys, threading
sys.path.insert(0, {tests!r})
from pipecompile.runtime import nursery

print(nursery.prepare(), flush=True)
assert "torch" not in sys.modules
from pipecompile.runtime.session import Session
from runtime_packages import expected, run_all, samples, two_stages, weights

state, xs = weights(), samples(3)

def works():
    with Session(two_stages(), state) as session:
        return [float(y.sum()) for _, (y,) in run_all(session, xs)]

wanted = [float(expected(state, x).sum()) for x in xs]
kept = Session(two_stages(), state)
thread = threading.Thread(target=lambda: found.append(works()))
found = []
thread.start()
found.append(works())
thread.join()
assert found == [wanted, wanted]
sys.stdout.flush()
child = os.fork()
if child == 0:
    server = nursery.prepare()
    print(server, works() == wanted, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(nursery.prepare(), works() == wanted, *kept.pids)
"""


def test_threads_forks_and_a_quiet_end() -> None:
    script = textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent)))
    # From Python 3.12 on a fork of a process with threads warns.
    words = [sys.executable, "-W", "error", "-W", "ignore:.*fork.*:DeprecationWarning", "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (server,), (others, worked), (again, still, *pids) = (line.split() for line in done.stdout.splitlines())
    assert worked == still == "True"
    assert server == again != others
    assert all(gone(int(pid)) for pid in (server, others, *pids))

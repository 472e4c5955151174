"""Runs candidate programs with their tests, each in a process of its own that `supervisor.py` shuts off."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

import tqdm

from .supervisor import PROTECTIONS, UNUSED_USERS

_SUPERVISOR = Path(__file__).with_name("supervisor.py").read_text(encoding="utf-8")
# For the supervisor to start and to clean up, on a busy machine, before it is given up.
_GRACE_SECONDS = 20.0


@dataclass(frozen=True)
class Limits:
    """What one candidate may use."""

    cpu_seconds: int
    """Processor time of each of its processes."""
    wall_seconds: float
    """Time from start to end."""
    memory_mb: int
    """Address space of each of its processes, in MiB."""
    file_mb: int
    """Size of a file, in MiB; of all files together where `protections["files"]`."""
    max_processes: int
    """Processes and threads besides the first."""


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate."""

    status: str
    """`passed`; `failed` (an exception, or an exit code above 0); `exited early` (exit code 0, but before the end of
    the tests); `timed out` (processor or wall time); `killed` (by a signal); `supervisor lost` (that was killed)."""
    detail: str
    """The last line of its output, at most 200 characters."""
    protections: dict[str, bool]
    """Whether it was protected from, for each of `PROTECTIONS`; empty if that is not known."""


def run_candidates(
    programs: list[tuple[str, str]], limits: Limits, num_workers: int
) -> tuple[list[Outcome], dict[str, bool]]:
    """The outcome of each program with its tests, in order, and what all of them were protected from.

    Raises:
        RuntimeError: a program that does nothing does not pass: whatever the others did would say nothing about them.
    """
    possible = UNUSED_USERS if os.geteuid() == 0 else [os.geteuid()]
    users = [possible[worker % len(possible)] for worker in range(num_workers)]
    tasks = {user: _tasks_of(user) for user in possible}
    free: SimpleQueue[int] = SimpleQueue()
    for user in users:
        free.put(user)

    def run(pair: tuple[str, str]) -> Outcome:
        user = free.get()
        try:
            return _run(*pair, limits=limits, user=user, user_tasks=tasks[user], same_user=users.count(user))
        finally:
            free.put(user)

    idle = run(("", ""))
    if idle.status != "passed":
        raise RuntimeError(f"an empty program must pass under the limits {limits}; it {idle.status}: {idle.detail}")
    different = list(dict.fromkeys(programs))  # a candidate that a model wrote twice is run once
    executor = ThreadPoolExecutor(num_workers)
    try:
        runs = executor.map(run, different)
        outcomes = list(tqdm.tqdm(runs, "running", len(different), unit="program", disable=None))
    finally:
        executor.shutdown(cancel_futures=True)
    known = [outcome.protections for outcome in [idle, *outcomes] if outcome.protections]
    found = dict(zip(different, outcomes, strict=True))
    return [found[pair] for pair in programs], {name: all(each[name] for each in known) for name in PROTECTIONS}


def _run(program: str, tests: str, *, limits: Limits, user: int, user_tasks: int, same_user: int) -> Outcome:
    """Runs one candidate as `user`, who has `user_tasks` processes otherwise and `same_user` candidates at a time."""
    folder = tempfile.mkdtemp(prefix="candidate-")
    token = os.urandom(16).hex()
    request = {
        "program": program,
        "tests": tests,
        "token": token,
        "folder": folder,
        "user": user,
        "user_tasks": user_tasks,
        "same_user": same_user,
        **asdict(limits),
    }
    supervisor = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-c", _SUPERVISOR],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Nothing of the environment, but for what an interpreter may need to start.
        env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
        start_new_session=True,
    )
    try:
        answer, errors = supervisor.communicate(json.dumps(request).encode(), limits.wall_seconds + _GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        answer, errors = b"", b""
    finally:
        _kill_session(supervisor)
        _remove(folder)
    if answer:
        return Outcome(**json.loads(answer))
    if supervisor.returncode < 0:
        return Outcome("supervisor lost", "", {})
    raise RuntimeError(f"the supervisor of candidate programs failed:\n{errors.decode(errors='replace')}")


def _kill_session(supervisor: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(supervisor.pid, signal.SIGKILL)
    supervisor.wait()


def _remove(folder: str) -> None:
    """Removes a folder, whatever permissions a candidate left on what is in it."""
    for place, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(place, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(folder)


def _tasks_of(user: int) -> int:
    """Processes and threads of a user, which RLIMIT_NPROC counts; 0 where the system does not list them."""
    tasks = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if process.stat().st_uid == user:
                tasks += len(os.listdir(process / "task"))
    return tasks

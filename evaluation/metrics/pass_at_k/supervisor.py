"""Runs one candidate program with its tests, shut off as far as the system allows, and says what became of it.

Not imported by what it runs, and run by `sandbox.py` as `python -I -S -c <this text>`: it then reads a request as
JSON from its standard input and writes an answer as JSON to its standard output.

    evaluating process
    └─ supervisor (this file)         own session; dies with the evaluating process
       └─ init of a process namespace (this file, forked), where the system has namespaces: all below die with it
          └─ candidate                own session, limits, no privileges, empty environment, working directory

Whatever is missing on a system is missing in `protections` of the answer; nothing is assumed.
"""

import contextlib
import ctypes
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time

PROTECTIONS = {
    "network": "can reach the network",
    "processes": "can see other processes and signal those of their user",
    "files": "can change files outside their working directory",
    "user": "run as root, which no limit on processes binds",
}
"""What a run can be protected from, and what candidates can do where it is not."""

UNUSED_USERS = range(65520, 65534)
"""What candidates run as where the evaluating process is root's: numbers between those that systemd gives to services
and `nobody`, which belong to no one. Each that runs at a time has its own, as long as there are so many."""
_OWN_PROCESSES = 3  # supervisor, init, and the candidate itself
_OUTPUT_KEPT = 2048
# <sched.h>, <sys/mount.h>, <sys/prctl.h>, <linux/capability.h>, <linux/mount.h>: stable numbers of the kernel's ABI.
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER = 0x20000, 0x8000000, 0x10000000
_CLONE_NEWPID, _CLONE_NEWNET = 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x4000, 0x40000
_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 8, 36, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 47, 2
_CAP_DAC_READ_SEARCH, _CAPABILITY_VERSION = 2, 0x20080522
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 0x1

_libc = ctypes.CDLL(None, use_errno=True)

# What runs in the candidate's process. The tests call the program's functions, so both share an interpreter; it says
# that the tests came to their end by repeating a token, which it does not read before then: a program that exits
# early, in whatever way, does not repeat it, and neither does a child that it forks.
_HARNESS = """
import json, os, sys, types
def run(read=os.read, write=os.write, leave=os._exit, process=os.getpid, compile=compile, exec=exec):
    source, token, report = map(int, sys.argv[1:])
    with open(source, encoding="utf-8") as file:
        program, tests = json.load(file)
    own = process()
    module = sys.modules["candidate"] = types.ModuleType("candidate")
    sys.argv[:] = ["candidate.py"]
    exec(compile(program, "candidate.py", "exec"), module.__dict__)
    exec(compile(tests, "tests.py", "exec"), module.__dict__)
    if process() == own:
        write(report, read(token, 64))
    leave(0)
run()
"""


def supervise() -> None:
    request = json.load(sys.stdin)
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
    protections = {name: False for name in PROTECTIONS}
    if os.geteuid() == 0:
        os.chown(request["folder"], request["user"], request["user"])
    if _enter_namespaces():
        protections["network"] = protections["processes"] = True
        protections["files"] = _make_files_read_only(request)
        init = os.fork()  # the first process of the process namespace
        if init:
            os.waitpid(init, 0)
            return
        _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
    os.chdir(request["folder"])
    _call("prctl", _PR_SET_CHILD_SUBREAPER, 1)  # what a candidate leaves behind becomes a child of this process
    answer = _run(request, protections)
    if not protections["processes"]:
        _kill_children()
    json.dump(answer, sys.stdout)
    sys.stdout.flush()


def _enter_namespaces() -> bool:
    """Leaves network, mounts, interprocess communication and, for children to come, processes to the others."""
    flags = _CLONE_NEWNET | _CLONE_NEWPID | _CLONE_NEWNS | _CLONE_NEWIPC
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        return _call("unshare", flags)
    if not _call("unshare", flags | _CLONE_NEWUSER):
        return False
    # The same user inside as outside: without a mapping it could not own a file of the new file system.
    with contextlib.suppress(OSError):
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    return True


def _make_files_read_only(request: dict) -> bool:
    """Makes all files unchangeable, and the folder an empty file system of limited size, gone with the namespace."""

    class MountAttributes(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns_fd")]

    attributes = MountAttributes(set=_MOUNT_ATTR_RDONLY)
    options = f"size={request['file_mb']}m,nr_inodes=4096,mode=700"
    if os.geteuid() == 0:
        options += f",uid={request['user']},gid={request['user']}"
    return (
        _call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
        and _call(
            "syscall",
            _SYS_MOUNT_SETATTR,
            _AT_FDCWD,
            b"/",
            _AT_RECURSIVE,
            ctypes.byref(attributes),
            ctypes.sizeof(attributes),
        )
        and _call("mount", b"tmpfs", request["folder"].encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, options.encode())
    )


def _run(request: dict, protections: dict[str, bool]) -> dict:
    """Starts the candidate, watches it until it ends or its time is over, and kills what it started."""
    source = os.open("source", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.unlink("source")
    os.write(source, json.dumps([request["program"], request["tests"]]).encode())
    os.lseek(source, 0, os.SEEK_SET)
    token, token_end = os.pipe()
    os.write(token_end, request["token"].encode())
    report, report_end = os.pipe()
    os.set_blocking(report, False)

    protections["user"] = os.geteuid() != 0 or _can_leave_root(request["user"])
    task_limit = _task_limit(request, in_user_namespace=protections["processes"] and os.geteuid() != 0)

    def limit() -> None:
        cpu, memory = request["cpu_seconds"], request["memory_mb"] << 20
        for name, soft, hard in (
            ("RLIMIT_CPU", cpu, cpu + 1),
            ("RLIMIT_AS", memory, memory),
            ("RLIMIT_FSIZE", request["file_mb"] << 20, request["file_mb"] << 20),
            ("RLIMIT_NPROC", task_limit, task_limit),
            ("RLIMIT_NOFILE", 64, 64),
            ("RLIMIT_CORE", 0, 0),
        ):
            number = getattr(resource, name)
            allowed = resource.getrlimit(number)[1]
            if allowed != resource.RLIM_INFINITY:
                soft, hard = min(soft, allowed), min(hard, allowed)
            resource.setrlimit(number, (soft, hard))
        if os.geteuid() == 0 and protections["user"]:
            _leave_root(request["user"])
        _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)

    child = subprocess.Popen(
        [sys.executable, "-I", "-B", "-u", "-X", "utf8", "-c", _HARNESS, str(source), str(token), str(report_end)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(source, token, report_end),
        env={**os.environ, "HOME": request["folder"], "TMPDIR": request["folder"]},
        start_new_session=True,
        preexec_fn=limit,
    )
    os.close(report_end)
    tail, timed_out = _watch(child, time.monotonic() + request["wall_seconds"])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    code = child.wait()
    try:
        passed = os.read(report, 64).decode() == request["token"] and code == 0
    except BlockingIOError:
        passed = False
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    used_up = used.ru_utime + used.ru_stime >= request["cpu_seconds"]
    out_of_cpu = code == -signal.SIGXCPU or (code == -signal.SIGKILL and used_up)
    lines = tail.decode(errors="replace").strip().splitlines()
    return {
        "status": _status(passed, timed_out or out_of_cpu, code),
        "detail": lines[-1][:200] if lines else "",
        "protections": protections,
    }


def _status(passed: bool, out_of_time: bool, code: int) -> str:
    if passed:
        return "passed"
    if out_of_time:
        return "timed out"
    if code < 0:
        return "killed"
    return "failed" if code else "exited early"


def _watch(child: subprocess.Popen, deadline: float) -> tuple[bytes, bool]:
    """The end of the candidate's output, and whether it ran past the deadline. All else that it writes is dropped."""
    assert child.stdout is not None
    output, tail = child.stdout.fileno(), b""
    os.set_blocking(output, False)
    is_open = True
    while True:
        ended = child.poll() is not None
        for _ in range(16):  # not until it is empty: what the candidate left behind may write without end
            if not (is_open and select.select([output], [], [], 0)[0]):
                break
            chunk = os.read(output, 1 << 16)
            tail = (tail + chunk)[-_OUTPUT_KEPT:]
            is_open = bool(chunk)
        if ended or time.monotonic() > deadline:
            return tail, not ended
        select.select([output] if is_open else [], [], [], 0.01)


def _task_limit(request: dict, in_user_namespace: bool) -> int:
    """For RLIMIT_NPROC, which counts all processes and threads of a user; since Linux 5.14 those of its namespace."""
    one_candidate = request["max_processes"] + _OWN_PROCESSES
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if in_user_namespace and release and (int(release[1]), int(release[2])) >= (5, 14):
        return one_candidate
    return request["user_tasks"] + one_candidate * request["same_user"]


def _can_leave_root(user: int) -> bool:
    """Tried in a child, because there is no way back."""
    child = os.fork()
    if child == 0:
        try:
            _leave_root(user)
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def _leave_root(user: int) -> None:
    """Gives up root and all that it may do, but for reading: the interpreter may lie in root's own folders."""
    with open("/proc/self/status") as file:
        permitted = int(file.read().partition("CapPrm:")[2].split()[0], 16)
    kept = permitted & 1 << _CAP_DAC_READ_SEARCH
    _call("prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    # Effective, permitted and inheritable, the lower 32 bits and then the upper.
    _call("capset", header, (ctypes.c_uint32 * 6)(kept, kept, kept, 0, 0, 0))
    if kept:
        _call("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_READ_SEARCH, 0, 0)


def _kill_children() -> None:
    """Kills what the candidate left behind, including what left its session."""
    while True:
        children = []
        for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
            try:
                with open(f"/proc/{int(name)}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except (ValueError, OSError):
                continue
            if parent == os.getpid():
                children.append(int(name))
        if not children:
            return
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _call(name: str, *arguments: object) -> bool:
    """Whether a call into the C library went well; False where it does not exist, as on other systems than Linux."""
    function = getattr(_libc, name, None)
    return function is not None and function(*arguments) == 0


if __name__ == "__main__":
    supervise()

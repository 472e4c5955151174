"""pass@k: its estimator against enumeration, and programs that try what a program of a model may do by accident.

Each is tried as the system allows, and as where there are no namespaces, of which every Linux machine can be short.
"""

import itertools
import os
import re
import socket
import sys
import tempfile
import textwrap
import warnings
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

METRIC = Path(__file__).parents[2] / "evaluation" / "metrics" / "pass_at_k"
RIGHT = "def answer():\n    return 42\n"
TESTS = "assert answer() == 42\n"


def sandbox_module(metric: evaluate.EvaluationModule) -> Any:
    return sys.modules[type(metric).__module__.rpartition(".")[0] + ".sandbox"]


@pytest.fixture(params=["with namespaces", "without namespaces"])
def metric(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> evaluate.EvaluationModule:
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    if request.param == "without namespaces":
        sandbox = sandbox_module(metric)
        without = sandbox._SUPERVISOR.replace("if _enter_namespaces():", "if False:")
        assert without != sandbox._SUPERVISOR
        monkeypatch.setattr(sandbox, "_SUPERVISOR", without)
    return metric


def run(metric: evaluate.EvaluationModule, *programs: str, tests: str = TESTS, **settings: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pass_at_k: on this system")  # they have a test of their own
        return metric.compute(
            predictions=[list(programs)], references=[tests], allow_code_execution=True, return_items=True, **settings
        )


def status(metric: evaluate.EvaluationModule, *programs: str, **settings: Any) -> list[str]:
    return run(metric, *programs, **settings)["items"]["status"][0]


def detail(metric: evaluate.EvaluationModule, program: str, **settings: Any) -> str:
    items = run(metric, program, **settings)["items"]
    assert items["status"] == [["failed"]], items
    return items["detail"][0][0]


def test_right_and_wrong_programs(metric: evaluate.EvaluationModule) -> None:
    wrong = "def answer():\n    return 41\n"
    broken = "def answer(:\n"
    swallows_the_tests = RIGHT + '"""'
    items = run(metric, RIGHT, wrong, broken, swallows_the_tests)["items"]
    assert items["status"] == [["passed", "failed", "failed", "failed"]]
    assert items["detail"][0][1] == "AssertionError"
    assert items["detail"][0][2].startswith("SyntaxError")
    assert items["num_passed"] == [1]


def test_programs_run_as_a_module_of_their_own(metric: evaluate.EvaluationModule) -> None:
    program = (
        "from __future__ import annotations\n"
        "import dataclasses, pickle, threading, typing\n"
        "@dataclasses.dataclass\n"
        "class Point:\n    x: int\n    kind: typing.ClassVar[str] = 'point'\n"
        "def answer():\n"
        "    thread = threading.Thread(target=list)\n    thread.start()\n    thread.join()\n"
        "    return pickle.loads(pickle.dumps(Point(42))).x\n"
        "if __name__ == '__main__':\n    raise RuntimeError('run as a script')\n"
    )
    assert status(metric, program) == ["passed"]


def test_an_early_exit_is_no_pass(metric: evaluate.EvaluationModule) -> None:
    ways = [
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os; os._exit(0)",
        "import os; os.execv('/bin/true', ['true'])",
        "import os\nif os.fork(): os._exit(0)",  # its child goes on to the tests, and passes them
    ]
    at_once = [f"{RIGHT}{way}\n" for way in ways]
    when_called = [f"def answer():\n{textwrap.indent(way, '    ')}\n    return 42\n" for way in ways]
    assert status(metric, *at_once, *when_called) == ["exited early"] * 10


def test_endless_programs_are_stopped(metric: evaluate.EvaluationModule) -> None:
    programs = {
        "a loop that will not hear": "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "sleep": "import time; time.sleep(1000)",
        "output": "while True: print('x' * 10_000)",
        "a loop after its output was closed": "import os\nos.close(1); os.close(2)\nwhile True: pass",
    }
    found = status(metric, *programs.values(), cpu_seconds=1, wall_seconds=4)
    assert dict(zip(programs, found, strict=True)) == dict.fromkeys(programs, "timed out")


def test_memory_is_limited(metric: evaluate.EvaluationModule) -> None:
    programs = ["held = bytearray(4 << 30)", "held = []\nwhile True: held.append('x' * 1_000_000)"]
    items = run(metric, *programs, RIGHT + "held = bytearray(100 << 20)", memory_mb=256)["items"]
    assert items["status"] == [["failed", "failed", "passed"]]
    assert items["detail"][0][:2] == ["MemoryError", "MemoryError"]


def test_files_are_limited(metric: evaluate.EvaluationModule) -> None:
    one = "with open('file', 'wb') as file:\n    for _ in range(100): file.write(bytes(1 << 20))"
    # The second is the end of the file system where all files together are limited.
    assert re.search("File too large|No space left", detail(metric, one, file_mb=4))
    many = "for n in range(100): open(f'file{n}', 'wb').write(bytes(1 << 20))"
    result = run(metric, many, file_mb=4)
    assert result["items"]["status"] == [["failed"]]
    if result["sandbox"]["files"]:
        assert "No space left" in result["items"]["detail"][0][0]


def test_processes_are_limited(metric: evaluate.EvaluationModule) -> None:
    forks = "import os, time\nfor _ in range(200):\n    if os.fork() == 0: time.sleep(60); os._exit(0)"
    result = run(metric, forks, num_workers=1)
    if not result["sandbox"]["user"]:
        pytest.skip("root that cannot become another user is bound by no limit on processes")
    assert result["items"]["status"] == [["failed"]]
    assert "Resource temporarily unavailable" in result["items"]["detail"][0][0]
    assert status(metric, RIGHT + "import os\nif os.fork() == 0: os._exit(0)\nos.wait()") == ["passed"]
    assert "unavailable" in detail(metric, "import threading\nfor _ in range(99): threading.Event().wait(0)\n" + forks)


def test_a_program_that_starts_all_it_may_fails_no_other(metric: evaluate.EvaluationModule) -> None:
    starts_all = "import os, time\nfor _ in range(200):\n    if os.fork() == 0: time.sleep(60); os._exit(0)"
    greedy = f"import time\ntry:\n    {textwrap.indent(starts_all, '    ').strip()}\nexcept OSError: time.sleep(1)"
    starts_some = RIGHT + (
        "import threading, time\n"
        "for _ in range(10):\n"
        "    threads = [threading.Thread(target=time.sleep, args=(0.1,)) for _ in range(10)]\n"
        "    for thread in threads: thread.start()\n"
        "    for thread in threads: thread.join()\n"
    )
    result = run(metric, greedy, starts_some, num_workers=2)
    if not result["sandbox"]["processes"] and os.geteuid() != 0:
        pytest.skip("programs of one ordinary user share a limit where there are no namespaces")
    assert result["items"]["status"] == [["failed", "passed"]]


def test_nothing_is_left_running(metric: evaluate.EvaluationModule) -> None:
    mark = f"left-behind-{os.getpid()}"
    program = RIGHT + (
        "import subprocess, sys\n"
        f"code = 'import time; time.sleep(600) # {mark}'\n"
        "for session in (False, True):\n"
        "    subprocess.Popen([sys.executable, '-c', code], start_new_session=session)\n"
        "import os\n"
        "if os.fork() == 0:\n"  # a daemon: its parent is gone, its session its own
        "    os.setsid()\n"
        "    if os.fork() == 0: os.execv(sys.executable, [sys.executable, '-c', code])\n"
        "    os._exit(0)\n"
        "os.wait()\n"
    )
    assert status(metric, program) == ["passed"]
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
        except OSError:
            continue
        if mark in command and int(process.name) != os.getpid():
            left.append(command)
    assert left == []


def test_whoever_kills_its_parent_harms_nobody_else(metric: evaluate.EvaluationModule) -> None:
    kills = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nimport time; time.sleep(1)\n"
    found = status(metric, kills + "raise ValueError", RIGHT, num_workers=1)
    assert found[1] == "passed"
    assert found[0] in ("failed", "supervisor lost")


def test_signals_reach_no_other_process() -> None:
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    protected = run(metric, RIGHT)["sandbox"]["processes"]
    if not protected:
        pytest.skip("no process namespaces on this system: the signal would reach this very test")
    everyone = "import os, signal\ntry: os.kill(-1, signal.SIGKILL)\nexcept ProcessLookupError: pass\n"
    assert status(metric, everyone + RIGHT, RIGHT) == ["passed", "passed"]


def test_network_is_there_only_where_the_result_says_so(metric: evaluate.EvaluationModule) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = run(metric, f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)\n{RIGHT}")
        server.settimeout(0.2)
        reached = True
        try:
            server.accept()[0].close()
        except TimeoutError:
            reached = False
    assert reached is not result["sandbox"]["network"]
    assert result["items"]["status"] == [["passed" if reached else "failed"]]


def test_files_outside_change_only_where_the_result_says_so(metric: evaluate.EvaluationModule) -> None:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "target"
        target.write_text("kept")
        for path in (target, target.parent):
            path.chmod(0o777)  # nothing but the sandbox stands in the way
        result = run(metric, f"open({str(target)!r}, 'w').write('changed')\n{RIGHT}")
        assert (target.read_text() == "kept") is result["sandbox"]["files"]


def test_what_is_open_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    sandbox = sandbox_module(metric)
    monkeypatch.setattr(sandbox, "_SUPERVISOR", sandbox._SUPERVISOR.replace("if _enter_namespaces():", "if False:"))
    with pytest.warns(UserWarning, match="pass_at_k: on this system the candidates") as caught:
        result = metric.compute(predictions=[[RIGHT]], references=[TESTS], allow_code_execution=True)
    messages = "\n".join(str(warning.message) for warning in caught)
    for name in ("network", "processes", "files"):
        assert result["sandbox"][name] is False
    assert "can reach the network" in messages
    assert "signal" in messages
    assert "files outside" in messages


def test_environment_input_and_folder(
    metric: evaluate.EvaluationModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = (
        "import os, sys, tempfile\n"
        "assert set(os.environ) <= {'HOME', 'TMPDIR', 'LC_CTYPE', 'LD_LIBRARY_PATH'}, os.environ\n"
        "assert sys.stdin.read() == ''\n"
        "assert os.listdir('.') == []\n"
        "with tempfile.NamedTemporaryFile() as file: assert os.path.dirname(file.name) == os.getcwd()\n"
        "os.makedirs('shut/inside'); open('shut/inside/file', 'w').close(); os.symlink('/', 'out')\n"
        "os.chmod('shut/inside', 0); os.chmod('shut', 0)\n"
    )
    items = run(metric, program + RIGHT)["items"]
    assert items["status"] == [["passed"]], items
    assert list(tmp_path.iterdir()) == []
    assert detail(metric, "input()").startswith("EOFError")


def test_a_sandbox_that_does_not_work_is_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    with pytest.raises(RuntimeError, match="an empty program must pass under the limits"):
        run(metric, RIGHT, memory_mb=1)
    monkeypatch.setattr(sandbox_module(metric), "_SUPERVISOR", "raise ValueError('nothing works')")
    with pytest.raises(RuntimeError, match="ValueError: nothing works"):
        run(metric, RIGHT)


def test_workers_change_nothing() -> None:
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    programs = [RIGHT, "x", RIGHT + "exit()", "while True: pass", RIGHT + "# again", RIGHT]
    columns = {"predictions": [programs, programs[:3]], "references": [TESTS, TESTS + "assert answer() == 41"]}
    one, two = (
        metric.compute(
            **columns, k=[1, 3], allow_code_execution=True, cpu_seconds=1, num_workers=workers, return_items=True
        )
        for workers in (1, 2)
    )
    assert one == two
    assert one["items"]["num_passed"] == [3, 0]
    assert one["items"]["num_candidates"] == [6, 3]
    assert one["pass@1"] == 0.25
    assert one["pass@3"] == (1 - 1 / 20) / 2


@settings(max_examples=40)
@given(st.data())
def test_estimate_is_the_mean_over_all_draws(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 9))
    passed, k = data.draw(st.integers(0, total)), data.draw(st.integers(1, total))
    estimate = sys.modules[type(evaluate.load(str(METRIC))).__module__]._estimate
    draws = list(itertools.combinations([True] * passed + [False] * (total - passed), k))
    assert estimate(total, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)
    # The product form of arXiv 2107.03374, figure 3.
    product = 1.0 - np.prod(1.0 - k / np.arange(total - passed + 1, total + 1)) if total - passed >= k else 1.0
    assert estimate(total, passed, k) == pytest.approx(product, abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allow_code_execution": False}, "allow_code_execution must be True, since pass@k runs programs"),
        ({"allow_code_execution": 1}, "allow_code_execution must be True"),
        ({"k": [0]}, r"k must hold numbers of at least 1; got \[0\]"),
        ({"k": []}, "k must hold numbers of at least 1"),
        ({"k": [3]}, "k must be at most the candidates of every item; got 3 and 2 candidates in item 1"),
        ({"num_workers": 0}, "num_workers must be at least 1; got 0"),
        ({"cpu_seconds": 0}, "cpu_seconds must be a whole number of at least 1; got 0"),
        ({"memory_mb": 0.5}, "memory_mb must be a whole number of at least 1; got 0.5"),
        ({"max_processes": -1}, "max_processes must be a whole number of at least 0; got -1"),
        ({"references": [TESTS, "assert ("]}, "references must be Python; got .* in item 1"),
        ({"predictions": [], "references": []}, "predictions must hold at least one item; got none"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    arguments = {
        "predictions": [[RIGHT] * 3, [RIGHT] * 2],
        "references": [TESTS] * 2,
        "allow_code_execution": True,
    }
    with pytest.raises(ValueError, match=message):
        metric.compute(**arguments | changes)

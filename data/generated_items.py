"""Questions and answers of reasoning-gym, written in a process of their own, so that none can stall the caller.

Run as a script, this file is that process: it answers lines of `generator index`, or `generator index entry`, with a
line of JSON each. It imports nothing of the package, so it starts fast.
"""

import json
import logging
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

logger = logging.getLogger(__name__)


class ItemWriter:
    """Asks the process for items; ends it, and starts another for the next, where one takes too long.

    Args:
        seed: Seeds every generator.
        size: How many items a generator has.
        longest_seconds: For one item; the first also imports reasoning-gym.

    Raises:
        ImportError: From `items`, where reasoning-gym is not installed.
    """

    def __init__(self, seed: int, size: int = 20_000, longest_seconds: float = 60) -> None:
        self.seed = seed
        self.size = size
        self.longest_seconds = longest_seconds
        self.stalled: dict[str, int] = {}
        """Generator -> the item that took too long, or failed; the items before it were given."""
        self.version = ""
        self._process: subprocess.Popen[bytes] | None = None

    def items(self, name: str) -> Iterator[str]:
        """A generator's questions with their answers, up to the first that takes too long or fails."""
        for index in range(self.size):
            item = self._ask(name, index)
            if item is None or "question" not in item:
                self.stalled[name] = index
                logger.warning("the generator %s gave no item %d; going on without it", name, index)
                return
            yield f"{item['question'].strip()}\n\nAnswer: {item['answer']}\n"

    def entries(self, name: str) -> Iterator[dict[str, Any]]:
        """A generator's entries, as its scorer reads them; without those that, through JSON, fail their own scorer."""
        for index in range(self.size):
            item = self._ask(name, index, "entry")
            if item is None:
                self.stalled[name] = index
                logger.warning("the generator %s gave no item %d; going on without it", name, index)
                return
            if item.get("score") == 1:
                yield item["entry"]

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> "ItemWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, name: str, index: int, *wanted: str) -> dict[str, Any] | None:
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.write(" ".join([name, str(index), *wanted, "\n"]).encode())
        process.stdin.flush()
        answer = self._answer(process)
        if answer is None:
            self.close()
        return answer

    def _answer(self, process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], self.longest_seconds)
        # The process writes whole lines and waits for the next question, so a line that has begun soon ends.
        line = process.stdout.readline() if ready else b""
        return json.loads(line) if line else None

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self.seed), str(self.size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Sets are walked in the order of their hashes: without this, items would differ from run to run.
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        ready = self._answer(self._process)
        if ready is None or "version" not in ready:
            self.close()
            raise ImportError("this domain is written by reasoning-gym: pip install 'equipoise[corpus]'")
        self.version = ready["version"]


def _serve(arguments: Sequence[str]) -> None:
    """Answers until the input ends. What generators print goes to the error stream, not among the answers."""
    seed, size = map(int, arguments)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from importlib.metadata import PackageNotFoundError, version

    try:
        import reasoning_gym

        found = version("reasoning-gym")
    except (ImportError, PackageNotFoundError):
        return
    print(json.dumps({"version": found}), file=answers, flush=True)
    datasets = {}
    for line in sys.stdin:
        name, index, *wanted = line.split()
        try:
            if name not in datasets:
                datasets[name] = reasoning_gym.create_dataset(name, seed=seed, size=size)
            item = datasets[name][int(index)]
            answer: dict[str, Any] = {"question": str(item["question"]), "answer": str(item["answer"])}
            if wanted:
                entry = json.loads(json.dumps(item))
                score = reasoning_gym.get_score_answer_fn(name)(entry["answer"], entry)
                answer = {"entry": entry, "score": float(score)}
        except Exception as error:  # whatever it is, the other generators go on
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1:])

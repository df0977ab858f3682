"""Chat templates: Jinja text that comes with a model, so an untrusted program, rendered in bounds.

Jinja's immutable sandbox keeps a template from Python; it does not keep it from looping for hours
or asking for all memory. So it runs in a child process (chat_sandbox.py), which is started at the
first chat, killed when it takes too long, and ends with its parent.
"""

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path

SECONDS = 5.0  # for one text
SANDBOX = Path(__file__).with_name("chat_sandbox.py")


class Renderer:
    """The child process. Restarted after it had to be killed."""

    def __init__(self):
        self.lock = threading.Lock()
        self.child: subprocess.Popen | None = None

    def render(self, template: str, variables: dict) -> str:
        """The template's text; ValueError where it fails, refuses or goes out of bounds."""
        question = json.dumps([template, variables])
        with self.lock:
            answer = self.ask(question)
        if not answer.endswith("\n"):
            raise ValueError(
                f"the model's chat template did not finish within {SECONDS:g} s; "
                "pass chat=False and write the prompt's format yourself"
            )
        text, error = json.loads(answer)
        if error:
            raise ValueError(f"the model's chat template failed: {error}")
        return text

    def ask(self, question: str) -> str:
        """One line to the child -> its line, cut short where it did not answer in time."""
        if self.child is None or self.child.poll() is not None:
            self.child = start()
        child, answer = self.child, ""
        assert child.stdout is not None
        watch = threading.Timer(SECONDS, child.kill)
        watch.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                print(question, file=child.stdin, flush=True)
            answer = child.stdout.readline()
        finally:
            watch.cancel()
            if not answer.endswith("\n"):  # what it may still say answers no later question
                self.child = None
                with contextlib.suppress(BrokenPipeError), child:
                    child.kill()
        return answer


def start() -> subprocess.Popen:
    import jinja2  # found here, so that the child finds the same

    folder = Path(jinja2.__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-I", str(SANDBOX), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


render = Renderer().render

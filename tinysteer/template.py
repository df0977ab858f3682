"""Chat templates: Jinja text that comes with a model, so an untrusted program, rendered in bounds.

Jinja's immutable sandbox keeps a template from Python; it does not keep it from looping for hours
or asking for all memory. So it runs in a child process (this same file, which then knows nothing
but the standard library and Jinja) with a clock, a memory limit and a longest answer. The child
is started at the first chat, answers in well under a millisecond, and ends with its parent.
"""

import contextlib
import json
import signal
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

SECONDS = 5.0  # for one text
BYTES = 1 << 29  # of address space
CHARACTERS = 4_000_000  # of one text


class Renderer:
    """The child process. Restarted after it had to be killed."""

    def __init__(self):
        self.lock = threading.Lock()
        self.child: subprocess.Popen | None = None

    def render(self, template: str, variables: dict) -> str:
        """The template's text; ValueError where it fails, refuses or goes out of bounds."""
        with self.lock:
            if self.child is None or self.child.poll() is not None:
                self.child = start()
            watch = threading.Timer(SECONDS, self.child.kill)
            watch.start()
            try:
                with contextlib.suppress(BrokenPipeError):
                    print(json.dumps([template, variables]), file=self.child.stdin, flush=True)
                answer = self.child.stdout.readline()
            finally:
                watch.cancel()
        if not answer:
            raise ValueError(
                f"the model's chat template did not finish within {SECONDS:g} s; "
                "pass chat=False and write the prompt's format yourself"
            )
        text, error = json.loads(answer)
        if error:
            raise ValueError(f"the model's chat template failed: {error}")
        return text


def start() -> subprocess.Popen:
    import jinja2  # found here, so that the child finds the same

    folder = Path(jinja2.__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-I", __file__, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


render = Renderer().render


# ------------------------------------------------------------------ from here on: in the child


def compiled():
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise ValueError(message)

    def strftime_now(pattern):
        from datetime import datetime

        return datetime.now().strftime(pattern)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    # The settings that chat templates are written for.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.filters["tojson"] = tojson
    return lru_cache(maxsize=8)(environment.from_string)


def answer(template, variables) -> str:
    text = ""
    for piece in template.generate(**variables):
        text += piece
        if len(text) > CHARACTERS:
            raise ValueError(f"its text is longer than {CHARACTERS} characters")
    return text


def serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's end is the child's
    sys.path.append(sys.argv[1])
    with contextlib.suppress(ImportError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    compile_template = compiled()
    for line in sys.stdin:
        template, variables = json.loads(line)
        try:
            reply = [answer(compile_template(template), variables), None]
        except MemoryError:
            reply = [None, f"it needs more than {BYTES >> 20} MB of memory"]
        except Exception as error:
            reply = [None, str(error) or type(error).__name__]
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    serve()

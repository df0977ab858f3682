"""The child process of chat.py: renders chat templates in Jinja's sandbox, within bounds.

Run as a script, so that it holds nothing but the standard library and Jinja. Reads one JSON line
[template, variables] at a time and answers with one, [text, error].
"""

import contextlib
import json
import signal
import sys
from functools import lru_cache

BYTES = 1 << 29  # of address space, where the system has such a limit
CHARACTERS = 4_000_000  # of one text
SECONDS = 60  # for one text; the parent is stricter while it lives


def compiled():
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks an assistant's text, for training: here it is just the text."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's way)

        def parse(self, parser):
            next(parser.stream)
            return Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True))

    def raise_exception(message):
        raise ValueError(message)

    def strftime_now(pattern):
        from datetime import datetime

        return datetime.now().strftime(pattern)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        layout = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(x, ensure_ascii=ensure_ascii, **layout)

    # The settings that chat templates are written for.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
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
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has none, macOS refuses
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    alarm = getattr(signal, "alarm", lambda seconds: None)  # should the parent die meanwhile
    compile_template = compiled()
    for line in sys.stdin:
        alarm(SECONDS)
        template, variables = json.loads(line)
        try:
            reply = [answer(compile_template(template), variables), None]
        except MemoryError:
            reply = [None, f"it needs more than {BYTES >> 20} MB of memory"]
        except Exception as error:
            words = " ".join(str(error).split()) or type(error).__name__
            reply = [None, words[:500]]
        print(json.dumps(reply), flush=True)
        alarm(0)


if __name__ == "__main__":
    serve()

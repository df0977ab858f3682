"""Prompts as a model wants them: chat templates in bounds, one BOS, stop ids, padding."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from checkpoints import make_tokenizer

from tinysteer.text.chat import Renderer, render
from tinysteer.text.chat_sandbox import CHARACTERS
from tinysteer.text.tokenizer import Tokenizer, pad

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CONVERSATIONS = {
    "a question": [{"role": "user", "content": 'Hi! 2 < 3 & "so" on\n\n'}],
    "a system message": [
        {"role": "system", "content": "  Be brief. "},
        {"role": "user", "content": "Grüße, 世界 🙂"},
    ],
    "several turns": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": ""},
    ],
}
TEMPLATES = {
    "turns": """{{ bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message.content | trim + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "blocks trimmed by the environment alone": """
{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
system: none
    {% endif %}
  {{ loop.index }}/{{ loop.length }} {{ message.role }}: {{ message.content }}
    {% if not loop.last %}

---
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
assistant:
{% endif %}
""",
    "a system message taken out": """
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] | trim -%}{%- set messages = messages[1:] -%}
{%- else -%}
  {%- set system = 'none' -%}
{%- endif -%}
{%- for m in messages -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('roles must alternate') }}
  {%- endif -%}
  {{ (system + '\\n' if loop.first else '') ~ '[INST]' ~ m['content'] ~ '[/INST]' }}
{%- endfor -%}""",
    "break and continue": """{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{{ message.content }}|
{% if message.role == 'assistant' %}{% break %}{% endif %}
{% endfor %}""",
    "today": "{{ strftime_now('%Y-%m-%d') }} {{ messages[-1].content }}",
    "tojson": """{{ messages | tojson }}{{ messages[0] | tojson(indent=2, sort_keys=true) }}
{{- {'b': '<é>', 'a': [1, 2.5, none]} | tojson(ensure_ascii=true, separators=(',', ':')) }}""",
    "namespaces, macros, filters and tests": """
{%- set ns = namespace(n=0, found=false) -%}
{%- macro turn(m) -%}<{{ m.role | upper }}>{{ m.content | default('x', true) }}{%- endmacro -%}
{%- for m in messages -%}
  {%- set ns.n = ns.n + 1 -%}
  {%- if m is mapping and m.content is string and 'H' in m.content -%}
    {%- set ns.found = true -%}
  {%- endif -%}
  {{- turn(m) -}}
{%- endfor -%}
{{ ns.n }} {{ ns.found }} {{ messages | map(attribute='role') | join(',') }}
{{- messages | selectattr('role', 'equalto', 'user') | list | length }}
{{- messages[0].content.split('\\n')[0].strip().replace('i', 'I') }} {{ 'x' in messages[0] }}""",
    "tools and documents are none": """{% if tools is not none %}{{ tools | length }}{% endif %}
{%- if documents is not none %}documents{% endif %}
{%- if custom_tools is defined %}custom{% endif %}{{ messages[0].content }}""",
    "special tokens": """{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}
{{- add_bos_token is defined }}{{ cls_token is defined }}""",
    "the assistant's text marked for training": """{% for message in messages %}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
{% else %}{{ message.content }}{% endif %}{% endfor %}""",
}


def chatting(template: str | None, **options) -> Tokenizer:
    return Tokenizer(make_tokenizer(), template=template, special=SPECIAL, **options)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_template_gives_what_transformers_gives(template, conversation):
    messages, template = CONVERSATIONS[conversation], TEMPLATES[template]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), **SPECIAL)
    theirs.chat_template = template
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chatting(template).format(messages) == expected


def test_a_string_is_the_message_of_a_user():
    ours = chatting(TEMPLATES["turns"])
    assert ours.format("Hi") == ours.format([{"role": "user", "content": "Hi"}])
    assert ours.format("Hi") == "<s><|im_start|>user\nHi</s>\n<|im_start|>assistant\n"


def test_what_a_template_refuses_is_said():
    refused = [{"role": "user", "content": "One?"}, {"role": "user", "content": "Two?"}]
    with pytest.raises(ValueError, match=r"template failed: roles must alternate$"):
        chatting(TEMPLATES["a system message taken out"]).format(refused)


def test_a_template_that_is_no_jinja_is_named_as_the_culprit():
    with pytest.raises(ValueError, match="the model's chat template failed: Expected an expr"):
        chatting("{% for %}").format("Hi")


def test_a_base_model_is_asked_in_plain_text():
    ours = chatting(None, adds_bos=True)
    assert ours.format("Why?") == "Q: Why?\nA:"
    assert ours.chat("Why?") == [1, *ours.vocabulary.encode("Q: Why?\nA:").ids[1:]]
    assert ours.stop_strings == ("\nQ:",)
    assert chatting("").format("Why?") == "Q: Why?\nA:"
    assert chatting("{{ messages }}").stop_strings == ()
    with pytest.raises(ValueError, match="base model without a chat template: give each prompt as"):
        ours.format([{"role": "user", "content": "Why?"}])


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}", TEMPLATES["turns"]])
def test_a_template_says_itself_where_a_bos_stands(template):
    ours = chatting(template, adds_bos=True)
    ids = ours.chat("Hi")
    assert ids.count(1) == (template != "{{ messages[0].content }}")
    assert ours.decode(ids) == ours.format("Hi").replace("<s>", "").replace("</s>", "")
    if template:
        transformers = pytest.importorskip("transformers")
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), **SPECIAL)
        theirs.chat_template = template
        asked = [{"role": "user", "content": "Hi"}]
        assert ids == theirs.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]


def test_there_is_exactly_one_bos_however_many_are_given():
    ours = chatting(None, adds_bos=True)
    h, i = ours.vocabulary.encode("hi", add_special_tokens=False).ids
    for text, ids in {"hi": [1, h, i], "<s><s>hi": [1, h, i], "": [1], "<s>": [1]}.items():
        assert ours.encode(text) == ids
    assert ours.encode("h<s>i") == [1, h, 1, i]  # what stands inside is the text's own


def test_there_is_no_bos_where_the_model_has_none():
    ours = chatting("{{ messages[0].content }}", adds_bos=False)
    assert 1 not in ours.chat("Hi")
    nameless = Tokenizer(make_tokenizer(), template="{{ messages[0].content }}", adds_bos=True)
    assert 1 not in nameless.chat("Hi")


@pytest.fixture
def folder(tmp_path) -> Path:
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    return tmp_path


def add(folder: Path, file: str, **settings):
    path = folder / file
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | settings))


def without_post_processor(folder: Path):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))


def test_whether_a_bos_is_added_is_read_from_the_files(folder):
    def first() -> int:
        return Tokenizer.load(folder).encode("hi")[0]

    h = Tokenizer.load(folder).encode("hi")[1]
    assert first() == 1  # tokenizer.json adds one
    add(folder, "tokenizer_config.json", add_bos_token=False)
    assert first() == h
    without_post_processor(folder)
    assert first() == h
    add(folder, "tokenizer_config.json", add_bos_token=True)
    assert first() == 1
    add(folder, "tokenizer_config.json", add_bos_token=None)
    assert first() == h
    add(folder, "tokenizer_config.json", add_bos_token=True, bos_token=None)
    assert first() == h


def test_special_tokens_may_be_described_at_length(folder):
    described = {"content": "<s>", "lstrip": False, "special": True}
    add(folder, "tokenizer_config.json", bos_token=described, add_bos_token=True, unk_token=None)
    assert Tokenizer.load(folder).special == SPECIAL


def test_truncation_and_padding_of_the_file_are_off(folder):
    vocabulary = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary.enable_truncation(4)
    vocabulary.enable_padding(length=10)
    vocabulary.save(str(folder / "tokenizer.json"))
    ours = Tokenizer.load(folder)
    assert len(ours.encode("seven!!")) == 8
    assert len(ours.encode("")) == 1


def test_the_template_is_found_in_its_three_places(folder):
    def text() -> str:
        return Tokenizer.load(folder).format("Hi")

    assert text() == "Q: Hi\nA:"
    several = [{"name": "rag", "template": "rag"}, {"name": "tool_use", "template": "tool"}]
    add(folder, "tokenizer_config.json", chat_template=several)
    assert text() == "rag"
    several.append({"name": "default", "template": "listed"})
    add(folder, "tokenizer_config.json", chat_template=several)
    assert text() == "listed"
    add(folder, "tokenizer_config.json", chat_template="tokenizer_config")
    assert text() == "tokenizer_config"
    add(folder, "chat_template.json", chat_template="json")
    assert text() == "json"
    (folder / "chat_template.jinja").write_text("jinjä", encoding="utf-8")
    assert text() == "jinjä"


def with_turn_ends(folder: Path) -> dict[str, int]:
    vocabulary = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary.add_special_tokens(["<|end|>", "<end_of_turn>", "<|eot_id|>", "<|im_end|>"])
    vocabulary.save(str(folder / "tokenizer.json"))
    return vocabulary.get_vocab()


def test_stop_ids_come_from_every_file(folder):
    def stops() -> set[int]:
        return set(Tokenizer.load(folder).stop_ids)

    assert stops() == {2}  # the tokenizer's own
    add(folder, "config.json", text_config={"eos_token_id": 17})
    assert stops() == {2, 17}
    add(folder, "config.json", eos_token_id=11)
    assert stops() == {2, 11}
    add(folder, "config.json", eos_token_id=[11, 12])
    assert stops() == {2, 11, 12}
    add(folder, "generation_config.json", eos_token_id=[12, 13])
    assert stops() == {2, 11, 12, 13}
    add(folder, "config.json", eos_token_id=None, text_config=None)
    add(folder, "tokenizer_config.json", eos_token=None)
    assert stops() == {12, 13}
    turn_ends = with_turn_ends(folder)
    assert stops() == {12, 13} | {turn_ends["<|end|>"], turn_ends["<end_of_turn>"]} | {
        turn_ends["<|eot_id|>"],
        turn_ends["<|im_end|>"],
    }


def test_special_tokens_are_left_out_of_the_text():
    assert chatting(None).decode([1, *chatting(None).encode("hi 世"), 2, 0]) == "hi 世"


def test_padding_is_on_the_left():
    tokens, start = pad([[5, 6, 7], [8], [9, 9]])
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8], [0, 9, 9]]
    assert start.tolist() == [0, 2, 1]


ESCAPES = {
    "to an object's class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "by the attr filter": "{{ (messages | attr('__class__')).__mro__ }}",
    "by formatting": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "by formatting, indirectly": "{{ ('{0.__class__.__mro__}' | attr('format'))(messages) }}",
    "to a global's module": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "to a function's module": "{{ raise_exception.__globals__['json'] }}",
    "by changing the messages": "{{ messages.append({'role': 'user'}) }}",
    "by changing a message": "{{ messages[0].update(content='x') }}",
    "by importing": "{% import 'os' as os %}",
    "by including a file": "{% include '/etc/passwd' %}",
    "a range too long": "{% for i in range(10 ** 9) %}{% endfor %}",
    "recursion without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}
HUNGRY = {
    "at once": "{{ 'x' * 10 ** 10 }}",
    "bit by bit": "{% set b = 'x' * (messages | length * 3 * 10 ** 8) %}{{ (b + b) | length }}",
}
LONG = {
    "at once": "{{ 'x' * 10 ** 7 }}",
    "bit by bit": "{% for i in range(99999) %}{{ messages[0].content * 100 }}{% endfor %}",
}
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 7 ** (9 ** 9) }}",
}


def still_renders():
    assert render("{{ x + 1 }}", {"x": 1}) == "2"


@pytest.mark.parametrize("way", ESCAPES)
def test_a_template_cannot_escape(way):
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="the model's chat template failed: "):
        chatting(ESCAPES[way]).format(messages)
    assert messages == [{"role": "user", "content": "Hi"}]
    still_renders()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process's memory has no limit")
@pytest.mark.parametrize("how", HUNGRY)
def test_a_template_cannot_take_all_memory(how):
    with pytest.raises(ValueError, match="it needs more than 512 MB of memory"):
        chatting(HUNGRY[how]).format("Hi")
    still_renders()


@pytest.mark.parametrize("how", LONG)
def test_a_template_cannot_give_a_text_without_bounds(how):
    with pytest.raises(ValueError, match=f"its text is longer than {CHARACTERS} characters"):
        chatting(LONG[how]).format("Hi")
    still_renders()


@pytest.mark.parametrize("what", ENDLESS)
def test_a_template_without_end_is_stopped(what, monkeypatch):
    still_renders()  # the child is up: its start does not count
    monkeypatch.setattr("tinysteer.text.chat.SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"did not finish within 0.5 s; pass chat=False and write"):
        chatting(ENDLESS[what]).format("Hi")
    assert time.monotonic() - began < 5
    monkeypatch.undo()
    still_renders()


def test_threads_get_their_own_texts():
    def texts(name: str) -> set[str]:
        return {render("{{ name }} " * 500, {"name": name}) for _ in range(40)}

    names = "abcd"
    with ThreadPoolExecutor(len(names)) as threads:
        assert list(threads.map(texts, names)) == [{f"{name} " * 500} for name in names]


@pytest.fixture
def renderer():
    """One of its own, that may be damaged."""
    made = Renderer()
    yield made
    with made.child:
        made.child.kill()


def test_an_interrupted_rendering_leaves_no_answer_to_the_next(renderer):
    assert renderer.render("first", {}) == "first"

    def interrupt():
        raise KeyboardInterrupt

    told, renderer.child.stdout = renderer.child.stdout, SimpleNamespace(readline=interrupt)
    renderer.child.stdout.close = told.close
    with pytest.raises(KeyboardInterrupt):
        renderer.render("second", {})
    assert renderer.render("third", {}) == "third"


def test_a_process_that_died_is_replaced(renderer):
    assert renderer.render("first", {}) == "first"
    renderer.child.kill()
    renderer.child.wait()
    assert renderer.render("second", {}) == "second"


def test_a_template_keeps_nothing_between_renderings():
    counting = "{% set n = namespace(i=0) %}{% set n.i = n.i + 1 %}{% set y = 1 %}{{ n.i }}{{ x }}"
    assert [render(counting, {"x": x}) for x in "ab"] == ["1a", "1b"]
    assert render("{{ n }}{{ x }}{{ y }}", {}) == ""


@pytest.mark.parametrize("config", ["{}", None])
def test_a_bos_that_tokenizer_json_alone_names_is_kept(config, checkpoint, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    source = checkpoint("llama: grouped heads")[0]
    (folder / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    if config:
        (folder / "tokenizer_config.json").write_text(config)
    assert Tokenizer.load(folder).encode("a")[0] == 1

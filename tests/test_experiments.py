"""The paper's experiments: texts, statistics, choices, resuming, and each run on tiny models."""

import csv
import hashlib
import io
import json
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tinysteer as ts
from tinysteer import experiments
from tinysteer.cli import main
from tinysteer.evaluation import quality
from tinysteer.evaluation.selection import LOW_PERPLEXITY, choose_layer
from tinysteer.experiments import (
    EXPERIMENTS,
    Settings,
    formats,
    geometry,
    length,
    reproduce,
    texts,
    words,
)
from tinysteer.experiments.pictures import draw
from tinysteer.experiments.presets import PRESETS, preset, table
from tinysteer.experiments.report import markdown, mean, share, table_of
from tinysteer.experiments.study import Ask, Study, always, crossed

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
SMALL = Settings(
    limit=2,
    validation=1,
    validation_tokens=4,
    step=4,
    max_new_tokens=6,
    batch_size=64,
    where=(0, 1),
)


@pytest.fixture
def brief(monkeypatch):
    """What all models are asked, with few requests and instructions, so that runs are short."""
    whole, sizes = texts.general(), {"pairs": 4, "validation": 1, "test": 4}
    requests = {part: whole.requests[part][:n] for part, n in sizes.items()}
    some = replace(whole, requests=requests, formats=dict([*whole.formats.items()][1:3]))
    for module in (experiments, experiments.study):
        monkeypatch.setattr(module, "corpus_for", lambda *models: some)
    return some


# Statistics.


def test_a_share_has_wilsons_interval():
    half, none = share([True, False] * 5), share([False] * 10)
    assert (half["value"], none["value"], half["n"]) == (0.5, 0.0, 10)
    assert [round(half[end], 4) for end in ("low", "high")] == [0.2366, 0.7634]
    assert [round(none[end], 4) for end in ("low", "high")] == [0.0, 0.2775]
    assert share([])["n"] == 0


def test_a_mean_has_a_bootstraps_interval_and_always_the_same():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    found = mean(values)
    assert found == mean(values)
    expected = 1.96 * torch.tensor(values).std() / 200**0.5
    assert found["high"] - found["low"] == pytest.approx(2 * float(expected), rel=0.1)
    assert found["low"] < found["value"] < found["high"]


# Texts.


CORPORA = {"general": texts.general, "embedded": texts.embedded}


def test_the_general_corpus_is_as_large_as_it_must_be():
    general = texts.general()
    languages = [name for name in general.formats if name.startswith(texts.LANGUAGE)]
    assert (len(general.formats), len(languages)) == (18, 6)
    pairs, validation, test = (general.texts(part) for part in texts.PARTS)
    assert len(pairs) >= 40
    assert not {*pairs} & {*test, *validation}
    named = [form for name, form in general.formats.items() if name not in languages]
    assert all(len(form["wordings"]) >= 6 for form in named)


def test_what_any_other_model_is_asked_stays_as_it_was(model):
    """Of all prompts, as they were on 2026-11-26: results can be compared with earlier ones."""
    asked, general = [], texts.corpus_for(model)
    for part in ("pairs", "validation", "test"):
        items = [general.word_items(kind, part) for kind in texts.KINDS]
        rows = [
            [[i.request, i.prompt, i.instruction, dict(i.kwargs)] for i in some]
            for some in (general.format_items(part), *items)
        ]
        asked += rows[0] + general.texts(part) + rows[1] + rows[2]
    for name in ("concise", "verbose"):
        asked += texts.in_turn(general.texts("pairs"), general.lengths[name])
    for relation in length.RELATIONS:
        for n in length.SENTENCES:
            asked += general.sentences_wordings(relation, n)
    assert len(asked) == 1950
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    assert digest == "9a797a2f4e94c58775f5d8274d66542c8fc838dd089e5ff2dfbfab2c3218d34d"


TOPICS = (Path(__file__).parents[1] / "bench/training/topics.txt").read_text("utf-8").splitlines()
NAMES = [line.split("|")[0].rstrip(" ~") for line in TOPICS if "|" in line and line[0] != "#"]


def topics(part: str) -> dict[str, bool]:
    """Of the embedded models' requests: name -> whether it never met an instruction."""
    named = {}
    for request in texts.embedded().texts(part):
        (topic,) = (n for n, name in enumerate(NAMES) if re.search(rf"\b{name}\b", request))
        named[NAMES[topic]] = topic % 4 == 3
    return named


def test_the_embedded_corpus_is_of_topics_that_the_models_know():
    embedded = texts.embedded()
    sizes = {part: len(embedded.texts(part)) for part in texts.PARTS}
    assert sizes == {"pairs": 60, "validation": 8, "test": 40}
    pairs, validation, test = map(topics, texts.PARTS)
    assert not pairs.keys() & test.keys()
    assert not validation.keys() & test.keys()
    assert all(test.values())
    assert not any({**pairs, **validation}.values())
    # Every test request meets every instruction, and one word to put in and one to keep out.
    assert len(embedded.format_items("test")) == 40 * 5
    assert {len(embedded.word_items(kind, "test")) for kind in texts.KINDS} == {40}
    assert not embedded.sentences


@pytest.mark.parametrize("which", CORPORA)
def test_every_instruction_says_what_its_check_needs(which):
    asked = CORPORA[which]()
    for part in texts.PARTS:
        items = asked.format_items(part)
        assert texts.checkable(items) == items
        assert all(item.prompt.startswith(f"{item.request} ") for item in items)
    named = {item.instruction for item in asked.format_items("test")}
    assert named == {*texts.by_instruction(asked.format_items("pairs"))}
    assert [*asked.lengths] == ["concise", "verbose"]
    for kind in texts.KINDS:
        assert len(asked.words[kind]) >= 6
        for item in asked.word_items(kind, "test"):
            assert item.word in item.prompt
            assert item.word not in item.request.lower()


def test_the_embedded_models_have_defaults_of_their_own(lab, model, tmp_path):
    ours = Study("test", lab.base_model, tmp_path / "ours", Settings(), source=lab.model)
    assert (ours.corpus, ours.settings.where) == (texts.embedded(), (0, 1))
    assert (ours.settings.step, ours.settings.max_new_tokens) == (1, 112)
    said = "where (0, 1), step 1, validation_tokens 112, max_new_tokens 112."
    assert ours.notes[-1].endswith(said)
    told = study(lab.model, tmp_path / "told", where="all", step=2, max_new_tokens=5)
    assert (told.settings.where, told.settings.step, told.settings.max_new_tokens) == ("all", 2, 5)
    assert told.notes == [texts.NOTE]
    other = Study("test", model, tmp_path / "other", Settings())
    assert other.corpus is texts.general()
    assert other.settings == Settings(where="all", step=2, validation_tokens=256)
    assert not other.notes


def test_a_folder_that_bears_an_embedded_models_name_is_another_model(lab):
    bare = ts.LanguageModel(lab.model.decoder, lab.model.tokenizer, lab.model.name)
    assert texts.corpus_for(bare) is texts.corpus_for(lab.model, bare) is texts.general()


@needs_shared
def test_the_papers_rows_are_read():
    items = texts.read_items(SHARED / "data/ifeval_format.jsonl")
    assert len(items) == 163
    assert sum(item.id == texts.LANGUAGE for item in items) == 17
    assert {"change_case:english_lowercase", "language:response_language_kn"} <= {
        item.instruction for item in items
    }
    pairs = texts.by_instruction(texts.read_items(SHARED / "data/format_pairs.jsonl"))
    assert sum(map(len, pairs.values())) == 144
    assert len(texts.read_items(SHARED / "data/ifeval_keyword_exclude.jsonl")) == 117
    assert len(texts.read_requests(SHARED / "data/base_queries.jsonl")) > 500


def test_a_row_that_is_none_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: needs prompt, prompt_without_instr"):
        texts.read_items(file)


# Choosing.


@needs_shared
def test_the_rule_gives_the_papers_layers():
    """Of 124 of Phi-3's and Mistral's all but six.

    Those are languages, with one prompt each, whose unsteered answer is right and of too low a
    perplexity: the authors' script then drops "no steering", which should have won the tie.
    """
    models = {"phi-3": "Phi-3-mini-4k-instruct", "mistral-7b-instruct": "Mistral-7B-Instruct-v0.1"}
    settings = {"no_instr": "w/o", "instr": "w/"}
    seen = defaultdict(lambda: defaultdict(list))
    with open(SHARED / "fixtures/layer_search.csv") as file:
        for row in csv.DictReader(file):
            group = models[row["model"]], settings[row["setting"]], row["instruction"]
            layer = None if row["layer"] == "-1" else int(row["layer"])
            result = float(row["follow"]), float(row["perplexity"]) < LOW_PERPLEXITY
            seen[group][layer].append(result)
    assert len(seen) == 124
    languages = {"Phi-3-mini-4k-instruct": "mr ta gu hi", "Mistral-7B-Instruct-v0.1": "bn vi"}
    dropped = {
        (model, "w/", f"{texts.LANGUAGE}_{iso}")
        for model, names in languages.items()
        for iso in names.split()
    }
    for (model, setting, instruction), layers in seen.items():
        followed, low = (
            {L: sum(pair[i] for pair in pairs) / len(pairs) for L, pairs in layers.items()}
            for i in (0, 1)
        )
        expected = preset(f"owner/{model}").layers[setting].get(instruction)
        if (model, setting, instruction) in dropped:
            assert (followed[None], low[None], followed[expected]) == (1, 1, 1)
            expected = None
        assert choose_layer(followed, low) == expected


def test_presets_are_those_of_the_papers_models_alone():
    phi = preset("microsoft/Phi-3-mini-4k-instruct")
    assert (phi.length_layer, phi.include, phi.exclude) == (12, (24, 100.0), (28, -100.0))
    assert phi.layers["w/o"]["change_case:english_capital"] == 28
    assert phi.layers["w/"]["startend:quotation"] == 24
    assert phi.layers["w/o"]["language:response_language_vi"] == 20
    crossed = preset("google/gemma-2-9b", "google/gemma-2-9b-it").layers
    assert crossed["w/"]["change_case:english_capital"] == 38
    assert preset("tiny-instruct").layers == {}
    assert "detectable_format:title" not in phi.layers["w/o"]
    assert preset("google/gemma-2-9b", "google/gemma-2-9b-it").length_layer == 16
    assert preset("google/gemma-2-9b").length_layer is None


def test_the_readme_has_the_presets():
    """Whoever looks for the paper's layers finds them without running anything."""
    lines = (Path(experiments.__file__).parent / "README.md").read_text().splitlines()
    head, *rows = table(PRESETS)
    assert all(f"| {' | '.join(row)} |" in lines for row in [head, *rows])


def study(model, folder, **settings) -> Study:
    return Study("test", model, folder, Settings(**{"validation_tokens": 8} | settings))


def test_a_choice_is_the_best_that_spoils_no_more_than_no_steering(tiny, vectors, tmp_path):
    v = vectors["capitals"]
    items = [
        texts.Item(p, p, "x", check=str.isupper) for p in ("What is a kite?", "What is a tie?")
    ]
    arms = {layer: always([v.at(layer).to_target(where=(0, 1))]) for layer in (0, 4)}
    asks = crossed(items, {None: always([])} | arms, ["w/o"], case="case")
    chosen, rows = study(tiny, tmp_path).choose(asks, "case")
    assert chosen == {("case",): 4}
    assert [(row["arm"], row["accuracy"]) for row in rows] == [(None, 0.0), (0, 0.0), (4, 1.0)]


# Runs.


def asks(model, n=7):
    v = ts.SteeringVector._from_means(
        torch.randn(model.config.n_layers, model.config.dim),
        torch.zeros(model.config.n_layers, model.config.dim),
    )
    return [
        Ask("abcdefg"[: i + 1], [v.at(1).add(weight=float(i))] * (i % 2), {"i": i})
        for i in range(n)
    ]


def test_a_run_that_was_killed_goes_on_and_ends_the_same(model, tmp_path, monkeypatch):
    torch.manual_seed(0)
    asked = asks(model)
    whole = study(model, tmp_path / "whole", batch_size=2).answer(asked, 6)
    complete, calls = model.complete, []

    def dying(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return complete(*arguments, **options)

    monkeypatch.setattr(model, "complete", dying)
    with pytest.raises(KeyboardInterrupt):
        study(model, tmp_path / "cut", batch_size=2).answer(asked, 6)
    with open(tmp_path / "cut/answers.jsonl", "a") as file:
        file.write('{"digest": "a line cut sh')
    again = study(model, tmp_path / "cut", batch_size=2)
    assert len(again.answers) == 4
    assert again.answer(asked, 6) == whole
    assert len(calls) == 3 + 2
    files = [(tmp_path / name / "answers.jsonl").read_text() for name in ("whole", "cut")]
    assert files[0] == files[1]


def test_what_is_asked_twice_is_answered_once(model, tmp_path):
    torch.manual_seed(0)
    run = study(model, tmp_path)
    twice = run.answer(asks(model, 1) * 3, 5)
    assert len({*twice}) == len(run.answers) == 1
    row = json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[1])
    assert row["for"] == [{"i": 0}] * 3


def test_a_batch_that_was_cut_short_keeps_its_first_answers(model, tmp_path, monkeypatch):
    """Later calls share some of what they ask; whatever is asked again, the first answer counts."""
    torch.manual_seed(0)
    asked, times = asks(model, 4), []

    def complete(prompts, *_, **__):
        times.append(1)
        return [f"{prompt}{len(times)}" for prompt in prompts]

    monkeypatch.setattr(model, "complete", complete)
    run = study(model, tmp_path, batch_size=4)
    first = run.answer(asked[:2], 5)
    both = run.answer(asked, 5)
    assert both[:2] == first
    again = study(model, tmp_path, batch_size=4)
    assert again.answer(asked[:2], 5) == first
    assert again.answer(asked, 5) == both
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(lines[:4]) + lines[4][:9])
    torn = study(model, tmp_path, batch_size=4)
    assert torn.answer(asked, 5)[:3] == both[:3]


def test_vectors_of_a_run_that_goes_on_are_the_same(tiny, vectors, tmp_path):
    made = []
    for _ in range(2):
        v = study(tiny, tmp_path).vector("a: b", lambda: made.append(1) or vectors["brief"])
    assert len(made) == 1
    assert v == vectors["brief"]


def test_answers_end_where_the_context_does(model, tmp_path):
    run = study(model, tmp_path)
    run.answer([Ask("x"), Ask("a longer prompt")], 2048)
    longest = len(model.tokenizer.ids("a longer prompt"))
    assert run.notes == [f"The context leaves room for {128 - longest} new tokens at most."]


def test_controls_are_other_directions_of_the_same_norms(lab, brief, tmp_path):
    run = study(lab.model, tmp_path)
    vectors = formats.vectors_of(run, lab.model)
    for name, (own, control) in vectors.items():
        assert (own.directions * control.directions).sum(-1).abs().max() < 0.4
        torch.testing.assert_close(own.norms, control.norms)
        way = formats.Way(run, vectors, {"w/o": {name: 2}})
        (edit,), (other,) = (way.edits("w/o", name, at_random) for at_random in (False, True))
        assert torch.equal(edit.direction, own.directions[2])
        assert torch.equal(other.direction, control.directions[2])


def test_words_are_put_in_by_a_positive_and_kept_out_by_a_negative_weight(
    lab, brief, tmp_path, monkeypatch
):
    asked, answer = [], Study.answer
    weights = {"include": 5.0, "exclude": -7.0}

    def listen(self, asks, *rest):
        asked.extend(asks)
        return answer(self, asks, *rest)

    monkeypatch.setattr(Study, "answer", listen)
    monkeypatch.setattr(words, "choose_weight", lambda _, kind: ((2, weights[kind]), []))
    run = study(lab.model, tmp_path, limit=2, max_new_tokens=2)
    words.run(run)
    seen = {}
    for ask in asked:
        kind, arm = ask.labels["kind"], ask.labels["arm"]
        word = brief.word_items(kind, "test")[ask.labels["row"]].word
        right = words.vector_of(run, "exclude" if arm == "own" else "include", word).directions[2]
        for edit in ask.edits:
            seen[kind, arm] = edit.move.bias, torch.equal(edit.direction, right)
    assert seen == {
        ("include", "steered"): (5.0, True),
        ("include", "random"): (5.0, False),
        ("exclude", "steered"): (-7.0, True),
        ("exclude", "random"): (-7.0, False),
        ("exclude", "own"): (7.0, True),
    }


def test_settings_that_cannot_be_are_refused_at_once(model, tmp_path):
    for wrong in ({"limit": 0}, {"validation": -1}, {"step": 0}):
        with pytest.raises(ValueError, match="it must be 1 or more"):
            Settings(**wrong)
    with pytest.raises(ValueError, match="of each setting, w/o and w/"):
        Settings(layers={"cross": {}})
    with pytest.raises(ValueError, match="layer 99: this model has layers 0 to 3"):
        study(model, tmp_path / "a", layer=99)
    with pytest.raises(ValueError, match="format takes no vectors from elsewhere"):
        reproduce("format", model, tmp_path / "b", source=model)
    row = {"prompt": "a b", "prompt_without_instruction": "a", "kwargs": [{}]}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row | {"instruction_id_list": ["punctuation:no_comma"]}))
    with pytest.raises(ValueError, match="has no rows of keywords:existence or keywords:forbidden"):
        reproduce("words", model, tmp_path / "c", Settings(prompts=str(file)))


def test_some_of_a_users_pairs_are_held_out_for_validation(model, tmp_path):
    row = {"prompt": "a, b", "kwargs": [{}], "instruction_id_list": ["punctuation:no_comma"]}
    rows = [row | {"prompt_without_instruction": f"{i}"} for i in range(7)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    made, held = formats.pairs_of(study(model, tmp_path / "run", pairs=str(file), validation=3))
    assert [item.request for item in made["punctuation:no_comma"]] == ["0", "1", "2", "3"]
    assert [item.request for item in held["punctuation:no_comma"]] == ["4", "5", "6"]


def test_another_run_in_the_same_folder_is_refused(model, tmp_path):
    study(model, tmp_path).answer([Ask("x")], 2)
    with pytest.raises(ValueError, match=r"holds another run \(settings differ\): choose another"):
        study(model, tmp_path, limit=3)
    file = tmp_path / "answers.jsonl"
    file.write_text(file.read_text().replace('"layout": 2, ', ""))
    with pytest.raises(ValueError, match=r"a run of an older tinysteer, .* choose another --out"):
        study(model, tmp_path)


def test_a_users_own_files_in_the_folder_stay(model, tmp_path):
    (tmp_path / "vectors").mkdir()
    (tmp_path / "vectors/mine.safetensors").write_text("mine")
    study(model, tmp_path)
    assert (tmp_path / "vectors/mine.safetensors").read_text() == "mine"
    for text in ('{"question": "my own"}\n', "no JSON", '{"question": "my own"}\n{"a": 1}\n'):
        (tmp_path / "answers.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"answers\.jsonl is not a run's: choose another"):
            study(model, tmp_path)
        assert (tmp_path / "answers.jsonl").read_text() == text


def test_pairs_without_a_row_are_refused(model, tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"none\.jsonl has no row of one instruction"):
        formats.read_pairs(study(model, tmp_path / "run", pairs=str(tmp_path / "none.jsonl")))


def test_a_run_that_answered_nothing_locks_no_folder(model, tmp_path):
    """Nor are its vectors taken: they may be of other pairs."""
    first = study(model, tmp_path, limit=2)
    shape = model.config.n_layers, model.config.dim
    v = ts.SteeringVector._from_means(torch.ones(shape), torch.zeros(shape))
    first.vector("v", lambda: v)
    assert study(model, tmp_path, limit=2).vector("v", lambda: -v) == v
    assert study(model, tmp_path, limit=3).vector("v", lambda: -v) == -v
    (tmp_path / "summary.json").touch()  # of an experiment that asks nothing, and is done
    with pytest.raises(ValueError, match="holds another run"):
        study(model, tmp_path, limit=4)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_on_the_tiny_models(experiment, lab, brief, tmp_path):
    transfer = experiment == "transfer"
    model, source = (lab.base_model, lab.model) if transfer else (lab.model, None)
    report = reproduce(experiment, model, tmp_path, SMALL, source=source)
    assert report == (tmp_path / "report.md").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["experiment"] == experiment
    assert summary["model"] == model.name
    assert summary["tables"]
    assert all(table["rows"] for table in summary["tables"])
    if experiment not in ("similarity", "lens"):
        assert "random" in report
        assert "\n> unsteered: " in report
        assert "\n> cross: " in report if transfer else "\n> steered: " in report
    pictures = re.findall(r"!\[.+\]\((.+)\)", report)
    assert {*pictures} == {file.name for file in tmp_path.glob("*.png")}
    before = (tmp_path / "answers.jsonl").read_text()
    assert (
        reproduce(experiment, model, tmp_path, SMALL, source=source).split("**")[1:]
        == (report.split("**")[1:])
    )
    assert (tmp_path / "answers.jsonl").read_text() == before


def test_formats_are_steered_where_they_can_be(lab, tmp_path):
    """tiny-instruct writes lowercase when steered, and never by itself, by a user's own files."""
    for part in ("pairs", "test"):
        asked = zip(lab.questions(part), lab.ask(part, "lowercase"), strict=True)
        keys = "prompt_without_instruction", "prompt", "instruction_id_list", "kwargs"
        rows = [(plain, prompt, ["change_case:english_lowercase"], [{}]) for plain, prompt in asked]
        lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in rows]
        (tmp_path / part).write_text("\n".join(lines))
    settings = Settings(
        limit=10,
        layers={s: {"change_case:english_lowercase": 2} for s in ("w/o", "w/")},
        where=(0, 1),
        max_new_tokens=40,
        pairs=str(tmp_path / "pairs"),
        prompts=str(tmp_path / "test"),
    )
    reproduce("format", lab.model, tmp_path / "out", settings)
    _, each, _ = json.loads((tmp_path / "out/summary.json").read_text())["tables"]
    (row,) = each["rows"]
    assert row["w/o unsteered"]["value"] == row["w/o random"]["value"] == 0
    assert row["w/o steered"]["value"] >= 0.9
    assert row["w/o layer, steered"] == 2


OURS = ("english_capital", "english_lowercase", "json_format", "quotation", "no_comma")


def findings(experiment: str, out: Path, model, source=None, layers=(), **settings) -> list[dict]:
    """The tables of a short run as it is by default; layers: one for each of OURS."""
    chosen = dict(zip(texts.CHECKED.values(), layers, strict=False))
    if layers:
        settings["layers"] = {"w/o": chosen, "w/": chosen}
    reproduce(experiment, model, out, Settings(validation=2, **settings), source=source)
    tables = json.loads((out / "summary.json").read_text())["tables"]
    return [{row[""]: row for row in table["rows"]} for table in tables]


def values(row: dict, *names: str) -> list[float]:
    return [row[name]["value"] for name in names]


def test_tiny_instruct_is_steered_to_each_format(lab, tmp_path):
    _, each, _ = findings("format", tmp_path, lab.model, layers=(4, 2, 3, 3, 2), limit=5)
    assert [name.split(":")[1] for name in each] == list(OURS)
    for row in each.values():
        assert values(row, "w/o unsteered", "w/o steered", "w/o random") == [0, 1, 0]


def test_tiny_base_is_steered_by_the_vectors_of_tiny_instruct(lab, tmp_path):
    with pytest.warns(UserWarning, match="steering tiny-base"):
        whole, _, _ = findings(
            "transfer", tmp_path, lab.base_model, lab.model, layers=(4, 3, 3, 3, 3), limit=5
        )
    cross, own, control, plain = values(
        whole["all"], "w/o cross", "w/o own", "w/o random", "w/o unsteered"
    )
    assert cross >= 0.9
    assert max(own, control, plain) <= 0.3


def test_tiny_instruct_is_made_brief_and_verbose(lab, tmp_path):
    """The layer is found by validation."""
    settings = {"weights": (0.0, 40.0), "limit": 4}
    reproduce("length", lab.model, tmp_path, Settings(validation=2, **settings))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "layer 1." in summary["notes"][0]
    words, _ = summary["tables"]
    by_arm = {(row[""], row["weight"]): row["mean"]["value"] for row in words["rows"]}
    plain = by_arm["concise", 0.0]
    assert by_arm["concise", 40.0] < plain / 2
    assert by_arm["verbose", 40.0] > 1.4 * plain
    for name in ("concise", "verbose"):
        assert by_arm[f"{name}, random", 40.0] == pytest.approx(plain, rel=0.2)


def test_words_are_put_into_what_tiny_instruct_says_and_kept_out(lab, tmp_path):
    put, *_ = findings("words", tmp_path / "in", lab.model, layer=3, weights=(97.5,), limit=5)
    plain, steered, control = values(
        put["include, w/o the instruction"], "unsteered", "steered", "random"
    )
    assert steered >= 0.6
    assert plain == control == 0
    kept, *_ = findings("words", tmp_path / "out", lab.model, layer=1, weights=(43.6,), limit=5)
    plain, own = values(kept["exclude, w/o the instruction"], "unsteered", "by its own vector")
    assert own >= 0.8
    assert plain <= 0.2


def test_two_things_at_once_are_more_than_tiny_instruct_can_do(lab, tmp_path):
    """Each alone may come; both are seldom kept, and never by chance."""
    settings = {"layer": 1, "weights": (43.6,), "limit": 10}
    *two, word, _ = findings("multi", tmp_path, lab.model, layers=(4, 2, 3, 3, 2), **settings)
    assert len(two) == 3
    for rows in two:
        assert values(rows["w/o, unsteered"], "both") == [0]
        assert values(rows["w/, unsteered"], "both")[0] >= 0.5
    assert values(two[0]["w/o, steered"], "english_lowercase")[0] >= 0.5
    assert values(two[0]["w/o, random"], "english_lowercase", "both") == [0, 0]
    assert values(word["w/o, steered"], "word")[0] >= 0.8
    assert values(word["w/o, unsteered"], "word")[0] <= 0.2


def test_similarity_is_what_brute_force_gives():
    torch.manual_seed(0)
    asked, plain = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    found = geometry.curves(asked, plain)
    cosine = torch.nn.functional.cosine_similarity
    for layer in range(2):
        pairs = [(i, j) for i in range(5) for j in range(5)]
        for name, states in (("same instruction", asked), ("neither", plain)):
            each = [cosine(states[layer, i], states[layer, j], dim=0) for i, j in pairs]
            assert found[name][layer] == pytest.approx(float(sum(each)) / 25, abs=1e-6)
        each = [cosine(asked[layer, i], plain[layer, i], dim=0) for i in range(5)]
        assert found["same request"][layer] == pytest.approx(float(sum(each)) / 5, abs=1e-6)


def test_the_lens_shows_the_token_that_a_direction_is(tiny, tmp_path):
    token = tiny.tokenizer.vocabulary.token_to_id("A")
    gain = tiny.decoder.norm.weight
    assert gain.std() > 0  # it counts
    row = torch.nn.functional.normalize(tiny.decoder.embed.weight[token], dim=0)
    first, *_ = geometry.top_tokens(study(tiny, tmp_path), row / gain)
    assert first == "'A'"


def test_judges_say_how_varied_a_text_is():
    assert quality.distinct("a b a b") == pytest.approx(2 / 3)
    assert quality.distinct("alone") == 1.0
    said = quality.judged(["p", "q"], ["a b c a b c", "x y z"])
    assert said == {
        "repetition": [pytest.approx(0.25), 0.0],
        "distinct-2": [pytest.approx(0.6), 1.0],
    }


def test_a_judge_of_ones_own_is_asked_for_each_answer(lab, brief, tmp_path):
    def length(prompt, response):
        return float(len(prompt) > 0)

    report = reproduce("format", lab.model, tmp_path, SMALL, judges={"asked": length})
    assert "| w/, steered | 1 [1, 1] |" in report


def test_perplexity_may_judge(tiny):
    judge = quality.perplexity_under(tiny)
    fluent, odd = "As a rule, a kite is a toy.", "toy a kite rule a As is."
    assert judge("", fluent) < judge("", odd)


def test_tables_are_markdown():
    cells = {("a|b", "share"): share([True]), ("c", "layer"): 3, ("a|b", "x"): 0.12345}
    *_, first, second = markdown(table_of("T", cells)).split("\n")
    assert first == "| a\\|b | 100.0 [20.7, 100.0] | - | 0.123 |"
    assert second == "| c | - | 3 | - |"


def test_answers_are_held_to_the_number_of_sentences():
    three = "One. Two! Three?"
    assert [length.has_sentences("at most", n, three) for n in (2, 3, 4)] == [False, True, True]
    assert [length.has_sentences("exactly", n, three) for n in (2, 3, 4)] == [False, True, False]
    assert [length.has_sentences("at least", n, three) for n in (2, 3, 4)] == [True, True, False]
    assert not length.has_sentences("at most", 5, " ")


def test_every_committed_summary_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    drawn = {}
    for file in (Path(__file__).parents[1] / "bench/results/experiments").glob("*/summary.json"):
        drawn[file.parent.name] = draw(json.loads(file.read_text()), tmp_path)
        assert all((tmp_path / name).stat().st_size > 1000 for name in drawn[file.parent.name])
    assert drawn["format"] == ["accuracy.png", "by-instruction.png", "layers.png"]
    assert drawn["transfer"][2:] == ["layers-cross.png", "layers-own.png"]
    assert drawn["length"][0] == "lengths.png"


# The command.


def test_progress_says_how_many_answers_and_how_long(model, tmp_path, monkeypatch):
    """In a terminal alone, and what was there before is counted."""
    for folder, terminal in (("a", False), ("b", True), ("b", True)):
        error = io.StringIO()
        error.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr("sys.stderr", error)
        torch.manual_seed(0)
        study(model, tmp_path / folder, batch_size=2).answer(asks(model), 2)
        said = re.findall(r"test: (\d) of 7 answers, \d\d:\d\d so far, .* left", error.getvalue())
        assert bool(said) == terminal
    assert said == ["7"]


def test_the_command_prints_the_report_and_draws(brief, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "run"
    command = ["reproduce", "similarity", "--limit", "2", "--out", str(out)]
    assert main(command) == 0
    assert capsys.readouterr().out == (out / "report.md").read_text()
    assert (out / "similarity.png").stat().st_size > 1000


BASE = ["-m", "tiny-base"]
REFUSED = {
    "transfer needs the model that vectors come from: --source": ["transfer", *BASE],
    "'middle' is none of all, prompt, last, generation": ["format", *BASE, "--where", "middle"],
    "not a summary.json of `reproduce format`": ["format", *BASE, "--layers", __file__],
    "takes its model by -m: tinysteer reproduce format -m tiny-base": ["format", "tiny-base"],
    "there is no file nowhere.jsonl": ["format", *BASE, "--pairs", "nowhere.jsonl"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_wrong_is_one_sentence(message, tmp_path, capsys):
    assert main(["reproduce", *REFUSED[message], "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_extra_is_asked_for_before_models_are_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiments, "EXTRA", ("langdetect", "absent"))
    monkeypatch.setattr(experiments.command, "load", None)
    for experiment in ("format", "multi", "transfer", "length"):
        source = ["--source", "owner/other"] if experiment in ("transfer", "length") else []
        assert main(["reproduce", experiment, *source]) == 1
        assert (
            f'{experiment} needs absent: pip install "tinysteer[eval]"' in capsys.readouterr().err
        )
    experiments.check("length", source=False, embedded=True)  # which has no sentences to count


def test_the_command_takes_any_window(brief, tmp_path):
    for window, where in {"generation": "generation", ",5": [None, 5]}.items():
        out = tmp_path / window
        command = ["reproduce", "similarity", "--limit", "2", "--where", window, "--out", str(out)]
        assert main(command) == 0
        assert json.loads((out / "summary.json").read_text())["settings"]["where"] == where

"""The paper's experiments: texts, statistics, choices, resuming, and each run on tiny models."""

import csv
import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import tinysteer as ts
from tinysteer.cli import main
from tinysteer.evaluation import quality
from tinysteer.evaluation.selection import LOW_PERPLEXITY, choose_layer
from tinysteer.experiments import (
    EXPERIMENTS,
    Settings,
    geometry,
    instructions,
    length,
    reproduce,
    texts,
    words,
)
from tinysteer.experiments.choosing import Trial, choose
from tinysteer.experiments.intervals import mean, share
from tinysteer.experiments.presets import INSTRUCTIONS, preset
from tinysteer.experiments.report import Table
from tinysteer.experiments.study import Ask, Study

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
    """The built-in set with few requests and instructions, so that runs are short."""
    whole = texts.built_in()
    few = dict(list(whole["formats"].items())[1:3])
    some = whole | {"formats": few, "languages": {}}
    monkeypatch.setattr(texts, "built_in", lambda: some)
    monkeypatch.setattr(texts, "PARTS", {"pairs": (0, 4), "validation": (4, 5), "test": (5, 9)})
    return some


# Statistics.


def test_a_share_has_wilsons_interval():
    half, none = share([True, False] * 5), share([False] * 10)
    assert (half.value, none.value, half.n) == (0.5, 0.0, 10)
    assert [round(x, 4) for x in (half.low, half.high)] == [0.2366, 0.7634]
    assert [round(x, 4) for x in (none.low, none.high)] == [0.0, 0.2775]
    assert share([]).n == 0


def test_a_mean_has_a_bootstraps_interval_and_always_the_same():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    found = mean(values)
    assert found == mean(values)
    expected = 1.96 * torch.tensor(values).std() / 200**0.5
    assert found.high - found.low == pytest.approx(2 * float(expected), rel=0.1)
    assert found.low < found.value < found.high


# Texts.


def test_the_built_in_set_is_as_large_as_it_must_be():
    built_in = texts.built_in()
    assert len(built_in["formats"]) == 12
    assert all(len(form["wordings"]) >= 6 for form in built_in["formats"].values())
    assert len(texts.requests("pairs")) >= 40
    assert not {*texts.requests("pairs")} & {*texts.requests("test"), *texts.requests("validation")}
    assert {*length.CLASSES.values()} <= {*built_in["length"]}
    assert all(len(built_in["words"][kind]) >= 6 for kind in words.KINDS)


def test_every_instruction_says_what_its_check_needs():
    for part in texts.PARTS:
        items = texts.format_items(part)
        assert texts.checkable(items) == items
        assert all(item.prompt.startswith(f"{item.request} ") for item in items)
    named = {item.instruction for item in texts.format_items("test")}
    assert named == {*texts.of_instruction(texts.format_items("pairs"))}
    for kind in words.KINDS:
        for item in words.builtin_items(kind, "test"):
            word = words.word_of(item)
            assert word in item.prompt
            assert word not in item.request.lower()


@needs_shared
def test_the_papers_rows_are_read():
    items = texts.read_items(SHARED / "data/ifeval_format.jsonl")
    assert len(items) == 163
    assert sum(item.instruction_id == texts.LANGUAGE for item in items) == 17
    assert {"change_case:english_lowercase", "language:response_language_kn"} <= {
        item.instruction for item in items
    }
    pairs = texts.of_instruction(texts.read_items(SHARED / "data/format_pairs.jsonl"))
    assert sum(map(len, pairs.values())) == 144
    assert len(texts.read_items(SHARED / "data/ifeval_keyword_exclude.jsonl")) == 117


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
        expected = preset(f"owner/{model}").layers[setting][instruction]
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
    assert {*phi.layers["w/"]} == {*INSTRUCTIONS}


def study(model, folder, **settings) -> Study:
    return Study("test", model, folder, Settings(**{"validation_tokens": 8} | settings))


def test_a_choice_is_the_best_that_spoils_no_more_than_no_steering(tiny, vectors, tmp_path):
    v = vectors["capitals"]
    prompts = ["What is a kite?", "What is a piano?"]
    trials = [
        Trial(
            "case",
            layer,
            Ask(prompt, [] if layer is None else [v.at(layer).to_target(where=(0, 1))]),
            str.isupper,
        )
        for layer in (None, 0, 4)
        for prompt in prompts
    ]
    chosen, rows = choose(study(tiny, tmp_path), trials)
    assert chosen == {"case": 4}
    assert [row["accuracy"] for row in rows] == [0.0, 0.0, 1.0]


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
    assert len(again.known) == 4
    assert again.answer(asked, 6) == whole
    assert len(calls) == 3 + 2
    files = [(tmp_path / name / "answers.jsonl").read_text() for name in ("whole", "cut")]
    assert files[0] == files[1]


def test_what_is_asked_twice_is_answered_once(model, tmp_path):
    torch.manual_seed(0)
    run = study(model, tmp_path)
    twice = run.answer(asks(model, 1) * 3, 5)
    assert len({*twice}) == len(run.known) == 1
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
    longest = len(model.tokenizer.ids("a longer prompt", True))
    assert run.notes == [f"The context leaves room for {128 - longest} new tokens at most."]


def test_controls_are_other_directions_of_the_same_norms(lab, brief, tmp_path):
    run = study(lab.model, tmp_path)
    for found in instructions.all_instructed(run, lab.model).values():
        cosine = (found.vector.directions * found.control.directions).sum(-1)
        assert cosine.abs().max() < 0.4
        torch.testing.assert_close(found.vector.norms, found.control.norms)
        (edit,), (other,) = (found.edits(2, "all", control) for control in (False, True))
        assert torch.equal(edit.direction, found.vector.directions[2])
        assert torch.equal(other.direction, found.control.directions[2])


def test_words_are_put_in_by_a_positive_and_kept_out_by_a_negative_weight(
    lab, brief, tmp_path, monkeypatch
):
    asked, answer = [], Study.answer
    weights = {"include": 5.0, "exclude": -7.0}

    def listen(self, asks, *rest):
        asked.extend(asks)
        return answer(self, asks, *rest)

    monkeypatch.setattr(Study, "answer", listen)
    monkeypatch.setattr(words, "choose_weight", lambda _, __, kind: ((2, weights[kind]), []))
    run = study(lab.model, tmp_path, limit=2, max_new_tokens=2)
    words.run(run)
    known, seen = words.Words(run), {}
    for ask in asked:
        kind, arm = ask.labels["kind"], ask.labels["arm"]
        word = words.word_of(words.test_items(run, kind)[ask.labels["row"]])
        right = known.vector("exclude" if arm == "own" else "include", word).directions[2]
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
    made, held = instructions.pairs_of(
        study(model, tmp_path / "run", pairs=str(file), validation=3)
    )
    assert [item.request for item in made["punctuation:no_comma"]] == ["0", "1", "2", "3"]
    assert [item.request for item in held["punctuation:no_comma"]] == ["4", "5", "6"]


@needs_shared
def test_the_papers_requests_are_read():
    assert len(texts.read_requests(SHARED / "data/base_queries.jsonl")) > 500


def test_another_run_in_the_same_folder_is_refused(model, tmp_path):
    study(model, tmp_path)
    with pytest.raises(ValueError, match=r"holds another run \(settings differ\): choose another"):
        study(model, tmp_path, limit=3)


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


def test_similarity_is_what_brute_force_gives():
    torch.manual_seed(0)
    asked, plain = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    found = geometry.curves(asked, plain)
    cosine = torch.nn.functional.cosine_similarity
    for layer in range(2):
        pairs = [(i, j) for i in range(5) for j in range(5)]
        for name, states in (("same instruction", asked), ("neither", plain)):
            each = [cosine(states[layer, i], states[layer, j], dim=0) for i, j in pairs]
            assert float(found[name][layer]) == pytest.approx(float(sum(each)) / 25, abs=1e-6)
        each = [cosine(asked[layer, i], plain[layer, i], dim=0) for i in range(5)]
        assert float(found["same request"][layer]) == pytest.approx(float(sum(each)) / 5, abs=1e-6)


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
    table = Table("T", [{"": "a|b", "share": share([True]), "layer": None, "x": 0.12345}])
    assert table.markdown().split("\n")[-1] == "| a\\|b | 100.0 [20.7, 100.0] | - | 0.123 |"


def test_answers_are_held_to_the_number_of_sentences():
    three = "One. Two! Three?"
    assert [length.has_sentences(three, "at most", n) for n in (2, 3, 4)] == [False, True, True]
    assert [length.has_sentences(three, "exactly", n) for n in (2, 3, 4)] == [False, True, False]
    assert [length.has_sentences(three, "at least", n) for n in (2, 3, 4)] == [True, True, False]
    assert not length.has_sentences(" ", "at most", 5)


# The command.


def test_the_command_prints_the_report_and_draws(brief, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "run"
    command = ["reproduce", "similarity", "tiny-instruct", "--limit", "2", "--out", str(out)]
    assert main(command) == 0
    assert capsys.readouterr().out == (out / "report.md").read_text()
    assert (out / "similarity.png").stat().st_size > 1000


REFUSED = {
    "transfer needs the model that vectors come from: --source": ["transfer", "tiny-base"],
    "'middle' is none of all, prompt, generation, and not FIRST,STOP": [
        "format",
        "tiny-base",
        "--where",
        "middle",
    ],
    "no summary.json of `reproduce format`": ["format", "tiny-base", "--layers", __file__],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_wrong_is_one_sentence(message, tmp_path, capsys):
    assert main(["reproduce", *REFUSED[message], "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err

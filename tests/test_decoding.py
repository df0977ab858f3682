"""A decode step as a GPU captures it, on any machine: its tape played again is the simple path."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
from checkpoints import VARIANTS
from dispatch import Calls, Tape
from oracle import vector_for
from tinysteer_kernels import PADDING, devices, residual, steering
from tinysteer_kernels.decode import attention, gating, use_kernels
from tinysteer_kernels.devices import HAS_TRITON

import tinysteer as ts
from tinysteer.decoding import pool
from tinysteer.decoding.pool import DecodingPool, rounded_rows
from tinysteer.decoding.step import BROKEN, NOTHING, Batch, Decoding, Means, decode_tokens
from tinysteer.model.cache import Cache
from tinysteer.model.decoder import Decoder
from tinysteer.steering import batch
from tinysteer.steering.batch import seam

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton here")
PROMPTS = ["short", "a somewhat longer prompt", "x", "and one more of them", "last"]
LIMITS = [16, 9, 12, 1, 16]


def on_tape(model):
    model.pool = DecodingPool(model.decoder, capture=Tape)
    return model


@pytest.fixture
def taped(model):
    """A model whose steps are captured, on tapes."""
    return on_tape(model)


def vectors(model):
    return [vector_for(model, seed) for seed in range(3)]


def mixed(model, weight=6.0) -> list[list]:
    """A list of edits for each prompt: none, one, several at a layer, every layer, all verbs."""
    a, b, c = vectors(model)
    weight *= model.config.embed_scale
    layers = range(model.config.n_layers)
    return [
        [],
        [a.at(1).add(weight=weight)],
        [a.at(2).to_target(target=3.0), b.at(2).add(weight=-weight), c.at(2).at_least(target=1.0)],
        [b.at(L).add(weight=weight / 4, where="generation") for L in layers],
        [c.at(L).ablate(where=(1, 5)) for L in layers] + [a.at(0).at_most(target=0.5)] * 5,
    ]


def complete(model, steer=None, prompts=PROMPTS, **options):
    settings = {"chat": False, "max_new_tokens": LIMITS[: len(prompts)]} | options
    return model.complete(prompts, steer, **settings)


def test_a_captured_step_gives_the_texts_of_the_simple_path(pair):
    ours, _ = pair
    steer = mixed(ours)
    plain, steered = complete(ours), complete(ours, steer)
    on_tape(ours)
    assert complete(ours) == plain
    assert complete(ours, steer) == steered
    assert ours.pool.captured == 2
    assert sum(a != b for a, b in zip(plain, steered, strict=True)) >= 1


def test_whatever_changes_the_graphs_stay(taped):
    """Prompts, edits, layers, weights, limits, seeds: none of them asks for another graph."""
    a, b, _ = vectors(taped)
    calls = [
        (mixed(taped), {}),
        (mixed(taped, -3.0)[::-1], {}),
        ([a.at(3).add(weight=1.0)], {"prompts": PROMPTS[::-1]}),
        ([b.at(L).to_target(target=2.0) for L in range(4)], {"max_new_tokens": 3}),
    ]
    texts = [complete(taped, steer, **options) for steer, options in calls]
    assert taped.pool.captured == 2  # five edits of one row ask for wider tables than three do
    for (steer, options), text in zip(calls, texts, strict=True):
        assert complete(taped, steer, graph=False, **options) == text
    assert len({*map(tuple, texts)}) == 4


@pytest.mark.parametrize("cuts", [{}, {"top_k": 9, "top_p": 0.9}], ids=["whole", "cut"])
def test_a_captured_step_draws_as_the_simple_path_does(taped, cuts):
    options = {"temperature": 1.5, "seed": [3, 1, 4, 1, 5]} | cuts
    text = complete(taped, **options)
    assert text == complete(taped, graph=False, **options)
    captured = taped.pool.captured
    options |= {"temperature": 0.7, "seed": 2}
    assert complete(taped, **options) == complete(taped, graph=False, **options) != text
    assert taped.pool.captured == captured


def test_stop_ids_end_rows_on_the_device_and_in_the_text_alike(taped):
    stream = complete(taped, graph=False)[1]
    for character in {*stream[2:7]}:
        taped.tokenizer.stop_ids = frozenset(taped.tokenizer.vocabulary.encode(character).ids[1:])
        assert complete(taped) == complete(taped, graph=False)
    assert taped.pool.captured == 1


def test_a_row_that_is_done_is_padding_from_then_on(model):
    step = Decoding(model.decoder, 3, 40)
    tokens, start = torch.randint(3, 200, (3, 6)), torch.tensor([0, 2, 5])
    step.begin(Batch(tokens, start, [1, 3, 4]), [[], [], []])
    seen, read = [], [step.read()()[0]]
    for _ in range(3):
        seen.append(step.cache.start.clone())
        step()
        read.append(step.read()()[0])
    ids = torch.tensor(read).T
    assert (ids >= 0).tolist() == [[n < limit for n in range(4)] for limit in (1, 3, 4)]
    assert (ids[ids < 0] == NOTHING).all()
    assert [at.tolist() for at in seen] == [[40, 2, 5], [40, 2, 5], [40, 40, 5]]
    assert step.cache.start.tolist() == [40, 40, 40]
    _, position = step.cache.advance(1)
    assert position[:, 0].tolist() == [PADDING] * 3


def test_a_row_ended_by_the_host_stops_on_the_device(model):
    step = Decoding(model.decoder, 2, 40)
    step.begin(Batch(torch.randint(3, 200, (2, 6)), torch.tensor([0, 2]), [9, 9]), [[], []])
    step.end(1)
    step()
    assert [token >= 0 for token in step.read()()[0]] == [True, False]


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_reading_late_changes_no_text(model, monkeypatch, lag):
    text, steer = complete(model, stop="a"), mixed(model)
    steered = complete(model, steer, stop="a")

    monkeypatch.setattr(Decoding, "lag", lag)
    assert complete(model, stop="a") == text
    assert complete(model, steer, stop="a") == steered


def test_with_a_lag_a_step_is_under_way_before_the_token_it_reads_is_read():
    class Told:
        lag, events = 1, ()

        def begin(self, batch, edits):
            pass

        def __call__(self):
            self.events += ("step",)

        def steer(self, edits):
            self.events += (f"edits {edits}",)

        def read(self):
            n = self.events.count("step")
            return lambda: setattr(self, "events", (*self.events, f"read {n}"))

    told = Told()
    batch = Batch(None, None, [2, 3])
    assert len(list(decode_tokens(told, batch, lambda n: n))) == 3
    first, second = ("edits 1", "step"), ("edits 2", "step")
    assert told.events == (*first, "read 0", *second, "read 1", "read 2")


def test_a_slider_acts_on_the_token_it_is_set_for(taped):
    """On for the first three tokens is the window that ends before position 3."""
    (v, *_), asked = vectors(taped), []

    def slider(n):
        asked.append(n)
        return [v.at(1).add(weight=8.0)] if n < 3 else []

    for graph in (False, True):
        asked.clear()
        text = complete(taped, slider, max_new_tokens=12, graph=graph)
        window = [v.at(1).add(weight=8.0, where=(None, 3))]
        assert text == complete(taped, window, max_new_tokens=12)
        assert asked == [*range(12)]
    assert text not in (complete(taped), complete(taped, [v.at(1).add(weight=8.0)]))


def test_a_slider_of_weights_needs_one_graph(taped):
    v, w, *_ = vectors(taped)
    complete(
        taped, lambda n: [v.at(1 + n % 3).add(weight=0.5 * n), w.at(2).to_target(target=float(n))]
    )
    assert taped.pool.captured == 1


def test_a_slider_of_numbers_alone_sends_tables_alone(taped, monkeypatch):
    """Weights, targets, bounds and windows, of rows that differ: directions are sent once."""
    v, w, *_ = vectors(taped)

    def slider(n):
        rows = [[] for _ in PROMPTS]
        rows[1] = [
            v.at(1).add(weight=2.0 * n),
            v.at(1).at_most(target=1.0 - n),
            w.at(3).add(weight=float(-n)),
        ]
        rows[3] = rows[4] = [w.at(2).to_target(target=0.3 * n, where=(n - 1, None))]
        return rows

    limits = {"max_new_tokens": 10}
    text = complete(taped, slider, graph=False, **limits)
    assert text != complete(taped, slider(0), graph=False, **limits)
    sent, send = [], batch.send
    monkeypatch.setattr(batch, "send", lambda x, y: sent.append(tuple(x.shape)) or send(x, y))
    assert complete(taped, slider, **limits) == text
    n_layers, dim = taped.config.n_layers, taped.config.dim
    assert sent == [(3, dim)] + 10 * [(n_layers, 6, 7 + 4, 4)]


def test_a_slider_may_outgrow_its_tables(taped):
    v, *_ = vectors(taped)
    grow = lambda n: [v.at(1).add(weight=0.3 * k) for k in range(n + 1)]  # noqa: E731
    assert complete(taped, grow) == complete(taped, grow, graph=False)


def test_a_slider_gives_each_prompt_its_own_in_every_batch(taped):
    rows = mixed(taped)
    text = complete(taped, rows, batch_size=2, graph=False)
    assert complete(taped, lambda n: rows, batch_size=2) == text


def test_what_a_slider_returns_is_checked_as_edits_are(model):
    with pytest.raises(ValueError, match="steer takes"):
        model.complete("x", lambda n: 3.0, chat=False, max_new_tokens=2)
    verb = vectors(model)[0].at(1).add
    with pytest.raises(ValueError, match="pick a layer and a verb"):
        model.complete("x", verb, chat=False, max_new_tokens=2)


def test_streams_may_be_interleaved(taped):
    a, b, _ = vectors(taped)
    ways = [([a.at(1).add(weight=6.0)], PROMPTS[0]), ([b.at(2).add(weight=6.0)], PROMPTS[1])]
    options = {"chat": False, "max_new_tokens": 10}
    alone = [taped.complete(prompt, steer, graph=False, **options) for steer, prompt in ways]
    streams = [taped.stream(prompt, steer, **options) for steer, prompt in ways]
    texts = ["", ""]
    for _ in range(12):
        for i, stream in enumerate(streams):
            texts[i] += next(stream, "")
    assert texts == alone
    assert len(taped.pool.free) == 2


def test_few_steps_are_kept_fewer_beside_a_new_one_and_an_abandoned_one_comes_back(taped):
    options, waiting = {"chat": False, "max_new_tokens": 8}, []
    for n in (1, 2, 3, 5):
        taped.complete(PROMPTS[:n], **options)
    for n in (3, 1):
        waiting.append([step.rows for step in taped.pool.free])
        stream = taped.stream(PROMPTS[:n], **options)
        next(stream)
        waiting.append([step.rows for step in taped.pool.free])
        stream.close()
    assert waiting == [[6, 3], [6], [3, 6], [3]]
    assert [step.rows for step in taped.pool.free] == [1, 3]
    taped.pool.clear()
    assert taped.pool.free == []


def test_nothing_of_a_broken_batch_stays(taped, monkeypatch):
    monkeypatch.setattr("tinysteer.steering.edits.LARGEST", 3.4e38)
    a, *_ = vectors(taped)
    text = complete(taped)
    with pytest.raises(ValueError, match="NaN or infinite in"):
        complete(taped, [a.at(0).add(weight=3.3e38, where=(2, 3))] * 9)
    assert complete(taped) == text


def test_rows_are_rounded_up_so_that_a_third_is_idle_at_most():
    rounded = [rounded_rows(n) for n in range(1, 300)]
    assert all(n <= r <= max(3 * n / 2, 2) for n, r in enumerate(rounded, 1))
    assert rounded == sorted(rounded)
    assert {*rounded} == {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384}


def test_layers_that_are_no_longer_steered_are_not(taped):
    a, b, _ = vectors(taped)
    for steer in (
        [a.at(1).add(weight=6.0)],
        [b.at(2).add(weight=6.0)],
        [b.at(2).add(weight=-6.0)],
        [],
        [a.at(0).ablate()],
    ):
        assert complete(taped, steer) == complete(taped, steer, graph=False)


def test_ways_of_sampling_have_their_own_graphs(taped):
    ways = [{}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "seed": 1, "top_k": 3}, {}]
    for way in ways:
        assert complete(taped, **way) == complete(taped, graph=False, **way)
    assert taped.pool.captured == 3
    complete(taped, kernels=False)
    assert taped.pool.captured == 4


def test_it_does_not_matter_how_often_a_direction_is_written(taped):
    """`at` makes a new view each time; the bank holds its memory once."""
    (v, *_), layers = vectors(taped), range(4)
    complete(taped, [[v.at(L).add(weight=1.0) for L in layers for _ in range(4)] for _ in PROMPTS])
    assert list(taped.pool.free[0].steering.stacks) == [(4, 64)]
    rows = [[v.at(L).add(weight=1.0) for L in layers] for _ in range(50)]
    assert len(batch.Steering(rows, torch.zeros(0)).bank) == 4


def test_other_weights_or_another_decoder_ask_for_new_graphs(taped):
    text, blocks = complete(taped), taped.decoder.blocks
    for block in blocks:
        for linear in (block.attn.out, block.mlp.down):
            linear.weight = torch.nn.Parameter(-linear.weight, requires_grad=False)
    other = complete(taped)
    assert other == complete(taped, graph=False) != text
    assert taped.pool.captured == 2
    assert len(taped.pool.free) == 1
    decoder, taped.decoder = taped.decoder, Decoder(taped.config).requires_grad_(False)
    taped.decoder.load_state_dict(decoder.state_dict())
    taped.decoder.embed.weight.neg_()
    assert complete(taped) not in (text, other)


def test_without_memory_for_another_step_the_waiting_ones_go(taped, monkeypatch):
    plain = complete(taped, prompts=PROMPTS[:2], graph=False)
    complete(taped)
    make, sizes = pool.Decoding, []

    def scarce(*arguments, **options):
        sizes.append(len(taped.pool.free))
        if sizes[-1]:
            raise torch.OutOfMemoryError
        return make(*arguments, **options)

    monkeypatch.setattr(pool, "Decoding", scarce)
    assert complete(taped, prompts=PROMPTS[:2]) == plain
    assert sizes == [1, 0]


def test_stops_limits_and_spare_rows_are_told_on_the_device(taped):
    step = Decoding(taped.decoder, 4, 64, Means(Tape))
    tokens, start = torch.randint(3, 200, (2, 6)), torch.tensor([0, 2])
    step.begin(Batch(tokens, start, [9, 9]), [[], []])
    assert step.left.tolist() == [8, 8, 0, 0]
    assert step.cache.start.tolist() == [0, 2, 64, 64]
    first, second = step.read()()[0]
    stops = frozenset([second, 10**6])  # a tokenizer may have ids that the model has not
    step.begin(Batch(tokens, start, [9, 9], stops), [[], []])
    assert step.left.tolist() == [8 * (first != second), 0, 0, 0]
    step()
    assert step.read()()[0][1] == NOTHING


def test_a_row_that_broke_says_so_once_and_others_go_on(model):
    step = Decoding(model.decoder, 3, 64)
    tokens = torch.randint(3, 200, (3, 6))
    step.begin(Batch(tokens, torch.tensor([0, 0, 0]), [9, 1, 9]), [[]] * 3)
    step.cache.k[0, :2] = float("nan")  # of rows 0 and 1, which is done
    seen = []
    for _ in range(2):
        step()
        seen.append(step.read()()[0])
    assert [row[0] for row in seen] == [BROKEN, NOTHING]
    assert [row[1] for row in seen] == [NOTHING] * 2
    assert all(row[2] >= 0 for row in seen)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_single_logit_that_is_not_finite_breaks_its_row(model, monkeypatch, value):
    logits = model.decoder.logits
    monkeypatch.setattr(
        model.decoder, "logits", lambda x: logits(x).index_fill(-1, torch.tensor([7]), value)
    )
    with pytest.raises(ValueError, match="NaN or infinite in"):
        complete(model)


def test_without_a_graph_attention_looks_at_blocks_of_what_is_filled(model):
    cache = Cache(model.decoder, torch.zeros(1, dtype=torch.long), 5, 100)
    reaches = [next(iter(cache.advance(T)[0].values())).reach for T in (5, 58, 1, 1, 35)]
    assert reaches == [64, 64, 64, 100, 100]


class Sizes(Calls):
    """Bytes of every tensor that is made."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.names[-1] = (self.names[-1], result.nbytes)
        return result


def test_a_step_allocates_nothing_that_grows(model):
    step = Decoding(model.decoder, 2, Cache.BLOCK)
    rows = mixed(model)[1:3]
    tokens = torch.randint(3, 200, (2, 6))
    step.begin(Batch(tokens, torch.tensor([0, 2]), [40, 40]), rows)
    made = []
    for _ in range(30):
        with Sizes() as sizes:
            step()
        made.append(sizes.names)
    assert all(names == made[0] for names in made)


def on_a_gpu(monkeypatch):
    """Have the kernels launched, as on a GPU."""
    for module in (attention, gating, steering):
        monkeypatch.setattr(module, "serves", lambda *_: True)


@needs_triton
@pytest.mark.parametrize("variant", ["llama: grouped heads", "phi3: longrope", "gemma2", "gemma3"])
@torch.no_grad()
def test_the_kernels_give_the_logits_of_the_formulas(variant, checkpoint, monkeypatch):
    """A padded batch, two steps after its prompt, every op launched, in Triton's interpreter."""
    ours = ts.load(checkpoint(next(name for name in VARIANTS if variant in name))[0])
    steer, start = seam(mixed(ours)[1:4], ours.decoder.embed.weight), torch.tensor([0, 2, 5])
    tokens = torch.randint(3, 200, (3, 8), generator=torch.Generator().manual_seed(3))
    ways = []
    for kernels in (False, True):
        cache = Cache(ours.decoder, start, 6, 12)
        ours.decoder.prefill(tokens[:, :6], cache, steer)
        if kernels:
            on_a_gpu(monkeypatch)
        steps = [ours.decoder(tokens[:, t : t + 1], cache, steer) for t in (6, 7)]
        ways.append(ours.decoder.logits(torch.cat(steps, dim=1)))
    torch.testing.assert_close(*ways, atol=2e-4, rtol=0)


@needs_triton
@torch.no_grad()
def test_a_layer_is_nine_launches_at_most(pair, monkeypatch):
    """An operation of PyTorch that makes no view is one; of our ops, attend may be two."""

    class Kernel:
        def __getitem__(self, grid):
            return lambda *positional, **arguments: None

    ours, _ = pair
    on_a_gpu(monkeypatch)
    for module, name in (
        (attention, "attend_kernel"),
        (attention, "combine_kernel"),
        (gating, "gated_kernel"),
        (residual, "add_steer_norm_kernel"),
    ):
        monkeypatch.setattr(module, name, Kernel())
    steered = [
        v.at(L).add(weight=1.0) for L in range(len(ours.config.layers)) for v in vectors(ours)
    ]
    counts = []
    for n in (2, ours.config.n_layers):
        layers = ours.config.layers[-1:] * n
        decoder = Decoder(dataclasses.replace(ours.config, layers=layers)).requires_grad_(False)
        cache = Cache(decoder, torch.zeros(1, dtype=torch.long), 1, 512)
        steer = seam([[edit for edit in steered if edit.layer < n]], torch.zeros(0))
        with Calls() as calls:
            decoder(torch.zeros(1, 1, dtype=torch.long), cache, steer)
        counts.append(sum(map(launches, calls.names)))
    assert 0 < (counts[1] - counts[0]) / (ours.config.n_layers - 2) <= 9


def launches(name: str) -> int:
    """How many kernels an operation is, by its name."""
    views = "_unsafe_view|view|unsqueeze|select|slice|expand|split_with_sizes|t|unbind|new_empty"
    return 2 if "attend" in name else int(not re.fullmatch(rf"aten\.({views})\.\w+", name))


def test_formulas_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(devices, "capable", lambda _: True)
    on_a_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"))
    assert devices.serves(on_a_gpu)
    with use_kernels(False):
        assert not devices.serves(on_a_gpu)
    assert devices.serves(on_a_gpu)


def test_a_vector_changed_in_place_acts_from_the_next_step_on(taped):
    v, *_ = vectors(taped)
    options = {"max_new_tokens": 8, "chat": False}

    def turned(n):
        if n == 3:
            v.directions.neg_()
        return [v.at(1).add(weight=30.0)]

    by_number = taped.complete(
        "some words", lambda n: [v.at(1).add(weight=30.0 if n < 3 else -30.0)], **options
    )
    assert taped.complete("some words", turned, **options) == by_number
    v.directions.neg_()
    edits = [v.at(1).add(weight=30.0)]
    text = taped.complete("some words", edits, **options)
    assert text == taped.complete("some words", edits, graph=False, **options) != by_number

"""Steering vectors as values: their algebra, what they say of themselves, their files."""

import math
import warnings

import pytest
import torch
from oracle import vector_for
from safetensors.torch import load_file, save_file

import tinysteer as ts
from tinysteer.steering.vectors import FORMAT, TENSORS


@pytest.fixture
def a(model):
    return vector_for(model)


@pytest.fixture
def b(model):
    return vector_for(model, 1)


def close(x: ts.SteeringVector, y: ts.SteeringVector) -> None:
    for name in TENSORS:
        torch.testing.assert_close(getattr(x, name), getattr(y, name), atol=1e-4, rtol=1e-4)


def test_a_sum_added_equals_both_added_in_a_row(model, a, b):
    tokens = torch.arange(3, 15)[None]
    for total, second in ((a + b, b), (a - b, -b), (2 * a, a), (a + 0.5 * b, b / 2)):
        for layer in (1, 2):
            both = [a.at(layer).add(), second.at(layer).add()]
            torch.testing.assert_close(
                model.logits(tokens, [total.at(layer).add()]),
                model.logits(tokens, both),
                atol=1e-4,
                rtol=1e-4,
            )


def test_the_algebra_is_that_of_a_vector_space(a, b):
    close(a + b, b + a)
    close(2 * a, a + a)
    close(a - b, a + -b)
    close(-1 * (-a), a)
    close(2 * (a + b), 2 * a + 2 * b)
    close((a + b) - b, a)
    close(a / 4, a * 0.25)


def test_targets_follow_the_algebra(a):
    """The way from the baseline to the target is scaled, and -a goes as far the other way."""
    v, twice, opposite = a.at(2), (2 * a).at(2), (-a).at(2)
    assert twice.baseline == pytest.approx(v.baseline, abs=1e-5)
    assert twice.target - twice.baseline == pytest.approx(2 * v.norm, rel=1e-5)
    assert opposite.baseline == pytest.approx(-v.baseline, abs=1e-5)
    assert -opposite.target == pytest.approx(v.baseline - v.norm, abs=1e-4)


def test_a_sums_baseline_is_that_of_states_which_share_their_base():
    base, one, two = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    total = ts.SteeringVector._from_means(one, base) + ts.SteeringVector._from_means(two, base)
    close(total, ts.SteeringVector._from_means(base + (one - base) + (two - base), base))


def test_equality_is_of_the_numbers(a, b):
    same = ts.SteeringVector(a.directions.clone(), a.norms, a.targets, a.baselines, {"name": "x"})
    assert a == same
    assert a != b
    assert a != -a
    assert a != "a"
    assert a.at(1).add(weight=2.0) == same.at(1).add(weight=2.0)
    assert a.at(1).add(weight=2.0) != a.at(1).add(weight=3.0)
    assert a.at(1).add(weight=2.0) != a.at(2).add(weight=2.0)
    assert a.at(1).add(weight=2.0) != b.at(1).add(weight=2.0)


def test_what_is_no_vector_or_of_another_shape_cannot_be_added(a):
    other = ts.SteeringVector._from_means(torch.randn(4, 64), torch.zeros(4, 64))
    with pytest.raises(ValueError, match="4 layers of width 48 and 4 layers of width 64"):
        a + other
    for wrong in (lambda: a + 1, lambda: a * "2", lambda: a * a):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ValueError, match="NaN or infinite"):
        a * math.inf


def test_a_vector_says_what_it_is(model):
    a, b = (
        ts.extract(model, [f"{w} {x}" for x in "pq"], ["p", "q"], name=w) for w in ("json", "terse")
    )
    assert repr(a) == (
        "<SteeringVector json: 4 layers of width 48, mean difference of last-token residuals of "
        "2 pairs, for tiny>"
    )
    assert repr(a + 0.5 * b).startswith("<SteeringVector json + (0.5 terse): 4 layers")
    assert (-a).label == "-json"
    assert (a - b).metadata["model"] == "tiny"
    assert a.metadata["pairs_sha256"] in (a - b).metadata["pairs_sha256"]
    assert "name" not in (2 * a).metadata
    assert repr(a.at(1).add(weight=2)) == "<Edit json at layer 1: bias=2>"
    assert vector_for(model).label == ""


def test_a_random_vector_is_as_long_and_points_elsewhere(a):
    control = a.random_like(seed=1)
    assert torch.equal(control.norms, a.norms)
    torch.testing.assert_close(control.directions.norm(dim=-1), torch.ones(4))
    assert (control.directions * a.directions).sum(-1).abs().max() < 0.5
    assert control == a.random_like(seed=1)
    assert control != a.random_like(seed=2)
    assert "random" in control.label


def test_a_random_target_is_as_far_from_the_states_without_the_instruction(a):
    without = torch.randn(4, 48, generator=torch.Generator().manual_seed(5))
    v = a.random_like(1, without).at(2)
    assert v.baseline == pytest.approx(float(without[2] @ v.direction), abs=1e-5)
    assert v.target == pytest.approx(v.baseline + a.at(2).norm, rel=1e-5)


def test_what_cancels_has_no_direction_though_rounding_leaves_some(a, b):
    for nothing in (a - a, (a + b) - b - a, 1e-3 * a - 0.001 * a):
        assert not nothing.directions.any()
        assert not nothing.norms.any()
        with pytest.raises(ValueError, match="no direction"):
            nothing.at(1)
    assert (1e-42 * a).norms.max() < 1e-40


def test_a_sum_claims_no_more_than_its_terms(model, a):
    named = ts.extract(model, ["p q"], ["p"], name="json")
    other = ts.extract(model, ["r q"], ["r"], name="terse")
    assert (named - other).label == "json - terse"
    assert (named + named).label == "json + json"
    assert "model" not in (named + a).metadata
    assert "pairs_sha256" not in (a + named).metadata
    other.metadata["revision"], named.metadata["revision"] = "b" * 40, "c" * 40
    assert (named + other).origin.made_for == "tiny@cccccccc and bbbbbbbb"


def test_a_vector_made_for_another_model_of_the_same_shape_warns(checkpoint):
    one = ts.load(checkpoint("llama: grouped heads")[0])
    two = ts.load(checkpoint("llama: all heads")[0])
    one.name, two.name = "one", "two"
    edit = ts.extract(one, ["a b"], ["a"]).at(1).add()
    with pytest.warns(UserWarning, match="steering two with vectors made for one"):
        two.complete("x", [edit], max_new_tokens=1)
    tokens = torch.tensor([[3, 4]])
    for act in (
        lambda: two.complete(["x"], [edit], max_new_tokens=1),
        lambda: two.stream("x", [edit], max_new_tokens=1),
        lambda: two.logits(tokens, [edit]),
        lambda: two.explain("x", [edit]),
    ):
        with pytest.warns(UserWarning, match="made for one") as seen:
            act()
        assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two.name = "somebody/one"  # the folder `one` may well be a copy of it
        two.complete("x", [edit], max_new_tokens=1)
        two.name = "two"
        one.complete("x", [edit], max_new_tokens=1)
        two.complete("x", [vector_for(two).at(1).add()], max_new_tokens=1)
    one.revision = "b" * 40
    other = ts.extract(one, ["a b"], ["a"]).at(1).add()
    one.revision = "c" * 40
    with pytest.warns(UserWarning, match="steering one@cccccccc with vectors made for one@bbbbbb"):
        one.complete("x", [other], max_new_tokens=1)


def test_a_vector_of_another_depth_is_refused(model):
    deeper = ts.SteeringVector._from_means(
        torch.randn(9, 48), torch.zeros(9, 48), {"model": "a deeper one"}
    )
    with pytest.raises(ValueError, match="9 layers, this model 4: it was made for a deeper one"):
        model.complete("x", [deeper.at(1).add()])


def test_vectors_know_their_directions(a):
    for layer in range(a.n_layers):
        v = a.at(layer)
        assert v.direction.shape == (a.dim,)
        assert v.direction.dtype == torch.float32
        assert float(v.direction.norm()) == pytest.approx(1)
        assert v.target - v.baseline == pytest.approx(v.norm, abs=1e-5)
    assert a.at(-1).layer == a.n_layers - 1


def test_a_saved_vector_is_the_same_vector_to_us_and_to_other_readers(a, tmp_path):
    a.metadata["model"] = "tiny"
    a.save(tmp_path / "v.safetensors")
    loaded = ts.SteeringVector.load(tmp_path / "v.safetensors")
    tensors = load_file(tmp_path / "v.safetensors")
    for name in TENSORS:
        assert torch.equal(getattr(loaded, name), getattr(a, name))
        assert torch.equal(tensors.pop(name), getattr(a, name))
    assert not tensors
    assert loaded.metadata == {"model": "tiny"}


def test_files_that_are_no_vectors_are_refused(a, tmp_path):
    path = tmp_path / "v.safetensors"
    with pytest.raises(FileNotFoundError, match="no steering vector file"):
        ts.SteeringVector.load(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="damaged or is not a safetensors file"):
        ts.SteeringVector.load(path)
    save_file({"directions": torch.zeros(2, 3)}, path)
    with pytest.raises(ValueError, match="not a tinysteer vector"):
        ts.SteeringVector.load(path)
    a.save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged or is not a safetensors file"):
        ts.SteeringVector.load(path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        a.save(tmp_path / "nowhere" / "v.safetensors")


def test_nan_in_a_vector_is_refused(a):
    directions = a.directions.clone()
    directions[1, 2] = math.nan
    with pytest.raises(ValueError, match="directions has NaN"):
        ts.SteeringVector(directions, a.norms, a.targets, a.baselines)


def test_a_layer_where_nothing_differs_has_no_direction():
    means = torch.randn(3, 8)
    same = means.clone()
    same[0] += 1
    vector = ts.SteeringVector._from_means(same, means)
    with pytest.raises(ValueError, match="layer 1 has no direction"):
        vector.at(1)
    assert vector.at(0).norm == pytest.approx(8**0.5, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_a_vector_of_other_numbers_is_refused(dtype, a, tmp_path):
    tensors = {name: getattr(a, name) for name in TENSORS} | {"norms": torch.ones(4).to(dtype)}
    with pytest.raises(ValueError, match="norms is of torch"):
        ts.SteeringVector(**tensors)
    about = {"format": FORMAT}
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "v", about)
    with pytest.raises(ValueError, match=r"v: norms is of torch\..*, not of float32 or the like"):
        ts.SteeringVector.load(tmp_path / "v")


def test_a_vector_without_layers_or_with_a_norm_along_nothing_is_refused():
    with pytest.raises(ValueError, match=r"directions is \[0, 4\], not \[n_layers, D\]"):
        ts.SteeringVector(torch.zeros(0, 4), *(torch.zeros(0) for _ in range(3)))
    with pytest.raises(ValueError, match="unit length, or 0 where the norm is 0"):
        ts.SteeringVector(torch.zeros(2, 4), torch.tensor([0.0, 1.0]), *torch.zeros(2, 2))


@pytest.mark.parametrize("layer", [4.0, "4", True, None, 2.5])
def test_a_layer_that_is_not_a_whole_number_is_refused(layer, a):
    with pytest.raises(ValueError, match="a layer is a whole number"):
        a.at(layer)


def test_a_number_that_no_norm_could_hold_is_refused(a):
    with pytest.raises(ValueError, match="finite numbers up to 1e15, not 1e"):
        a.at(1).add(weight=1e30)

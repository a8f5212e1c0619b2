"""Attention: true to the laws of the softmax."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_near
from strategies import attention_calls, random_array, seeds, sizes

from tinyldm.nn.attention import attention


def with_options(call, **options):
    return replace(call, options=call.options | options)


def run(call, *arrays):
    """y, and dq, dk, dv of a dy that depends on the seed alone."""
    y, backward = call(*arrays)
    return y, *backward(random_array(np.random.default_rng(call.seed + 1), y.shape))


# ------------------------------------------------------------------------------------------ softmax


@pytest.mark.parametrize("causal", [False, True])
def test_huge_scores_in_float32(causal):
    rng = np.random.default_rng(0)
    q = np.full((1, 6, 1), 1e4, "float32")
    k = rng.choice([-1, 1], (1, 6, 1)).astype("float32")  # so scores are ±10,000
    v = random_array(rng, (1, 6, 3), "float32")
    y, backward = attention(q, k, v, 1, causal)
    y64, backward64 = attention(*(a.astype("float64") for a in (q, k, v)), 1, causal)
    assert_near(y, y64, tol=1e-6)
    # log Σ eˢ, kept for the backward pass, has four digits less here than near zero.
    for dz, dz64 in zip(backward(y), backward64(y64), strict=True):
        assert np.isfinite(dz).all()
        assert_near(dz, dz64, tol=2e-3)


@given(attention_calls())
def test_adding_a_number_to_all_scores_of_a_query_changes_nothing(call):
    # The same vector added to every key adds q · vector to every score.
    q, k, v = call.arrays()
    vector = random_array(np.random.default_rng(call.seed + 1), k.shape[2])
    y, dq, dk, dv = run(call, q, k, v)
    moved = run(call, q, k + vector, v)
    for z, expected in zip(moved, (y, dq, dk, dv), strict=True):
        assert_near(z, expected, tol=1e-11)
    if not call.options["causal"]:
        assert_near(dk.sum(axis=1), np.zeros_like(dk[:, 0]))


@given(attention_calls())
def test_without_a_question_the_answer_is_the_mean(call):
    q, k, v = call.arrays()
    y, _ = with_options(call, causal=False)(0 * q, k, v)
    assert_near(y, np.broadcast_to(v.mean(axis=1, keepdims=True), y.shape))
    y, _ = with_options(call, causal=True)(0 * q, k, v)
    for i in range(q.shape[1]):
        assert_near(y[:, i], v[:, : i + 1].mean(axis=1))


@given(attention_calls())
def test_where_all_values_are_alike_questions_do_not_matter(call):
    q, k, v = call.arrays()
    y, dq, dk, _ = run(call, q, k, np.repeat(v[:, :1], v.shape[1], axis=1))
    assert_near(y, np.repeat(v[:, :1], q.shape[1], axis=1))
    assert_near(dq, np.zeros_like(q))
    assert_near(dk, np.zeros_like(k))


@given(attention_calls())
def test_an_answer_lies_between_the_values(call):
    q, k, v = call.arrays()
    y, _ = call(q, k, v)
    assert (y <= v.max(axis=1, keepdims=True) + 1e-12).all()
    assert (y >= v.min(axis=1, keepdims=True) - 1e-12).all()


@given(attention_calls(), seeds)
def test_keys_and_values_have_no_order_and_queries_do_not_meet(call, seed):
    call = with_options(call, causal=False)
    q, k, v = call.arrays()
    rng = np.random.default_rng(seed)
    queries, keys = rng.permutation(q.shape[1]), rng.permutation(k.shape[1])
    y, _ = call(q, k, v)
    assert_near(call(q, k[:, keys], v[:, keys])[0], y)
    assert_near(call(q[:, queries], k, v)[0], y[:, queries])


@given(attention_calls(), seeds)
def test_what_attends_to_itself_moves_with_its_tokens(call, seed):
    call = with_options(call, causal=False)
    x = call.arrays()[0]
    rng = np.random.default_rng(seed)
    tokens, dy = rng.permutation(x.shape[1]), random_array(rng, x.shape)
    y, backward = call(x, x, x)
    moved, moved_back = call(x[:, tokens], x[:, tokens], x[:, tokens])
    assert_near(moved, y[:, tokens])
    for moved_dx, dx in zip(moved_back(dy[:, tokens]), backward(dy), strict=True):
        assert_near(moved_dx, dx[:, tokens])


@given(attention_calls())
def test_causal_tokens_see_nothing_of_the_future(call):
    call = with_options(call, causal=True)
    q, k, v = call.arrays()
    y, _ = call(q, k, v)
    for i in range(min(q.shape[1], k.shape[1])):
        k_other, v_other = k.copy(), v.copy()
        k_other[:, i + 1 :] += 3
        v_other[:, i + 1 :] -= 5
        y_other, backward = call(q, k_other, v_other)
        assert_near(y_other[:, : i + 1], y[:, : i + 1])
        dy = np.zeros_like(y)
        dy[:, : i + 1] = 1
        dq, dk, dv = backward(dy)
        assert not dq[:, i + 1 :].any() and not dk[:, i + 1 :].any() and not dv[:, i + 1 :].any()


@given(attention_calls())
def test_heads_do_not_meet(call):
    q, k, v = call.arrays()
    heads, y = call.options["heads"], call(q, k, v)[0]
    parts = [np.split(a, heads, axis=2) for a in (q, k, v)]
    alone = [with_options(call, heads=1)(*head)[0] for head in zip(*parts, strict=True)]
    assert_near(np.concatenate(alone, axis=2), y)


@given(st.integers(1, 3), sizes, sizes, seeds)
def test_the_scale_is_that_of_one_head(heads, l, d, seed):
    # Two tokens of which one scores s higher than the other get e^s : 1.
    rng = np.random.default_rng(seed)
    q, k = random_array(rng, (1, l, heads * d)), np.zeros((1, 2, heads * d))
    k[0, 1, :d] = random_array(rng, d)  # in the first head
    v = np.repeat([[[0.0], [1.0]]], heads, axis=2)
    y, _ = attention(q, k, v, heads)
    score = q[0, :, :d] @ k[0, 1, :d] / np.sqrt(d)
    assert_near(y[0, :, 0], 1 / (1 + np.exp(-score)))
    assert_near(y[0, :, 1:], np.full((l, heads - 1), 0.5))

"""Attention by the warps themselves: the PTX, by a small interpreter of it. Only a card shows what it makes of it."""

import jax.numpy as jnp
import numpy as np
import pytest

from odelm.models.kernels.attend import LEAST
from odelm.models.kernels.attend_ptx import collect_text, halves_text, leave_text, scores_text, values_text
from odelm.models.kernels.layout import CHUNK, GATHERED, THREADS
from tests.kernels.test_by_warps import placed
from tests.kernels.warps import Warps

K = 64
THREAD = np.arange(THREADS, dtype=np.uint32)
QUARTER = THREAD % 4
PLACES = 16 * (THREAD // 32) + 2 * QUARTER + np.array([[0], [1], [8], [9]])
"""Of a chunk, those whose scores a thread has."""


def bfloat16(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.bfloat16))


def run(text: str, memory: np.ndarray, outputs: int, *given: object) -> list[np.ndarray]:
    """Returns the first registers after some PTX, whose results have no values before."""
    warps = Warps(memory, [*[np.float32(np.nan)] * outputs, *given])
    warps.run(text)
    return [warps.registers[f"${i}"] for i in range(outputs)]


def part(
    query: np.ndarray, chunks: list[tuple[np.ndarray, ...]], end: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns a thread's scores of each chunk, and what the warps add up to."""
    numbers = [query[8 * j + 2 * QUARTER + i] for j in range(8) for i in (0, 1)]
    left = run(halves_text(), np.zeros(0, np.uint8), 16, *numbers)
    running, scores = [np.full(THREADS, np.float32(LEAST)), *np.zeros((17, THREADS), np.float32)], []
    for number, (keys, values, hidden) in enumerate(chunks):
        memory = np.concatenate([placed(keys), placed(values), hidden.view(np.uint8)])
        of = np.uint32(0), np.uint32(4 * CHUNK * K), THREAD, np.uint32(number * CHUNK), np.uint32(end)
        scores.append(run(scores_text(LEAST), memory, 4, *of, *left))
        running = run(values_text(), memory, 18, np.uint32(2 * CHUNK * K), THREAD, *scores[-1], *running)
    scratch = np.full(4 * GATHERED, 255, np.uint8)
    run(leave_text(), scratch, 0, np.uint32(0), THREAD, *running)
    return scores, run(collect_text(), scratch, 18, np.uint32(0), THREAD)


@pytest.mark.parametrize("end", [3 * CHUNK, 2 * CHUNK + 37, 5])
def test_warps_attend_to_the_places_before_the_end(end):
    rng = np.random.default_rng(end)
    query = rng.normal(size=K).astype(np.float32)
    chunks = []
    for _ in range(3):
        keys, values = (bfloat16(rng.normal(size=(CHUNK, K))) for _ in range(2))
        chunks.append((keys, values, np.where(rng.random(CHUNK) < 0.2, LEAST, 0.0).astype(np.float32)))
    found, (top, total, *context) = part(query, chunks, end)

    keys, values, hidden = (np.concatenate(some).astype(np.float64) for some in zip(*chunks, strict=True))
    scores = np.where(np.arange(3 * CHUNK) < end, keys @ query.astype(np.float64) + hidden, LEAST)
    for number, some in enumerate(found):
        expected = scores[number * CHUNK + PLACES]
        np.testing.assert_allclose(np.where(np.stack(some) < LEAST / 2, LEAST, some), expected, atol=1e-3)
    weights = np.exp(scores - scores.max())
    np.testing.assert_allclose(top, scores.max(), atol=1e-3)
    np.testing.assert_allclose(total, weights.sum(), rtol=1e-3)
    for j in range(8):
        for i in (0, 1):
            expected = (weights @ values)[8 * j + 2 * QUARTER + i]
            np.testing.assert_allclose(context[2 * j + i], expected, atol=1e-3 * weights.sum())


def test_large_scores_do_not_overflow_whatever_their_order():
    rng = np.random.default_rng(0)
    query, values = rng.normal(size=K).astype(np.float32), bfloat16(rng.normal(size=(CHUNK, K)))
    keys = [bfloat16(size * rng.normal(size=(CHUNK, K))) for size in (20, 1, 60)]
    hidden = np.zeros(CHUNK, np.float32)
    _, (top, total, *context) = part(query, [(one, values, hidden) for one in keys], 3 * CHUNK)
    scores = np.concatenate(keys).astype(np.float64) @ query.astype(np.float64)
    weights = np.exp(scores - scores.max())
    np.testing.assert_allclose(top, scores.max(), rtol=1e-4)
    np.testing.assert_allclose(total, weights.sum(), rtol=0.02)
    expected = (weights @ np.tile(values, (3, 1)).astype(np.float64))[2 * QUARTER]
    np.testing.assert_allclose(context[0], expected, atol=0.02)


def test_queries_and_weights_keep_more_than_their_rounding():
    """With weights that are alike and values that are equal, nothing else is rounded."""
    rng = np.random.default_rng(0)
    query = (0.05 * rng.normal(size=K)).astype(np.float32)
    keys, values = bfloat16(rng.normal(size=(CHUNK, K))), bfloat16(np.full((CHUNK, K), 3.0))
    (found,), (_, total, *context) = part(query, [(keys, values, np.zeros(CHUNK, np.float32))], CHUNK)
    np.testing.assert_allclose(found, (keys.astype(np.float64) @ query.astype(np.float64))[PLACES], atol=1e-5)
    np.testing.assert_allclose(np.stack(context) / total, 3.0, rtol=2e-5)

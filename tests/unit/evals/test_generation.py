"""Ways to generate, compared: what a row says against what it is of."""

import io

import numpy as np
import pytest
from rich.console import Console

from odelm.config import ModelConfig
from odelm.errors import InputError
from odelm.evals import generation
from odelm.evals.generation import Way, compare_ways, second_half, token_ms, ways
from odelm.evals.generation_report import make_generation_report, plot_generation, print_generation
from odelm.infer.latency import Latency
from odelm.infer.runner import Runner
from odelm.models.early_exit import EarlyExit
from odelm.models.loss import loss_sums
from tests.fake_card import card, decode_on

PROMPTS = [[3, 1, 4], [5, 9, 2]]


@pytest.fixture(scope="module")
def runner(make_model) -> Runner:
    return Runner.of(make_model())


@pytest.fixture(scope="module")
def held_out(tokens):
    targets = np.roll(tokens, -1, axis=1)
    return [{"tokens": tokens, "targets": targets, "weights": np.ones(tokens.shape, np.float32)}]


def test_full_depth_comes_first_and_every_way_once(runner):
    found = ways(runner, [2, 4, 1], prefill_steps=4, drafts=[(1, 2)])
    assert found == [Way(4), Way(2), Way(1), Way(2, 4), Way(1, 4), Way(4, None, 1, 2)]
    assert [way.label for way in found] == ["4", "2", "1", "4, then 2", "4, then 1", "draft 1 x 2"]
    with pytest.raises(InputError, match="steps is 0"):
        ways(runner, [0])
    with pytest.raises(InputError, match="draft_length is 0"):
        ways(runner, [2], drafts=[(1, 0)])


def test_rows_compare_with_full_depth(runner, held_out):
    chosen = ways(runner, [2], prefill_steps=4, drafts=[(1, 2)])
    full, coarse, mixed, draft = rows = compare_ways(
        runner, chosen, PROMPTS, new_tokens=5, held_out=held_out, repeats=2
    )
    assert full["speedup"] in (1, None) and full["loss_increase"] == 0 and full["identical"] == 1
    for row in rows:
        if full["token_ms"] and row["token_ms"]:
            assert np.isclose(row["speedup"], full["token_ms"] / row["token_ms"])
        assert np.isclose(row["loss_increase"], row["loss"] / full["loss"] - 1)
        assert row["loss_tokens"] == 6 and row["batch"] == 2 and row["prompt"] == 3
    assert len({full["loss"], coarse["loss"], mixed["loss"]}) == 3
    assert draft["loss"] == full["loss"] and draft["identical"] == 1 and 0 <= draft["accepted"] <= 1
    assert np.isclose(coarse["memory_bytes"] / full["memory_bytes"], 0.5, atol=0.02)
    assert full["tokens_per_round"] is None and draft["tokens_per_round"] >= 1


def test_a_text_that_takes_no_longer_than_its_prompt_has_no_time_for_a_token(runner, monkeypatch, tmp_path):
    assert token_ms(7.0, 1.0, 4) == 2.0 and token_ms(1.0, 1.0, 4) is None
    monkeypatch.setattr(generation, "measure", lambda calls, **_: {name: Latency(5.0, 6.0) for name in calls})
    rows = compare_ways(runner, ways(runner, [2]), PROMPTS, new_tokens=3, repeats=1)
    assert all(row[name] is None for row in rows for name in ("token_ms", "tokens_per_s", "speedup"))
    assert "5.00 " in printed(runner.model.config, rows)
    report = make_generation_report(runner.model.config, rows, text=None)
    (tmp_path / "none.png").touch()
    plot_generation({**report, "rows": [row | {"loss": 4.0} for row in rows]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists(), "there is nothing to draw"


def printed(model: ModelConfig, rows: list[generation.Row]) -> str:
    """Returns what the report of some rows prints."""
    console = Console(record=True, width=120, file=io.StringIO())
    print_generation(make_generation_report(model, rows, text=None), console)
    return console.export_text()


@pytest.fixture(scope="module")
def in_kernels(make_model) -> Runner:
    """A model that kernels decode."""
    return Runner.of(make_model(width=128, feedforward=128, dtype="bfloat16"))


def test_a_report_names_the_kernel_that_decoded(in_kernels, monkeypatch):
    decode_on(card(monkeypatch), monkeypatch)
    rows = compare_ways(in_kernels, [Way(4), Way(2)], PROMPTS, new_tokens=2, repeats=1)
    assert [(row["kernel"], row["kernel_reason"]) for row in rows] == 2 * [("persistent", "")]
    assert "\ndecoded by persistent\n" in printed(in_kernels.model.config, rows)


def test_a_report_says_why_no_kernel_decoded_and_which_rows(in_kernels, monkeypatch):
    decode_on(card(monkeypatch), monkeypatch)
    chosen = [Way(4), Way(2), Way(4, early_exit=EarlyExit(0.1, "state"))]
    rows = compare_ways(in_kernels, chosen, PROMPTS, new_tokens=2, repeats=1)
    assert [row["kernel"] for row in rows] == ["persistent", "persistent", "xla"]
    text = printed(in_kernels.model.config, rows)
    assert "\ndecoded by persistent: 4; 2\ndecoded by xla (tokens leave the depth early): 4, exit 0.1\n" in text


def test_a_report_names_the_card_that_runs_no_kernel(in_kernels, monkeypatch):
    decode_on(card(monkeypatch, compute_capability="8.0"), monkeypatch)
    rows = compare_ways(in_kernels, [Way(2)], PROMPTS, new_tokens=2, repeats=1)
    reason = "kernels are for compute capability 9; this card's is 8.0"
    assert f"\ndecoded by xla ({reason})\n" in printed(in_kernels.model.config, rows)


@pytest.mark.thorough
def test_a_second_half_is_that_of_the_whole(runner, held_out):
    model, plan = runner.model, runner.plan(2, "euler")
    found = second_half(model, plan, plan, held_out[0])
    later = held_out[0] | {"weights": np.repeat([[0, 0, 0, 1, 1, 1]], 2, axis=0).astype(np.float32)}
    assert np.isclose(found.nats, loss_sums(model, later, plan=plan).nats, rtol=1e-5)
    mixed = second_half(model, runner.plan(4, "euler"), plan, held_out[0])
    assert not np.isclose(mixed.nats, found.nats, rtol=1e-5)


def test_without_a_text_there_are_no_losses(runner):
    (row,) = compare_ways(runner, [Way(4)], PROMPTS, new_tokens=2, repeats=1)
    assert row["loss"] is row["loss_increase"] is None
    with pytest.raises(InputError, match="new_tokens is 1, expected at least 2"):
        compare_ways(runner, [Way(4)], PROMPTS, new_tokens=1)

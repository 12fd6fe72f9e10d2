"""How a compiled program is counted, and what is reported for a slice; with libtpu an update is compiled for one."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from small_corpus import documents, make_config, write_jsonl

from odelm.config import replace
from odelm.data.loader import train_batches
from odelm.data.prepare import prepare
from odelm.errors import InputError
from odelm.models.attention import SPLASH_FROM
from odelm.train.slice import (
    CHIPS,
    Need,
    batch_shapes,
    collective_bytes,
    compiled_updates,
    lowered_updates,
    needs,
    sent_by,
    table,
)
from tests.unit.train.test_step import config_of

ROOT = Path(__file__).parents[3]
# JAX writes programs for a slice to its cache, and cannot read them back without a TPU.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
FULL_DEPTH = {"step_sampling.kind": "fixed"}
PROGRAM = """HloModule jit_update, entry_computation_layout={...}

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(%a, %b)
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.5 = f32[8]{0} all-reduce(%x), channel_id=1, to_apply=%sum
  ROOT %tuple = (s32[], f32[8]{0}) tuple(%i, %all-reduce.5)
}

%wrapped (x: f32[8]) -> f32[4] {
  ROOT %reduce-scatter.1 = f32[4]{0} reduce-scatter(%x), dimensions={0}, to_apply=%sum
}

ENTRY %main (p: f32[2,4]) -> f32[8] {
  %all-gather = bf16[16,4]{1,0} all-gather(%p), dimensions={0}
  %all-gather-start.1 = (f32[2]{0}, f32[8]{0}) all-gather-start(%q), dimensions={0}
  %all-reduce.9 = (f32[3]{0}, f32[]) all-reduce(%r, %s), to_apply=%sum
  %while.2 = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %all-reduce-start.4 = (f32[5]{0}, bf16[2]{0}) all-reduce-start(%u, %v), to_apply=%sum
  %all-gather-start.2 = ((f32[2]{0}, bf16[1]{0}), (f32[4]{0}, bf16[2]{0})) all-gather-start(%q, %w), dimensions={0}
  %permute-start = (f32[3]{0}, f32[3]{0}, u32[], u32[]) collective-permute-start(%r), source_target_pairs={{0,1}}
  %all-reduce-start.5 = ((f32[7]{0}), f32[7]{0}) all-reduce-start(%z), to_apply=%sum
  %all-reduce-start.6 = ((f32[2]{0}, f32[]), (f32[2]{0}, f32[]), s32[]) all-reduce-start(%z, %s), to_apply=%sum
  %async-start = ((f32[8]{0}), f32[4]{0}) async-start(%y), calls=%wrapped
  %async-done = f32[4]{0} async-done(%async-start), calls=%wrapped
  ROOT %done = f32[8]{0} all-gather-done(%all-gather-start.1)
}
"""


@pytest.fixture
def libtpu(monkeypatch):
    """Skips where libtpu is missing. It ends a process with flags of XLA that it lacks, as those of conftest.py."""
    pytest.importorskip("libtpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def test_a_program_that_cannot_be_read_is_said_to_be():
    class Unreadable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("RET_CHECK failure")

    assert sent_by(Unreadable()) is None
    need = Need(steps=3, memory=10**9, flops=197e12, traffic=81.9e9, collectives=sent_by(Unreadable()))
    assert "sent: unknown" in table([need], "v5e:4x4", 1) and need.seconds(CHIPS["v5e"])["links"] == 0


def test_collectives_are_counted_by_their_results_and_as_often_as_loops_run():
    assert collective_bytes(PROGRAM) == {
        "all-gather": 2 * 64 + 4 * 8 + (4 * 4 + 2 * 2),
        "all-reduce": 4 * 4 + 5 * 4 * 8 + (4 * 5 + 2 * 2) + 4 * 7 + 4 * 3,
        "collective-permute": 4 * 3,
        "reduce-scatter": 4 * 4,
    }
    assert collective_bytes("ENTRY %main (p: f32[2]) -> f32[2] {\n  ROOT %n = f32[2] negate(%p)\n}") == {}


WINDOWED = """HloModule jit_update, entry_computation_layout={...}

%fused.1 (p: f32[2]) -> f32[8] {
  ROOT %all-gather.1 = f32[8]{0} all-gather(%p), channel_id=7, dimensions={0}
}

%fused.2 (p: f32[2]) -> f32[8] {
  ROOT %all-gather.2 = f32[8]{0} all-gather(%p), channel_id=7, dimensions={0}
}

%condition (arg: (f32[4], u32[])) -> pred[] {
  %constant.1 = u32[]{:T(128)} constant(15), metadata={op_name="dot"}
  %i = u32[] get-tuple-element(%arg), index=1
  ROOT %compare = pred[] compare(%i, %constant.1), direction=LT
}

%body (arg: (f32[4], u32[])) -> (f32[4], u32[]) {
  %constant.2 = u32[] constant(2)
  %i.2 = u32[] get-tuple-element(%arg), index=1
  %add = u32[] add(%i.2, %constant.2)
  %permute = f32[4]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1}}
  ROOT %tuple = (f32[4]{0}, u32[]) tuple(%permute, %add)
}

ENTRY %main (p: f32[2]) -> f32[8] {
  %fusion.1 = f32[8]{0} fusion(%p), kind=kCustom, calls=%fused.1
  %fusion.2 = f32[8]{0} fusion(%p), kind=kCustom, calls=%fused.2
  ROOT %while = (f32[4]{0}, u32[]) while(%t), condition=%condition, body=%body
}
"""


def test_what_a_tpu_sends_beside_other_work_is_counted_once_and_in_every_turn_of_its_loops():
    """The counter is raised by 2 until it reaches 15: 8 turns."""
    assert collective_bytes(WINDOWED) == {"all-gather": 4 * 8, "collective-permute": 8 * 4 * 4}
    assert collective_bytes(WINDOWED.replace("direction=LT", "direction=NE"))["collective-permute"] == 4 * 4


def test_the_slowest_part_bounds_the_update():
    need = Need(steps=3, memory=20 * 10**9, flops=197e12, traffic=81.9e9, collectives={"all-reduce": 2 * 10**9})
    assert need.seconds(CHIPS["v5e"]) == pytest.approx({"compute": 1.0, "memory": 0.1, "links": 0.01})
    text = table([need], "v5e:4x4", tokens=10**6)
    assert "20.00 GB a chip; DOES NOT FIT" in text and "at least 1000.0 ms (compute)" in text
    assert "all-reduce 2,000.0 MB" in text and "1.00 M tokens/s" in text


@pytest.mark.parametrize("topology", ["v4:2x2", "v5e", "v5e:4", "v5e:4x4x"])
def test_an_unknown_slice_is_refused(topology):
    with pytest.raises(InputError, match="expected a chip and a shape, such as v5e:16x16; chips: v5e, v5p, v6e"):
        list(needs(config_of(), topology))


@pytest.mark.parametrize("changes", [{"data.task": "rte", "data.source": "rte"}, {"model.outputs": 2}])
def test_a_recipe_of_a_task_is_refused(changes):
    config = replace(config_of(kind="encoder"), changes)
    with pytest.raises(InputError, match="expected a recipe that trains on text: leave both out"):
        next(lowered_updates(config, jax.devices()))


def test_a_batch_has_the_shapes_that_a_corpus_gives(tmp_path):
    config = make_config(write_jsonl(tmp_path / "docs.jsonl", documents(40)), tmp_path / "cache")
    prepared = prepare(config)
    paired = {"model.sentence_order": True, "model.token_types": 2}
    for kind, changes in [("decoder", {}), ("encoder", {}), ("encoder", paired | {"data.mask_rate": 0.3})]:
        for packing in ("auto",) if changes else ("auto", "segments"):
            own = replace(config, {"model.kind": kind, "data.packing": packing, **changes})
            batch = next(train_batches(prepared, own))
            shapes = {name: (array.shape, array.dtype) for name, array in batch.items()}
            assert batch_shapes(own) == shapes, (kind, packing)


def test_an_encoder_is_lowered_with_the_masks_and_the_packing_of_its_recipe():
    changes = {"data.packing": "segments", "data.mask_rate": 0.25}
    ((count, lowered),) = lowered_updates(replace(config_of(kind="encoder"), FULL_DEPTH | changes), jax.devices())
    batch = lowered.in_avals[0][1]
    assert count == 4 and batch["positions"].shape == (4, 4) and batch["segments"].shape == (4, 16)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is there")
def test_without_libtpu_it_says_what_to_install():
    with pytest.raises(InputError, match=r"no programs can be compiled for v5e:2x2 here .*pip install '.\[slice\]'"):
        list(needs(config_of(), "v5e:2x2"))


def test_an_update_is_compiled_for_a_slice(libtpu):
    (need,) = needs(replace(config_of((4, 1, 1)), FULL_DEPTH), "v5e:2x2")
    assert need.steps == 4 and need.memory > 0 and need.flops > 0 and need.collectives["all-reduce"] > 0


@pytest.mark.parametrize(
    ("kind", "length"), [("decoder", SPLASH_FROM), ("encoder", SPLASH_FROM), ("decoder", SPLASH_FROM // 2)]
)
def test_splash_attention_is_compiled_for_a_slice_from_its_shortest_length_on(libtpu, kind, length):
    """Its kernels for the values, and for the gradient of queries and that of keys and values, and no others."""
    changes = {"model.max_length": length, "train.length": length, "model.depth": 1}
    config = replace(config_of((2, 1, 2), kind=kind), FULL_DEPTH | changes)
    ((_, compiled),) = compiled_updates(config, "v5e:2x2")
    kernel = r'%splash_m[hq]a_(fwd|dq|dkv)[\w.]* = .*custom_call_target="tpu_custom_call"'
    expected = {"fwd", "dq", "dkv"} if length == SPLASH_FROM else set()
    assert set(re.findall(kernel, compiled.as_text() or "")) == expected


@pytest.mark.thorough
def test_a_shared_block_is_summed_over_the_devices_once(tmp_path):
    """Whatever the number of its uses, each device sends as much as there are parameters."""
    code = (
        "import jax, dataclasses\n"
        "from tests.unit.train.test_step import config_of, prepared, with_train\n"
        "from odelm.train.slice import collective_bytes\n"
        "from odelm.train.step import compile_updates\n"
        "config = with_train(config_of((2, 1, 1)), unroll=True)\n"
        "update, state, batch, mesh = prepared(config)\n"
        "print(sum(x.size for x in jax.tree.leaves(state.params)))\n"
        "for program in compile_updates(update, state, batch, (1, 2), mesh, lambda _: None).values():\n"
        "    print(collective_bytes(program.as_text())['all-reduce'])\n"
    )
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parameters, one, two = map(int, done.stdout.split())
    assert one == two and 4 * parameters <= one < 4 * parameters + 100

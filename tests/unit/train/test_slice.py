"""How a compiled program is counted, and what is reported for a slice; with libtpu an update is compiled for one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from odelm.errors import InputError
from odelm.train.slice import CHIPS, Need, collective_bytes, needs, sent_by, table
from tests.unit.train.test_step import config_of

ROOT = Path(__file__).parents[3]
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


def test_an_encoder_is_refused():
    with pytest.raises(InputError, match="--slice takes a recipe of a decoder"):
        list(needs(config_of(kind="encoder"), "v5e:2x2"))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is there")
def test_without_libtpu_it_says_what_to_install():
    with pytest.raises(InputError, match=r"no programs can be compiled for v5e:2x2 here .*pip install '.\[slice\]'"):
        list(needs(config_of(), "v5e:2x2"))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_an_update_is_compiled_for_a_slice():
    (need,) = needs(config_of((4, 1, 1)), "v5e:2x2")
    assert need.memory > 0 and need.flops > 0 and need.collectives["all-reduce"] > 0


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

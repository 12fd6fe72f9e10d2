"""Flags, overrides and help of the two programs, and what they print beside their own words."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from benchmarks import exits, run_program
from odelm.config import Config, ModelConfig
from odelm.errors import InputError
from odelm.programs import command_line


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """Returns what an exception that nobody catches is told by, as it comes."""
    messages = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: messages.append(str(unraisable.exc_value)))
    assert command_line.run(lambda: 0, command_line.new_flags(), [], "") == 0
    return messages


def test_reads_that_outlive_their_event_loop_are_not_told(told):
    for message in ("Event loop is closed", "another"):
        sys.unraisablehook(SimpleNamespace(exc_type=RuntimeError, exc_value=RuntimeError(message)))
    assert told == ["another"]


def test_overrides_are_taken_in_every_form_and_anywhere():
    given = [
        "--config.train.updates=3", "--config=a.py", "-config.model.bias", "--config.data.source", "x y",
        "--config.mesh.data", "-1", "--workdir=w",
    ]  # fmt: skip
    assert command_line.with_overrides(given) == [
        "--override=train.updates=3", "--config=a.py", "--override=model.bias=true", "--override=data.source=x y",
        "--override=mesh.data=-1",        "--workdir=w",
    ]  # fmt: skip


def test_an_override_has_the_type_of_its_option():
    overrides = [
        "train.updates=3", "optimizer.learning_rate=1e-3", "model.bias=true", "step_sampling.counts=3,6",
        "model.embed_dim=none", "data.source=a=b", "train.eval_steps=(4, 2)", "data.weights=0.5",
        "step_sampling.weights=",
    ]  # fmt: skip
    config = command_line.overridden(Config(model=ModelConfig(embed_dim=8)), overrides)
    assert (config.train.updates, config.optimizer.learning_rate, config.model.bias) == (3, 1e-3, True)
    assert (config.step_sampling.counts, config.model.embed_dim, config.data.source) == ((3, 6), None, "a=b")
    assert (config.train.eval_steps, config.data.weights, config.step_sampling.weights) == ((4, 2), (0.5,), ())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.widht=3", "config.model has no option 'widht'; did you mean 'width'"),
        ("modle.width=3", "config has no option 'modle'; did you mean 'model'"),
        ("model.width=abc", "--config.model.width: 'abc' is not of type int"),
        ("model.width=1.5", "--config.model.width: '1.5' is not of type int"),
        ("model.bias=maybe", "--config.model.bias: 'maybe' is not a bool: expected true or false"),
        ("step_sampling.counts=3,a", "--config.step_sampling.counts: 'a' is not of type int"),
        ("step_sampling.counts=(3", "--config.step_sampling.counts: '.3' is not a tuple"),
    ],
)
def test_an_override_that_is_wrong_is_named(override, message):
    with pytest.raises(InputError, match=message):
        command_line.overridden(Config(), [override])


def test_compiled_programs_are_kept_unless_the_environment_says_where(monkeypatch, tmp_path):
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    command_line.use_compilation_cache(str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    command_line.use_compilation_cache("")
    assert not updates
    command_line.use_compilation_cache(str(tmp_path))
    assert Path(updates["jax_compilation_cache_dir"]).parent == tmp_path


@pytest.fixture
def values() -> flags.FlagValues:
    """Returns the flags of a program that has two of its own."""
    values = command_line.new_flags()
    flags.DEFINE_integer("steps", None, "How many.", flag_values=values)
    flags.DEFINE_bool("fast", False, "Whether to hurry.", flag_values=values)
    return values


def test_flags_are_parsed_anew_each_time(values):
    command_line.parse(values, ["--steps=3", "--fast"])
    assert (values.steps, values.fast) == (3, True)
    command_line.parse(values, [])
    assert (values.steps, values.fast) == (None, False)


@pytest.mark.parametrize("asked", command_line.HELP)
def test_help_has_every_flag_with_its_default(values, capsys, asked):
    status = command_line.run(lambda: pytest.fail("ran"), values, ["--steps=x", asked], "What it does.", "The rest.")
    out = capsys.readouterr().out
    assert status == 0 and out.startswith("What it does.\n") and out.endswith("The rest.\n")
    for line in ("  --steps\n      How many.\n", "  --fast=false\n      Whether to hurry.\n", "  --compilation_cache="):
        assert line in out


def test_what_is_no_flag_is_told_in_one_line(values, capsys):
    for wrong, words in (("--stepz=3", "Unknown command line flag 'stepz'"), ("3", "'3' is not a flag")):
        assert command_line.run(lambda: pytest.fail("ran"), values, [wrong], "") == 2
        told = capsys.readouterr().err
        assert words in told and told.startswith("error: ") and told.count("\n") == 1


def test_benchmarks_tell_a_mistake_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["exits", f"--model={tmp_path / 'nothing'}"])
    with pytest.raises(SystemExit, match="2"):
        run_program(exits.main)
    assert "nothing is not a directory" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        run_program(lambda: None)
    programs = [file.read_text() for file in Path(exits.__file__).parent.glob("*.py")]
    assert all("    run_program(main)" in text for text in programs if 'if __name__ == "__main__"' in text)


MISTAKES = [
    ("attention", "--lengths=512,x", "'x' is given, expected a whole number"),
    ("decode_kernel", "--steps=12,", "'' is given, expected a whole number"),
    ("decode_kernel", "--shape=smal", "invalid choice: 'smal'"),
    ("decode_kernel", "--how=xla,launch", "'launch' is unknown; did you mean 'launches'?"),
    ("decode_kernel", "--layout={", "'{' is given, expected an object of JSON"),
    ("decode_kernel", "--layout=3", "'3' is given, expected an object of JSON"),
    ("decode_kernel", '--layout={"rign": 3}', "'rign' is unknown; did you mean 'ring'?"),
    ("exits", "--tolerance=x", "'x' is given, expected a number above 0"),
    ("exits", "--tolerance=", "'' is given, expected a number above 0"),
    ("exits", "--size=3", "'3' is given, expected two whole numbers of at least 1, such as 32x512"),
    ("exits", "--size=3x0", "'3x0' is given, expected two whole numbers"),
    ("exits", "--repeats=0", "'0' is given, expected a whole number of at least 1"),
    ("glue", "--tasks=colaa", "'colaa' is unknown; did you mean 'cola'?"),
    ("inference", "--size=1x2x3", "'1x2x3' is given, expected two whole numbers"),
    ("inference", "--parts=0", "'0' is given, expected a whole number of at least 1"),
    ("inference", "--shape=base", "'base' is unknown; choices: medium, small, tiny"),
    ("memory", "--steps=x", "'x' is given, expected a whole number"),
    ("rates", "--depths=4,a", "'a' is given, expected a whole number"),
    ("rates", "--factors=0", "'0' is given, expected a number above 0"),
    ("rates", "--reference=witout", "'witout' is unknown; did you mean 'without'?"),
    ("scaling", "--devices=a", "'a' is given, expected a whole number"),
    ("speculation", "--drafts=abc", "'abc' is given, expected two whole numbers"),
    ("study", "--rates=a", "'a' is given, expected a number above 0"),
    ("training", "--mesh=1,1", "'1,1' is given, expected 3 values separated by ','"),
    ("training", "--sides=odel", "'odel' is unknown; did you mean 'odelm'?"),
    ("variants", "--variants=base; muo", "'muo' is unknown; did you mean 'muon'?"),
    ("variants", "--rates=1,", "'' is given, expected a number above 0"),
]


@pytest.mark.parametrize(("program", "option", "words"), MISTAKES)
def test_benchmarks_report_a_wrong_option_before_they_begin(program, option, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, option])
    with pytest.raises(SystemExit, match="2"):
        run_program(importlib.import_module(f"benchmarks.{program}").main)
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option.partition('=')[0]}: {words}" in last


def test_a_benchmark_one_of_whose_processes_fails_makes_the_others_and_fails(capsys, monkeypatch, tmp_path):
    glue = importlib.import_module("benchmarks.glue")

    def command(task, options):
        write = f"import pathlib; p = pathlib.Path({str(tmp_path / task)!r}); p.mkdir(); "
        row = {"metric": "mcc", "steps": 3, "mean": 0.25, "std": None, "majority": None}
        write += f"(p / 'results.json').write_text({json.dumps({'rows': [row]})!r})"
        return [sys.executable, "-c", "raise SystemExit(2)" if task == "rte" else write]

    monkeypatch.setattr(glue, "command_of", command)
    given = ["glue", f"--data={tmp_path}", f"--work={tmp_path}", f"--out={tmp_path / 'all.json'}"]
    for tasks, status in (("rte,mrpc", "1"), ("mrpc,cola", "0")):
        monkeypatch.setattr(sys, "argv", [*given, f"--tasks={tasks}"])
        with pytest.raises(SystemExit, match=status):
            run_program(glue.main)
    said = capsys.readouterr()
    assert "rte: status 2" in said.out and "mrpc: status 0" in said.out
    assert "  mrpc   mcc       3: 25.0\n" in said.out, "of one seed, whose spread is not known"
    assert said.err == f"rte failed: see {tmp_path / 'rte'}.log\n"
    assert set(json.loads((tmp_path / "all.json").read_text())) == {"mrpc", "cola"}


def test_a_side_that_fails_makes_the_comparison_of_training_fail(capsys, monkeypatch):
    training = importlib.import_module("benchmarks.training")
    monkeypatch.setattr(training.sys, "executable", "false")
    monkeypatch.setattr(sys, "argv", ["training", "--sides=odelm", "--rounds=1"])
    with pytest.raises(SystemExit, match="1"):
        run_program(training.main)
    assert "odelm failed with status 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--width=100"], "--width=100 is no multiple of 64"),
        (["--width=128", "--model=small-decoder"], "--width: these are of random weights"),
        (["--parallel", "--ends=1", "--model=small-decoder"], "--ends, --parallel: these are of random weights"),
        (["--activation=gelu", "--model=small-decoder"], "--activation: these are of random weights"),
    ],
)
def test_what_shapes_random_weights_is_not_for_a_trained_model(wrong, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["decode_kernel", *wrong])
    with pytest.raises(SystemExit, match="2"):
        run_program(importlib.import_module("benchmarks.decode_kernel").main)
    assert words in capsys.readouterr().err


def test_a_trace_has_room_for_one_token_in_six_steps(capsys, monkeypatch):
    main = importlib.import_module("benchmarks.decode_kernel").main
    for wrong in ([], ["--tokens=2"], ["--steps=6"], ["--tokens=2", "--steps=3,12"]):
        monkeypatch.setattr(sys, "argv", ["decode_kernel", "--profile=traces", *wrong])
        with pytest.raises(SystemExit, match="2"):
            run_program(main)
        assert "give --tokens=2 --steps=6" in capsys.readouterr().err


def test_a_model_that_no_kernel_decodes_is_told_in_one_line(capsys, monkeypatch):
    main = importlib.import_module("benchmarks.decode_kernel").main
    for option, words in (("--shape=tiny", "its heads are of 16"), ("--model=small-encoder", "is no decoder")):
        monkeypatch.setattr(sys, "argv", ["decode_kernel", option, "--steps=2"])
        with pytest.raises(SystemExit, match="2"):
            run_program(main)
        assert words in capsys.readouterr().err


def test_a_path_that_the_system_refuses_is_told_in_one_line(tmp_path, capsys):
    def opened(path: Path) -> int:
        return path.stat().st_size

    (tmp_path / "file").touch()
    for path, reason in ((tmp_path / ("a" * 300), "File name too long"), (tmp_path / "file" / "b", "Not a directory")):
        assert command_line.told_in_one_line(lambda path=path: opened(path)) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: {path} cannot be used ({reason}): ") and told.count("\n") == 1
    with pytest.raises(FileNotFoundError):
        command_line.told_in_one_line(lambda: opened(tmp_path / "absent"))


def test_more_memory_than_there_is_is_told_in_one_line(capsys):
    for ask in (lambda: np.zeros(1 << 50, np.uint8), lambda: jnp.zeros(1 << 50, jnp.uint8)):
        assert command_line.told_in_one_line(lambda ask=ask: ask() is None) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: out of memory: 1") and "was asked for at once; try a smaller batch" in told
        assert told.count("\n") == 1
    on_a_gpu = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.50GiB."

    def fail(text):
        raise RuntimeError(text)

    assert command_line.told_in_one_line(lambda: fail(on_a_gpu)) == 2
    assert "out of memory: 12.50 GiB was asked for" in capsys.readouterr().err
    again = "RESOURCE_EXHAUSTED: Failed to allocate request for 2.00GiB (2147483648B) on device ordinal 0"
    assert command_line.told_in_one_line(lambda: fail(again)) == 2
    assert "out of memory: 2.00 GiB was asked for" in capsys.readouterr().err
    of_numpy = "Unable to allocate 381. GiB for an array with shape (100000000, 1024) and data type int32"

    def no_room():
        raise MemoryError(of_numpy)

    assert command_line.told_in_one_line(no_room) == 2
    assert "out of memory: 381 GiB was asked for at once; try" in capsys.readouterr().err
    assert command_line.told_in_one_line(lambda: fail("RESOURCE_EXHAUSTED: Out of memory"), "take less") == 2
    assert capsys.readouterr().err == "error: out of memory; take less\n"
    for defect in ("another", "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 234496"):
        with pytest.raises(RuntimeError, match=defect):
            command_line.told_in_one_line(lambda defect=defect: fail(defect))


@pytest.mark.parametrize(
    ("program", "words"),
    [("infer", "--batch or --length"), ("evals", "--batch_size or --length"), ("train", "--config.train.accumulate")],
)
def test_advice_where_the_memory_is_not_enough_is_of_the_program(program, words, capsys, monkeypatch):
    module = importlib.import_module(f"odelm.programs.{program}")

    def no_room():
        raise MemoryError

    monkeypatch.setattr(module, {"infer": "_infer", "evals": "_evaluate", "train": "_train"}[program], no_room)
    required = ["--config=configs/tiny.py", "--workdir=w"] if program == "train" else []
    assert module.main(["--compilation_cache=", *required]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: out of memory; try ") and words in told
    assert ("config.train" in told) == (program == "train")

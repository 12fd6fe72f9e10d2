"""Every way a config can be wrong, each named; JSON there and back; fingerprints."""

import dataclasses
import json

import pytest

from odelm import config as c
from odelm.config.serialize import DROPPED_OPTIONS, FORMER_DEFAULTS
from odelm.errors import InputError
from odelm.files import fingerprint


def edited(**values) -> c.Config:
    """Returns the default config with `part__field=value` set."""
    return c.replace(c.Config(), {name.replace("__", "."): value for name, value in values.items()})


def test_defaults_are_valid_and_validate_returns_self():
    config = c.Config()
    assert config.validate() is config


CHOICES = [
    ("model__kind", "decodr", "decoder"),
    ("model__norm", "layer_norm", "layernorm"),
    ("model__norm_placement", "prenorm", "pre"),
    ("model__activation", "gelu_tan", "gelu_tanh"),
    ("model__positions", "rotery", "rotary"),
    ("model__attention", "cudn", "cudnn"),
    ("model__dtype", "bfloat", "bfloat16"),
    ("model__residual_dtype", "float23", "float32"),
    ("data__corpus", "python_sorce", "python_source"),
    ("data__mask_unit", "spam", "span"),
    ("step_sampling__kind", "random_counts", "random_count"),
    ("optimizer__decay", "cosin", "cosine"),
    ("init__merge", "meen", "mean"),
]


@pytest.mark.parametrize("name, value, near", CHOICES)
def test_a_mistyped_choice_gets_field_value_and_nearest(name, value, near):
    path = name.replace("__", ".")
    with pytest.raises(InputError, match=f"^{path} is '{value}'; did you mean '{near}'\\? choices: "):
        edited(**{name: value}).validate()


WRONG = [
    (dict(model__width="128"), r"model\.width is '128' \(str\), expected int"),
    (dict(model__width=12.5), r"model\.width is 12\.5 \(float\), expected int"),
    (dict(model__bias=1), r"model\.bias is 1 \(int\), expected bool"),
    (dict(model__depth=True), r"model\.depth is True \(bool\), expected int"),
    (dict(model__dropout="0"), r"model\.dropout is '0' \(str\), expected a finite float"),
    (dict(model__feedforward=1.5), r"model\.feedforward is 1\.5 \(float\), expected int \| None"),
    (dict(step_sampling__counts=("3",)), r"step_sampling\.counts is \('3',\) \(tuple\), expected tuple\[int"),
    (dict(train__accumulate=3), r"train\.accumulate is 3"),
    (dict(train__z_loss=-1.0), r"train\.z_loss is -1.0, expected 0 or more"),
    (dict(train__keep_best=-1), r"train\.keep_best is -1, expected 0 \(none\) or more"),
    (dict(train__max_nonfinite=0), r"train\.max_nonfinite"),
    (dict(optimizer__kind="moun"), r"optimizer\.kind is 'moun'.*muon"),
    (dict(optimizer__average=1.0), r"optimizer\.average is 1.0, expected at least 0 and below 1"),
    (dict(step_sampling__few_first=0.5, step_sampling__anneal=0.5), r"few_first begins with few steps"),
    (
        dict(step_sampling__few_first=0.6, step_sampling__fine_last=0.5),
        r"fine_last is 0\.5, which leaves too few updates",
    ),
    (dict(step_sampling__fine_last=1.5), r"fine_last is 1\.5, expected a share"),
    (dict(train__distill=2.0), r"train\.distill is 2\.0, expected a share"),
    (dict(model__wide_modulation=True, model__time_modulation=False), r"model\.wide_modulation is True, but"),
    (dict(model__lanes=0), r"model\.lanes is 0, expected a positive"),
    (dict(train__remat=3), r"train\.remat is 3 \(int\), expected str \| None"),
    *[
        ({f"model__{name}": 0}, rf"model\.{name} is 0, expected a positive whole number")
        for name in ("vocab_size", "width", "heads", "depth", "groups", "max_length", "feedforward", "embed_dim")
    ],
    (dict(model__heads=3), r"model\.heads is 3, which does not divide model\.width \(128\); .* is (2|4)$"),
    (dict(model__groups=5), r"model\.groups is 5, which does not divide model\.depth \(12\); .* is (4|6)$"),
    (dict(model__dropout=1.0), r"model\.dropout is 1\.0, expected at least 0\.0 and below 1\.0"),
    (dict(model__norm_eps=0.0), r"model\.norm_eps is 0\.0, expected a positive"),
    (dict(model__token_types=-1), r"model\.token_types is -1, expected 0 or more"),
    (dict(model__heads=128), r"model\.width / model\.heads is 1, .*even head size; try model\.heads=64"),
    (dict(model__positions="sinusoidal", model__embed_dim=7), r"sinusoidal positions .* embedding size is 7"),
    (dict(model__sentence_order=True), r"model\.sentence_order is True, .*model\.kind='encoder'"),
    (dict(data__corpus="text"), r"data\.corpus is 'text', but data\.source is empty"),
    (dict(data__valid_fraction=1.0), r"data\.valid_fraction is 1\.0, expected a number between 0 and 1"),
    (dict(data__mask_rate=0.0), r"data\.mask_rate is 0\.0, expected a number between 0 and 1"),
    (dict(data__vocab_size=0), r"data\.vocab_size is 0, expected a positive"),
    (dict(data__vocab_size=4096), r"data\.vocab_size is 4096, more than model\.vocab_size 2048"),
    (dict(data__tokenizer_bytes=0), r"data\.tokenizer_bytes is 0, expected a positive"),
    (
        dict(step_sampling__counts=(), step_sampling__weights=(1.0,)),
        r"step_sampling\.weights has 1 entries, .* 4 counts",
    ),
    (dict(step_sampling__anneal=1.5), r"step_sampling\.anneal is 1\.5, expected a share of the updates"),
    (dict(model__prelude=-1), r"model\.prelude is -1 and model\.coda 0, expected 0 or more"),
    (dict(model__prelude=6, model__coda=6), r"model\.prelude is 6 and model\.coda 6, .* below model\.depth, 12"),
    (dict(model__prelude=1, model__groups=3), r"model\.groups is 3, which does not divide the core's depth \(11\)"),
    (dict(init__prelude=1), r"init\.prelude is 1, but init\.groups is None"),
    (dict(init__coda=-1), r"init\.coda is -1, expected 0 or more"),
    (dict(model__layer_rank=-1), r"model\.layer_rank is -1, expected 0 or more"),
    (dict(model__inner_blocks=0), r"model\.inner_blocks is 0, expected a positive"),
    (dict(init__groups=1), r"init\.groups shares the layers of init\.from_pretrained, which is empty"),
    (dict(init__merge="layer"), r"init\.merge is 'layer', but init\.groups is None"),
    (dict(init__rank=0), r"init\.rank is 0, expected a positive"),
    (dict(step_sampling__counts=(3, 0)), r"step_sampling\.counts is 0, expected a positive"),
    (dict(model__groups=2, step_sampling__counts=(3,)), r"model\.groups is 2, .*divide a count in .*counts \(3\)"),
    (
        dict(step_sampling__counts=(6, 13)),
        r"counts has 13, more than full depth, 12 steps; leave it empty for 12, 6, 4, 3",
    ),
    (dict(model__depth=8, step_sampling__counts=(3, 4, 6, 12)), r"counts has 12, more than full depth, 8 steps"),
    (dict(model__rotary_base=0.0), r"model\.rotary_base is 0\.0, expected a positive"),
    (dict(model__rotary_base=-1.0), r"model\.rotary_base is -1\.0, expected a positive"),
    (dict(model__groups=12, step_sampling__counts=()), "12 groups and a core of 12 leave no other count.*init.groups"),
    (dict(step_sampling__weights=(1.0,)), r"step_sampling\.weights has 1 entries, expected .* 4 counts"),
    (dict(step_sampling__weights=(1.0, -1.0, 1.0, 1.0)), r"step_sampling\.weights is .*non-negative"),
    (dict(step_sampling__weights=(0.0,) * 4), r"step_sampling\.weights is .*not all zero"),
    (dict(step_sampling__low=0.0), r"step_sampling\.low, high are 0\.0, 1\.5"),
    (dict(step_sampling__low=2.0), r"step_sampling\.low, high are 2\.0, 1\.5"),
    (dict(step_sampling__jitter=1.0), r"step_sampling\.jitter is 1\.0"),
    *[
        ({f"optimizer__{name}": 0.0}, rf"optimizer\.{name} is 0\.0, expected a positive number")
        for name in ("learning_rate", "clip_norm", "eps")
    ],
    *[({f"optimizer__{name}": 1.5}, rf"optimizer\.{name} is 1\.5") for name in ("b1", "b2", "final_fraction")],
    (dict(optimizer__weight_decay=-0.1), r"optimizer\.weight_decay"),
    (dict(optimizer__warmup=-1), r"optimizer\.warmup"),
    *[
        ({f"train__{name}": 0}, rf"train\.{name} is 0, expected a positive")
        for name in ("updates", "batch_size", "length", "eval_every", "checkpoint_every", "keep", "log_every")
    ],
    (dict(train__eval_batches=-1), r"train\.eval_batches is -1"),
    (dict(train__seed=2**31), r"train\.seed is 2147483648"),
    (dict(train__length=2048), r"train\.length is 2048, but model\.max_length is 1024"),
    (dict(train__eval_steps=(0,)), r"train\.eval_steps is 0"),
    (
        dict(model__groups=3, train__eval_steps=(4,), step_sampling__kind="fixed"),
        r"model\.groups is 3, which does not divide a count in train\.eval_steps \(4\)",
    ),
    (dict(mesh__data=0), r"mesh\.data is 0, expected a positive"),
]


@pytest.mark.parametrize("values, message", WRONG, ids=[" ".join(f"{k}={v}" for k, v in w.items()) for w, _ in WRONG])
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(InputError, match=message):
        edited(**values).validate()


def test_a_part_of_another_type_is_named():
    with pytest.raises(InputError, match=r"config\.model is 3 \(int\), expected ModelConfig"):
        c.Config(model=3).validate()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["learning_rate", "clip_norm", "eps", "weight_decay"])
def test_numbers_are_finite(name, value):
    with pytest.raises(InputError, match=rf"optimizer.{name} is {value}.*finite"):
        edited(**{f"optimizer__{name}": value}).validate()


def test_every_numeric_bound_is_met_by_the_nearest_divisor():
    config = c.ModelConfig(width=96, heads=7)
    with pytest.raises(InputError, match="the nearest that does is (6|8)$"):
        config.validate()
    assert c.ModelConfig(width=96, heads=8).validate()


def test_json_round_trip():
    config = edited(
        model__embed_dim=32,
        model__kind="encoder",
        step_sampling__counts=(3, 12),
        step_sampling__weights=(1.0, 2.0),
        train__eval_steps=(6, 3),
        train__seed=7,
    )
    again = c.from_json(c.to_json(config))
    assert again == config and isinstance(again.step_sampling.counts, tuple)
    assert c.from_dict(c.ModelConfig, json.loads(c.to_json(config.model))) == config.model


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"model": {"widht": 3}}', r"config\.model\.widht is not an option; did you mean 'width'\? choices: "),
        ('{"modle": {}}', r"config\.modle is not an option; did you mean 'model'"),
        ('{"model": {"width": "3"}}', r"model\.width is '3' \(str\), expected int"),
        ('{"model": {"width": null}}', r"model\.width is None \(NoneType\), expected int"),
        ('{"model": {"heads": 3}}', r"model\.heads is 3, which does not divide"),
        ("[1]", "the config is a JSON list, expected an object"),
        ("{", "the config is not JSON"),
    ],
)
def test_json_that_is_wrong_is_named(text, message):
    with pytest.raises(InputError, match=message):
        c.from_json(text)


@pytest.mark.parametrize("text", ['{"model": 3}', '{"model": [1]}', '{"model": null}'])
def test_a_part_that_is_no_object_is_named(text):
    with pytest.raises(InputError, match=r"config\.model"):
        c.from_json(text)


def changed(value):
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case tuple():
            return (*value, 1)
        case None:
            return 1


def test_fingerprint_changes_with_every_field_and_only_then():
    base = fingerprint(c.Config())
    assert base == fingerprint(c.Config()) == fingerprint(c.from_json(c.to_json(c.Config())))
    assert len(base) == 16 and set(base) <= set("0123456789abcdef")
    seen = {base}
    for part in dataclasses.fields(c.Config):
        for field in dataclasses.fields(getattr(c.Config(), part.name)):
            value = getattr(getattr(c.Config(), part.name), field.name)
            seen.add(fingerprint(c.replace(c.Config(), {f"{part.name}.{field.name}": changed(value)})))
    fields = len(list(c.options()))
    assert len(seen) == 1 + fields


def test_fingerprint_tells_parts_apart():
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint(c.ModelConfig(), 1) != fingerprint(c.ModelConfig(), 2)


def test_steps_to_evaluate_at():
    assert c.Config().eval_steps == (12, 6, 4, 3)
    assert edited(train__eval_steps=(2, 6)).eval_steps == (12, 6, 2)
    assert edited(train__eval_steps=(2, 24, 6)).eval_steps == (12, 24, 6, 2)
    assert c.default_steps(c.ModelConfig(groups=4)) == (12, 4)


def test_options_are_replaced_by_their_paths():
    config = c.Config()
    changed = c.replace(config, {"model.width": 64, "train.seed": 3, "model.heads": 2})
    assert (changed.model.width, changed.model.heads, changed.train.seed) == (64, 2, 3)
    assert config == c.Config()
    with pytest.raises(InputError, match="config has no option 'modle'; did you mean 'model'"):
        c.replace(config, {"modle.width": 3})
    with pytest.raises(InputError, match="config.model has no option 'widht'; did you mean 'width'"):
        c.replace(config, {"model.widht": 3})


def test_a_config_is_frozen_and_a_list_in_it_becomes_a_tuple():
    config = c.Config(step_sampling=c.StepSamplingConfig(counts=[3, 12]), train=c.TrainConfig(eval_steps=[6]))
    assert config.step_sampling.counts == (3, 12) and config.train.eval_steps == (6,)
    assert hash(config) == hash(c.from_json(c.to_json(config)))
    assert not c.changed_options(c.from_json(c.to_json(config)), config, frozenset())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.width = 3  # pyright: ignore


def test_a_config_of_another_version_is_read_or_named(monkeypatch):
    assert json.loads(c.to_json(c.Config()))["version"] == 2
    with pytest.raises(InputError, match="the config has version 3, but this odelm reads versions 0 to 2"):
        c.from_json('{"version": 3}')
    with pytest.raises(InputError, match="the config has version '1'"):
        c.from_json('{"version": "1"}')


def test_a_config_without_a_version_keeps_the_defaults_that_it_had(monkeypatch):
    """A later default of the schedule, the optimiser or the sampling is for new runs."""
    monkeypatch.setitem(FORMER_DEFAULTS[0], "optimizer.warmup", 77)
    monkeypatch.setitem(FORMER_DEFAULTS[0], "step_sampling.jitter", 0.5)
    old = c.from_json('{"optimizer": {"b1": 0.8}}')
    assert (old.optimizer.b1, old.optimizer.warmup, old.step_sampling.jitter) == (0.8, 77, 0.5)
    new = c.from_json('{"version": 1, "optimizer": {"b1": 0.8}}')
    assert (new.optimizer.warmup, new.step_sampling.jitter) == (c.OptimizerConfig().warmup, 0.0)


CHANGED = {"step_sampling.counts": (), "optimizer.warmup_from_zero": False}
"""The options whose defaults are not those of version 0 any more, and what they are."""


def test_the_former_defaults_are_those_of_today_but_for_those_that_changed():
    for path, value in FORMER_DEFAULTS[0].items():
        part, name = path.split(".")
        assert getattr(getattr(c.Config(), part), name) == CHANGED.get(path, value), path
    assert c.from_json("{}").step_counts == (3, 4, 6, 12)
    assert c.from_json("{}").optimizer.warmup_from_zero
    assert c.from_json('{"version": 1}').optimizer.warmup_from_zero
    assert not c.from_json('{"version": 2}').optimizer.warmup_from_zero


def test_a_run_of_an_earlier_version_keeps_its_counts_above_the_depth():
    text = '{"version": 1, "model": {"depth": 8}, "step_sampling": {"counts": [4, 12]}}'
    config = c.from_json(text)
    assert config.trained_counts == (4, 12)
    # A resumed run is saved anew, in the version of today.
    assert c.from_json(c.to_json(config)) == config
    with pytest.raises(InputError, match="counts has 12, more than full depth, 8"):
        config.validate()


def test_counts_follow_the_depth():
    for depth in (6, 12, 24):
        config = c.replace(c.Config(), {"model.depth": depth}).validate()
        assert config.step_counts[0] == depth and min(config.step_counts) <= depth // 3


def test_an_option_that_was_dropped_is_read_with_a_word(monkeypatch, capsys):
    monkeypatch.setitem(DROPPED_OPTIONS, "model.colour", "it was never used")
    config = c.from_json('{"version": 1, "model": {"colour": "red", "width": 64}}')
    assert config.model.width == 64
    assert capsys.readouterr().err == "the config has model.colour, which is no option any more: it was never used\n"
    with pytest.raises(InputError, match="colours is not an option"):
        c.from_json('{"model": {"colours": "red"}}')


def test_a_config_without_a_version_keeps_the_counts_that_were_left_to_us():
    """Of depth 10 they were exact parts; those nearest to a third and a quarter have been added since."""
    empty = '{"model": {"depth": 10}, "step_sampling": {"counts": []}}'
    assert c.from_json(empty).step_counts == (10, 5)
    assert c.from_json('{"version": 1, ' + empty[1:]).step_counts == (10, 5, 3, 2)
    assert c.from_json('{"step_sampling": {"counts": []}}').step_sampling.counts == ()
    assert c.from_json(empty.replace('"counts"', '"kind": "fixed", "counts"')).step_sampling.counts == ()


@pytest.mark.parametrize(
    "options, steps, annealed",
    [
        (dict(depth=12), (12, 6, 4, 3), (12, 9, 7, 5, 4, 3)),
        (dict(depth=12, prelude=1, coda=1), (10, 4, 2, 1), (10, 8, 6, 4, 3, 2, 1)),
        (dict(depth=12, prelude=1, groups=11), (11,), (11,)),
        (dict(depth=12, prelude=2, coda=2, groups=2), (8, 2), (8, 6, 4, 2)),
        (dict(depth=3, prelude=1, coda=1), (1,), (1,)),
    ],
)
def test_default_steps_are_those_of_the_core(options, steps, annealed):
    model = c.ModelConfig(**options).validate()
    assert c.default_steps(model) == steps
    assert c.annealed_steps(model) == annealed


def test_derived_sizes():
    model = c.ModelConfig(width=96, heads=6)
    assert (model.feedforward_size, model.embed_size, model.head_size) == (384, 96, 16)
    model = c.ModelConfig(feedforward=100, embed_dim=10)
    assert (model.feedforward_size, model.embed_size) == (100, 10)

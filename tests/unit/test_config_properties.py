"""What holds of every valid config: it is the same after JSON, and its step counts suit its depth."""

import json

from hypothesis import given
from hypothesis import strategies as st

from odelm import config as c
from odelm.files import fingerprint
from tests.random_configs import configs, stacks


@given(configs())
def test_json_gives_back_the_same_config(config):
    config.validate()
    text = c.to_json(config)
    back = c.from_json(text)
    assert back == config and c.changed_options(config, back, frozenset()) == []
    assert c.to_json(back) == text and fingerprint(json.loads(text)) == fingerprint(json.loads(c.to_json(back)))


@given(stacks(max_groups=12, max_stretch=24))
def test_default_steps_are_the_nearest_to_parts_of_the_depth(model):
    steps = c.default_steps(model)
    assert steps[0] == model.core and list(steps) == sorted(set(steps), reverse=True)
    assert all(count % model.groups == 0 and 0 < count <= model.core for count in steps)
    for part in (1, 2, 3, 4):
        wanted = model.depth / part - model.ends
        best = min(abs(count - wanted) for count in range(model.groups, model.core + 1, model.groups))
        assert min(abs(count - wanted) for count in steps) <= best + 1e-9, f"nothing near 1/{part} of the depth"


@given(stacks(max_groups=12, max_stretch=24))
def test_annealed_steps_fall_to_a_quarter_of_the_evaluations(model):
    steps = c.annealed_steps(model)
    assert steps[0] == model.core and list(steps) == sorted(set(steps), reverse=True)
    assert all(count % model.groups == 0 and 0 < count <= model.core for count in steps)
    last = steps[-1]
    assert 4 * (last + model.ends) >= model.depth, "fewer than a quarter"
    assert last == model.groups or 4 * (last - model.groups + model.ends) < model.depth, "a quarter takes fewer"
    for more, fewer in zip(steps[:-1], steps[1:], strict=True):
        # About a fifth fewer: the multiple of the groups below four fifths, or the end.
        assert fewer == last or 0.8 * more - model.groups < fewer <= 0.8 * more


@given(stacks(), st.sampled_from([True, False]))
def test_an_empty_list_of_counts_is_the_steps_of_the_depth(model, anneal):
    counts = c.StepSamplingConfig(counts=(), anneal=0.5 if anneal else 0.0).counts_of(model)
    assert counts == (c.annealed_steps(model) if anneal else c.default_steps(model))

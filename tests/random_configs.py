"""Random valid configs, for the tests that hold of every one of them."""

from hypothesis import strategies as st

from odelm import config as c

switches = st.booleans()
shares = st.floats(0.01, 0.99)
texts = st.text(max_size=20)


def maybe(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | values


@st.composite
def stacks(draw, max_groups: int = 6, max_stretch: int = 8) -> c.ModelConfig:
    """Returns a model config of any prelude, core and coda; everything else is the default."""
    groups, prelude, coda = draw(st.integers(1, max_groups)), draw(st.integers(0, 4)), draw(st.integers(0, 4))
    depth = groups * draw(st.integers(1, max_stretch)) + prelude + coda
    return c.ModelConfig(depth=depth, groups=groups, prelude=prelude, coda=coda).validate()


@st.composite
def models(draw) -> c.ModelConfig:
    stack, heads, kind = draw(stacks()), draw(st.integers(1, 8)), draw(st.sampled_from(c.KINDS))
    placement, modulated = draw(st.sampled_from(c.NORM_PLACEMENTS)), draw(switches)
    return c.ModelConfig(
        kind=kind,
        vocab_size=draw(st.integers(300, 60_000)),
        width=heads * draw(st.sampled_from([2, 16, 64])),
        heads=heads,
        kv_heads=draw(maybe(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))),
        kv_span=draw(st.integers(1, 4)),
        depth=stack.depth,
        prelude=stack.prelude,
        coda=stack.coda,
        groups=stack.groups,
        inner_blocks=draw(st.integers(1, 3)),
        layer_rank=draw(st.integers(0, 3)),
        feedforward=draw(maybe(st.integers(1, 4096))),
        embed_dim=draw(maybe(st.integers(1, 256).map(lambda half: 2 * half))),
        max_length=draw(st.integers(16, 4096)),
        norm=draw(st.sampled_from(c.NORMS)),
        norm_placement=placement,
        norm_eps=draw(st.floats(1e-12, 1e-3)),
        activation=draw(st.sampled_from(c.ACTIVATIONS)),
        positions=draw(st.sampled_from(c.POSITIONS)),
        time_modulation=modulated,
        wide_modulation=modulated and draw(switches),
        lanes=draw(st.integers(1, 3)) if placement == "pre" else 1,
        reference_depth=draw(maybe(st.integers(stack.ends + 1, 48))),
        reference_width=draw(maybe(st.integers(1, 4096))),
        token_types=draw(st.integers(0, 2)),
        sentence_order=kind == "encoder" and draw(switches),
        dropout=draw(st.floats(0, 0.99)),
        dtype=draw(st.sampled_from(c.DTYPES)),
    )


@st.composite
def samplings(draw, model: c.ModelConfig) -> c.StepSamplingConfig:
    counts = st.integers(1, model.core // model.groups).map(lambda each: each * model.groups)
    # Where unit steps are the only count that the depth offers, random ones have to be named.
    least = 1 if model.core == model.groups else 0
    chosen = tuple(draw(st.lists(counts, min_size=least, max_size=4, unique=True)))
    weighted = chosen and draw(switches)
    weights = draw(st.lists(st.floats(0, 5), min_size=len(chosen) - 1, max_size=len(chosen) - 1)) if weighted else []
    anneal = draw(st.floats(0, 1))
    return c.StepSamplingConfig(
        kind=draw(st.sampled_from(c.SAMPLINGS)),
        counts=chosen,
        weights=(1.0, *weights) if weighted else (),
        low=draw(st.floats(0.1, 1)),
        high=draw(st.floats(1, 10)),
        jitter=draw(st.floats(0, 0.9)),
        anneal=anneal,
        fine_last=draw(st.floats(0, 1)) * (1 - anneal),
    )


@st.composite
def data(draw, model: c.ModelConfig) -> c.DataConfig:
    corpus = draw(st.sampled_from([*c.CORPORA, "tfds:wiki40b/en"]))
    parts = (
        draw(st.lists(st.text(min_size=1, max_size=8), max_size=4, unique=True)) if corpus in ("text", "pile") else []
    )
    cut = draw(st.integers(0, len(parts)))
    components, exclude = tuple(parts[:cut]), tuple(parts[cut:])
    return c.DataConfig(
        corpus=corpus,
        source=draw(st.text(min_size=1, max_size=20)),
        components=components,
        exclude=exclude,
        on_bad_record=draw(st.sampled_from(c.ON_BAD_RECORD)),
        vocab_size=draw(maybe(st.integers(1, model.vocab_size))),
        valid_fraction=draw(shares),
        packing=draw(st.sampled_from(("auto", "documents") if model.sentence_order else c.PACKINGS)),
        mask_rate=draw(shares),
        mask_unit=draw(st.sampled_from(c.MASK_UNITS)),
        tokenizer=draw(texts),
        workers=draw(st.integers(0, 4)),
    )


@st.composite
def configs(draw) -> c.Config:
    """Returns a valid config with every part of it drawn."""
    model = draw(models())
    grouped = draw(switches)
    evaluated = st.integers(1, model.core // model.groups).map(lambda each: each * model.groups)
    return c.Config(
        model=model,
        data=draw(data(model)),
        step_sampling=draw(samplings(model)),
        optimizer=c.OptimizerConfig(
            learning_rate=draw(st.floats(1e-9, 1)),
            warmup=draw(st.integers(0, 1000)),
            decay=draw(st.sampled_from(c.DECAYS)),
            final_fraction=draw(st.floats(0, 0.99)),
        ),
        train=c.TrainConfig(
            updates=draw(st.integers(1, 10**6)),
            length=draw(st.integers(1, model.max_length)),
            eval_steps=tuple(draw(st.lists(evaluated, max_size=3))),
            seed=draw(st.integers(0, 2**31 - 1)),
            unroll=draw(switches),
            remat=draw(maybe(st.sampled_from(c.REMAT_POLICIES))),
        ),
        mesh=c.MeshConfig(data=draw(st.just(-1) | st.integers(1, 8))),
        init=c.InitConfig(
            from_pretrained=draw(st.text(min_size=1, max_size=20)),
            groups=draw(st.integers(1, 4)),
            prelude=draw(maybe(st.integers(0, 4))),
            merge=draw(st.sampled_from(c.MERGES)),
            layer=draw(st.integers(-3, 3)),
        )
        if grouped
        else c.InitConfig(from_pretrained=draw(texts)),
    )  # fmt: skip

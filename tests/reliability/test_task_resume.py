"""A fine-tuning that was interrupted ends where the uninterrupted one does, to the bit, wherever it started from."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

import odelm
from odelm import interop
from odelm.config import replace
from odelm.data.examples import read_task_data
from odelm.errors import InputError
from odelm.models.parameters import parameters
from odelm.tokenizer import SPECIAL_TOKENS
from odelm.train import log
from odelm.train.run import train
from tests.calls import compiled
from tests.conftest import randomised
from tests.small_task import write_rte

UPDATES, STOP = 6, 3
ALBERT = odelm.ModelConfig(
    kind="encoder", vocab_size=64, width=16, heads=2, depth=4, embed_dim=8, max_length=16, norm="layernorm",
    norm_placement="post", embed_norm=True, positions="learned", qk_norm=False, bias=True, token_types=2,
    time_modulation=False, sentence_order=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Returns a folder with a task in `glue` and a Hugging Face folder in `albert`."""
    folder = tmp_path_factory.mktemp("base")
    write_rte(folder / "glue")
    words = {name: i for i, name in enumerate([*SPECIAL_TOKENS, "and", *(f"word{i}" for i in range(41)), "?"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    interop.export(randomised(odelm.create(ALBERT, rngs=nnx.Rngs(0))), folder / "albert", tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def config(base) -> odelm.Config:
    return odelm.Config(
        model=odelm.ModelConfig(dropout=0.1),
        data=odelm.DataConfig(task="rte", source=str(base / "glue")),
        init=odelm.InitConfig(from_pretrained=str(base / "albert")),
        step_sampling=odelm.StepSamplingConfig(counts=(2, 4)),
        train=odelm.TrainConfig(
            updates=UPDATES, batch_size=4, length=12, eval_every=STOP, eval_batches=0, eval_steps=(2,),
            checkpoint_every=4, log_every=1, unroll=False,
        ),
    )  # fmt: skip


def records(workdir: Path) -> list[dict]:
    """Returns what a run recorded, but for the times that it took."""
    found = [json.loads(line) for line in (workdir / log.METRICS).read_text().splitlines()]
    return [{name: x for name, x in record.items() if name not in ("tokens_per_s", "data_wait")} for record in found]


@pytest.mark.thorough
@pytest.mark.usefixtures("traced_once")
def test_an_interrupted_fine_tuning_resumes_to_the_bit(config, base, tmp_path, monkeypatch):
    whole = train(config, tmp_path / "whole")
    original = log.Log.training

    def interrupt_at_stop(self, step, metrics):
        original(self, step, metrics)
        if step == STOP:
            os.kill(os.getpid(), signal.SIGTERM)

    source = shutil.copytree(base / "albert", tmp_path / "albert")
    config = replace(config, {"init.from_pretrained": str(source)})
    with monkeypatch.context() as patch:
        patch.setattr(log.Log, "training", interrupt_at_stop)
        stopped = train(config, tmp_path / "run")
    assert stopped.interrupted and stopped.step == STOP
    shutil.rmtree(source)
    resumed = train(config, tmp_path / "run")
    assert resumed.losses == whole.losses and set(whole.losses) == {4, 2}
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    (one, _, _), (other, loaded, tokenizer) = (odelm.load(tmp_path / name) for name in ("whole", "run"))
    assert isinstance(one, odelm.Classifier) and tokenizer is not None
    for name, array in parameters(one).items():
        np.testing.assert_array_equal(array, parameters(other)[name], err_msg=name)

    *_, last = (record for record in records(tmp_path / "whole") if "eval_metrics" in record)
    assert last["eval_examples"] == 10 and last["eval_majority"] == {"accuracy": 0.6}
    # What is loaded gives what was recorded.
    held_out = read_task_data(loaded, tokenizer_file=tmp_path / "run" / "tokenizer.json").held_out()
    (batch,) = held_out.batches(10)
    inputs = {name: batch[name] for name in ("tokens", "mask", "token_types")}
    for steps in (4, 2):
        logits = np.asarray(compiled(other)(**inputs, steps=steps))
        assert logits.shape == (10, 2) and logits.dtype == np.float32
        assert held_out.scores(logits) == last["eval_metrics"][str(steps)]


@pytest.mark.thorough
def test_the_task_and_the_examples_of_a_run_stay_what_they_were(config, tmp_path):
    config = replace(config, {"data.source": str(write_rte(tmp_path / "glue")), "step_sampling.kind": "fixed"})
    config = replace(config, {"train.updates": 1, "model.dropout": 0.0, "train.eval_steps": (4,)})
    train(config, tmp_path / "run")
    with pytest.raises(InputError, match="data.task: 'rte' -> 'wnli'"):
        train(replace(config, {"data.task": "wnli"}), tmp_path / "run")
    write_rte(tmp_path / "glue", train=25)
    with pytest.raises(InputError, match="the text of task 'rte' has changed since the run"):
        train(replace(config, {"train.updates": 2}), tmp_path / "run")

"""The loss computes with the weights that it is given, and leaves the model's own alone."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_hla import losses
from mlx_hla.losses import Scorer, lent, token_losses
from mlx_hla.models import LanguageModel, ModelConfig
from mlx_hla.train import TrainConfig, step

CONFIG = {"vocab_size": 40, "dims": 16, "num_layers": 2, "num_heads": 2, "hidden_dims": 24, "context": 16}
compiling = pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiled"])
operators = pytest.mark.parametrize("operator", ["hla2", "softmax"])


def build(operator="hla2"):
    return LanguageModel(ModelConfig(**CONFIG, operator=operator), seed=2)


def tokens(rows=2):
    return mx.random.randint(0, 40, (rows, 17), key=mx.random.key(1))


def same_weights(model, before):
    now, before = dict(tree_flatten(model.parameters())), dict(tree_flatten(before))
    return now.keys() == before.keys() and all(mx.array_equal(now[n], before[n]) for n in now)


def compile_here(function, *, shapeless=False):
    return mx.compile(function, shapeless=shapeless)


@compiling
@operators
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_a_training_step_leaves_the_model_alone(
    monkeypatch, compiling, operator, accumulate, checkpoint_blocks
):
    if compiling:
        monkeypatch.setattr(step, "compiled", compile_here)
    model = build(operator)
    before, logits = copy.deepcopy(model.parameters()), model(tokens())
    trainer = step.Trainer(
        model, TrainConfig(accumulate=accumulate, checkpoint_blocks=checkpoint_blocks, lr=0.1, warmup=0)
    )
    for n in range(2):
        trainer.step(n, [tokens()] * accumulate)
    assert same_weights(model, before)
    assert mx.array_equal(model(tokens()), logits)
    assert not mx.array_equal(trainer.params["embedding"]["weight"], before["embedding"]["weight"])
    model.update(trainer.params)
    assert not mx.array_equal(model(tokens()), logits)


@compiling
def test_scoring_leaves_the_model_alone(monkeypatch, compiling):
    if compiling:
        monkeypatch.setattr(losses, "compiled", compile_here)
    model = build()
    before = copy.deepcopy(model.parameters())
    stream, sizes = tokens().reshape(-1), mx.ones((40,))
    options = {"batch_size": 2, "context": 16}
    params = tree_map(lambda a: a * 2, model.parameters())
    scorer = Scorer(model, np.array(stream), np.array(sizes), dtype=mx.bfloat16, **options)
    doubled = scorer(params)
    assert same_weights(model, before)
    assert all(a.dtype == mx.float32 for _, a in tree_flatten(model.parameters()))
    assert scorer(model.parameters()) != doubled


def test_weights_are_given_back_when_something_fails():
    model = build()
    before = copy.deepcopy(model.parameters())
    params = tree_map(lambda a: a + 1, model.parameters())
    with pytest.raises(ValueError, match="tokens must be"):
        token_losses(model, params, mx.zeros((2, 1), mx.int32))
    assert same_weights(model, before)

    def interrupted():
        with lent(model, params):
            assert not same_weights(model, before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert same_weights(model, before)
    with pytest.raises(ValueError, match="surprise"), lent(model, {**params, "surprise": mx.zeros(3)}):
        pass
    assert same_weights(model, before)

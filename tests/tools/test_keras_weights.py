"""Weights come from a Keras layer and go back to one unchanged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support.oracle import assert_close
from syncbn import SyncBatchNorm, SyncBatchNormalization

pytestmark = pytest.mark.world_size(1)


def keras_weights(center=True, scale=True):
    names = ["gamma"] * scale + ["beta"] * center + ["moving_mean", "moving_variance"]
    return {name: np.random.default_rng(i).random(3, dtype=np.float32) + 0.5 for i, name in enumerate(names)}


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("form", ["dict", "list", "names of a saved model"])
def test_weights_from_keras_and_back(form, center, scale):
    weights = keras_weights(center, scale)
    given = {
        "dict": weights,
        "list": list(weights.values()),
        "names of a saved model": {f"bn_1/{k}:0": v for k, v in weights.items()},
    }[form]
    torchs = SyncBatchNorm.from_keras(given, 0.9, 1e-2, center=center, scale=scale)
    keras = SyncBatchNormalization.from_keras(given, 0.9, 1e-2, center=center, scale=scale, axis=1)
    for layer in (torchs, keras):
        back = layer.to_keras()
        assert list(back) == list(weights)
        for name, array in weights.items():
            assert np.array_equal(back[name], array) and back[name].dtype == array.dtype
    assert torchs.momentum == pytest.approx(0.1) and torchs.eps == keras.epsilon == 1e-2 and keras.momentum == 0.9
    x = torch.randn(4, 3, 5)
    for mode in (False, True, False):  # first with the given statistics, finally with those of one more training step
        assert_close(torchs.train(mode)(x), keras.train(mode)(x).double().detach(), 2e-6, "y")
    assert_close(torchs.running_var, keras.moving_variance.double(), 1e-7, "running_var")


def test_wrong_keras_weights_are_an_error():
    weights = keras_weights()
    with pytest.raises(ValueError, match=r"weights must be .* for center=False and scale=True, got 4 arrays"):
        SyncBatchNorm.from_keras(list(weights.values()), center=False)
    with pytest.raises(ValueError, match="must have moving_mean and moving_variance"):
        SyncBatchNorm.from_keras({"gamma": weights["gamma"]})
    with pytest.raises(ValueError, match=r"may have gamma and beta, each once, got \['bn/moving_mean:0'"):
        SyncBatchNorm.from_keras({f"{layer}/{name}:0": array for name, array in list(weights.items())[2:] for layer in ("bn", "bn_1")})
    with pytest.raises(ValueError, match=r"gamma must be \[C\] like moving_mean \[3\], got \[2\]"):
        SyncBatchNorm.from_keras(weights | {"gamma": np.ones(2)})
    with pytest.raises(ValueError, match="need running statistics"):
        SyncBatchNorm(3, track_running_stats=False).to_keras()
    with pytest.raises(ValueError, match="need running statistics"):
        SyncBatchNormalization().to_keras()

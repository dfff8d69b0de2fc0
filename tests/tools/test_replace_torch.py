"""With torch's class replaced, whatever refers to it gets this package's layer, and restoring gives all of it back."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support.installed import entry_point
from support.oracle import assert_close
from support.processes import run, torchrun
from syncbn import SyncBatchNorm, freeze_bn, replace_torch, restore_torch, unfreeze_bn
from syncbn.check import AUTOLOAD

EARLY = nn.SyncBatchNorm  # bound before any replacement


class Subclass(nn.SyncBatchNorm):
    """A subclass with an activation, as timm has."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-3)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class OldCall(nn.SyncBatchNorm):
    def forward(self, x):
        return nn.SyncBatchNorm.forward(self, x)


@pytest.fixture
def replaced():
    replace_torch()
    yield
    restore_torch()


def convert(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


LAYERS = {
    "by its name": lambda: nn.SyncBatchNorm(4),
    "by a name that was bound before": lambda: EARLY(4),
    "by torch's converter": lambda: convert(nn.BatchNorm2d(4)),
    "by that of a subclass": lambda: Subclass.convert_sync_batchnorm(nn.BatchNorm2d(4)),
    "a subclass": lambda: Subclass(4),
    "a subclass that names the base's method": lambda: OldCall(4),
    "a copy": lambda: copy.deepcopy(nn.SyncBatchNorm(4)),
    "unpickled": lambda: pickle.loads(pickle.dumps(nn.SyncBatchNorm(4))),
    "frozen and unfrozen": lambda: unfreeze_bn(freeze_bn(nn.SyncBatchNorm(4))),
    "reverted by this package": lambda: syncbn.revert_sync_batchnorm(nn.SyncBatchNorm(4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_way_to_torchs_class_gives_a_layer_that_synchronizes(world, replaced, name):
    layer = LAYERS[name]().double()
    layer.process_group = world.group
    assert isinstance(layer, SyncBatchNorm) and isinstance(layer, nn.SyncBatchNorm) and isinstance(layer, EARLY)
    whole = torch.randn(4 * world.size, 4, 3, 3, dtype=torch.float64) + 1
    y = layer(world.mine(whole, (4,) * world.size))
    want = nn.functional.batch_norm(whole, None, None, training=True, eps=layer.eps)
    want = want.relu() if isinstance(layer, Subclass) else want
    assert_close(y, world.mine(want, (4,) * world.size), 1e-9, "y")


@pytest.mark.process_group
def test_data_parallel_accepts_the_layers_on_the_cpu_only_while_torch_is_replaced(world):
    replace_torch()
    try:
        model = convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
        DistributedDataParallel(model)(torch.randn(5, 3)).sum().backward()
    finally:
        restore_torch()
    with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
        DistributedDataParallel(nn.SyncBatchNorm(4))


def fingerprint():
    classes = nn.SyncBatchNorm, DistributedDataParallel
    return [(cls, cls.__bases__, dict(vars(cls))) for cls in classes]


@pytest.mark.world_size(1)
def test_restoring_restores_everything_and_both_may_be_repeated():
    before = fingerprint()
    restore_torch()
    assert fingerprint() == before
    replace_torch()
    during = fingerprint()
    assert during != before
    replace_torch()
    assert fingerprint() == during
    layer = nn.SyncBatchNorm(4)
    restore_torch()
    assert fingerprint() == before
    assert not isinstance(layer, SyncBatchNorm) and type(layer) is nn.SyncBatchNorm and layer(torch.randn(5, 4)).shape == (5, 4)


@pytest.mark.world_size(1)
def test_a_pickle_made_while_replaced_needs_no_syncbn(replaced, tmp_path):
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model(torch.randn(5, 3, 4, 4))
    x = torch.randn(5, 3, 4, 4)
    torch.save((model.eval(), x, model(x)), tmp_path / "model.pt")
    code = f"""
import sys, torch
model, x, y = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
assert "syncbn" not in sys.modules and type(model[1]) is torch.nn.SyncBatchNorm
assert torch.allclose(model(x), y, atol=1e-6)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


@pytest.mark.world_size(1)
def test_torchs_converter_names_the_layers_and_keeps_what_is_ours(replaced):
    ours = SyncBatchNorm(4, activation="relu")
    frozen = freeze_bn(nn.BatchNorm1d(4), parameters=True)
    model = convert(nn.ModuleDict({"a": nn.Sequential(nn.BatchNorm1d(4)), "b": ours, "c": frozen}))
    assert [m.layer_name for m in (model["a"][0], model["b"], model["c"])] == ["a.0", "b", "c"]
    assert model["b"] is ours and ours.activation == "relu"
    model.train()
    assert isinstance(model["c"], nn.SyncBatchNorm) and not model["c"].training
    assert unfreeze_bn(model)["c"].training and model["c"].weight.requires_grad


@pytest.mark.world_size(1)
def test_conversion_and_its_reversal_leave_replaced_layers_as_they_are(replaced):
    model = nn.Sequential(nn.SyncBatchNorm(4), nn.ReLU())
    for change in (lambda: syncbn.convert_sync_batchnorm(model, fuse_activation=True), lambda: syncbn.revert_sync_batchnorm(model)):
        change()
        assert [type(m) for m in model] == [nn.SyncBatchNorm, nn.ReLU] and model[0].activation is None


@pytest.mark.world_size(1)
def test_an_activation_after_a_replaced_layer_is_there_without_the_replacement(replaced):
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.SyncBatchNorm(3), nn.ReLU()), fuse_activation=True).eval()
    x = -torch.rand(4, 3, 5)
    y = model(x)
    restore_torch()
    assert torch.equal(model(x), y)


def test_another_converter_may_not_drop_an_activation(replaced):
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), fuse_activation=True)

    def theirs(module):
        made = nn.SyncBatchNorm(4)
        made.weight, made.running_mean = module.weight, module.running_mean
        return made, list(module.named_children())

    with pytest.raises(RuntimeError, match="has no activation='relu'"):
        theirs(model[0])


# ---- The environment variable ----------------------------------------------------------------------------------------------------


STATE = """
import sys, torch
print("syncbn" in sys.modules, any("syncbn" in base.__module__ for base in torch.nn.SyncBatchNorm.__bases__))
"""


@pytest.mark.world_size(1)
@pytest.mark.parametrize(
    "value, first, state",
    [
        (None, "", "False False"),
        ("", "", "False False"),
        ("0", "", "False False"),
        ("1", "", "True True"),
        ("1", "import syncbn", "True True"),
    ],
)
def test_import_torch_replaces_only_if_the_variable_is_set(installed, value, first, state):
    env = installed if value is None else installed | {"SYNCBN_REPLACE_TORCH": value}
    done = subprocess.run([sys.executable, "-c", first + STATE], env=env, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.strip() == state
    assert done.stderr == (
        "syncbn: SYNCBN_REPLACE_TORCH=1 makes torch.nn.SyncBatchNorm the layer of this package\n" if value == "1" else ""
    )


@pytest.mark.world_size(1)
def test_a_value_that_is_not_allowed_fails_at_import_torch(installed):
    env = installed | {"SYNCBN_REPLACE_TORCH": "yes"}
    done = subprocess.run([sys.executable, "-c", "import torch"], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "environment variable SYNCBN_REPLACE_TORCH is 'yes': it must be 0 or 1" in done.stderr


@pytest.mark.world_size(1)
def test_one_line_of_a_job_says_that_torch_is_replaced(installed, tmp_path):
    (tmp_path / "script.py").write_text("import subprocess, sys, torch; subprocess.run([sys.executable, '-c', 'import torch'], check=True)")
    for command in (torchrun(), ["mpirun", "-n", "2", sys.executable]):
        done = run([*command, str(tmp_path / "script.py")], env=installed | {"SYNCBN_REPLACE_TORCH": "1"}, timeout=100)
        assert done.returncode == 0 and done.stderr.count("SYNCBN_REPLACE_TORCH=1 makes") == 1, done.stderr


@pytest.mark.world_size(2)
@pytest.mark.process_group
def test_ranks_of_which_only_some_have_replaced_torch_learn_it_at_the_first_exchange(world):
    group = syncbn.new_group(world.size)
    if world.rank == 1:
        replace_torch()
    try:
        with pytest.raises(syncbn.RankMismatchError, match=r"rank 1: .*torch.nn.SyncBatchNorm is replaced"):
            SyncBatchNorm(4, process_group=group)(torch.randn(5, 4))
    finally:
        restore_torch()


@pytest.mark.world_size(1)
def test_check_reports_the_replacement_and_what_turns_it_off(installed):
    env = installed | {"SYNCBN_REPLACE_TORCH": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = run([sys.executable, "-m", "syncbn.check"], env=env, timeout=100)
    assert done.returncode == 0 and "torch.nn SyncBatchNorm is this package's layer" in done.stdout, done.stdout + done.stderr
    assert "problem: TORCH_DEVICE_BACKEND_AUTOLOAD=0 makes torch ignore SYNCBN_REPLACE_TORCH=1" in done.stdout
    assert "reinstall it" not in done.stdout
    plain = run([sys.executable, "-m", "syncbn.check"], env=installed, timeout=100)
    assert "torch.nn SyncBatchNorm is torch's layer" in plain.stdout and "TORCH_DEVICE" not in plain.stdout


@pytest.mark.world_size(1)
def test_the_entry_point_is_the_one_that_check_looks_for():
    assert entry_point() == AUTOLOAD
    module, _, function = AUTOLOAD.partition(":")
    assert callable(getattr(importlib.import_module(module), function))

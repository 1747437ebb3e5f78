"""One process on four chips: split weights and batches, the losses of one chip, one compilation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xla
ROOT = Path(__file__).parent.parent.parent
NUM_CHIPS, STEPS, WARM_UP = 4, 6, 2
LOOP = f"""
losses, compiled = [], 0
for step in range({STEPS}):
    torch_xla.sync()
    before = happened("CompileTime")
    loss, _ = trainer.step([part], 1.0)
    losses.append(float(loss))
    if step >= {WARM_UP}:
        compiled += happened("CompileTime") - before
"""
# Trains a student for some steps; prints losses, what was compiled after those that warm up, how
# weights and batches lie, and what is read back of a weight.
RUNNER = f"""
import json, sys
import torch
from pathlib import Path
import torch_xla
from qat.distill.teacher import top_k_signal
from qat.model.surgery import quantized_layers
from qat.runtime.device import Device, lay_out, num_chips
from qat.train.config import TrainConfig
from qat.train.run_folder import make_trainer
from qat.train.step import Batch
from tests.tiny import tiny_llama, tiny_student
from tests.xla.counters import happened

device = Device.detect("xla")
there = device.torch_device
folders = {{name: Path("/") for name in ("checkpoint", "cache_dir", "output_dir")}}
config = TrainConfig(**folders, trainable=("weights", "scales", "norms"), layers="all")
student = tiny_student()
device.place(student)
settings = {{"weight_of": lambda _name: None, "sync": device.sync}}
trainer = make_trainer(config, student, torch.float32, **settings)

def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(261, (8, 16), generator=generator)
    mask = torch.rand(8, 15, generator=generator) < 0.7
    signal = top_k_signal(tiny_llama()(token_ids).logits[:, :-1], mask, 8)
    made = Batch.of(lay_out(token_ids.to(there), split=True), signal.to(there))
    lay_out(made.mask, split=True)
    return made

part = batch(0)
{LOOP}layer = next(iter(quantized_layers(student).values()))
spec = torch_xla._XLAC._get_xla_sharding_spec(layer.latent_weight)
print(json.dumps([num_chips(there), losses, compiled, spec, layer.latent_weight.sum().item()]))
"""


# The same of a dense model that pretrains.
DENSE_RUNNER = f"""
import json
import torch
from pathlib import Path
import torch_xla
from functools import partial
from qat.distill.teacher import text_signal
from qat.runtime.device import Device, lay_out, num_chips
from qat.train.dense_config import DenseOptimConfig
from qat.train.pretrain_config import PretrainConfig
from qat.train.pretraining import make_pretrainer
from qat.train.step import Batch
from tests.tiny import tiny_llama
from tests.xla.counters import happened

device = Device.detect("xla")
there = device.torch_device
optim = DenseOptimConfig(lr=1e-3)
config = PretrainConfig(data_dir=Path("/"), output_dir=Path("/"), optim=optim)
model = tiny_llama().float().train()
device.place(model)
trainer = make_pretrainer(config, model, torch.float32, sync=device.sync)
generator = torch.Generator().manual_seed(0)
ids = lay_out(torch.randint(261, (8, 16), generator=generator).to(there), split=True)
mask = lay_out((torch.rand(8, 15, generator=generator) < 0.7).to(there), split=True)
part = Batch(
    token_ids=ids, mask=mask, document_ids=None, unpack=partial(text_signal, ids, mask),
    num_sequences=8,
)
{LOOP}weight = model.model.layers[0].mlp.up_proj.weight
specs = [torch_xla._XLAC._get_xla_sharding_spec(x) for x in
         (weight, trainer.optimizer.state[weight]["exp_avg"])]
total = weight.sum().item()
print(json.dumps([num_chips(there), losses, compiled, " ".join(specs), total]))
"""

# Splits parameters that the device still computes, many times: how long it takes varies.
RACE_RUNNER = """
import json
import torch
from qat.model.sharding import spread_dense_rows
from qat.runtime.device import Device, run_recorded
from tests.tiny import tiny_llama

device = Device.detect("xla")
model = tiny_llama().float()
device.place(model)
start = [parameter.data for parameter in model.parameters()]
for attempt in range(40):
    for parameter, values in zip(model.parameters(), start):
        parameter.data = values * (attempt + 1.0)
    run_recorded(device.torch_device)
    spread_dense_rows(model)
print(json.dumps(attempt))
"""


def train_on(count, runner):
    """Return what a runner prints on so many chips."""
    done = subprocess.run(
        [sys.executable, "-c", runner],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PJRT_DEVICE": "CPU",
            "CPU_NUM_DEVICES": str(count),
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("runner", [RUNNER, DENSE_RUNNER], ids=["student", "dense"])
def test_four_chips_train_as_one_does(runner):
    """Losses within 1e-5, weights split by rows, and no compilation after the first steps."""
    chips, alone, _, whole, total = train_on(1, runner)
    assert (chips, whole.strip()) == (1, "")
    chips, losses, compiled, split, other = train_on(NUM_CHIPS, runner)
    assert chips == NUM_CHIPS
    assert losses == pytest.approx(alone, abs=1e-5, rel=0)
    assert losses[-1] < losses[0]
    assert compiled == 0
    assert f"devices=[{NUM_CHIPS},1]" in split
    assert other == pytest.approx(total, rel=1e-4)


def test_rows_are_split_while_the_device_computes_them():
    """Each attempt waits for the values; without, some attempt ends with an error."""
    assert train_on(NUM_CHIPS, RACE_RUNNER) == 39

"""Training in several processes gives what one process gives."""
import os, subprocess, sys
from pathlib import Path

import pytest


def train(folder):
    "A short run of two players; every process starts from other weights, and those of the first must win"
    import torch
    from torch import nn
    from audiorepro.training import TrainConfig, fit, tensor_batches
    torch.set_num_threads(1)
    torch.manual_seed(int(os.environ.get('RANK', 0)))
    model, rival = nn.Linear(4, 4), nn.Linear(4, 1)
    data = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    def loss_fn(model, batch, ctx): return dict(loss=(model(batch['x']) - batch['x']).square().mean())
    def rival_loss_fn(rival, batch, ctx): return dict(loss=rival(batch['x']).square().mean())
    cfg = TrainConfig(steps=20, lr=1e-2, ema_decay=.9, log_every=5, save_every=10)
    fit(model, loss_fn, tensor_batches(dict(x=data), 16), cfg, rival=(rival, rival_loss_fn), folder=folder, progress=False)


def test_two_processes_equal_one(tmp_path):
    import torch
    from safetensors.torch import load_file
    if not torch.distributed.is_available(): pytest.skip('this torch has no torch.distributed')
    env = os.environ | dict(OMP_NUM_THREADS='1')
    two = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    for name, launcher in (('one', []), ('two', two)):
        command = [sys.executable, *launcher, __file__, str(tmp_path/name)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
    one, several = (load_file(tmp_path/name/'step-00000020'/'state.safetensors') for name in ('one', 'two'))
    assert one.keys() == several.keys()
    for k in one: torch.testing.assert_close(one[k], several[k], atol=1e-6, rtol=1e-5, msg=lambda m, k=k: f'{k}: {m}')


if __name__ == '__main__': train(Path(sys.argv[1]))

"""How the released checkpoints lay out their files, written here from the published tables of names, independently of the key
maps under test; and how two results are compared.
"""
import re
from argparse import Namespace

import numpy as np
import torch

from audiorepro.core import make_generator
from standins import shake


def randn(*shape, seed=0): return torch.randn(*shape, generator=make_generator(seed), dtype=torch.float64)


def randomise(module, seed=0):
    "`shake` from a seed of its own"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return shake(module)


def save_pth(path, state, key='state_dict'):
    "As training scripts save: beside the tensors lie numbers, arguments and other things"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: state, 'epoch': np.int64(3), 'best': np.float32(.5), 'args': Namespace(lr=1e-4, blr=np.float64(.1)),
                'optimizer': {'param_groups': [{'lr': .1}]}}, path)
    return path


def below(prefix, state): return {f'{prefix}.{k}': x for k, x in state.items()}


def official_vae(state, levels):
    "diffusers' names -> those of the released autoencoder"
    def name(key):
        key = re.sub(r'up_blocks\.(\d)', lambda m: f'up.{levels - 1 - int(m[1])}', key)
        for a, b in (('down_blocks', 'down'), ('resnets', 'block'), ('downsamplers.0', 'downsample'), ('upsamplers.0', 'upsample'),
                     ('conv_norm_out', 'norm_out'), ('conv_shortcut', 'nin_shortcut'), ('mid_block.block.0', 'mid.block_1'),
                     ('mid_block.block.1', 'mid.block_2'), ('mid_block.attentions.0', 'mid.attn_1'), ('group_norm', 'norm'),
                     ('to_out.0', 'proj_out'), ('.to_', '.')): key = key.replace(a, b)
        return key
    return {name(k): x[..., None, None] if re.search(r'\.to_\w+(\.0)?\.weight$', k) else x for k, x in state.items()}


def official_t_unet(state, sites, blocks=3):
    "diffusers' names -> those of the released U-Net, `sites` transformers a site and `blocks` numbers a level"
    inside = dict(norm1='in_layers.0', conv1='in_layers.2', time_emb_proj='emb_layers.1', norm2='out_layers.0', conv2='out_layers.3',
                  conv_shortcut='skip_connection')
    fixed = {'time_embedding.linear_1': 'time_embed.0', 'time_embedding.linear_2': 'time_embed.2', 'conv_in': 'input_blocks.0.0',
             'conv_norm_out': 'out.0', 'conv_out': 'out.2'}
    def name(key):
        for a, b in fixed.items():
            if key.startswith(a + '.'): return b + key.removeprefix(a)
        kind, key = key.split('.', 1)
        level, part, i, rest = ('0.' + key if kind == 'mid_block' else key).split('.', 3)
        level, i = int(level), int(i)
        if part == 'resnets': rest = re.sub(r'^\w+', lambda m: inside[m[0]], rest)
        if kind == 'mid_block': return f"middle_block.{1 + i if part == 'attentions' else i*(sites + 1)}.{rest}"
        start, word = (1 + blocks*level, 'input_blocks') if kind == 'down_blocks' else (blocks*level, 'output_blocks')
        if part == 'resnets': return f'{word}.{start + i}.0.{rest}'
        if part == 'attentions': return f'{word}.{start + i//sites}.{1 + i % sites}.{rest}'
        last = rest.removeprefix('conv.')
        return f'{word}.{start + blocks - 1}.0.op.{last}' if part == 'downsamplers' else f'{word}.{start + blocks - 1}.{sites + 1}.conv.{last}'
    return {name(k): x for k, x in state.items()}


def averaged(state):
    "Names of a running average: `model_ema.` and no dots"
    return {f"model_ema.{k.removeprefix('model.').replace('.', '')}": x for k, x in state.items()} | {'model_ema.decay': torch.tensor(.9999)}


def official_positions(width, frames, bands):
    """AudioMAE's table (`get_2d_sincos_pos_embed_flexible` of util/pos_embed.py), an empty row for CLS first. Its grid is `patch_hw` of
    `PatchEmbed_org`, which is (bands, frames), while the patches lie in rows of `bands`."""
    waves = [10_000.**(-4*i/width) for i in range(width//4)]
    def entry(n): return [x for place in (n % frames, n//frames) for f in (np.sin, np.cos) for x in f(place*np.array(waves))]
    return torch.tensor(np.array([[0.]*width] + [entry(n) for n in range(frames*bands)]), dtype=torch.float32)[None]


def official_windows(width, heads, blocks=16, meta=384):
    "AudioMAE's decoder as released (timm_patch/swin_transformer.py; `decoder_mode 1` of submit_pretrain_audioset2M.sh): no other tensor"
    lines = dict(qkv=(width, 3*width), proj=(width, width), fc1=(width, 4*width), fc2=(4*width, width))
    def line(name, i, o): return {f'{name}.weight': torch.randn(o, i), f'{name}.bias': torch.randn(o)}
    def block():
        found = {'attn.tau': torch.ones(heads)} | line('attn.meta_mlp.fc1', 2, meta) | line('attn.meta_mlp.fc2', meta, heads)
        for k in ('qkv', 'proj'): found |= line(f'attn.{k}', *lines[k])
        for k in ('fc1', 'fc2'): found |= line(f'mlp.{k}', *lines[k])
        return found | {f'norm{i}.{k}': torch.randn(width) for i in (1, 2) for k in ('weight', 'bias')}
    return {k: x for i in range(blocks) for k, x in below(f'decoder_blocks.{i}', block()).items()}


def error(a, b):
    assert a.shape == b.shape
    return float((a.detach() - b.detach()).abs().max()/b.detach().abs().max())


def laion(model):
    "transformers' names -> those of laion_clap, with its extra layers"
    state, found = model.state_dict(), {}
    for k, x in state.items():
        if k.startswith('audio_model'):
            if '.attention.self.key' in k or '.attention.self.value' in k: continue
            if '.attention.self.query' in k: x = torch.cat([state[k.replace('query', n)] for n in ('query', 'key', 'value')])
            for a, b in (('audio_model.audio_encoder', 'audio_branch'), ('attention.self.query', 'attn.qkv'), ('attention.output.dense', 'attn.proj'),
                         ('attention.self', 'attn'), ('intermediate.dense', 'mlp.fc1'), ('output.dense', 'mlp.fc2'), ('batch_norm', 'bn0'),
                         ('layernorm_before', 'norm1'), ('layernorm_after', 'norm2')): k = k.replace(a, b)
        k = k.replace('text_model', 'text_branch').replace('_projection.linear1', '_projection.0').replace('_projection.linear2', '_projection.2')
        if not k.endswith('token_type_ids'): found[k] = x
    extra = ('audio_branch.spectrogram_extractor.stft.conv_real.weight', 'audio_branch.logmel_extractor.melW', 'audio_branch.tscam_conv.bias',
             'audio_branch.head.weight', 'text_transform.sequential.0.weight', 'audio_transform.sequential.0.bias', 'audio_branch.layers.0.blocks.1.attn_mask')
    return found | {k: torch.ones(2) for k in extra}

"""Published checkpoints, made here in small sizes with the real names and layouts, must load and give the numbers of the library
they come from: to 1e-9 in float64 and 1e-5 in float32 (largest difference in units of the largest value).

The functions that write the released layouts are made from the published tables of names, independently of the key maps
under test. Every `.pth` also holds what training scripts leave behind: arguments and numpy numbers. Controls: a changed
tensor in a file must move the output, files with missing, surplus and misshaped tensors must say so, and a class that
would write a file must never run.
"""
import json, re, shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from audiorepro.audiomae import AudioMAE, AudioMAEConfig, random_masking
from audiorepro.checkpoints import convert, map_keys, read_weights
from audiorepro.clap_files import HFCLAP, read_clap
from audiorepro.core import make_generator
from audiorepro.gpt2 import GPT2
from audiorepro.loa import LOAModel
from audiorepro.sampling import Condition
from audiorepro.t5 import T5
from audiorepro.unet import UNet, UNetConfig
from audiorepro.unet_files import EMA_KEYS, official_unet, read_unet, unet_from_shapes
from audiorepro.vae import VAE, VAEConfig
from audiorepro.vae_files import vae_keys
from layouts import (averaged, below, error, laion, official_positions, official_t_unet, official_vae, official_windows, randn, randomise,
                     save_pth)


# --- comparing ------------------------------------------------------------------------------------------------------

def equal(load, theirs, ours_out, theirs_out, tolerances=(1e-9, 1e-5)):
    "The loaded model gives the reference's numbers in both precisions; another reference does not"
    for dtype, tolerance in zip((torch.float64, torch.float32), tolerances):
        ours, theirs = load(dtype), theirs.to(dtype)
        with torch.no_grad():
            got, wanted = ours_out(ours), theirs_out(theirs)
            assert error(got, wanted) <= tolerance, dtype
    changed = max(theirs.parameters(), key=lambda p: p.ndim > 1 and p.numel())
    changed.data += .1*changed.flip(0)  # control: the numbers depend on the weights
    with torch.no_grad(): assert error(got, theirs_out(theirs)) > 100*tolerance


def same(a, b):
    "Every tensor of one state dict is in the other"
    return set(a) == set(b) and all(torch.equal(x, b[k]) for k, x in a.items())


def folder_of(path, model, **more):
    model.save_pretrained(path, **more)
    return path


# --- the VAE --------------------------------------------------------------------------------------------------------

def vae_reference():
    from diffusers import AutoencoderKL
    return randomise(AutoencoderKL(in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(32, 64, 64), layers_per_block=1,
                                   norm_num_groups=32, scaling_factor=.9228, down_block_types=('DownEncoderBlock2D',)*3,
                                   up_block_types=('UpDecoderBlock2D',)*3))


def official_stage(model):
    return below('first_stage_model', official_vae(model.state_dict(), 3) | {'vocoder.conv_pre.weight': torch.ones(3), 'loss.logvar': torch.ones(())})


@pytest.mark.parametrize('layout', ['folder', 'pipeline', 'official', 'alone'])
def test_vae(layout, tmp_path):
    theirs = vae_reference()
    if layout == 'official': path = save_pth(tmp_path/'full.pth', official_stage(theirs) | {'scale_factor': torch.tensor(.9228), 'betas': torch.ones(9)})
    elif layout == 'alone': path = save_pth(tmp_path/'vae.ckpt', official_vae(theirs.state_dict(), 3) | {'loss.logvar': torch.ones(())})
    else:
        folder_of(tmp_path/'vae', theirs)
        (tmp_path/'model_index.json').write_text('{}')
        path = tmp_path/'vae' if layout == 'folder' else tmp_path
    x = randn(2, 1, 16, 8)
    def ours_out(m):
        p = m.encode(x.to(m.scale_factor.dtype))
        return torch.cat([p.mean.flatten(), p.std.flatten(), m.decode(p.mean).flatten()])
    def theirs_out(m):
        p = m.encode(x.to(m.dtype)).latent_dist
        return torch.cat([p.mean.flatten(), p.std.flatten(), m.decode(p.mean).sample.flatten()])
    equal(lambda dtype: VAE.from_pretrained(path, dtype=dtype), theirs, ours_out, theirs_out)
    assert abs(VAE.from_pretrained(path).scale_factor.item() - (1 if layout == 'alone' else .9228)) < 1e-6


ODD_VAES = [dict(block_out_channels=(32, 48, 64), norm_num_groups=16), dict(block_out_channels=(24, 40, 56), norm_num_groups=8, layers_per_block=3, latent_channels=5),
            dict(block_out_channels=(64, 32), norm_num_groups=16), dict(block_out_channels=(40,), norm_num_groups=4),
            dict(block_out_channels=(16, 24, 24, 36), norm_num_groups=4, latent_channels=1)]


@pytest.mark.parametrize('shape, layout', [*((s, 'folder') for s in ODD_VAES), ({'block_out_channels': (32, 96, 64)}, 'official')])
def test_vae_of_odd_shape(shape, layout, tmp_path):
    "Widths are kept as they are, whole multiples of the first or not"
    from diffusers import AutoencoderKL
    levels = len(shape['block_out_channels'])
    theirs = randomise(AutoencoderKL(in_channels=1, out_channels=1, **dict(layers_per_block=1, latent_channels=4) | shape,
                                     down_block_types=('DownEncoderBlock2D',)*levels, up_block_types=('UpDecoderBlock2D',)*levels))
    path = save_pth(tmp_path/'vae.ckpt', official_vae(theirs.state_dict(), levels)) if layout == 'official' else folder_of(tmp_path/'vae', theirs)
    x = randn(1, 1, 16, 8)
    def outs(m):
        p = m.encode(x.to(next(m.parameters()).dtype))
        p = getattr(p, 'latent_dist', p)
        back = m.decode(p.mean)
        return torch.cat([p.mean.flatten(), getattr(back, 'sample', back).flatten()])
    equal(lambda dtype: VAE.from_pretrained(path, dtype=dtype), theirs, outs, outs)
    assert VAE.from_pretrained(path).cfg.widths == shape['block_out_channels']


# --- the U-Nets -----------------------------------------------------------------------------------------------------

CHANNELS, CONTEXTS = (32, 32, 64, 64), dict(base=(None, 24, 40), large=(None, 24, 40, None), speech=(None, 24))


def unet_reference(kind='base', heads=(1, 1, 2, 2), channels=CHANNELS, contexts=CONTEXTS, **more):
    from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
    down, up = ('DownBlock2D',) + ('CrossAttnDownBlock2D',)*3, ('CrossAttnUpBlock2D',)*3 + ('UpBlock2D',)
    return AudioLDM2UNet2DConditionModel(
        in_channels=8, out_channels=8, block_out_channels=channels, down_block_types=down, up_block_types=up,
        cross_attention_dim=[list(contexts[kind])]*4, attention_head_dim=heads, transformer_layers_per_block=1 + (kind == 'large'), **more)


def small_unet(seed=0, heads=1): return randomise(unet_reference('speech', heads, (32,)*4), seed)


def unet_outs(kind='base'):
    z, a, b, mask = randn(2, 8, 16, 16), randn(2, 8, 24, seed=1), randn(2, 5, 40, seed=2), torch.arange(5) < torch.tensor([[5], [3]])
    t, has_text = torch.tensor([3, 800]), kind != 'speech'
    def ours_out(m):
        z_, a_, b_ = (x.to(m.conv_in.weight.dtype) for x in (z, a, b))
        return m(z_, t, Condition(((a_, None), (b_, mask)) if has_text else ((a_, None),)))
    def theirs_out(m):
        z_, a_, b_ = (x.to(m.dtype) for x in (z, a, b))
        more = dict(encoder_hidden_states_1=b_, encoder_attention_mask_1=mask.long()) if has_text else {}
        return m(z_, t, a_, encoder_attention_mask=torch.ones(2, 8), **more).sample
    return ours_out, theirs_out


@pytest.mark.parametrize('weights, kind', [('raw', 'base'), ('ema', 'speech')])
def test_official_unet(weights, kind, tmp_path, capsys):
    theirs = randomise(unet_reference(kind))
    state = below('model.diffusion_model', official_t_unet(theirs.state_dict(), len(CONTEXTS[kind])))
    path = save_pth(tmp_path/'audioldm2.pth', (state if weights == 'raw' else averaged(state)) | {'betas': torch.ones(3)})
    equal(lambda dtype: UNet.from_pretrained(path, dtype=dtype), theirs, *unet_outs(kind))
    notice = capsys.readouterr().out.strip().split('\n')[0]
    assert '1, 1, 2, 2 heads per level (the official layout' in notice and ('averaged' in notice) == (weights == 'ema')


def test_official_unet_with_both_kinds_of_weights(tmp_path):
    raw, ema = (below('model.diffusion_model', official_t_unet(small_unet(s).state_dict(), 2)) for s in (0, 1))
    path = save_pth(tmp_path/'both.pth', raw | averaged(ema))
    found = [read_unet(path, ema=e).conv_in.weight for e in (False, True)]
    assert torch.equal(found[0], raw['model.diffusion_model.input_blocks.0.0.weight'])
    assert torch.equal(found[1], ema['model.diffusion_model.input_blocks.0.0.weight'])


@pytest.mark.parametrize('heads', [8, (1, 1, 2, 2)])
def test_diffusers_unet_has_the_heads_of_its_config(heads, tmp_path, capsys):
    theirs = randomise(unet_reference(heads=heads, norm_num_groups=16))
    folder_of(tmp_path/'unet', theirs, max_shard_size='2MB')
    assert len(list((tmp_path/'unet').glob('*.safetensors'))) > 1      # in shards
    equal(lambda dtype: UNet.from_pretrained(tmp_path/'unet', dtype=dtype), theirs, *unet_outs())
    assert f"{'8, 8, 8, 8' if heads == 8 else '1, 1, 2, 2'} heads per level (its config.json)" in capsys.readouterr().out


def test_same_weights_other_heads(tmp_path):
    "The two layouts of one net load the same tensors and say different things: the config counts (errata, heads)"
    theirs = small_unet(heads=8)
    folder_of(tmp_path/'unet', theirs)
    path = save_pth(tmp_path/'official.pth', below('model.diffusion_model', official_t_unet(theirs.state_dict(), 2)))
    a, b = UNet.from_pretrained(tmp_path/'unet'), UNet.from_pretrained(path)
    assert same(a.state_dict(), b.state_dict())
    with torch.no_grad(): assert error(unet_outs('speech')[0](a), unet_outs('speech')[0](b)) > 1e-2


NO_TENSOR_TELLS = dict(mid_block_scale_factor=2., time_embedding_act_fn='gelu', freq_shift=1, flip_sin_to_cos=False, norm_eps=.01)


@pytest.mark.parametrize('setting', NO_TENSOR_TELLS)
def test_a_unet_whose_settings_ask_for_another_computation_is_refused(setting, tmp_path):
    "Control: diffusers itself answers otherwise with the same tensors"
    net = dict(kind='speech', heads=1, channels=(32,)*4, norm_num_groups=8)  # one channel a group would not hear the time
    plain, odd = randomise(unet_reference(**net)), unet_reference(**net, **{setting: NO_TENSOR_TELLS[setting]})
    odd.load_state_dict(plain.state_dict())
    theirs_out = unet_outs('speech')[1]
    with torch.no_grad(): assert error(theirs_out(odd.eval()), theirs_out(plain)) > 1e-3
    with pytest.raises(ValueError, match=setting): UNet.from_pretrained(folder_of(tmp_path/'unet', odd))


def tango_reference():
    from diffusers import UNet2DConditionModel
    return randomise(UNet2DConditionModel(
        in_channels=8, out_channels=8, block_out_channels=(64, 128), cross_attention_dim=24, attention_head_dim=(1, 2), use_linear_projection=True,
        down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'), layers_per_block=2))


@pytest.mark.parametrize('layout', ['tango', 'diffusers'])
def test_tango_unet(layout, tmp_path):
    theirs = tango_reference()
    if layout == 'tango':
        (tmp_path/'main_config.json').write_text(json.dumps(dict(text_encoder_name='google/flan-t5-large')))
        torch.save(below('unet', theirs.state_dict()) | {'text_encoder.shared.weight': torch.ones(2, 2)}, tmp_path/'pytorch_model_main.bin')
        for other in ('vae', 'stft'): torch.save({'x': torch.ones(1)}, tmp_path/f'pytorch_model_{other}.bin')
    else: folder_of(tmp_path, theirs)
    z, a, mask, t = randn(2, 8, 16, 16), randn(2, 5, 24, seed=1), torch.arange(5) < torch.tensor([[5], [3]]), torch.tensor([3, 800])
    equal(lambda dtype: UNet.from_pretrained(tmp_path, dtype=dtype), theirs,
          lambda m: m(z.to(m.conv_in.weight), t, Condition(((a.to(m.conv_in.weight), mask),))),
          lambda m: m(z.to(m.dtype), t, a.to(m.dtype), encoder_attention_mask=mask.long()).sample)


@pytest.mark.parametrize('preset, kind, count', [('audioldm2', 'base', 1520), ('audioldm2_large', 'large', 3216), ('audioldm2_speech', 'speech', 1104)])
def test_every_name_of_the_published_unets(preset, kind, count):
    "At full size, on the meta device: every official name has its place, with and without dots, and the sizes are read back"
    cfg, contexts = getattr(UNetConfig, preset)(), dict(base=(None, 768, 1024), large=(None, 768, 1024, None), speech=(None, 768))
    with torch.device('meta'):
        own, theirs = UNet(cfg).state_dict(), unet_reference(kind, (4, 8, 12, 20), (128, 256, 384, 640), contexts).state_dict()
    assert {k: x.shape for k, x in own.items()} == {k: x.shape for k, x in theirs.items()} and len(own) == count
    official = official_t_unet(theirs, len(cfg.contexts))
    found = official_unet(official)
    assert {k: x.shape for k, x in found.items()} == {k: x.shape for k, x in own.items()}
    assert all(official_t_unet({k: 0}, len(cfg.contexts)).popitem()[0] == o for k, o in zip(found, official))
    assert list(map_keys({k.replace('.', ''): x for k, x in official.items()}, EMA_KEYS)) == list(official)
    assert unet_from_shapes(found, 32) == cfg
    assert [cfg.heads(l) for l in range(4)] == [4, 8, 12, 20]


def test_every_name_of_the_published_vae():
    with torch.device('meta'): own = VAE(VAEConfig.audioldm()).state_dict()
    own.pop('scale_factor')
    official = official_vae(own, 3)
    found = map_keys(official, vae_keys(3))
    assert {k: x.shape for k, x in found.items()} == {k: x.shape for k, x in own.items()}
    assert len([k for k in own if k.startswith(('encoder', 'decoder'))]) == 200


# --- GPT-2 and the translator ---------------------------------------------------------------------------------------

def gpt2_reference(kind='GPT2Model', **more):
    import transformers
    return randomise(getattr(transformers, kind)(transformers.GPT2Config(vocab_size=11, n_embd=128, n_layer=2, n_head=2, n_positions=40,
                                                                        bos_token_id=None, eos_token_id=None, **more)))


def masks(layers): return {f'h.{i}.attn.{k}': torch.ones(1) for i in range(layers) for k in ('bias', 'masked_bias')}


@pytest.mark.parametrize('layout', ['plain', 'prefixed', 'old', 'shards', 'official'])
def test_gpt2(layout, tmp_path, monkeypatch):
    theirs, path = gpt2_reference(), tmp_path/'gpt2'
    if layout == 'prefixed':
        head = gpt2_reference('GPT2LMHeadModel')
        theirs, path = head.transformer, folder_of(path, head)
        assert all(k.startswith('transformer.') for k in load_file(path/'model.safetensors'))
    elif layout == 'old':
        folder_of(path, theirs)
        (path/'model.safetensors').unlink()
        torch.save(theirs.state_dict() | masks(2), path/'pytorch_model.bin')
    elif layout == 'official': path = save_pth(tmp_path/'full.pth', below('cond_stage_models.0.model', theirs.state_dict() | masks(2)))
    else: folder_of(path, theirs, **({'max_shard_size': '500KB'} if layout == 'shards' else {}))
    if layout == 'shards': assert (path/'model.safetensors.index.json').exists()
    if layout == 'plain':
        monkeypatch.setattr('huggingface_hub.snapshot_download', lambda name: str(tmp_path/name))
        path = 'gpt2'                                                  # a hub id that is in the cache
    x, mask = randn(2, 9, 128), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:6] = False
    equal(lambda dtype: GPT2.from_pretrained(path, dtype=dtype), theirs,
          lambda m: m(x.to(m.wpe.weight), mask)[0][mask],
          lambda m: m(inputs_embeds=x.to(m.wpe.weight), attention_mask=mask.long()).last_hidden_state[mask])


class Translator(torch.nn.Module):
    "The two modules of diffusers as one, fed back as its pipeline does"
    def __init__(self, is_speech=False):
        from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2ProjectionModel
        super().__init__()
        options = dict(use_learned_position_embedding=True, max_seq_length=5) if is_speech else {}
        self.projection, self.language = randomise(AudioLDM2ProjectionModel(8, 12, 128, **options), 3), gpt2_reference()

    def forward(self, clap, t5, mask):
        found = self.projection(clap, t5, torch.ones(clap.shape[:2]).long(), mask.long())
        x, seen = found.hidden_states, found.attention_mask
        for _ in range(4):
            x = torch.cat([x, self.language(inputs_embeds=x, attention_mask=seen).last_hidden_state[:, -1:]], 1)
            seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
        return x[:, -4:]


def official_translator(model):
    p = model.projection
    tables = {f'{word}_of_sequence_tokens.weight': torch.cat([torch.stack([getattr(p, f'{k}_embed'), getattr(p, f'{k}_embed_1')]).data,
                                                              torch.full((30, 128), 7.)]) for word, k in (('start', 'sos'), ('end', 'eos'))}
    lines = below('input_sequence_embed_linear.0', p.projection.state_dict()) | below('input_sequence_embed_linear.1', p.projection_1.state_dict())
    inner = {'cond_stage_models.0.model.logit_scale_a': torch.ones(()), 'cond_stage_models.1.model.shared.weight': torch.ones(2, 2)}
    return below('cond_stage_models.0', tables | lines | inner | below('model', model.language.state_dict()))


@pytest.mark.parametrize('layout', ['pipeline', 'speech', 'official'])
def test_loa(layout, tmp_path):
    theirs, positions = Translator(layout == 'speech'), 0.
    if layout == 'speech': positions = theirs.projection.learnable_positional_embedding.data.mT  # of the phoneme encoder, with us
    if layout != 'official':
        theirs.language.config.max_new_tokens = 6
        for name in ('projection', 'language'): folder_of(tmp_path/f'{name}_model', getattr(theirs, name))
        (tmp_path/'model_index.json').write_text('{}')
        path = tmp_path
    else: path = save_pth(tmp_path/'full.pth', official_translator(theirs))
    clap, t5, mask = randn(1, 1, 8), randn(1, 5, 12, seed=1), torch.ones(1, 5, dtype=torch.bool)
    equal(lambda dtype: LOAModel.from_pretrained(path, dtype=dtype), theirs,
          lambda m: m.generate([(clap.to(m.conditions.sos), mask[:, :1]), ((t5 + positions).to(m.conditions.sos), mask)], 4),
          lambda m: m(clap.to(m.language.dtype), t5.to(m.language.dtype), mask))
    assert LOAModel.from_pretrained(path).cfg.num_tokens == (8 if layout == 'official' else 6)


# --- AudioMAE -------------------------------------------------------------------------------------------------------

def mae_reference(frames=4, bands=4):
    "transformers' masked autoencoder with the released positions; its decoder wants a square picture"
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    vit = randomise(ViTMAEForPreTraining(ViTMAEConfig(
        image_size=(16*frames, 16*bands), patch_size=16, num_channels=1, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=512, decoder_hidden_size=64, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=256, mask_ratio=.75, norm_pix_loss=True, layer_norm_eps=1e-6, attn_implementation='sdpa')))
    vit.vit.embeddings.position_embeddings.data = official_positions(128, frames, bands)
    vit.decoder.decoder_pos_embed.data = official_positions(64, frames, bands)
    return vit


def official_mae(vit):
    "transformers' names -> those of the released AudioMAE, with queries, keys and values in one tensor"
    def name(key):
        for a, b in (('vit.embeddings.patch_embeddings.projection', 'patch_embed.proj'), ('vit.embeddings.position_embeddings', 'pos_embed'),
                     ('vit.embeddings.', ''), ('decoder.decoder_layers', 'decoder_blocks'), ('decoder.', ''), ('vit.layers', 'blocks'),
                     ('vit.layernorm', 'norm'), ('layernorm_before', 'norm1'), ('layernorm_after', 'norm2'), ('attention.o_proj', 'attn.proj'),
                     ('attention.q_proj', 'attn.qkv')): key = key.replace(a, b)
        return key
    state = vit.state_dict()
    whole = {k: torch.cat([state[k.replace('q_proj', f'{n}_proj')] for n in 'qkv']) if 'q_proj' in k else x for k, x in state.items()}
    return {name(k): x for k, x in whole.items() if 'k_proj' not in k and 'v_proj' not in k}


@pytest.mark.parametrize('layout', ['official', 'inside', 'timm', 'prefixed', 'windows'])
def test_audiomae(layout, tmp_path, capsys):
    is_whole, size = layout in ('official', 'inside'), (4, 4) if layout in ('official', 'inside') else (16, 4)
    theirs = mae_reference(*size)
    state = official_mae(theirs)
    half = {k: x for k, x in state.items() if not k.startswith(('decoder', 'mask_token'))}
    if layout == 'official': path = save_pth(tmp_path/'pretrained.pth', state, 'model')
    if layout == 'inside': path = save_pth(tmp_path/'full.pth', below('cond_stage_models.0.cond_stage_models.2.audiomae.model', state) | {'betas': torch.ones(2)})
    if layout == 'windows': path = save_pth(tmp_path/'pretrained.pth', {k: x for k, x in state.items() if 'decoder_blocks' not in k} | official_windows(64, 16), 'model')
    if layout in ('timm', 'prefixed'):
        path = tmp_path/layout
        path.mkdir()
        (path/'config.json').write_text(json.dumps(dict(architecture='vit_base_patch16_224') if layout == 'timm' else dict(auto_map={})))
        if layout == 'timm': torch.save(half, path/'pytorch_model.bin')
        else: save_file(below('audiomae.encoder', half), path/'model.safetensors')
    x, noise = randn(2, 1, 16*size[0], 16*size[1]), torch.rand(2, size[0]*size[1], generator=make_generator(1))
    keep, restore, _ = random_masking(noise, .75)
    def ours_out(m):
        latent = m.norm(m.forward_encoder(x.to(m.cls_token), keep)[-1])
        return m.forward_decoder(latent, restore) if is_whole else latent
    def theirs_out(m):
        return m(x.to(m.dtype), noise=noise).logits if is_whole else m.vit(x.to(m.dtype), noise=noise).last_hidden_state
    def load(dtype):
        m = AudioMAE.from_pretrained(path, dtype=dtype)
        for name in ('pos_embed', 'decoder_pos_embed')[:1 + is_whole]: assert getattr(m, name).dtype == dtype
        assert m.cfg.grid == size and bool(m.cfg.decoder_depth) == is_whole
        return m
    equal(load, theirs, ours_out, theirs_out)
    assert ('local windows and is left aside' in capsys.readouterr().out) == (layout == 'windows')


@pytest.mark.parametrize('positions', ['official', 'ours'])
def test_audiomae_takes_the_positions_of_its_file(positions, tmp_path):
    "The authors' table counts 8 rows of 64 while the patches lie in 64 rows of 8: `PatchEmbed_org.patch_hw`"
    from audiorepro.layers import sincos_2d
    cfg = AudioMAEConfig(dim=64, depth=1, heads=1, decoder_dim=32, decoder_depth=1, decoder_heads=1)
    state = {k: x for k, x in randomise(AudioMAE(cfg)).state_dict().items()}
    tables = {k: official_positions(w, 64, 8) if positions == 'official' else torch.cat([torch.zeros(1, 1, w), sincos_2d(w, 64, 8)[None]], 1)
              for k, w in (('pos_embed', 64), ('decoder_pos_embed', 32))}
    found = AudioMAE.from_pretrained(save_pth(tmp_path/'mae.pth', state | tables, 'model'))
    assert found.cfg.input_size == (1024, 128) and found.cfg.grid == (64, 8)
    assert found.cfg.position_grid == ((8, 64) if positions == 'official' else None)
    for k, table in tables.items(): torch.testing.assert_close(getattr(found, k), table[:, 1:], atol=1e-5, rtol=0)
    found.save_pretrained(tmp_path/'ours')
    assert torch.equal(AudioMAE.from_pretrained(tmp_path/'ours').pos_embed, found.pos_embed)


def test_audiomae_refuses_what_it_cannot_use(tmp_path):
    state = official_mae(mae_reference())
    path = save_pth(tmp_path/'finetuned.pth', {k.replace('norm.', 'fc_norm.') if k.startswith('norm.') else k: x for k, x in state.items()}, 'model')
    with pytest.raises(ValueError, match='finetuned.pth is fine-tuned'): AudioMAE.from_pretrained(path)
    path = save_pth(tmp_path/'learnt.pth', state | {'pos_embed': state['pos_embed'] + .1}, 'model')
    with pytest.raises(ValueError, match='pos_embed is not the fixed table'): AudioMAE.from_pretrained(path)


# --- CLAP and T5 ----------------------------------------------------------------------------------------------------

def clap_reference():
    from transformers import ClapConfig, ClapModel
    text = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96, vocab_size=20, max_position_embeddings=90,
                projection_dim=16, layer_norm_eps=1e-5)
    audio = dict(spec_size=256, num_mel_bins=64, depths=[1, 2, 1, 1], num_attention_heads=[1, 2, 2, 2], patch_embeds_hidden_size=8, hidden_size=64,
                 projection_dim=16)
    return randomise(ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=16)))


@pytest.mark.parametrize('layout', ['folder', 'pipeline', 'laion', 'official'])
def test_clap(layout, tmp_path):
    theirs = clap_reference()
    if layout == 'laion': path = save_pth(tmp_path/'music.pt', below('module', laion(theirs)))
    elif layout == 'official': path = save_pth(tmp_path/'full.pth', below('clap.model', laion(theirs)) | below('cond_stage_models.0.cond_stage_models.0.model', laion(theirs)))
    else: path = folder_of(tmp_path/'text_encoder', theirs) if layout == 'folder' else folder_of(tmp_path/'text_encoder', theirs).parent
    mel, ids, mask = randn(2, 1, 1001, 64), torch.randint(3, 20, (2, 7), generator=make_generator(2)), torch.arange(7) < torch.tensor([[7], [4]])
    def outs(m):
        found = m(input_ids=ids, attention_mask=mask.long(), input_features=mel.to(m.dtype), is_longer=torch.zeros(2, 1, dtype=torch.bool))
        return torch.cat([found.audio_embeds, found.text_embeds])
    equal(lambda dtype: read_clap(path).to(dtype), theirs, outs, outs)


def word_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(['<pad>', '</s>', '<unk>', 'a', 'dog', 'barks'])}, '<unk>'))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token='<pad>', unk_token='<unk>').save_pretrained(folder)


def test_clap_behind_its_own_names(tmp_path):
    theirs = clap_reference()
    folder_of(tmp_path/'text_encoder', theirs)
    word_tokenizer(tmp_path/'tokenizer')
    (tmp_path/'model_index.json').write_text('{}')
    save_pth(tmp_path/'laion'/'630k.pt', laion(theirs))
    word_tokenizer(tmp_path/'laion')
    a, b = (HFCLAP.from_pretrained(p).embed_text(['a dog barks']) for p in (tmp_path, tmp_path/'laion'/'630k.pt'))
    assert torch.equal(a, b) and a.shape == (1, 16)


@pytest.mark.parametrize('act, layout', [('gated-gelu', 'whole'), ('relu', 'encoder'), ('relu', 'pipeline'), ('gated-gelu', 'shards'), ('gated-gelu', 'bin'),
                                         ('gated-gelu', 'official'), ('gated-gelu', 'tango'), ('relu', 'tango')])
def test_t5(act, layout, tmp_path):
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration
    kind = T5ForConditionalGeneration if layout == 'whole' else T5EncoderModel
    theirs = randomise(kind(T5Config(vocab_size=50, d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2, num_decoder_layers=1, feed_forward_proj=act)))
    path = folder_of(tmp_path/'text_encoder_2', theirs, **({'max_shard_size': '20KB'} if layout == 'shards' else {}))
    if layout == 'pipeline': path = tmp_path
    if layout == 'bin':
        torch.save(theirs.state_dict(), path/'pytorch_model.bin')
        (path/'model.safetensors').unlink()
    if layout == 'official':
        path = save_pth(tmp_path/'full.pth', below('cond_stage_models.1.model', theirs.state_dict()) | {'betas': torch.ones(9)}
                        | below('cond_stage_models.0.cond_stage_models.1.model', theirs.state_dict()))
    if layout == 'tango':
        path = tmp_path/'tango'
        path.mkdir()
        torch.save(below('text_encoder', theirs.state_dict()) | {'unet.conv_in.bias': torch.ones(4)}, path/'pytorch_model_main.bin')
        (path/'main_config.json').write_text('{}')
    (tmp_path/'model_index.json').write_text('{}')
    ids, mask = torch.randint(3, 50, (2, 9), generator=make_generator(2)), torch.arange(9) < torch.tensor([[9], [4]])
    encoder = theirs.encoder
    equal(lambda dtype: T5.from_pretrained(path, dtype=dtype), theirs, lambda m: m(ids, mask)[mask],
          lambda m: encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state[mask],
          (2e-6, 1e-5))  # norms and softmax are float32 in the reference, whatever is asked


# --- what is wrong is said ------------------------------------------------------------------------------------------

def published(kind, folder):
    "A good file of each component -> class, state, how to write one, a tensor to lose and its name with us"
    if kind == 'unet': return UNet, below('model.diffusion_model', official_t_unet(small_unet().state_dict(), 2)), \
        'model.diffusion_model.output_blocks.5.2.proj_in.bias', 'up_blocks.1.attentions.5.proj_in.bias'
    if kind == 'vae': return VAE, official_stage(vae_reference()), 'first_stage_model.decoder.up.2.upsample.conv.bias', 'decoder.up_blocks.0.upsamplers.0.conv.bias'
    if kind == 'gpt2': return GPT2, below('transformer', gpt2_reference().state_dict()), 'transformer.h.1.mlp.c_fc.bias', 'h.1.mlp.c_fc.bias'
    if kind == 'loa': return LOAModel, official_translator(Translator()), 'cond_stage_models.0.input_sequence_embed_linear.1.bias', 'conditions.projections.1.bias'
    return AudioMAE, official_mae(mae_reference()), 'blocks.1.norm2.bias', 'blocks.1.norm2.bias'


@pytest.mark.parametrize('kind', ['unet', 'vae', 'gpt2', 'loa', 'audiomae'])
def test_one_error_lists_what_is_missing_surplus_and_misshaped(kind, tmp_path):
    cls, state, lost, ours = published(kind, tmp_path)
    cls.from_pretrained(save_pth(tmp_path/'good.pth', state))
    prefix, bent = dict(
        unet=('model.diffusion_model.', 'input_blocks.4.1.norm.bias'), vae=('first_stage_model.', 'decoder.norm_out.bias'), gpt2=('transformer.', 'ln_f.bias'),
        loa=('cond_stage_models.0.', 'input_sequence_embed_linear.0.bias'), audiomae=('', 'norm.bias'))[kind]
    bad = {k: x for k, x in state.items() if k != lost} | {prefix + 'stranger.weight': torch.ones(2), prefix + bent: torch.ones(3)}
    path = save_pth(tmp_path/'bad.pth', bad)
    with pytest.raises(ValueError) as e: cls.from_pretrained(path)
    text = str(e.value)
    assert f'missing {ours}' in text and 'surplus stranger.weight' in text and 'has shape (3,), expected' in text and 'bad.pth' in text
    assert '\n' not in text


class Malicious:
    "Would write a file if anything ran"
    def __init__(self, path): self.path = path
    def __reduce__(self): return _write, (str(self.path),)


def _write(path): Path(path).write_text('ran')


@pytest.mark.parametrize('kind, zipped', [(k, True) for k in ('unet', 'vae', 'gpt2', 'loa', 'audiomae', 'clap', 't5', 'convert')] + [('vae', False), ('convert', False)])
def test_a_malicious_class_never_runs(kind, zipped, tmp_path):
    trap, file = tmp_path/'ran', tmp_path/'bad'/('pytorch_model.bin' if kind == 't5' else 'weights.pth')
    file.parent.mkdir()
    if kind == 't5': (tmp_path/'bad'/'config.json').write_text('{"model_type": "t5"}')
    torch.save(dict(state_dict={'w': torch.ones(2)}, callbacks=Malicious(trap)), file, _use_new_zipfile_serialization=zipped)
    def load():
        if kind == 'convert': return convert(file, tmp_path/'new')
        if kind == 'clap': return HFCLAP.from_pretrained(file)
        return dict(unet=UNet, vae=VAE, gpt2=GPT2, loa=LOAModel, audiomae=AudioMAE, t5=T5)[kind].from_pretrained(file.parent if kind == 't5' else file)
    with pytest.raises((ValueError, OSError)) as e: load()
    assert file.name in str(e.value) and f'{__name__}._write' in str(e.value) and 'refused' in str(e.value)
    assert not trap.exists() and not (tmp_path/'new').exists()
    torch.load(file, weights_only=False)
    assert trap.exists()                                               # control: the trap works


def test_an_uncached_hub_id_says_how_to_fetch_it(monkeypatch):
    def offline(name): raise OSError('no network')
    monkeypatch.setattr('huggingface_hub.snapshot_download', offline)
    for cls, name in ((VAE, 'cvssp/audioldm2'), (GPT2, 'gpt2'), (UNet, 'declare-lab/tango'), (T5, 'google/flan-t5-large')):
        with pytest.raises(FileNotFoundError) as e: cls.from_pretrained(name)
        assert str(e.value).endswith(f'run: hf download {name}') and '\n' not in str(e.value)


@pytest.mark.parametrize('kind', ['unet', 'vae', 'gpt2', 'loa', 'audiomae'])
def test_converted_once_it_loads_without_a_pickle(kind, tmp_path):
    cls, state, *_ = published(kind, tmp_path)
    path = save_pth(tmp_path/'full.pth', state)
    convert(path, tmp_path/'new')
    assert [p.name for p in (tmp_path/'new').iterdir()] == ['full.safetensors'] and set(read_weights(tmp_path/'new')) == set(state)
    a, b = cls.from_pretrained(path), cls.from_pretrained(tmp_path/'new')
    assert a.cfg == b.cfg and same(a.state_dict(), b.state_dict())
    a.save_pretrained(tmp_path/'ours')
    again = cls.from_pretrained(tmp_path/'ours')
    assert a.cfg == again.cfg and same(a.state_dict(), again.state_dict())


def test_a_folder_is_converted_with_everything_in_it(tmp_path):
    "diffusers and transformers read the result, too"
    from transformers import GPT2Model
    theirs, folder = gpt2_reference(), tmp_path/'pipeline'
    folder_of(folder/'language_model', theirs)
    (folder/'model_index.json').write_text('{}')
    shards = {k: f'pytorch_model-0000{1 + i % 2}-of-00002.bin' for i, k in enumerate(theirs.state_dict())}
    for file in set(shards.values()): torch.save({k: x for k, x in theirs.state_dict().items() if shards[k] == file}, folder/'language_model'/file)
    (folder/'language_model'/'pytorch_model.bin.index.json').write_text(json.dumps(dict(metadata={}, weight_map=shards)))
    (folder/'language_model'/'model.safetensors').unlink()
    convert(folder, tmp_path/'new')
    assert not list((tmp_path/'new').rglob('*.bin*')) and (tmp_path/'new'/'model_index.json').exists()
    again = GPT2Model.from_pretrained(tmp_path/'new'/'language_model')
    assert same(theirs.state_dict(), again.state_dict())
    ours = GPT2.from_pretrained(tmp_path/'new'/'language_model')
    assert torch.equal(ours.wpe.weight, theirs.wpe.weight)
    shutil.rmtree(tmp_path/'new')

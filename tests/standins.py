"""Stand-ins for published weights: diffusers and transformers build and save an AudioLDM 2 of random numbers, tiny or at full size,
and a tiny MusicGen. Tests use them, and lessons 52a, 53b, 61a, 71 and 71a.
"""
import json, math
from pathlib import Path

import torch
from torch import nn


CORPUS = 'a dog barks, then rain falls while wind blows and the old machine hums softly in every house again'


def make_tokenizers(
    max_tokens:int=40, # longest text; what `model_max_length` says in the saved folder
)->tuple: # RoBERTa's and T5's tokeniser, of transformers
    "Make small tokenisers of the two published kinds"
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizer, T5Tokenizer
    words, letters = sorted({*CORPUS.replace(',', '').split()}), sorted({*map(chr, range(97, 123)), ','})
    maker = ByteLevelBPETokenizer()
    maker.train_from_iterator([CORPUS]*3, vocab_size=300, min_frequency=1, show_progress=False,
                              special_tokens=['<s>', '<pad>', '</s>', '<unk>', '<mask>'])
    found = json.loads(maker.to_str())['model']
    merges = [tuple(m.split(' ') if isinstance(m, str) else m) for m in found['merges']]
    pieces = [(x, 0.) for x in ('<pad>', '</s>', '<unk>')] + [(x, -4. - i/10) for i, x in enumerate(['▁', *letters])]
    pieces += [('▁' + w, -1. - i/100) for i, w in enumerate(words)]
    return (RobertaTokenizer(found['vocab'], merges, model_max_length=max_tokens),
            T5Tokenizer(pieces, extra_ids=4, model_max_length=max_tokens))


def shake(
    module:nn.Module, # changed in place
)->nn.Module: # the same, each tensor random
    "Fill a network with random weights of unit gain, also where zeros or ones would hide a mistake"
    for p in module.parameters():
        noise = torch.randn(p.shape)
        p.data = noise*p[0].numel()**-.5 if p.ndim > 1 else p.data.mean() + .1*noise
    for name, x in module.named_buffers():
        if 'running_' in name: x.copy_(torch.rand(x.shape) + .5)
    return module.eval()


def sizes(channels, contexts, clap, t5, gpt2, vocoder, vae=(16, 32, 32), blocks=1, groups=8, frames=16, depth=1):
    "What the libraries' configs need, from the few numbers that differ"
    dim, text, sound = clap
    return dict(
        vae=dict(block_out_channels=vae, layers_per_block=blocks, norm_num_groups=groups, scaling_factor=.9228),
        unet=dict(block_out_channels=channels, norm_num_groups=groups, cross_attention_dim=[contexts]*4,
                  attention_head_dim=8, sample_size=frames, transformer_layers_per_block=depth),
        clap=dict(projection_dim=dim, text_config=text | dict(projection_dim=dim, pad_token_id=1, layer_norm_eps=1e-5),
                  audio_config=sound | dict(projection_dim=dim)),
        t5=t5, gpt2=gpt2, vocoder=vocoder)


def small_clap(dim, width):
    text = dict(hidden_size=width, num_hidden_layers=2, num_attention_heads=width//64, intermediate_size=96,
                vocab_size=400, max_position_embeddings=90)
    sound = dict(depths=[1, 2, 1, 1], num_attention_heads=[1, 2, 2, 2], patch_embeds_hidden_size=8, hidden_size=64)
    return dim, text, sound


BASE_SOUND = dict(depths=[2, 2, 12, 2], num_attention_heads=[4, 8, 16, 32], patch_embeds_hidden_size=128, hidden_size=1024)
SIZES = dict(
    tiny=sizes((32, 32, 64, 64), [None, 24, 40], small_clap(16, 64),
               dict(vocab_size=200, d_model=40, d_kv=8, num_heads=4, d_ff=48, num_layers=2),
               dict(vocab_size=11, n_embd=24, n_layer=2, n_head=2, n_positions=120),
               dict(model_in_dim=16, upsample_initial_channel=64)),
    deep=sizes((16, 32, 32, 48), [None, 32, 32, None], small_clap(24, 128),
               dict(vocab_size=200, d_model=32, d_kv=16, num_heads=2, d_ff=32, num_layers=3),
               dict(vocab_size=11, n_embd=32, n_layer=3, n_head=4, n_positions=120),
               dict(model_in_dim=32, upsample_initial_channel=96), vae=(8, 16, 16), groups=4, frames=24, depth=2),
    full=sizes((128, 256, 384, 640), [None, 768, 1024], (512, dict(), BASE_SOUND),
               dict(vocab_size=32128, d_model=1024, d_kv=64, num_heads=16, d_ff=2816, num_layers=24), dict(n_embd=768),
               dict(model_in_dim=64, upsample_initial_channel=1024), (128, 256, 512), 2, 32, 256))


def random_parts(
    size:str='tiny', # a key of `SIZES`
    prediction_type:str='epsilon', # of the schedule: 'epsilon' as published, or 'v_prediction'
    max_tokens:int=40, # of the tokenisers
)->dict: # subfolder -> object of diffusers or transformers
    "The pieces of an AudioLDM 2 as the public libraries build them"
    import diffusers as d, transformers as t
    s, (tokenizer, tokenizer_2) = SIZES[size], make_tokenizers(max_tokens)
    attends = ('CrossAttnDownBlock2D',)*3
    return dict(
        tokenizer=tokenizer, tokenizer_2=tokenizer_2,
        vae=d.AutoencoderKL(1, 1, ('DownEncoderBlock2D',)*3, ('UpDecoderBlock2D',)*3, latent_channels=8, **s['vae']),
        unet=d.AudioLDM2UNet2DConditionModel(
            in_channels=8, out_channels=8, layers_per_block=2, down_block_types=('DownBlock2D', *attends),
            up_block_types=(*(n.replace('Down', 'Up') for n in attends), 'UpBlock2D'), **s['unet']),
        text_encoder=t.ClapModel(t.ClapConfig(**s['clap'])),
        text_encoder_2=t.T5EncoderModel(t.T5Config(feed_forward_proj='gated-gelu', **s['t5'])),
        language_model=t.GPT2LMHeadModel(t.GPT2Config(
            bos_token_id=None, eos_token_id=None, max_new_tokens=8, **s['gpt2'])),
        projection_model=d.AudioLDM2ProjectionModel(
            s['clap']['projection_dim'], s['t5']['d_model'], s['gpt2']['n_embd']),
        vocoder=t.SpeechT5HifiGan(t.SpeechT5HifiGanConfig(
            sampling_rate=16_000, upsample_rates=[5, 4, 2, 2, 2], upsample_kernel_sizes=[16, 16, 8, 4, 4],
            normalize_before=False, **s['vocoder'])),
        scheduler=d.DDIMScheduler(1000, .0015, .0195, 'scaled_linear', clip_sample=False, set_alpha_to_one=False,
                                  steps_offset=1, prediction_type=prediction_type),
        feature_extractor=t.ClapFeatureExtractor(frequency_min=50, frequency_max=14_000, truncation='rand_trunc'))


def random_pipeline(
    folder:str|Path, # where to save it; made when missing
    size:str='tiny', # a key of `SIZES`
    seed:int=0, # of the weights
    gain:float=.02, # of the T-UNet's last layer
    **options, # of `random_parts`
): # `AudioLDM2Pipeline` of diffusers
    "Let diffusers build and save an AudioLDM 2 with random weights"
    from diffusers import AudioLDM2Pipeline
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = random_parts(size, **options)
        for part in parts.values():
            if isinstance(part, nn.Module): shake(part)
    parts['unet'].conv_out.weight.data *= gain
    pipe = AudioLDM2Pipeline(**parts)
    pipe.save_pretrained(folder)
    return pipe


def random_musicgen(
    folder:str|Path, # where to save it; made when missing
    seed:int=0, # of the weights
    text_dim:int=40, # width of T5; 32, the width of the LM, leaves out the projection
    card:int=64, # values of a code
    **sizes, # of the LM, under transformers' names
): # `MusicgenForConditionalGeneration` of transformers, in eval mode
    "Let transformers build and save a tiny MusicGen with random weights, a tokeniser beside it"
    import transformers as t
    codec = dict(num_filters=4, hidden_size=8, codebook_dim=8, upsampling_ratios=[5, 4], sampling_rate=16_000,
                 target_bandwidths=[800*4*math.log2(card)/1000], num_lstm_layers=1, use_causal_conv=False)
    ends = dict(pad_token_id=card, bos_token_id=card)
    config = t.MusicgenConfig(
        text_encoder=t.T5Config(vocab_size=200, d_model=text_dim, d_kv=8, num_heads=4, d_ff=48, num_layers=2),
        audio_encoder=t.EncodecConfig(codebook_size=card, **codec),
        decoder=t.MusicgenDecoderConfig(**dict(vocab_size=card, hidden_size=32, num_hidden_layers=3, ffn_dim=48,
                                               num_attention_heads=4, dropout=0.) | ends | sizes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = shake(t.MusicgenForConditionalGeneration(config))
        for name, x in model.named_buffers():
            if name.endswith('codebook.embed'): x.normal_()
    for k in (*ends, 'decoder_start_token_id'): setattr(model.generation_config, k, card)
    model.save_pretrained(folder)
    make_tokenizers()[1].save_pretrained(folder)
    return model

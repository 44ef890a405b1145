"Learn and reproduce modern text-to-audio. The names of `dir(audiorepro)` are loaded when they are first used"
__version__ = "0.1.0"

_MODULE_OF = dict(
    AudioLDM2='audioldm2', Tango='tango', TokenAudio='tokenlm', load_system='systems',
    Codec='codec', TokenLM='tokenlm', VAE='vae', AudioMAE='audiomae', CLAP='clap', T5='t5', GPT2='gpt2', UNet='unet', HifiGan='vocoder', Judge='judge',
    Schedule='diffusion', sample_ddim='sampling', MelConfig='mel', log_mel='mel', load_audio='audio', save_audio='audio', toy_set='datasets')
__all__ = [*_MODULE_OF]


def __getattr__(name):
    "Import the module that holds `name` (PEP 562): the package itself costs nothing to import"
    if name not in _MODULE_OF: raise AttributeError(f"module 'audiorepro' has no attribute {name!r}; it offers {', '.join(__all__)}")
    from importlib import import_module
    globals()[name] = value = getattr(import_module(f'audiorepro.{_MODULE_OF[name]}'), name)
    return value


def __dir__(): return sorted({*globals(), *__all__})

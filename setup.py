"Package metadata, read from settings.ini (the single source)"
import configparser, shlex
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = configparser.ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
    author_email=cfg['author_email'], license='Apache-2.0', url=cfg['git_url'], keywords=cfg['keywords'].split(),
    long_description=(here/'README.md').read_text(encoding='utf-8') if (here/'README.md').exists() else '',
    long_description_content_type='text/markdown', python_requires='>='+cfg['min_python'],
    packages=find_packages(include=['audiorepro', 'audiorepro.*']),
    package_data={'audiorepro': ['py.typed', 'weights/*/*.json', 'weights/*/*.safetensors', 'weights/*.json']},
    include_package_data=False, zip_safe=False,
    install_requires=shlex.split(cfg['requirements']),
    extras_require={name: shlex.split(cfg[f'{name}_requirements']) for name in ('dev', 'clap', 'speech', 'passt')},
    entry_points={'console_scripts': shlex.split(cfg['console_scripts'])},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Education', 'Intended Audience :: Science/Research',
                 'Programming Language :: Python :: 3'],
)

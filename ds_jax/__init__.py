"""DS-Net++ in JAX: dense slices of one supernet, routed per image.

The public names below load on first use, so `import ds_jax` is quick and needs
no optional package.
"""

import importlib

from ds_jax.version import __version__

_HOMES = {
  'Predictor': 'ds_jax.inference',
  'create_model': 'ds_jax.models',
  'list_models': 'ds_jax.models',
  'Subnet': 'ds_jax.models',
}
_MODULES = ('convert', 'export')

__all__ = ['__version__', *_HOMES, *_MODULES]


def __getattr__(name: str):
  if name in _MODULES:
    return importlib.import_module(f'ds_jax.{name}')
  if name in _HOMES:
    return getattr(importlib.import_module(_HOMES[name]), name)
  raise AttributeError(f'module ds_jax has no attribute {name!r}')


def __dir__():
  return sorted(__all__)

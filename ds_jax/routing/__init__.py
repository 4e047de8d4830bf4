"""Routing a batch: each image through the branch that its gate chose."""

from ds_jax.routing.dispatch import dispatch_images, tiled_dispatch

__all__ = ['dispatch_images', 'tiled_dispatch']

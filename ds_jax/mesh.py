"""Where arrays live: a mesh whose `data` axis holds every device.

Parameters and optimiser state are replicated, batches are split along `data`.
The steps are plain `jax.jit` programs over global arrays, so batch norm sees
the global batch and a wider mesh changes nothing but the speed.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def make_mesh(devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
  """Returns a mesh of these devices; None means all."""
  devices = jax.devices() if devices is None else devices
  return jax.sharding.Mesh(np.asarray(devices), ('data',))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The sharding of parameters: a copy on each device."""
  return NamedSharding(mesh, PartitionSpec())


def replicate(mesh: jax.sharding.Mesh, tree: Any) -> Any:
  """Puts a copy of every array on each device; the originals stay usable.

  The copy matters: the training steps donate their state, and an array that
  the caller still holds must not be freed under it.
  """
  tree = jax.tree.map(np.asarray, tree)
  return jax.device_put(tree, replicated(mesh), may_alias=False)


def shard_batch(mesh: jax.sharding.Mesh, batch: Any) -> Any:
  """Splits this process's part of a batch along `data`.

  Args:
    mesh: the devices.
    batch: arrays (n, ...), n the same in all, the process's share of the
      global batch.

  Returns:
    Global arrays (N, ...).

  Raises:
    ValueError: if the global batch does not divide by the number of devices.
  """
  sharding = NamedSharding(mesh, PartitionSpec('data'))
  local = len(jax.tree.leaves(batch)[0])
  check_batch_size(mesh, local * jax.process_count())
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )


def check_batch_size(mesh: jax.sharding.Mesh, batch_size: int) -> None:
  """Raises ValueError if a global batch does not divide over the devices."""
  if batch_size % mesh.size:
    raise ValueError(
      f'A batch of {batch_size} does not divide over {mesh.size} devices;'
      f' choose a multiple of {mesh.size} (each micro-batch counts, where'
      ' gradients are accumulated).'
    )

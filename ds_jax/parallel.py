"""How one function runs on many devices, and where its arrays live.

The devices form a mesh of two axes, `data` and `fsdp`. A batch is split over
both. What a function takes and gives is named by its layout:

* STATE: parameters, optimiser state, moving average. A copy on each device, or,
  with fsdp > 1, large arrays in as many shards.
* BATCH: rows of images, split over all devices.
* WHOLE: a copy on each device, whatever its size.
* SUM: what is summed up over several calls (gradients, statistics); a state
  until the replicas meet.

Two executors run the same functions. `pjit` is `jax.jit` on global arrays: a
mean over the batch is one over the global batch, batch norm's included, and XLA
puts the collectives in. `pmap` is `jax.jit` of `jax.shard_map`: every device
runs the function on its rows, batch norm sees these alone, as in the authors'
training, and the replicas meet where the function calls `mean`. A wider mesh
changes nothing but the speed with the one, and batch norm and dropout with the
other. Calibration takes the moments of the global batch with either (`united`):
how images differ from those of other devices is lost in a mean over replicas.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ds_jax import compiler, hosts
from ds_jax import config as config_lib

STATE, BATCH, WHOLE, SUM = 'state', 'batch', 'whole', 'sum'

_AXES = ('data', 'fsdp')
_DEFAULT = config_lib.ParallelConfig()
# Smaller arrays are not worth a collective of their own; and where a batch
# norm's are in shards, so is the arithmetic on them, with a collective each.
_MIN_SHARDED_SIZE = 1 << 16


class Executor:
  """Runs functions on a mesh of devices.

  Attributes:
    mesh: the devices, (data, fsdp); those of a process are neighbours.
  """

  def __init__(
    self,
    config: config_lib.ParallelConfig = _DEFAULT,
    devices: Sequence[jax.Device] | None = None,
  ):
    """Lays out the devices.

    Args:
      config: see `ParallelConfig`.
      devices: None means all of all processes.

    Raises:
      ValueError: if the devices do not divide by fsdp.
    """
    # Not `jax.make_mesh`, which may mix the processes' devices: their rows
    # would trade places, and with them the noise that the rows get.
    devices = np.asarray(jax.devices() if devices is None else devices)
    if devices.size % config.fsdp:
      raise ValueError(
        f'parallel.fsdp={config.fsdp} does not divide {devices.size} devices;'
        f' choose a divisor of {devices.size}.'
      )
    self.mesh = jax.sharding.Mesh(devices.reshape(-1, config.fsdp), _AXES)
    self._is_global = config.executor == 'pjit'
    self._spread = self.compile(lambda tree: tree, [STATE], SUM)

  def replicas(self) -> 'Executor':
    """Returns an executor whose devices each run on their own, as `pmap`."""
    return Executor(
      config_lib.ParallelConfig('pmap'), self.mesh.devices.flatten()
    )

  def united(self) -> 'Executor':
    """Returns an executor of the global batch, as `pjit`, on the same mesh."""
    if self._is_global:
      return self
    return Executor(devices=self.mesh.devices.flatten())

  def check_batch_size(self, batch_size: int) -> None:
    """Raises ValueError if a global batch does not divide over the devices."""
    if batch_size % self.mesh.size:
      raise ValueError(
        f'A batch of {batch_size} does not divide over {self.mesh.size}'
        f' devices; choose a multiple of {self.mesh.size} (each micro-batch'
        ' counts, where gradients are accumulated).'
      )

  def put(self, tree: Any) -> Any:
    """Lays out copies of arrays, the same on every process, as STATE.

    The copies matter: training steps donate their state, and an array that the
    caller still holds must not be freed under it.
    """

    def put_array(x):
      sharding = self._state_sharding(x.shape)
      places = sharding.addressable_devices_indices_map(x.shape)
      shards = [
        jax.device_put(x[index], device, may_alias=False)
        for device, index in places.items()
      ]
      return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)

    return jax.tree.map(put_array, hosts.fetch(tree))

  def put_batch(self, batch: Any) -> Any:
    """Lays out this process's part of a batch as BATCH.

    Args:
      batch: arrays (n, ...), n the same in all, the process's rows of the
        global batch.

    Returns:
      Global arrays (N, ...).

    Raises:
      ValueError: if the global batch does not divide by the number of devices.
    """
    local = len(jax.tree.leaves(batch)[0])
    self.check_batch_size(local * jax.process_count())
    sharding = self._sharding(PartitionSpec(_AXES))
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(sharding, x), batch
    )

  def spread(self, tree: Any) -> Any:
    """Lays out a STATE as a SUM."""
    return tree if self._is_global else self._spread(tree)

  def compile(
    self,
    function: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Any,
    *,
    donate: Sequence[int] = (),
    static: Sequence[str] = (),
  ) -> Callable[..., Any]:
    """Returns the function jitted for the mesh.

    Args:
      function: of arrays by position, and static arguments by name.
      inputs: the layout of each argument by position, or a tree of layouts as
        in outputs.
      outputs: the layouts of what it returns: a tree like it, cut off where a
        layout holds for all that is below.
      donate: positions of arguments whose memory the results may take.
      static: names of the static arguments.
    """

    @functools.wraps(function)  # its name is the program's, in profiles
    def run(*args, **static):
      function_here = functools.partial(function, **static)
      if self._is_global:
        return self._run_global(function_here, outputs, args)
      return self._run_replicas(function_here, tuple(inputs), outputs, args)

    return jax.jit(
      run,
      static_argnames=static,
      donate_argnums=donate,
      compiler_options=compiler.options_for_training(),
    )

  def _run_global(self, function, outputs, args):
    def constrain(layout, tree):
      if layout == BATCH:
        return jax.lax.with_sharding_constraint(
          tree, self._sharding(PartitionSpec(_AXES))
        )
      if layout == WHOLE:
        return self.whole(tree)
      return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(
          x, self._state_sharding(x.shape)
        ),
        tree,
      )

    return jax.tree.map(constrain, outputs, function(*args))

  def _run_replicas(self, function, inputs, outputs, args):
    specs = {
      STATE: PartitionSpec(),
      WHOLE: PartitionSpec(),
      BATCH: PartitionSpec(_AXES),
      SUM: PartitionSpec(_AXES),
    }

    def on_sums(change, layouts, trees):
      return jax.tree.map(
        lambda layout, tree: (
          jax.tree.map(change, tree) if layout == SUM else tree
        ),
        layouts,
        trees,
      )

    def run(*args):
      # Each replica has sums of its own, a row of a global array.
      args = on_sums(lambda x: x[0], inputs, args)
      return on_sums(lambda x: x[None], outputs, function(*args))

    return jax.shard_map(
      run,
      mesh=self.mesh,
      in_specs=jax.tree.map(specs.get, inputs),
      out_specs=jax.tree.map(specs.get, outputs),
      # Checked, it would sum up gradients by itself, in every call.
      check_vma=False,
    )(*args)

  # What follows is called inside of compiled functions.

  def mean(self, tree: Any) -> Any:
    """Returns the mean over the replicas; global values are that already."""
    return tree if self._is_global else jax.lax.pmean(tree, _AXES)

  def whole(self, tree: Any) -> Any:
    """Returns the arrays of a STATE, complete on each device, to compute."""
    if not self._is_global:
      return tree
    return jax.lax.with_sharding_constraint(
      tree, self._sharding(PartitionSpec())
    )

  def all_rows(self, tree: Any) -> Any:
    """Returns the rows (N, ...) of the global batch, of those at hand."""
    if self._is_global:
      return tree
    return jax.lax.all_gather(tree, _AXES, tiled=True)

  def reversed_rows(self, tree: Any) -> Any:
    """Returns the rows at hand of the global batch in reversed order."""

    def reverse(x):
      x = x[::-1]
      if self._is_global:
        return x
      last = self.mesh.size - 1
      return jax.lax.ppermute(
        x, _AXES, [(i, last - i) for i in range(self.mesh.size)]
      )

    return jax.tree.map(reverse, tree)

  def draw(
    self, distribution: Callable, key: jax.Array, shape: Sequence[int]
  ) -> jax.Array:
    """Draws (n, ...) for the rows at hand, as if for the global batch.

    Args:
      distribution: of `jax.random`, called with key and shape.
      key: the same everywhere.
      shape: (n, ...).
    """
    if self._is_global:
      return distribution(key, shape)
    rows, *rest = shape
    everything = distribution(key, (rows * self.mesh.size, *rest))
    start = jax.lax.axis_index(_AXES) * rows
    return jax.lax.dynamic_slice_in_dim(everything, start, rows)

  def key_of_replica(self, key: jax.Array) -> jax.Array:
    """Returns a key of its own for each replica."""
    if self._is_global:
      return key
    return jax.random.fold_in(key, jax.lax.axis_index(_AXES))

  def _sharding(self, spec):
    return NamedSharding(self.mesh, spec)

  def _state_sharding(self, shape: Sequence[int]) -> NamedSharding:
    """The largest dimension that divides is sharded, and no small array."""
    shards = self.mesh.shape['fsdp']
    sizes = [0 if size % shards else size for size in shape]
    if shards == 1 or math.prod(shape) < _MIN_SHARDED_SIZE or not any(sizes):
      return self._sharding(PartitionSpec())
    before = (None,) * int(np.argmax(sizes))
    return self._sharding(PartitionSpec(*before, 'fsdp'))

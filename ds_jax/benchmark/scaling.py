"""What a training step communicates, and what partitioning it costs.

    python -m ds_jax.benchmark.scaling --model=ds_mobilenet_tiny
    python -m ds_jax.benchmark.scaling --model=ds_resnet50 --compile_only

Every combination of executor, fsdp and number of devices runs in a process of
its own. It times steps of Stages I and II, reads the collectives out of the
optimised HLO of the programs that a step runs, and compares their bytes with
the fewest that would do (`fewest`).

`--devices` simulates devices on the CPU. All share its cores, so that the same
global batch can't become faster: a step's time against the number of devices
shows what partitioning costs. Without `--devices`, and with an accelerator, the
devices of this host are taken as they are.
"""

import argparse
import collections
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jaxlib
import numpy as np
from absl import logging
from jax.sharding import PartitionSpec

from ds_jax import config as config_lib
from ds_jax import cpu, data, models, parallel, paths
from ds_jax.benchmark import collectives, timing
from ds_jax.train import gate, supernet

SIMULATED = (1, 2, 4, 8)
# Payloads below this take their latency, on any fast network.
SMALL_BYTES = 2**16

_MANY_STEPS = 10**6
_OPTIMIZER = config_lib.OptimizerConfig(name='sgd', learning_rate=1e-3)
_FLOAT_BYTES = 4
_DEVICES_FLAG = '--xla_force_host_platform_device_count'
_CHILD = (
  'import sys; from ds_jax.benchmark import scaling; scaling.child(sys.argv[1])'
)
_PROBE = 'import jax; print(jax.default_backend(), jax.device_count())'


@dataclasses.dataclass(frozen=True)
class Options:
  """What to measure.

  Attributes:
    model: arguments of `create_model`; JSON.
    image_size: in pixels.
    batch_size: of all devices together, whatever their number.
    devices: numbers of devices simulated on the CPU; None means `SIMULATED`,
      or, where JAX finds an accelerator, its devices.
    executors: some of `config_lib.EXECUTORS`.
    fsdp: numbers of shards; those that fit neither the executor nor the number
      of devices are left out.
    seconds: for which the steps of each combination are timed.
    compile_only: whether nothing runs: no times, and a model of any size.
    json: a file to write, too.
  """

  model: Mapping[str, Any]
  image_size: int
  batch_size: int = 64
  devices: Sequence[int] | None = None
  executors: Sequence[str] = config_lib.EXECUTORS
  fsdp: Sequence[int] = (1, 8)
  seconds: float = 10.0
  compile_only: bool = False
  json: str | None = None


class _Recorder(parallel.Executor):
  """An executor that keeps what its programs communicate.

  Abstract, it compiles them and runs nothing: arrays are
  `jax.ShapeDtypeStruct`s, so that a model of any size will do.
  """

  def __init__(self, config: config_lib.ParallelConfig, *, is_abstract: bool):
    self.calls: list[tuple[str, list[collectives.Collective]]] = []
    self._is_abstract = is_abstract
    self.is_replicated = config.executor == 'pmap'
    super().__init__(config)

  def put(self, tree):
    if not self._is_abstract:
      return super().put(tree)
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=self._state_sharding(x.shape)
      ),
      tree,
    )

  def put_batch(self, batch):
    if not self._is_abstract:
      return super().put_batch(batch)
    sharding = self._sharding(PartitionSpec(self.mesh.axis_names))
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch
    )

  def is_sharded(self, shape: Sequence[int]) -> bool:
    """Whether fsdp cuts an array of this shape."""
    return not self._state_sharding(shape).is_fully_replicated

  def compile(self, function, *args, **options):
    jitted = super().compile(function, *args, **options)
    programs = {}

    @functools.wraps(function)
    def call(*args, **static):
      key = tuple(static.items())
      if key not in programs:
        lowered = jitted.lower(*args, **static)
        compiled = lowered.compile()
        found = collectives.read(compiled.as_text())
        name = function.__name__.strip('_<>')
        if 'subnet' in static:
          name = f'{name} {static["subnet"].index}'
        programs[key] = name, found, lowered, compiled
      name, found, lowered, compiled = programs[key]
      self.calls.append((name, found))
      if not self._is_abstract:
        return compiled(*args)
      return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=sharding
        ),
        lowered.out_info,
        compiled.output_shardings,
      )

    return call


def fewest(model, phase: str, executor: _Recorder) -> dict[str, float]:
  """Returns the bytes that a device has to send in a step, at the least.

  Gradients are float32 and cross the network once a step. With pmap, so do the
  batch statistics. With pjit, the moments of every batch norm do, forward and
  backward, in the pass of every student (counted at full width, which is too
  much for narrow ones). With fsdp, as in ZeRO-3, every pass gathers the
  parameters that are sharded, every student's scatters their gradient, and the
  replicas of a shard reduce that.

  Args:
    model: the supernet.
    phase: `supernet` or `gate`.
    executor: of the step.

  Returns:
    Bytes by what they are of: `gradient`, `statistics`, `parameters`.
  """
  variables = models.variables_of(model)
  is_first = phase == supernet.Supernet.name
  students = 2 + _num_random(model) if is_first else 1
  passes = students + 1 if is_first else 1
  devices, shards = executor.mesh.size, executor.mesh.shape['fsdp']

  def size(arrays):
    return _FLOAT_BYTES * sum(math.prod(x.shape) for x in arrays)

  def sharded(arrays):
    return [x for x in arrays if executor.is_sharded(x.shape)]

  def send(kind, size, group):
    return collectives.Collective(kind, size, group).wire_bytes

  trained = [
    x for p, x in variables.params.items() if models.is_slimming(p) != is_first
  ]
  cut = size(sharded(trained))
  gradient = send('all-reduce', size(trained) - cut, devices) + students * (
    send('reduce-scatter', cut, shards)
    + send('all-reduce', cut / shards, devices // shards)
  )
  statistics = 0
  if is_first and executor.is_replicated:
    statistics = size(variables.batch_stats.values())
  elif is_first:
    channels = sum(
      x.shape[-1]
      for path, x in variables.batch_stats.items()
      if path.endswith('mean')
    )
    statistics = students * 2 * 2 * _FLOAT_BYTES * channels
  return {
    'gradient': gradient,
    'statistics': send('all-reduce', statistics, devices),
    'parameters': passes
    * send('all-gather', size(sharded(variables.params.values())), shards),
  }


def run(options: Options) -> dict[str, Any]:
  """Measures, prints the table, writes the file, and returns what is in it.

  Raises:
    ValueError: if nothing is left to run, or the batch does not divide.
  """
  simulates, counts = _device_counts(options.devices)
  combinations = [
    {'executor': executor, 'fsdp': shards, 'devices': count}
    for executor in options.executors
    for shards in options.fsdp
    for count in counts
    if count % shards == 0 and (executor == 'pjit' or shards == 1)
  ]
  if not combinations:
    raise ValueError(
      f'No number of {list(counts)} devices divides by fsdp of'
      f' {list(options.fsdp)}, with {", ".join(options.executors)}.'
    )
  for count in counts:
    if options.batch_size % count:
      raise ValueError(
        f'A batch of {options.batch_size} does not divide over {count} devices.'
      )
  about, rows = {}, []
  for combination in combinations:
    logging.info('%s ...', combination)
    row = _run_child(options, combination, simulates)
    about = row.pop('about')
    rows.append(row)
  result = {**about, 'simulated': simulates, 'rows': rows}
  print(', '.join(f'{name} {value}' for name, value in about.items()))
  print(table(rows))
  if options.json:
    text = json.dumps(result, indent=2) + '\n'
    paths.expanded(options.json).write_text(text)
  return result


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the rows as text for people; bytes are those of one device."""
  lines = []
  for phase in dict.fromkeys(name for row in rows for name in row['phases']):
    lines += [
      '',
      f'{phase:9}{"executor":>9}{"fsdp":>5}{"devices":>8}{"ms/step":>10}'
      f'{"spread":>8}{"ops":>6}{"small":>6}'
      + ''.join(f'{kind[-14:] + ", MB":>19}' for kind in collectives.KINDS[:3])
      + f'{"sent, MB":>10}{"fewest":>10}{"times":>7}',
    ]
    for row in rows:
      if phase in row['phases']:
        lines.append(_line(row, row['phases'][phase]))
  return '\n'.join(lines[1:])


def _line(row, phase):
  seconds = phase['seconds']
  took = f'{1e3 * seconds:10.1f}{phase["spread"]:8.1%}' if seconds else ' ' * 18
  times = f'{phase["over_fewest"]:7.2f}' if phase['over_fewest'] else ''
  megabytes = ''.join(
    f'{phase["kinds"].get(kind, {}).get("bytes", 0) / 1e6:19.3f}'
    for kind in collectives.KINDS[:3]
  )
  return (
    f'{"":9}{row["executor"]:>9}{row["fsdp"]:5}{row["devices"]:8}{took}'
    f'{phase["count"]:6}{phase["small"]:6}{megabytes}'
    f'{phase["wire_bytes"] / 1e6:10.3f}'
    f'{sum(phase["fewest"].values()) / 1e6:10.3f}{times}'
  )


def _device_counts(devices):
  """Returns whether they are simulated, and their numbers."""
  if devices:
    return True, tuple(devices)
  # In a process of its own: an accelerator has one user at a time.
  done = subprocess.run(
    [sys.executable, '-c', _PROBE], check=True, stdout=subprocess.PIPE,
    text=True,
  )  # fmt: skip
  backend, count = done.stdout.split()[-2:]
  return (True, SIMULATED) if backend == 'cpu' else (False, (int(count),))


def _run_child(options, combination, simulates):
  environment = dict(os.environ)
  if simulates:
    count = combination['devices']
    others = [
      flag
      for flag in environment.get('XLA_FLAGS', '').split()
      if not flag.startswith(_DEVICES_FLAG)
    ]
    if options.compile_only:
      # Of LLVM's work alone; the HLO, and its collectives, are the same.
      others.append('--xla_backend_optimization_level=0')
    environment |= {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': ' '.join([*others, f'{_DEVICES_FLAG}={count}']),
      # With fewer threads, collectives in flight deadlock.
      'NPROC': str(max(2 * count, len(os.sched_getaffinity(0)))),
    }
  task = json.dumps({'options': dataclasses.asdict(options), **combination})
  done = subprocess.run(
    [sys.executable, '-c', _CHILD, task], env=environment, check=True,
    stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  return json.loads(done.stdout.splitlines()[-1])


def child(task: str) -> None:
  """Measures one combination in this process; prints it as JSON."""
  task = json.loads(task)
  options = Options(**task['options'])
  cpu.keep_freed_memory()
  make = (
    models.create_abstract_model
    if options.compile_only
    else models.create_model
  )
  model = make(**options.model)
  executor = _Recorder(
    config_lib.ParallelConfig(task['executor'], task['fsdp']),
    is_abstract=options.compile_only,
  )
  ways, phases = [], {}
  for name, phase in _phases(model, options.image_size, executor).items():
    start = time.perf_counter()
    call = _step(phase, model, options)
    executor.calls.clear()
    jax.block_until_ready(call())
    compiling = time.perf_counter() - start
    phases[name] = {
      'seconds': None,
      'spread': None,
      'compile_seconds': compiling,
      **_summary(executor.calls, fewest(model, phase.name, executor)),
    }
    ways.append(timing.Way('scaling', name, options.batch_size, 0, call))
  if not options.compile_only:
    for row in timing.time_in_turn(ways, options.seconds):
      phases[row.name] |= {'seconds': row.median, 'spread': row.spread}
  print(
    json.dumps(
      {
        'about': _about(model, options),
        'executor': task['executor'],
        'fsdp': task['fsdp'],
        'devices': executor.mesh.size,
        'phases': phases,
      }
    )
  )


def _summary(calls, fewest):
  everything = [c for _, found in calls for c in found]
  kinds = _by_kind(everything)
  sent, least = sum(c.wire_bytes for c in everything), sum(fewest.values())
  return {
    'count': len(everything),
    'small': sum(c.bytes < SMALL_BYTES for c in everything),
    'kinds': kinds,
    'wire_bytes': sent,
    'fewest': fewest,
    'over_fewest': sent / least if least else None,
    'programs': [
      {'name': name, 'kinds': _by_kind(found)} for name, found in calls
    ],
  }


def _by_kind(found: Iterable[collectives.Collective]):
  kinds = {}
  for one in found:
    sums = kinds.setdefault(one.kind, collections.Counter())
    sums.update(count=1, bytes=one.bytes, wire_bytes=one.wire_bytes)
  return kinds


def _phases(model, image_size, executor):
  common = dict(
    num_steps=_MANY_STEPS, steps_per_epoch=_MANY_STEPS, seed=0,
    executor=executor,
  )  # fmt: skip
  first = config_lib.SupernetConfig(
    num_epochs=1, optimizer=_OPTIMIZER, num_random=_num_random(model)
  )
  second = config_lib.GateConfig(num_epochs=1, optimizer=_OPTIMIZER)
  return {
    'Stage I': supernet.Supernet(first, model, _normalize, **common),
    'Stage II': gate.Gate(
      second, model, _normalize, image_size=image_size, **common
    ),
  }


def _num_random(model):
  return min(2, len(model.sub_networks) - 2)


def _step(phase, model, options):
  """Returns a function that runs the phase's next step."""
  # Steps donate their state; `put` makes the copy.
  state = phase.init(models.variables_of(model))
  rng = np.random.default_rng(0)
  shape = (options.batch_size, options.image_size, options.image_size, 3)
  if options.compile_only:
    images = np.broadcast_to(np.uint8(0), shape)
  else:
    images = rng.integers(0, 256, shape).astype(np.uint8)
  labels = rng.integers(0, 3, options.batch_size).astype(np.int32)
  batch = {'images': images, 'labels': labels}

  def step():
    nonlocal state
    # The same draw every time, so that everything is compiled once.
    state, metrics = phase.step(state, batch, 0)
    return () if options.compile_only else (state, metrics)

  return step


def _normalize(images):
  return data.normalize(images, mean=(0.5,) * 3, std=(0.25,) * 3)


def _about(model, options):
  variables = models.variables_of(model)

  def count(arrays):
    return sum(math.prod(x.shape) for x in arrays)

  between = model.sub_networks[1:-1]
  draw = supernet.draw(between, _num_random(model), seed=0, step=0)
  students = [model.widest, *draw, model.narrowest]
  madds = [model.cost(s, options.image_size).madds for s in students]
  device = jax.devices()[0]
  return {
    'model': options.model['name'],
    'image_size': options.image_size,
    'batch_size': options.batch_size,
    'parameters': count(variables.params.values()),
    'head_parameters': count(gate.head_of(variables).values()),
    'statistics': count(variables.batch_stats.values()),
    # The teacher runs forward; a gradient is three times a forward pass.
    'madds_per_image': madds[0] + 3 * sum(madds),
    'device': f'{device.platform}: {device.device_kind}',
    'cores': len(os.sched_getaffinity(0)),
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
  }


def main(argv: Sequence[str] | None = None) -> None:
  """Parses the command line and runs."""
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  defaults = {f.name: f.default for f in dataclasses.fields(Options)}
  parser = argparse.ArgumentParser(prog='python -m ds_jax.benchmark.scaling')
  parser.add_argument('--model', choices=models.list_models(), required=True)
  parser.add_argument('--num_classes', type=int, default=1000)
  parser.add_argument('--image_size', type=int, help='pixels a side')
  parser.add_argument('--batch_size', type=int, default=defaults['batch_size'])
  parser.add_argument('--devices', type=_numbers, help='simulated, as 1,2,4,8')
  parser.add_argument('--executors', type=_names, default=config_lib.EXECUTORS)
  parser.add_argument('--fsdp', type=_numbers, default=defaults['fsdp'])
  parser.add_argument(
    '--seconds', type=float, default=defaults['seconds'],
    help='for the steps of a combination',
  )  # fmt: skip
  parser.add_argument(
    '--compile_only', action='store_true', help='run nothing, time nothing'
  )
  parser.add_argument('--json', help='also writes a file')
  given = vars(parser.parse_args(argv))
  name, num_classes = given.pop('model'), given.pop('num_classes')
  size = given.pop('image_size') or models.image_size(name)
  sized = models.size_options(name, size)
  model = dict(name=name, num_classes=num_classes, **sized)
  run(Options(model=model, image_size=size, **given))


def _numbers(text):
  return tuple(int(number) for number in text.split(','))


def _names(text):
  return tuple(text.split(','))


if __name__ == '__main__':
  main()

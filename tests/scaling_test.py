"""The scaling benchmark reads programs right, and its bytes add up."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import micro
from ds_jax import config as config_lib
from ds_jax import models
from ds_jax.benchmark import collectives, scaling

MODEL = dict(
  micro.MODEL,
  stem_widths=(4,),
  stages=(dict(widths=(4, 6, 8)),),
  gate_stage=0,
)

HEADER = 'HloModule jit_f, is_scheduled=true, num_partitions=8\n'


def read_one(line):
  (found,) = collectives.read(f'{HEADER}  {line}\n')
  return found.kind, found.bytes, found.group_size


@pytest.mark.parametrize(
  'line, expected',
  [
    (
      '%ar.1 = f32[10,20]{1,0} all-reduce(%x), channel_id=1,'
      ' replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add',
      ('all-reduce', 800, 4),
    ),
    (
      'ROOT %ar = (f32[3]{0}, bf16[2,2]{1,0:T(8,128)(2,1)}, /*index=2*/f32[])'
      ' all-reduce(%a, %b, %c), replica_groups=[2,4]<=[8], to_apply=%add',
      ('all-reduce', 12 + 8 + 4, 4),
    ),
    (
      'ag = f32[16,8]{1,0} all-gather(x), replica_groups=[4,2]<=[2,4]T(1,0),'
      ' dimensions={0}, use_global_device_ids=true',
      ('all-gather', 512, 2),
    ),
    (
      "%ar = f32[5]{0} all-reduce(%x), replica_groups=mesh['data'=4,'fsdp'=2]"
      " {'data'}, to_apply=%add",
      ('all-reduce', 20, 4),
    ),
    (
      "%ag = f32[8]{0} all-gather(%x), replica_groups=mesh['a'=4,'b'=2],"
      " device_ids=([2,4]T(1,0)) {'a':(1)2,'b'}, dimensions={0}",
      ('all-gather', 32, 4),
    ),
    (
      '%rs = f32[4]{0} reduce-scatter(%x), replica_groups={}, dimensions={0},'
      ' to_apply=%add',
      ('reduce-scatter', 8 * 16, 8),
    ),
    (
      '%aa = (s8[4]{0}, s8[4]{0}) all-to-all(%x, %y), replica_groups={{0,1}}',
      ('all-to-all', 8, 2),
    ),
    (
      '%cp = u32[6]{0} collective-permute(%x),'
      ' source_target_pairs={{0,1},{1,2},{2,0}}',
      ('collective-permute', 24, 3),
    ),
    (
      '%s = f32[100]{0} all-reduce-start(%x), replica_groups={{0,1}},'
      ' to_apply=%add',
      ('all-reduce', 400, 2),
    ),
    (
      '%s = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), dimensions={0},'
      ' replica_groups={{0,1}}',
      ('all-gather', 32, 2),
    ),
    (
      '%s = ((f32[4]{0}, f32[]), (f32[8]{0}, f32[2]{0})) all-gather-start(%x,'
      ' %y), dimensions={0}, replica_groups={{0,1}}',
      ('all-gather', 40, 2),
    ),
    (
      '%s = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x),'
      ' source_target_pairs={{0,1}}',
      ('collective-permute', 16, 2),
    ),
  ],
)
def test_reads_kind_bytes_and_group(line, expected):
  assert read_one(line) == expected


@pytest.mark.parametrize(
  'line',
  [
    '%d = f32[8]{0} all-gather-done(%s)',
    '%f = f32[8]{0} fusion(%all-reduce.1), kind=kLoop, calls=%fused',
    '%t = f32[8]{0} get-tuple-element(%all-reduce), index=0',
    '%m = f32[8]{0} add(%a, %b), metadata={op_name="x = f all-reduce(y)"}',
    '%region_all-reduce (a: f32[], b: f32[]) -> f32[] {',
  ],
)
def test_other_lines_are_no_collectives(line):
  assert collectives.read(HEADER + line) == []


def test_a_collective_in_a_loop_is_listed_once():
  text = f"""{HEADER}
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %ar = f32[4]{{0}} all-reduce(%x), replica_groups={{}}, to_apply=%add
}}
ENTRY %main () -> f32[4] {{
  %w = (s32[], f32[4]{{0}}) while(%t), condition=%c, body=%body
}}
"""
  assert collectives.read(text) == [collectives.Collective('all-reduce', 16, 8)]


def test_unreadable_groups_are_an_error():
  with pytest.raises(ValueError, match='groups'):
    read_one('%ar = f32[4]{0} all-reduce(%x), replica_groups=@later')


@pytest.mark.parametrize(
  'kind, expected',
  [
    ('all-reduce', 1500),
    ('all-gather', 750),
    ('reduce-scatter', 750),
    ('all-to-all', 750),
    ('collective-permute', 1000),
  ],
)
def test_a_ring_of_four_sends(kind, expected):
  assert collectives.Collective(kind, 1000, 4).wire_bytes == expected


def test_nothing_is_sent_by_one_device():
  assert collectives.Collective('all-reduce', 1000, 1).wire_bytes == 0


def test_a_compiled_sum_has_its_bytes():
  mesh = Mesh(np.array(jax.devices()), ('d',))
  spec = PartitionSpec('d')

  def total(x):
    return jax.lax.psum(x[0], 'd')

  program = jax.jit(
    jax.shard_map(total, mesh=mesh, in_specs=spec, out_specs=PartitionSpec())
  )
  text = program.lower(jnp.ones((8, 1000))).compile().as_text()
  assert collectives.read(text) == [
    collectives.Collective('all-reduce', 4000, 8)
  ]


def test_a_compiled_gather_over_one_axis_has_its_bytes():
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ('data', 'fsdp'))
  whole = NamedSharding(mesh, PartitionSpec())
  cut = NamedSharding(mesh, PartitionSpec(None, 'fsdp'))
  x = jax.ShapeDtypeStruct((3, 8), jnp.float32, sharding=cut)
  text = jax.jit(lambda x: x, out_shardings=whole).lower(x).compile().as_text()
  assert collectives.read(text) == [collectives.Collective('all-gather', 96, 4)]


@pytest.mark.parametrize('is_replicated, shards', [(False, 4), (True, 1)])
def test_the_fewest_bytes_are_those_of_a_sum_by_hand(is_replicated, shards):
  model = models.create_abstract_model('ds_resnet50', 10)
  params = {
    path: math.prod(x.get_value().shape)
    for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }
  executor = scaling._Recorder(
    config_lib.ParallelConfig('pmap' if is_replicated else 'pjit', shards),
    is_abstract=True,
  )
  found = scaling.fewest(model, 'supernet', executor)
  trained = 4 * sum(n for path, n in params.items() if 'slim' not in path)
  if is_replicated:
    assert found['gradient'] == pytest.approx(2 * 7 / 8 * trained)
    assert found['parameters'] == 0
  else:
    # Teacher, widest, two random ones and the narrowest; nearly everything is
    # in four shards.
    gathered = 5 * 3 / 4 * 4 * sum(params.values())
    assert 0.9 * gathered < found['parameters'] < gathered
    scattered = 4 * (3 / 4 + 2 * 1 / 2 / 4) * trained
    assert 0.9 * scattered < found['gradient'] < 1.1 * scattered


@pytest.fixture(scope='module')
def result(tmp_path_factory):
  """What the command wrote of two replicas."""
  path = tmp_path_factory.mktemp('scaling') / 'scaling.json'
  options = scaling.Options(
    model=MODEL, image_size=8, batch_size=4, devices=(2,), fsdp=(1, 2),
    executors=('pmap',), seconds=0, json=str(path),
  )  # fmt: skip
  returned = scaling.run(options)
  written = json.loads(path.read_text())
  assert written == returned
  return written


def test_the_file_holds_every_field(result):
  assert {
    'model', 'image_size', 'batch_size', 'parameters', 'head_parameters',
    'statistics', 'madds_per_image', 'device', 'cores', 'jax', 'jaxlib',
    'simulated', 'rows',
  } == result.keys()  # fmt: skip
  (row,) = result['rows']  # fsdp=2 does not fit pmap
  assert (row['executor'], row['fsdp'], row['devices']) == ('pmap', 1, 2)
  assert row['phases'].keys() == {'Stage I', 'Stage II'}
  for phase in row['phases'].values():
    assert phase.keys() == {
      'seconds', 'spread', 'compile_seconds', 'count', 'small', 'kinds',
      'wire_bytes', 'fewest', 'over_fewest', 'programs',
    }  # fmt: skip
    assert phase['seconds'] > 0
    assert phase['over_fewest'] >= 1
    assert phase['count'] == phase['small'] > 0
    for kind, sums in phase['kinds'].items():
      for field, value in sums.items():
        assert value == sum(
          program['kinds'].get(kind, {}).get(field, 0)
          for program in phase['programs']
        )


def test_a_step_runs_the_teacher_then_the_students_then_the_update(result):
  programs = result['rows'][0]['phases']['Stage I']['programs']
  names = [p['name'] for p in programs if p['name'] != 'lambda']
  assert [name.split()[0] for name in names] == [
    'soft_targets', 'widest_pass', 'student_pass', 'student_pass',
    'apply_gradient',
  ]  # fmt: skip
  assert names[-2] == 'student_pass 0'


def test_replicas_reduce_the_gradient_once_and_little_else(result):
  model = models.create_abstract_model(**MODEL)
  count = {
    kind: sum(x.size for x in jax.tree.leaves(nnx.state(model, kind)))
    for kind in (nnx.Param, nnx.BatchStat)
  }
  first = result['rows'][0]['phases']['Stage I']
  assert first['kinds'].keys() == {'all-reduce'}
  # Metrics: the widest's loss and accuracy, and two students' losses.
  extras = 4 * (count[nnx.BatchStat] + 2 + 1 + 1)
  assert first['kinds']['all-reduce']['bytes'] == 4 * count[nnx.Param] + extras
  assert first['wire_bytes'] == 4 * count[nnx.Param] + extras  # in a ring of 2


def test_the_table_has_a_line_for_each_stage_and_row(result):
  text = scaling.table(result['rows'])
  assert sum('pmap' in line for line in text.splitlines()) == 2
  assert 'Stage II' in text


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(executors=('pmap',), fsdp=(2,)), 'fsdp'),
    (dict(batch_size=6), 'does not divide'),
  ],
)
def test_a_combination_that_can_not_run_is_an_error(changes, message):
  options = dict(
    model=MODEL, image_size=8, batch_size=8, devices=(4,), fsdp=(1,)
  )
  with pytest.raises(ValueError, match=message):
    scaling.run(scaling.Options(**{**options, **changes}))

"""A gate over some of the sub-networks, from the model to the exported file.

All sub-networks stay; what routes knows the gate's alone.
"""

import jax
import numpy as np
import optax
import pytest

import fixed
import micro
import routed
from ds_jax import config as config_lib
from ds_jax import (
  convert,
  evaluation,
  export,
  inference,
  models,
  parallel,
  routing,
)
from ds_jax.train import gate, supernet

BUCKETS = (0, 2)


@pytest.fixture(scope='module')
def images():
  return routed.make_images(24)


@pytest.fixture(scope='module')
def model(images):
  return routed.make_model(images, gate_buckets=BUCKETS)


@pytest.fixture(scope='module')
def whole(model):
  """The same weights, and a gate over all."""
  model_of_all = models.create_abstract_model(**micro.MODEL)
  variables = models.variables_of(model)
  head = 'stages/1/0/gate/slim/kernel'
  params = {**variables.params, head: np.zeros((1, 3), np.float32)}
  return models.Architecture(model_of_all).bind(
    variables.replace(params=params)
  )


@pytest.fixture(scope='module')
def logits(whole, images):
  """Of all sub-networks, (4, N, C)."""
  floats = routed.as_floats(images)
  return np.stack([whole(floats, s) for s in whole.sub_networks])


@pytest.fixture(scope='module')
def chosen(model, images):
  """The gate's bucket of each image, among all sub-networks."""
  gate_logits = model.gate_logits(model.trunk(routed.as_floats(images)))
  assert gate_logits.shape == (24, 2)
  found = np.take(BUCKETS, np.asarray(gate_logits).argmax(-1))
  assert set(found.tolist()) == set(BUCKETS)
  return found


def make_predictor(model, **options):
  return inference.Predictor(
    model, image_size=8, mean=(0.4,) * 3, std=(0.2,) * 3, **options
  )


def outcomes_of(model, images, logits):
  gate_logits = model.gate_logits(model.trunk(routed.as_floats(images)))
  return routing.observe(
    np.asarray(gate_logits),
    np.stack([logits[k] for k in BUCKETS], axis=1),
    logits[3].argmax(-1),
  )


def test_all_sub_networks_are_as_without_it(model, whole, images, logits):
  assert model.sub_networks == whole.sub_networks
  assert model.routing_space == tuple(whole.sub_networks[k] for k in BUCKETS)
  assert (model.narrowest, model.widest) == (whole.narrowest, whole.widest)
  for subnet, expected in zip(model.sub_networks, logits, strict=True):
    found = model(routed.as_floats(images), subnet)
    np.testing.assert_array_equal(found, expected)
    assert model.cost(subnet, 8) == whole.cost(subnet, 8)


@pytest.mark.parametrize('name', ['ds_resnet26_cifar', 'ds_vit_cifar'])
def test_every_family_has_it(name):
  model = models.create_abstract_model(name, 10, gate_buckets=[1, 3])
  assert [s.index for s in model.routing_space] == [1, 3]
  assert len(model.sub_networks) == 4

  def gate_logits(variables, images):
    bound = models.Architecture(model).bind(variables)
    return bound.gate_logits(bound.trunk(images))

  images = jax.ShapeDtypeStruct((5, 32, 32, 3), np.float32)
  variables = models.variables_of(model)
  assert jax.eval_shape(gate_logits, variables, images).shape == (5, 2)


@pytest.mark.parametrize('buckets', [(), (1,), (2, 0), (0, 0), (0, 3)])
def test_buckets_that_make_no_gate_are_refused(buckets):
  # The fourth has a trunk of its own.
  with pytest.raises(
    ValueError, match='two or more of the sub-networks 0 to 2'
  ):
    models.create_abstract_model(**micro.MODEL, gate_buckets=buckets)


def test_a_predictor_routes_to_them_alone(model, images, logits, chosen):
  predictor = make_predictor(model)
  found = predictor(images)
  np.testing.assert_array_equal(found.buckets, chosen)
  np.testing.assert_allclose(
    found.logits, logits[chosen, np.arange(24)], rtol=1e-4, atol=1e-5
  )
  costs = np.array([model.cost(s, 8).madds for s in model.sub_networks])
  np.testing.assert_array_equal(found.madds, costs[chosen])
  # Prepared for buckets alone.
  assert set(predictor.weights) == {'trunk', 'gate', '0', '2'}
  for k in range(4):
    forced = predictor(images, subnet=k)
    assert (forced.buckets == k).all() and (forced.madds == costs[k]).all()
    np.testing.assert_allclose(forced.logits, logits[k], rtol=1e-4, atol=1e-5)


def test_a_cascade_climbs_from_one_to_the_other(model, images, logits):
  predictor = make_predictor(
    model, held_out=outcomes_of(model, images, logits), has_gate=False
  )
  cheap, dear = (model.cost_in_parts(s, 8) for s in model.routing_space)
  everything = (cheap[0] + cheap[1] + dear[1]).madds
  cascade = predictor.with_budget(
    madds=everything, router='cascade', ladder=BUCKETS
  )
  found = cascade(images)
  assert (found.buckets == 2).all() and (found.madds == everything).all()
  np.testing.assert_allclose(found.logits, logits[2], rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match=r'of the buckets \(0, 2\), rising'):
    predictor.with_budget(madds=everything, router='cascade', ladder=(0, 1))


def test_an_evaluation_has_all_and_routes_to_them(
  model, images, logits, chosen
):
  labels = logits[3].argmax(-1)
  batch = {'images': images, 'labels': labels, 'mask': np.ones(24, bool)}
  executor = parallel.Executor()
  evaluator = evaluation.Evaluator(model, routed.as_floats, executor)
  variables = executor.put(models.variables_of(model))
  sweep = evaluator.sweep(variables, [batch])
  right = logits.argmax(-1) == labels
  np.testing.assert_array_equal(sweep.top1, right)
  results = evaluation.summarize(
    sweep, model, 8, gate_target=routing.GateTarget()
  )
  assert len(results['subnets']) == 4 and results['buckets'] == [0, 2]
  assert results['routed']['top1'] == right[chosen, np.arange(24)].mean()
  shares = [(chosen == k).mean() for k in BUCKETS]
  np.testing.assert_allclose(results['routed']['shares'], shares)
  largest = results['routers']['gate'][-1]
  np.testing.assert_allclose(largest['madds'], results['subnets'][2]['madds'])
  assert f'0: {shares[0]:.1%}, 2: {shares[1]:.1%}' in evaluation.table(results)


def test_stage_one_draws_from_all_and_stage_two_trains_a_head_for_them(
  model, images
):
  sgd = config_lib.OptimizerConfig('sgd', learning_rate=0.1)
  common = {
    'num_steps': 8,
    'steps_per_epoch': 8,
    'seed': 0,
    'executor': parallel.Executor(),
  }
  first = supernet.Supernet(
    config_lib.SupernetConfig(1, sgd, num_random=1),
    model,
    routed.as_floats,
    **common,
  )
  drawn = {s.index for step in range(20) for s in first.draw(step)}
  assert drawn == {1, 2}
  second = gate.Gate(
    config_lib.GateConfig(1, sgd),
    model,
    routed.as_floats,
    image_size=8,
    **common,
  )
  before = models.variables_of(model)
  state = second.init(before)
  labels = np.arange(24) % 3
  state, metrics = second.step(state, {'images': images, 'labels': labels}, 0)
  costs = [model.cost(s, 8).madds for s in model.routing_space]
  assert min(costs) <= metrics['madds'] <= max(costs)
  (head,) = state.head.values()
  assert head.shape[-1] == 2
  moved = optax.tree.sub(state.head, gate.head_of(before))
  assert optax.tree.norm(moved) > 0


@pytest.mark.parametrize('subnet', [None, 1, 2, 3])
def test_an_export_says_the_same(model, images, tmp_path, subnet):
  # A sub-network needs no trained gate.
  predictor = make_predictor(model, has_gate=subnet is None)
  export.save(predictor, tmp_path / 'network', batch_size=16, subnet=subnet)
  found = export.load(tmp_path / 'network')(images)
  expected = predictor(images, subnet=subnet)
  np.testing.assert_array_equal(found.buckets, expected.buckets)
  np.testing.assert_array_equal(found.madds, expected.madds)
  np.testing.assert_allclose(
    found.logits, expected.logits, rtol=1e-4, atol=1e-5
  )


def test_a_head_for_other_buckets_is_not_taken_over(model, whole):
  source = fixed.random_variables(whole)
  found = models.variables_of(convert.from_network(source, model))
  head = 'stages/1/0/gate/slim/kernel'
  np.testing.assert_array_equal(
    found.params[head], models.variables_of(model).params[head]
  )
  for path in source.params.keys() - {head}:
    np.testing.assert_array_equal(found.params[path], source.params[path])

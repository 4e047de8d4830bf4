"""Tests of the table of a model's sub-networks."""

import contextlib
import io
import json

import pytest
from absl.testing import parameterized

from ds_jax import models, summary


def run(*arguments):
  """What the command prints."""
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    summary.main([*arguments])
  return printed.getvalue()


class SummaryTest(parameterized.TestCase):
  @parameterized.parameters(*models.list_models())
  def test_every_sub_network_has_a_row(self, name):
    title, header, *rows = run(name).splitlines()
    model, size = models.create_abstract_model(name), models.image_size(name)
    assert title == f'{name}, {size} pixels, 1000 classes'
    assert header.split()[:3] == ['index', 'MAdds', 'parameters']
    for row, subnet in zip(rows, model.sub_networks, strict=True):
      cost = model.cost(subnet, size)
      expected = [str(subnet.index), f'{cost.madds:,}', f'{cost.params:,}']
      assert row.split()[:3] == expected
      assert row.count(' | ') == len(subnet.stages)

  def test_slices_are_named_but_for_the_width(self):
    rows = run('ds_resnet50').splitlines()
    assert rows[2].endswith(
      ' 32 | 128 inner=32 depth=3 | 256 inner=64 depth=4'
      ' | 640 inner=160 depth=4 | 1280 inner=320 depth=3'
    )
    rows = run('ds_vit_s16').splitlines()
    assert ' | 192 heads=3 hidden=384 depth=3 | ' in rows[2]
    assert ' 48 kernel=5 | ' not in run('ds_mobilenet_pp').splitlines()[2]
    assert ' | 168 kernel=5 | ' in run('ds_mobilenet_pp').splitlines()[-1]

  def test_image_size_and_classes_are_options(self):
    arguments = ('ds_resnet50', '--image_size=64', '--num_classes=7')
    assert run(*arguments).startswith('ds_resnet50, 64 pixels, 7 classes\n')
    model = models.create_abstract_model('ds_resnet50', 7)
    table = json.loads(run(*arguments, '--json'))
    assert [row['madds'] for row in table] == [
      model.cost(s, 64).madds for s in model.sub_networks
    ]

  def test_json_has_the_same_rows(self):
    table = json.loads(run('ds_vit_cifar', '--json'))
    assert table[0]['slices'][0] == '96'
    assert [row['index'] for row in table] == [0, 1, 2, 3]
    assert table == summary.rows(
      models.create_abstract_model('ds_vit_cifar'), 32
    )

  def test_unknown_model_is_refused(self):
    with (
      pytest.raises(SystemExit),
      contextlib.redirect_stderr(io.StringIO()) as printed,
    ):
      run('resnet50')
    assert "invalid choice: 'resnet50'" in printed.getvalue()

  def test_a_vit_is_made_for_the_image_size_that_is_asked_for(self):
    title, _, *rows = run('ds_vit_ti16', '--image_size=384').splitlines()
    assert title == 'ds_vit_ti16, 384 pixels, 1000 classes'
    model = models.create_abstract_model('ds_vit_ti16', image_size=384)
    cost = model.cost(model.widest, 384)
    assert rows[-1].split()[1] == f'{cost.madds:,}'

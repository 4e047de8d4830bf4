"""An evaluation's results as a file, as text and as a picture."""

import builtins
import copy
import json
import pathlib
import tempfile
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from ds_jax import evaluation


def point(budget, top1, gain, oracle=0.9):
  return {
    'budget': budget,
    'madds': budget + 1,
    'madds_error': 0.5,
    'top1': top1,
    'hull': top1 - gain,
    'oracle': oracle,
    'gain': gain,
    'gain_error': 0.01,
    'captured': 0.1,
  }


# Two buckets of 400 and 1,000 MAdds, and a widest of 2,000 that is none.
RESULTS = {
  'num_images': 200,
  'subnets': [
    {'index': 0, 'madds': 400, 'params': 10, 'top1': 0.5, 'top5': 0.75},
    {'index': 1, 'madds': 1000, 'params': 20, 'top1': 0.625, 'top5': 0.875},
    {'index': 2, 'madds': 2000, 'params': 30, 'top1': 0.6875, 'top5': 0.9375},
  ],
  'buckets': [0, 1],
  'routed': {
    'top1': 0.6, 'top5': 0.8, 'madds': 550.0, 'shares': [0.75, 0.25],
  },
  'static_hull': {'top1': 0.53125, 'madds': 550.0},
  'best_static': {'index': 0, 'madds': 400, 'top1': 0.5},
  'random': {'top1': 0.531, 'madds': 550.0},
  'oracle': {'top1': 0.7, 'madds': 460.0, 'shares': [0.9, 0.1]},
  'budgets_set_on': 'held-out images',
  'routers': {
    # A share of 0.6 is 600 MAdds, up to rounding.
    'gate': [
      point(400.0, 0.5, 0.0),
      point(0.6 * 1000, 0.61, 0.0683),
      point(1000.0, 0.625, 0.0),
    ],
    'cascade, margin': [point(800.0, 0.6111, -0.0222)],
  },
}  # fmt: skip


def row(text, name):
  """The words of the one line that begins with a name."""
  (line,) = [
    line.removeprefix(name)
    for line in map(str.strip, text.splitlines())
    if line.startswith(name)
  ]
  return line.split()


class TableTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.text = evaluation.table(RESULTS)

  @parameterized.parameters(
    ('subnet 0', ['50.00', '75.00', '400', '20.0%']),
    ('subnet 1', ['62.50', '87.50', '1,000', '50.0%']),
    ('subnet 2', ['68.75', '93.75', '2,000', '100.0%']),
    ('routed', ['60.00', '80.00', '550', '27.5%']),
    # These have no top-5.
    ('static_hull', ['53.12', '550', '27.5%']),
    ('best_static', ['50.00', '400', '20.0%']),
    ('random', ['53.10', '550', '27.5%']),
    ('oracle', ['70.00', '460', '23.0%']),
    ('Images per bucket:', ['0:', '75.0%,', '1:', '25.0%']),
  )
  def test_sub_networks_and_what_the_gate_makes_of_them(self, name, words):
    assert row(self.text, name) == words

  def test_routers_at_shares_of_the_largest_bucket(self):
    # Not of the widest network, which is no bucket.
    shares = row(self.text, '20%')
    assert shares == ['30%', '40%', '50%', '60%', '80%', '100%']
    empty = ['-', '-']
    gate = [*empty, '50.00', '+0.00', '-', '61.00', '+6.83', '-']
    assert row(self.text, 'gate') == [*gate, '62.50', '+0.00']
    cascade = [*empty, '-', '-', '-', '61.11', '-2.22', '-']
    assert row(self.text, 'cascade, margin') == cascade
    assert 'budgets set on the held-out images' in self.text

  def test_a_column_is_a_share(self):
    header, gate = (
      next(line for line in self.text.splitlines() if word in line)
      for word in ('30%', 'gate ')
    )
    for share, cell in (('40%', '+0.00'), ('60%', '+6.83'), ('30%', ' -')):
      assert gate[: header.index(share) + len(share)].endswith(cell)


class WriteTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def names(self):
    return sorted(path.name for path in self.folder.iterdir())

  def test_file_holds_the_results_and_nothing_half_written_stays(self):
    (self.folder / 'results.json').write_text('before')
    with mock.patch('ds_jax.evaluation.report.plot') as plot:
      evaluation.write(RESULTS, self.folder)
    assert self.names() == ['results.json']
    found = json.loads((self.folder / 'results.json').read_text())
    assert found == RESULTS
    plot.assert_called_once_with(RESULTS, self.folder / 'routing.png')

  def test_results_that_cannot_be_written_leave_the_file_as_it_was(self):
    (self.folder / 'results.json').write_text('before')
    with pytest.raises(TypeError):
      evaluation.write({**RESULTS, 'routed': object()}, self.folder)
    assert (self.folder / 'results.json').read_text() == 'before'
    assert 'results.partial' not in self.names()

  def test_without_matplotlib_it_says_how_to_get_it(self):
    real = builtins.__import__

    def importer(name, *args, **options):
      if name.partition('.')[0] == 'matplotlib':
        raise ImportError(name)
      return real(name, *args, **options)

    with (
      mock.patch.object(builtins, '__import__', importer),
      self.assertLogs('absl', 'INFO') as logs,
    ):
      evaluation.write(RESULTS, self.folder)
    assert "pip install -e '.[plot]'" in logs.output[0]
    assert self.names() == ['results.json']

  def test_write_draws_where_matplotlib_is_installed(self):
    pytest.importorskip('matplotlib')
    evaluation.write(RESULTS, self.folder)
    assert self.names() == ['results.json', 'routing.png']
    assert (self.folder / 'routing.png').read_bytes()[:4] == b'\x89PNG'


class PlotTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.figure = pytest.importorskip('matplotlib.figure')

  def draw(self, results):
    """The axes that were drawn."""
    drawn = []

    class Figure(self.figure.Figure):
      def savefig(self, *args, **options):
        drawn.append((self, args, options))

    with mock.patch.object(self.figure, 'Figure', Figure):
      evaluation.plot(results, pathlib.Path('somewhere.png'))
    ((canvas, (path,), _),) = drawn
    assert path == pathlib.Path('somewhere.png')
    (axes,) = canvas.axes
    return axes

  def test_every_router_is_drawn_beside_the_buckets_and_the_oracle(self):
    axes = self.draw(RESULTS)
    handles, labels = axes.get_legend_handles_labels()
    lines = {
      label: getattr(handle, 'lines', [handle])[0].get_xydata().tolist()
      for handle, label in zip(handles, labels, strict=True)
    }
    expected = {
      # The widest network is no bucket.
      'static sub-networks': [[0.4, 50], [1, 62.5]],
      'hull': [[0.4, 50], [1, 62.5]],
      'gate': [[0.401, 50], [0.601, 61], [1.001, 62.5]],
      'cascade, margin': [[0.801, 61.11]],
      'oracle': [[0.401, 90], [0.601, 90], [1.001, 90]],
    }
    assert lines.keys() == expected.keys()
    for label, points in expected.items():
      assert len(lines[label]) == len(points)
      for found, wanted in zip(lines[label], points, strict=True):
        assert found == pytest.approx(wanted, rel=1e-9), label

  def test_the_hull_passes_over_the_buckets_below_it(self):
    results = copy.deepcopy(RESULTS)
    results['buckets'] = [0, 1, 2, 3]
    results['subnets'] = [
      {'madds': madds, 'top1': top1}
      for madds, top1 in ((400, 0.5), (500, 0.5), (800, 0.6), (1000, 0.55))
    ]
    buckets, hull = self.draw(results).lines[:2]
    assert (buckets.get_label(), hull.get_label()) == (
      'static sub-networks',
      'hull',
    )
    # No line joins the buckets themselves.
    assert buckets.get_linestyle() == 'None'
    np.testing.assert_allclose(buckets.get_ydata(), [50, 50, 60, 55])
    # A quarter of the way up at 500 MAdds, and never down.
    np.testing.assert_allclose(hull.get_xdata(), [0.4, 0.5, 0.8, 1])
    np.testing.assert_allclose(hull.get_ydata(), [50, 52.5, 60, 60])

  def test_error_bars_are_the_gain_s(self):
    (container, *_) = self.draw(RESULTS).containers
    (bars,) = container.lines[2]
    for segment in bars.get_segments():
      assert segment[1, 1] - segment[0, 1] == pytest.approx(2)

  def test_a_router_without_points_is_no_error(self):
    results = copy.deepcopy(RESULTS)
    results['routers'] = {'gate': [], **results['routers']}
    assert self.draw(results).lines

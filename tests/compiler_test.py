"""XLA takes the options, which fit the machine."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds_jax import compiler


def test_xla_takes_the_options():
  # Those for AVX-512 are not given on every machine, so they are here.
  options = compiler.WIDE_VECTORS | compiler.SLICES_WHEN_NEEDED
  # XLA:CPU reads the names of this one, too.
  options |= compiler.ONE_GRAPH
  x = np.linspace(-1, 1, 100, dtype=np.float32)
  program = jax.jit(lambda x: jnp.tanh(2 * x), compiler_options=options)
  np.testing.assert_allclose(program(x), np.tanh(2 * x), rtol=1e-6)


def test_an_option_that_this_xla_lacks_is_left_out_with_one_warning(
  monkeypatch, caplog
):
  unknown = {'xla_cpu_no_such_option': 7}
  monkeypatch.setattr(compiler, 'WIDE_VECTORS', compiler.WIDE_VECTORS | unknown)
  monkeypatch.setattr(compiler, '_has_wide_vectors', lambda: True)
  known = {'xla_cpu_prefer_vector_width': 512}
  for _ in range(2):
    assert compiler.options_for_training() == known
    assert compiler.options_for_inference() == known
  warnings = [r for r in caplog.records if 'is left out' in r.message]
  assert len(warnings) == 1 and 'xla_cpu_no_such_option=7' in caplog.text


def test_slices_that_are_made_when_needed_take_less_memory():
  def run(weights, x):
    for weight in weights:
      x = jnp.tanh(x @ weight[:256, :256])
    return x

  weights = [jnp.ones((512, 512))] * 8
  x = jnp.ones((1, 256))

  def temporary(options):
    lowered = jax.jit(run).lower(weights, x)
    stats = lowered.compile(compiler_options=options).memory_analysis()
    return stats.temp_size_in_bytes

  # All eight slices, and one or two.
  assert temporary(None) > 8 * x.nbytes * 256
  assert temporary(compiler.SLICES_WHEN_NEEDED) < 3 * x.nbytes * 256


@pytest.fixture
def cpu_info(tmp_path, monkeypatch):
  info = tmp_path / 'cpuinfo'
  monkeypatch.setattr(compiler, '_CPU_INFO', str(info))
  return info


def test_options_fit_a_cpu(cpu_info):
  assert compiler.options_for_training() is None
  assert compiler.options_for_inference() is None
  slicing = compiler.options_for_inference(slices_weights=True)
  assert slicing == compiler.SLICES_WHEN_NEEDED
  cpu_info.write_text('flags\t\t: fpu avx avx2 f16c')
  assert compiler.options_for_training() is None
  cpu_info.write_text('flags\t\t: fpu avx avx2 avx512f avx512dq')
  assert compiler.options_for_training() == compiler.WIDE_VECTORS
  assert compiler.options_for_inference() == compiler.WIDE_VECTORS
  both = compiler.WIDE_VECTORS | compiler.SLICES_WHEN_NEEDED
  assert compiler.options_for_inference(slices_weights=True) == both


def test_devices_that_say_nothing_of_themselves(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(jax, 'devices', lambda: [object()])
  assert compiler.runtime_version() == ''
  assert compiler.platform() == 'cuda'


@pytest.mark.parametrize(
  'backend, version, expected',
  [
    ('gpu', 'cuda 13000', 'cuda'),
    ('gpu', 'PJRT C API\nROCm 7', 'rocm'),
    ('tpu', 'TPU v5', 'tpu'),
    ('cpu', '<unknown>', 'cpu'),
  ],
)
def test_platform(backend, version, expected, cpu_info, monkeypatch):
  device = mock.Mock()
  device.client.platform_version = version
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  assert compiler.platform() == expected
  assert compiler.options_for_training() is None
  graph = compiler.ONE_GRAPH if expected == 'cuda' else None
  assert compiler.options_for_inference() == graph
  monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_enable_command_buffer=')
  assert compiler.options_for_inference() is None

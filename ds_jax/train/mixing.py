"""Mixup and CutMix: a batch mixed with itself, on the device.

Zhang et al., "mixup" (2018), and Yun et al., "CutMix" (2019), a batch at a
time, as timm's `batch` mode: one share and one box for all rows, and every
row's partner is the one as far from the batch's end as the row is from its
start. With either executor, and on any number of devices, that is the global
batch, or the global micro-batch where gradients are accumulated.

Pixels are mixed as float32, before they are normalised: normalising is affine,
so this is the mixture of the normalised images, and nothing is rounded to
bytes. What is drawn depends on the key, of seed and step, alone.

Calibration reads images as they are: its statistics are those of inference,
where nothing is mixed.

Axes: N batch, H, W, C classes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ds_jax import config as config_lib

# Sets the draws here apart from others of the same step's key.
_STREAM = 0x6D6978


def mix(
  key: jax.Array,
  views: Any,
  labels: jax.Array,
  config: config_lib.DataConfig,
  num_classes: int,
  reverse: Callable[[jax.Array], jax.Array] = lambda rows: rows[::-1],
) -> tuple[Any, jax.Array]:
  """Mixes a batch; all views of it alike.

  Args:
    key: the step's, from which others may draw as well; the same everywhere.
    views: a tree of images (N, H, W, 3), uint8.
    labels: (N,), integers.
    config: how to mix; see `DataConfig.mixes`.
    num_classes: C.
    reverse: takes rows to the same of the batch in reversed order, where the
      rows at hand are not the whole batch (`Executor.reversed_rows`). The row
      in the middle of an odd batch is its own partner.

  Returns:
    The views, float32 (N, H, W, 3) in 0 .. 255, and the labels' probabilities,
    float32 (N, C): each row's own share of its label, its partner's of the
    partner's.
  """
  height, width = jax.tree.leaves(views)[0].shape[1:3]
  pixels, share = draw_shares(
    jax.random.fold_in(key, _STREAM), config, height, width
  )

  def mixed(images):
    own, other = (x.astype(jnp.float32) for x in (images, reverse(images)))
    own_share = pixels.reshape(1, height, width, 1)
    # A share of 0 or 1 gives the one image to the bit.
    return own_share * own + (1 - own_share) * other

  own, other = (
    jax.nn.one_hot(x, num_classes, dtype=jnp.float32)
    for x in (labels, reverse(labels))
  )
  return jax.tree.map(mixed, views), share * own + (1 - share) * other


def draw_shares(
  key: jax.Array, config: config_lib.DataConfig, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
  """Draws how much of a mixture is each image's own.

  Args:
    key: of these draws alone.
    config: how to mix.
    height: H.
    width: W.

  Returns:
    The share in each pixel (H, W), and in the label (), float32: with Mixup the
    same number, Beta(alpha, alpha); with CutMix 0 in a box and 1 around it, and
    what the box leaves of the area; 1 in a batch that is not mixed.
  """
  for_mixing, for_kind, for_share, for_row, for_column = jax.random.split(
    key, 5
  )
  mixes = jax.random.uniform(for_mixing) < config.mix_probability
  cuts = jnp.asarray(config.cutmix_alpha > 0)
  if config.mixup_alpha and config.cutmix_alpha:
    cuts = jax.random.uniform(for_kind) < config.mix_switch_probability
  alpha = jnp.where(cuts, config.cutmix_alpha, config.mixup_alpha)
  share = jax.random.beta(for_share, alpha, alpha, dtype=jnp.float32)

  top, bottom, left, right = cut_box(
    share,
    jax.random.randint(for_row, (), 0, height),
    jax.random.randint(for_column, (), 0, width),
    height,
    width,
  )
  y, x = jnp.arange(height), jnp.arange(width)
  in_rows, in_columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
  in_box = in_rows[:, None] & in_columns[None, :]
  area = (bottom - top) * (right - left)

  pixels = jnp.where(cuts, 1 - in_box.astype(jnp.float32), share)
  share = jnp.where(cuts, 1 - area / (height * width), share)
  return jnp.where(mixes, pixels, 1), jnp.where(mixes, share, 1)


def cut_box(
  share: jax.Array, row: jax.Array, column: jax.Array, height: int, width: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Returns CutMix's box, top <= y < bottom and left <= x < right.

  Its sides are the image's times sqrt(1 - share), in whole pixels, and halved
  to either side of the centre, as in the paper's code and timm; what is outside
  of the image is cut off.

  Args:
    share: (), what the box should leave.
    row: (), of its centre.
    column: (), of its centre.
    height: H.
    width: W.

  Returns:
    Top, bottom, left and right, int32.
  """

  def span(middle, size):
    half = (size * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
    return jnp.clip(middle - half, 0, size), jnp.clip(middle + half, 0, size)

  return *span(row, height), *span(column, width)

"""DS-ViT: a pre-norm ViT, sliced in embedding, heads, hidden units and depth.

Axes: N batch, H, W, T tokens, D embedding, d its active part, K buckets.

The blocks are those of Dosovitskiy et al. (2020) and DeiT (Touvron et al.,
2020). Every stage is a run of blocks with slices of its own:

    y = attention(norm(x[..., :d]), heads=h);  x[..., :d] += y
    y = mlp(norm(x[..., :d]), hidden=m);       x[..., :d] += y

*Idle* slicing leaves `x[..., d:]` as it is: it idles, and a later and wider
stage reads it, so a narrow stage does not cut the embedding for the rest of the
network. *Plain* slicing, for comparison, drops it. A head's width is fixed;
layer norms normalise the active part.

The stages before `gate_stage` are the trunk; the gate reads its tokens. Idle
slicing's exact form and these slice lists are ours: the paper's are not public.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from ds_jax import nn, validation
from ds_jax.models import base, channels
from ds_jax.models import subnet as subnets
from ds_jax.nn import attention

SLICINGS = ('idle', 'plain')
POOLINGS = ('class_token', 'mean')


@dataclasses.dataclass(frozen=True)
class BlockStage:
  """The shape of one run of blocks.

  Attributes:
    widths: slice list of the embedding's active part, narrowest first.
    heads: slice list of attention heads.
    hidden: slice list of the perceptrons' hidden units.
    depths: slice list of how many blocks run.
  """

  widths: tuple[int, ...]
  heads: tuple[int, ...]
  hidden: tuple[int, ...]
  depths: tuple[int, ...]

  def __post_init__(self):
    for field in dataclasses.fields(self):
      object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
    subnets.check_lists(self)

  @property
  def lists(self) -> Mapping[str, tuple[int, ...]]:
    """The slice lists, by the field of `StageSlice` that they are of."""
    return {
      'width': self.widths,
      'heads': self.heads,
      'hidden': self.hidden,
      'depth': self.depths,
    }


@dataclasses.dataclass(frozen=True)
class PatchEmbedding:
  """The slice list of the embedding itself."""

  widths: tuple[int, ...]

  @property
  def lists(self) -> Mapping[str, tuple[int, ...]]:
    """The slice list, by the field of `StageSlice` that it is of."""
    return {'width': self.widths}


class Block(nnx.Module):
  """Attention and a two-layer perceptron, each after a norm and added.

  Attributes:
    head_dim: a head's width.
    fused_attention: see `softmax_attention`.
  """

  def __init__(
    self,
    width: int,
    heads: int,
    hidden: int,
    *,
    head_dim: int,
    drop_rate: float,
    fused_attention: bool,
    rngs: nnx.Rngs,
  ):
    """Makes the full-size block.

    Args:
      width: D, the widest input and output.
      heads: the most heads.
      hidden: the most hidden units.
      head_dim: a head's width, the same in every slice.
      drop_rate: how often stochastic depth leaves out an update.
      fused_attention: see `softmax_attention`.
      rngs: the stream `params` initialises the weights.
    """
    self.head_dim = head_dim
    self.fused_attention = fused_attention
    self._drop_rate = drop_rate
    self.attention_norm = nn.SlicedLayerNorm(width)
    # Head by head a query, a key and a value, so that heads are a prefix.
    self.query_key_value = nn.SlicedDense(
      width, heads * 3 * head_dim, rngs=rngs
    )
    self.project = nn.SlicedDense(heads * head_dim, width, rngs=rngs)
    self.mlp_norm = nn.SlicedLayerNorm(width)
    self.expand = nn.SlicedDense(width, hidden, rngs=rngs)
    self.reduce = nn.SlicedDense(hidden, width, rngs=rngs)

  def __call__(
    self,
    x: jax.Array,
    stage: subnets.StageSlice,
    rng: jax.Array | None = None,
  ) -> jax.Array:
    """Updates x (N, T, d); a key switches stochastic depth on."""
    keys = (None, None) if rng is None else jax.random.split(rng)
    x = x + self._drop(self.attention(x, stage.heads), keys[0])
    return x + self._drop(self.mlp(x, stage.hidden), keys[1])

  def attention(self, x: jax.Array, heads: int) -> jax.Array:
    """The first update of x (N, T, d)."""
    batch, tokens, width = x.shape
    y = self.query_key_value(self.attention_norm(x), heads * 3 * self.head_dim)
    y = y.reshape(batch, tokens, heads, 3, self.head_dim)
    query, key, value = (y[:, :, :, i] for i in range(3))
    y = attention.softmax_attention(
      query, key, value, fused=self.fused_attention
    )
    return self.project(y.reshape(batch, tokens, -1), width)

  def mlp(self, x: jax.Array, hidden: int) -> jax.Array:
    """The second update of x (N, T, d)."""
    y = jax.nn.gelu(self.expand(self.mlp_norm(x), hidden), approximate=False)
    return self.reduce(y, x.shape[-1])

  def _drop(self, update, rng):
    if rng is None or not self._drop_rate:
      return update
    keep = jax.random.bernoulli(rng, 1 - self._drop_rate, (len(update), 1, 1))
    return jnp.where(keep, update / (1 - self._drop_rate), 0)


class VisionTransformer(base.SlicedNetwork):
  """The supernet of attention blocks."""

  def __init__(
    self,
    *,
    num_classes: int,
    image_size: int,
    patch_size: int,
    stages: Sequence[BlockStage | Mapping],
    gate_stage: int,
    gate_buckets: Sequence[int] | None = None,
    head_dim: int = 64,
    slicing: str = 'idle',
    pooling: str = 'class_token',
    gate_hidden: Sequence[int] = (64, 64),
    gate_pooling: str = 'mean_max_std',
    dropout_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    fused_attention: bool = False,
    dtype: str = 'float32',
    rngs: nnx.Rngs,
  ):
    """Makes the full-size parameters.

    Args:
      num_classes: outputs of the classifier.
      image_size: side of the images; it fixes the number of tokens.
      patch_size: side of a patch.
      stages: the stages; mappings are read as `BlockStage(**mapping)`. D is
        the widest slice of all.
      gate_stage: the index of the first stage of the branch. From it on, every
        slice list has K entries, or one for all buckets.
      gate_buckets: the sub-networks that the gate chooses from, two or more
        of the indices 0 to K - 1, rising; None means all K.
      head_dim: a head's width.
      slicing: `idle` or `plain`.
      pooling: what the classifier reads, `class_token` or `mean` (of the
        patches' tokens; then there is no class token).
      gate_hidden: units of the gate's hidden layers; none makes it linear.
      gate_pooling: what the gate reads; see `SlimmingGate`.
      dropout_rate: before the classifier, where a call brings an `rng`.
      drop_path_rate: stochastic depth's, of the last block; it rises linearly
        from 0 at the first, and acts where a call brings an `rng`.
      fused_attention: see `softmax_attention`; for inference alone.
      dtype: what activations are computed in, `float32` or `bfloat16`.
      rngs: the stream `params` initialises the weights.

    Raises:
      ValueError: if the numbers do not make a network or a routing space.
    """
    validation.check_choice('slicing', slicing, SLICINGS)
    validation.check_choice('pooling', pooling, POOLINGS)
    validation.check_range('patch_size', patch_size, low=1)
    validation.check_range('head_dim', head_dim, low=1)
    validation.check_range('drop_path_rate', drop_path_rate, low=0, below=1)
    if image_size % patch_size:
      raise ValueError(
        f'image_size={image_size} is no multiple of patch_size={patch_size}.'
      )
    stages = tuple(
      s if isinstance(s, BlockStage) else BlockStage(**s) for s in stages
    )
    width = max(s.widths[-1] for s in stages)
    embedding = PatchEmbedding(
      (width,) if slicing == 'idle' else stages[0].widths
    )
    super().__init__(
      *subnets.routing_space(embedding, stages, gate_stage),
      num_classes=num_classes,
      gate_buckets=gate_buckets,
      dropout_rate=dropout_rate,
      dtype=dtype,
    )
    if slicing == 'plain':
      _check_plain(self.sub_networks)
    self.specs, self.gate_stage = stages, gate_stage
    self.image_size, self.patch_size = image_size, patch_size
    self.head_dim = head_dim
    self.slicing, self.pooling = slicing, pooling
    self._fused_attention = fused_attention
    self._make_layers(width, drop_path_rate, gate_hidden, gate_pooling, rngs)

  def _make_layers(
    self, width, drop_path_rate, gate_hidden, gate_pooling, rngs
  ):
    self.patches = nn.SlicedDense(3 * self.patch_size**2, width, rngs=rngs)
    init = nnx.initializers.truncated_normal(0.02)
    self.class_token = (
      nnx.Param(init(rngs.params(), (width,)))
      if self.pooling == 'class_token'
      else None
    )
    self.position = nnx.Param(init(rngs.params(), (self.num_tokens, width)))
    depths = [spec.depths[-1] for spec in self.specs]
    rates = iter(_rising_rates(drop_path_rate, sum(depths)))
    self.stages = nnx.List(
      [
        nnx.List(
          [
            Block(
              spec.widths[-1],
              spec.heads[-1],
              spec.hidden[-1],
              head_dim=self.head_dim,
              drop_rate=next(rates),
              fused_attention=self._fused_attention,
              rngs=rngs,
            )
            for _ in range(depth)
          ]
        )
        for spec, depth in zip(self.specs, depths, strict=True)
      ]
    )
    # In plain slicing the trunk's tokens are as narrow as its last stage.
    before = [self.narrowest.stem, *self.narrowest.stages][self.gate_stage]
    self.slim = nn.SlimmingGate(
      before.width if self.slicing == 'plain' else width,
      len(self.routing_space),
      hidden=gate_hidden,
      pooling=gate_pooling,
      rngs=rngs,
    )
    self.norm = nn.SlicedLayerNorm(width)
    self.classifier = nn.SlicedDense(width, self.num_classes, rngs=rngs)

  @property
  def num_tokens(self) -> int:
    """T: one a patch, and the class token where there is one."""
    patches = (self.image_size // self.patch_size) ** 2
    return patches + (self.pooling == 'class_token')

  def trunk(self, images, subnet=None, *, momentum=None, rng=None):
    """See `SlicedNetwork`; returns (N, T, D)."""
    del momentum
    subnet = subnet or self.narrowest
    x = self._embed(self._prepare(images), subnet.stem.width)
    for i in range(self.gate_stage):
      x = self._run_stage(i, x, subnet, rng)
    return x

  def gate_logits(self, features, momentum=None):
    """See `SlicedNetwork`."""
    return self.slim(features, momentum)

  def pooled(self, features, subnet, *, momentum=None, rng=None):
    """See `SlicedNetwork`."""
    del momentum
    x = features
    for i in range(self.gate_stage, len(self.stages)):
      x = self._run_stage(i, x, subnet, rng)
    x = self.norm(x).astype(jnp.float32)
    return x.mean(1) if self.class_token is None else x[:, 0]

  def with_fused_attention(self, fused):
    """See `SlicedNetwork`."""
    other = nnx.merge(*nnx.split(self))
    for stage in other.stages:
      for block in stage:
        block.fused_attention = fused
    return other

  def _embed(self, images, width):
    """Takes images to tokens (N, T, width)."""
    batch, height, image_width, _ = images.shape
    if (height, image_width) != (self.image_size, self.image_size):
      raise ValueError(
        f'Images of {height} x {image_width} pixels: this model is made for'
        f' {self.image_size} x {self.image_size}; see its option image_size.'
      )
    side, size = self.image_size // self.patch_size, self.patch_size
    x = images.reshape(batch, side, size, side, size, 3)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side**2, -1)
    x = self.patches(x, width)
    if self.class_token is not None:
      token = self.class_token[:width].astype(x.dtype)
      token = jnp.broadcast_to(token.reshape(1, 1, -1), (batch, 1, width))
      x = jnp.concatenate([token, x], axis=1)
    return x + self.position[None, :, :width].astype(x.dtype)

  def _run_stage(self, stage, x, subnet, rng):
    stage_slice = subnet.stages[stage]
    active, idle = x[..., : stage_slice.width], x[..., stage_slice.width :]
    for j, block in enumerate(self.stages[stage][: stage_slice.depth]):
      key = rng
      if rng is not None:
        key = jax.random.fold_in(jax.random.fold_in(rng, stage), j)
      active = block(active, stage_slice, key)
    if self.slicing == 'plain' or not idle.shape[-1]:
      return active
    return jnp.concatenate([active, idle], axis=-1)

  def cost_in_parts(self, subnet, image_size):
    """See `SlicedNetwork`.

    Raises:
      ValueError: if images of another size were meant.
    """
    if image_size != self.image_size:
      raise ValueError(
        f'image_size={image_size}, but the model is made for images of'
        f' {self.image_size} pixels; set its option image_size.'
      )
    tokens, width = self.num_tokens, subnet.stem.width
    patches = tokens - (self.class_token is not None)
    trunk = subnets.dense_cost(3 * self.patch_size**2, width, patches)
    trunk += subnets.Cost(0, width * (tokens + tokens - patches))
    branch = subnets.Cost()
    for i, stage in enumerate(subnet.stages):
      for _ in range(stage.depth):
        block = _block_cost(tokens, self.head_dim, stage)
        if i < self.gate_stage:
          trunk += block
        else:
          branch += block
    if self.slicing == 'plain':
      width = subnet.stages[-1].width
    branch += subnets.norm_cost(width)
    if self.class_token is None:
      branch += subnets.pool_cost(tokens, width)
    return trunk, branch + subnets.dense_cost(width, self.num_classes)

  def _channel_groups(self):
    width, idle = self.norm.scale.shape[0], self.slicing == 'idle'
    stream = [
      *channels.outputs('patches'),
      channels.Member('class_token', -1),
      channels.Member('position', -1),
      *channels.slimming_gate(
        self, width, width if idle else self._narrowest_before_gate()
      ),
      *channels.norm('norm'),
      *channels.inputs('classifier'),
    ]
    for block in self._blocks():
      stream += [
        *channels.norm(f'{block}/attention_norm'),
        *channels.inputs(f'{block}/query_key_value'),
        *channels.outputs(f'{block}/project'),
        *channels.norm(f'{block}/mlp_norm'),
        *channels.inputs(f'{block}/expand'),
        *channels.outputs(f'{block}/reduce'),
      ]
      yield [
        *channels.outputs(f'{block}/query_key_value', 3 * self.head_dim),
        *channels.inputs(f'{block}/project', self.head_dim),
      ]
      yield [
        *channels.outputs(f'{block}/expand'),
        *channels.inputs(f'{block}/reduce'),
      ]
    yield stream


def _block_cost(tokens, head_dim, stage) -> subnets.Cost:
  width, inner = stage.width, stage.heads * head_dim
  return (
    subnets.norm_cost(width)
    + subnets.dense_cost(width, 3 * inner, tokens)
    + subnets.attention_cost(tokens, inner)
    + subnets.dense_cost(inner, width, tokens)
    + subnets.norm_cost(width)
    + subnets.dense_cost(width, stage.hidden, tokens)
    + subnets.dense_cost(stage.hidden, width, tokens)
  )


def _rising_rates(last: float, count: int) -> list[float]:
  return [last * i / max(count - 1, 1) for i in range(count)]


def _check_plain(sub_networks):
  for subnet in sub_networks:
    widths = list(subnet.widths)
    if widths != sorted(widths, reverse=True):
      raise ValueError(
        f'Plain slicing cannot widen again: sub-network {subnet.index} has'
        f" the widths {widths}; use slicing='idle', or widths that never rise."
      )

"""Sliced layers: full-size parameters, static slices."""

from ds_jax.nn.conv import SlicedConv, SlicedDepthwiseConv
from ds_jax.nn.dense import SlicedDense
from ds_jax.nn.gate import DoubleHeadedGate, SlimmingGate
from ds_jax.nn.norm import SlicedBatchNorm, SlicedLayerNorm

__all__ = [
  'DoubleHeadedGate',
  'SlicedBatchNorm',
  'SlicedConv',
  'SlicedDense',
  'SlicedDepthwiseConv',
  'SlicedLayerNorm',
  'SlimmingGate',
]

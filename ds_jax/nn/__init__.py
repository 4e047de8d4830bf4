"""Sliced layers: full-size parameters, static slices."""

from ds_jax.nn.conv import SlicedConv, SlicedDepthwiseConv
from ds_jax.nn.dense import SlicedDense
from ds_jax.nn.gate import DoubleHeadedGate
from ds_jax.nn.norm import SlicedBatchNorm

__all__ = [
  'DoubleHeadedGate',
  'SlicedBatchNorm',
  'SlicedConv',
  'SlicedDense',
  'SlicedDepthwiseConv',
]

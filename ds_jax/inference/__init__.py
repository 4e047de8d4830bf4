"""Inference: a run's network on images, here or as a file."""

from ds_jax.inference.images import Preparation
from ds_jax.inference.predictor import Prediction, Predictor, prediction_of

__all__ = ['Prediction', 'Predictor', 'Preparation', 'prediction_of']

"""Data sets that Hugging Face's `datasets` has saved to disk."""

import functools
import pathlib

from ds_jax.data import source


@functools.lru_cache(maxsize=8)
def load(path: pathlib.Path, split: str, test_share: float) -> source.Source:
  """Opens one split.

  Args:
    path: where it was saved.
    split: `train` or `test`.
    test_share: as of `source.open_either`.

  Raises:
    DatasetNotFoundError: if there is none.
    ImportError: without `datasets`.
    ValueError: unless there is one column of images, and one of labels.
  """
  try:
    # Imported here: an option.
    import datasets
  except ImportError as error:
    raise ImportError(
      "hf:DIR needs the package datasets: pip install -e '.[hf]'."
    ) from error
  try:
    found = datasets.load_from_disk(str(path))
  except FileNotFoundError as error:
    raise source.DatasetNotFoundError(
      f'No data set in {path}: expected what save_to_disk of Hugging Face'
      f' datasets has written. {error}\n{source.RUN_EMBEDDED}'
    ) from error
  splits = {'train': found} if not isinstance(found, dict) else dict(found)

  def open_split(name):
    records = splits[name]
    images, labels = (
      [k for k, column in records.features.items() if isinstance(column, kind)]
      for kind in (datasets.Image, datasets.ClassLabel)
    )
    if len(images) != 1 or len(labels) != 1:
      raise ValueError(
        f'{path} has the image columns {images} and the label columns {labels};'
        ' expected one of each: select_columns, and cast the label to'
        ' ClassLabel.'
      )
    names = records.features[labels[0]].names
    records = records.cast_column(images[0], datasets.Image(decode=False))
    keys = images[0], labels[0]
    return source.EncodedSource(f'{path}, {name}', records, names, keys)

  return source.open_either(str(path), splits, split, open_split, test_share)

"""Paths as users give them."""

from etils import epath


def expanded(path: epath.PathLike) -> epath.Path:
  """Returns a path that does not depend on the working directory.

  `~` is the home folder, wherever the path came from: a flag behind an equals
  sign is not expanded by the shell.

  Args:
    path: of a file or folder, or the address of one in a bucket.
  """
  found = epath.Path(path)
  # Resolving would turn gs://bucket into a local folder.
  return found if '://' in str(path) else found.expanduser().resolve()

"""The collective operations of a compiled program, read out of its text."""

import dataclasses
import math
import re

KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)

# `name = shape opcode(`; a tuple's shape is cut out by `_shape_and_rest`.
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?[\w.\-]+ = (.*)$')
_OPCODE = re.compile(rf'({"|".join(KINDS)})(-start)?\(')
_ARRAY = re.compile(r'\b([a-z][a-z0-9]*)\[([\d,<=]*)\]')
_LISTED_GROUPS = re.compile(r'replica_groups=\{\{([\d,]*)\}')
_IOTA_GROUPS = re.compile(r'replica_groups=\[(\d+),(\d+)\]<=')
# `mesh['a'=4,'b'=2] {'a'}`; a part of an axis is `'a':(1)2`, the last its size.
_MESH_GROUPS = re.compile(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}')
_AXIS_SIZE = re.compile(r"([\w'\"]+)=(\d+)")
_AXIS = re.compile(r"([\w'\"]+)(?::\(\d+\)(\d+))?")
_NO_GROUPS = re.compile(r'replica_groups=\{\}')
_PAIRS = re.compile(r'source_target_pairs=\{([\d,{}]*)\}')


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation of a program, as one device sees it.

  Attributes:
    kind: one of `KINDS`.
    bytes: of the whole array: what an all-reduce, all-to-all or permute gives,
      what an all-gather gives, what a reduce-scatter is given.
    group_size: how many devices meet.
  """

  kind: str
  bytes: int
  group_size: int

  @property
  def wire_bytes(self) -> float:
    """What a device sends, in a ring: the least there is for a large array."""
    if self.kind == 'collective-permute':
      return self.bytes
    share = (self.group_size - 1) / self.group_size
    return (2 if self.kind == 'all-reduce' else 1) * share * self.bytes


def read(hlo_text: str) -> list[Collective]:
  """Reads the collectives out of an optimised HLO module's text.

  Each is listed once, wherever it stands: of one in the body of a loop that
  runs many times, or in a branch that does not, the text tells no more. Of an
  asynchronous one the start counts.

  Args:
    hlo_text: of `compiled.as_text()`.

  Raises:
    ValueError: for a collective whose groups can't be read.
  """
  everyone = 1
  for count in re.findall(
    r'\b(?:replica_count|num_partitions)=(\d+)', hlo_text.partition('\n')[0]
  ):
    everyone *= int(count)
  found = []
  for line in hlo_text.splitlines():
    instruction = _INSTRUCTION.match(line)
    if not instruction:
      continue
    shape, rest = _shape_and_rest(instruction[1])
    opcode = _OPCODE.match(rest)
    if not opcode:
      continue
    kind, is_start = opcode[1], bool(opcode[2])
    sizes = _array_bytes(shape)
    if is_start and kind != 'all-reduce':
      # Of (operands, results, ...); a permute has two numbers more.
      sizes = [size for size in sizes if size] if len(sizes) > 2 else sizes
      if kind == 'collective-permute':
        sizes = sizes[:2]
      sizes = sizes[len(sizes) // 2 :]
    group = _group_size(kind, rest, everyone)
    whole = sum(sizes) * (group if kind == 'reduce-scatter' else 1)
    found.append(Collective(kind, whole, group))
  return found


def _shape_and_rest(text):
  """Splits `shape opcode(...)`, where the shape may be a nested tuple."""
  if not text.startswith('('):
    shape, _, rest = text.partition(' ')
    return shape, rest
  depth = 0
  for i, character in enumerate(text):
    depth += (character == '(') - (character == ')')
    if not depth:
      return text[: i + 1], text[i + 1 :].lstrip()
  return text, ''


def _array_bytes(shape):
  sizes = []
  for dtype, dimensions in _ARRAY.findall(shape):
    number = re.search(r'\d+', dtype)
    bits = 8 if dtype == 'pred' else int(number[0]) if number else 0
    count = 1
    for dimension in re.findall(r'\d+', dimensions):
      count *= int(dimension)
    sizes.append(-(-count * bits // 8))
  return sizes


def _group_size(kind, text, everyone):
  if kind == 'collective-permute':
    pairs = _PAIRS.search(text)
    if pairs:
      return len(set(re.findall(r'\d+', pairs[1])))
  elif listed := _LISTED_GROUPS.search(text):
    return len(listed[1].split(','))
  elif iota := _IOTA_GROUPS.search(text):
    return int(iota[2])
  elif mesh := _MESH_GROUPS.search(text):
    sizes = dict(_AXIS_SIZE.findall(mesh[1]))
    axes = _AXIS.findall(mesh[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  elif _NO_GROUPS.search(text) or 'replica_groups=' not in text:
    return everyone
  raise ValueError(f'The groups of this collective are unknown: {text[:400]}')

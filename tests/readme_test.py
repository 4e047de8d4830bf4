"""What the README and the other pages show is what works."""

import importlib.util
import pathlib
import re
import runpy
import shlex
import sys

import numpy as np
import pytest
from PIL import Image

import ds_jax
import micro
from ds_jax import export, summary

_ROOT = pathlib.Path(__file__).parents[1]
_README = _ROOT / 'README.md'
_DOCS = sorted((_ROOT / 'docs').glob('*.md'))
_PAGES = [*_ROOT.glob('*.md'), *_ROOT.glob('launch/*.md'), *_DOCS]
# Commands that are quick enough to be run; of others words alone are checked.
_QUICK = {'ds_jax.export': export.main, 'ds_jax.summary': summary.main}
# The narrowest of so small a model costs more than 40% of the largest.
_BUDGETS = {'0.4': '0.9', '2e6': '4e3'}
# What a page's examples print, beside what any may.
_PRINTED = {
  'inference': r'digits.ds: \d+\.\d MB, batch 16\n\[\d( \d){19}\]',
  'models': '132,890,144',
}
_BLOCK = re.compile(r'^```(\w*)\n(.*?)^```', re.MULTILINE | re.DOTALL)


def _name(path):
  return str(path.relative_to(_ROOT))


def _each(paths):
  return pytest.mark.parametrize('page', paths, ids=_name)


def _blocks(page, language):
  found = _BLOCK.findall(page.read_text())
  return [code for kind, code in found if kind == language]


def _split(code):
  """The words of every command in a shell block."""
  parts = [part for line in code.splitlines() for part in line.split(' && ')]
  return [shlex.split(part, comments=True) for part in parts]


def _commands(page):
  return [words for code in _blocks(page, 'sh') for words in _split(code)]


def _module(command):
  """The module that `python -m` runs; None for other commands."""
  is_python = re.fullmatch(r'(.*/)?python3?', command[0])
  return command[2] if is_python and command[1] == '-m' else None


_OPTIONS = {}
for _page in _PAGES:
  for _command in _commands(_page):
    _OPTIONS.setdefault(_module(_command), []).extend(
      word.partition('=')[0] for word in _command if word.startswith('--')
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
  """A finished run's checkpoint, without the run, and what examples read."""
  monkeypatch.chdir(tmp_path)
  micro.save_finished_run(tmp_path)
  for kind in ('cat', 'dog'):
    folder = tmp_path / 'photos' / kind
    folder.mkdir(parents=True)
    Image.new('L', (6, 5)).save(folder / '0.png')
  return tmp_path


def _run_examples(page, run):
  """Runs the quick commands and all Python of a page, in order, as a reader.

  Returns the names that the code has defined.
  """
  names = {'ds_jax': ds_jax, 'images': np.zeros((20, 8, 8, 3), np.uint8)}
  for language, code in _BLOCK.findall(page.read_text()):
    code = re.sub(r'\bruns/\w+', str(run), code)
    for budget, other in _BUDGETS.items():
      code = code.replace(budget, other)
    if language == 'python':
      exec(code, names)
    elif language == 'sh':
      for command in _split(code):
        if _module(command) in _QUICK:
          _QUICK[_module(command)](command[3:])
  return names


@_each([page for page in _DOCS if _blocks(page, 'python')])
def test_examples_run(page, run, capsys):
  _run_examples(page, run)
  assert re.search(_PRINTED.get(page.stem, ''), capsys.readouterr().out)


def test_predicting_in_three_lines_and_budgets(run, capsys):
  three_lines, _ = _blocks(_README, 'python')
  assert len(three_lines.splitlines()) == 3
  names = _run_examples(_README, run)
  labels = capsys.readouterr().out.strip()
  assert re.fullmatch(r'\[\d( \d){19}\]', labels)
  assert names['cheap'](names['images']).labels.shape == (20,)
  assert len(names['better'].router.runs) == 2


def test_an_exported_cascade_needs_a_budget(capsys):
  page = _ROOT / 'docs' / 'inference.md'
  (command,) = [c for c in _commands(page) if _module(c) == 'ds_jax.export']
  with pytest.raises(SystemExit):
    export.main([w for w in command[3:] if not w.startswith('--fraction')])
  assert '--router=cascade needs a budget' in capsys.readouterr().err


def test_there_are_two_commands_to_start_with():
  text = _README.read_text()
  start = text[text.index('## Start') : text.index('Then predict')]
  commands = re.findall(r'```sh\n(.*?)```', start, re.DOTALL)
  assert len(commands) == 2
  assert all(len(command.splitlines()) == 1 for command in commands)
  assert '--config=configs/ds_digits.py' in commands[0]
  assert commands[1].strip().endswith('pytest')


@_each(_PAGES)
def test_commands_name_modules_and_files_that_exist(page):
  for command in _commands(page):
    module = _module(command)
    if module and module.startswith('ds_jax'):
      assert importlib.util.find_spec(module), module
    for word in command:
      option, _, value = word.partition('=')
      if option == '--config':
        shipped = _ROOT / 'configs' / f'{value}.py'
        assert (_ROOT / value).exists() or shipped.exists(), word
      elif word.startswith(('launch/', '.ci/')):
        assert (_ROOT / word).exists(), word


# `ds_jax.main` has absl's flags, which a process defines once.
@pytest.mark.parametrize(
  'module',
  sorted(
    m for m in _OPTIONS if m and m.startswith('ds_jax') and m != 'ds_jax.main'
  ),
)
@pytest.mark.filterwarnings('ignore:.*found in sys.modules:RuntimeWarning')
def test_commands_have_these_options(module, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', [module, '--help'])
  with pytest.raises(SystemExit):
    runpy.run_module(module, run_name='__main__')
  known = re.findall(r'--\w+', capsys.readouterr().out)
  assert set(_OPTIONS[module]) <= set(known)


@_each(_PAGES)
def test_configs_that_are_named_exist(page):
  for name in re.findall(r'`(ds_\w+\.py)`', page.read_text()):
    assert (_ROOT / 'configs' / name).exists(), name


def _links(page):
  """Where a page's links lead: paths, from the page on, and headings."""
  text = _BLOCK.sub('', page.read_text())
  for target in re.findall(r'\]\(([^)\s]+)\)', text):
    if not re.match(r'\w+:', target):
      path, _, heading = target.partition('#')
      yield (page.parent / path).resolve() if path else page, heading


def _headings(page):
  """The names that GitHub gives to the headings of a page."""
  text = _BLOCK.sub('', page.read_text())
  for title in re.findall(r'^#+ (.*)$', text, re.MULTILINE):
    yield re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')


@_each(_PAGES)
def test_links_lead_somewhere(page):
  for path, heading in _links(page):
    assert path.exists(), path
    assert not heading or heading in _headings(path), (path, heading)


def test_the_readme_links_every_page():
  linked = {path for path, _ in _links(_README)}
  assert set(_PAGES) - {_README} <= linked


@_each(_PAGES)
def test_nothing_is_left_to_fill_in(page):
  assert not re.search(r'@[A-Z]+@|TODO|TBD', page.read_text())

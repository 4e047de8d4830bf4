"""The launchers run what they say, on every process, and end as it ends."""

import configparser
import contextlib
import math
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import yaml

_ROOT = pathlib.Path(__file__).parents[1]
_LAUNCH = _ROOT / 'launch'
_LOCAL = _LAUNCH / 'local_multiprocess.sh'
_POD = _LAUNCH / 'tpu_pod.sh'
_SLURM = _LAUNCH / 'slurm.sbatch'
_SCRIPTS = (_LOCAL, _POD, _SLURM)
_SHELLCHECK = pathlib.Path(sys.executable).parent / 'shellcheck'
_DIGITS = '--config=configs/ds_digits.py'
_SETUP = configparser.ConfigParser()
_SETUP.read(_ROOT / 'setup.cfg')


def _environment(**variables):
  """Ours, without what would change what the scripts do."""
  kept = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(('CUDA_', 'SLURM_', 'PYTHON'))
  }
  return kept | {name: str(value) for name, value in variables.items()}


def _run(*command, **variables):
  return subprocess.run(
    [str(word) for word in command],
    capture_output=True,
    text=True,
    cwd=_ROOT,
    env=_environment(**variables),
    timeout=60,
  )


def _lines(*command, **variables):
  done = _run(*command, **variables)
  assert done.returncode == 0, done.stderr
  assert not done.stderr
  return done.stdout.splitlines()


def _unwrap(text):
  """Lines that are too long for here: an indented one goes on."""
  return re.sub(r'\n +', ' ', textwrap.dedent(text).strip()).splitlines()


def _script(path, text):
  path.write_text(f'#!/usr/bin/env bash\n{text}')
  path.chmod(0o755)
  return path


def _until(condition):
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


# Every script


def test_shellcheck_finds_nothing():
  assert {*_LAUNCH.glob('*.sh'), *_LAUNCH.glob('*.sbatch')} == {*_SCRIPTS}
  done = _run(_SHELLCHECK, *_SCRIPTS)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('script', _SCRIPTS, ids=lambda path: path.name)
def test_help_is_the_header(script):
  lines = _lines('bash', script, '--help')
  assert lines[0].startswith('Runs ds_jax.main ')
  assert any('--dry_run' in line for line in lines)
  assert not any(line.startswith(('#', 'set ')) for line in lines)


_POD_RUN = ['--name=n', '--zone=z', '--type=v5litepod-16', '--']


@pytest.mark.parametrize(
  ('script', 'arguments', 'message'),
  [
    (_LOCAL, [], "the first argument is ''; expected the number of processes"),
    (_LOCAL, [_DIGITS], 'expected the number of processes'),
    (_LOCAL, ['0', _DIGITS], "is '0'; expected a whole number of at least 1"),
    (_LOCAL, ['two'], "is 'two'; expected a whole number of at least 1"),
    (_LOCAL, ['2', '--port=x'], "--port is 'x'; expected a whole number"),
    (_LOCAL, ['2', '--workdir=w'], 'no --config=FILE given'),
    (_LOCAL, ['2', _DIGITS], 'no --workdir=DIR given'),
    (_LOCAL, ['2', '--process_id=0'], '--process_id=0 is set by this script'),
    (_SLURM, ['--workdir=w'], 'no --config=FILE given'),
    (_SLURM, [_DIGITS], 'no --workdir=DIR given'),
    (_SLURM, [_DIGITS, '--workdir=w'], 'SLURM_JOB_ID is not set; expected'),
    (_POD, ['--zone=z'], 'no --name=N given'),
    (_POD, ['--name=N', '--zone=z'], '--name=N is no name of a slice'),
    (_POD, ['--name=n'], 'no --zone=Z given'),
    (_POD, ['--name=n', '--zone=z'], 'no --type=T given'),
    (_POD, ['--name=n', _DIGITS], f"'{_DIGITS}' is no option of this script"),
    (
      _POD,
      ['--name=n', '--zone=z', '--type=v9-8'],
      'no software version is known for --type=v9-8',
    ),
    (_POD, ['--bucket=gs://b', *_POD_RUN], '--bucket=gs://b is no bucket'),
    (_POD, _POD_RUN, '--config= after -- is no file of configs/'),
    (
      _POD,
      [*_POD_RUN, '--config=configs/none.py', '--workdir=/w'],
      '--config=configs/none.py after -- is no file of configs/',
    ),
    (_POD, [*_POD_RUN, _DIGITS, '--workdir=w'], '--workdir=w after -- is not'),
    (
      _POD,
      [*_POD_RUN, _DIGITS, '--workdir=gs://b/w'],
      '--workdir=gs://b/w is no mounted folder; mount the bucket by --bucket',
    ),
    (
      _POD,
      ['--name=n', '--zone=z', '--stop', '--', _DIGITS],
      'take no command after --',
    ),
  ],
)
def test_a_mistake_is_one_line_and_status_2(
  script, arguments, message, tmp_path
):
  _script(tmp_path / 'gcloud', 'echo ran >&2')
  path = f'{tmp_path}:{os.environ["PATH"]}'
  done = _run('bash', script, *arguments, PATH=path)
  assert done.returncode == 2
  assert not done.stdout
  (line,) = done.stderr.splitlines()
  assert line.startswith(f'{script.name}: ')
  assert message in line


def test_the_readme_names_every_file_and_its_commands_are_right():
  text = (_LAUNCH / 'README.md').read_text()
  blocks = re.findall(r'```sh\n(.*?)```', text, re.DOTALL)
  commands = [
    shlex.split(line) for block in blocks for line in block.splitlines()
  ]
  for path in _LAUNCH.iterdir():
    if path.suffix not in ('.md', '.dockerignore'):
      assert f'`{path.name}`' in text
      assert any(f'launch/{path.name}' in ' '.join(c) for c in commands)
  ours = [c for c in commands if c[0].startswith('launch/')]
  assert len(ours) == 6
  for command in ours:
    _lines(*command[:2], '--dry_run', *command[2:])
  for command in commands:
    for word in command:
      if word.startswith('--config='):
        assert (_ROOT / word.removeprefix('--config=')).exists()


# local_multiprocess.sh


def test_local_dry_run_on_cpu():
  lines = _lines(
    *(_LOCAL, 2, _DIGITS, '--workdir=/tmp/w', '--port=29000', '--dry_run')
  )
  assert lines == _unwrap("""
    mkdir -p /tmp/w/logs
    env JAX_PLATFORMS=cpu python -m ds_jax.main --config=configs/ds_digits.py
      --workdir=/tmp/w --coordinator_address=127.0.0.1:29000 --num_processes=2
      --process_id=0 &
    env JAX_PLATFORMS=cpu python -m ds_jax.main --config=configs/ds_digits.py
      --workdir=/tmp/w --coordinator_address=127.0.0.1:29000 --num_processes=2
      --process_id=1 > /tmp/w/logs/process_1.log 2>&1 &
    wait
    """)


def test_local_dry_run_gives_each_process_a_visible_gpu():
  arguments = (_LOCAL, 2, '--gpu', '--dry_run', _DIGITS, '--workdir=/tmp/w')
  for visible, expected in {'': '01', '6,7': '67'}.items():
    lines = _lines(*arguments, CUDA_VISIBLE_DEVICES=visible)
    for line, gpu in zip(lines[1:3], expected, strict=True):
      assert line.startswith(f'env CUDA_VISIBLE_DEVICES={gpu} python -m ')
  done = _run(*arguments, CUDA_VISIBLE_DEVICES='6')
  assert done.returncode == 2
  assert 'names 1 GPUs for 2 processes; expected one each' in done.stderr


@pytest.fixture
def python(tmp_path):
  """A stand-in for Python, that does what FAKE says for its process id."""
  return _script(
    tmp_path / 'fake python',
    """
    id=${*: -1}
    id=${id#--process_id=}
    cd "${FOLDER}"
    printf '%s\\n' "${JAX_PLATFORMS:-}" "$@" >"arguments_${id}"
    eval "${FAKE}"
    """,
  )


def _local(python, tmp_path, fake, *arguments):
  return (
    (_LOCAL, 3, *arguments, _DIGITS, f'--workdir={tmp_path}/w'),
    {'PYTHON': python, 'FOLDER': tmp_path, 'FAKE': fake},
  )


def test_local_gives_every_process_its_id_and_keeps_its_output(
  python, tmp_path
):
  command, variables = _local(python, tmp_path, 'echo "I am ${id}"')
  done = _run(*command, **variables)
  assert done.returncode == 0, done.stderr
  assert done.stdout == 'I am 0\n'
  coordinators = set()
  for i in range(3):
    platform, *arguments = (
      (tmp_path / f'arguments_{i}').read_text().splitlines()
    )
    assert platform == 'cpu'
    assert arguments[:4] == [
      *('-m', 'ds_jax.main', _DIGITS, f'--workdir={tmp_path}/w')
    ]
    coordinators.add(arguments[4])
    assert arguments[5:] == ['--num_processes=3', f'--process_id={i}']
    if i > 0:
      log = tmp_path / f'w/logs/process_{i}.log'
      assert log.read_text() == f'I am {i}\n'
      assert str(log.parent) in done.stderr
  (coordinator,) = coordinators
  assert re.fullmatch(r'--coordinator_address=127\.0\.0\.1:2\d{4}', coordinator)


def test_local_ends_with_the_first_failure_and_shows_its_log(python, tmp_path):
  # Another fails because of it.
  fake = (
    'if ((id == 1)); then echo reason; exit 7; fi;'
    'until grep -qs reason w/logs/process_1.log; do sleep 0.05; done;'
    'exit $((id / 2))'
  )
  command, variables = _local(python, tmp_path, fake)
  done = _run(*command, **variables)
  assert done.returncode == 7
  assert re.search(
    r'process 1 failed with status 7; the end of \S+/process_1\.log:\nreason\n'
    r'.*: the others have 90 s to end by themselves',
    done.stderr,
  )
  assert 'process 2 ended with status 1, too' in done.stderr


def test_local_waits_as_long_as_the_heartbeat_needs(python, tmp_path):
  command, variables = _local(python, tmp_path, 'exit $((id == 2))')
  heartbeat = '--config.parallel.heartbeat_seconds=10'
  done = _run(*command, heartbeat, **variables)
  assert done.returncode == 1
  assert 'process 2 failed with status 1' in done.stderr
  assert 'the others have 40 s to end by themselves' in done.stderr


def test_local_kills_what_hangs_after_a_failure(python, tmp_path):
  fake = 'if ((id == 0)); then exit 5; fi; exec sleep 50'
  command, variables = _local(python, tmp_path, fake, '--grace_seconds=0')
  done = _run(*command, **variables)
  assert done.returncode == 5
  assert 'process 0 failed with status 5; its output is above' in done.stderr
  assert 'killing the 2 still running' in done.stderr


_SAVING = """
trap 'touch "terminated_${id}"; %s' TERM
touch "ready_${id}"
while true; do sleep 0.05; done
"""


@contextlib.contextmanager
def _started(python, tmp_path, fake):
  """Three processes, all of which run."""
  command, variables = _local(python, tmp_path, fake)
  # Where the tests run in the background, SIGINT is ignored, for good.
  command = ('env', '--default-signal=INT', *command)
  with subprocess.Popen(
    [str(word) for word in command],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    cwd=_ROOT,
    env=_environment(**variables),
    start_new_session=True,
  ) as process:
    try:
      _until(lambda: len(list(tmp_path.glob('ready_*'))) == 3)
      yield process
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_local_forwards_a_signal_as_sigterm_to_all(python, tmp_path, number):
  with _started(python, tmp_path, _SAVING % 'exit 0') as process:
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
  assert process.returncode == 0, errors
  assert len(list(tmp_path.glob('terminated_*'))) == 3


def test_local_kills_at_the_second_signal(python, tmp_path):
  with _started(python, tmp_path, _SAVING % ':') as process:
    process.send_signal(signal.SIGTERM)
    _until(lambda: len(list(tmp_path.glob('terminated_*'))) == 3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
  assert process.returncode == 128 + signal.SIGKILL
  assert 'killing all processes' in errors


def test_local_names_an_interpreter_that_is_not_there(tmp_path):
  done = _run(_LOCAL, 2, _DIGITS, f'--workdir={tmp_path}', PYTHON='/no/python')
  assert done.returncode == 2
  assert "there is no '/no/python'; activate the virtual env" in done.stderr


# slurm.sbatch


def test_slurm_dry_run():
  command = ('bash', _SLURM, '--dry_run', _DIGITS, '--workdir=/shared/w')
  arguments = '-m ds_jax.main --config=configs/ds_digits.py --workdir=/shared/w'
  assert _lines(*command) == [
    f'srun --label --kill-on-bad-exit=1 python {arguments}'
  ]
  assert _lines(*command, SLURM_CPUS_PER_TASK=8, PYTHON='/venv/python') == [
    'srun --label --kill-on-bad-exit=1 --cpus-per-task=8'
    f' /venv/python {arguments}'
  ]


def test_slurm_has_a_task_for_each_gpu_and_is_told_before_the_limit():
  head = _SLURM.read_text().split('\nset -euo')[0]
  options = dict(
    line.removeprefix('#SBATCH --').partition('=')[::2]
    for line in head.splitlines()
    if line.startswith('#SBATCH')
  )
  assert options['ntasks-per-node'] == options['gpus-per-node']
  assert not {'gpus-per-task', 'gpu-bind'} & set(options)
  assert 'requeue' in options
  assert options['open-mode'] == 'append'
  shell_only, seconds = re.fullmatch(
    r'(B:)USR1@(\d+)', options['signal']
  ).groups()
  assert shell_only
  assert int(seconds) >= 60


@pytest.mark.parametrize(
  ('number', 'requeues'), [(signal.SIGUSR1, True), (None, False)]
)
def test_slurm_requeues_after_saving_at_the_limit_only(
  tmp_path, number, requeues
):
  task = 'trap "touch saved; exit 0" TERM; echo $$ >pid; '
  task += 'while true; do sleep 0.05; done' if requeues else 'exit 6'
  _script(tmp_path / 'srun', task)
  _script(tmp_path / 'sleep', 'exec /bin/sleep 0.05')
  _script(tmp_path / 'scancel', 'echo "$*" >scancel.log; kill $(cat pid)')
  _script(tmp_path / 'scontrol', 'ls saved >/dev/null; echo "$*" >requeue.log')
  path = f'{tmp_path}:{os.environ["PATH"]}'
  process = subprocess.Popen(
    ['bash', str(_SLURM), _DIGITS, '--workdir=w'],
    stdout=subprocess.DEVNULL,
    cwd=tmp_path,
    env=_environment(PATH=path, SLURM_JOB_ID=42),
  )
  _until((tmp_path / 'pid').exists)
  if number is not None:
    process.send_signal(number)
  process.communicate(timeout=20)
  assert process.returncode == (0 if requeues else 6)
  assert (tmp_path / 'requeue.log').exists() == requeues
  if requeues:
    assert (tmp_path / 'scancel.log').read_text() == '--signal=TERM 42\n'
    assert (tmp_path / 'requeue.log').read_text() == 'requeue 42\n'


# tpu_pod.sh

_WORKERS = {
  'install': """
    systemctl show --property=ActiveState --value ds_jax |
      grep -qx -e inactive -e failed ||
      { echo "ds_jax runs here already: --logs follows it, --stop ends it" >&2;
      exit 3; }; rm -rf ~/ds_jax && mkdir ~/ds_jax &&
      tar -xzf ~/ds_jax.tar.gz -C ~/ds_jax &&
      python3 -m pip install --quiet --user uv &&
      { test -x ~/ds_jax_venv/bin/python ||
      ~/.local/bin/uv venv --quiet --python=3.12 ~/ds_jax_venv; } &&
      cd ~/ds_jax && ~/.local/bin/uv pip install --quiet
      --python="$HOME/ds_jax_venv/bin/python" --reinstall-package=ds_jax
      ".[tpu]"
    """,
  'mount': """
    mountpoint -q /mnt/b || { { command -v gcsfuse >/dev/null ||
      { curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg |
      sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null &&
      echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc]
      https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null &&
      sudo apt-get -qq -o DPkg::Lock::Timeout=300 update &&
      sudo apt-get -qq -o DPkg::Lock::Timeout=300 install fuse3 gcsfuse; }; } &&
      sudo install -d -o "$(id -u)" -g "$(id -g)" /mnt/b &&
      sudo systemd-run --unit=ds_jax_bucket --uid="$(id -u)" --gid="$(id -g)"
      --property=Type=forking "$(command -v gcsfuse)" --implicit-dirs
      --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0
      b /mnt/b; }
    """,
  'start': """
    sudo systemctl reset-failed ds_jax 2>/dev/null;
      sudo systemd-run --unit=ds_jax --uid="$(id -u)" --gid="$(id -g)"
      --working-directory="$HOME/ds_jax" --property=After=ds_jax_bucket.service
      --property=KillMode=mixed --property=TimeoutStopSec=600
      --property=LimitMEMLOCK=infinity
      --property=StandardOutput=append:"$HOME/ds_jax.log"
      --property=StandardError=append:"$HOME/ds_jax.log"
      "$HOME/ds_jax_venv/bin/python" -m ds_jax.main
      --config=configs/ds_digits.py --workdir=/mnt/b/w
    """,
  'logs': """
    tail -n 100 -F ~/ds_jax.log & tail=$!;
      until systemctl show --property=ActiveState --value ds_jax |
      grep -qx -e inactive -e failed; do sleep 5; done; sleep 1; kill $tail;
      exit "$(systemctl show --property=ExecMainStatus --value ds_jax)"
    """,
  'stop': """
    systemctl show --property=ActiveState --value ds_jax |
      grep -qx -e inactive -e failed || sudo systemctl stop ds_jax
    """,
}


def _ssh(worker, name, flags):
  (command,) = _unwrap(_WORKERS[name])
  return (
    f'gcloud compute tpus tpu-vm ssh n --worker={worker}'
    f" '--command={command}' {flags}"
  )


def test_pod_dry_run_from_nothing():
  lines = _lines(
    *(_POD, '--name=n', '--zone=z', '--project=p', '--type=v5litepod-256'),
    *('--spot', '--create_flag=--network=net', '--bucket=b', '--dry_run'),
    *('--', _DIGITS, '--workdir=/mnt/b/w'),
  )
  flags = '--zone=z --project=p'
  state = (
    "gcloud compute tpus queued-resources list '--filter=name~/n$'"
    f" '--format=value(state.state)' {flags}"
  )
  assert lines == [
    state,
    'gcloud compute tpus queued-resources create n --node-id=n'
    ' --accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite'
    f' --spot --network=net {flags}',
    state,
    f'tar -C {_ROOT} --exclude=__pycache__ -czf ds_jax.tar.gz ds_jax configs'
    ' launch pyproject.toml setup.cfg README.md LICENSE',
    'gcloud compute tpus tpu-vm scp ds_jax.tar.gz n:ds_jax.tar.gz --worker=all'
    f' {flags}',
    _ssh('all', 'install', flags),
    _ssh('all', 'mount', flags),
    _ssh('all', 'start', flags),
    _ssh(0, 'logs', flags),
  ]


def test_pod_dry_run_of_the_other_forms():
  common = (_POD, '--name=n', '--zone=z', '--dry_run')
  assert _lines(*common, '--logs') == [_ssh(0, 'logs', '--zone=z')]
  assert _lines(*common, '--stop', '--delete') == [
    _ssh('all', 'stop', '--zone=z'),
    'gcloud compute tpus queued-resources delete n --force --quiet --zone=z',
  ]


@pytest.mark.parametrize(
  ('kind', 'version'),
  [
    ('v4-32', 'tpu-ubuntu2204-base'),
    ('v5litepod-16', 'v2-alpha-tpuv5-lite'),
    ('v5p-128', 'v2-alpha-tpuv5'),
    ('v6e-64', 'v2-alpha-tpuv6e'),
  ],
)
def test_pod_takes_the_software_of_the_type(kind, version):
  lines = _lines(
    *(_POD, '--name=n', '--zone=z', f'--type={kind}', '--dry_run'),
    *('--', _DIGITS, '--workdir=/w'),
  )
  assert f'--runtime-version={version}' in shlex.split(lines[1])
  assert not any('gcsfuse' in line for line in lines)


def test_pod_quotes_an_argument_for_both_shells():
  odd = "--config.dataset.data_dir=it's $HOME"
  lines = _lines(
    *(_POD, '--name=n', '--zone=z', '--type=v4-8', '--dry_run'),
    *('--', _DIGITS, '--workdir=/w', odd),
  )
  (start,) = [line for line in lines if '-m ds_jax.main' in line]
  here = shlex.split(start)
  (command,) = [word for word in here if word.startswith('--command=')]
  assert shlex.split(command)[-1] == odd


def test_pod_worker_commands_are_sound_shell(tmp_path):
  paths = [
    _script(tmp_path / name, '\n'.join(_unwrap(text)) + '\n')
    for name, text in _WORKERS.items()
  ]
  done = _run(_SHELLCHECK, *paths)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  ('states', 'verbs', 'status'),
  [
    (['ACTIVE'], [], 0),
    (['', 'WAITING_FOR_RESOURCES', 'ACTIVE'], ['create'], 0),
    (['SUSPENDED', '', 'ACTIVE'], ['delete', 'create'], 0),
    (['FAILED'], ['describe'], 1),
  ],
  ids=['reused', 'created', 'preempted', 'failed'],
)
def test_pod_is_reused_or_made_before_it_is_started(
  states, verbs, status, tmp_path
):
  states = ' '.join(f"'{state}'" for state in states)
  _script(
    tmp_path / 'gcloud',
    f"""
    cd {tmp_path}
    states=({states})
    if [[ $4 == list ]]; then
      n=$(cat count 2>/dev/null || echo 0)
      echo $((n + 1)) >count
      echo "${{states[n]}}"
    else
      echo "$3 $4" >>verbs
      if [[ $4 == scp ]]; then tar -tzf "$5" >names; fi
    fi
    """,
  )
  _script(tmp_path / 'sleep', '')
  done = _run(
    *(_POD, '--name=n', '--zone=z', '--type=v4-8'),
    *('--', _DIGITS, '--workdir=/w'),
    PATH=f'{tmp_path}:{os.environ["PATH"]}',
  )
  assert done.returncode == status, done.stderr
  expected = [f'queued-resources {verb}' for verb in verbs]
  if status == 0:
    expected += ['tpu-vm scp', *['tpu-vm ssh'] * 3]
    names = (tmp_path / 'names').read_text().splitlines()
    assert {'ds_jax/main.py', 'configs/ds_digits.py', 'setup.cfg'} <= {*names}
    assert not any('__pycache__' in name for name in names)
  assert (tmp_path / 'verbs').read_text().splitlines() == expected


# gke_jobset.yaml


@pytest.fixture(scope='module')
def jobset():
  return yaml.safe_load((_LAUNCH / 'gke_jobset.yaml').read_text())


def test_jobset_has_a_pod_for_each_host_of_the_slice(jobset):
  assert jobset['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  assert jobset['kind'] == 'JobSet'
  assert jobset['spec']['network']['enableDNSHostnames']
  (slices,) = jobset['spec']['replicatedJobs']
  assert slices['replicas'] == 1
  job = slices['template']['spec']
  pod = job['template']['spec']
  selector = pod['nodeSelector']
  assert selector['cloud.google.com/gke-tpu-accelerator'].startswith('tpu-v5-')
  topology = selector['cloud.google.com/gke-tpu-topology'].split('x')
  (container,) = pod['containers']
  resources = container['resources']
  assert resources['requests'] == resources['limits']
  chips = resources['limits']['google.com/tpu']
  assert job['parallelism'] == job['completions']
  assert job['completionMode'] == 'Indexed'
  assert job['parallelism'] * chips == math.prod(map(int, topology))


def test_jobset_restarts_as_a_whole_and_mounts_one_folder(jobset):
  policy = jobset['spec']['failurePolicy']
  assert policy['maxRestarts'] > 0
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  assert job['backoffLimit'] == 0
  pod = job['template']['spec']
  assert pod['restartPolicy'] == 'Never'
  assert pod['terminationGracePeriodSeconds'] >= 120
  (container,) = pod['containers']
  (mount,) = container['volumeMounts']
  assert [mount['name']] == [volume['name'] for volume in pod['volumes']]
  (script,) = container['args']
  assert f'--workdir={mount["mountPath"]}/' in script
  (config,) = re.findall(r'--config=(\S+)', script)
  assert (_ROOT / config).exists()


@pytest.mark.parametrize(
  ('fake', 'terminated', 'status'),
  [
    ('exit 0', False, 0),
    ('exit 4', False, 4),
    ('trap "touch saved; exit 0" TERM; touch ready; '
     'while true; do sleep 0.05; done', True, 75),
  ],
  ids=['done', 'failed', 'preempted'],
)  # fmt: skip
def test_jobset_tells_a_preempted_run_from_a_finished_one(
  jobset, tmp_path, fake, terminated, status
):
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  (container,) = job['template']['spec']['containers']
  _script(tmp_path / 'sleep', 'exec /bin/sleep 0.05')
  _script(tmp_path / 'python', f'echo "$*" >arguments; {fake}')
  process = subprocess.Popen(
    [*container['command'], *container['args']],
    stderr=subprocess.DEVNULL,  # of ulimit, which takes root
    cwd=tmp_path,
    env=_environment(PATH=f'{tmp_path}:{os.environ["PATH"]}'),
  )
  if terminated:
    _until((tmp_path / 'ready').exists)
    process.terminate()
  assert process.wait(timeout=20) == status
  assert (tmp_path / 'saved').exists() == terminated
  arguments = (tmp_path / 'arguments').read_text()
  assert arguments.startswith('-m ds_jax.main --config=configs/')
  (rule,) = [
    rule['onExitCodes']
    for rule in job['podFailurePolicy']['rules']
    if 'onExitCodes' in rule
  ]
  assert rule['containerName'] == container['name']
  assert (status in rule['values']) == terminated


# Dockerfile


def _stages():
  text = (_LAUNCH / 'Dockerfile').read_text()
  parts = re.split(r'^FROM (\S+) AS (\w+)$', text, flags=re.MULTILINE)[1:]
  return {
    name: (base, body)
    for base, name, body in zip(*(iter(parts),) * 3, strict=True)
  }


def test_docker_targets_install_extras_that_exist():
  stages = _stages()
  installs = {
    target: re.findall(r"^RUN pip install '?\.(\S*?)'?$", body, re.MULTILINE)
    for target, (_, body) in stages.items()
  }
  assert installs == {
    'base': [],
    'source': [],
    'cpu': [''],
    'gpu': ['[cuda12]'],
    'tpu': ['[tpu]'],
  }
  assert {'cuda12', 'tpu'} <= set(_SETUP['options.extras_require'])
  for target in ('cpu', 'gpu', 'tpu'):
    base, body = stages[target]
    assert base == 'base'
    # Dependencies first: they are cached when only the code changes.
    assert body.index('RUN pip install') < body.index('COPY')
    assert re.search(r'^USER [1-9]', body, re.MULTILINE)
    assert body.rstrip().endswith('ENTRYPOINT ["python", "-m", "ds_jax.main"]')


def test_docker_context_has_what_is_copied_and_no_more():
  ignored = (_LAUNCH / 'Dockerfile.dockerignore').read_text().splitlines()
  kept = {line[1:] for line in ignored if line.startswith('!')}
  assert '*' in ignored
  copied = set()
  for _, body in _stages().values():
    for words in re.findall(r'^COPY (?!--from)(.*)$', body, re.MULTILINE):
      copied.update(words.split()[:-1])
  assert copied == kept
  assert all((_ROOT / name).exists() for name in copied)


def test_python_of_images_and_workers_is_new_enough():
  least = _SETUP['options']['python_requires'].removeprefix('>=')
  (image,) = {base for base, _ in _stages().values() if 'python' in base}
  (worker,) = set(re.findall(r'--python=(3\.\d+)', _POD.read_text()))
  for version in (re.fullmatch(r'python:(.*)-slim', image)[1], worker):
    assert [*map(int, version.split('.'))] >= [*map(int, least.split('.'))]

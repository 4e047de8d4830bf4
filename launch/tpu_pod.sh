#!/usr/bin/env bash
# Runs ds_jax.main on every worker of a Cloud TPU slice (TPU VMs, not GKE).
#
#   launch/tpu_pod.sh --name=N --zone=Z --type=T [OPTIONS] -- \
#       --config=configs/FILE.py --workdir=/SHARED/DIR [...]
#   launch/tpu_pod.sh --name=N --zone=Z --logs | --stop | --delete
#
# The first form creates the slice as a queued resource, or reuses it where it
# is active, copies this working tree to all workers, installs it, runs
# ds_jax.main with the arguments after `--` on all of them as a systemd service,
# and follows worker 0's log. Ctrl-C leaves the run going. The same command
# again resumes, on a new slice if the old one was preempted.
#
#   --name=N           of the queued resource, and of its node
#   --zone=Z           e.g. us-west4-a
#   --type=T           accelerator type, e.g. v5litepod-256, v5p-128, v6e-64
#   --project=P        without, gcloud's default
#   --version=V        TPU software version; without, the one for the type
#   --spot             a spot slice: cheaper, may be preempted
#   --create_flag=F    one more flag of `gcloud compute tpus queued-resources
#                      create`, e.g. --create_flag=--reserved; may be repeated
#   --bucket=B         mount this Cloud Storage bucket at /mnt/B on all workers
#   --logs             follow worker 0's log again
#   --stop             SIGTERM to all workers: they save, and end
#   --delete           delete the slice; with --stop, after that
#   --dry_run          print the commands, one a line, and run nothing
#   --help             print this

set -euo pipefail

readonly POLL_SECONDS=30
# What systemd gives a worker to save before it's killed.
readonly STOP_SECONDS=600

root=$(cd "$(dirname "$0")/.." && pwd)
readonly root

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

fail() {
  echo "tpu_pod.sh: $*" >&2
  exit 2
}

say() {
  echo "tpu_pod.sh: $*" >&2
}

# quote WORD...: one shell line, quoted only where needed.
quote() {
  local word line='' single="'" escaped="'\\''"
  for word; do
    if [[ ${word} =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      line+=" ${word}"
    else
      line+=" '${word//${single}/${escaped}}'"
    fi
  done
  echo "${line# }"
}

# run COMMAND...: runs it, or prints it in a dry run.
run() {
  if "${dry_run}"; then
    quote "$@"
  else
    "$@"
  fi
}

# queued_resources VERB ARGS...; tpu_vm VERB ARGS...: gcloud, in our zone.
queued_resources() {
  run gcloud compute tpus queued-resources "$@" "${location[@]}"
}

tpu_vm() {
  run gcloud compute tpus tpu-vm "$@" "${location[@]}"
}

# on_workers WORKERS COMMAND
on_workers() {
  tpu_vm ssh "${name}" "--worker=$1" "--command=$2"
}

# default_version TYPE: the TPU software for JAX.
default_version() {
  case $1 in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *)
      fail "no software version is known for --type=$1; expected v2-8," \
        'v5litepod-16 and the like; give one by --version=V'
      ;;
  esac
}

parse_arguments() {
  name='' zone='' type='' project='' version='' bucket=''
  spot=false stops=false deletes=false logs=false dry_run=false
  create_flags=()
  arguments=()
  while (($# > 0)); do
    case $1 in
      --help | -h)
        usage
        exit 0
        ;;
      --name=?*) name=${1#*=} ;;
      --zone=?*) zone=${1#*=} ;;
      --type=?*) type=${1#*=} ;;
      --project=?*) project=${1#*=} ;;
      --version=?*) version=${1#*=} ;;
      --bucket=?*) bucket=${1#*=} ;;
      --create_flag=?*) create_flags+=("${1#*=}") ;;
      --spot) spot=true ;;
      --stop) stops=true ;;
      --delete) deletes=true ;;
      --logs) logs=true ;;
      --dry_run) dry_run=true ;;
      --)
        shift
        arguments=("$@")
        break
        ;;
      *)
        fail "'$1' is no option of this script, or lacks its value; what goes" \
          'to ds_jax.main stands after --, and --help lists the options'
        ;;
    esac
    shift
  done
  if [[ -z ${name} ]]; then
    fail 'no --name=N given; expected the name of the slice'
  fi
  if ! [[ ${name} =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]]; then
    fail "--name=${name} is no name of a slice; expected lower-case letters," \
      'digits and hyphens, starting with a letter'
  fi
  if [[ -z ${zone} ]]; then
    fail 'no --zone=Z given; expected the zone of the slice, e.g. us-west4-a'
  fi
  location=("--zone=${zone}")
  if [[ -n ${project} ]]; then
    location+=("--project=${project}")
  fi
}

# check_run_arguments: what only the first form needs.
check_run_arguments() {
  local argument config='' workdir=''
  if [[ -z ${type} ]]; then
    fail 'no --type=T given; expected an accelerator type, e.g. v5litepod-256'
  fi
  version=${version:-$(default_version "${type}")}
  if [[ -n ${bucket} && ! ${bucket} =~ ^[a-z0-9][a-z0-9._-]*$ ]]; then
    fail "--bucket=${bucket} is no bucket's name; expected it without gs://"
  fi
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    case ${argument} in
      --config=?*) config=${argument#*=} ;;
      --workdir=?*) workdir=${argument#*=} ;;
    esac
  done
  # A config's own argument may follow a colon.
  if [[ ${config} != configs/* || ! -f ${root}/${config%%:*} ]]; then
    fail "--config=${config} after -- is no file of configs/; expected a path" \
      'like --config=configs/ds_mobilenet.py, since that folder is copied'
  fi
  case ${workdir} in
    gs://*)
      fail "--workdir=${workdir} is no mounted folder; mount the bucket by" \
        '--bucket=NAME and give --workdir=/mnt/NAME/DIR'
      ;;
    /*) ;;
    *)
      fail "--workdir=${workdir} after -- is not absolute; expected a folder" \
        'that all workers mount, e.g. --bucket=NAME and --workdir=/mnt/NAME/DIR'
      ;;
  esac
}

# state: of the queued resource, or nothing if there is none.
state() {
  queued_resources list "--filter=name~/${name}\$" '--format=value(state.state)'
}

create() {
  local flags=()
  if "${spot}"; then
    flags+=(--spot)
  fi
  flags+=(${create_flags[@]+"${create_flags[@]}"})
  queued_resources create "${name}" "--node-id=${name}" \
    "--accelerator-type=${type}" "--runtime-version=${version}" \
    ${flags[@]+"${flags[@]}"}
}

delete() {
  queued_resources delete "${name}" --force --quiet
}

# provision: returns when the slice is active.
provision() {
  if "${dry_run}"; then
    state
    create
    state
    return
  fi
  local now before='(unknown)'
  while true; do
    now=$(state)
    if [[ ${now} != "${before}" ]]; then
      say "${name} is ${now:-not there}"
      before=${now}
    fi
    case ${now} in
      ACTIVE) return ;;
      '') create ;;
      SUSPENDED)
        say 'it was preempted; a new one takes its place'
        delete
        ;;
      FAILED)
        queued_resources describe "${name}" >&2
        say "${name} failed (above); free its name by --delete, and try again"
        exit 1
        ;;
    esac
    sleep "${POLL_SECONDS}"
  done
}

copy_tree() {
  local archive
  if "${dry_run}"; then
    archive=ds_jax.tar.gz
  else
    scratch=$(mktemp -d)
    trap 'rm -rf "${scratch}"' EXIT
    archive=${scratch}/ds_jax.tar.gz
  fi
  run tar -C "${root}" --exclude=__pycache__ -czf "${archive}" \
    ds_jax configs launch pyproject.toml setup.cfg README.md LICENSE
  tpu_vm scp "${archive}" "${name}:ds_jax.tar.gz" --worker=all
}

# The commands of the workers, each one line of shell. ~/ds_jax is the working
# tree, ~/ds_jax_venv the environment, ~/ds_jax.log the log.

# Whether the service has ended; while it saves, it's neither active nor ended.
readonly ENDED='systemctl show --property=ActiveState --value ds_jax |
grep -qx -e inactive -e failed'

# uv, since the TPU software's Ubuntu has a Python older than ours.
install_command() {
  join_lines <<END
${ENDED} ||
{ echo "ds_jax runs here already: --logs follows it, --stop ends it" >&2;
exit 3; };
rm -rf ~/ds_jax && mkdir ~/ds_jax && tar -xzf ~/ds_jax.tar.gz -C ~/ds_jax &&
python3 -m pip install --quiet --user uv &&
{ test -x ~/ds_jax_venv/bin/python ||
~/.local/bin/uv venv --quiet --python=3.12 ~/ds_jax_venv; } &&
cd ~/ds_jax &&
~/.local/bin/uv pip install --quiet --python="\$HOME/ds_jax_venv/bin/python"
--reinstall-package=ds_jax ".[tpu]"
END
}

# Nothing is cached of what other workers may change. A service of its own, so
# that at a shutdown the run is stopped, and has saved, before it's unmounted.
mount_command() {
  join_lines <<END
mountpoint -q /mnt/${bucket} ||
{ { command -v gcsfuse >/dev/null ||
{ curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg |
sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null &&
echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc]
https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -c -s) main" |
sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null &&
sudo apt-get -qq -o DPkg::Lock::Timeout=300 update &&
sudo apt-get -qq -o DPkg::Lock::Timeout=300 install fuse3 gcsfuse; }; } &&
sudo install -d -o "\$(id -u)" -g "\$(id -g)" /mnt/${bucket} &&
sudo systemd-run --unit=ds_jax_bucket --uid="\$(id -u)" --gid="\$(id -g)"
--property=Type=forking "\$(command -v gcsfuse)" --implicit-dirs
--metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0
${bucket} /mnt/${bucket}; }
END
}

# A service outlives the connection, and gets SIGTERM when the machine goes
# down. libtpu locks more memory than a service may by default.
start_command() {
  join_lines <<END
sudo systemctl reset-failed ds_jax 2>/dev/null;
sudo systemd-run --unit=ds_jax --uid="\$(id -u)" --gid="\$(id -g)"
--working-directory="\$HOME/ds_jax"
--property=After=ds_jax_bucket.service
--property=KillMode=mixed --property=TimeoutStopSec=${STOP_SECONDS}
--property=LimitMEMLOCK=infinity
--property=StandardOutput=append:"\$HOME/ds_jax.log"
--property=StandardError=append:"\$HOME/ds_jax.log"
"\$HOME/ds_jax_venv/bin/python" -m ds_jax.main $(quote "${arguments[@]}")
END
}

# Ends when the service does, with its exit status.
logs_command() {
  join_lines <<END
tail -n 100 -F ~/ds_jax.log & tail=\$!; until ${ENDED}; do sleep 5; done;
sleep 1; kill \$tail;
exit "\$(systemctl show --property=ExecMainStatus --value ds_jax)"
END
}

stop_command() {
  echo "${ENDED} || sudo systemctl stop ds_jax" | join_lines
}

join_lines() {
  paste -s -d ' ' -
}

follow() {
  "${dry_run}" || say 'following worker 0; Ctrl-C leaves the run going'
  on_workers 0 "$(logs_command)"
}

main() {
  parse_arguments "$@"
  if ! "${dry_run}" && ! command -v gcloud >/dev/null; then
    fail 'there is no gcloud; install the Google Cloud CLI, or add --dry_run'
  fi
  if "${logs}" || "${stops}" || "${deletes}"; then
    if ((${#arguments[@]} > 0)); then
      fail '--logs, --stop and --delete take no command after --; leave it out'
    fi
    if "${logs}"; then
      follow
    fi
    if "${stops}"; then
      on_workers all "$(stop_command)"
    fi
    if "${deletes}"; then
      delete
    fi
    return
  fi

  check_run_arguments
  provision
  copy_tree
  on_workers all "$(install_command)"
  if [[ -n ${bucket} ]]; then
    on_workers all "$(mount_command)"
  fi
  on_workers all "$(start_command)"
  follow
}

main "$@"

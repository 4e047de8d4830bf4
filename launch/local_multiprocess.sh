#!/usr/bin/env bash
# Runs ds_jax.main as N processes on this machine.
#
#   launch/local_multiprocess.sh N [OPTIONS] --config=FILE --workdir=DIR [...]
#
# All other arguments go to ds_jax.main. Options, anywhere after N:
#   --gpu              one GPU for each process, of CUDA_VISIBLE_DEVICES where
#                      it's set; without, the processes share the CPU
#   --port=P           the coordinator's; without, one that is free
#   --grace_seconds=S  after one process failed, how long the others may take
#                      to end by themselves; without, 30 seconds more than
#                      --config.parallel.heartbeat_seconds
#   --dry_run          print the commands, one a line, and run nothing
#   --help             print this
#
# Process 0 writes to the terminal, process I to DIR/logs/process_I.log. SIGTERM
# and Ctrl-C reach every process as SIGTERM: they save, and end with status 0; a
# second one kills them. The same command again resumes. The exit status is that
# of the first process that failed, or 0. PYTHON names the interpreter.

set -euo pipefail

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

fail() {
  echo "local_multiprocess.sh: $*" >&2
  exit 2
}

say() {
  echo "local_multiprocess.sh: $*" >&2
}

# port_is_free PORT: whether nothing answers there.
port_is_free() {
  ! (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# find_port: a free port below those that the kernel gives out by itself.
find_port() {
  local port
  for _ in {1..50}; do
    port=$((20000 + RANDOM % 10000))
    if port_is_free "${port}"; then
      echo "${port}"
      return
    fi
  done
  fail 'no free port found from 20000 to 29999; choose one by --port=P'
}

# check_number NAME VALUE LEAST
check_number() {
  if ! [[ $2 =~ ^[0-9]{1,6}$ ]] || ((10#$2 < $3)); then
    fail "$1 is '$2'; expected a whole number of at least $3"
  fi
}

parse_arguments() {
  num_processes=''
  gpu=false
  dry_run=false
  port=''
  grace_seconds=''
  workdir=''
  heartbeat_seconds=60
  arguments=()
  local argument config=''
  for argument; do
    case ${argument} in
      --help | -h)
        usage
        exit 0
        ;;
    esac
  done
  if (($# == 0)) || [[ $1 == -* ]]; then
    fail "the first argument is '${1:-}'; expected the number of processes," \
      'as in: launch/local_multiprocess.sh 2 --config=FILE --workdir=DIR'
  fi
  num_processes=$1
  check_number 'the number of processes' "${num_processes}" 1
  shift
  for argument; do
    case ${argument} in
      --gpu) gpu=true ;;
      --dry_run) dry_run=true ;;
      --port=*)
        port=${argument#*=}
        check_number --port "${port}" 1
        ;;
      --grace_seconds=*)
        grace_seconds=${argument#*=}
        check_number --grace_seconds "${grace_seconds}" 0
        ;;
      --coordinator_address* | --num_processes* | --process_id*)
        fail "${argument} is set by this script for each process; leave it out"
        ;;
      *)
        arguments+=("${argument}")
        case ${argument} in
          --config=?*) config=${argument#*=} ;;
          --workdir=?*) workdir=${argument#*=} ;;
          --config.parallel.heartbeat_seconds=*)
            heartbeat_seconds=${argument#*=}
            check_number --config.parallel.heartbeat_seconds \
              "${heartbeat_seconds}" 1
            ;;
        esac
        ;;
    esac
  done
  if [[ -z ${config} ]]; then
    fail 'no --config=FILE given; expected a file of configs/'
  fi
  if [[ -z ${workdir} ]]; then
    fail 'no --workdir=DIR given; expected the folder that all processes share'
  fi
  grace_seconds=${grace_seconds:-$((heartbeat_seconds + 30))}
}

# choose_gpus: fills `gpus`, process I's at index I.
choose_gpus() {
  local i
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -r -a gpus <<<"${CUDA_VISIBLE_DEVICES}"
    if ((${#gpus[@]} < num_processes)); then
      fail "CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES} names ${#gpus[@]}" \
        "GPUs for ${num_processes} processes; expected one each: name more," \
        'or start fewer processes'
    fi
  else
    gpus=()
    for ((i = 0; i < num_processes; i++)); do
      gpus+=("${i}")
    done
  fi
}

# build_command I: fills `command` with what process I runs.
build_command() {
  command=(env)
  if "${gpu}"; then
    command+=("CUDA_VISIBLE_DEVICES=${gpus[$1]}")
  else
    command+=(JAX_PLATFORMS=cpu)
  fi
  command+=(
    "${python}" -m ds_jax.main "${arguments[@]}"
    "--coordinator_address=127.0.0.1:${port}"
    "--num_processes=${num_processes}" "--process_id=$1"
  )
}

log_of() {
  echo "${logs}/process_$1.log"
}

print_commands() {
  local i line
  printf 'mkdir -p %q\n' "${logs}"
  for ((i = 0; i < num_processes; i++)); do
    build_command "${i}"
    printf -v line '%q ' "${command[@]}"
    if ((i > 0)); then
      printf -v line '%s> %q 2>&1 ' "${line}" "$(log_of "${i}")"
    fi
    echo "${line}&"
  done
  echo wait
}

# signal_all SIGNAL: to every process that has not ended.
signal_all() {
  local pid
  for pid in "${pids[@]}"; do
    if [[ -n ${pid} ]]; then
      kill -s "$1" "${pid}" 2>/dev/null || true
    fi
  done
}

# interrupt: the first time SIGTERM, then SIGKILL.
interrupt() {
  if "${interrupted}"; then
    say 'killing all processes'
    signal_all KILL
  else
    interrupted=true
    say 'SIGTERM to all processes; they save and end'
    signal_all TERM
  fi
}

# report I STATUS: says that process I failed.
report() {
  if (($1 == 0)); then
    say "process 0 failed with status $2; its output is above"
    return
  fi
  say "process $1 failed with status $2; the end of $(log_of "$1"):"
  tail -n 20 "$(log_of "$1")" >&2
}

# wait_for_all: sets `first_status`, that of the first process that failed.
wait_for_all() {
  local i status running=${num_processes} deadline=''
  while ((running > 0)); do
    for ((i = 0; i < num_processes; i++)); do
      if [[ -z ${pids[i]} ]] || kill -0 "${pids[i]}" 2>/dev/null; then
        continue
      fi
      status=0
      wait "${pids[i]}" || status=$?
      pids[i]=''
      running=$((running - 1))
      if ((status == 0)); then
        continue
      fi
      if ((first_status == 0)); then
        first_status=${status}
        report "${i}" "${status}"
        deadline=$((SECONDS + grace_seconds))
        if ((num_processes > 1)); then
          say "the others have ${grace_seconds} s to end by themselves"
        fi
      else
        say "process ${i} ended with status ${status}, too"
      fi
    done
    if [[ -n ${deadline} ]] && ((running > 0 && SECONDS > deadline)); then
      say "killing the ${running} still running"
      signal_all KILL
      deadline=''
    fi
    # A trap runs when the sleep has ended.
    ((running == 0)) || sleep 0.1
  done
}

main() {
  parse_arguments "$@"
  python=${PYTHON:-python}
  logs=${workdir}/logs
  port=${port:-$(find_port)}
  if "${gpu}"; then
    choose_gpus
  fi
  if "${dry_run}"; then
    print_commands
    return
  fi
  if ! command -v "${python}" >/dev/null; then
    fail "there is no '${python}'; activate the virtual environment, or set" \
      'PYTHON to its interpreter'
  fi
  if ! port_is_free "${port}"; then
    fail "port ${port} is taken; choose another --port=P, or leave it out"
  fi

  mkdir -p "${logs}"
  pids=()
  interrupted=false
  first_status=0
  trap interrupt TERM INT HUP
  trap 'signal_all KILL' EXIT
  local i
  for ((i = 0; i < num_processes; i++)); do
    build_command "${i}"
    if ((i == 0)); then
      "${command[@]}" &
    else
      "${command[@]}" >"$(log_of "${i}")" 2>&1 &
    fi
    pids+=($!)
  done
  if "${interrupted}"; then
    signal_all TERM  # those that weren't started yet
  fi
  if ((num_processes > 1)); then
    say "the other processes' output is in ${logs}/process_*.log"
  fi
  wait_for_all
  exit "${first_status}"
}

main "$@"

# shellcheck shell=bash
# Sourced by test.sh and .ci/run, most of whose stages leave cores idle: ranks wait for each other, and most tools use one core.
#
#   stage COMMAND ...    starts it, once fewer than STAGES (2 if not set) others run, and shows its output when it ends
#   finish               waits for all stages; ends the script with 1 if one has not passed, and names it
logs=$(mktemp --directory)  # of each stage: N while it runs, N.passed or N.failed
commands=()
trap 'rm -r "$logs"' EXIT
trap stop INT TERM

stage() {
  while [ "$(jobs -pr | wc -l)" -ge "${STAGES:-2}" ]; do wait -n || true; done
  echo "-- $*"
  local log="$logs/${#commands[@]}"
  commands+=("$*")
  set -m  # a process group of its own, which `stop` ends whole
  {
    local end=failed begun=$SECONDS
    if "$@" >"$log" 2>&1 </dev/null; then end=passed; fi
    printf '== %s: %s after %d s\n' "$*" $end $((SECONDS - begun))
    cat "$log"
    mv "$log" "$log.$end"
  } &
  set +m
}

finish() {
  wait
  local number status=0
  for number in "${!commands[@]}"; do
    [ -e "$logs/$number.passed" ] || { echo "failed: ${commands[number]}"; status=1; }
  done
  [ $status = 0 ] || exit $status
}

stop() {  # shows as much as the stages have written
  local pid number
  for pid in $(jobs -pr); do kill -- "-$pid"; done
  for number in "${!commands[@]}"; do
    if [ -e "$logs/$number" ]; then printf '== %s: stopped\n' "${commands[number]}" && cat "$logs/$number"; fi
  done
  exit 130
}

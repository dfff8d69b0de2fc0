# shellcheck shell=bash
# Sourced by test.sh and .ci/run, whose stages leave cores idle: ranks wait for each other, and most tools use one core.
#
#   stage COMMAND ...    starts it, once fewer than STAGES others run (2), and shows its output when it ends
#   finish               waits for all stages; ends the script with 1 if one has failed, and names it
failures=$(mktemp)
trap 'rm "$failures"' EXIT
trap 'trap "" TERM; kill 0; exit 130' INT  # bash keeps Ctrl-C from what runs in the background

stage() {
  while [ "$(jobs -pr | wc -l)" -ge "${STAGES:-2}" ]; do wait -n || true; done
  echo "-- $*"
  {
    begun=$SECONDS
    output=$("$@" 2>&1) || echo "$*" >>"$failures"
    printf '== %s: %d s\n%s\n' "$*" $((SECONDS - begun)) "$output"
  } &
}

finish() {
  wait
  if [ -s "$failures" ]; then
    sed 's/^/failed: /' "$failures"
    exit 1
  fi
}

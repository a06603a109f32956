#!/usr/bin/env bash
# Hueshift with nothing but grpcurl, jq and base64: the server describes itself by reflection.
# Usage: examples/grpcurl.sh [ADDRESS] [OUT], with HUESHIFT_API_KEY set if the server wants a key.
set -euo pipefail
address="${1:-127.0.0.1:50051}"
out="${2:-out/grpcurl}"
mkdir -p "$out"

call() {
  # Pictures and files pass grpcurl's default of 4 MiB a message.
  local options=(-plaintext -max-msg-sz 16777216)
  if [[ -n "${HUESHIFT_API_KEY:-}" ]]; then
    options+=(-H "authorization: Bearer $HUESHIFT_API_KEY")
  fi
  grpcurl "${options[@]}" "$@"
}

# What there is, and is it ready?
call "$address" list
call -d '{"service": "hueshift.v1.GenerationService"}' "$address" grpc.health.v1.Health/Check

# The base model, its defaults and limits.
call "$address" hueshift.v1.ModelService/GetModel | jq '.model | {name, engine, defaultSteps, maxCount}'

# Two pictures. Every event is one JSON object; bytes are base64.
call -d '{"prompt": "a fluent 3d emoji of a dog face", "count": 2, "seeds": [1]}' \
  "$address" hueshift.v1.GenerationService/Generate |
  jq -r 'select(.image) | "\(.image.seed) \(.image.data)"' |
  while read -r seed data; do
    base64 -d <<<"$data" >"$out/dog-$seed.png"
    echo "$out/dog-$seed.png"
  done

# Fine-tuning: a stream of requests, first the spec, then the pictures, each in chunks of at most 1 MiB (these fit in one).
pictures=("$(dirname "$0")"/pictures/fox/train/*.png)
{
  for picture in "${pictures[@]}"; do wc -c <"$picture"; done |
    jq -s '{spec: {adapterId: "fox", subject: "FINE_TUNE_SUBJECT_SUBJECT", classNoun: "animal", pictures: map({sizeBytes: .})}}'
  for index in "${!pictures[@]}"; do
    base64 <"${pictures[$index]}" | tr -d '\n' | jq -R --argjson index "$index" '{chunk: {index: $index, data: .}}'
  done
} | call -d @ "$address" hueshift.v1.FineTuneService/CreateFineTune | tee "$out/job.json" | jq '.fineTune | {name, state, steps}'

# Follow the job to its end (samples are left out here: they are long).
jq '{name: .fineTune.name}' "$out/job.json" |
  call -d @ "$address" hueshift.v1.FineTuneService/WatchFineTune |
  jq -c 'select(.sample | not) | .progress // .stateChange.state'

# The adapter it made.
call -d '{}' "$address" hueshift.v1.AdapterService/ListAdapters |
  jq '.adapters[] | {name, revision, identifier, sizeBytes}'

#!/usr/bin/env bash
# Choosing an experts implementation for one model changes another one that was made earlier.
#
# transformers 5.23.0. The choice lives in the config, and from_config does not copy it: two models made
# from one config object share the choice for good. Seen with two small Mixtrals: set_experts_implementation
# on the first puts the second, which nobody touched, from grouped_mm to eager.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import logging

import torch
from transformers import AutoModelForCausalLM, MixtralConfig

logging.disable(logging.WARNING)
config = MixtralConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
)
first, second = (AutoModelForCausalLM.from_config(config) for _ in range(2))
before = second.config._experts_implementation
first.set_experts_implementation("eager")
after = second.config._experts_implementation
print("the second model:", before, "->", after)
assert (before, after) == ("grouped_mm", "eager"), "the behavior has changed"
PY

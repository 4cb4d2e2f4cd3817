#!/usr/bin/env bash
# torchtitan 0.2.2: gpt_oss with attn_mask_type = "block_causal" attends to later tokens; llama3 with the same does not.
#
# Expected: block_causal means causal attention within each document, whatever the model: no token sees a later one.
# llama3, qwen3, llama4 and deepseek_v3 begin with the causal mask and add the documents to it.
# Seen: gpt_oss takes the documents in place of the causal mask. In the layers with the basic mask, every second one, each
# token of a document sees all of its tokens; the mask of the layers with a sliding window is causal by itself. So the
# label stands among the inputs, and no error says so. "causal", which its flavors have, is right.
# So documents of gpt_oss must be masked by a mask of one's own that also asks for key position <= query position.
#
# Exit 0 while this is so, 1 once it changes. Needs Python 3.10 or newer and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 torchtitan==0.2.2 triton==3.9.0
"$folder/venv/bin/python" - <<'EOF'
import sys
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace

import torch
import torchtitan.models.gpt_oss as gpt_oss
import torchtitan.models.llama3 as llama3

print("torch", torch.__version__, "torchtitan", version("torchtitan"))
EOS = 1
TOKENS = torch.tensor([[5, 6, 7, EOS, 8, 9, 10, EOS] * 16])  # documents of four tokens; 128 is a block of the mask
KINDS = {
    "llama3": (llama3.Transformer, replace(llama3.llama3_args["debugmodel"], attn_type="flex", vocab_size=16)),
    "gpt_oss": (gpt_oss.GptOssModel, replace(gpt_oss.gptoss_configs["debugmodel"], vocab_size=16)),
}


def pairs(mask):
    """Pairs of query and key that a mask lets through: of later keys, and of keys of another document."""
    query, key = torch.arange(128)[:, None], torch.arange(128)[None]
    seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), query, key)
    seen = seen & torch.ones(128, 128, dtype=torch.bool)
    return int((seen & (key > query)).sum()), int((seen & (key // 4 != query // 4)).sum())


found = {}
for name, (model_type, args) in KINDS.items():
    for mask_type in ("causal", "block_causal"):
        with torch.device("meta"):
            model = model_type(replace(args, attn_mask_type=mask_type))
        masks = model.get_attention_masks(TOKENS, SimpleNamespace(eos_id=EOS))
        for layer, mask in (masks if isinstance(masks, dict) else {"all layers": masks}).items():
            later, others = found[name, mask_type, layer] = pairs(mask)
            print(f"{name:8} {mask_type:12} {layer:20} later tokens seen: {later:5}, of other documents: {others:5}")
later = {where: of_later for where, (of_later, _) in found.items()}
# A document of four tokens has six pairs with a later key, and there are 32 documents.
expected = {where: 32 * 6 if where == ("gpt_oss", "block_causal", "basic_mask") else 0 for where in later}
if later != expected or any(others for where, (_, others) in found.items() if where[1] == "block_causal"):
    sys.exit("this has changed")
EOF

#!/usr/bin/env python3
"""Check by hand that `transformers` loads an exported folder and computes the same numbers.

    pip install torch==2.15.0 transformers==5.23.0 safetensors==0.8.0
    python tests/golden/check_export.py EXPORT VECTORS

EXPORT is a folder that Tandem wrote. VECTORS is a safetensors file with `input_ids` and `cu_seqlens` (packed, see
make_golden.py) and either `logits [T, V]` of a causal model or `scores [B]` of a reward model. A golden model that was imported
and exported again must give its own golden vectors:

    python tests/golden/check_export.py runs/exported-llama tests/golden/llama/vectors.safetensors

Exit code 0 if all agree within 1e-4 of the largest magnitude, 1 if not.
"""
import argparse
import pathlib
import sys

import torch
import transformers
from safetensors.torch import load_file

TOLERANCE = 1e-4


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=pathlib.Path)
    parser.add_argument("vectors", type=pathlib.Path)
    args = parser.parse_args()

    vectors = load_file(args.vectors)
    kind = "scores" if "scores" in vectors else "logits"
    auto = transformers.AutoModelForSequenceClassification if kind == "scores" else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(
        args.export, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model.eval()
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            print(f"FAIL {args.export}: {problem}: {sorted(info[problem])}")
            return 1

    ids, cuts = vectors["input_ids"].long(), vectors["cu_seqlens"].tolist()
    rows = [model(ids[start:end][None]).logits[0] for start, end in zip(cuts, cuts[1:])]
    got, want = torch.cat(rows), vectors[kind]
    error = ((got - want).abs().max() / want.abs().max()).item()
    verdict = "ok" if error <= TOLERANCE else "FAIL"
    print(f"{verdict} {args.export}: {kind} {list(want.shape)}, largest difference {error:.2e} of the largest magnitude")
    return 0 if verdict == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())

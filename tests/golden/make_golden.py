#!/usr/bin/env python3
"""Make the golden vectors: tiny random models in the formats of `transformers`, and what it computes with them.

    pip install torch==2.15.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6 gguf==0.19.0
    python tests/golden/make_golden.py [FAMILY ...]          # writes tests/golden/<family>/, under a minute for all

The tests only read the files written here; they need no Python. Every weight is random, the ones usually left at 0 or 1 too
(biases, norm gains), so that a dropped bias or a swapped norm changes the numbers. Shapes are as unequal as a family allows
(grouped heads, head width not hidden/heads, MLP width not 4 × hidden), so that a transposed matrix cannot pass.

`vectors.safetensors` of a causal model, T tokens in B sequences, vocabulary V; each sequence is run alone, without padding:

    input_ids [T] u32, cu_seqlens [B+1] u32     sequence b is input_ids[cu_seqlens[b]..cu_seqlens[b+1]]; one has length 1
    logits [T, V] f32                           float32, eager attention, evaluation mode
    loss/nll_sum [B], loss/nll_mean [B]         over the length−1 predicted tokens of each sequence (0 for length 1)
    loss/mean [1]                               sum of nll_sum / all predicted tokens: the loss of the gradients below
    grad/<name>                                 its gradient, for every tensor of model.safetensors
    greedy/<i>/prompt_ids, greedy/<i>/new_ids   32 greedy tokens with a KV cache, EOS ignored; i = 0, 1

For the reward model (`llama-reward`) logits are replaced by

    token_scores [T]     the scalar head at every token
    scores [B]           at the last token, as LlamaForSequenceClassification returns
    loss/mean [1]        mean over pairs of −ln σ(score[2i] − score[2i+1]): the loss of the gradients
"""
import json
import pathlib
import shutil
import sys

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).resolve().parent
VOCABULARY = 97
LENGTHS = [7, 1, 13, 4]
GREEDY_PROMPT_LENGTHS = [5, 9]
NEW_TOKENS = 32
# A greedy choice closer than this could flip with the order of a sum; the seed is then changed.
GREEDY_MARGIN = 2e-3
GREEDY_DISTINCT = 8

SPECIAL = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=None)


def llama(**kw):
    defaults = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )
    return transformers.LlamaConfig(**SPECIAL, **(defaults | kw))


def opt(**kw):
    defaults = dict(
        hidden_size=32, ffn_dim=56, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        word_embed_proj_dim=32, do_layer_norm_before=True, dropout=0.0, activation_function="relu",
    )
    return transformers.OPTConfig(**SPECIAL, **(defaults | kw))


FAMILIES = {
    "llama": lambda: llama(),
    # A norm epsilon and a rotary base unlike the defaults: ignoring the config must show.
    "llama-tied": lambda: llama(
        tie_word_embeddings=True, num_hidden_layers=3, intermediate_size=40, num_key_value_heads=1, rms_norm_eps=1e-2,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    ),
    "llama-reward": lambda: llama(num_labels=1),
    "mistral": lambda: transformers.MistralConfig(
        **SPECIAL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=12, max_position_embeddings=64, sliding_window=5, tie_word_embeddings=False,
    ),
    "qwen2": lambda: transformers.Qwen2Config(
        **SPECIAL, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=False, use_sliding_window=False,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        **SPECIAL, n_embd=32, n_head=4, n_layer=2, n_inner=72, n_positions=64, layer_norm_epsilon=1e-2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "opt": lambda: opt(),
    # The shape of OPT-350m: norms after the residual sums, no final norm, narrower embeddings with projections.
    "opt-350m": lambda: opt(do_layer_norm_before=False, word_embed_proj_dim=20),
}
# Sharded on disk: several model-0000i-of-0000n.safetensors and an index.
SHARD_SIZE = {"qwen2": "60KB"}
# Written with the keys of transformers 4 (`rope_theta` at the top, `torch_dtype`), as most published folders have them.
OLD_CONFIG = {"llama-tied", "qwen2"}


def randomise(model, seed):
    """Every parameter random: matrices keep the scale of their input, gains lie around 1, biases around 0."""
    rng = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=rng)
        with torch.no_grad():
            if p.dim() == 2 and ("embed" in name or "wte" in name or "wpe" in name):
                # Small, or a tied head would mostly repeat the input token.
                p.copy_(0.15 * noise)
            elif p.dim() == 2:
                p.copy_(1.2 * noise / p.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                p.copy_(0.2 * noise)
            else:
                p.copy_(1 + 0.3 * noise)


def sequences(seed):
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.integers(3, VOCABULARY, n)) for n in LENGTHS]


def packed(seqs):
    """The two index tensors of a packed batch."""
    return {
        "input_ids": torch.cat(seqs).to(torch.uint32),
        "cu_seqlens": torch.tensor([0] + list(np.cumsum([len(s) for s in seqs]))).to(torch.uint32),
    }


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {f"grad/{name}": p.grad for name, p in model.named_parameters()}


def causal_vectors(model, seed):
    seqs = sequences(seed)
    logits = [model(s[None]).logits[0] for s in seqs]
    nll = [torch.nn.functional.cross_entropy(l[:-1], s[1:], reduction="sum") for l, s in zip(logits, seqs)]
    predicted = [len(s) - 1 for s in seqs]
    loss = sum(nll) / sum(predicted)
    out = packed(seqs) | gradients(model, loss)
    out["logits"] = torch.cat(logits)
    out["loss/nll_sum"] = torch.stack(nll)
    out["loss/nll_mean"] = torch.stack([n / max(count, 1) for n, count in zip(nll, predicted)])
    out["loss/mean"] = loss.reshape(1)
    return out


def reward_vectors(model, seed):
    seqs = sequences(seed)
    scores = torch.cat([model(s[None]).logits[0] for s in seqs])
    hidden = [model.model(s[None]).last_hidden_state[0] for s in seqs]
    loss = -torch.nn.functional.logsigmoid(scores[0::2] - scores[1::2]).mean()
    out = packed(seqs) | gradients(model, loss)
    out["token_scores"] = torch.cat([model.score(h)[:, 0] for h in hidden])
    out["scores"] = scores
    out["loss/mean"] = loss.reshape(1)
    return out


@torch.no_grad()
def greedy_vectors(model, seed):
    """Greedy continuations, or None if some choice was too close to call or they only repeat a few tokens."""
    rng, out = np.random.default_rng(seed), {}
    for i, length in enumerate(GREEDY_PROMPT_LENGTHS):
        prompt = torch.tensor(rng.integers(3, VOCABULARY, length))[None]
        made = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0,
        )
        top = model(made).logits[0, length - 1 : -1].topk(2).values
        new = made[0, length:]
        if (top[:, 0] - top[:, 1]).min() < GREEDY_MARGIN or len(set(new.tolist())) < GREEDY_DISTINCT:
            return None
        assert len(new) == NEW_TOKENS
        out[f"greedy/{i}/prompt_ids"] = prompt[0].to(torch.uint32)
        out[f"greedy/{i}/new_ids"] = new.to(torch.uint32)
    return out


def save_vectors(path, tensors):
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)
    path.chmod(0o644)


def rewrite_config(path):
    """Today's config.json with yesterday's keys; `transformers` reads both."""
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make(family):
    config = FAMILIES[family]()
    reward = family == "llama-reward"
    auto = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for seed in range(1000):
        randomise(model, seed)
        greedy = {} if reward else greedy_vectors(model, seed)
        if greedy is not None:
            break
    else:
        raise SystemExit(f"{family}: no seed with clear and varied greedy choices")

    folder = HERE / family
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE.get(family, "1GB"))
    if family in OLD_CONFIG:
        rewrite_config(folder / "config.json")
    vectors = (reward_vectors if reward else causal_vectors)(model, seed) | greedy
    save_vectors(folder / "vectors.safetensors", vectors)

    again = auto.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    key = "scores" if reward else "logits"
    check = (reward_vectors if reward else causal_vectors)(again, seed)[key]
    assert torch.equal(check, vectors[key]), f"{family}: the saved folder gives other numbers"
    stored = {name for file in folder.glob("model*.safetensors") for name in load_file(file)}
    assert stored == {name[5:] for name in vectors if name.startswith("grad/")}, f"{family}: names differ"
    print(f"{family:14s} seed {seed:2d}  {sum(f.stat().st_size for f in folder.iterdir()) / 1e3:6.0f} kB  {config.model_type}")


def permute(weight, heads):
    """Rows of q and k as llama.cpp stores them: rotary pairs interleaved instead of half-split (convert_hf_to_gguf.py)."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def unpermute(weight, heads):
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name):
    """`model.layers.0.self_attn.q_proj.weight` → `blk.0.attn_q.weight`."""
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }
    stem = name.removesuffix(".weight")
    if stem in ends:
        return f"{ends[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{parts[part]}.weight"


def make_gguf():
    """The weights of `llama/` as GGUF, in F32 and in Q8_0; for Q8_0 also the logits of the dequantised weights."""
    source, folder = HERE / "llama", HERE / "llama-gguf"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model = transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0):
        path = folder / f"model-{kind.name.lower()}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_name("tandem golden llama")
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_vocab_size(config.vocab_size)
        writer.add_bos_token_id(config.bos_token_id)
        writer.add_eos_token_id(config.eos_token_id)
        quantised = {}
        for name, tensor in model.state_dict().items():
            data = tensor.numpy()
            count = next((n for part, n in heads.items() if part in name), None)
            if count:
                data = permute(data, count)
            # llama.cpp never quantises one-dimensional tensors.
            this = kind if data.ndim == 2 else gguf.GGMLQuantizationType.F32
            stored = gguf.quants.quantize(np.ascontiguousarray(data), this)
            writer.add_tensor(gguf_name(name), stored, raw_dtype=this)
            back = gguf.quants.dequantize(stored, this)
            quantised[name] = torch.from_numpy(np.ascontiguousarray(unpermute(back, count) if count else back))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if kind == gguf.GGMLQuantizationType.F32:
            assert all(torch.equal(quantised[n], t) for n, t in model.state_dict().items())
        else:
            model.load_state_dict(quantised)
            vectors = causal_vectors(model, 0)
            save_vectors(folder / "vectors-q8_0.safetensors", {k: vectors[k] for k in ("input_ids", "cu_seqlens", "logits")})
    print(f"{'llama-gguf':14s} {sum(f.stat().st_size for f in folder.iterdir()) / 1e3:14.0f} kB")


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    wanted = sys.argv[1:] or [*FAMILIES, "llama-gguf"]
    for family in wanted:
        if family == "llama-gguf":
            make_gguf()
        elif family in FAMILIES:
            make(family)
        else:
            raise SystemExit(f"unknown family {family}; known: {', '.join([*FAMILIES, 'llama-gguf'])}")


if __name__ == "__main__":
    main()

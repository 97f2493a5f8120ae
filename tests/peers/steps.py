"""The peer's side of the whole-step benchmark: PyTorch and transformers on the same work as `bench case`.

    python steps.py {sft|reward|generate|ppo} --shape small --precision bf16 --variant compiled --threads 2 --steps 5

The last line of stdout is a JSON object (README.md). Shapes, lengths and token ids are those of tests/src/bench. The
models are made from a seed, as time does not depend on the weights. They are in f32; bf16 is autocast where there is
training, and bf16 weights where there is none, which is the fastest that the libraries offer.

Written against torch 2.15.0 and transformers 5.23.0:

    python3 -m venv venv && venv/bin/pip install torch==2.15.0 transformers==5.23.0
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, StaticCache

PAD = 0
SEQUENCES, PROMPT_TOKENS, NEW_TOKENS = 16, (64, 128), 128


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model, its training step and the micro-batch of its PPO iteration."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int
    max_positions: int
    rope_theta: float
    tied: bool
    sequences: int
    length: int
    ppo_micro_batch: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.mlp_width,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=self.tied,
            rms_norm_eps=1e-5,
            initializer_range=0.02,
            pad_token_id=PAD,
            attn_implementation="sdpa",
        )


SHAPES = {
    "tiny": Shape(128, 4, 4, 4, 32, 352, 4096, 2048, 10_000.0, False, 16, 256, 16),
    "small": Shape(256, 8, 8, 8, 32, 688, 8192, 2048, 10_000.0, False, 16, 256, 16),
    "smollm": Shape(576, 30, 9, 3, 64, 1536, 49_152, 8192, 100_000.0, True, 4, 512, 4),
}


class ScalarModel(nn.Module):
    """A score for every position: a reward model or a critic."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return self.score(hidden).squeeze(-1).float()


def language_model(shape: Shape, seed: int = 1234) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(shape.config())


def scalar_model(shape: Shape, seed: int) -> ScalarModel:
    torch.manual_seed(seed)
    return ScalarModel(shape.config())


def frozen(model: nn.Module, precision: str) -> nn.Module:
    """For forwards alone: no gradients, weights in what is computed in."""
    return model.to(torch.bfloat16 if precision == "bf16" else torch.float32).requires_grad_(False).eval()


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")


def compiled(function: Callable, freezing: bool = False) -> Callable:
    return torch.compile(function, dynamic=False, options={"freezing": freezing})


def optimizer(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)


def update(model: nn.Module, adamw: torch.optim.AdamW) -> None:
    """Clips the gradients, applies and forgets them."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not torch.isfinite(norm):
        raise RuntimeError("the gradient is not finite")
    adamw.step()
    adamw.zero_grad(set_to_none=True)


def scrambled(stream: int, index: int) -> int:
    """SplitMix64, as in tests/src/bench/mod.rs."""
    word = 2**64 - 1
    z = (((stream << 40) + index) * 0x9E37_79B9_7F4A_7C15) & word
    z = ((z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & word
    return z ^ (z >> 31)


def tokens(stream: int, length: int, vocabulary: int) -> list[int]:
    return [3 + scrambled(stream, index) % (vocabulary - 3) for index in range(length)]


def lengths(stream: int, count: int, least: int, most: int) -> list[int]:
    """`count` lengths from `least` to `most`; the first is `most`."""
    return [most] + [least + scrambled(stream, index) % (most - least + 1) for index in range(1, count)]


def timed(warmup: int, steps: int, step: Callable[[], None]) -> list[float]:
    """Seconds of the last `steps` of `warmup + steps` calls."""
    seconds = []
    for _ in range(warmup + steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds[warmup:]


def measured(seconds: list[float], count: int, phases: list[tuple[str, float]] | None = None) -> dict:
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "tokens": count, "peak_mib": peak_kib / 1024, "phases": phases or []}


def train(model: nn.Module, loss: Callable[[], Tensor], args: argparse.Namespace, count: int) -> dict:
    """Steps of forward, backward and AdamW."""
    adamw = optimizer(model.train())
    if args.variant == "compiled":
        loss = compiled(loss)

    def step() -> None:
        with autocast(args.precision):
            value = loss()
        value.backward()
        update(model, adamw)

    return measured(timed(args.warmup, args.steps, step), count)


def sft(args: argparse.Namespace, shape: Shape) -> dict:
    model = language_model(shape)
    ids = torch.tensor([tokens(row, shape.length, shape.vocabulary) for row in range(shape.sequences)])
    return train(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, args, ids.numel())


def reward(args: argparse.Namespace, shape: Shape) -> dict:
    """Pairs of unequal length in one batch, chosen and rejected side by side, padded on the right."""
    model = scalar_model(shape, 1234)
    sizes = lengths(1, shape.sequences, shape.length // 2, shape.length)
    rows = [tokens(row, size, shape.vocabulary) for row, size in enumerate(sizes)]
    ids = torch.tensor([row + [PAD] * (shape.length - len(row)) for row in rows])
    row_numbers, last = torch.arange(len(rows)), torch.tensor(sizes) - 1

    def loss() -> Tensor:
        # No mask: attention is causal, so that nothing that counts sees the padding; a mask would cost time.
        scores = model(ids)[row_numbers, last]
        return -F.logsigmoid(scores[0::2] - scores[1::2]).mean()

    return train(model, loss, args, sum(sizes))


def prompts(shape: Shape, iteration: int) -> tuple[Tensor, Tensor]:
    """The prompts of an iteration, padded on the left, and their mask."""
    sizes = lengths(1000 + iteration, SEQUENCES, *PROMPT_TOKENS)
    rows = [tokens(2000 + 100 * iteration + row, size, shape.vocabulary) for row, size in enumerate(sizes)]
    ids = torch.tensor([[PAD] * (PROMPT_TOKENS[1] - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (PROMPT_TOKENS[1] - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


class Generate:
    """`generate` of transformers: temperature 1, nothing cut off, no token that stops."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        model.generation_config.eos_token_id = None

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=mask, pad_token_id=PAD, eos_token_id=None, **settings)
        return out.clone()  # one that a backward may keep


def draw(logits: Tensor) -> Tensor:
    """A token for each row, with the probabilities of the logits (the Gumbel-max trick)."""
    noise = -torch.log(-torch.log(torch.rand_like(logits).clamp_min(1e-20)))
    return (logits + noise).argmax(-1, keepdim=True)


class Loop:
    """A loop of one's own: a cache of fixed size and a token's forward and draw in one compiled graph."""

    def __init__(self, model: LlamaForCausalLM, freeze: bool) -> None:
        """`freeze` makes constants of the weights, for a model that never changes."""
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=PROMPT_TOKENS[1] + NEW_TOKENS)
        self.decode = compiled(self._decode, freezing=freeze)

    def _decode(self, token: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        return draw(self._logits(token, position, mask))

    def _logits(self, ids: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """Logits after the last of the tokens, which go into the cache."""
        settings = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        out = self.model(input_ids=ids, position_ids=position, attention_mask=mask, **settings)
        return out.logits[:, -1].float()

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.cache.reset()
        prompt = ids.shape[1]
        position = (mask.cumsum(-1) - 1).clamp_min(0)
        sequences = F.pad(ids, (0, NEW_TOKENS))
        sequences[:, prompt : prompt + 1] = token = draw(self._logits(ids, position, mask))
        # Rows end at the same column of the cache, as the padding is on the left.
        seen = F.pad(mask, (0, NEW_TOKENS)).bool()[:, None, None]
        position = position[:, -1:]
        for column in range(prompt, prompt + NEW_TOKENS - 1):
            seen[..., column] = True
            position = position + 1
            token = self.decode(token, position, seen)
            sequences[:, column + 1 : column + 2] = token
        return sequences


def generate(args: argparse.Namespace, shape: Shape) -> dict:
    model = frozen(language_model(shape), args.precision)
    sampler = Loop(model, freeze=True) if args.variant == "loop" else Generate(model)
    ids, mask = prompts(shape, 0)

    def step() -> None:
        if sampler(ids, mask).shape != (SEQUENCES, PROMPT_TOKENS[1] + NEW_TOKENS):
            raise RuntimeError("a sequence ended early")

    return measured(timed(args.warmup, args.steps, step), SEQUENCES * NEW_TOKENS)


def log_probs(model: LlamaForCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities of the responses' tokens; logits of the prompts are not computed."""
    out = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=NEW_TOKENS + 1)
    logits = out.logits[:, :-1].flatten(0, 1).float()
    return -F.cross_entropy(logits, ids[:, -NEW_TOKENS:].flatten(), reduction="none").view(-1, NEW_TOKENS)


def advantages_of(rewards: Tensor, values: Tensor) -> Tensor:
    """Generalised advantage estimation, gamma 1, lambda 0.95 (Schulman et al., 2016)."""
    following = F.pad(values[:, 1:], (0, 1))
    deltas = rewards + following - values
    columns, advantage = [], torch.zeros(len(rewards))
    for delta in reversed(deltas.unbind(1)):
        advantage = delta + 0.95 * advantage
        columns.append(advantage)
    return torch.stack(columns[::-1], 1)


class Ppo:
    """A PPO iteration in the way of DeepSpeed-Chat: four models, sequences of one length, one epoch, one update."""

    def __init__(self, args: argparse.Namespace, shape: Shape) -> None:
        self.shape, self.precision = shape, args.precision
        self.actor, self.critic = language_model(shape).train(), scalar_model(shape, 1235).train()
        self.reference = frozen(language_model(shape), args.precision)
        self.reward = frozen(scalar_model(shape, 1236), args.precision)
        self.optimizers = optimizer(self.actor), optimizer(self.critic)
        # In bf16 a copy of the actor samples, because autocast would convert the weights again for every token.
        self.copy = frozen(copy.deepcopy(self.actor), "bf16") if args.precision == "bf16" else None
        player = self.copy or self.actor
        self.sampler = Loop(player, freeze=False) if args.variant == "loop" else Generate(player)
        self.laps: list[list[float]] = []

    def __call__(self) -> None:
        marks = [time.perf_counter()]
        ids, mask = self.sample(*prompts(self.shape, len(self.laps)))
        marks.append(time.perf_counter())
        parts = [self.score(*part) for part in self.parts(ids, mask)]
        old_log_probs, reference, old_values, scores = (torch.cat(part) for part in zip(*parts))
        marks.append(time.perf_counter())
        rewards = -0.1 * (old_log_probs - reference)
        rewards[:, -1] += scores.clamp(-5.0, 5.0)
        advantages = advantages_of(rewards, old_values)
        self.learn(self.actor, self.optimizers[0], self.actor_loss, ids, mask, old_log_probs, advantages)
        self.learn(self.critic, self.optimizers[1], self.critic_loss, ids, mask, old_values, advantages + old_values)
        marks.append(time.perf_counter())
        self.laps.append([end - start for start, end in zip(marks, marks[1:])])

    def parts(self, *batch: Tensor) -> list[tuple[Tensor, ...]]:
        """The batch, in micro-batches."""
        return list(zip(*(tensor.split(self.shape.ppo_micro_batch) for tensor in batch)))

    def sample(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        self.actor.eval()
        if self.copy is not None:
            with torch.no_grad():
                torch._foreach_copy_(list(self.copy.parameters()), list(self.actor.parameters()))
        sequences = self.sampler(ids, mask)
        self.actor.train()
        return sequences, F.pad(mask, (0, NEW_TOKENS), value=1)

    @torch.no_grad()
    def score(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities of actor and reference, values and scores."""
        with autocast(self.precision):
            actor, reference = log_probs(self.actor, ids, mask), log_probs(self.reference, ids, mask)
            return actor, reference, self.values(ids, mask), self.reward(ids, mask)[:, -1]

    def values(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The critic's values of the states before each token of the response."""
        return self.critic(ids, mask)[:, -NEW_TOKENS - 1 : -1]

    def actor_loss(self, ids: Tensor, mask: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        ratio = torch.exp(log_probs(self.actor, ids, mask) - old)
        return torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()

    def critic_loss(self, ids: Tensor, mask: Tensor, old: Tensor, returns: Tensor) -> Tensor:
        values = self.values(ids, mask)
        clipped = torch.clamp(values, old - 0.2, old + 0.2)
        return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2).mean()

    def learn(self, model: nn.Module, adamw: torch.optim.AdamW, loss: Callable[..., Tensor], *batch: Tensor) -> None:
        parts = self.parts(*batch)
        for part in parts:
            with autocast(self.precision):
                value = loss(*part) / len(parts)
            value.backward()
        update(model, adamw)


def ppo(args: argparse.Namespace, shape: Shape) -> dict:
    iteration = Ppo(args, shape)
    seconds = timed(args.warmup, args.steps, iteration)
    laps = zip(*iteration.laps[args.warmup :])
    phases = [(name, statistics.median(lap)) for name, lap in zip(("generate", "score", "train"), laps)]
    return measured(seconds, SEQUENCES * (PROMPT_TOKENS[1] + NEW_TOKENS), phases)


WORKS: dict[str, tuple[Callable[[argparse.Namespace, Shape], dict], tuple[str, str]]] = {
    "sft": (sft, ("eager", "compiled")),
    "reward": (reward, ("eager", "compiled")),
    "generate": (generate, ("generate", "loop")),
    "ppo": (ppo, ("eager", "loop")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="A benchmark step with PyTorch and transformers.")
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--variant", required=True)
    parser.add_argument("--threads", type=int, default=0, help="0: as PyTorch chooses")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    args = parser.parse_args()
    run, variants = WORKS[args.work]
    if args.variant not in variants:
        parser.error(f"{args.work} has the variants {', '.join(variants)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    print(json.dumps(run(args, SHAPES[args.shape])))


if __name__ == "__main__":
    main()

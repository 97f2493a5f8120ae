"""The peer's side of `generate` and `ppo` with other libraries: CTranslate2 samples, TRL takes a PPO iteration.

    python libraries.py generate --shape small --precision bf16 --variant ctranslate2 --threads 2 --steps 5
    python libraries.py ppo --shape small --precision bf16 --variant trl --threads 2 --steps 3

As steps.py, whose shapes, lengths and token ids these are; the last line of stdout is the same. Written against ctranslate2 4.8.5 and
trl 1.10.0, the last release with a PPO trainer:

    venv/bin/pip install ctranslate2==4.8.5 datasets accelerate && venv/bin/pip install --no-deps trl==1.10.0
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMPUTE_TYPES = {"f32": "float32", "bf16": "bfloat16"}


def tokenizer(vocabulary: int):
    """One in which token `i` is written `ti`: both libraries want one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"t{index}": index for index in range(vocabulary)}, unk_token="t3")
    names = {"pad_token": "t0", "bos_token": "t1", "eos_token": "t2"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), padding_side="left", **names)


def converted(args: argparse.Namespace, folder: Path) -> None:
    """Leaves the model in CTranslate2's format, and the prompts, in `folder`."""
    import ctranslate2
    import steps

    shape = steps.SHAPES[args.shape]
    source = folder / "source"
    steps.language_model(shape).save_pretrained(source)
    tokenizer(shape.vocabulary).save_pretrained(source)
    converter = ctranslate2.converters.TransformersConverter(str(source))
    converter.convert(str(folder / "model"), quantization=COMPUTE_TYPES[args.precision])
    ids, mask = steps.prompts(shape, 0)
    prompts = [row[seen.bool()].tolist() for row, seen in zip(ids, mask)]
    work = {"prompts": prompts, "new": steps.NEW_TOKENS}
    (folder / "work.json").write_text(json.dumps(work))


def generate(args: argparse.Namespace) -> dict:
    """Prompts of unequal length, temperature 1, nothing cut off, no token that stops."""
    import ctranslate2

    with tempfile.TemporaryDirectory() as folder:
        # Another process, for PyTorch is no part of what is measured.
        command = [sys.executable, __file__, *sys.argv[1:], "--convert-to", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        compute_type, threads = COMPUTE_TYPES[args.precision], args.threads
        model = ctranslate2.Generator(f"{folder}/model", compute_type=compute_type, intra_threads=threads)
        work = json.loads(Path(folder, "work.json").read_text())
    if model.compute_type != compute_type:
        raise RuntimeError(f"{model.compute_type} instead of {compute_type}: this processor has no {args.precision}")
    new, prompts = work["new"], [[f"t{token}" for token in prompt] for prompt in work["prompts"]]
    settings = {"max_length": new, "min_length": new, "sampling_topk": 0, "sampling_temperature": 1.0}
    seconds = []
    for _ in range(args.warmup + args.steps):
        start = time.perf_counter()
        answers = model.generate_batch(prompts, include_prompt_in_result=False, end_token=["t2"], **settings)
        seconds.append(time.perf_counter() - start)
        if any(len(answer.sequences_ids[0]) < new - 1 for answer in answers):
            raise RuntimeError("a sequence ended early")
    return measured(seconds[args.warmup :], len(prompts) * new)


def ppo(args: argparse.Namespace) -> dict:
    """`PPOTrainer`: one epoch of one update on the sequences of an iteration."""
    os.environ.update(ACCELERATE_USE_CPU="true", TRL_EXPERIMENTAL_SILENCE="1")
    import datasets
    import steps
    import torch
    from transformers import LlamaForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    shape, count = steps.SHAPES[args.shape], steps.SEQUENCES
    ids, mask = steps.prompts(shape, 0)
    prompts = datasets.Dataset.from_dict({"input_ids": [row[seen.bool()].tolist() for row, seen in zip(ids, mask)]})
    config = shape.config()
    config.num_labels = 1
    torch.manual_seed(1235)
    value, score = LlamaForSequenceClassification(config), LlamaForSequenceClassification(config)
    starts, sample = [], ppo_trainer.batch_generation

    def marked(*inputs, **settings):
        starts.append(time.perf_counter())
        return sample(*inputs, **settings)

    ppo_trainer.batch_generation = marked
    with tempfile.TemporaryDirectory() as folder:
        settings = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=shape.ppo_micro_batch,
            gradient_accumulation_steps=count // shape.ppo_micro_batch,
            num_mini_batches=1,
            num_ppo_epochs=1,
            local_rollout_forward_batch_size=count,
            total_episodes=count * (args.warmup + args.steps),
            response_length=steps.NEW_TOKENS,
            temperature=1.0,
            kl_coef=0.1,
            learning_rate=1e-4,
            optim="adamw_torch_fused",
            bf16=args.precision == "bf16",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            num_sample_generations=0,
            gradient_checkpointing=False,
            dataloader_drop_last=True,
            disable_tqdm=True,
        )
        trainer = PPOTrainer(
            args=settings,
            processing_class=tokenizer(shape.vocabulary),
            model=steps.language_model(shape),
            ref_model=steps.language_model(shape),
            reward_model=score,
            value_model=value,
            train_dataset=prompts,
        )
        trainer.train()
    ends = [*starts[1:], time.perf_counter()]
    seconds = [end - start for start, end in zip(starts, ends)]
    return measured(seconds[args.warmup :], count * (steps.PROMPT_TOKENS[1] + steps.NEW_TOKENS))


def measured(seconds: list[float], count: int) -> dict:
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "tokens": count, "peak_mib": peak_kib / 1024, "phases": []}


WORKS = {("generate", "ctranslate2"): generate, ("ppo", "trl"): ppo}


def main() -> None:
    parser = argparse.ArgumentParser(description="A benchmark step with CTranslate2 or TRL.")
    parser.add_argument("work", choices=("generate", "ppo"))
    parser.add_argument("--shape", choices=("tiny", "small", "smollm"), default="small")
    parser.add_argument("--precision", choices=COMPUTE_TYPES, default="f32")
    parser.add_argument("--variant", required=True)
    parser.add_argument("--threads", type=int, default=0, help="0: as the library chooses")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--convert-to", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert_to:
        return converted(args, Path(args.convert_to))
    if (args.work, args.variant) not in WORKS:
        parser.error(" and ".join(f"{work} has the variant {variant}" for work, variant in WORKS))
    if args.threads and args.work == "ppo":
        import torch

        torch.set_num_threads(args.threads)
    print(json.dumps(WORKS[args.work, args.variant](args)))


if __name__ == "__main__":
    main()

"""A training step beside TRL's RLOO and GRPO, with the same network, adapter, prompt, reward and number of texts, alternating
in one run: seconds by phase, memory, and the floor of the matrix products. Run on purpose: `make bench`.

    python tests/benchmarks/bench_step.py CASE [--threads N] [--steps N] [--peer RLOO] [--alone ours]

`--peer bfloat16`: the same step of ours with bf16 products and float32 master weights takes the place of the peer.
`--alone ours`, or `--alone` with a peer: the most memory that two steps of that one take, in a process of its own."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from apart import told_by

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs" / "bench"
CHAT = Path(os.environ.get("PPL_LM_CHAT_MODEL", ROOT.parent / "smollm2"))  # SmolLM2-135M-Instruct
GPT2 = {"vocab_size": 50257, "n_positions": 256}
CASES = {  # network, adapter's rank or 0, prompt tokens, texts, tokens of each
    "chat, LoRA, after 30": (CHAT, 16, 30, 16, 24),
    "chat, LoRA, after 200": (CHAT, 16, 200, 16, 24),
    "GPT-2 small": ({"n_layer": 12, "n_embd": 768, "n_head": 12}, 0, 8, 16, 32),
    "GPT-2 of 3 M": ({"n_layer": 4, "n_embd": 256, "n_head": 8, "vocab_size": 1024}, 0, 8, 64, 32),
    "GPT-2 of 17 M": ({"n_layer": 6, "n_embd": 256, "n_head": 8}, 0, 8, 64, 32),
    "tiny": ({"n_layer": 2, "n_embd": 32, "n_head": 4}, 0, 8, 8, 8),
}
SEED, BETA = 0, 1.0


def reward(completions, **_):
    return [len(set(text)) / 10 for text in completions]


def network(what):
    """A network and its tokenizer: of a folder, or a GPT-2 of random weights with made-up words."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    if isinstance(what, Path):
        if not what.is_dir():
            pytest.skip(f"needs SmolLM2-135M-Instruct in {what} (PPL_LM_CHAT_MODEL)")
        return AutoModelForCausalLM.from_pretrained(what, dtype=torch.float32), AutoTokenizer.from_pretrained(what)
    from tokenizers import Tokenizer, models, pre_tokenizers

    shape = {**GPT2, **what}
    words = {f"w{i}": i for i in range(shape["vocab_size"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="w1"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="w0", pad_token="w0")
    name = "-".join(str(shape[key]) for key in ("n_layer", "n_embd", "vocab_size"))
    folder = RUNS / f"gpt2-{name}"  # TRL loads its reference by name
    if not folder.is_dir():
        torch.manual_seed(SEED)
        made = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, pad_token_id=0))
        made.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def prompt_of(tokenizer, count):
    """A text of about so many tokens, with no chat template around it."""
    words = [f"w{100 + i}" for i in range(count)] if "w100" in tokenizer.get_vocab() else ["soup"] * count
    return " ".join(words)


def memory(name="VmHWM"):
    """Bytes, the most that this process has held since `memory_from_now`, by Linux."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(name))


def memory_from_now():
    """Bytes that this process holds; what was the most is forgotten."""
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    return memory("VmRSS")


class Ours:
    """One step of `SequenceELBO` with Adam, in its phases."""

    def __init__(self, what, rank, prompt, texts, tokens, dtype=torch.float32):
        import ppl_lm
        from ppl_lm.guides import finetuned, lora
        from ppl_lm.infer.binding import bind
        from ppl_lm.models import tilted

        model, tokenizer = network(what)
        prior = ppl_lm.LanguageModel(model.to(dtype), tokenizer, tokens)
        self.prompts = prior.prompts([prompt])
        self.model = bind(tilted, prior, reward=ppl_lm.Reward(reward), beta=BETA)
        self.guide = bind(lora, prior.adapted(rank=rank)) if rank else bind(finetuned, prior.copy())
        self.elbo = ppl_lm.SequenceELBO(num_particles=texts)
        weights = [weight for weight in self.guide.parameters() if weight.requires_grad]
        self.optimiser = torch.optim.AdamW(weights, lr=1e-6)

    def step(self):
        """Seconds of each phase."""
        began = time.perf_counter()
        drawn = self.elbo.particles(self.model, self.guide, self.prompts)
        after_draws = time.perf_counter()
        self.elbo.accumulate(drawn)
        after_gradient = time.perf_counter()
        self.optimiser.step()
        self.optimiser.zero_grad()
        end = time.perf_counter()
        return {
            "draw, score by the prior, reward": after_draws - began,
            "gradient": after_gradient - after_draws,
            "optimiser": end - after_gradient,
            "all": end - began,
        }


def theirs(peer, what, rank, prompt, texts, tokens, steps, between):
    """Seconds of each step of TRL's trainer of that name; `between` is called between two of them."""
    import pyarrow
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback

    seconds, began = [], [0.0]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            between()
            began[0] = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - began[0])

    model, tokenizer = network(what)
    config = getattr(trl, f"{peer}Config")(
        output_dir=str(RUNS / "trl"), per_device_train_batch_size=texts, num_generations=texts, max_completion_length=tokens,
        max_steps=steps, beta=0.05, learning_rate=1e-6, report_to="none", use_cpu=not torch.cuda.is_available(), bf16=False,
        gradient_checkpointing=False, logging_steps=1000, save_strategy="no", seed=SEED, disable_tqdm=True, temperature=1.0,
        generation_kwargs={"min_new_tokens": tokens},
    )  # fmt: skip
    adapter = (
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM") if rank else None
    )
    rows = Dataset(
        pyarrow.table({"prompt": [prompt] * 64}), fingerprint="bench"
    )  # whose hash not all versions can make
    trainer = getattr(trl, f"{peer}Trainer")(
        model=model, reward_funcs=reward, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=adapter,
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return seconds


def floor(what, prompt, texts, tokens):
    """Seconds of a step's matrix products alone, at the pace of one large product on this machine: texts drawn token by token,
    scored by the prior, and scored with gradient, the prompt once; 2 operations a weight and token, 4 more for a gradient."""
    a, b = torch.randn(512, 1024), torch.randn(1024, 1024)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    pace = 2 * 512 * 1024 * 1024 / statistics.median(times)
    model, tokenizer = network(what)
    weights = sum(weight.numel() for weight in model.parameters())
    count = len(tokenizer(prompt)["input_ids"])
    return 2 * weights * (count + texts * tokens) * (1 + 1 + 3) / pace


def run(case, threads, steps, peer):
    """One case, alternating, in this process."""
    torch.set_num_threads(threads)
    what, rank, width, texts, tokens = CASES[case]
    _, tokenizer = network(what)
    prompt = prompt_of(tokenizer, width)
    ours = Ours(what, rank, prompt, texts, tokens)
    rows, seconds = [ours.step()], []
    half = Ours(what, rank, prompt, texts, tokens, torch.bfloat16) if peer == "bfloat16" else None
    for _ in range(steps + 1 if half else 0):
        rows.append(ours.step())
        seconds.append(half.step()["all"])
    seconds = seconds[1:]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seconds = (
                seconds
                or theirs(peer, what, rank, prompt, texts, tokens, steps + 1, lambda: rows.append(ours.step()))[1:]
            )
    except ImportError:
        rows += [ours.step() for _ in range(steps)]
    rows = rows[2:] if len(rows) > 2 else rows[1:]  # the first ones find out what they need
    made = {
        "case": case, "threads": threads, "device": str(ours.prompts.ids.device),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__, "transformers": transformers.__version__, "steps": len(rows), "peer": peer,
        "ours": {phase: statistics.median(row[phase] for row in rows) for phase in rows[0]},
        "other": statistics.median(seconds) if seconds else None, "floor": floor(what, prompt, texts, tokens),
    }  # fmt: skip
    made["ratio"] = made["other"] / made["ours"]["all"] if made["other"] else None
    return made


def alone(case, threads, who):
    """Bytes, the most that two steps take, the network included, beyond what was held after all that is imported."""
    torch.set_num_threads(threads)
    what, rank, width, texts, tokens = CASES[case]
    import peft  # noqa: F401

    import ppl_lm.guides  # noqa: F401

    if who != "ours":
        import datasets  # noqa: F401
        import trl

        getattr(trl, f"{who}Trainer")  # loads it
    before = memory_from_now()
    prompt = prompt_of(network(what)[1], width)
    if who == "ours":
        ours = Ours(what, rank, prompt, texts, tokens)
        for _ in range(2):
            ours.step()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs(who, what, rank, prompt, texts, tokens, 2, lambda: None)
    return memory() - before


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", [name for name in CASES if name != "tiny"])
def test_step(case, threads):
    given = [case, "--threads", str(threads)]
    made = told_by(__file__, *given)
    if case == "GPT-2 small":
        made["bfloat16"] = told_by(__file__, *given, "--peer", "bfloat16", "--steps", "3")
    if made["other"] and threads == 1:
        made["bytes"] = {who: told_by(__file__, *given, "--alone", who) for who in ("ours", "RLOO")}
        made["GRPO"] = told_by(__file__, *given, "--peer", "GRPO", "--steps", "3")
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / f"step, {case}, {threads}.json").write_text(json.dumps(made, indent=1) + "\n")
    print(f"\n{made['machine']}, {threads} threads, torch {made['torch']}, transformers {made['transformers']}: {case}")
    for phase, value in made["ours"].items():
        print(f"  {phase:34} {value:8.2f} s")
    print(f"  {'floor':34} {made['floor']:8.2f} s")
    print(f"  TRL's RLOO {made['other']} s, ratio {made['ratio']}; bytes {made.get('bytes')}")
    for who in ("GRPO", "bfloat16"):
        if who in made:
            print(f"  {who} {made[who]['other']} s, ratio {made[who]['ratio']}")


def main(words):
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--peer", default="RLOO", choices=["RLOO", "GRPO", "bfloat16"])
    parser.add_argument("--alone", choices=["ours", "RLOO", "GRPO"])
    given = parser.parse_args(words)
    try:
        if given.alone:
            print(json.dumps(alone(given.case, given.threads, given.alone)))
        else:
            print(json.dumps(run(given.case, given.threads, given.steps, given.peer)))
    except pytest.skip.Exception as reason:
        print(f"SKIPPED {reason}")


if __name__ == "__main__":  # as a module: what `datasets` pickles must not be this file's whole content
    sys.path.insert(0, str(Path(__file__).parent))
    __import__("bench_step").main(sys.argv[1:])

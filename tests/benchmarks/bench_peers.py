"""Drawing beside Hugging Face's `generate`, and SMC beside genlm-control, llamppl and a bare loop of torch: the same network,
law and number of texts, alternating in one run. Run on purpose: `make bench`.

    python tests/benchmarks/bench_peers.py CASE [--threads N] [--repeats N]

Networks have random weights. Needs `pip install genlm-control llamppl` for their columns, and GPT-2's vocabulary in
`PPL_LM_TEST_DATA`."""

import argparse
import asyncio
import contextlib
import json
import math
import os
import platform
import statistics
import time
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from apart import told_by

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs" / "bench"
DATA = Path(os.environ.get("PPL_LM_TEST_DATA", ROOT.parent / "shared" / "data"))
PROMPT = "the soup was good and the bread was"
SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12}
SMALLER = {"n_layer": 6, "n_embd": 256, "n_head": 8}
SMALLEST = {"n_layer": 4, "n_embd": 64, "n_head": 4}  # most of it is GPT-2's 50,257 words
CASES = {  # what is timed, the network, texts, tokens of each
    "draw, GPT-2 small": ("draw", SMALL, 16, 32),
    "draw, GPT-2 of 3 M": ("draw", SMALLEST, 64, 32),
    "draw, GPT-2 of 17 M": ("draw", SMALLER, 64, 32),
    "SMC, GPT-2 of 17 M": ("smc", SMALLER, 64, 32),
    "draw, tiny": ("draw", {"n_layer": 2, "n_embd": 32, "n_head": 4}, 8, 8),
    "SMC, tiny": ("smc", {"n_layer": 2, "n_embd": 32, "n_head": 4}, 8, 8),
}
STEP = -0.1  # log weight of each token


def folder_of(what):
    """A GPT-2 of random weights with GPT-2's own vocabulary, made once."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    if not (DATA / "gpt2_tokenizer").is_dir():
        pytest.skip(f"needs GPT-2's vocabulary in {DATA / 'gpt2_tokenizer'} (PPL_LM_TEST_DATA)")
    folder = RUNS / f"gpt2-words-{what['n_layer']}-{what['n_embd']}"
    if not folder.is_dir():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(n_positions=256, **what)).save_pretrained(folder)
        plain = Tokenizer(
            models.BPE.from_file(*(str(DATA / "gpt2_tokenizer" / name) for name in ("vocab.json", "merges.txt")))
        )
        plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        end = "<|endoftext|>"
        PreTrainedTokenizerFast(tokenizer_object=plain, bos_token=end, eos_token=end).save_pretrained(folder)
    return folder


def drawing(folder, texts, tokens):
    """What draws so many texts, by name: the law is that of the network as it is."""
    import ppl_lm

    prior = ppl_lm.LanguageModel.from_pretrained(folder, max_new_tokens=tokens, dtype=torch.float32)
    law, model = prior(prior.prompts([PROMPT])), prior.model
    ids = prior.vocabulary.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    asked = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": tokens,
             "num_return_sequences": texts, "pad_token_id": 0}  # fmt: skip

    @torch.no_grad()
    def generate():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **asked)

    return {"ours": lambda: law.sample((texts,)), "generate": generate}


def growing(folder, texts, tokens):
    """What runs SMC with so many texts, by name: a text's log weight falls by `STEP` with each token."""
    import ppl_lm
    from ppl_lm.models import tilted

    prior = ppl_lm.LanguageModel.from_pretrained(folder, max_new_tokens=tokens, dtype=torch.float32)

    def twist(prompts, x, n):
        return STEP * n.double()

    settings = ppl_lm.SMCSettings(twist=twist)
    target = ppl_lm.bind(tilted, prior, reward=ppl_lm.rewards.length, beta=1 / -STEP)
    made = {
        "ours": lambda: ppl_lm.smc(target, None, [PROMPT], num_samples=texts, settings=settings),
        "bare loop": lambda: bare(prior.model, prior.vocabulary.tokenizer, texts, tokens),
    }
    with contextlib.suppress(ImportError):
        made["genlm-control"] = genlm(folder, texts, tokens)
    with contextlib.suppress(ImportError):
        made["llamppl"] = llamppl(folder, texts, tokens)
    return made


@torch.no_grad()
def bare(model, tokenizer, texts, tokens):
    """The least that such a run is: a prompt's cache copied, tokens drawn, populations resampled where their weights say so."""
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = model(ids, use_cache=True)
    cache, logits = out.past_key_values, out.logits[:, -1].expand(texts, -1)
    cache.batch_repeat_interleave(texts)
    x, log_w = torch.empty(texts, 0, dtype=torch.int64), torch.zeros(texts, dtype=torch.float64)
    for step in range(tokens):
        token = torch.multinomial(logits.softmax(-1), 1)
        x, log_w = torch.cat([x, token], 1), log_w + STEP
        weights = log_w.softmax(0)
        if float(1 / weights.square().sum()) < 0.5 * texts:
            at = (torch.arange(texts, dtype=torch.float64) + torch.rand(1, dtype=torch.float64)) / texts
            rows = torch.searchsorted(weights.cumsum(0), at).clamp_max(texts - 1)
            x, log_w = x[rows], torch.full_like(log_w, float(log_w.logsumexp(0)) - math.log(texts))
            cache.batch_select_indices(rows)
            token = x[:, -1:]
        if step < tokens - 1:
            out = model(token, past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[:, -1]
    return x, log_w


def genlm(folder, texts, tokens):
    from genlm.control import SMC, Potential, PromptedLLM, direct_token_sampler

    llm = PromptedLLM.from_name(str(folder), backend="hf", batch_size=texts)
    llm.set_prompt_from_str(PROMPT)

    class Shorter(Potential):
        async def prefix(self, context):
            return STEP * len(context)

        async def complete(self, context):
            return STEP * len(context)

    sampler = SMC(direct_token_sampler(llm), critic=Shorter(llm.vocab))
    loop = asyncio.new_event_loop()

    def run():
        return loop.run_until_complete(sampler(n_particles=texts, ess_threshold=0.5, max_tokens=tokens))

    return run


def llamppl(folder, texts, tokens):
    from llamppl import CachedCausalLM, LMContext, Model, smc_standard

    lm = CachedCausalLM.from_pretrained(str(folder), backend="hf", batch_size=texts)

    class Shorter(Model):
        def __init__(self):
            super().__init__()
            self.context, self.left = LMContext(lm, PROMPT), tokens

        async def step(self):
            token = await self.sample(self.context.next_token())
            self.score(STEP)
            self.left -= 1
            if token.token_id == lm.tokenizer.eos_token_id or self.left == 0:
                self.finish()

    loop = asyncio.new_event_loop()

    def run():
        lm.clear_cache()
        lm.cache_kv(lm.tokenizer.encode(PROMPT))
        return loop.run_until_complete(smc_standard(Shorter(), texts, ess_threshold=0.5))

    return run


def run(case, threads, repeats):
    """One case, alternating, in this process: medians of seconds."""
    torch.set_num_threads(threads)
    kind, what, texts, tokens = CASES[case]
    timed = {"draw": drawing, "smc": growing}[kind](folder_of(what), texts, tokens)
    seconds = {name: [] for name in timed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(repeats + 1):
            for name, call in timed.items():
                began = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - began)
    medians = {
        name: statistics.median(times[1:]) for name, times in seconds.items()
    }  # the first finds out what it needs
    return {
        "case": case, "threads": threads, "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
        "transformers": transformers.__version__, "repeats": repeats, "seconds": medians,
        "ratios": {name: value / medians["ours"] for name, value in medians.items() if name != "ours"},
    }  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", [name for name in CASES if "tiny" not in name])
def test_peers(case, threads):
    made = told_by(__file__, case, "--threads", str(threads))
    (RUNS / f"{case}, {threads}.json").write_text(json.dumps(made, indent=1) + "\n")
    print(f"\n{made['machine']}, {threads} threads, torch {made['torch']}, transformers {made['transformers']}: {case}")
    for name, value in made["seconds"].items():
        print(f"  {name:14} {value:8.2f} s  {made['ratios'].get(name, 1.0):6.2f} of ours")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    try:
        print(json.dumps(run(given.case, given.threads, given.repeats)))
    except pytest.skip.Exception as reason:
        print(f"SKIPPED {reason}")

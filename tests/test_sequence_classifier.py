"""Rewards by sequence classifiers and reward models, against what transformers says of each text alone."""

import json
import math

import pytest
import torch
from tiny import CHAT, bpe, network
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    FNetConfig,
    FNetForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from ppl_lm.likelihood import rewards
from ppl_lm.likelihood.reward import Reward
from ppl_lm.likelihood.sequence_classifier import _Scorer, by_name
from ppl_lm.run.programs import resolve_reward


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def word_tokenizer(start: str | None):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "good": 3, "bad": 4, "soup": 5}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if start is not None:
        words.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 2)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture(scope="module")
def tiny_classifier():
    """A random two-layer BERT with dropout, and a word tokenizer made here."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = word_tokenizer("[CLS]")
    config = BertConfig(
        vocab_size=6,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        hidden_dropout_prob=0.5,
        id2label={0: "negative", 1: "neutral", 2: "positive"},
        label2id={"negative": 0, "neutral": 1, "positive": 2},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
    return model, tokenizer


TEXTS = ["good soup", "bad", "good bad soup good", "", "soup bad bad good good"]


def test_a_classifier_gives_log_probabilities_whatever_the_batch(tiny_classifier):
    model, tokenizer = tiny_classifier
    by_label = [rewards.classifier(model, name, tokenizer)(completions=TEXTS) for name in model.config.label2id]
    torch.testing.assert_close(torch.tensor(by_label).exp().sum(0), torch.ones(len(TEXTS)))
    for batch_size in (1, 2):
        again = rewards.classifier(model, 2, tokenizer, batch_size=batch_size)(completions=map(chat, TEXTS))
        torch.testing.assert_close(again, by_label[2], atol=1e-5, rtol=0)
    reward = Reward(rewards.classifier(model, "positive", tokenizer))
    assert (reward.name, reward.r_max) == ("log p(positive)", 0.0)


@pytest.mark.parametrize("training", [True, False])
def test_a_classifier_runs_without_dropout_and_is_left_in_its_mode(tiny_classifier, training):
    model, tokenizer = tiny_classifier
    reward = rewards.classifier(model, "positive", tokenizer)
    model.train(training)
    assert reward(completions=TEXTS) == reward(completions=TEXTS) and model.training is training


def test_a_classifier_mode_is_restored_when_its_forward_fails(tiny_classifier, monkeypatch):
    model, tokenizer = tiny_classifier
    reward = rewards.classifier(model, "positive", tokenizer)

    def fails(*args, **kwargs):
        assert not model.training
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", fails)
    model.train()
    with pytest.raises(RuntimeError, match="out of memory"):
        reward(completions=TEXTS)
    assert model.training


def test_a_multi_label_classifier_uses_each_label_by_itself(tiny_classifier, monkeypatch):
    model, tokenizer = tiny_classifier
    softmax = rewards.classifier(model, "positive", tokenizer)(completions=TEXTS)
    monkeypatch.setattr(model.config, "problem_type", "multi_label_classification")
    sigmoid = rewards.classifier(model, "positive", tokenizer)(completions=TEXTS)
    assert all(s <= 0 for s in sigmoid) and sigmoid != softmax


def test_a_classifier_is_loaded_from_a_folder_without_touching_the_random_state(tiny_classifier, tmp_path):
    model, tokenizer = tiny_classifier
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    loaded = rewards.classifier(str(tmp_path), "positive")
    assert torch.get_rng_state().equal(state)
    expected = rewards.classifier(model, "positive", tokenizer)(completions=TEXTS)
    torch.testing.assert_close(loaded(completions=TEXTS), expected, atol=1e-6, rtol=0)


def test_a_folder_without_a_trained_head_is_no_classifier(tiny_classifier, tmp_path):
    """transformers makes the missing head up at random, and only reports it."""
    model, tokenizer = tiny_classifier
    model.bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no trained sequence classifier: it lacks .*classifier.weight"):
        rewards.classifier(tmp_path, 1)


def test_classifier_arguments_are_checked(tiny_classifier):
    model, tokenizer = tiny_classifier
    with pytest.raises(ValueError, match="label='rude'.*'positive'"):
        rewards.classifier(model, "rude", tokenizer)
    with pytest.raises(ValueError, match="label=3"):
        rewards.classifier(model, 3, tokenizer)
    with pytest.raises(ValueError, match="needs its tokenizer"):
        rewards.classifier(model, 1)
    with pytest.raises(ValueError, match="batch_size=0"):
        rewards.classifier(model, 1, tokenizer, batch_size=0)


def test_a_text_without_any_token_is_refused(tiny_classifier):
    """Its attention mask would be all zero, and its score would depend on the other texts of the batch."""
    reward = rewards.classifier(tiny_classifier[0], "positive", word_tokenizer(None))
    for texts in (["good", ""], [""]):
        with pytest.raises(ValueError, match="no token of an empty text"):
            reward(completions=texts)


def test_an_empty_text_is_the_start_token_where_there_is_one():
    """An LM may end at once, and a decoder's tokenizer often puts nothing before a text."""
    model, tokenizer = made("llama", 1), bpe()
    alone = float(by_itself(model, [tokenizer.bos_token_id])[0])
    assert rewards.reward_model(model, tokenizer)(completions=["", "soup", ""])[::2] == pytest.approx(
        [alone] * 2, abs=1e-5
    )


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def made(kind: str, labels: int, pad: int | None = 0):
    """A tiny random classifier of this architecture, in eval mode."""
    small = {
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_labels": labels,
    }
    small |= {"pad_token_id": pad, "intermediate_size": 24, "initializer_range": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if kind == "bert":
            return BertForSequenceClassification(BertConfig(**small)).eval()
        if kind == "roberta":  # whose table of places begins after the pad token's
            return RobertaForSequenceClassification(RobertaConfig(**small, max_position_embeddings=40)).eval()
        if kind == "fnet":  # whose Fourier transform has no mask
            return FNetForSequenceClassification(FNetConfig(**small, tpu_short_seq_length=16)).eval()
        if kind == "gpt2":
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
            shared = {k: small[k] for k in ("vocab_size", "num_labels", "pad_token_id", "initializer_range")}
            return GPT2ForSequenceClassification(GPT2Config(**sizes, **shared)).eval()
        return LlamaForSequenceClassification(LlamaConfig(**small)).eval()


LONGER = ["the soup", "she said that it was fine and warm", "a", "the bread was good, and the dog ran over the hill"]


@torch.no_grad()
def by_itself(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0].double()


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama", "fnet"])
def test_a_folder_scores_each_text_as_it_does_alone(kind, labels, tmp_path):
    model, tokenizer = made(kind, labels), bpe()
    folder = saved(model, tokenizer, tmp_path / "scorer")
    reward = resolve_reward(f"hf:{folder}" if labels == 1 else f"hf:{folder}:LABEL_2")
    logits = torch.stack([by_itself(model, tokenizer(text)["input_ids"]) for text in LONGER])
    expected = logits[:, 0] if labels == 1 else logits.log_softmax(-1)[:, 2]
    alone = torch.tensor([reward(completions=[text], prompts=[""])[0] for text in LONGER]).double()
    company = torch.tensor(reward(completions=LONGER, prompts=[""] * 4)).double()
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(company, expected, atol=1e-5, rtol=0)
    made_of = Reward(reward)
    assert made_of.r_max == (None if labels == 1 else 0.0)
    assert made_of.name == ("scorer" if labels == 1 else "log p(LABEL_2)")


def test_padding_that_counts_is_caught_by_that_test(tmp_path, monkeypatch):
    """Mutants: no mask on what is padded; a network that mixes places without one, in batches all the same."""
    model, tokenizer = made("bert", 1), bpe()
    right = rewards.reward_model(model, tokenizer)
    one, padded = right(completions=LONGER), _Scorer._padded

    def unmasked(self, rows):
        batch = padded(self, rows)
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    with monkeypatch.context() as patch:
        patch.setattr(_Scorer, "_padded", unmasked)
        assert max(abs(a - b) for a, b in zip(right(completions=LONGER), one, strict=True)) > 1e-3
        assert _Scorer(model, tokenizer, 64, None).batch_size == 1  # which its own check sees
    scorer = _Scorer(made("fnet", 1), tokenizer, 64, None)
    assert scorer.batch_size == 1
    alone, scorer.batch_size = scorer(LONGER), 64
    assert float((scorer(LONGER) - alone).abs().max()) > 1e-3


@pytest.mark.parametrize("pad", [None, 7])
def test_a_pad_token_that_the_network_does_not_know_is_not_put_in(pad):
    """A decoder reads its score at the last token that is not its own pad: beside the tokenizer's it would read elsewhere."""
    model, tokenizer = made("llama", 1, pad), bpe()
    company = rewards.reward_model(model, tokenizer)(completions=LONGER)
    for text, reward in zip(LONGER, company, strict=True):
        assert reward == pytest.approx(float(by_itself(model, tokenizer(text)["input_ids"])[0]), abs=1e-5)
    assert (
        _Scorer(model, tokenizer, 64, None).batch_size == 1 < _Scorer(made("llama", 1), tokenizer, 64, None).batch_size
    )


def test_a_text_that_is_too_long_is_cut_and_said(tiny_classifier):
    model, tokenizer = tiny_classifier
    reward = rewards.classifier(model, "positive", tokenizer)
    with pytest.warns(
        UserWarning, match="longer than the 8 tokens that BertForSequenceClassification can read: it is cut"
    ):
        long = reward(completions=["good " * 50, "bad"])
    assert long == pytest.approx(reward(completions=["good " * 7, "bad"]), abs=1e-6)  # and no warning: it fits
    roberta = made("roberta", 1)
    with pytest.warns(UserWarning, match="longer than the 39 tokens"):  # of 40 places one is the pad token's
        assert math.isfinite(rewards.reward_model(roberta, bpe())(completions=["bread " * 100])[0])


CHATS = [
    [{"role": "user", "content": "soup?"}],
    [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": "It"}],
]


def test_a_reward_model_with_a_template_sees_the_chat(tmp_path):
    model, tokenizer = made("llama", 1), bpe()
    tokenizer.chat_template = CHAT
    reward = resolve_reward(f"hf:{saved(model, tokenizer, tmp_path)}")
    answers = [" good", " ran"]
    whole = [
        [*CHATS[0], {"role": "assistant", "content": " good"}],
        [CHATS[1][0], {"role": "assistant", "content": "It ran"}],
        [{"role": "user", "content": "plain"}, {"role": "assistant", "content": " ran"}],
    ]
    expected = []
    for messages in whole:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert rendered.endswith("<|end|>")
        expected.append(float(by_itself(model, tokenizer(rendered, add_special_tokens=False)["input_ids"])[0]))
    given = reward(prompts=[*CHATS, "plain"], completions=[*map(chat, answers), " ran"])
    assert given == pytest.approx(expected, abs=1e-5)
    assert len({*map(lambda r: round(r, 3), expected)}) == 3  # the prompts count
    spelled = reward(prompts=["a"], completions=["b<|end|>"]) + reward(prompts=["a"], completions=["b"])
    ids = [i for i in tokenizer("b<|end|>", add_special_tokens=False)["input_ids"] if i == 4]
    assert ids and spelled[0] != pytest.approx(spelled[1], abs=1e-3)
    with pytest.raises(ValueError, match="a chat has .* tokens with its answer; the reward model reads 16"):
        tokenizer.model_max_length = 16
        rewards.reward_model(model, tokenizer)(prompts=["a dog ran over the hill"], completions=["and so on"])


def test_labels_by_name_and_number(tiny_classifier, tmp_path):
    model, tokenizer = tiny_classifier
    folder = saved(model, tokenizer, tmp_path / "a:b")
    by_label = resolve_reward(f"hf:{folder}:positive")(completions=TEXTS)
    assert by_label == resolve_reward(f"hf:{folder}:2")(completions=TEXTS)
    for spec, why in {
        folder: "a classifier with the labels .*'negative'.*: say which, hf:.*:LABEL",
        f"{folder}:rude": "label='rude'; the classifier has the labels",
        f"{folder}:3": "label=3; the classifier has the labels",
        f"{folder}:": "label=''; the classifier has the labels",
        str(tmp_path / "nowhere"): "nowhere': there is no such folder",
        "nowhere:positive": "'nowhere': there is no such folder",
        str(tmp_path): "is not a Hugging Face folder: it has no config.json",
    }.items():
        with pytest.raises(ValueError, match=why):
            resolve_reward(f"hf:{spec}")
    config = json.loads((tmp_path / "a:b" / "config.json").read_text())
    config["id2label"] = {"0": "2", "1": "1", "2": "2"}
    (tmp_path / "a:b" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="label='2'; the classifier has"):  # which of the two?
        by_name(folder, "2")


def test_a_language_model_is_no_reward_model(tmp_path):
    folder = saved(network("llama"), bpe(), tmp_path / "lm")
    with pytest.raises(ValueError, match=r"lm' is no trained sequence classifier: it lacks \['score.weight'\]"):
        resolve_reward(f"hf:{folder}")
    one = saved(made("llama", 1), bpe(), tmp_path / "one")
    with pytest.raises(ValueError, match="has one logit, which is the reward: leave out the label 'LABEL_0'"):
        resolve_reward(f"hf:{one}:LABEL_0")
    with pytest.raises(ValueError, match="has but one logit"):
        rewards.classifier(one, 0)
    with pytest.raises(ValueError, match="has the labels .*: its rewards are classifier"):
        rewards.reward_model(made("bert", 2), bpe())
    with pytest.raises(ValueError, match="could not be loaded: transformers has no sequence classifier of model type"):
        from ppl_lm.lm.table import table_lm

        table_lm(3, 2).save_pretrained(tmp_path / "table")
        resolve_reward(f"hf:{tmp_path / 'table'}")

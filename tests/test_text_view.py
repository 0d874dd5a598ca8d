"""Text is one view of the tokens: what they write after what stands before them, to whoever looks."""

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ppl_lm
from ppl_lm.criticism.prefix_trees import prefix_tree
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.tokens.token_pieces import pieces
from ppl_lm.lm.vocabulary import Vocabulary
from ppl_lm.models import tilted

WORDS = ["<unk>", "<s>", "</s>", "▁soup", "▁is", "▁good", "▁!", "▁", "!", "s", "o"]


def sentencepiece(decoder, **names) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram([(w, -float(n)) for n, w in enumerate(WORDS)], unk_id=0, byte_fallback=False))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>", **names
    )


LLAMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


@pytest.fixture(scope="module", params=["llama", "metaspace"])
def lm(request) -> LanguageModel:
    """SentencePiece's spaces, and a file that asks for spaces to be cleaned up."""
    decoder = LLAMA if request.param == "llama" else decoders.Metaspace()
    model = tiny.network("llama", vocab_size=len(WORDS), bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return LanguageModel(model, sentencepiece(decoder, clean_up_tokenization_spaces=True), 3)


def test_a_completion_is_what_its_tokens_write_after_the_prompt(lm):
    """Catches the space that SentencePiece drops at the start of a text, and spaces that are cleaned up."""
    prompts = lm.prompts(["soup is", ""])
    x = torch.tensor([[[5, 6, 2], [5, 6, 2]], [[8, 6, 2], [4, 2, 2]]])  # (K, B, T)
    assert prompts.decode(x) == [" good !", "good !", "! !", "is"]
    longer = prompts.append(x)
    assert longer.texts == ["soup is good !", "good !", "soup is! !", "is"]
    right = lm.vocabulary.tokenizer
    whole = [
        right.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in longer.unpadded()
    ]
    assert longer.texts == whole and Prompts.from_ids(longer.unpadded(), lm.vocabulary).texts == whole
    again = longer.append(x)
    assert again.texts[0] == "soup is good ! good !" and again.texts[1] == "good ! good !"
    assert lm.vocabulary.decode(x[0]) == ["good !", "good !"]


def test_a_suffix_is_the_text_that_was_given(lm):
    x = torch.tensor([[3, 2, 2]])
    for suffix in (" soup", "so", "! soup", "!"):
        longer = lm.prompts(["soup"]).append(x, suffix=suffix)
        assert longer.texts == [f"soup soup{suffix}"]
        assert lm.vocabulary.texts(longer.unpadded()) == longer.texts


def test_all_see_the_same_text(lm):
    """Rewards, draws, reports, trees, stored completions and automata."""
    seen: list[str] = []

    def reward(prompts, completions):
        seen.extend(completions)
        return [float(p + c == "soup is good !") for p, c in zip(prompts, completions, strict=True)]

    prompts = lm.prompts(["soup is", "soup"])
    model = ppl_lm.bind(tilted, lm, reward=reward)
    draws = ppl_lm.importance(model, None, prompts, num_samples=64)
    assert {*seen} == {text for texts in draws.text() for text in texts}
    for b, texts in enumerate(draws.text()):
        rows = draws["x"][0, :, b]
        shown = [pieces(lm.vocabulary, row, prompts.contexts[b]) for row in rows]
        assert ["".join(p for p in row if not p.startswith("⟨")) for row in shown] == texts
    stored = ppl_lm.to_arviz(draws, num_samples=64)["completions"]["x_text"].values
    assert {*stored[0, :, 1]} <= {*draws.text()[1]} and stored.shape[2] == 2
    tree = prefix_tree(draws, prompt=0, min_mass=1e-9)
    assert all(tree.nodes[p]["text"] in ("", *WORDS, " good", " !", " is", " soup", " ") for p in tree if len(p) == 1)
    automaton = ppl_lm.Automaton.regex(" good !", lm.vocabulary)
    x = torch.tensor([[5, 6, 2]])
    assert prompts[:1].decode(x) == [" good !"] and bool(automaton.holds(x)[0])


def test_half_a_character_is_made_whole_by_what_follows():
    lm = tiny.language_model("llama")
    e, smile = lm.vocabulary.plain("é"), lm.vocabulary.plain("☃")
    assert (len(e), len(smile)) == (2, 3)
    begun = lm.prompts(["caf"]).append(torch.tensor([[*smile, e[0]]]))
    assert begun.texts == ["caf☃\N{REPLACEMENT CHARACTER}"]
    assert begun.append(torch.tensor([[e[1], *e]])).texts == ["caf☃éé"]
    assert begun.decode(torch.tensor([[e[1], 2]])) == ["é"]
    after = Prompts.from_ids([[1, *smile], [1, 3]], lm.vocabulary)  # a whole character, and none
    assert after.decode(torch.tensor([e, e])) == ["é", "é"]
    assert after.contexts == [tuple(smile), ()]


def test_word_pieces_are_joined_to_what_stands_before():
    """WordPiece writes a space before each word, but not before the rest of one."""
    words = {w: n for n, w in enumerate(["[UNK]", "[PAD]", "soup", "##s", "is", "good"])}
    backend = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    prompts = Prompts.make(["soup", "soups"], Vocabulary(made, 6, [1], 1, None))
    x = torch.tensor([[3, 4, 5], [5, 5, 1]])
    assert prompts.decode(x) == ["s is good", " good good"]
    assert prompts.append(x).texts == ["soups is good", "soups good good"]


def test_completions_that_fit_no_prompt_are_refused(lm):
    with pytest.raises(ValueError, match=r"x has the shape \(3, 3\), .* prompts of shape \(2,\)"):
        lm.prompts(["soup", "is"]).decode(torch.full((3, 3), 2))
    assert np.shape(lm.prompts([]).decode(torch.full((0, 3), 2))) == (0,)

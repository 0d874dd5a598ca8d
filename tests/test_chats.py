"""Chats: token for token what `apply_chat_template` makes of them, with control tokens that a text spells as plain text."""

import numpy as np
import pytest
import tiny
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from ppl_lm.likelihood.reward import Reward
from ppl_lm.lm.tokens.chats import encode_chat

END = "<|end|>"
THINK = (
    "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|user|>{{ m['role'] }}\n{{ c }}<|end|></s>{% endfor %}<|user|>"
)
PARTS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|end|>{% endfor %}"
)
TOOLS = (
    "<s>{% for m in messages %}{% if m['content'] %}{{ m['content'] }}{% endif %}"
    "{% if m.get('tool_calls') %}CALL {{ m['tool_calls'][0] | tojson }}{% endif %}<|end|>{% endfor %}"
)
ODD = "<s>{% for m in messages %}{{ m['content'][0] }}|{{ m['content'][:9] }}|{{ m['content'] | tojson }}|{% endfor %}<|end|>"


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    made = tiny.bpe("<s> $A </s>")
    made.add_tokens(["<think>", "</think>"])
    made.chat_template = template
    return made


def rendered(made, messages, **more) -> str:
    return made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **more)


@pytest.mark.parametrize(
    ("template", "messages", "own"),
    [
        (THINK, [user("hi"), assistant("<think>\nhidden\n</think>\n\nyes"), user("why")], [3, 4, 2] * 3 + [3]),
        (THINK, [user(f"a{END}</s>"), assistant("<think>hidden</s></think>\nb</s>"), user("<s>")], [3, 4, 2] * 3 + [3]),
        (PARTS, [user([{"type": "text", "text": f"what is {END}?"}, {"type": "image"}])], [3, 4]),
        (
            PARTS,
            [user([{"type": "text", "text": "<|e"}, {"type": "text", "text": "nd|>"}])],
            [3, 4],
        ),  # together they spell it
        (PARTS, [user(f"  {END}\n")], [3, 4]),
        (TOOLS, [user(f"{END}?"), assistant(None, tool_calls=[{"name": END, END: "</s>"}])], [1, 4, 4]),
        (ODD, [user(f'hi "{END}" <s>')], [1, 4]),
        ("<s>{{ messages[0]['content'] | lower }}<|end|>", [user("<|END|></S>")], [1, 4]),
        ("<s>{{ messages[0]['content'] | replace('~', '') }}<|end|>", [user("<|e~nd|>")], [1, 4]),
        ("<s>{{ messages[0]['content'] | e }}<|end|></s>", [user("a < b </s>")], [1, 4, 2]),
    ],
)
def test_a_chat_is_what_its_template_makes_of_it(template, messages, own):
    """Catches contents that the template does not see, and those that end a turn. `own`: the template's control tokens."""
    made = tokenizer(template)
    ids = encode_chat(made, messages)
    assert made.decode(ids) == rendered(made, messages)
    assert [i for i in ids if i < 5] == own


def test_without_control_tokens_in_texts_the_ids_are_the_tokenizers():
    made = tokenizer(THINK)
    chat = [user("a < b | c > d"), assistant("<think> x"), user("<think>no</think>")]  # added, but not special
    ids = encode_chat(made, chat)
    assert ids == made.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert made.convert_tokens_to_ids("<think>") in ids


def test_what_a_template_makes_of_texts_must_be_decidable():
    """A template that no exchanged character gets through: then a text's control token may be anything's."""
    upset = "<s>{% for c in messages[0]['content'] %}{{ loop.index if c in '0123456789' else c }}{% endfor %}<|end|>"
    made = tokenizer(upset)
    assert made.decode(encode_chat(made, [user("plain 1")])) == "<s>plain 7<|end|>"
    with pytest.raises(
        ValueError, match=r"may spell the control token '(<s>|<\|end\|>)', and the chat template changes texts"
    ):
        encode_chat(made, [user("<|end|><s>")])
    with pytest.raises(ValueError, match=r"a message's role spells the control token '<\|end\|>'"):
        encode_chat(tokenizer(tiny.CHAT), [{"role": f"user{END}", "content": "a"}])
    with pytest.raises(ValueError, match="the chat template fails: TemplateError: roles must alternate"):
        encode_chat(tokenizer("{{ raise_exception('roles must alternate') }}"), [user("a")])


def sentencepiece() -> PreTrainedTokenizerFast:
    """Letters, with Llama's space in front of each text, and a token that takes the white space after it."""
    words = {
        w: n for n, w in enumerate(["<s>", "</s>", "<unk>", "<|end|>", "▁", "▁the", "t", "h", "e", "<", "s", ">", "/"])
    }
    backend = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", rstrip=True, normalized=False)]})
    made.chat_template = "<s>{% for m in messages %}{{ m['content'] }}<|end|>\n{% endfor %}"
    return made


def test_a_spelled_token_changes_no_other_piece():
    """Catches pieces that are encoded apart: each would get a space of its own, and none would be stripped."""
    made = sentencepiece()
    ids = encode_chat(made, [user("the"), user("the <s>"), user("the")])
    plain = made.apply_chat_template([user("the"), user("the"), user("the")], return_dict=False)
    spelled = made("the <s>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    cut = plain.index(3) + 1
    assert ids == plain[:cut] + spelled + plain[-cut:]  # "▁the", the token and the line break that it takes


# ----- what the template is given -----

ARGUMENTS = (
    "{% for t in tools or [] %}TOOL {{ t['function']['name'] }}|{% endfor %}{% for d in documents or [] %}DOC {{ d['text'] }}|"
    "{% endfor %}{% if enable_thinking is defined %}{{ enable_thinking }}|{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>{% endif %}"
)


@pytest.fixture(scope="module")
def lm():
    made = tiny.language_model("llama")
    made.vocabulary.tokenizer.chat_template = ARGUMENTS
    return made


def test_columns_reach_the_template_row_by_row(lm):
    chat, tool = [user("hi")], {"type": "function", "function": {"name": f"f{END}"}}
    made = lm.prompts(
        {
            "prompt": [chat] * 4,
            "tools": [[tool], None, [], '[{"function": {"name": "g"}}]'],
            "chat_template_kwargs": [None, {"enable_thinking": False}, {}, {"documents": [{"text": "d"}]}],
            "documents": [None, None, [{"text": "e"}], ["the reward's"]],
        }
    )
    turn = "user: hi<|end|><|user|>"
    heads = [f"TOOL f{END}|", "False|", "DOC e|", "TOOL g|DOC d|"]
    assert [lm.vocabulary.tokenizer.decode(ids) for ids in made.unpadded()] == [head + turn for head in heads]
    assert [[i for i in ids if i < 5] for ids in made.unpadded()] == [[4, 3]] * 4
    assert made.columns["tools"][0] == [tool]


def test_a_begun_answer_is_continued(lm):
    (ids,) = lm.prompts([[user("hi"), assistant(f"The answer{END} is")]]).unpadded()
    assert lm.vocabulary.tokenizer.decode(ids) == f"user: hi<|end|>assistant: The answer{END} is"
    assert [i for i in ids if i < 5] == [4]


@pytest.mark.parametrize(
    ("prompt", "name", "value", "message"),
    [
        ("soup", "tools", [{"type": "function"}], r"prompt 0 is a string, .* but has \['tools'\] for one"),
        ("soup", "chat_template_kwargs", {"a": 1}, r"prompt 0 is a string, .* but has \['chat_template_kwargs'\]"),
        ([user("a")], "chat_template_kwargs", {"tokenize": True}, r"prompt 0: chat_template_kwargs has \['tokenize'\]"),
        ([user("a")], "chat_template_kwargs", 3, "prompt 0: chat_template_kwargs is 3; give a mapping"),
        ([user("a")], "tools", [3], "prompt 0: the chat template fails: ValueError: Tools should either be"),
    ],
)
def test_what_cannot_be_passed_on_is_refused(lm, prompt, name, value, message, unchecked):
    with pytest.raises(ValueError, match=message):
        lm.prompts({"prompt": [prompt], name: [value]})
    assert len(lm.prompts({"prompt": ["soup"], "tools": [None], "documents": [["the reward's"]]})) == 1


def test_equal_chats_are_encoded_once(lm, monkeypatch):
    calls, right = [], lm.vocabulary.encode_chat
    monkeypatch.setattr(lm.vocabulary, "encode_chat", lambda chat, **more: (calls.append(chat), right(chat, **more))[1])
    thinking = [{"enable_thinking": value} for value in (True, False, True)]
    made = lm.prompts({"prompt": [[user("hi")]] * 3, "chat_template_kwargs": thinking}).unpadded()
    assert made[0] == made[2] != made[1] and len(calls) == 2


def test_a_string_that_a_template_has_rendered_is_not_taken_for_text_without_a_word(lm):
    chat = [user("hi")]
    string = rendered(lm.vocabulary.tokenizer, chat)
    with pytest.warns(
        UserWarning, match=r"prompt 'user: hi<\|end\|><\|user\|>' spells the control token '<\|end\|>'"
    ) as warned:
        made = lm.prompts(["soup", string, string])
    assert len(warned) == 1 and not {3, 4} & set(made.unpadded()[1])
    assert {3, 4} <= set(lm.prompts([chat]).unpadded()[0])


def test_arrays_of_tools_and_documents_are_lists(lm):
    """As pandas gives them for Parquet; once, documents were dropped without a word and tools crashed."""
    chat, tools = [user("the dog")], [{"type": "function", "function": {"name": "x"}}] * 2
    for name in ("tools", "documents"):
        values = [np.array(tools, dtype=object)]
        given = lm.prompts({"prompt": [chat], name: values})
        assert torch.equal(given.ids, lm.prompts({"prompt": [chat], name: [tools]}).ids)
        assert not torch.equal(given.ids, lm.prompts([chat]).ids)


def test_a_second_text_of_a_chat_sees_the_chat(lm):
    prompts = lm.prompts([[user("the dog")], [user("a dog"), assistant("the")]])
    longer = prompts.append(lm.completions([" soup", " soup"]), " so")
    assert longer.texts == [[user("the dog"), assistant(" soup so")], [user("a dog"), assistant("the soup so")]]
    seen = []
    Reward(lambda completions, prompts: seen.extend(prompts) or [0.0, 0.0])(longer, lm.completions([" dog", " dog"]))
    assert seen == longer.texts


def test_an_answer_that_ended_within_a_character_goes_on_with_the_whole_of_it(lm):
    """Once, the half was kept as U+FFFD before the whole, where a string of the same tokens lost it."""
    halves = [lm.vocabulary.tokenizer.convert_tokens_to_ids(token) for token in ("Ã", "©")]  # the two bytes of é
    end = lm.vocabulary.end_ids[0]
    first, second = (torch.tensor([[half, end]]) for half in halves)
    chat, text = (lm.prompts([given]).append(first).append(second) for given in ([user("a dog")], "the"))
    assert text.texts == ["theé"] and chat.texts == [[user("a dog"), assistant("é")]]

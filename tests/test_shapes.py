"""With `make test CHECKED=1` annotations are checked: shapes, dtypes and types of every function of the package, at every call.

| planted mistake | caught in |
|---|---|
| a dimension is missing, or two disagree | arguments of functions, fields of records |
| whole numbers for log weights, numbers for token ids | arguments |
| one estimate of log Z where there is one for each prompt | what is returned |
| a word for a number | arguments of programs, which lie in folders of their own |

Without that none is caught, and these tests are skipped. Users need none of it.
"""

import subprocess
import sys
from dataclasses import replace

import jaxtyping
import pytest
import torch
from jaxtyping import TypeCheckError

import ppl_lm
from ppl_lm.guides import finetuned
from ppl_lm.infer.draws import Draws
from ppl_lm.infer.samplers.resampling import systematic
from ppl_lm.infer.terms import Terms
from ppl_lm.lm.decoding.decoder import Decoder
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted


@pytest.fixture(scope="module")
def lm():
    return table_lm(3, 3, concentration=1.0)


@pytest.fixture(scope="module")
def draws(lm) -> Draws:
    model = ppl_lm.bind(tilted, lm, reward=lambda completions, **_: [float(len(text)) for text in completions])
    return ppl_lm.importance(model, ppl_lm.bind(finetuned, lm), ["a", "b"], num_samples=5)


def terms(lm, estimate_log_z) -> Terms:
    log_p = torch.zeros(4, 2, dtype=torch.float64)
    return Terms(lm.prompts(["a", "b"]), log_p, log_p, log_p, None, estimate_log_z, lambda cost, ratio: cost)


SHAPES = {
    "a dimension is missing": lambda lm, draws: replace(draws, log_guide=draws.log_guide[..., 0]),
    "fields disagree": lambda lm, draws: replace(draws, log_guide=draws.log_guide[:, :-1]),
    "a column of log weights": lambda lm, draws: ppl_lm.plot.weight_tail(torch.zeros(5, 1, dtype=torch.float64)),
    "one text, not a batch": lambda lm, draws: lm.vocabulary.decode(draws["x"][0, 0, 0]),
    "a token too few": lambda lm, draws: Decoder(lm, lm.prompts(["a", "b"])).reorder(torch.tensor([[0, 1]])),
    "returned: one number for all prompts": lambda lm, draws: terms(lm, lambda log_w, prompts: torch.zeros(())).log_z,
}
DTYPES = {
    "whole numbers for log weights": lambda lm, draws: systematic(torch.zeros(4, 2, dtype=torch.int64), 4),
    "numbers for token ids": lambda lm, draws: lm.vocabulary.decode(draws["x"][0, :, 0].double()),
    "numbers for yes and no": lambda lm, draws: replace(draws, log_prior=draws.log_prior > 0),
    "a word for a number": lambda lm, draws: tilted(lm.prompts(["a"]), lm, lambda *_: torch.zeros(1), beta="warm"),
}


@pytest.mark.parametrize("planted", [*SHAPES, *DTYPES])
def test_a_planted_mistake_is_caught(planted, lm, draws, pytestconfig):
    if not pytestconfig.getoption("--jaxtyping-packages"):
        pytest.skip("annotations are checked by `make test CHECKED=1`")
    jaxtyping.config.update("jaxtyping_disable", False)
    with pytest.raises(TypeCheckError):
        {**SHAPES, **DTYPES}[planted](lm, draws)


def test_users_need_no_type_checker():
    """Every public name is loaded, and the package draws: nothing asks for beartype."""
    code = (
        "import sys, ppl_lm, ppl_lm.lm, ppl_lm.models, ppl_lm.guides\n"
        "for name in ppl_lm.__all__: getattr(ppl_lm, name)\n"
        "lm = ppl_lm.lm.table_lm(3, 3)\n"
        "target = ppl_lm.bind(ppl_lm.models.tilted, lm, reward=lambda completions, **_: [0.0] * len(completions))\n"
        "ppl_lm.importance(target, None, ['a'], num_samples=2)\n"
        "assert 'beartype' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

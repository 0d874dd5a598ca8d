"""`token_gains`: where in a text a guide departs from its prior, token by token."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_lm.infer.draws import Draws
from ppl_lm.infer.traces.layout import ROWS
from ppl_lm.infer.traces.structure import nesting_of
from ppl_lm.infer.traces.text_site import text_at


@torch.no_grad()
def token_gains(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    draws: Draws,
    site: str = "x",
    max_plate_nesting: int | None = None,
) -> Float[Tensor, "C S B T"]:
    """log q(x_t | prompt, x_<t) - log p0(x_t | prompt, x_<t) of each token of the draws, nats, float64, 0 after the end; also 0
    where neither can write the token. With the text as the only latent site, their sum over tokens is
    `draws.log_guide - draws.log_prior`, if those are of this guide.

    Runs model and guide up to the text, with the draws' values in it: rewards are not called. Scales and masks on the site do
    not count.

    :raises ValueError: if `site` is not a text, one for each prompt, of the draws and of both programs."""
    x = draws.latents.get(site)
    if x is None or site not in draws.texts or x.dim() != 4:
        raise ValueError(f"site {site!r} is not one text a prompt; the draws' texts are {list(draws.texts)}")
    flat = {name: value.flatten(0, 1) for name, value in draws.latents.items()}
    size = max(1, ROWS // len(draws.prompts))
    nesting, parts = nesting_of(max_plate_nesting, model, None, draws.prompts), []
    for start in range(0, draws.num_samples, size):
        values = {name: value[start : start + size] for name, value in flat.items()}
        log_q, log_p = (_scored(program, draws, values, site, nesting) for program in (guide, model))
        parts.append(torch.where((log_q == -torch.inf) & (log_p == -torch.inf), 0.0, log_q - log_p))
    gains = torch.cat(parts).reshape(x.shape)
    return torch.where(draws.prompts.vocabulary.alive(x), gains, 0.0)


def _scored(program: Any, draws: Draws, values: dict[str, Tensor], site: str, nesting: int) -> Float[Tensor, "S B T"]:
    text = text_at(program, values, draws.prompts, site, nesting)
    return text.law.token_log_probs(text.value).reshape(values[site].shape)

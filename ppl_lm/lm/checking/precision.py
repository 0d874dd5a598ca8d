"""What half precision does to a network: how far it may move a log-probability, and where it turns a gradient."""

import copy

import torch
from torch import Tensor

from ppl_lm.lm import meter
from ppl_lm.lm.checking.tolerances import is_half
from ppl_lm.lm.network import Network, memory
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.scoring.shortcuts import Shortcuts

COSINE = 0.95  # of a gradient with that of the same network in float32: below it nothing is trained


def require_true_gradient(lm: Network) -> None:
    """Raises ValueError if half precision turns the gradient of `lm` further from that in float32 than a cosine of `COSINE`.

    Costs a float32 copy for the moment of the check, and is left out where that would take a quarter of the memory."""
    trained = any(weight.requires_grad for weight in lm.parameters())
    if not trained or not is_half(lm) or 4 * sum(w.numel() for w in lm.parameters()) > memory(lm.device) // 4:
        return
    cosine = gradient_cosine(lm)
    if not cosine >= COSINE:
        dtype = lm.compute_dtype or next(w.dtype for w in lm.parameters() if w.itemsize < 4)
        raise ValueError(
            f"{lm.architecture} in {str(dtype).removeprefix('torch.')} has a gradient whose cosine with that in float32 is "
            f"{cosine:.2f}, below {COSINE}: a fit would follow the rounding. Load it with dtype=torch.float32, or in bfloat16 "
            "with an adapter"
        )


def gradient_cosine(lm: Network) -> float:
    """Cosine of the gradient of Σ_i c_i log q(x_i) with that of the same network in float32, for 16 texts drawn from it and
    coefficients c that add up to 0, as in a score-function estimate."""
    exact = copy.deepcopy(lm)
    exact.model.float()
    exact.compute_dtype, exact.shortcuts = None, Shortcuts()
    prompts = _start(lm)
    with meter.unmeasured(), torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        x, rows = _texts(lm, prompts)
        coefficient = torch.randn(16, 1, device=lm.device)
        coefficient = coefficient - coefficient.mean()
        one, other = (_gradient(network, prompts, x, rows, coefficient) for network in (lm, exact))
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


@torch.no_grad()
def noise_between(lm: Network, twin: Network) -> float:
    """Nats a token by which two networks of the same weights differ: the root mean square over 16 texts drawn from the first.
    What their products round differently is in every log-ratio of the two."""
    prompts = _start(lm)
    with meter.unmeasured(), torch.random.fork_rng():
        torch.manual_seed(0)
        x, rows = _texts(lm, prompts)
        difference = lm.score(prompts, x, rows) - twin.score(prompts, x, rows)
    return float(difference[lm.vocabulary.alive(x)].square().mean().sqrt())


def _start(lm: Network) -> Prompts:
    start = lm.vocabulary.end_ids[0] if lm.vocabulary.bos_id is None else lm.vocabulary.bos_id
    return Prompts.from_ids([[start]], lm.vocabulary, device=lm.device)


def _texts(lm: Network, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """16 texts of that prompt, (16, T), from torch's global generator, and of which prompt each is."""
    from ppl_lm.lm.decoding.decoder import sample

    rows = torch.zeros(16, dtype=torch.int64, device=lm.device)
    u = torch.rand(16, min(12, lm.max_new_tokens), dtype=torch.float64).to(lm.device)
    return sample(lm, prompts, rows, u)[0], rows


def _gradient(lm: Network, prompts: Prompts, x: Tensor, rows: Tensor, coefficient: Tensor) -> Tensor:
    weights = [weight for weight in lm.parameters() if weight.requires_grad]
    slopes = torch.autograd.grad((coefficient * lm.score(prompts, x, rows)).sum(), weights, allow_unused=True)
    return torch.cat([slope.flatten().double() for slope in slopes if slope is not None])

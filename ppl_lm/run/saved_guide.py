"""The fitted guide on disk: its language model as a Hugging Face folder, or what of it is not the prior's, checked as it is
saved."""

import os
import shutil
import tempfile
from pathlib import Path

import pyro
import torch
from pyro.params.param_store import _MODULE_NAMESPACE_DIVIDER

from ppl_lm.infer.binding import Bound
from ppl_lm.lm.checking.adapter_folders import is_adapter_folder
from ppl_lm.lm.checking.tolerances import is_half
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.laws.temperature import FILE as TEMPERATURE
from ppl_lm.lm.laws.temperature import Tempered, load_temperature, save_temperature
from ppl_lm.lm.prompts import Prompts


def read_guide(folder: Path, prior: LanguageModel, max_new_tokens: int | None = None) -> LanguageModel:
    """A fitted guide's network, trainable: what is an adapter of the prior, or a temperature, is put around the prior's own
    weights. Where the prior has an adapter itself, its copy was fitted, and has a base of its own."""
    import ppl_lm.lm.table  # noqa: F401  so that a fitted table loads

    if (folder / TEMPERATURE).is_file():
        return load_temperature(prior, folder)
    if is_adapter_folder(folder) and prior.base_sha256 is None:
        return prior.adapted(folder)
    network = LanguageModel.from_pretrained(folder, max_new_tokens, device=prior.device)
    for name, weight in network.model.named_parameters():
        weight.requires_grad_(name not in network.frozen)
    return network


def save_guide(folder: Path, guide: Bound, probes: Prompts, prior: LanguageModel) -> None:
    """Writes the guide's language model to `folder`, and checks that what would be read back gives the same
    log-probabilities.

    :raises ValueError: if the guide has no trainable language model, or its copy on disk differs."""
    lm = trained_language_model(guide)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".guide-"))
    try:
        if isinstance(lm.model, Tempered):
            save_temperature(lm, temporary)
        else:
            lm.save_pretrained(temporary)
        copy = read_guide(temporary, prior)
        with torch.random.fork_rng(), torch.no_grad():
            few = probes.take(torch.arange(min(4, len(probes))))
            x = lm(few).sample()
            worst = float((lm(few).log_prob(x) - copy(few).log_prob(x)).abs().max())
        rounding = 8 * lm.noise * lm.max_new_tokens**0.5 if is_half(lm) else 0.0
        if not worst < 1e-3 + rounding:
            raise ValueError(f"the saved guide scores texts {worst:.2g} nats differently from the one in memory")
        del copy  # its file is mapped into memory, which Windows would not rename
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_savable(model: Bound, guide: Bound) -> None:
    """:raises ValueError: if something else is trained than one language model of the guide: it could not be saved."""
    lm = trained_language_model(guide)
    saved = {id(p) for p in lm.parameters()}
    others = [
        n for bound in (model, guide) for n, p in bound.named_parameters() if p.requires_grad and id(p) not in saved
    ]
    others += [n for n in pyro.get_param_store().keys() if _MODULE_NAMESPACE_DIVIDER not in n]  # noqa: SIM118
    if others:
        raise ValueError(
            f"a run folder holds one fitted language model, but {others[0]!r} is trained too; fit such programs in Python "
            "with ppl_lm.fit, and save them yourself"
        )


def trained_language_model(guide: Bound) -> LanguageModel:
    """:raises ValueError: if the guide has none."""
    for network in guide.networks.values():
        if isinstance(network, LanguageModel) and any(p.requires_grad for p in network.parameters()):
            return network
    raise ValueError("the guide has nothing to train; choose another, or draw from it as it is")

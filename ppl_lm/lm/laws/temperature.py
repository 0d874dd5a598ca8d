"""`tempered`: each next token at a temperature, which may be learned."""

import json
import math
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ppl_lm.lm.checking.folders import base_fingerprint
from ppl_lm.lm.experts import combined
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.laws.around import Around

FILE = "temperature.json"  # what a folder holds of a tempered prior: one number


def tempered(lm: LanguageModel, temperature: float = 1.0, *, trainable: bool = False) -> LanguageModel:
    """q(x_t | prompt, x_<t) ∝ lm(x_t | prompt, x_<t)^(1/τ), the end token like any other: what is sampled at the temperature τ,
    as a language model with an exact density over whole texts.

    Each token is normalised by itself, so this is *not* the law of whole texts lm(x | prompt)^(1/τ): as a proposal, its
    weights make up the difference (`ppl_lm.models.power` is that law as a posterior).

    :param temperature: τ > 0; below 1 likely tokens become likelier.
    :param trainable: whether τ is trained, from `temperature` on, as its logarithm: one number, float64. What of `lm` is
        trainable stays so. `made.model.temperature` is τ as it is.
    :raises ValueError: if τ is no number above 0."""
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature={temperature}; give a number above 0, such as 0.7 (1: the language model as it is)"
        )
    log_temperature = torch.tensor(math.log(temperature), dtype=torch.float64, device=lm.device)
    network = Tempered(lm.model, nn.Parameter(log_temperature) if trainable else log_temperature)
    made = combined(network, [lm])
    network.log_temperature.requires_grad_(trainable)
    return made


def save_temperature(lm: LanguageModel, folder: Path) -> None:
    """Writes the temperature alone, with the hash of the language model that is at it."""
    assert isinstance(lm.model, Tempered)
    record = {"temperature": lm.model.temperature, "base_sha256": base_fingerprint(lm.model.model)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load_temperature(lm: LanguageModel, folder: Path) -> LanguageModel:
    """`lm` at the temperature that was saved there, trainable.

    :raises ValueError: if the file is damaged, or of another language model."""
    path = folder / FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        temperature, theirs = float(record["temperature"]), str(record["base_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {type(error).__name__}: {error}") from None
    if theirs != (ours := base_fingerprint(lm.model)):
        raise ValueError(
            f"the temperature in {str(folder)!r} was fitted to another language model than this one, or to one of another "
            f"dtype: their weights have the hashes {theirs[:8]} and {ours[:8]}"
        )
    return tempered(lm, temperature, trainable=True)


class Tempered(Around):
    """Logits over τ.

    :param log_temperature: log τ, a scalar; an `nn.Parameter` of this network if it is one."""

    log_temperature: Tensor

    def __init__(self, model: nn.Module, log_temperature: Float[Tensor, ""]):
        super().__init__(model)
        if isinstance(log_temperature, nn.Parameter):
            self.log_temperature = log_temperature
        else:
            self.register_buffer("log_temperature", log_temperature)

    @property
    def temperature(self) -> float:
        return float(self.log_temperature.detach().exp())

    def law(self, logits: Float[Tensor, "N m V"]) -> Float[Tensor, "N m V"]:
        if not self.log_temperature.requires_grad:
            return logits / self.log_temperature.exp()
        impossible = logits == -torch.inf  # 0 · inf in the gradient of τ
        return (logits.masked_fill(impossible, 0.0) / self.log_temperature.exp()).masked_fill(impossible, -torch.inf)

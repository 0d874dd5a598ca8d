"""`Twist`: what SMC asks of texts begun."""

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor

from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts

Function = Callable[[Prompts, Int[Tensor, "N T"], Int[Tensor, "N"]], Float[Tensor, "N"]]
"""(prompts, x, n) -> log ψ_n, nats: of N texts, of which the first n tokens are known, one prompt each. x is canonical: a
text still open is given as if it ended there (n is then less than its length). -inf: nothing possible begins so."""
Twist = LanguageModel | Function

from . import meter as meter
from .decoding.decoder import Decoder as Decoder
from .experts import product as product
from .language_model import LanguageModel as LanguageModel
from .laws.support import truncated as truncated
from .laws.temperature import tempered as tempered
from .network import DivergedError as DivergedError, Network as Network
from .prompts import Prompts as Prompts, batches as batches
from .text_mixture import mixture as mixture
from .table import table_like as table_like, table_lm as table_lm
from .token_sequence import TokenSequence as TokenSequence
from .vocabulary import Vocabulary as Vocabulary

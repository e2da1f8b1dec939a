# What `from callbacks import ...` offers. callbacks/__init__.py reads this list, and imports a module when a name of it
# is first used; type checkers and editors read it as it stands.

from .checkpoint import Checkpoint as Checkpoint
from .checkpoint import EarlyStop as EarlyStop
from .checkpoint import KeepBest as KeepBest
from .distill import Distill as Distill
from .distill_features import AttentionTransfer as AttentionTransfer
from .distill_features import Hints as Hints
from .ema import EMA as EMA
from .masks import KeepZeros as KeepZeros
from .op_counter import OpCounter as OpCounter
from .precision import Precision as Precision
from .prune import PruneChannels as PruneChannels
from .quant_aware import QuantAware as QuantAware
from .quantize import QuantizeInt8 as QuantizeInt8
from .ramp import Cubic as Cubic
from .ramp import Linear as Linear
from .ramp import OneShot as OneShot
from .ramp import Ramp as Ramp
from .ramp import Rounds as Rounds
from .resize import ProgressiveResizing as ProgressiveResizing
from .schedule import Constant as Constant
from .schedule import Cosine as Cosine
from .schedule import MultiStep as MultiStep
from .schedule import OneCycle as OneCycle
from .schedule import Schedule as Schedule
from .schedule import Step as Step
from .soft_targets import Decouple as Decouple
from .sparsify import Sparsify as Sparsify

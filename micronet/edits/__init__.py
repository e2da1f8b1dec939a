"""Changes of a network's structure, each logged as plain values, so that a file can do it again without the weights.

A function here takes a network and gives an `Edited`: a changed copy, the log entry, and a line on what was done. The
network given stays as it is. `replay` repeats an entry on a network of the same structure, whose weights come later
from a file. A recipe names edits in `Fit(edit=...)`; they run before the fit, on images of the validation split.
"""

from micronet.edits.activations import ACTIVATIONS as ACTIVATIONS
from micronet.edits.activations import swap_activation as swap_activation
from micronet.edits.depthwise import separable as separable
from micronet.edits.factored import low_rank as low_rank
from micronet.edits.folded import fold_bn as fold_bn
from micronet.edits.gate import Edited as Edited
from micronet.edits.log import replay as replay

__all__ = ["ACTIVATIONS", "Edited", "fold_bn", "low_rank", "replay", "separable", "swap_activation"]

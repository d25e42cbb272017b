"""What ranks import of Megatron, which takes two seconds: once, in the server that forks them."""

from __future__ import annotations

import megatron.core.models.gpt
import megatron.core.optimizer  # noqa: F401
import torch
from megatron.core.safe_globals import SAFE_GLOBALS

# Megatron's import told torch.load of classes that it may build from now on. Ranks of other tests come from
# the same server: leaving this block takes them back, and `megatron_ranks.megatron` has them while it lasts.
with torch.serialization.safe_globals(SAFE_GLOBALS):
    pass

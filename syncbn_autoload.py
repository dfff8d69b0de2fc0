"""torch calls `autoload` at the end of `import torch`, by the entry point of this package in the group `torch.backends`.

A module of its own: it must import nothing unless SYNCBN_REPLACE_TORCH is set, and `import syncbn.anything` would import all of syncbn.
"""

import os


def autoload() -> None:
    """Imports syncbn if SYNCBN_REPLACE_TORCH is set, which then replaces torch.nn.SyncBatchNorm, or refuses a value that is not allowed."""
    if os.environ.get("SYNCBN_REPLACE_TORCH", "") not in ("", "0"):
        import syncbn  # noqa: F401  # if `import syncbn` is what imports torch, this does nothing, and the replacement follows at its end

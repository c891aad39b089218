"""Long-context decoding with recycled selections, in JAX."""

import os

# transformers, of which only the tokenizers are used, would otherwise advise every user to install PyTorch
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

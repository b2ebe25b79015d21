"""Programs compile fast here: most tests compile many programs and run each once, on little data.

What is about the compiled program itself (memory, collectives, times) sets the variable back.
"""

import os

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # before anything imports jax

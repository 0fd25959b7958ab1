"""SimCLRv2 in JAX, in three stages: pretrain, finetune, distill.

Each stage is a command and a function:

  python -m simclr_jax.pretrain --config=pretrain.py:digits --workdir=DIR
  simclr_jax.pretrain.train_and_evaluate(config, workdir)

The parts are pure functions, to be used on their own:

  augment      two_views, crop_flip, eval_view and the image operations
  losses       nt_xent, distillation_loss
  metrics      contrastive accuracy and entropy, alignment, uniformity, top-k
  models       make_model: encoder, projection head, classifier
  optimizers   lars, learning_rate_schedule
  checkpoint   load(workdir) -> (config, variables)

Importing the package loads none of them, and no JAX: a module is imported
when its name is first used, `import simclr_jax as sj; sj.losses.nt_xent(...)`.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

__all__ = [
  "augment",
  "checkpoint",
  "config",
  "data",
  "distill",
  "finetune",
  "losses",
  "metrics",
  "models",
  "optimizers",
  "parallel",
  "pretrain",
  "probes",
  "resnet",
  "sources",
]


def __getattr__(name: str) -> Any:
  if name in __all__:
    return importlib.import_module(f"{__name__}.{name}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])

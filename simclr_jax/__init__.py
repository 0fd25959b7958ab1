"""SimCLRv2 in JAX, in three stages: pretrain, finetune, distill.

Each stage is a command and a function:

  python -m simclr_jax.pretrain --config=pretrain.py:digits --workdir=DIR
  simclr_jax.pretrain.train_and_evaluate(config, workdir)

with cli.load_recipe("digits", stage="pretrain") as a config. What a run has
learned is used by commands that are functions too: embed, evaluate, export and
report; plan says what a run will need, convert takes official checkpoints,
sweep trains a grid, datasets checks and packs images.

The parts are pure functions, to be used on their own:

  augment      two_views, crop_flip, eval_view and the image operations
  losses       nt_xent, supervised_loss, distillation_loss
  metrics      alignment, uniformity, effective_rank, top_k_correct
  models       make_model: encoder, projection head, classifier
  optimizers   lars, learning_rate_schedule
  sources      make_source: digits, folders, TFDS; data: batches of them
  probes       knn, linear, ridge on features
  checkpoint   load(workdir) -> (config, variables)
  network      load(workdir) -> model, variables and label names

Importing the package loads none of them, and no JAX: a module is imported
when its name is first used, `import simclr_jax as sj; sj.losses.nt_xent(...)`.
"""

import importlib.util
from typing import Any

__version__ = "0.1.0"

__all__ = [
  "augment",
  "checkpoint",
  "cli",
  "config",
  "convert",
  "data",
  "datasets",
  "diagnostics",
  "distill",
  "embed",
  "evaluate",
  "export",
  "finetune",
  "losses",
  "metrics",
  "models",
  "network",
  "optimizers",
  "plan",
  "pretrain",
  "probes",
  "report",
  "sources",
  "sweep",
]


def __getattr__(name: str) -> Any:
  full = f"{__name__}.{name}"
  if not name.startswith("_") and importlib.util.find_spec(full):
    return importlib.import_module(full)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])

"""From a source to batches: which examples, in what order, on which host.

Batch t of a run is a pure function of (seed, t): nothing is stored, a run
resumes at any step, and it is the same batch for any number of hosts, from
memory or streamed.
"""

from simclr_jax.data.few_labels import label_subset
from simclr_jax.data.memory import Dataset, load, open_dataset
from simclr_jax.data.order import batch_indices, eval_batches, train_batches
from simclr_jax.data.splits import open_splits
from simclr_jax.data.stream import Streamed, ahead

__all__ = [
  "Dataset",
  "Streamed",
  "ahead",
  "batch_indices",
  "eval_batches",
  "label_subset",
  "load",
  "open_dataset",
  "open_splits",
  "train_batches",
]

"""The run that another one starts from: its network, and what it has seen."""

from simclr_jax import checkpoint, storage, weights
from simclr_jax.config import UserError


def load_pretrained(config):
  """Reads the run in `config.pretrained`: (its config, its variables).

  Raises:
    UserError: nothing to read, or a network that has seen labels.
  """
  stored, variables = checkpoint.load(
    config.pretrained, field="config.pretrained"
  )
  if stored.stage != "pretrain":
    raise UserError(
      f"config.pretrained: {config.pretrained} holds a {stored.stage} run, "
      "which has been trained on labels; give the pretrain run before it."
    )
  return stored, variables


def refuse_seen(config, other, *, field: str) -> None:
  """Raises UserError where images held out here trained the network there.

  Args:
    config: of the stage.
    other: the config of the run in `config.pretrained` or `config.teacher`.
    field: which of the two.
  """
  mine, theirs = config.data.eval_fraction, other.data.eval_fraction
  names = {storage.spelled(c.data.name) for c in (config, other)}
  if len(names) == 1 and config.data.eval_split and mine != theirs:
    raise UserError(
      f"config.data.eval_fraction is {mine:g}, but config.{field} was trained "
      f"with {theirs:g}, so it may have seen labels of images that are held "
      "out here; give the same, or --config.data.eval_split= (nothing)."
    )


def began_from(loaded: dict | None, workdir) -> dict | None:
  """What the checkpoints of a run keep of `config.pretrained`; None: nothing.

  Args:
    loaded: the variables that are there now; None: random ones.
    workdir: the run's directory. A run there goes on from its own checkpoint,
      whatever the other one has become.
  """
  if loaded is None:
    return None
  now = {"hash": weights.fingerprint(loaded)}
  found = checkpoint.latest(workdir)
  began = found[2].get("pretrained") if found else None
  if began and began != now:
    print(
      "note: config.pretrained holds another network than when this run began; "
      "it goes on from its own checkpoint.",
      flush=True,
    )
  return began or now

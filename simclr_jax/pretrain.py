"""Pretraining: two views of each image, NT-Xent over the global batch.

python -m simclr_jax.pretrain --config=pretrain.py:digits --workdir=DIR
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import (
  build,
  cli,
  data,
  diagnostics,
  lineage,
  loop,
  losses,
  memory,
  overview,
  parallel,
  predict,
  probes,
  rundir,
  snapshots,
  storage,
  supcon,
)
from simclr_jax import config as config_lib
from simclr_jax import metrics as metrics_lib
from simclr_jax.config import UserError


def train_step(
  state, batch, key, *, model, optimizer, views_fn, nt_xent_fn, probe
):
  """One step on one device's part of the batch (2006.10029, section 2).

  Args:
    state: a `TrainState`.
    batch: "image" uint8 [n, S, S, C], "size" int32 [n, 2] and "label" int32
      [n], -1 where unknown.
    key: the run's key; this step's randomness is a function of (key, step).
    model: from `models.make_model`.
    optimizer: an optax transformation.
    views_fn: (key, images, index=, sizes=) -> [2n, H, H, C], view 1 first.
    nt_xent_fn: (z1, z2) -> (loss, metrics).
    probe: train the classifier on the detached features beside.

  Returns:
    The next state, and metrics that are equal on all devices.

  >>> from simclr_jax import augment, network, optimizers
  >>> net = network.load("runs/pretrained")
  >>> optimizer = optimizers.lars(0.1, weight_decay=1e-4)
  >>> step_fn = functools.partial(
  ...   train_step,
  ...   model=net.model,
  ...   optimizer=optimizer,
  ...   views_fn=functools.partial(augment.two_views, size=8),  # or your own
  ...   nt_xent_fn=functools.partial(losses.nt_xent, temperature=0.1),
  ...   probe=False,
  ... )
  >>> state = build.init_state(net.variables, optimizer)
  >>> batch = {"image": np.zeros((4, 8, 8, 1), np.uint8)}
  >>> batch |= {"size": np.full((4, 2), 8), "label": np.arange(4)}
  >>> args = parallel.replicate((state, batch, jax.random.key(0)))
  >>> state, metrics = jax.eval_shape(parallel.pmap(step_fn), *args)
  >>> "contrastive_accuracy" in metrics
  True
  """
  n = batch["image"].shape[0]
  views = views_fn(
    jax.random.fold_in(key, state.step),
    batch["image"],
    index=parallel.global_index(n),
    sizes=batch["size"],
  )

  def loss_fn(params):
    outputs, updated = model.apply(
      {"params": params, "batch_stats": state.batch_stats},
      views,
      train=True,
      mutable=["batch_stats"],
    )
    loss, metrics = nt_xent_fn(*jnp.split(outputs["z"], 2))
    metrics |= {"loss": loss} | metrics_lib.embedding_moments(outputs["z"])
    total = loss
    if probe:  # no gradient passes from here into the network
      labels = jnp.tile(batch["label"], 2)
      probe_loss, accuracy = losses.supervised_loss(
        outputs["logits"], labels, axis_name=parallel.AXIS
      )
      total = loss + probe_loss
      metrics["probe_loss"] = probe_loss
      metrics["probe_accuracy"] = accuracy["supervised_accuracy"]
    return total, (metrics, updated["batch_stats"])

  grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
  # Each device has the gradient of its rows: their mean is the global one.
  grads, metrics = parallel.pmean((grads, metrics))
  state, norms = state.apply_gradients(optimizer, grads, batch_stats)
  return state, metrics | norms


def make_model(config, *, num_classes: int):
  """The network that a resolved config says, with the probe if there is one.

  >>> config = cli.load_recipe("digits", stage="pretrain")
  >>> build.resolve(config)
  pretrain: ResNet-18 ...
  >>> make_model(config, num_classes=10).classifier.features
  10
  """
  return build.make_model(
    config,
    num_classes=num_classes if config.probe and num_classes else None,
    head_layer=0,
    probe=True,
  )


def make_step(config, model, optimizer, *, probe: bool):
  """`train_step` with everything bound that a resolved config says.

  >>> config = cli.load_recipe("digits", stage="pretrain")
  >>> build.resolve(config)
  pretrain: ResNet-18 ...
  >>> model = build.make_model(config, num_classes=None, head_layer=0)
  >>> optimizer = build.make_optimizer(config, lambda step: 0.1)
  >>> step_fn = make_step(config, model, optimizer, probe=False)
  >>> step_fn.func is train_step
  True
  """
  network = {
    "model": model,
    "views_fn": build.make_views(config),
  }
  options = {
    "temperature": config.loss.temperature,
    "axis_name": parallel.AXIS,
  }
  nt_xent_fn = functools.partial(
    losses.nt_xent, block_size=config.loss.block_size or None, **options
  )
  step_fn = functools.partial(
    train_step,
    optimizer=optimizer,
    nt_xent_fn=nt_xent_fn,
    probe=probe,
    **network,
  )
  if config.loss.name == "supcon":
    return functools.partial(
      supcon.train_step,
      step_fn=step_fn,
      supcon_fn=functools.partial(supcon.supervised_contrastive, **options),
    )
  if config.memory.size:
    return functools.partial(
      memory.train_step,
      step_fn=step_fn,
      nt_xent_fn=nt_xent_fn,
      momentum=config.memory.momentum,
      **network,
    )
  return step_fn


def train_and_evaluate(config, workdir) -> dict:
  """Pretrains as `config` says and evaluates with kNN and the probe.

  Args:
    config: see configs/pretrain.py.
    workdir: the run's directory; a run there is continued.

  Returns:
    What result.json holds: top1 is the kNN accuracy.

  Raises:
    UserError: a mistake in the config or the data.

  >>> config = cli.load_recipe("digits,width=0.0625", stage="pretrain")
  >>> config.num_steps, config.report = 2, False
  >>> result = train_and_evaluate(config, "runs/two_steps")
  pretrain: ResNet-18 ...
  >>> result["protocol"]
  'knn'
  """
  config = build.start(config, stage="pretrain")
  workdir = storage.path(workdir)
  loaded = resolve_network(config)
  build.resolve(config)
  rundir.check_same(config, workdir)
  train, test = data.open_splits(
    config, workdir, channels=loaded and build.channels(loaded)
  )
  build.refuse_few(config, train)
  _check_labels_and_memory(config, train)
  num_steps = config_lib.num_steps(config, len(train))
  probe = config.probe and train.num_classes > 0
  model = make_model(config, num_classes=train.num_classes)
  build.check_views(config, train)
  if done := rundir.begin(
    config, workdir, num_steps, len(train), train.label_names
  ):
    return done

  variables = build.init(config, model, train, loaded)
  schedule = build.make_schedule(config, len(train), num_steps)
  overview.show(config, variables["params"], loaded=loaded and loaded["params"])
  optimizer = build.make_optimizer(config, schedule)
  step_fn = make_step(config, model, optimizer, probe=probe)
  state = build.init_state(variables, optimizer)
  if config.memory.size:
    state = memory.remember(
      state,
      size=config.memory.size,
      dim=config.head.dim,
      dtype=build.view_dtype(config),
    )
  pairs = metrics_lib.num_pairs(config.batch_size, config.memory.size)
  state, metrics = loop.run(
    state,
    step_fn,
    build.host_batches(config, train, num_steps),
    config=config,
    workdir=workdir,
    num_steps=num_steps,
    evaluate=_make_evaluate(config, model, train, test),
    learning_rate=schedule,
    anchors={
      "loss": f"uniform {metrics_lib.uniform_loss(pairs):.4g}",
      "contrastive_accuracy": f"chance {1 / config.batch_size:.2g}",
    },
    advice=diagnostics.Advice(
      num_pairs=pairs,
      temperature=config.loss.temperature,
      warmup_steps=config_lib.warmup_steps(config, len(train)),
    ),
    extra={
      "label_names": list(train.label_names),
      "num_images": len(train),
      "pretrained": lineage.began_from(loaded, workdir),
    },
  )
  result = rundir.write_result(
    workdir,
    build.result(config, protocol="knn", metrics=metrics, num_steps=num_steps),
  )
  snapshots.save(
    workdir, config, state, model, train, test, build.make_views(config)
  )
  return result


def _check_labels_and_memory(config, train) -> None:
  if config.loss.name == "supcon" and not train.num_classes:
    raise UserError(
      f"config.loss.name=supcon needs labels, and {config.data.name} has none."
    )
  if config.memory.size > len(train):
    raise UserError(
      f"config.memory.size is {config.memory.size}, but there are {len(train)} "
      "images: most of them would be told from themselves; take a fraction."
    )


def resolve_network(config) -> dict | None:
  """Takes network and view from `config.pretrained`; returns its variables.

  Fields that are as the recipe has them were not given and give way.

  >>> config = cli.load_recipe("digits", stage="pretrain")
  >>> config.pretrained = "runs/pretrained"
  >>> sorted(resolve_network(config)), config.model.width
  (['batch_stats', 'params'], 0.0625)
  """
  if not config.pretrained:
    return None
  stored, loaded = lineage.load_pretrained(config)
  names = (*build.ENCODER, *build.HEAD, *build.VIEW)
  mine, theirs = config_lib.flat(config), config_lib.flat(stored)
  try:
    recipe = config_lib.flat(cli.load_recipe(config.recipe, stage="pretrain"))
  except UserError:  # of a user's own file: all its fields were given
    recipe = {}
  for name in names:
    if name in recipe and mine[name] == recipe[name]:
      config_lib.set_field(config, name, theirs[name])
  where = f"the checkpoint {config.pretrained}"
  config_lib.inherit(config, theirs, names, where=where)
  return loaded


def _bank(config, labels) -> np.ndarray:
  """Which labelled images kNN looks among, drawn where there are too many."""
  labelled = np.flatnonzero(labels >= 0)
  if len(labelled) > config.knn.bank_size:  # the first ones may be of one class
    rng = np.random.default_rng(config.seed)
    labelled = rng.choice(labelled, config.knn.bank_size, replace=False)
  return np.sort(labelled)


def _make_evaluate(config, model, train, test):
  """State -> kNN accuracy of h and accuracy of the probe, or None."""
  if test is None or not train.num_classes:
    return None
  bank = train.select(_bank(config, train.labels))
  probe = model.classifier is not None
  if not len(bank) and not probe:  # nothing to tell
    return None
  predict_fn = predict.make_predict(
    model,
    size=config.data.image_size,
    dtype=build.view_dtype(config),
    outputs=("h", "logits") if probe else ("h",),
  )

  def evaluate(state) -> dict:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    run = functools.partial(predict_fn, variables, batch_size=config.batch_size)
    outputs = run(test)
    values = {}
    if len(bank):
      values = probes.knn(
        run(bank)["h"],
        bank.labels,
        outputs["h"],
        test.labels,
        num_classes=train.num_classes,
        k=config.knn.num_neighbors,
      )
    if probe:
      values["probe_top1"] = probes.top_k(outputs["logits"], test.labels)[
        "top1"
      ]
    return values

  return evaluate


if __name__ == "__main__":
  cli.run(train_and_evaluate, stage="pretrain")

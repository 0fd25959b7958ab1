"""Fine-tuning on few labels, from any layer of the head; linear evaluation.

python -m simclr_jax.finetune --config=finetune.py:digits,labels=10
    --workdir=DIR --config.pretrained=DIR
"""

import functools

import jax
import numpy as np

from simclr_jax import (
  build,
  cli,
  data,
  lineage,
  loop,
  losses,
  models,
  overview,
  parallel,
  rundir,
  snapshots,
  storage,
  weights,
)
from simclr_jax import config as config_lib
from simclr_jax.config import UserError


def train_step(state, batch, key, *, model, optimizer, view_fn):
  """One step on one device's part of the batch; see `pretrain.train_step`.

  Args:
    state: a `TrainState`.
    batch: "image" uint8 [n, S, S, C], "size" int32 [n, 2], "label" int32 [n].
    key: the run's key.
    model: from `models.make_model`, with classes.
    optimizer: an optax transformation.
    view_fn: (key, images, index=, sizes=) -> [n, H, H, C].

  Returns:
    The next state, and metrics that are equal on all devices.

  >>> from simclr_jax import augment, network, optimizers
  >>> net = network.load("runs/finetuned")
  >>> optimizer = optimizers.lars(0.1, weight_decay=0.0)
  >>> step_fn = functools.partial(
  ...   train_step,
  ...   model=net.model,
  ...   optimizer=optimizer,
  ...   view_fn=functools.partial(augment.crop_flip, size=8),
  ... )
  >>> state = build.init_state(net.variables, optimizer)
  >>> batch = {"image": np.zeros((4, 8, 8, 1), np.uint8)}
  >>> batch |= {"size": np.full((4, 2), 8), "label": np.arange(4)}
  >>> args = parallel.replicate((state, batch, jax.random.key(0)))
  >>> state, metrics = jax.eval_shape(parallel.pmap(step_fn), *args)
  >>> "accuracy" in metrics
  True
  """
  images = view_fn(
    jax.random.fold_in(key, state.step),
    batch["image"],
    index=parallel.global_index(batch["image"].shape[0]),
    sizes=batch["size"],
  )

  def loss_fn(params):
    outputs, updated = model.apply(
      {"params": params, "batch_stats": state.batch_stats},
      images,
      train=True,
      mutable=["batch_stats"],
    )
    loss, metrics = losses.supervised_loss(
      outputs["logits"], batch["label"], axis_name=parallel.AXIS
    )
    metrics = {"loss": loss, "accuracy": metrics["supervised_accuracy"]}
    return loss, (metrics, updated["batch_stats"])

  grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
  grads, metrics = parallel.pmean((grads, metrics))
  state, norms = state.apply_gradients(optimizer, grads, batch_stats)
  return state, metrics | norms


def make_model(config, *, num_classes: int):
  """The network that a resolved config says.

  >>> config = cli.load_recipe("digits", stage="finetune")
  >>> config.pretrained = "runs/pretrained"
  >>> loaded = resolve_network(config)
  >>> build.resolve(config)
  finetune: ResNet-18 ...
  >>> make_model(config, num_classes=10).classifier.features
  10
  """
  return build.make_model(
    config,
    num_classes=num_classes,
    head_layer=config.head_layer,
    freeze_after_block=config.freeze_after_block,
    zero_init_classifier=True,
  )


def make_trainable(config):
  """Parameters -> which of them train; see `models.trainable`.

  >>> config = cli.load_recipe("digits,linear", stage="finetune")
  >>> make_trainable(config)(
  ...   {"encoder": {"stem": 0}, "classifier": {"bias": 0}}
  ... )
  {'classifier': {'bias': True}, 'encoder': {'stem': False}}
  """
  return functools.partial(
    models.trainable,
    freeze_after_block=config.freeze_after_block,
    train_head_layer=config.train_head_layer,
    head_layer=config.head_layer,
  )


def make_step(config, model, optimizer):
  """`train_step` with everything bound that a resolved config says.

  >>> from simclr_jax import network
  >>> net = network.load("runs/finetuned")
  >>> optimizer = build.make_optimizer(net.config, lambda step: 0.1)
  >>> make_step(net.config, net.model, optimizer).func is train_step
  True
  """
  return functools.partial(
    train_step,
    model=model,
    optimizer=optimizer,
    view_fn=build.make_views(config),
  )


def train_and_evaluate(config, workdir) -> dict:
  """Trains a classifier as `config` says and evaluates it.

  Args:
    config: see configs/finetune.py.
    workdir: the run's directory; a run there is continued.

  Returns:
    What result.json holds.

  Raises:
    UserError: a mistake in the config, the data or the checkpoint.

  >>> config = cli.load_recipe("digits,labels=1", stage="finetune")
  >>> config.pretrained, config.report = "runs/pretrained", False
  >>> config.num_steps = 2
  >>> result = train_and_evaluate(config, "runs/one_percent")
  finetune: ResNet-18 ...
  >>> result["protocol"]
  'finetune 1%'
  """
  config = build.start(config, stage="finetune")
  workdir = storage.path(workdir)
  loaded = resolve_network(config)
  build.resolve(config)
  rundir.check_same(config, workdir)
  train, test = data.open_splits(
    config, workdir, channels=loaded and build.channels(loaded)
  )
  used = build.label_choice(config)
  # Not of `labels`: what is in a damaged image's place differs by stage.
  train = train.select(
    data.label_subset(train.listed, label_names=train.label_names, **used)
  )
  num_steps = config_lib.num_steps(config, len(train))
  linear = config.freeze_after_block == 4
  model = make_model(config, num_classes=train.num_classes)
  build.check_views(config, train)
  if done := rundir.begin(
    config, workdir, num_steps, len(train), train.label_names
  ):
    return done

  variables = build.init(config, model, train, loaded)
  trainable = make_trainable(config)
  schedule = build.make_schedule(config, len(train), num_steps)
  overview.show(
    config,
    variables["params"],
    trainable=trainable(variables["params"]),
    loaded=loaded and loaded["params"],
  )
  optimizer = build.make_optimizer(config, schedule, trainable=trainable)
  began = lineage.began_from(loaded, workdir)
  state, metrics = loop.run(
    build.init_state(variables, optimizer),
    make_step(config, model, optimizer),
    build.host_batches(config, train, num_steps),
    config=config,
    workdir=workdir,
    num_steps=num_steps,
    evaluate=build.make_evaluate(config, model, test),
    learning_rate=schedule,
    anchors={
      "loss": f"uniform {np.log(train.num_classes):.4g}",
      "accuracy": f"chance {1 / train.num_classes:.2g}",
    },
    extra={
      "label_names": list(train.label_names),
      "num_images": len(train),
      "labels_used": used,
      "pretrained": began,
    },
  )
  if linear and (began is None or began["hash"] == weights.fingerprint(loaded)):
    _assert_encoder_unchanged(variables, state)
  result = rundir.write_result(
    workdir,
    build.result(
      config,
      protocol=_protocol(config),
      metrics=dict(metrics, num_labels=len(train)),
      num_steps=num_steps,
    ),
  )
  snapshots.save(
    workdir, config, state, model, train, test, build.make_views(config)
  )
  return result


def resolve_network(config) -> dict | None:
  """Takes network and view from the checkpoint; returns its variables.

  >>> config = cli.load_recipe("digits", stage="finetune")
  >>> config.pretrained = "runs/pretrained"
  >>> sorted(resolve_network(config)), config.model.width
  (['batch_stats', 'params'], 0.0625)
  """
  names = (*build.ENCODER, *build.HEAD, *build.VIEW)
  if not config.pretrained:
    scratch = {name: config.scratch[name.split(".")[1]] for name in names}
    scratch["head.width"] = config.scratch.head_width
    config_lib.fill(config, scratch, names)
    print("finetune: config.pretrained is empty, so training from scratch")
    return None
  stored, loaded = lineage.load_pretrained(config)
  if stored.loss.name == "supcon":
    _refuse_known_labels(config, stored)
  where = f"the checkpoint {config.pretrained}"
  config_lib.inherit(config, config_lib.flat(stored), names, where=where)
  if config.head_layer > config.head.num_layers:
    raise UserError(
      f"config.head_layer is {config.head_layer}, but the head in {where} has "
      f"{config.head.num_layers} layers; allowed are 0 (h, before the head) to "
      f"{config.head.num_layers}."
    )
  return loaded


def _refuse_known_labels(config, stored) -> None:
  """Few labels say nothing about a network that was trained on all of them."""
  lineage.refuse_seen(config, stored, field="pretrained")
  few = config.label_percent < 100 or config.labels_per_class
  names = {storage.spelled(c.data.name) for c in (config, stored)}
  if few and len(names) == 1:
    raise UserError(
      f"config.pretrained: {config.pretrained} was trained with "
      "loss.name=supcon on all labels of these images; leave label_percent at "
      "100 and labels_per_class at 0, or pretrain without labels."
    )


def _protocol(config) -> str:
  kind = "finetune" if config.pretrained else "supervised"
  if config.freeze_after_block == 4:
    kind = "linear"
  if config.labels_per_class:
    return f"{kind} {config.labels_per_class} per class"
  if config.label_percent == 100 and config.data.label_ids:
    return f"{kind} on listed labels"
  if config.label_percent == 100 and kind == "linear":
    return kind
  return f"{kind} {config.label_percent:g}%"


def _assert_encoder_unchanged(variables: dict, state) -> None:
  before = {"p": variables["params"], "b": variables["batch_stats"]}
  after = {"p": state.params, "b": state.batch_stats}
  for kind in before:
    jax.tree.map(
      np.testing.assert_array_equal,
      before[kind]["encoder"],
      after[kind]["encoder"],
    )


if __name__ == "__main__":
  cli.run(train_and_evaluate, stage="finetune")

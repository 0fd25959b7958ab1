"""Distillation: a fine-tuned teacher labels images, a student learns them.

python -m simclr_jax.distill --config=distill.py:digits --workdir=DIR
    --config.teacher=DIR
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import (
  build,
  checkpoint,
  cli,
  data,
  lineage,
  loop,
  losses,
  overview,
  parallel,
  rundir,
  snapshots,
  storage,
)
from simclr_jax import config as config_lib
from simclr_jax.config import UserError


def train_step(
  state,
  batch,
  key,
  teacher_variables,
  *,
  model,
  teacher,
  optimizer,
  view_fn,
  distillation_fn,
  label_weight,
):
  """One step on one device's part of the batch (2006.10029, eq. 2 and 3).

  Args:
    state: a `TrainState`, of the student.
    batch: "image" uint8 [n, S, S, C], "size" int32 [n, 2] and "label" int32
      [n], -1 where unknown.
    key: the run's key.
    teacher_variables: {"params", "batch_stats"}.
    model: the student.
    teacher: the teacher's network, used in inference mode on the same view.
    optimizer: an optax transformation.
    view_fn: (key, images, index=, sizes=) -> [n, H, H, C].
    distillation_fn: (student_logits, teacher_logits) -> loss.
    label_weight: w of (1 - w) * distillation + w * supervised loss.

  Returns:
    The next state, and metrics that are equal on all devices.

  >>> from simclr_jax import augment, network, optimizers
  >>> net = network.load("runs/finetuned")
  >>> optimizer = optimizers.lars(0.1, weight_decay=0.0)
  >>> step_fn = functools.partial(
  ...   train_step,
  ...   model=net.model,
  ...   teacher=net.model,
  ...   optimizer=optimizer,
  ...   view_fn=functools.partial(augment.crop_flip, size=8),
  ...   distillation_fn=functools.partial(
  ...     losses.distillation_loss, temperature=1.0
  ...   ),
  ...   label_weight=0.0,
  ... )
  >>> state = build.init_state(net.variables, optimizer)
  >>> batch = {"image": np.zeros((4, 8, 8, 1), np.uint8)}
  >>> batch |= {"size": np.full((4, 2), 8), "label": np.arange(4)}
  >>> args = (state, batch, jax.random.key(0), net.variables)
  >>> args = parallel.replicate(args)
  >>> state, metrics = jax.eval_shape(parallel.pmap(step_fn), *args)
  >>> "agreement" in metrics
  True
  """
  images = view_fn(
    jax.random.fold_in(key, state.step),
    batch["image"],
    index=parallel.global_index(batch["image"].shape[0]),
    sizes=batch["size"],
  )
  teacher_logits = teacher.apply(teacher_variables, images)["logits"]

  def loss_fn(params):
    outputs, updated = model.apply(
      {"params": params, "batch_stats": state.batch_stats},
      images,
      train=True,
      mutable=["batch_stats"],
    )
    logits = outputs["logits"]
    loss = distillation_fn(logits, teacher_logits)
    metrics = {"distillation_loss": loss}
    agrees = jnp.argmax(logits, 1) == jnp.argmax(teacher_logits, 1)
    metrics["agreement"] = jnp.mean(agrees, dtype=logits.dtype)
    if label_weight:
      supervised, _ = losses.supervised_loss(
        logits, batch["label"], axis_name=parallel.AXIS
      )
      loss = (1 - label_weight) * loss + label_weight * supervised
      metrics["supervised_loss"] = supervised
    metrics["loss"] = loss
    return loss, (metrics, updated["batch_stats"])

  grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
  grads, metrics = parallel.pmean((grads, metrics))
  state, norms = state.apply_gradients(optimizer, grads, batch_stats)
  return state, metrics | norms


def make_model(config, *, num_classes: int):
  """The student of a resolved config, or the teacher of its own config.

  >>> taught, _ = checkpoint.load("runs/finetuned")
  >>> make_model(taught, num_classes=10).classifier.features
  10
  """
  return build.make_model(
    config, num_classes=num_classes, head_layer=config.head_layer
  )


def make_step(config, model, optimizer, *, teacher):
  """`train_step` with everything bound that a resolved config says.

  >>> config = cli.load_recipe("digits", stage="distill")
  >>> taught, _ = checkpoint.load("runs/finetuned")
  >>> resolve_student(config, taught)
  >>> build.resolve(config)
  distill: ResNet-18 ...
  >>> model, teacher = [make_model(c, num_classes=10) for c in (config, taught)]
  >>> optimizer = build.make_optimizer(config, lambda step: 0.1)
  >>> make_step(config, model, optimizer, teacher=teacher).func is train_step
  True
  """
  return functools.partial(
    train_step,
    model=model,
    teacher=teacher,
    optimizer=optimizer,
    view_fn=build.make_views(config),
    distillation_fn=functools.partial(
      losses.distillation_loss,
      temperature=config.loss.temperature,
      scale_by_temperature=config.loss.scale_by_temperature,
    ),
    label_weight=config.loss.label_weight,
  )


def load_teacher(config):
  """Reads `config.teacher` as `checkpoint.load_described` does.

  Raises:
    UserError: no run is there, or one without a classifier.

  >>> config = cli.load_recipe("digits", stage="distill")
  >>> config.teacher = "runs/finetuned"
  >>> taught, variables, about = load_teacher(config)
  >>> len(about["label_names"])
  10
  """
  if not config.teacher:
    raise UserError(
      "config.teacher is empty; give the directory of a fine-tuned run: "
      "--config.teacher=DIR."
    )
  taught, variables, about = checkpoint.load_described(
    config.teacher, field="config.teacher"
  )
  if "classifier" not in variables["params"] or taught.stage == "pretrain":
    raise UserError(
      f"config.teacher: {config.teacher} holds a {taught.stage} run, which has "
      "no classifier to learn from; fine-tune it first."
    )
  return taught, variables, about


def train_and_evaluate(config, workdir) -> dict:
  """Distils the teacher into a student as `config` says and evaluates it.

  Args:
    config: see configs/distill.py.
    workdir: the run's directory; a run there is continued.

  Returns:
    What result.json holds.

  Raises:
    UserError: a mistake in the config, the data or the teacher.

  >>> config = cli.load_recipe("digits", stage="distill")
  >>> config.teacher, config.report = "runs/finetuned", False
  >>> config.num_steps = 2
  >>> result = train_and_evaluate(config, "runs/student")
  distill: ResNet-18 ...
  >>> result["protocol"]
  'distill'
  """
  config = build.start(config, stage="distill")
  workdir = storage.path(workdir)
  taught, teacher_variables, about = load_teacher(config)
  resolve_student(config, taught)
  lineage.refuse_seen(config, taught, field="teacher")
  build.resolve(config)
  rundir.check_same(config, workdir)
  train, test = data.open_splits(
    config, workdir, channels=build.channels(teacher_variables)
  )
  if not config.only_labelled:
    build.refuse_few(config, train)
  label_names = tuple(about["label_names"])
  if train.num_classes and train.label_names != label_names:
    raise UserError(
      f"config.teacher: {config.teacher} knows {len(label_names)} classes, "
      f"{', '.join(label_names[:9])}; {config.data.name} has "
      f"{train.num_classes}, {', '.join(train.label_names[:9])}."
    )
  if config.only_labelled or config.loss.label_weight:
    seen = _seen(train, about["labels_used"])
    train = _hide_labels(train, seen)
    if config.only_labelled:
      train = train.select(seen)
  num_steps = config_lib.num_steps(config, len(train))
  model = make_model(config, num_classes=len(label_names))
  loaded = None
  if config.pretrained:
    _, loaded = checkpoint.load(config.pretrained, field="config.pretrained")
  build.check_views(config, train)
  variables = build.init(config, model, train, loaded)  # may not fit
  if done := rundir.begin(config, workdir, num_steps, len(train), label_names):
    return done
  _check_teacher_unchanged(config, workdir, about)

  schedule = build.make_schedule(config, len(train), num_steps)
  overview.show(config, variables["params"], loaded=loaded and loaded["params"])
  optimizer = build.make_optimizer(config, schedule)
  step_fn = make_step(
    config,
    model,
    optimizer,
    teacher=make_model(taught, num_classes=len(label_names)),
  )
  state, metrics = loop.run(
    build.init_state(variables, optimizer),
    step_fn,
    build.host_batches(config, train, num_steps),
    config=config,
    workdir=workdir,
    num_steps=num_steps,
    evaluate=build.make_evaluate(config, model, test),
    learning_rate=schedule,
    constants=(teacher_variables,),
    extra={
      "label_names": list(label_names),
      "num_images": len(train),
      "labels_used": about["labels_used"],
      "pretrained": lineage.began_from(loaded, workdir),
      "teacher": {k: about[k] for k in ("workdir", "step", "hash")},
    },
  )
  result = rundir.write_result(
    workdir,
    build.result(
      config, protocol="distill", metrics=metrics, num_steps=num_steps
    ),
  )
  snapshots.save(
    workdir, config, state, model, train, test, build.make_views(config)
  )
  return result


def _check_teacher_unchanged(config, workdir, about: dict) -> None:
  """Raises UserError where a run would be continued with other labels."""
  found = checkpoint.latest(workdir)
  stored = found[2].get("teacher", about) if found else about
  if stored["hash"] != about["hash"]:
    raise UserError(
      f"config.teacher: {config.teacher} was at step {stored['step']} when the "
      f"run in {workdir} began, and holds another network now (step "
      f"{about['step']}); take another --workdir."
    )


def resolve_student(config, taught) -> None:
  """Fields of the student that were not given are the teacher's.

  >>> config = cli.load_recipe("digits", stage="distill")
  >>> resolve_student(config, checkpoint.load("runs/finetuned")[0])
  >>> config.model.width
  0.0625
  """
  where = f"the teacher {config.teacher}"
  theirs = config_lib.flat(taught)
  config_lib.inherit(config, theirs, build.VIEW, where=where)
  if (
    config.loss.label_weight or config.only_labelled
  ):  # no label that the teacher has not seen
    config_lib.fill(config, theirs, ("data.label_ids",))
  config_lib.fill(config, theirs, (*build.ENCODER, *build.HEAD, "head_layer"))


def _seen(train, used: dict) -> np.ndarray:
  """Which images the teacher was trained on with their labels."""
  return data.label_subset(train.listed, label_names=train.label_names, **used)


def _hide_labels(train, seen: np.ndarray):
  """Keeps the labels that the teacher was trained on, makes others -1."""
  labels = np.full_like(train.listed, -1)
  labels[seen] = train.listed[seen]
  return train.with_labels(labels)


if __name__ == "__main__":
  cli.run(train_and_evaluate, stage="distill")

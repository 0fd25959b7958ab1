"""Distillation on unlabelled images (SimCLRv2, 2006.10029, section 2).

  --config=configs/distill.py:digits        into a network of the teacher's
                                            own size (self-distillation)
  --config=configs/distill.py:digits --config.model.depth=18
                --config.model.width=0.125  into a smaller one

Recipes: digits, cifar10, imagenet, folder. `--config.teacher=DIR` names a
fine-tuned run. Fields of the student that are not given are the teacher's.
"""

import ml_collections

from simclr_jax.config import parse_arg


def get_config(arg="digits"):
  """Returns the recipe `arg`, every field present."""
  recipe, options = parse_arg(
    arg,
    recipes=("digits", "cifar10", "imagenet", "folder"),
    small=False,  # the recipe's smaller student in place of self-distillation
  )
  config = ml_collections.ConfigDict()
  config.stage = "distill"
  config.recipe = recipe
  config.seed = 0
  config.batch_size = 4096  # images, over all devices
  config.num_epochs = 400.0
  config.num_steps = 0  # 0: num_examples * num_epochs // batch_size + 1
  config.teacher = ""  # the directory of a fine-tuned (or distilled) run
  config.pretrained = ""  # the student's first weights; "": random
  config.only_labelled = False  # no images but those the teacher had labels of

  config.data = ml_collections.ConfigDict()
  config.data.name = "tfds:imagenet2012"  # digits | tfds:NAME | folder:PATH
  config.data.data_dir = (
    ""  # of TFDS; "": TFDS_DATA_DIR or ~/tensorflow_datasets
  )
  config.data.split = "train"
  config.data.eval_split = "validation"  # "": no evaluation
  config.data.image_size = 0  # from the teacher
  config.data.canvas_size = 0  # from the teacher
  config.data.labels = ""  # of a folder: a csv | folders | none; "": find out
  config.data.label_ids = ""  # a file of ids: their labels alone are used
  config.data.eval_fraction = 0.0  # of a folder's labels, held out as "test"
  config.data.on_error = "raise"  # at a damaged image: raise | skip
  config.data.memory_gib = 0.0  # larger: streamed; 0: its part of half the RAM

  # Crop and flip only, the same view for teacher and student.
  config.augment = ml_collections.ConfigDict()
  config.augment.flip_probability = 0.5
  config.augment.area_range = (0.08, 1.0)  # of the image
  config.augment.aspect_range = (0.75, 4 / 3)  # width / height

  config.model = ml_collections.ConfigDict()
  config.model.depth = 0  # the student's; this and the next three: teacher's
  config.model.width = 0.0
  config.model.sk_ratio = -1.0
  config.model.stem = "auto"
  config.model.pool_padding = "auto"
  config.model.dtype = "auto"  # bfloat16 where the device has it, or float32
  config.model.conv = "auto"  # the device's own: cpu | gpu; or xla
  config.model.remat = False  # recompute blocks in the backward pass
  config.model.bn_group_size = 0  # devices that share moments; 0: all

  config.head = ml_collections.ConfigDict()
  config.head.num_layers = -1  # the teacher's
  config.head.dim = 0
  config.head.width = 0.0
  config.head_layer = -1  # where the classifier sits; -1: as in the teacher

  config.loss = ml_collections.ConfigDict()
  # 0.1 for self-distillation, 1.0 from big to small.
  config.loss.temperature = 1.0 if options.small else 0.1
  config.loss.scale_by_temperature = False  # T**2: the colab does, not eq. 2
  # w of (1 - w) * distillation + w * cross-entropy over the teacher's labels.
  config.loss.label_weight = 0.0

  config.optim = ml_collections.ConfigDict()
  config.optim.name = "lars"  # lars | momentum | adam
  config.optim.learning_rate = 0.1
  config.optim.scaling = "sqrt"  # linear: * batch/256, sqrt: * batch**0.5, none
  config.optim.warmup_epochs = 20.0
  config.optim.weight_decay = 1e-4

  config.log_every_steps = 100
  config.eval_every_steps = 10_000
  config.checkpoint_every_steps = 1000
  config.keep_checkpoints = 2
  config.report = True  # write report.html at the end
  config.profile_steps = (0, 0)  # first and last step to trace; (0, 0): none

  if recipe == "imagenet" and options.small:
    config.model.depth = 50
    config.model.width = 1.0
    config.model.sk_ratio = 0.0

  if recipe == "cifar10":
    config.batch_size = 512
    config.data.name = "tfds:cifar10"
    config.data.eval_split = "test"
    if options.small:
      config.model.depth = 18
      config.model.width = 0.5
      config.model.sk_ratio = 0.0

  if recipe == "digits":
    config.batch_size = 128
    config.num_epochs = 15.0
    config.data.name = "digits"
    config.data.eval_split = "test"
    config.augment.flip_probability = 0.0
    config.augment.area_range = (0.5, 1.0)
    # A colder temperature or higher rate makes the classifier diverge: LARS
    # does not adapt it.
    config.loss.temperature = 1.0
    config.optim.learning_rate = 0.05
    config.optim.warmup_epochs = 2.0
    config.log_every_steps = 20
    config.eval_every_steps = 1000
    if options.small:
      config.model.depth = 18
      config.model.width = 0.125
      config.model.sk_ratio = 0.0

  if recipe == "folder":
    # All images, labelled or not, teach; as long as the pretraining.
    config.batch_size = 512
    config.num_epochs = 0.0  # 0 with num_steps 0: from the number of images
    config.data.name = "folder:"  # where it is must be given
    config.data.eval_split = "test"
    config.data.eval_fraction = 0.2
    config.optim.learning_rate = 0.075
    config.optim.warmup_epochs = 10.0
    config.eval_every_steps = 5000
    if options.small:
      config.model.depth = 18
      config.model.width = 1.0
      config.model.sk_ratio = 0.0

  return config

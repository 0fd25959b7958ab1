"""Training a classifier on labels (SimCLRv2, 2006.10029, section 2).

  --config=configs/finetune.py:digits              all labels
  --config=configs/finetune.py:digits,labels=1     1% of them
  --config=configs/finetune.py:digits,linear       linear evaluation: the
                                                   encoder stays as it is
  --config=configs/finetune.py:imagenet,labels=1,big  of a network bigger than
                                                   ResNet-50: a lower rate
  --config=configs/finetune.py:imagenet,supervised the official baseline: from
                                                   scratch, on all labels

Recipes: digits, cifar10, imagenet, folder. `--config.pretrained=DIR` names the
run to start from; without it the same network is trained from scratch. The
fields of the network and the image size come from that run (or from `scratch`)
and need not be given.
"""

import ml_collections

from simclr_jax.config import parse_arg


def get_config(arg="digits"):
  """Returns the recipe `arg`, every field present."""
  recipe, options = parse_arg(
    arg,
    recipes=("digits", "cifar10", "imagenet", "folder"),
    labels=100.0,  # percent
    linear=False,
    supervised=False,
    big=False,  # the paper's rate for networks bigger than ResNet-50
  )
  config = ml_collections.ConfigDict()
  config.stage = "finetune"
  config.recipe = recipe
  config.seed = 0  # also draws which labels are used
  config.batch_size = 1024  # images, over all devices
  config.num_epochs = 60.0 if options.labels <= 1 else 30.0
  config.num_steps = 0  # 0: num_examples * num_epochs // batch_size + 1
  config.pretrained = ""  # a run's directory; "": from scratch

  config.label_percent = options.labels  # of the labelled images, by class
  config.labels_per_class = 0  # instead of the percentage; 0: the percentage
  # Where the classifier sits: 0 is h, before the head. The paper starts from
  # layer 1 with few labels, and from the head's input with all of them.
  config.head_layer = 1 if options.labels < 100 else 0
  config.freeze_after_block = -1  # -1: none, 0: stem, .., 4: all but classifier
  config.train_head_layer = True  # official: TF2 trains it, TF1 does not

  config.data = ml_collections.ConfigDict()
  config.data.name = "tfds:imagenet2012"  # digits | tfds:NAME | folder:PATH
  config.data.data_dir = (
    ""  # of TFDS; "": TFDS_DATA_DIR or ~/tensorflow_datasets
  )
  config.data.split = "train"
  config.data.eval_split = "validation"  # "": no evaluation
  config.data.image_size = 0  # from the checkpoint
  config.data.canvas_size = 0  # from the checkpoint
  config.data.labels = ""  # of a folder: a csv | folders | none; "": find out
  config.data.label_ids = ""  # a file of ids: their labels alone are used
  config.data.eval_fraction = 0.0  # of a folder's labels, held out as "test"
  config.data.on_error = "raise"  # at a damaged image: raise | skip
  config.data.memory_gib = 0.0  # larger: streamed; 0: its part of half the RAM

  # Crop and flip only (official: color_distort is off).
  config.augment = ml_collections.ConfigDict()
  config.augment.flip_probability = 0.5
  config.augment.area_range = (0.08, 1.0)  # of the image
  config.augment.aspect_range = (0.75, 4 / 3)  # width / height

  config.model = ml_collections.ConfigDict()
  config.model.depth = 0  # this and the next three from the checkpoint
  config.model.width = 0.0
  config.model.sk_ratio = -1.0
  config.model.stem = "auto"
  config.model.pool_padding = "auto"
  config.model.dtype = "auto"  # bfloat16 where the device has it, or float32
  config.model.conv = "auto"  # the device's own: cpu | gpu; or xla
  config.model.remat = False  # recompute blocks in the backward pass
  config.model.bn_group_size = 0  # devices that share moments; 0: all

  config.head = ml_collections.ConfigDict()
  config.head.num_layers = -1  # from the checkpoint
  config.head.dim = 0
  config.head.width = 0.0

  config.optim = ml_collections.ConfigDict()
  config.optim.name = "lars"  # lars | momentum | adam
  config.optim.learning_rate = 0.005
  config.optim.scaling = "sqrt"  # linear: * batch/256, sqrt: * batch**0.5, none
  config.optim.warmup_epochs = 0.0
  config.optim.weight_decay = 0.0

  config.log_every_steps = 100
  config.eval_every_steps = 10_000
  config.checkpoint_every_steps = 1000
  config.keep_checkpoints = 2
  config.report = True  # write report.html at the end
  config.profile_steps = (0, 0)  # first and last step to trace; (0, 0): none

  # What the network is where `pretrained` is "".
  config.scratch = ml_collections.ConfigDict()
  config.scratch.depth = 50
  config.scratch.width = 1.0
  config.scratch.sk_ratio = 0.0
  config.scratch.stem = "auto"
  config.scratch.pool_padding = "same"
  config.scratch.num_layers = 3
  config.scratch.dim = 128
  config.scratch.head_width = 1.0
  config.scratch.image_size = 224
  config.scratch.canvas_size = 0

  if options.linear:
    # Official: Nesterov momentum on the classifier alone, which starts at 0.
    config.batch_size = 4096
    config.num_epochs = 90.0
    config.head_layer = 0
    config.freeze_after_block = 4
    config.optim.name = "momentum"
    config.optim.learning_rate = 0.1
    config.optim.scaling = "linear"
    config.optim.weight_decay = 1e-6

  if options.supervised:
    # google-research/simclr issue 10: SGD, no head.
    config.batch_size = 4096
    config.num_epochs = 90.0
    config.head_layer = 0
    config.optim.name = "momentum"
    config.optim.learning_rate = 0.1
    config.optim.scaling = "linear"
    config.optim.weight_decay = 1e-4

  if recipe == "cifar10":
    config.batch_size = 512
    config.data.name = "tfds:cifar10"
    config.data.eval_split = "test"
    config.scratch.depth = 18
    config.scratch.image_size = 32
    if options.linear:
      config.num_epochs = 100.0
      config.optim.weight_decay = 0.0

  if recipe == "digits":
    config.batch_size = 64
    config.num_epochs = 0.0
    config.num_steps = 60 if options.labels < 5 else 120
    if options.labels > 50:
      config.num_steps = 400
    config.data.name = "digits"
    config.data.eval_split = "test"
    config.augment.flip_probability = 0.0
    config.augment.area_range = (0.5, 1.0)
    config.optim.learning_rate = 0.05
    config.scratch.depth = 18
    config.scratch.width = 0.25
    config.scratch.image_size = 16
    config.scratch.canvas_size = 8
    config.log_every_steps = 20
    config.eval_every_steps = 1000
    if options.linear:
      # Adam, because h is not scaled and its size depends on the pretraining.
      config.num_steps = 1500
      config.augment.area_range = (0.9, 1.0)
      config.optim.name = "adam"
      config.optim.learning_rate = 0.01
      config.optim.scaling = "none"
      config.optim.weight_decay = 1e-3
      config.log_every_steps = 250

  if recipe == "folder":
    # For some 300 labels in all: small batches, from the head's first layer, as
    # the paper does with 1%, at its peak learning rate (0.16) and 60 epochs or
    # more (config.epochs_for).
    config.batch_size = 64
    config.num_epochs = 0.0  # 0 with num_steps 0: from the number of labels
    config.head_layer = 0 if options.linear or options.supervised else 1
    config.data.name = "folder:"  # where it is must be given
    config.data.eval_split = "test"
    config.data.eval_fraction = 0.2
    config.optim.learning_rate = 0.02
    config.scratch.image_size = 160
    config.log_every_steps = 20
    config.eval_every_steps = 1000
    if options.linear or options.supervised:
      config.optim.learning_rate = 0.1

  if options.big and config.optim.name == "lars":
    config.optim.learning_rate *= 0.4  # 0.002 where others have 0.005

  return config

"""Pretraining without labels (SimCLRv2, 2006.10029, section 2).

  --config=configs/pretrain.py:digits      minutes on a CPU
  --config=configs/pretrain.py:cifar10     the official CIFAR-10 recipe
  --config=configs/pretrain.py:imagenet    the official recipe of SimCLRv2
  --config=configs/pretrain.py:folder      your own images:
                                           --config.data.name=folder:PATH

  --config=configs/pretrain.py:imagenet,short   100 epochs, as in its README
  --config=configs/pretrain.py:cifar10,sqrt     its author's for small batches
  --config=configs/pretrain.py:cifar10,tiny     a part of CIFAR-10 on a CPU

Options: `digits,depth=18,width=0.5,epochs=20`. Any field can be set after it:
`--config.loss.temperature=0.1`. 0, "" and "auto" mean derived; the run prints
what they became and keeps it in config.json, but for `model.conv` and
`data.memory_gib`, which each start derives for its machine.
"""

import ml_collections

from simclr_jax.config import UserError, parse_arg


def get_config(arg="digits"):
  """Returns the recipe `arg`, every field present."""
  recipe, options = parse_arg(
    arg,
    recipes=("digits", "cifar10", "imagenet", "folder"),
    depth=0,
    width=0.0,
    epochs=0.0,
    short=False,
    sqrt=False,
    tiny=False,
  )
  config = ml_collections.ConfigDict()
  config.stage = "pretrain"
  config.recipe = recipe
  config.seed = 0
  config.batch_size = 4096  # images, over all devices
  config.num_epochs = 800.0
  config.num_steps = 0  # 0: num_examples * num_epochs // batch_size + 1
  # Continue from the weights of this run (or of a converted official one): the
  # network, head and image size are then that run's. "": random weights.
  config.pretrained = ""

  config.data = ml_collections.ConfigDict()
  config.data.name = "tfds:imagenet2012"  # digits | tfds:NAME | folder:PATH
  config.data.data_dir = (
    ""  # of TFDS; "": TFDS_DATA_DIR or ~/tensorflow_datasets
  )
  config.data.split = "train"
  config.data.eval_split = "validation"  # "": no evaluation
  config.data.image_size = 224  # pixels, what the network sees
  config.data.canvas_size = 0  # pixels, what the host keeps; 0: from image_size
  config.data.labels = ""  # of a folder: a csv | folders | none; "": find out
  config.data.label_ids = ""  # a file of ids: their labels alone are used
  config.data.eval_fraction = 0.0  # of a folder's labels, held out as "test"
  config.data.on_error = "raise"  # at a damaged image: raise | skip
  config.data.memory_gib = 0.0  # larger: streamed; 0: its part of half the RAM

  # At strength 1; SimCLRv2's `simclrv2` operations (data_util.py).
  config.augment = ml_collections.ConfigDict()
  config.augment.strength = 1.0  # scales the four below
  config.augment.brightness = 0.8
  config.augment.contrast = 0.8
  config.augment.saturation = 0.8
  config.augment.hue = 0.2  # turns
  config.augment.jitter_probability = 0.8
  config.augment.gray_probability = 0.2
  config.augment.blur_probability = 0.5  # 0: no blur
  config.augment.flip_probability = 0.5
  config.augment.area_range = (0.08, 1.0)  # of the image
  config.augment.aspect_range = (0.75, 4 / 3)  # width / height

  config.model = ml_collections.ConfigDict()
  config.model.depth = options.depth or 50  # 18, 34, 50, 101, 152, 200
  config.model.width = options.width or 1.0  # multiplies every channel count
  config.model.sk_ratio = 0.0  # selective kernels; 0.0625 in the paper
  config.model.stem = "auto"  # imagenet | cifar; auto: cifar up to 64 pixels
  config.model.pool_padding = "same"  # of the stem's max-pool; or torch
  config.model.dtype = "auto"  # bfloat16 where the device has it, or float32
  config.model.conv = "auto"  # the device's own: cpu | gpu; or xla
  config.model.remat = False  # recompute blocks in the backward pass
  config.model.bn_group_size = 0  # devices that share moments; 0: all

  config.head = ml_collections.ConfigDict()
  config.head.num_layers = 3
  config.head.dim = 128
  config.head.width = 1.0  # units of its hidden layers over features of h

  config.loss = ml_collections.ConfigDict()
  config.loss.name = "nt_xent"  # nt_xent | supcon: labels too, where known
  config.loss.temperature = 0.1
  config.loss.block_size = 0  # pairs a time, saves memory; 0: all at once
  config.probe = True  # train a linear classifier beside, behind stop_gradient

  # Embeddings of earlier batches as more negatives. The paper's 65,536 gain it
  # some 1% at batch 4096; its released code and checkpoints have none.
  config.memory = ml_collections.ConfigDict()
  config.memory.size = 0  # a multiple of batch_size; 0: no memory
  config.memory.momentum = 0.999  # of the average of weights that makes them

  config.optim = ml_collections.ConfigDict()
  config.optim.name = "lars"  # lars | momentum | adam
  config.optim.learning_rate = 0.1
  config.optim.scaling = "sqrt"  # linear: * batch/256, sqrt: * batch**0.5, none
  config.optim.warmup_epochs = 40.0
  config.optim.weight_decay = 1e-4

  config.knn = ml_collections.ConfigDict()
  config.knn.num_neighbors = 200
  config.knn.bank_size = 50_000  # training images drawn as the bank; 0: no kNN
  config.log_every_steps = 100
  config.eval_every_steps = 10_000
  config.checkpoint_every_steps = 1000
  config.keep_checkpoints = 2
  config.report = True  # write report.html at the end
  config.profile_steps = (0, 0)  # first and last step to trace; (0, 0): none

  if options.short:
    # google-research/simclr README: ResNet-50 reaches 64.5% linear.
    config.num_epochs = 100.0
    config.optim.learning_rate = 0.075
    config.optim.warmup_epochs = 10.0

  if recipe == "cifar10":
    # google-research/simclr README, "Pretraining on CIFAR-10": about 91%
    # linear on the original pixels.
    config.batch_size = 512
    config.num_epochs = 1000.0
    config.data.name = "tfds:cifar10"
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.augment.strength = 0.5
    config.augment.blur_probability = 0.0
    config.model.depth = options.depth or 18
    config.loss.temperature = 0.5
    config.optim.learning_rate = 1.0
    config.optim.scaling = "linear"
    config.optim.warmup_epochs = 10.0
    config.eval_every_steps = 5000
    if options.sqrt or options.tiny:
      # google-research/simclr issue 166, for any batch size and 100 epochs or
      # more.
      config.head.dim = 64
      config.head.width = 2.0 if options.sqrt else 1.0
      config.loss.temperature = 0.2
      config.optim.learning_rate = 0.2
      config.optim.scaling = "sqrt"
    if options.tiny:
      # 17 s an epoch on two cores; at 32 pixels it would be 67.
      config.batch_size = 256
      config.num_epochs = 50.0
      config.data.split = "train[:20%]"
      config.data.image_size = 16
      config.data.canvas_size = 32
      config.augment.area_range = (0.2, 1.0)
      config.model.width = options.width or 0.25
      config.optim.warmup_epochs = 3.0
  elif options.sqrt or options.tiny:
    raise UserError("the options sqrt and tiny belong to the recipe cifar10.")

  if recipe == "digits":
    # Gray 8x8 scans; no flip, because a mirrored digit is another thing.
    config.batch_size = 256
    config.num_epochs = 35.0
    config.data.name = "digits"
    config.data.eval_split = "test"
    config.data.image_size = 16
    config.data.canvas_size = 8
    config.augment.brightness = 0.6
    config.augment.contrast = 0.6
    config.augment.saturation = 0.0
    config.augment.hue = 0.0
    config.augment.gray_probability = 0.0
    config.augment.blur_probability = 0.0
    config.augment.flip_probability = 0.0
    config.augment.area_range = (0.3, 1.0)
    config.model.depth = options.depth or 18
    config.model.width = options.width or 0.25
    config.head.dim = 64
    config.loss.temperature = 0.2
    config.knn.num_neighbors = 20  # there are 140 images a class
    config.optim.learning_rate = 0.2
    config.optim.warmup_epochs = 5.0
    config.log_every_steps = 10
    config.eval_every_steps = 1000
    config.checkpoint_every_steps = 50

  if recipe == "folder":
    # For some 50,000 photos, 300 of them labelled, and one GPU of 40 GB; a
    # choice made for this package, not a published one. ResNet-50, because
    # with few labels a bigger network is better (2006.10029, figure 1), and
    # at 160 pixels, because that halves the time of 224. Batch 512 with the
    # square-root rule and 0.075, which the SimCLR paper finds best for batches
    # this small (2002.05709, B.1); a temperature between that of ImageNet (4096
    # images) and that of CIFAR-10. 10 million images are seen: 200 epochs of
    # 50,000, 20,000 steps, some hours.
    config.batch_size = 512
    config.num_epochs = 0.0  # 0 with num_steps 0: from the number of images
    config.data.name = "folder:"  # where it is must be given
    config.data.eval_split = "test"
    config.data.eval_fraction = 0.2
    config.data.image_size = 160
    config.head.dim = 64
    config.loss.temperature = 0.2
    config.optim.learning_rate = 0.075
    config.optim.warmup_epochs = 10.0
    config.eval_every_steps = 5000

  if options.epochs:
    config.num_epochs = options.epochs
  return config
